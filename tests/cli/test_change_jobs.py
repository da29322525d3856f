"""The commands cancel, retry, hold and resume: jobs by id, jobs by filter, and whole accounts and hosts."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest
from sqlalchemy import Engine, insert, select, update

from tests.command_line import Run, command_runner
from tests.rows import NOW, add_downloading, add_job, add_output, read_job
from worker.cli import progress
from worker.client import matching
from worker.store.breakers import all_breakers
from worker.store.counters import FINISHED, read_counters
from worker.store.engine import transact
from worker.store.schema import HELD_UNTIL, breakers, events, jobs, outputs

LATER = {"due_at": HELD_UNTIL.replace(year=9998), "deadline_at": HELD_UNTIL.replace(year=9998)}
FAILED = {"status": "failed", "error_code": "api_failed", "due_at": None, "completed_at": NOW}


@pytest.fixture
def run(engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command in this process, on the test database, without a terminal."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return command_runner(capsys)


def _add(engine: Engine, *remotes: str, **values: Any) -> list[int]:
    with engine.begin() as connection:
        return [add_job(connection, remote, **(LATER | values)) for remote in remotes]


def _rows(ids: list[int], status: str, *, changed: bool = True) -> list[dict[str, Any]]:
    return [{"id": job_id, "changed": changed, "status": status} for job_id in ids]


# ── filters ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_list_takes_every_filter_and_repeated_values(engine: Engine, run: Run) -> None:
    """A job must match all different options, and one value of a repeated option."""
    now = {"submitted_at": NOW, "tracked_at": NOW}
    with engine.begin() as connection:
        old = add_job(connection, "old", **LATER | now, reference="a", kind="video", account="shop")
        failed = add_job(connection, "failed", **FAILED | now, reference="b")
        cut = FAILED | {"error_code": "output_failed", "ready_at": NOW}
        add_output(
            connection, gone_id := add_job(connection, "gone", **cut), status="failed", error_code="gone", due_at=None
        )
        claimed = {"claim_token": "t", "claim_holder": "ada"}
        stuck = add_job(connection, "stuck", **claimed, fetch_host="other.test", deadline_at=HELD_UNTIL)
        late = add_job(connection, "late", deadline_at=NOW)
        held = add_job(connection, "held", due_at=HELD_UNTIL, held_at=NOW, deadline_at=HELD_UNTIL)

    def find(*arguments: str) -> list[int]:
        result = run("list", "--json", *arguments)
        assert (result.code, result.err) == (0, "")
        return [row["id"] for row in result.document]

    assert find() == [held, late, stuck, gone_id, failed, old]
    assert find("--status", "failed") == [gone_id, failed]
    assert find("--status", "failed", "--status", "pending", "--kind", "video") == [old]
    assert find("--account", "shop") == [old]
    assert find("--remote", "old", "--remote", "late") == [late, old]
    assert find("--reference", "a", "--reference", "b") == [failed, old]
    assert find("--code", "api_failed") == [failed]
    assert find("--output-code", "gone") == [gone_id]
    assert find("--host", "Other.test") == [stuck]
    assert find("--since", "2026-03-01T13:00:00+01:00") == [held, late, stuck, gone_id, failed, old]
    assert find("--since", "1s") == find("--finished-since", "1s") == []
    assert find("--until", "1s", "--limit", "2") == [held, late]
    assert find("--finished-until", "1s") == [gone_id, failed]
    assert find("--finished-since", "2026-03-01T12:00:00Z") == [gone_id, failed]
    assert find("--late", "60") == find("--past-deadline", "--late", "0") == [late]
    assert find("--stuck") == find("--claimed-by", "ada") == [stuck]
    assert find("--past-deadline") == [late]
    assert find("--held") == [held]
    assert "held" in run("list", "--held").out


@pytest.mark.parametrize(
    "value", ["2026-03-01T12:00:00", "yesterday", "15", "-15m", "15 m", "", "1e99d", "9" * 400 + "s"]
)
def test_an_invalid_time_is_a_usage_error(run: Run, value: str) -> None:
    result = run("list", "--since", value)

    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err


def test_a_too_large_age_is_a_usage_error(run: Run) -> None:
    assert run("list", "--since", "999999d").code == 2


# ── jobs by id ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_hold_and_resume_report_what_changed(engine: Engine, run: Run) -> None:
    """As cancel and retry: `[{id, changed, status}]`. The exit code is 1 if a job did not change."""
    ids = _add(engine, "1", "2")
    arguments = [str(job_id) for job_id in ids]
    steps = [run(action, *arguments, "--json") for action in ("hold", "hold", "resume", "resume")]

    assert [result.code for result in steps] == [0, 1, 0, 1]
    assert [result.document for result in steps] == [
        _rows(ids, "pending", changed=changed) for changed in (True, False, True, False)
    ]
    missing = run("hold", arguments[0], "999999", "--json")
    assert (missing.code, missing.document) == (1, _rows(ids[:1], "pending"))
    assert "no job 999999" in missing.err


def test_show_reports_that_a_job_is_held_and_no_next_poll(engine: Engine, run: Run) -> None:
    [job_id] = _add(engine, "1")
    run("hold", str(job_id))

    shown = run("show", str(job_id), "--json").document

    assert shown["why"].startswith("held by an operator since 20")
    assert (shown["next_poll_at"], shown["believed"]) == (None, None)


def test_remote_ids_select_jobs_of_all_accounts_or_of_given_ones(engine: Engine, run: Run) -> None:
    """There is no confirmation. An unknown remote id is an error."""
    first, other = _add(engine, "1") + _add(engine, "1", account="shop")
    assert run("hold", "--remote", "1", "--account", "shop", "--json").document == _rows([other], "pending")
    assert run("cancel", "--remote", "1", "--json").document == _rows([other, first], "cancelled")
    missing = run("cancel", "--remote", "1", "--remote", "2", "--json")
    assert (missing.code, missing.out) == (1, "")
    assert "remote id '2'" in missing.err


# ── jobs by filter ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set small pages and transactions, so that a few jobs need several."""
    monkeypatch.setattr(matching, "FEW", 5)
    monkeypatch.setattr(matching, "BATCH", 2)


