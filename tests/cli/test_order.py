"""The commands `order` and `attach`."""

import io
import json
import sys
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from tests.command_line import Run, command_runner
from tests.rows import read_job, update_job
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
