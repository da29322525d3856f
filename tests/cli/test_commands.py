"""The command line for scripts: documents on stdout, messages on stderr, exit codes, and no traceback."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, insert, update

from tests.command_line import Run, command_runner
from tests.rows import NOW, add_downloading, add_job, add_output, add_process
from worker.core.lifecycle import JOB_STATES
from worker.core.pacing.policy import PacedJob
from worker.polling.duration_learner import DurationLearner
from worker.store.schema import breakers, jobs

JOB_COLUMNS = {
    "id",
    "account",
    "remote_id",
    "kind",
    "status",
    "reference",
    "polls",
    "eta",
    "submitted_at",
    "ready_at",
    "completed_at",
    "deadline_at",
    "error_code",
    "error_message",
}
OUTPUT_COLUMNS = {
    "id",
    "job_id",
    "position",
    "url",
    "status",
    "location",
    "size_bytes",
    "sha256",
    "media_type",
    "attempts",
    "error_code",
    "error_message",
}
ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
NOT_UTF8 = "\udcff"  # how Python represents an argument byte that is not UTF-8


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command in this process, like its entry point. Only SystemExit may be raised."""
    return command_runner(capsys)


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that the commands use."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return engine


def _one_line(text: str) -> bool:
    return text.endswith("\n") and text.count("\n") == 1


def test_track_prints_a_list_and_which_jobs_are_new(database: Engine, run: Run) -> None:
    """`[{id, remote_id, status, created}]`."""
    first = run("track", "12", "13", "--json")
    again = run("track", "12", '{"status": "processing", "id": 14, "eta": 5}', "--reference", "r", "--json")
    assert (first.code, again.code, first.err) == (0, 0, "")
    assert [set(row) for row in first.document] == [{"id", "remote_id", "status", "created"}] * 2
    assert [(row["remote_id"], row["status"], row["created"]) for row in first.document] == [
        ("12", "pending", True),
        ("13", "pending", True),
    ]
    assert [(row["remote_id"], row["created"]) for row in again.document] == [("12", False), ("14", True)]
    assert again.document[0]["id"] == first.document[0]["id"]
    assert "12" in run("track", "12").out


