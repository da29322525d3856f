"""A database that is locked by somebody else, or has hardly a connection to give: work goes round it or waits."""

import json
import secrets
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.engine import make_url

from tests.faults.servers import (
    HurtRedis,
    all_completed,
    assert_nothing_lost,
    assert_polls_are_the_calls,
    celery,
    states,
    until,
    up,
)
from worker import track_many
from worker.database import make_engine
from worker.migrate import migrate
from worker.sandbox import Answer, Sandbox
from worker.tables import jobs

JOBS = 30
CONNECTIONS = 6

pytestmark = [pytest.mark.long, pytest.mark.server]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Migrated tables in an SQLite file that DATABASE_URL names."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    yield engine
    engine.dispose()


def test_given_a_row_that_somebody_locked_for_20_seconds_when_its_answer_comes_then_all_others_go_on(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its own is written once the lock is gone; the API is not asked again for it, since its lease is longer."""
    monkeypatch.setenv("RECOVERY_SECONDS", "30")
    sandbox.options_now(min_seconds=0, max_seconds=0.1)
    submitted = [sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(JOBS)]
    locked = submitted[0]
    time.sleep(0.1)
    body = json.dumps({"status": "success", "id": locked["id"], "output": locked["future_links"]}).encode()
    sandbox.script(locked["id"], [Answer(200, {"Content-Type": "application/json"}, body, 3 / len(body))])
    with celery(tmp_path, "worker"):
        ids = track_many(submitted)
        until(lambda: sandbox.calls.fetches[str(locked["id"])] == 1, 20)
        with database.begin() as somebody:
            somebody.execute(select(jobs.c.id).where(jobs.c.id == ids[0]).with_for_update())
            began = time.monotonic()
            others = until(lambda: states(database).get("completed") == JOBS - 1, 15, lambda: states(database))
            more = [sandbox.submit(f"a harbour, {number}", samples=1) for number in range(JOBS)]
            time.sleep(max(0.0, began + 6 - time.monotonic()))  # its answer has come, and waits
            track_many(more)
            late = until(lambda: states(database).get("completed") == 2 * JOBS - 1, 13, lambda: states(database))
            time.sleep(max(0.0, began + 20 - time.monotonic()))
            assert states(database) == {"completed": 2 * JOBS - 1, "pending": 1}
        took = until(lambda: all_completed(database, 2 * JOBS), 15, lambda: states(database))
    print(f"others done in {others:.1f} s and {late:.1f} s, the locked one {took:.1f} s after the lock")
    assert "their answers wait" in (tmp_path / "worker.log").read_text()
    assert_nothing_lost(database, sandbox, tmp_path, 2 * JOBS)
    assert_polls_are_the_calls(database, sandbox)


@pytest.fixture
def poor(database: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A role with few connections for the same tables, which DATABASE_URL names."""
    role, password = f"poor_{secrets.token_hex(4)}", secrets.token_hex(8)
    with database.begin() as connection:
        connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD '{password}' CONNECTION LIMIT {CONNECTIONS}"))
        for what in ("TABLES", "SEQUENCES"):
            connection.execute(text(f"GRANT ALL ON ALL {what} IN SCHEMA public TO {role}"))
    url = database.url.set(username=role, password=password)
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    yield role
    with database.begin() as connection:
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = :role"
        connection.execute(text(end), {"role": role})
        connection.execute(text(f"DROP OWNED BY {role}"))
        connection.execute(text(f"DROP ROLE {role}"))


def test_given_a_database_with_six_connections_when_twenty_threads_want_one_then_they_take_turns(
    tmp_path: Path, database: Engine, poor: str, sandbox: Sandbox, broker: HurtRedis
) -> None:
    """No job, no output and no process comes to harm."""
    with up(tmp_path) as process:
        submitted = [sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS * 2)]
        with database.begin() as connection:
            used = connection.execute(
                text("SELECT count(*) FROM pg_stat_activity WHERE usename = :role"), {"role": poor}
            ).scalar_one()
        assert 0 < used <= CONNECTIONS
        track_many(submitted)
        took = until(lambda: all_completed(database, JOBS * 2), 90, lambda: states(database))
        assert process.poll() is None
    log = (tmp_path / "up.log").read_text()
    refusals = log.count("too many connections")
    print(f"all done in {took:.1f} s on {CONNECTIONS} connections; {refusals} refusals in the log")
    assert "it is started again" not in log
    assert "Traceback" not in log
    assert_nothing_lost(database, sandbox, tmp_path, JOBS * 2)
    assert_polls_are_the_calls(database, sandbox)


HOLDS = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=15)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
time.sleep(10)
connection.execute("COMMIT")
"""


def test_given_an_sqlite_file_that_another_process_locks_for_10_seconds_when_it_lets_go_then_all_is_done(
    tmp_path: Path, file: Engine, sandbox: Sandbox, broker: HurtRedis
) -> None:
    """An app that tracks jobs meanwhile waits, and is not troubled either."""
    log = tmp_path / "worker.log"
    with celery(tmp_path, "worker"):
        track_many([sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(JOBS)])
        command = [sys.executable, "-c", HOLDS, str(tmp_path / "worker.db")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            began = time.monotonic()
            with (
                pytest.raises(sqlite3.OperationalError, match="locked"),
                sqlite3.connect(tmp_path / "worker.db", timeout=0, isolation_level=None) as impatient,
            ):
                impatient.execute("BEGIN IMMEDIATE")
            impatient.close()
            track_many([sandbox.submit(f"a harbour, {number}", samples=1) for number in range(JOBS)])
            waited = time.monotonic() - began
        assert waited > 9, "it was locked"
        took = until(lambda: all_completed(file, 2 * JOBS), 40, lambda: states(file))
    print(f"tracking waited {waited:.1f} s; all done {took:.1f} s after it")
    assert "database is locked" not in log.read_text()
    assert_nothing_lost(file, sandbox, tmp_path, 2 * JOBS)
    assert_polls_are_the_calls(file, sandbox)
