"""The commands `order` and `attach`."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from tests.command_line import Run, command_runner
from tests.planted import add_open_breaker
from tests.planted_orders import add_uncertain
from tests.rows import add_job, read_job, update_job
from tests.web import Web, page
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.schema import jobs, orders

ENDPOINT = "v6/images/text2img"
PAYLOAD = {"prompt": "größer", "samples": 2}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command in this process."""
    return command_runner(capsys)


def _payloads(engine: Engine) -> list[object]:
    with engine.connect() as connection:
        return [json.loads(text) for text in connection.execute(select(orders.c.payload)).scalars()]


def test_an_order_of_a_file_is_written_and_its_job_is_printed(
    configured_sqlite: Engine, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "order.json").write_text(json.dumps(PAYLOAD), encoding="utf-8")

    result = run("order", ENDPOINT, str(tmp_path / "order.json"), "--reference", "r", "--priority", "3", "--json")

    assert (result.code, result.err) == (0, "")
    assert result.document == [{"id": 1, "status": "ordered", "created": True}]
    assert _payloads(configured_sqlite) == [PAYLOAD]
    with configured_sqlite.connect() as connection:
        assert tuple(connection.execute(select(jobs.c.reference, jobs.c.priority)).one()) == ("r", 3)


@pytest.mark.parametrize("arguments", [(ENDPOINT,), (ENDPOINT, "-")])
def test_without_a_file_the_payload_is_read_from_standard_input(
    configured_sqlite: Engine, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(PAYLOAD).encode())))

    result = run("order", *arguments)

    assert result.code == 0
    assert "ordered" in result.out
    assert _payloads(configured_sqlite) == [PAYLOAD]


@pytest.mark.parametrize(
    ("text", "endpoint", "options", "code", "message"),
    [
        ("{", ENDPOINT, [], 1, 'the payload is not JSON: write an object such as {"prompt": "a lake"}'),
        ("[" * 100_000, ENDPOINT, [], 1, "the payload is not JSON"),
        ("\udcff", ENDPOINT, [], 1, "the payload is not JSON"),
        ("[1]", ENDPOINT, [], 1, "payload must be a mapping"),
        ('{"a": NaN}', ENDPOINT, [], 1, "can't be written as JSON"),
        ('{"key": "k"}', ENDPOINT, [], 1, "must not contain the key"),
        ("{}", "v6/images/fetch/1", [], 1, "orders nothing"),
        ("{}", ENDPOINT, ["--account", "a b"], 1, "is not a valid account name"),
        ("{}", ENDPOINT, ["--priority", "high"], 2, "priority"),
    ],
)
def test_a_wrong_order_is_refused_with_one_line_and_nothing_is_written(
    configured_sqlite: Engine,
    run: Run,
    tmp_path: Path,
    text: str,
    endpoint: str,
    options: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "order.json").write_bytes(text.encode("utf-8", "surrogateescape"))

    result = run("order", endpoint, str(tmp_path / "order.json"), *options)

    assert result.code == code
    assert message in result.err
    assert _payloads(configured_sqlite) == []


def test_an_uncertain_order_is_attached(configured_sqlite: Engine, run: Run, tmp_path: Path) -> None:
    (tmp_path / "order.json").write_text("{}", encoding="utf-8")
    run("order", ENDPOINT, str(tmp_path / "order.json"))
    too_early = run("attach", "1", "77", "--json")
    update_job(configured_sqlite, 1, status="uncertain")

    attached = run("attach", "1", "77", "--json")

    assert (too_early.code, too_early.document) == (1, [{"id": 1, "changed": False, "status": "ordered"}])
    assert "job 1 is not uncertain" in too_early.err
    assert (attached.code, attached.document) == (0, [{"id": 1, "changed": True, "status": "pending"}])
    assert read_job(configured_sqlite, 1).remote_id == "77"


@pytest.mark.parametrize(
    ("arguments", "message"), [(("4711", "77"), "there is no job 4711"), (("1", "../x"), "can't be a remote id")]
)
def test_what_can_not_be_attached_is_refused_with_one_line(
    configured_sqlite: Engine, run: Run, arguments: tuple[str, ...], message: str
) -> None:
    result = run("attach", *arguments)

    assert result.code == 1
    assert message in result.err
    assert result.err.count("\n") == 1


