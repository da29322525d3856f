"""`fetch-worker prune` and its task: output, confirmation, and the settings that apply by default."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.engine import make_url

from tests.rows import add_job
from worker import tasks
from worker.cli import main
from worker.process import resources, runs
from worker.settings import load
from worker.store.audit import latest_actions, record_job_action
from worker.store.engine import database_now, make_engine
from worker.store.schema import jobs

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `prune` and returns exit code, stdout and stderr."""

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["prune", *arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return command


@pytest.fixture
def database(tmp_path: Path, migrated_sqlite: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A database with a job in each final state that ended 40 days ago, and one that ended yesterday."""
    (tmp_path / "test.db").write_bytes(migrated_sqlite.read_bytes())
    url = f"sqlite:///{tmp_path}/test.db"
    monkeypatch.setenv("DATABASE_URL", url)
    engine = make_engine(make_url(url))
    with engine.begin() as connection:
        now = database_now(connection)
        for status in ("completed", "cancelled", "failed", "expired"):
            _add(connection, status, now - timedelta(days=40))
        _add(connection, "completed", now - timedelta(days=1))
    yield engine
    engine.dispose()


def _add(connection: Any, status: str, ended: datetime) -> None:
    code = "api_failed" if status in ("failed", "expired") else None
    values: dict[str, Any] = {"status": status, "completed_at": ended, "ready_at": ended, "tracked_at": ended}
    add_job(connection, f"{status}{ended}", due_at=None, error_code=code, **values)


def _remaining_states(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.execute(select(jobs.c.status).order_by(jobs.c.id)).scalars())


def test_options_override_the_settings(database: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the age, the states and the files."""
    code, out, _ = run("--older-than", "30d", "--status", "failed", "--yes", "--json")
    assert (code, json.loads(out)) == (0, {"jobs": 1, "outputs": 0, "files": 0, "bytes": 0})
    assert _remaining_states(database) == ["completed", "cancelled", "expired", "completed"]

    monkeypatch.setenv("PRUNE_AFTER", "2w")
    code, out, _ = run("--yes")
    assert (code, out) == (0, "2 jobs and 0 outputs removed; files are kept\n")
    assert _remaining_states(database) == ["expired", "completed"]


def test_a_dry_run_removes_nothing(database: Engine, run: Run) -> None:
    """It needs no --yes."""
    code, out, _ = run("--older-than", "30d", "--remove-files", "--dry-run")
    assert (code, out) == (0, "2 jobs and 0 outputs would be removed, 0 files of 0 bytes\n")
    assert json.loads(run("--older-than", "0", "--dry-run", "--json")[1])["jobs"] == 3
    assert len(_remaining_states(database)) == 5


def test_on_a_terminal_it_asks_before(database: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question shows what would be removed. `n` removes nothing."""
    master, slave = os.openpty()
    with os.fdopen(master, "wb", buffering=0) as keys, os.fdopen(slave, "r") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        keys.write(b"n\n")
        code, _, err = run("--older-than", "30d", "--limit", "1")
        assert code == 130
        assert "1 jobs and 0 outputs would be removed" in err
        assert len(_remaining_states(database)) == 5
        keys.write(b"y\n")
        assert run("--older-than", "30d")[0] == 0
    assert _remaining_states(database) == ["failed", "expired", "completed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--yes"], "set PRUNE_AFTER"),
        (["--older-than", "30d"], "--yes"),
        (["--older-than", "soon", "--yes"], "such as 30d"),
        (["--older-than", "-1d", "--yes"], "such as 30d"),
        (["--older-than", "1d", "--status", "pending", "--yes"], "pending"),
        (["--older-than", "1d", "--limit", "0", "--yes"], "limit"),
    ],
)
def test_wrong_options_are_reported_and_nothing_is_removed(
    database: Engine, run: Run, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code is 2."""
    with Path(os.devnull).open() as empty:
        monkeypatch.setattr(sys, "stdin", empty)
        code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(_remaining_states(database)) == 5


def test_files_that_can_not_be_removed_are_reported_with_exit_code_1(
    database: Engine, run: Run, tmp_path: Path
) -> None:
    """The message has the reason."""
    with database.begin() as connection:
        job_id = connection.execute(select(jobs.c.id).where(jobs.c.status == "completed")).scalars().first()
        connection.exec_driver_sql(
            "INSERT INTO fetch_outputs (job_id, position, url, proxy_urls, status, location, size_bytes, sha256,"
            " media_type, listed_at, stored_at) VALUES (?, 0, 'u', '[]', 'stored', ?, 1, 'a', 'image/png', ?, ?)",
            (job_id, f"file:///nowhere/out/0/{job_id}/0-{'a' * 16}.png", "2026-01-01 00:00:00", "2026-01-01 00:00:00"),
        )
    code, out, err = run("--older-than", "30d", "--remove-files", "--yes", "--json")
    assert (code, json.loads(out)["jobs"]) == (1, 0)
    assert "1 jobs stay" in err
    assert "mount it" in err


def test_the_command_removes_actions_after_a_year_and_records_itself(database: Engine, run: Run) -> None:
    with database.begin() as connection:
        now = database_now(connection)
        for days in (400, 364):
            record_job_action(connection, "cancel", days, now=now - timedelta(days=days))

    run("--older-than", "30d", "--dry-run")
    before = _recorded(database)
    run("--older-than", "30d", "--yes")

    assert before == [("cancel", "364"), ("cancel", "400")]
    assert _recorded(database) == [
        ("prune", "--older-than 30d --status completed --status cancelled"),
        ("cancel", "364"),
    ]


def _recorded(engine: Engine) -> list[tuple[str, str]]:
    with engine.connect() as connection:
        return [(action.action, action.filter) for action in latest_actions(connection)]


@pytest.mark.parametrize("prune_after", ["", "30d"])
def test_the_task_removes_actions_after_a_year_with_and_without_prune_after(
    prune_after: str, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prune by the task is not an action of an operator."""
    monkeypatch.setenv("PRUNE_AFTER", prune_after)
    monkeypatch.setattr(runs, "settings", load())
    monkeypatch.setattr(resources, "settings", load())
    monkeypatch.setattr(resources, "_resources", {})
    with database.begin() as connection:
        now = database_now(connection)
        for days in (400, 366, 364):
            record_job_action(connection, "cancel", days, now=now - timedelta(days=days))

    tasks.prune()

    with database.connect() as connection:
        assert [action.job_id for action in latest_actions(connection)] == [364]


def test_the_task_prunes_as_the_settings_say(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PRUNE_AFTER nothing is pruned."""
    monkeypatch.setattr(runs, "settings", load())
    monkeypatch.setattr(resources, "settings", load())
    monkeypatch.setattr(resources, "_resources", {})
    assert tasks.prune() == "nothing is pruned: PRUNE_AFTER is not set"
    monkeypatch.setenv("PRUNE_AFTER", "30d")
    monkeypatch.setenv("PRUNE_STATES", "completed, failed")
    monkeypatch.setattr(runs, "settings", load())
    assert tasks.prune() == "2 jobs pruned"
    assert _remaining_states(database) == ["cancelled", "expired", "completed"]
