"""Rows or the database are locked, or connections are scarce: other work continues, and blocked work waits."""

import json
import secrets
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from select import select as readable
from typing import IO, Any

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.engine import make_url

from tests.faults.servers import (
    PATIENCE,
    RedisServer,
    assert_nothing_lost,
    assert_polls_are_the_calls,
    celery,
    states,
    up,
    wait_completed,
)
from tests.waiting import wait_until
from worker import track_many
from worker.errors import Unavailable
from worker.sandbox import Answer, Sandbox
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs

JOBS = 30
CONNECTIONS = 6

pytestmark = [pytest.mark.long, pytest.mark.server]


@pytest.fixture
def sqlite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Create a migrated SQLite file. DATABASE_URL names it."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    yield engine
    engine.dispose()


def test_given_a_row_that_another_client_locks_when_its_answer_arrives_then_all_other_jobs_continue(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer for the locked row is recorded after the lock is released. The job is not polled again."""
    monkeypatch.setenv("RECOVERY_SECONDS", "300")
    sandbox.options_now(min_seconds=0, max_seconds=0.1)
    submitted = [sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(JOBS)]
    locked = submitted[0]
    time.sleep(0.1)
    body = json.dumps({"status": "success", "id": locked["id"], "output": locked["future_links"]}).encode()
    sandbox.script(locked["id"], [Answer(200, {"Content-Type": "application/json"}, body, 3 / len(body))])
    log = tmp_path / "worker.log"
    with celery(tmp_path, "worker"):
        ids = track_many(submitted)
        wait_until(lambda: sandbox.calls.fetches[str(locked["id"])] == 1, "the job is polled")
        with database.begin() as locker:
            locker.execute(select(jobs.c.id).where(jobs.c.id == ids[0]).with_for_update())
            first_seconds = _wait_for_all_but_one(database, JOBS)
            more = [sandbox.submit(f"a harbour, {number}", samples=1) for number in range(JOBS)]
            wait_until(
                lambda: "their answers wait" in log.read_text(), "its answer waits for the lock", seen=log.read_text
            )
            track_many(more)
            second_seconds = _wait_for_all_but_one(database, 2 * JOBS)
            assert states(database) == {"completed": 2 * JOBS - 1, "pending": 1}
        seconds = wait_completed(database, 2 * JOBS, tmp_path)
    print(f"other jobs took {first_seconds:.1f} s and {second_seconds:.1f} s, the locked one {seconds:.1f} s after it")
    assert_nothing_lost(database, sandbox, tmp_path, 2 * JOBS)
    assert_polls_are_the_calls(database, sandbox)


def _wait_for_all_but_one(engine: Engine, count: int) -> float:
    return wait_until(
        lambda: states(engine).get("completed") == count - 1,
        f"all but one of {count} jobs are completed",
        PATIENCE,
        seen=lambda: states(engine),
    )


@pytest.fixture
def limited_role(database: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Create a role that may open few connections to the same tables. DATABASE_URL names it."""
    role, password = f"limited_{secrets.token_hex(4)}", secrets.token_hex(8)
    with database.begin() as connection:
        connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD '{password}' CONNECTION LIMIT {CONNECTIONS}"))
        for objects in ("TABLES", "SEQUENCES"):
            connection.execute(text(f"GRANT ALL ON ALL {objects} IN SCHEMA public TO {role}"))
    url = database.url.set(username=role, password=password)
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    yield role
    with database.begin() as connection:
        terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = :role"
        connection.execute(text(terminate), {"role": role})
        connection.execute(text(f"DROP OWNED BY {role}"))
        connection.execute(text(f"DROP ROLE {role}"))


def _tracked(submitted: list[Any]) -> bool:
    """Track the jobs. Return False if no connection is free: an app tries again."""
    try:
        track_many(submitted)
    except Unavailable:
        return False
    return True


def test_given_a_database_with_six_connections_when_twenty_threads_need_one_then_they_take_turns(
    tmp_path: Path, database: Engine, limited_role: str, sandbox: Sandbox, broker: RedisServer
) -> None:
    """All jobs and outputs are completed, and no process exits."""
    with up(tmp_path) as process:
        submitted = [sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS * 2)]
        with database.begin() as connection:
            used = connection.execute(
                text("SELECT count(*) FROM pg_stat_activity WHERE usename = :role"), {"role": limited_role}
            ).scalar_one()
        assert 0 < used <= CONNECTIONS
        wait_until(lambda: _tracked(submitted), "the app gets a connection too")
        seconds = wait_completed(database, JOBS * 2, tmp_path)
        assert process.poll() is None
    log = (tmp_path / "up.log").read_text()
    refusals = log.count("too many connections")
    print(f"completed in {seconds:.1f} s on {CONNECTIONS} connections; {refusals} refusals in the log")
    assert "restart in" not in log
    assert "Traceback" not in log
    assert_nothing_lost(database, sandbox, tmp_path, JOBS * 2)
    assert_polls_are_the_calls(database, sandbox)


def _has_input(pipe: IO[bytes]) -> bool:
    """Return whether the pipe has something to read."""
    return bool(readable([pipe], [], [], 0)[0])


HOLD_LOCK = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
time.sleep(10)
print("released", flush=True)
connection.execute("COMMIT")
"""


def test_given_an_sqlite_file_that_another_process_locks_for_10_seconds_then_all_jobs_complete_afterwards(
    tmp_path: Path, sqlite_file: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """An app that tracks jobs meanwhile waits for the lock and gets no error."""
    log = tmp_path / "worker.log"
    with celery(tmp_path, "worker"):
        track_many([sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(JOBS)])
        command = [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "worker.db")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            with (
                pytest.raises(sqlite3.OperationalError, match="locked"),
                sqlite3.connect(tmp_path / "worker.db", timeout=0, isolation_level=None) as impatient,
            ):
                impatient.execute("BEGIN IMMEDIATE")
            impatient.close()
            track_many([sandbox.submit(f"a harbour, {number}", samples=1) for number in range(JOBS)])
            assert _has_input(holder.stdout), "the jobs were tracked while the file was locked"
        seconds = wait_completed(sqlite_file, 2 * JOBS, tmp_path)
    print(f"completed {seconds:.1f} s after the lock")
    assert "database is locked" not in log.read_text()
    assert_nothing_lost(sqlite_file, sandbox, tmp_path, 2 * JOBS)
    assert_polls_are_the_calls(sqlite_file, sandbox)