@pytest.mark.parametrize(
    ("text", "remote_ids"),
    [
        ("21\n22\n\n  23  \n", ["21", "22", "23"]),
        ('{"status": "processing",\n "id": 24, "eta": 5}\n', ["24"]),
        ('{"status": "processing", "id": 25}\n{"status": "processing", "id": 26}\n', ["25", "26"]),
        ('[{"status": "processing", "id": 27}, "28", 29]', ["27", "28", "29"]),
        ("", []),
    ],
)
def test_track_reads_answers_and_ids_from_standard_input(
    configured_sqlite: Engine, run: Run, monkeypatch: pytest.MonkeyPatch, text: str, remote_ids: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert [row["remote_id"] for row in json.loads(run("track", "-", "--json").out)] == remote_ids


def test_track_refuses_values_that_are_no_ids(
    configured_sqlite: Engine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell variable that is empty, and what `jq` prints for a missing id."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'[null, -1, 1.5, {"id": null}]')))
    result = run("track", "", "null", "-", "--json")
    assert (result.code, result.document) == (1, [])
    assert [line.split(": ")[1] for line in result.err.splitlines()] == [
        "'' not tracked", "'null' not tracked",
        "'null' not tracked", "'-1' not tracked", "'1.5' not tracked", "'{\"id\"",
    ]  # fmt: skip


def test_track_continues_after_an_invalid_id_and_exits_1(database: Engine, run: Run) -> None:
    """Valid ids are tracked, the invalid ones are named on stderr, and stdout is still one document."""
    result = run("track", "../x", "12", "a b", "--json")
    assert result.code == 1
    assert [row["remote_id"] for row in result.document] == ["12"]
    assert "'../x'" in result.err
    assert result.err.count("\n") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("--fetch-url", "https://evil.test/api/v3/fetch/1"),
        ("--account", "a b"),
        ("--submitted-at", "2026-01-01T00:00:00"),
        ("--submitted-at", "0001-01-01T00:00:00+14:00"),
        ("--deadline", "nan"),
        ("--priority", "5000"),
        ("--kind", "x" * 100),
        ("--on-done", "/x"),
    ],
)
def test_track_refuses_invalid_options_with_one_line(arguments: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    """Exit code 1. Nothing is written: the database is not created."""
    result = run("track", "1", *arguments, "--json")
    assert (result.code, result.document) == (1, [])
    assert _one_line(result.err)
    assert not (tmp_path / "var").exists()


def test_a_refused_submit_answer_is_printed_without_the_key(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terminal output may be logged."""
    monkeypatch.setenv("SD_API_KEY", "sk-canary-7f3a")
    for remote in ('{"status": "error", "message": "sk-canary-7f3a is bad"}', "x/sk-canary-7f3a"):
        result = run("track", remote)
        assert result.code == 1
        assert "[key]" in result.err
        assert "sk-canary" not in result.out + result.err


def test_list_shows_the_newest_first_and_filters(database: Engine, run: Run) -> None:
    """`[job columns]`, `--status`, `--reference`, `--limit`."""
    run("track", "1", "2", "--reference", "mine")
    run("track", "3")
    run("cancel", "--remote", "1")
    everything = run("list", "--json")
    assert everything.code == 0
    assert [row["remote_id"] for row in everything.document] == ["3", "2", "1"]
    assert set(everything.document[0]) >= JOB_COLUMNS
    assert ISO.fullmatch(everything.document[0]["submitted_at"])
    assert [row["remote_id"] for row in run("list", "--status", "cancelled", "--json").document] == ["1"]
    assert [row["remote_id"] for row in run("list", "--reference", "mine", "--json").document] == ["2", "1"]
    assert [row["remote_id"] for row in run("list", "--limit", "1", "--json").document] == ["3"]
    assert run("list", "--reference", "unknown", "--json").document == []
    assert "no jobs" in run("list", "--status", "failed").out
    assert "cancelled" in run("list").out


def test_list_shows_fifty_jobs_by_default(database: Engine, run: Run) -> None:
    """The newest fifty."""
    run("track", *(str(number) for number in range(1, 53)))
    assert len(run("list", "--json").document) == 50
    assert len(run("list", "--limit", "60", "--json").document) == 52


def test_show_prints_the_outputs_and_the_reason(database: Engine, run: Run) -> None:
    """`{job columns, "outputs": […], "why", "next_poll_at"}`."""
    with database.begin() as connection:
        job_id = add_downloading(connection, "7", error_message="a [bold] message")
        add_output(connection, job_id, 0, error_code="http_error", error_message="HTTP 500")
    result = run("show", str(job_id), "--json")
    assert (result.code, result.err) == (0, "")
    assert JOB_COLUMNS | {"outputs", "why", "next_poll_at"} <= set(result.document)
    assert set(result.document["outputs"][0]) >= OUTPUT_COLUMNS
    assert result.document["next_poll_at"] is None
    assert "http_error" in result.document["why"]
    assert result.document["ready_at"] == NOW.isoformat().replace("+00:00", "Z")
    assert "a [bold] message" in run("show", str(job_id)).out

    run("track", "8")
    with database.begin() as connection:
        add_process(connection, accounts={})
    waiting = run("show", "--remote", "8", "--json").document
    assert ISO.fullmatch(waiting["next_poll_at"])
    assert "no key for account default" in waiting["why"]


@pytest.mark.parametrize(("status", "reason"), [("failed", "gone: why"), ("cancelled", "cancelled")])
def test_show_explains_final_jobs(database: Engine, run: Run, status: str, reason: str) -> None:
    """The reason contains the code and message of the row."""
    with database.begin() as connection:
        job_id = add_downloading(
            connection, status=status, completed_at=NOW, error_code="gone", error_message="why", polls=3
        )
    document = run("show", str(job_id), "--json").document
    assert reason in document["why"]
    assert document["next_poll_at"] is None


def test_cancel_and_retry_report_what_changed(database: Engine, run: Run) -> None:
    """`[{id, changed, status}]`; the exit code is 1 if a job did not change."""
    ids = [str(row["id"]) for row in run("track", "1", "2", "--json").document]
    cancelled = run("cancel", *ids, "--json")
    assert cancelled.code == 0
    assert cancelled.document == [{"id": int(job_id), "changed": True, "status": "cancelled"} for job_id in ids]
    again = run("cancel", ids[0], "--json")
    assert (again.code, again.document) == (1, [{"id": int(ids[0]), "changed": False, "status": "cancelled"}])
    assert run("retry", ids[0], "--json").document[0]["changed"] is False

    with database.begin() as connection:
        connection.execute(update(jobs).values(status="failed", error_code="not_found"))
    retried = run("retry", "--remote", "1", "--json")
    assert (retried.code, retried.document) == (0, [{"id": int(ids[0]), "changed": True, "status": "pending"}])
    mixed = run("retry", ids[1], "999999", "--json")
    assert (mixed.code, len(mixed.document)) == (1, 1)
    assert "no job 999999" in mixed.err


def test_a_remote_id_selects_all_its_jobs_or_those_of_an_account(database: Engine, run: Run) -> None:
    """`--remote ID [--account A]`."""
    run("track", "7")
    run("track", "7", "--account", "shop")
    assert len(run("show", "--remote", "7", "--json").document) == 2
    assert [row["status"] for row in run("cancel", "--remote", "7", "--account", "shop", "--json").document] == [
        "cancelled"
    ]
    assert run("show", "--remote", "7", "--account", "default", "--json").document["status"] == "pending"


@pytest.mark.parametrize("command", ["show", "cancel", "retry"])
@pytest.mark.parametrize(
    "arguments", [("999999",), ("0",), (str(2**63),), ("9" * 40,), ("9" * 5_000,), ("--remote", "unknown")]
)
def test_an_unknown_job_is_reported_in_one_line_with_exit_1(
    database: Engine, run: Run, command: str, arguments: tuple[str, ...]
) -> None:
    """Also for very large numbers."""
    result = run(command, *arguments, "--json")
    assert result.code == 1
    assert "no job" in result.err
    assert _one_line(result.err)


@pytest.mark.parametrize("command", ["show", "cancel", "retry"])
@pytest.mark.parametrize("remote", ["../x", NOT_UTF8, "", "x" * 200])
def test_an_invalid_remote_id_is_reported_in_one_line(database: Engine, run: Run, command: str, remote: str) -> None:
    """The database is not queried."""
    result = run(command, "--remote", remote)
    assert result.code in (1, 2)
    assert result.out == ""
    assert _one_line(result.err)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("show",),
        ("show", "12a"),
        ("show", "-5"),
        ("show", "1.5"),
        ("show", NOT_UTF8),
        ("show", "1", "--remote", "2"),
        ("cancel",),
        ("retry", "x"),
        ("track",),
        ("track", "1", "--eta", "soon"),
        ("track", "1", "--priority", "1.5"),
        ("list", "--status", "ready"),
        ("list", "--limit", "0"),
        ("list", "--limit", "many"),
        ("list", "extra"),
        ("status", "extra"),
        ("status", "--wrong"),
        ("list", "--reference", NOT_UTF8),
        ("show", "--remote", "1", "--account", NOT_UTF8),
        ("track", NOT_UTF8),
        ("nonsense",),
    ],
)
def test_wrong_usage_is_exit_2(run: Run, arguments: tuple[str, ...]) -> None:
    """The message is on stderr."""
    result = run(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err


def test_status_shows_jobs_and_accounts(database: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`{"jobs": {state: n}, "accounts": [{account, hold, rps}], "oldest_due_seconds", "healthy"}`."""
    monkeypatch.setenv("SD_API_KEYS", '{"shop": "k", "held": "k"}')
    monkeypatch.setenv("SD_API_RPS", "7")
    run("track", "1")
    run("track", "2", "--account", "shop")
    run("cancel", "--remote", "2")
    with database.begin() as connection:
        add_process(connection, accounts={"shop": 7.0, "held": 7.0})
        connection.execute(
            insert(breakers).values(scope="account", name="held", proven=True, reason="key: refused", since=NOW)
        )
    result = run("status", "--json")
    document = result.document
    assert (result.code, result.err) == (0, "")
    assert set(document) == {
        "jobs",
        "accounts",
        "asked_per_second",
        "oldest_due_seconds",
        "healthy",
        "hosts",
        "kinds",
        "outputs",
        "troubles",
    }
    assert document["kinds"] == []
    assert document["outputs"] == {"unstored": 0, "oldest_seconds": 0.0, "trouble": {}, "storage": None}
    assert document["jobs"] == dict.fromkeys(JOB_STATES, 0) | {"pending": 1, "cancelled": 1}
    accounts = {row["account"]: row for row in document["accounts"]}
    assert set(accounts) == {"default", "shop", "held"}
    no_orders = {"ordered": 0, "uncertain": 0, "slots": {"taken": 0, "total": 5}}
    assert accounts["shop"] == {"account": "shop", "hold": None, "rps": 7.0, **no_orders}
    assert accounts["default"]["hold"]["reason"] == "no key for account default"
    assert accounts["held"]["hold"] == {
        "reason": "key: refused",
        "since": NOW.isoformat().replace("+00:00", "Z"),
        "until": None,
    }
    assert (document["oldest_due_seconds"], document["healthy"]) == (0.0, True)
    assert "no key for account default" in run("status").out


@pytest.mark.parametrize("elsewhere", [False, True], ids=["all jobs there", "another job elsewhere"])
def test_status_shows_an_account_as_held_if_all_its_waiting_jobs_are_on_held_hosts(
    database: Engine, run: Run, *, elsewhere: bool
) -> None:
    with database.begin() as connection:
        add_process(connection, accounts={"default": 5.0})
        add_job(connection, "1", fetch_host="dead.test")
        if elsewhere:
            add_job(connection, "2", fetch_host="alive.test")
        connection.execute(
            insert(breakers).values(
                scope="host", name="dead.test", proven=True, reason="unreachable: HTTP 404", since=NOW
            )
        )

    (account,) = run("status", "--json").document["accounts"]

    assert (account["hold"] is None) == elsewhere
    assert elsewhere or account["hold"]["reason"] == "dead.test unreachable: HTTP 404"


def test_status_lists_a_held_host_in_json(database: Engine, run: Run) -> None:
    """Its times are ISO 8601 texts."""
    with database.begin() as connection:
        connection.execute(
            insert(breakers).values(
                scope="host", name="api.example", proven=True, reason="unreachable: HTTP 404", since=NOW
            )
        )

    held = run("status", "--json").document["hosts"]

    assert [row["host"] for row in held] == ["api.example"]
    assert held[0]["since"] == NOW.isoformat().replace("+00:00", "Z")
    assert set(held[0]) == {"host", "reason", "since", "until"}


def test_status_is_unhealthy_if_due_work_waits(database: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Health depends on the work, not on running processes."""
    monkeypatch.setenv("SD_API_KEY", "k")
    run("track", "1")
    with database.begin() as connection:
        connection.execute(update(jobs).values(due_at=datetime(2026, 1, 1, tzinfo=UTC)))
    document = run("status", "--json").document
    assert document["healthy"] is False
    assert document["oldest_due_seconds"] > 60


def test_migrate_creates_the_tables_and_reports_it(run: Run, tmp_path: Path) -> None:
    """The directory is created too. A second run changes nothing."""
    first, second = run("migrate"), run("migrate")
    assert (first.code, second.code) == (0, 0)
    assert "empty" in first.out
    assert "already" in second.out
    assert (tmp_path / "var" / "worker.db").is_file()


COMMANDS: list[tuple[str, ...]] = [
    ("track", "1", "--json"),
    ("list", "--json"),
    ("show", "1", "--json"),
    ("show", "--remote", "1"),
    ("cancel", "1", "--json"),
    ("retry", "--remote", "1"),
    ("status", "--json"),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_without_tables_every_command_names_migrate(
    run: Run, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, one line, and nothing on stdout."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/empty.db")
    result = run(*arguments)
    assert (result.code, result.out) == (1, "")
    assert "run `fetch-worker migrate`" in result.err
    assert _one_line(result.err)


@pytest.mark.parametrize("arguments", [*COMMANDS, ("migrate",)], ids=" ".join)
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://app:hidden-word@127.0.0.1:1/shop",
        "postgresql://postgres@127.0.0.1:5432/fetch_worker_not_there",
        "sqlite:////dev/null/x.db",
        "sqlite:///no_database.txt",
    ],
    ids=["refused", "no such database", "no such folder", "no database"],
)
def test_an_unusable_database_is_reported_in_one_line(
    run: Run, arguments: tuple[str, ...], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, or 2 for an invalid path. The line has no password and does not suggest `migrate`."""
    (tmp_path / "no_database.txt").write_text("this is a text, and longer than the head of a database file " * 10)
    monkeypatch.setenv("DATABASE_URL", url)
    result = run(*arguments)
    assert (result.code, result.out) == (2 if "/dev/null" in url else 1, "")
    assert "DATABASE_URL" in result.err
    assert "migrate" not in result.err
    assert "hidden-word" not in result.err
    assert _one_line(result.err)


@pytest.mark.parametrize("arguments", [*COMMANDS, ("migrate",)], ids=" ".join)
def test_a_wrong_setting_is_exit_2(run: Run, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names the variable."""
    monkeypatch.setenv("POLL_MIN", "soon")
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "POLL_MIN" in result.err
    assert _one_line(result.err)


def test_a_closed_pipe_causes_no_traceback(tmp_path: Path) -> None:
    """`fetch-worker list | head -1` must not print a traceback."""
    environment = os.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/x.db"}
    script = "import sys; from worker.cli import main; main(sys.argv[1:])"
    root = Path(__file__).parents[2]
    migrated = subprocess.run([sys.executable, "-c", script, "migrate"], cwd=root, env=environment, check=False)
    assert migrated.returncode == 0
    reader, writer = os.pipe()
    os.close(reader)
    listed = subprocess.run(
        [sys.executable, "-c", script, "list", "--json"],
        cwd=root,
        env=environment,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert "Traceback" not in listed.stderr


# ── pace ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def teach(engine: Engine, kind: str = "image", seconds: float = 20.0, jobs_seen: int = 40) -> None:
    """Store the learned pace of a kind: its jobs take `seconds`."""
    learner = DurationLearner(engine)
    learner.prepare([("default", kind)])
    for _ in range(jobs_seen):
        learner.observe("default", kind, PacedJob(seconds, seconds - 1), ready=True, planned=seconds)
    learner.share()


def test_status_shows_the_learned_pace_of_each_kind(database: Engine, run: Run) -> None:
    teach(database)

    (kind,) = run("status", "--json").document["kinds"]
    shown = run("status").out

    assert (kind["account"], kind["kind"], kind["jobs"], kind["ready"]) == ("default", "image", 40, 1.0)
    assert kind["median"] == pytest.approx(19.5, abs=1.5)
    assert 0.1 < kind["seen_delay"] <= 1.0
    assert "half ready (s)" in shown
    assert "image" in shown


def test_show_estimates_when_a_job_is_ready(database: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_API_KEY", "k")
    teach(database)
    run("track", "1", "--kind", "image", "--json")

    document = run("show", "--remote", "1", "--json").document
    shown = run("show", "--remote", "1").out

    assert document["believed"]["median"] == pytest.approx(19.5, abs=1.5)
    assert document["believed"]["chance_now"] < 0.2
    assert document["believed"]["by"] == "age"
    assert "waiting for its next poll in" in document["why"]
    assert "from 40 jobs of this kind by age: half are ready in" in document["why"]
    assert "from 40 jobs of this kind" in " ".join(shown.split())


def test_show_says_that_no_job_of_the_kind_has_finished(
    database: Engine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_API_KEY", "k")
    run("track", "1", "--json")

    assert "no job of this kind has finished yet" in run("show", "--remote", "1", "--json").document["why"]


TRACE = [{"t": number / 2, "duration": 6.0 + number % 5, "kind": "image", "eta": None} for number in range(400)]


def write_trace(path: Path, lines: Sequence[object]) -> str:
    """Write a trace to a file. Return its path."""
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_simulate_prints_polls_and_delays(run: Run, tmp_path: Path) -> None:
    """`{"jobs", "polls", "polls_per_job", "delay": {"mean","p50","p95","p99"}}`."""
    trace = write_trace(tmp_path / "trace", TRACE)

    result = run("simulate", "--trace", trace, "--json")

    assert (result.code, result.err) == (0, "")
    assert set(result.document) == {"jobs", "polls", "polls_per_job", "delay"}
    assert list(result.document["delay"]) == ["mean", "p50", "p95", "p99"]
    assert result.document["jobs"] == 400
    assert result.document["polls_per_job"] == result.document["polls"] / 400
    assert run("simulate", "--trace", trace, "--json").document == result.document
    assert "polls_per_job" in run("simulate", "--trace", trace).out


def test_simulate_with_slots_also_prints_how_long_orders_waited(run: Run, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace", TRACE)

    few = run("simulate", "--trace", trace, "--slots", "2", "--json").document
    many = run("simulate", "--trace", trace, "--slots", "400", "--json").document
    without = run("simulate", "--trace", trace, "--json").document

    assert list(few["waited"]) == ["mean", "p50", "p95", "p99"]
    assert few["waited"]["mean"] > 60.0
    assert many == without | {"waited": {"mean": 0.0, "p50": 0.0, "p95": 0.0, "p99": 0.0}}
    assert "waited p95 (s)" in run("simulate", "--trace", trace, "--slots", "2").out
    assert "mean wait (s)" in run("simulate", "--trace", trace, "--slots", "2", "--compare").out


def test_simulate_uses_price_policy_rate_limit_and_settings(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = write_trace(tmp_path / "trace", TRACE)
    cheap = run("simulate", "--trace", trace, "--price", "0.05", "--json").document
    dear = run("simulate", "--trace", trace, "--price", "5", "--json").document
    fixed = run("simulate", "--trace", trace, "--policy", "fixed", "--json").document
    short = run("simulate", "--trace", trace, "--rps", "2.5", "--policy", "fixed", "--json").document
    monkeypatch.setenv("POLL_MIN", "0")
    free = run("simulate", "--trace", trace, "--price", "0.05", "--json").document

    assert cheap["polls"] > dear["polls"]
    assert cheap["delay"]["mean"] < dear["delay"]["mean"]
    assert fixed["delay"]["mean"] != cheap["delay"]["mean"]
    assert short["delay"]["mean"] > fixed["delay"]["mean"]
    assert free["delay"]["mean"] < cheap["delay"]["mean"]


def test_simulate_compares_all_policies(run: Run, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace", TRACE)

    results = run("simulate", "--trace", trace, "--compare", "--json").document
    shown = run("simulate", "--trace", trace, "--compare").out

    assert list(results) == ["learned", "fixed", "exponential", "eta"]
    assert all(result["jobs"] == 400 for result in results.values())
    assert all(name in shown for name in results)


def test_simulate_replays_the_jobs_of_the_database(database: Engine, run: Run) -> None:
    with database.begin() as connection:
        for number in range(30):
            ready_at = NOW + timedelta(seconds=number + 12)
            add_downloading(
                connection,
                f"r{number}",
                submitted_at=NOW + timedelta(seconds=number),
                not_ready_at=NOW + timedelta(seconds=number + 8),
                ready_at=ready_at,
                polls=2,
            )

    document = run("simulate", "--from-database", "--json").document

    assert document["jobs"] == 30
    assert 30 <= document["polls"] <= 300


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--trace FILE or --from-database"),
        (["--trace", "{trace}", "--from-database"], 2, "--trace FILE or --from-database"),
        (["--trace", "{trace}", "--policy", "eta", "--compare"], 2, "both --policy and --compare"),
        (["--trace", "{trace}", "--rps", "0"], 2, "rps"),
        (["--trace", "{trace}", "--slots", "0"], 2, "slots"),
        (["--trace", "{trace}.none"], 2, "does not exist"),
    ],
)
def test_simulate_reports_wrong_options(
    run: Run, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    trace = write_trace(tmp_path / "trace", TRACE)

    result = run("simulate", *(argument.replace("{trace}", trace) for argument in arguments))

    assert result.code == code
    assert message in result.err


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        "7",
        '{"t": 1}',
        '{"t": "x", "duration": 3}',
        '{"t": 1, "duration": -3}',
        '{"t": 1, "duration": NaN}',
        '{"t": 1, "duration": 2, "kind": 7}',
        '{"t": 1, "duration": 2, "eta": true}',
    ],
)
def test_simulate_names_an_invalid_line_of_the_trace(run: Run, tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace"
    path.write_text(f"{json.dumps(TRACE[0])}\n\n{line}\n")

    result = run("simulate", "--trace", str(path))

    assert result.code == 1
    assert "line 3 is not a job of a trace" in result.err
    assert _one_line(result.err)


def test_simulate_refuses_a_trace_without_jobs(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"\n")
    assert "there are no jobs to simulate" in run("simulate", "--trace", str(path)).err
    path.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in run("simulate", "--trace", str(path)).err
