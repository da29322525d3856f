"""Taking jobs in hand on the command line: single ones, all that a filter finds, accounts and hosts as a whole."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Engine, insert, select, update

from tests.rows import NOW, add_downloading, add_job, add_output, job_of
from worker.cli import control, main
from worker.client import actions
from worker.store.breakers import all_breakers
from worker.store.counters import FINISHED, read_counters
from worker.store.engine import transact
from worker.store.schema import HELD_UNTIL, breakers, events, jobs, outputs


@dataclass(frozen=True)
class Said:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Its stdout, which must be one JSON document."""
        return json.loads(self.out)


Run = Callable[..., Said]
LATER = {"due_at": HELD_UNTIL.replace(year=9998), "deadline_at": HELD_UNTIL.replace(year=9998)}
FAILED = {"status": "failed", "error_code": "api_failed", "due_at": None, "completed_at": NOW}


@pytest.fixture
def run(engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process, on the test's database, with nobody at a terminal."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def command(*words: str) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        assert "Traceback" not in said.err
        return Said(ended.value.code, said.out, said.err)

    return command


def _add(engine: Engine, *remotes: str, **values: Any) -> list[int]:
    with engine.begin() as connection:
        return [add_job(connection, remote, **(LATER | values)) for remote in remotes]


def _rows(ids: list[int], status: str, *, changed: bool = True) -> list[dict[str, Any]]:
    return [{"id": job_id, "changed": changed, "status": status} for job_id in ids]


# ── finding ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_list_takes_every_filter_and_each_of_them_again(engine: Engine, run: Run) -> None:
    """Different options must all be true; of one option that is given again any value will do."""
    now = {"submitted_at": NOW, "tracked_at": NOW}
    with engine.begin() as connection:
        old = add_job(connection, "old", **LATER | now, reference="a", kind="video", account="shop")
        failed = add_job(connection, "failed", **FAILED | now, reference="b")
        cut = FAILED | {"error_code": "output_failed", "ready_at": NOW}
        add_output(
            connection, gone := add_job(connection, "gone", **cut), status="failed", error_code="gone", due_at=None
        )
        claimed = {"claim_token": "t", "claim_holder": "ada"}
        stuck = add_job(connection, "stuck", **claimed, fetch_host="other.test", deadline_at=HELD_UNTIL)
        late = add_job(connection, "late", deadline_at=NOW)
        held = add_job(connection, "held", due_at=HELD_UNTIL, held_at=NOW, deadline_at=HELD_UNTIL)

    def found(*words: str) -> list[int]:
        said = run("list", "--json", *words)
        assert (said.code, said.err) == (0, "")
        return [row["id"] for row in said.document]

    assert found() == [held, late, stuck, gone, failed, old]
    assert found("--status", "failed") == [gone, failed]
    assert found("--status", "failed", "--status", "pending", "--kind", "video") == [old]
    assert found("--account", "shop") == [old]
    assert found("--remote", "old", "--remote", "late") == [late, old]
    assert found("--reference", "a", "--reference", "b") == [failed, old]
    assert found("--code", "api_failed") == [failed]
    assert found("--output-code", "gone") == [gone]
    assert found("--host", "Other.test") == [stuck]
    assert found("--since", "2026-03-01T13:00:00+01:00") == [held, late, stuck, gone, failed, old]
    assert found("--since", "1s") == found("--finished-since", "1s") == []
    assert found("--until", "1s", "--limit", "2") == [held, late]
    assert found("--finished-until", "1s") == [gone, failed]
    assert found("--finished-since", "2026-03-01T12:00:00Z") == [gone, failed]
    assert found("--late", "60") == found("--past-deadline", "--late", "0") == [late]
    assert found("--stuck") == found("--claimed-by", "ada") == [stuck]
    assert found("--past-deadline") == [late]
    assert found("--held") == [held]
    assert "held" in run("list", "--held").out


@pytest.mark.parametrize(
    "given", ["2026-03-01T12:00:00", "yesterday", "15", "-15m", "15 m", "", "1e99d", "9" * 400 + "s"]
)
def test_what_is_no_time_is_wrong_usage(run: Run, given: str) -> None:
    said = run("list", "--since", given)

    assert (said.code, said.out) == (2, "")
    assert "Traceback" not in said.err


def test_an_age_beyond_the_calendar_is_wrong_usage(run: Run) -> None:
    assert run("list", "--since", "999999d").code == 2


# ── jobs by name ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_hold_and_resume_answer_what_changed(engine: Engine, run: Run) -> None:
    """As cancel and retry do: `[{id, changed, status}]`; an id that changed nothing makes it exit 1."""
    ids = _add(engine, "1", "2")
    words = [str(job_id) for job_id in ids]
    steps = [run(action, *words, "--json") for action in ("hold", "hold", "resume", "resume")]

    assert [said.code for said in steps] == [0, 1, 0, 1]
    assert [said.document for said in steps] == [
        _rows(ids, "pending", changed=changed) for changed in (True, False, True, False)
    ]
    missing = run("hold", words[0], "999999", "--json")
    assert (missing.code, missing.document) == (1, _rows(ids[:1], "pending"))
    assert "no job 999999" in missing.err


def test_show_says_that_a_job_is_held_and_not_when_it_is_asked(engine: Engine, run: Run) -> None:
    [job_id] = _add(engine, "1")
    run("hold", str(job_id))

    shown = run("show", str(job_id), "--json").document

    assert shown["why"].startswith("held by an operator since 20")
    assert (shown["next_poll_at"], shown["believed"]) == (None, None)


def test_remote_ids_name_jobs_of_any_account_or_of_some(engine: Engine, run: Run) -> None:
    """Nobody is asked; one that is not there is an error."""
    first, other = _add(engine, "1") + _add(engine, "1", account="shop")
    assert run("hold", "--remote", "1", "--account", "shop", "--json").document == _rows([other], "pending")
    assert run("cancel", "--remote", "1", "--json").document == _rows([other, first], "cancelled")
    missing = run("cancel", "--remote", "1", "--remote", "2", "--json")
    assert (missing.code, missing.out) == (1, "")
    assert "remote id '2'" in missing.err


# ── all that a filter finds ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few jobs are many: pages and transactions of two or three."""
    monkeypatch.setattr(actions, "FEW", 5)
    monkeypatch.setattr(actions, "BATCH", 2)


@pytest.mark.usefixtures("small_steps")
def test_cancelling_all_that_a_filter_finds_leaves_the_others(engine: Engine, run: Run) -> None:
    """Their unstored outputs end, each is counted once, and what is final already stays as it is."""
    ids = _add(engine, *map(str, range(8)), kind="video")
    [ended] = _add(engine, "ended", kind="video", **FAILED)
    [other] = _add(engine, "other")
    with engine.begin() as connection:
        loading = add_downloading(connection, "loading", kind="video")
        add_output(connection, loading)

    said = run("cancel", "--kind", "video", "--yes", "--json")

    assert (said.code, said.document) == (0, _rows([loading, *reversed(ids)], "cancelled"))
    assert [job_of(engine, job_id).status for job_id in (ended, other)] == ["failed", "pending"]
    with engine.connect() as connection:
        assert [row.error_code for row in connection.execute(select(outputs)).all()] == ["cancelled"]
        [total] = [one for one in read_counters(connection, [FINISHED]) if one.key.label == "cancelled"]
    assert total.times == 9
    again = run("cancel", "--kind", "video", "--yes", "--json")
    assert (again.code, again.document) == (0, [])
    assert "no job matches" in again.err


@pytest.mark.usefixtures("small_steps")
def test_retrying_all_that_a_filter_finds(engine: Engine, run: Run) -> None:
    """Failed outputs are tried again, others are polled, each with its own deadline; the end is still announced."""
    polled = _add(engine, "1", "2", "3", **FAILED)
    short = _add(engine, "4", **FAILED, deadline_seconds=60.0, webhook_url="https://shop.test/hook")
    other = _add(engine, "5", **FAILED | {"error_code": "not_found"})
    with engine.begin() as connection:
        loading = add_job(connection, "6", **FAILED, ready_at=NOW)
        add_output(connection, loading, 0, status="failed", error_code="gone", due_at=None)
        stored = {"location": "file:///x", "sha256": "0", "size_bytes": 1, "media_type": "image/png", "stored_at": NOW}
        add_output(connection, loading, 1, status="stored", due_at=None, **stored)

    said = run("retry", "--code", "api_failed", "--yes", "--json")

    assert (said.code, said.document) == (
        0,
        _rows([loading], "downloading") + _rows([*short, *reversed(polled)], "pending"),
    )
    assert job_of(engine, other[0]).status == "failed"
    rows = [job_of(engine, job_id) for job_id in (polled[0], short[0])]
    assert [(row.deadline_at - row.due_at).total_seconds() for row in rows] == [3_600.0, 60.0]
    with engine.connect() as connection:
        assert connection.execute(select(events.c.job_id, events.c.type)).all() == [(short[0], "job.failed")]
        assert [row.status for row in connection.execute(select(outputs).order_by(outputs.c.position)).all()] == [
            "pending",
            "stored",
        ]


@pytest.mark.usefixtures("small_steps")
def test_holding_and_resuming_all_that_a_filter_finds(engine: Engine, run: Run) -> None:
    """`resume --held` leaves alone what is held with its account."""
    ids = _add(engine, "1", "2", "3", account="shop", kind="video")
    [other] = _add(engine, "4", account="shop")
    with engine.begin() as connection:
        connection.execute(insert(breakers).values(scope="account", name="shop", paused_at=NOW))

    held = run("hold", "--account", "shop", "--kind", "video", "--yes", "--json")
    listed = run("list", "--held", "--json").document
    resumed = run("resume", "--held", "--yes", "--json")

    assert (held.code, held.document) == (0, _rows(ids[::-1], "pending"))
    assert [row["id"] for row in listed] == [other, *ids[::-1]]
    assert (resumed.code, resumed.document) == (0, _rows(ids[::-1], "pending"))
    assert job_of(engine, other).due_at == LATER["due_at"]


@pytest.mark.parametrize(
    ("words", "changing"),
    [
        (("cancel", "--kind", "video"), "pending"),
        (("retry", "--kind", "video"), "failed"),
        (("hold", "--kind", "video"), "pending"),
        (("resume", "--kind", "video"), "held"),
        (("hold", "--status", "failed"), None),
    ],
)
def test_a_dry_run_says_which_it_would_be_and_changes_nothing(
    engine: Engine, run: Run, words: tuple[str, ...], changing: str | None
) -> None:
    """Without a terminal, too."""
    ids = {
        "pending": _add(engine, "1", kind="video"),
        "failed": _add(engine, "2", kind="video", **FAILED),
        "held": _add(engine, "3", kind="video", due_at=HELD_UNTIL, held_at=NOW),
    }
    expected = ids.get(changing or "", []) + (ids["held"] if words[0] == "cancel" else [])
    with engine.connect() as connection:
        before = connection.execute(select(jobs).order_by(jobs.c.id)).all()

    said, document = run(*words, "--dry-run"), run(*words, "--dry-run", "--json")

    assert (said.code, document.code) == (0, 0)
    assert [row["id"] for row in document.document] == expected[::-1]
    assert all(row["changed"] for row in document.document)
    if expected:
        assert said.out.startswith(f"{len(expected)} job")
        assert "would be" in said.out
    with engine.connect() as connection:
        assert connection.execute(select(jobs).order_by(jobs.c.id)).all() == before


def test_a_dry_run_of_many_shows_some_of_them(engine: Engine, run: Run) -> None:
    _add(engine, *map(str, range(30)), kind="video")

    said = run("cancel", "--kind", "video", "--dry-run")

    assert said.out.startswith("30 jobs would be cancelled\n")
    assert "and 10 more" in said.out
    assert len(run("cancel", "--kind", "video", "--dry-run", "--json").document) == 30


def test_a_dry_run_of_named_jobs_tells_how_it_would_end(engine: Engine, run: Run) -> None:
    [pending], [ended] = _add(engine, "1"), _add(engine, "2", **FAILED)

    said = run("hold", str(pending), str(ended), "--dry-run", "--json")

    assert said.code == 1
    assert said.document == _rows([pending], "pending") + _rows([ended], "failed", changed=False)
    assert job_of(engine, pending).held_at is None


def test_without_a_terminal_a_filter_takes_yes(engine: Engine, run: Run) -> None:
    [job_id] = _add(engine, "1")

    said = run("cancel", "--status", "pending", "--json")

    assert (said.code, said.out) == (2, "")
    assert "--dry-run" in said.err
    assert "--yes" in said.err
    assert job_of(engine, job_id).status == "pending"


@pytest.mark.parametrize(("answer", "code", "status"), [("n", 1, "pending"), ("y", 0, "cancelled")])
def test_on_a_terminal_it_asks_first(engine: Engine, run: Run, answer: str, code: int, status: str) -> None:
    """A real one. The document on stdout stays one."""
    ids = _add(engine, "1", "2")
    keyboard, terminal = pty.openpty()
    os.write(keyboard, f"{answer}\n".encode())

    done = subprocess.run(
        [sys.executable, "-c", "from worker.cli import main; main()", "cancel", "--status", "pending", "--json"],
        stdin=terminal, env=dict(os.environ), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(terminal)
    os.close(keyboard)

    assert done.returncode == code, done.stderr
    assert "cancel 2 jobs? [y/N]" in done.stderr
    assert [job_of(engine, job_id).status for job_id in ids] == [status] * 2
    if code == 0:
        assert json.loads(done.stdout) == _rows(ids[::-1], "cancelled")


@pytest.mark.parametrize(
    "words", [(), ("1", "--status", "pending"), ("1", "--late", "0"), ("--dry-run",), ("x",), ("1", "--remote", "2")]
)
@pytest.mark.parametrize("action", ["cancel", "hold"])
def test_it_takes_ids_or_filters_and_one_of_them(run: Run, action: str, words: tuple[str, ...]) -> None:
    said = run(action, *words)

    assert (said.code, said.out) == (2, "")


@pytest.mark.usefixtures("small_steps")
def test_where_it_ends_early_it_says_how_far_it_came(engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done is done; the same command again does the rest."""
    _add(engine, *map(str, range(7)))
    calls: list[Any] = []

    def cut_off(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return transact(*arguments)

    monkeypatch.setattr(actions, "transact", cut_off)
    stopped = run("cancel", "--status", "pending", "--yes")
    rest = run("cancel", "--status", "pending", "--yes", "--json")

    assert stopped.code == 130
    assert "4 jobs cancelled so far" in stopped.err
    assert len(rest.document) == 3


@pytest.mark.usefixtures("small_steps")
def test_what_ends_meanwhile_is_left_alone(engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is ready between the look and its turn is stored, not held."""
    ids = _add(engine, "1", "2", "3")

    def late(engine: Engine, work: Any) -> Any:
        with engine.begin() as connection:
            over = {"status": "completed", "due_at": None, "completed_at": NOW, "ready_at": NOW}
            connection.execute(update(jobs).where(jobs.c.id == ids[0]).values(over))
        return transact(engine, work)

    monkeypatch.setattr(actions, "transact", late)
    said = run("hold", "--status", "pending", "--yes", "--json")

    assert (said.code, said.document) == (0, _rows([ids[2], ids[1]], "pending"))
    assert job_of(engine, ids[0]).held_at is None


# ── accounts and hosts ────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_account_alone_is_held_as_a_whole_and_resumed(engine: Engine, run: Run) -> None:
    """Once more does no harm, and a dry run says what it would do."""
    [job_id] = _add(engine, "1", account="shop")
    steps = [
        run(*words, "--account", "shop", "--json")
        for words in (("hold", "--dry-run"), ("hold",), ("hold",), ("resume", "--dry-run"), ("resume",), ("resume",))
    ]

    assert [said.code for said in steps] == [0] * 6
    assert [said.document for said in steps] == [
        [{"scope": "account", "name": "shop", "changed": changed}] for changed in (True, True, False, True, True, False)
    ]
    assert job_of(engine, job_id).held_at is None
    assert "shop" in run("hold", "--account", "shop").out
    assert run("show", str(job_id), "--json").document["why"].startswith("held: held by an operator")


def test_hosts_are_held_by_the_names_that_jobs_have(engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that no job can have is refused: it would hold nothing, and nobody would know."""
    monkeypatch.setenv("SD_API_HOSTS", "api.test")
    _add(engine, "1", fetch_host="other.test:8443")

    said = run("hold", "--host", "API.test:443", "--host", "other.test:8443", "--json")

    assert [row["name"] for row in said.document] == ["api.test", "other.test:8443"]
    with engine.connect() as connection:
        assert {key for key, breaker in all_breakers(connection).items() if breaker.paused_at is not None} == {
            ("host", "api.test"),
            ("host", "other.test:8443"),
        }
    refused = run("hold", "--host", "api.tset")
    assert refused.code == 2
    assert "api.test" in refused.err
    assert run("hold", "--account", "a b").code == 2


def test_progress_is_told_on_stderr(engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "TELL_SECONDS", (0.0, 0.0))
    _add(engine, "1", "2")

    said = run("cancel", "--status", "pending", "--yes")

    assert re.search(r"2 of 2 cancelled", said.err)
    assert said.out == "2 jobs cancelled\n"
