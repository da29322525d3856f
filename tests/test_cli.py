"""The command line as scripts use it: documents on stdout, messages on stderr, exit codes, and never a traceback."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, insert, update

from tests.rows import NOW, add_downloading, add_output
from worker.cli import main
from worker.tables import gates, jobs

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
NOT_UTF8 = "\udcff"  # how Python hands over a byte on the command line that is no UTF-8


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


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, as its entry point does. Anything but a SystemExit would be a traceback."""

    def command(*words: str) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        assert "Traceback" not in said.err
        return Said(ended.value.code, said.out, said.err)

    return command


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The database that the commands use, with our tables in it."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return engine


def _one_line(text: str) -> bool:
    return text.endswith("\n") and text.count("\n") == 1


def test_track_answers_a_list_and_says_what_was_new(database: Engine, run: Run) -> None:
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


def test_track_goes_on_after_a_bad_id_and_exits_1(database: Engine, run: Run) -> None:
    """The good ones are in, the bad one is named on stderr, stdout is still one document."""
    said = run("track", "../x", "12", "a b", "--json")
    assert said.code == 1
    assert [row["remote_id"] for row in said.document] == ["12"]
    assert "'../x'" in said.err
    assert said.err.count("\n") == 2


@pytest.mark.parametrize(
    "words",
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
def test_track_refuses_what_cant_be_in_one_line(words: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    """Exit 1, nothing written: there is not even a database."""
    said = run("track", "1", *words, "--json")
    assert (said.code, said.document) == (1, [])
    assert _one_line(said.err)
    assert not (tmp_path / "var").exists()


def test_a_refused_submit_answer_is_quoted_without_the_key(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terminals have logs too."""
    monkeypatch.setenv("SD_API_KEY", "sk-canary-7f3a")
    for remote in ('{"status": "error", "message": "sk-canary-7f3a is bad"}', "x/sk-canary-7f3a"):
        said = run("track", remote)
        assert said.code == 1
        assert "[key]" in said.err
        assert "sk-canary" not in said.out + said.err


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
    assert run("list", "--reference", "nobody's", "--json").document == []
    assert "no jobs" in run("list", "--status", "failed").out
    assert "cancelled" in run("list").out


def test_list_shows_fifty_unless_asked_for_more(database: Engine, run: Run) -> None:
    """The newest fifty."""
    run("track", *(str(number) for number in range(1, 53)))
    assert len(run("list", "--json").document) == 50
    assert len(run("list", "--limit", "60", "--json").document) == 52


def test_show_has_the_outputs_and_says_why(database: Engine, run: Run) -> None:
    """`{job columns, "outputs": […], "why", "next_poll_at"}`."""
    with database.begin() as connection:
        job_id = add_downloading(connection, "7", error_message="a [bold] message")
        add_output(connection, job_id, 0, error_code="http_error", error_message="HTTP 500")
    said = run("show", str(job_id), "--json")
    assert (said.code, said.err) == (0, "")
    assert JOB_COLUMNS | {"outputs", "why", "next_poll_at"} <= set(said.document)
    assert set(said.document["outputs"][0]) >= OUTPUT_COLUMNS
    assert said.document["next_poll_at"] is None
    assert "http_error" in said.document["why"]
    assert said.document["ready_at"] == NOW.isoformat().replace("+00:00", "Z")
    assert "a [bold] message" in run("show", str(job_id)).out

    run("track", "8")
    waiting = run("show", "--remote", "8", "--json").document
    assert ISO.fullmatch(waiting["next_poll_at"])
    assert "no key for account default" in waiting["why"]


@pytest.mark.parametrize(("status", "words"), [("failed", "gone: why"), ("cancelled", "cancelled")])
def test_show_explains_final_jobs(database: Engine, run: Run, status: str, words: str) -> None:
    """In the words that the row has."""
    with database.begin() as connection:
        job_id = add_downloading(
            connection, status=status, completed_at=NOW, error_code="gone", error_message="why", polls=3
        )
    document = run("show", str(job_id), "--json").document
    assert words in document["why"]
    assert document["next_poll_at"] is None


def test_cancel_and_retry_answer_what_changed(database: Engine, run: Run) -> None:
    """`[{id, changed, status}]`; an id that changed nothing makes it exit 1."""
    ids = [str(row["id"]) for row in run("track", "1", "2", "--json").document]
    done = run("cancel", *ids, "--json")
    assert done.code == 0
    assert done.document == [{"id": int(word), "changed": True, "status": "cancelled"} for word in ids]
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


def test_a_remote_id_names_all_its_jobs_or_those_of_an_account(database: Engine, run: Run) -> None:
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
    "words", [("999999",), ("0",), (str(2**63),), ("9" * 40,), ("9" * 5_000,), ("--remote", "nobody")]
)
def test_a_job_that_is_not_there_is_one_line_and_exit_1(
    database: Engine, run: Run, command: str, words: tuple[str, ...]
) -> None:
    """However large the number is."""
    said = run(command, *words, "--json")
    assert said.code == 1
    assert "no job" in said.err
    assert _one_line(said.err)


@pytest.mark.parametrize("command", ["show", "cancel", "retry"])
@pytest.mark.parametrize("remote", ["../x", NOT_UTF8, "", "x" * 200])
def test_a_remote_id_that_cant_be_one_is_one_line_and_not_done(
    database: Engine, run: Run, command: str, remote: str
) -> None:
    """Before the database is asked."""
    said = run(command, "--remote", remote)
    assert said.code in (1, 2)
    assert said.out == ""
    assert _one_line(said.err)


@pytest.mark.parametrize(
    "words",
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
def test_wrong_usage_is_exit_2(run: Run, words: tuple[str, ...]) -> None:
    """And says on stderr what would be right."""
    said = run(*words)
    assert said.code == 2
    assert said.out == ""
    assert said.err


def test_status_tells_how_everything_stands(database: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`{"jobs": {state: n}, "accounts": [{account, hold, rps}], "oldest_due_seconds", "healthy"}`."""
    monkeypatch.setenv("SD_API_KEYS", '{"shop": "k", "held": "k"}')
    monkeypatch.setenv("SD_API_RPS", "7")
    run("track", "1")
    run("track", "2", "--account", "shop")
    run("cancel", "--remote", "2")
    with database.begin() as connection:
        connection.execute(
            insert(gates).values(scope="account", name="held", proven=True, reason="key: refused", since=NOW)
        )
    said = run("status", "--json")
    document = said.document
    assert (said.code, said.err) == (0, "")
    assert set(document) == {"jobs", "accounts", "oldest_due_seconds", "healthy"}
    assert document["jobs"] == {
        "pending": 1,
        "downloading": 0,
        "completed": 0,
        "failed": 0,
        "expired": 0,
        "cancelled": 1,
    }
    accounts = {row["account"]: row for row in document["accounts"]}
    assert set(accounts) == {"default", "shop", "held"}
    assert accounts["shop"] == {"account": "shop", "hold": None, "rps": 7.0}
    assert accounts["default"]["hold"]["reason"] == "no key for account default"
    assert accounts["held"]["hold"] == {
        "reason": "key: refused",
        "since": NOW.isoformat().replace("+00:00", "Z"),
        "until": None,
    }
    assert (document["oldest_due_seconds"], document["healthy"]) == (0.0, True)
    assert "no key for account default" in run("status").out


def test_status_is_unhealthy_where_due_work_waits(database: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liveness by work, not by processes."""
    monkeypatch.setenv("SD_API_KEY", "k")
    run("track", "1")
    with database.begin() as connection:
        connection.execute(update(jobs).values(due_at=datetime(2026, 1, 1, tzinfo=UTC)))
    document = run("status", "--json").document
    assert document["healthy"] is False
    assert document["oldest_due_seconds"] > 60


def test_migrate_makes_the_tables_and_says_so(run: Run, tmp_path: Path) -> None:
    """In a directory that is not there yet; a second time it has nothing to do."""
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


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_without_tables_every_command_names_the_one_that_makes_them(
    run: Run, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 1, one line, nothing on stdout."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/empty.db")
    said = run(*words)
    assert (said.code, said.out) == (1, "")
    assert "run `fetch-worker migrate`" in said.err
    assert _one_line(said.err)


@pytest.mark.parametrize("words", [*COMMANDS, ("migrate",)], ids=" ".join)
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
def test_a_database_that_cant_be_used_is_one_line_that_names_it(
    run: Run, words: tuple[str, ...], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 1, and never the password, nor the advice to migrate what is not there."""
    (tmp_path / "no_database.txt").write_text("this is a text, and longer than the head of a database file " * 10)
    monkeypatch.setenv("DATABASE_URL", url)
    said = run(*words)
    assert (said.code, said.out) == (1, "")
    assert "DATABASE_URL" in said.err
    assert "migrate" not in said.err
    assert "hidden-word" not in said.err
    assert _one_line(said.err)


@pytest.mark.parametrize("words", [*COMMANDS, ("migrate",)], ids=" ".join)
def test_a_wrong_setting_is_exit_2(run: Run, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the variable."""
    monkeypatch.setenv("POLL_MIN", "soon")
    said = run(*words)
    assert (said.code, said.out) == (2, "")
    assert "POLL_MIN" in said.err
    assert _one_line(said.err)


def test_the_module_runs_as_a_process_and_takes_a_closed_pipe_in_silence(tmp_path: Path) -> None:
    """`fetch-worker list | head -1` must not end in a traceback."""
    environment = os.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/x.db"}
    script = "import sys; from worker.cli import main; main(sys.argv[1:])"
    root = Path(__file__).parents[1]
    made = subprocess.run([sys.executable, "-c", script, "migrate"], cwd=root, env=environment, check=False)
    assert made.returncode == 0
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", script, "list", "--json"],
        cwd=root,
        env=environment,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert "Traceback" not in done.stderr