@pytest.mark.usefixtures("small_steps")
def test_cancel_by_filter_leaves_the_other_jobs(engine: Engine, run: Run) -> None:
    """Unstored outputs fail, each job is counted once, and final jobs do not change."""
    ids = _add(engine, *map(str, range(8)), kind="video")
    [ended] = _add(engine, "ended", kind="video", **FAILED)
    [other] = _add(engine, "other")
    with engine.begin() as connection:
        loading = add_downloading(connection, "loading", kind="video")
        add_output(connection, loading)

    result = run("cancel", "--kind", "video", "--yes", "--json")

    assert (result.code, result.document) == (0, _rows([loading, *reversed(ids)], "cancelled"))
    assert [read_job(engine, job_id).status for job_id in (ended, other)] == ["failed", "pending"]
    with engine.connect() as connection:
        assert [row.error_code for row in connection.execute(select(outputs)).all()] == ["cancelled"]
        [total] = [total for total in read_counters(connection, [FINISHED]) if total.key.label == "cancelled"]
    assert total.times == 9
    again = run("cancel", "--kind", "video", "--yes", "--json")
    assert (again.code, again.document) == (0, [])
    assert "no matching job" in again.err


@pytest.mark.usefixtures("small_steps")
def test_retry_by_filter(engine: Engine, run: Run) -> None:
    """Failed outputs are downloaded again, the other jobs are polled with their own deadline, and events are kept."""
    polled = _add(engine, "1", "2", "3", **FAILED)
    short = _add(engine, "4", **FAILED, deadline_seconds=60.0, webhook_url="https://shop.test/hook")
    other = _add(engine, "5", **FAILED | {"error_code": "not_found"})
    with engine.begin() as connection:
        loading = add_job(connection, "6", **FAILED, ready_at=NOW)
        add_output(connection, loading, 0, status="failed", error_code="gone", due_at=None)
        stored = {"location": "file:///x", "sha256": "0", "size_bytes": 1, "media_type": "image/png", "stored_at": NOW}
        add_output(connection, loading, 1, status="stored", due_at=None, **stored)

    result = run("retry", "--code", "api_failed", "--yes", "--json")

    assert (result.code, result.document) == (
        0,
        _rows([loading], "downloading") + _rows([*short, *reversed(polled)], "pending"),
    )
    assert read_job(engine, other[0]).status == "failed"
    rows = [read_job(engine, job_id) for job_id in (polled[0], short[0])]
    assert [(row.deadline_at - row.due_at).total_seconds() for row in rows] == [3_600.0, 60.0]
    with engine.connect() as connection:
        assert connection.execute(select(events.c.job_id, events.c.type)).all() == [(short[0], "job.failed")]
        assert [row.status for row in connection.execute(select(outputs).order_by(outputs.c.position)).all()] == [
            "pending",
            "stored",
        ]


