"""`fetch-worker prune` and the task: what they say, what they ask, and which setting counts when nothing is said."""

import json
import os
import sys
from collections.abc import Callable
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
from worker.store.engine import database_now, make_engine
from worker.store.schema import jobs

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `prune` as its entry point does: (exit code, stdout, stderr)."""

    def command(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["prune", *words])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return command


@pytest.fixture
def database(tmp_path: Path, migrated_sqlite: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Four jobs that ended, one in each final state, 40 days ago; and a young one."""
    (tmp_path / "test.db").write_bytes(migrated_sqlite.read_bytes())
    url = f"sqlite:///{tmp_path}/test.db"
    monkeypatch.setenv("DATABASE_URL", url)
    engine = make_engine(make_url(url))
    with engine.begin() as connection:
        now = database_now(connection)
        for status in ("completed", "cancelled", "failed", "expired"):
            _add(connection, status, now - timedelta(days=40))
        _add(connection, "completed", now - timedelta(days=1))
    return engine


def _add(connection: Any, status: str, ended: datetime) -> None:
    code = "api_failed" if status in ("failed", "expired") else None
    values: dict[str, Any] = {"status": status, "completed_at": ended, "ready_at": ended, "tracked_at": ended}
    add_job(connection, f"{status}{ended}", due_at=None, error_code=code, **values)


def _left(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.execute(select(jobs.c.status).order_by(jobs.c.id)).scalars())


def test_what_is_said_counts_and_else_the_settings(database: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Age, states, files."""
    code, out, _ = run("--older-than", "30d", "--status", "failed", "--yes", "--json")
    assert (code, json.loads(out)) == (0, {"jobs": 1, "outputs": 0, "files": 0, "bytes": 0})
    assert _left(database) == ["completed", "cancelled", "expired", "completed"]

    monkeypatch.setenv("PRUNE_AFTER", "2w")
    code, out, _ = run("--yes")
    assert (code, out) == (0, "2 jobs and 0 outputs removed; files are kept\n")
    assert _left(database) == ["expired", "completed"]


def test_a_dry_run_removes_nothing(database: Engine, run: Run) -> None:
    """And needs no yes."""
    code, out, _ = run("--older-than", "30d", "--remove-files", "--dry-run")
    assert (code, out) == (0, "2 jobs and 0 outputs would be removed, 0 files of 0 bytes\n")
    assert json.loads(run("--older-than", "0", "--dry-run", "--json")[1])["jobs"] == 3
    assert len(_left(database)) == 5


def test_it_asks_on_a_terminal(database: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said there is what would be removed; no is no."""
    master, slave = os.openpty()
    with os.fdopen(master, "wb", buffering=0) as keys, os.fdopen(slave, "r") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        keys.write(b"n\n")
        code, _, err = run("--older-than", "30d", "--limit", "1")
        assert code == 130
        assert "1 jobs and 0 outputs would be removed" in err
        assert len(_left(database)) == 5
        keys.write(b"y\n")
        assert run("--older-than", "30d")[0] == 0
    assert _left(database) == ["failed", "expired", "completed"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--yes"], "set PRUNE_AFTER"),
        (["--older-than", "30d"], "--yes"),
        (["--older-than", "soon", "--yes"], "such as 30d"),
        (["--older-than", "-1d", "--yes"], "such as 30d"),
        (["--older-than", "1d", "--status", "pending", "--yes"], "pending"),
        (["--older-than", "1d", "--limit", "0", "--yes"], "limit"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_removed(
    database: Engine, run: Run, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exit code 2."""
    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert said in err
    assert len(_left(database)) == 5


def test_files_that_stay_are_told_with_exit_code_1(database: Engine, run: Run, tmp_path: Path) -> None:
    """And why."""
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


def test_the_task_prunes_as_the_settings_say(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at all without an age."""
    monkeypatch.setattr(runs, "settings", load())
    assert tasks.prune() == "nothing is pruned: PRUNE_AFTER is not set"
    monkeypatch.setenv("PRUNE_AFTER", "30d")
    monkeypatch.setenv("PRUNE_STATES", "completed, failed")
    monkeypatch.setattr(runs, "settings", load())
    monkeypatch.setattr(resources, "settings", load())
    monkeypatch.setattr(resources, "_resources", {})
    assert tasks.prune() == "2 jobs pruned"
    assert _left(database) == ["cancelled", "expired", "completed"]