# ── candidates ────────────────────────────────────────────────────────────────────────────────────────────────────────

KEY = "sk-candidates-0123456789"


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> Iterator[Sandbox]:
    """A stand-in in place of the API. Its jobs are ready at once."""
    with Sandbox(SandboxOptions(key=KEY, min_seconds=0, max_seconds=0, size=32)) as running:
        monkeypatch.setenv("SD_API_URL", running.url)
        monkeypatch.setenv("SD_API_KEY", KEY)
        monkeypatch.setenv("REDIS_URL", redis_url)
        yield running


def _uncertain(engine: Engine) -> int:
    with engine.begin() as connection:
        return add_uncertain(connection)


def test_given_no_remote_id_when_a_candidate_is_chosen_then_its_command_attaches_it(
    configured_sqlite: Engine, run: Run, sandbox: Sandbox
) -> None:
    lost = sandbox.submit("a lake", family=ENDPOINT, samples=2)
    job_id = _uncertain(configured_sqlite)

    listed = run("attach", str(job_id), "--json")
    table = run("attach", str(job_id))
    before = read_job(configured_sqlite, job_id).status

    command = f"fetch-worker attach {job_id} {lost['id']}"
    [candidate] = listed.document
    assert (listed.code, table.code, before) == (0, 0, "uncertain")
    assert {**candidate, "created_at": None} == {
        **{"remote_id": str(lost["id"]), "created_at": None, "outputs": 2, "links": lost["output"]},
        "command": command,
    }
    assert candidate["created_at"].endswith("Z")
    assert command in table.out
    assert lost["output"][0] in table.out
    assert f"the command of the job that order {job_id} made. It was sent at " in table.out
    assert run(*command.split()[1:]).code == 0
    assert read_job(configured_sqlite, job_id).remote_id == str(lost["id"])


def test_given_no_candidates_then_one_line_says_so_and_the_command_succeeds(
    configured_sqlite: Engine, run: Run, sandbox: Sandbox
) -> None:
    job_id = str(_uncertain(configured_sqlite))

    empty = run("attach", job_id)
    with configured_sqlite.begin() as connection:
        add_job(connection, str(sandbox.submit("a lake")["id"]))
    known = run("attach", job_id)

    assert (empty.code, known.code, run("attach", job_id, "--json").document) == (0, 0, [])
    assert "the API's list of recent outputs of the type image is empty" in empty.out
    assert "has nothing new: jobs here have its 1 remote id already" in known.out


def test_given_an_account_without_such_a_list_then_one_line_says_so(
    configured_sqlite: Engine, run: Run, sandbox: Sandbox, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_API_URL", f"{web.url}/api/v3")

    result = run("attach", str(_uncertain(configured_sqlite)), "--json")

    assert (result.code, result.out) == (1, "")
    assert result.err == "fetch-worker: the API has no list of recent outputs for account default\n"


def test_given_markup_and_control_characters_in_the_list_then_they_are_shown_as_they_are(
    configured_sqlite: Engine, run: Run, sandbox: Sandbox, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_API_URL", f"{web.url}/api/v3")
    entry = {"id": 7, "output": ["https://h/[red]a[/red]\x1b[31m.png"]}
    web.serves("/api/v6/assets_generated", page(200, json.dumps({"data": [entry], "last_page": 1}).encode()))

    result = run("attach", str(_uncertain(configured_sqlite)))

    assert result.code == 0
    assert "https://h/[red]a[/red]" in result.out
    assert "\x1b" not in result.out


@pytest.mark.parametrize(
    ("job", "message"), [("4711", "there is no job 4711"), ("1", "job 1 is not uncertain"), ("2", "is held (")]
)
def test_given_a_job_without_candidates_then_one_line_says_why(
    configured_sqlite: Engine, run: Run, sandbox: Sandbox, job: str, message: str
) -> None:
    with configured_sqlite.begin() as connection:
        add_job(connection)
        add_uncertain(connection)
        add_open_breaker(connection, "account", "default", "no credits: Insufficient credits")

    result = run("attach", job)

    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not sandbox.calls.by_path