@pytest.mark.usefixtures("small_steps")
def test_hold_and_resume_by_filter(engine: Engine, run: Run) -> None:
    """`resume --held` does not resume jobs whose account is held."""
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
    assert read_job(engine, other).due_at == LATER["due_at"]


@pytest.mark.parametrize(
    ("arguments", "changing"),
    [
        (("cancel", "--kind", "video"), "pending"),
        (("retry", "--kind", "video"), "failed"),
        (("hold", "--kind", "video"), "pending"),
        (("resume", "--kind", "video"), "held"),
        (("hold", "--status", "failed"), None),
    ],
)
def test_a_dry_run_lists_the_jobs_and_changes_nothing(
    engine: Engine, run: Run, arguments: tuple[str, ...], changing: str | None
) -> None:
    """It needs no terminal."""
    ids = {
        "pending": _add(engine, "1", kind="video"),
        "failed": _add(engine, "2", kind="video", **FAILED),
        "held": _add(engine, "3", kind="video", due_at=HELD_UNTIL, held_at=NOW),
    }
    expected = ids.get(changing or "", []) + (ids["held"] if arguments[0] == "cancel" else [])
    with engine.connect() as connection:
        before = connection.execute(select(jobs).order_by(jobs.c.id)).all()

    result, document = run(*arguments, "--dry-run"), run(*arguments, "--dry-run", "--json")

    assert (result.code, document.code) == (0, 0)
    assert [row["id"] for row in document.document] == expected[::-1]
    assert all(row["changed"] for row in document.document)
    if expected:
        assert result.out.startswith(f"{len(expected)} job")
        assert "would be" in result.out
    with engine.connect() as connection:
        assert connection.execute(select(jobs).order_by(jobs.c.id)).all() == before


def test_a_dry_run_of_many_jobs_lists_some_of_them(engine: Engine, run: Run) -> None:
    _add(engine, *map(str, range(30)), kind="video")

    result = run("cancel", "--kind", "video", "--dry-run")

    assert result.out.startswith("30 jobs would be cancelled\n")
    assert "and 10 more" in result.out
    assert len(run("cancel", "--kind", "video", "--dry-run", "--json").document) == 30


def test_a_dry_run_of_given_ids_reports_the_result(engine: Engine, run: Run) -> None:
    [pending], [ended] = _add(engine, "1"), _add(engine, "2", **FAILED)

    result = run("hold", str(pending), str(ended), "--dry-run", "--json")

    assert result.code == 1
    assert result.document == _rows([pending], "pending") + _rows([ended], "failed", changed=False)
    assert read_job(engine, pending).held_at is None


def test_without_a_terminal_a_filter_needs_yes(engine: Engine, run: Run) -> None:
    [job_id] = _add(engine, "1")

    result = run("cancel", "--status", "pending", "--json")

    assert (result.code, result.out) == (2, "")
    assert "--dry-run" in result.err
    assert "--yes" in result.err
    assert read_job(engine, job_id).status == "pending"


@pytest.mark.parametrize(("answer", "code", "status"), [("n", 1, "pending"), ("y", 0, "cancelled")])
def test_on_a_terminal_it_asks_before(engine: Engine, run: Run, answer: str, code: int, status: str) -> None:
    """Uses a real terminal. Stdout is still one JSON document."""
    ids = _add(engine, "1", "2")
    keyboard, terminal = pty.openpty()
    os.write(keyboard, f"{answer}\n".encode())

    process = subprocess.run(
        [sys.executable, "-c", "from worker.cli import main; main()", "cancel", "--status", "pending", "--json"],
        stdin=terminal, env=dict(os.environ), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(terminal)
    os.close(keyboard)

    assert process.returncode == code, process.stderr
    assert "cancel 2 jobs? [y/N]" in process.stderr
    assert [read_job(engine, job_id).status for job_id in ids] == [status] * 2
    if code == 0:
        assert json.loads(process.stdout) == _rows(ids[::-1], "cancelled")


@pytest.mark.parametrize(
    "arguments",
    [(), ("1", "--status", "pending"), ("1", "--late", "0"), ("--dry-run",), ("x",), ("1", "--remote", "2")],
)
@pytest.mark.parametrize("action", ["cancel", "hold"])
def test_it_takes_either_ids_or_filters(run: Run, action: str, arguments: tuple[str, ...]) -> None:
    result = run(action, *arguments)

    assert (result.code, result.out) == (2, "")


@pytest.mark.usefixtures("small_steps")
def test_an_interrupted_command_reports_its_progress(engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished batches stay. The same command again changes the rest."""
    _add(engine, *map(str, range(7)))
    calls: list[Any] = []

    def cut_off(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return transact(*arguments)

    monkeypatch.setattr(matching, "transact", cut_off)
    stopped = run("cancel", "--status", "pending", "--yes")
    second_run = run("cancel", "--status", "pending", "--yes", "--json")

    assert stopped.code == 130
    assert "4 jobs cancelled so far" in stopped.err
    assert len(second_run.document) == 3


@pytest.mark.usefixtures("small_steps")
def test_a_job_that_becomes_final_meanwhile_is_not_changed(
    engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that completes between the search and the change is not held."""
    ids = _add(engine, "1", "2", "3")

    def late(engine: Engine, work: Any) -> Any:
        with engine.begin() as connection:
            over = {"status": "completed", "due_at": None, "completed_at": NOW, "ready_at": NOW}
            connection.execute(update(jobs).where(jobs.c.id == ids[0]).values(over))
        return transact(engine, work)

    monkeypatch.setattr(matching, "transact", late)
    result = run("hold", "--status", "pending", "--yes", "--json")

    assert (result.code, result.document) == (0, _rows([ids[2], ids[1]], "pending"))
    assert read_job(engine, ids[0]).held_at is None


# ── accounts and hosts ────────────────────────────────────────────────────────────────────────────────────────────────


def test_account_alone_holds_and_resumes_the_whole_account(engine: Engine, run: Run) -> None:
    """Repeating it changes nothing, and a dry run reports the change."""
    [job_id] = _add(engine, "1", account="shop")
    steps = [
        run(*arguments, "--account", "shop", "--json")
        for arguments in (
            ("hold", "--dry-run"),
            ("hold",),
            ("hold",),
            ("resume", "--dry-run"),
            ("resume",),
            ("resume",),
        )
    ]

    assert [result.code for result in steps] == [0] * 6
    assert [result.document for result in steps] == [
        [{"scope": "account", "name": "shop", "changed": changed}] for changed in (True, True, False, True, True, False)
    ]
    assert read_job(engine, job_id).held_at is None
    assert "shop" in run("hold", "--account", "shop").out
    assert run("show", str(job_id), "--json").document["why"].startswith("held: held by an operator")


def test_hosts_are_held_by_the_name_in_their_jobs(engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that no job can have is refused, because the hold would have no effect."""
    monkeypatch.setenv("SD_API_HOSTS", "api.test")
    _add(engine, "1", fetch_host="other.test:8443")

    result = run("hold", "--host", "API.test:443", "--host", "other.test:8443", "--json")

    assert [row["name"] for row in result.document] == ["api.test", "other.test:8443"]
    with engine.connect() as connection:
        assert {key for key, breaker in all_breakers(connection).items() if breaker.paused_at is not None} == {
            ("host", "api.test"),
            ("host", "other.test:8443"),
        }
    refused = run("hold", "--host", "api.tset")
    assert refused.code == 2
    assert "api.test" in refused.err
    assert run("hold", "--account", "a b").code == 2


def test_progress_is_printed_to_stderr(engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", (0.0, 0.0))
    _add(engine, "1", "2")

    result = run("cancel", "--status", "pending", "--yes")

    assert re.search(r"2 of 2 cancelled", result.err)
    assert result.out == "2 jobs cancelled\n"
