"""MariaDB closes connections, loses the connection during COMMIT, or reports deadlocks: nothing is lost."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pymysql
import pytest
from sqlalchemy import Engine, select
from sqlalchemy.engine import URL, make_url

from tests import servers
from tests.faults.connection_faults import cut_after_the_commit, cut_before_the_commit
from tests.faults.proxy import Proxy, running_proxy
from tests.faults.servers import RedisServer, assert_nothing_lost, up, wait_completed
from worker import track_many
from worker.sandbox import Sandbox
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs, outputs

JOBS = 60
FAULT_SECONDS, FAULT_SECONDS_MAX = 6.0, 90.0
LOCKED, DEADLOCK = 1205, 1213


@pytest.fixture
def database() -> Iterator[Engine]:
    """Create a migrated database. The test connects to it without the proxy."""
    with servers.mariadb() as url:
        engine = make_engine(make_url(url).set(drivername="mariadb+pymysql"))
        migrate(engine)
        yield engine
        engine.dispose()


@pytest.fixture
def proxy(database: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Start a proxy between the worker and the database. DATABASE_URL leads through it."""
    url = database.url
    with running_proxy(url.host or "127.0.0.1", url.port or 3_306) as proxy:
        proxied_url = url.set(host="127.0.0.1", port=proxy.port)
        monkeypatch.setenv("DATABASE_URL", proxied_url.render_as_string(hide_password=False))
        yield proxy


def _connect(url: URL, database: str | None = None) -> "pymysql.Connection[pymysql.cursors.Cursor]":
    return pymysql.connect(
        host=url.host, port=url.port or 3_306, user=url.username, password=url.password or "", database=database
    )


def _kill_connections(database: Engine, proxy: Proxy) -> None:
    """Kill every connection to the database, three times a second."""
    database.dispose()
    killed, began = 0, time.monotonic()
    with _connect(database.url) as connection, connection.cursor() as cursor:
        while killed <= 20 or time.monotonic() < began + FAULT_SECONDS:
            assert time.monotonic() < began + FAULT_SECONDS_MAX, f"the worker opened only {killed} connections"
            cursor.execute("SELECT id FROM information_schema.processlist WHERE db = %s", (database.url.database,))
            for (connection_id,) in cursor.fetchall():
                with suppress(pymysql.err.OperationalError):  # it was closed meanwhile
                    cursor.execute(f"KILL CONNECTION {connection_id}")
                    killed += 1
            time.sleep(0.3)


def _cause_deadlocks(database: Engine, proxy: Proxy) -> None:
    """Lock the same rows in the opposite order. Many writes make MariaDB roll back the other transaction."""
    before, own_deadlocks, began = _deadlocks(database.url), 0, time.monotonic()
    with _connect(database.url, database.url.database) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE ballast (number INT)")
        while _deadlocks(database.url) - before <= own_deadlocks or time.monotonic() < began + FAULT_SECONDS:
            assert time.monotonic() < began + FAULT_SECONDS_MAX, "no transaction of the worker was rolled back"
            try:
                cursor.executemany("INSERT INTO ballast VALUES (%s)", [(number,) for number in range(2_000)])
                for table in (outputs, jobs):
                    statement = select(table.c.id).where(table.c.due_at.is_not(None)).order_by(table.c.id.desc())
                    cursor.execute(str(statement.with_for_update().compile(database)))
                    time.sleep(0.05)
            except pymysql.err.OperationalError as error:
                if error.args[0] not in (DEADLOCK, LOCKED):
                    raise
                own_deadlocks += error.args[0] == DEADLOCK
            connection.rollback()
            time.sleep(0.02)


def _deadlocks(url: URL) -> int:
    with _connect(url) as connection, connection.cursor() as cursor:
        cursor.execute("SHOW GLOBAL STATUS LIKE 'Innodb_deadlocks'")
        row = cursor.fetchone()
        return int(row[1]) if row else 0


def _cut_at_commits(database: Engine, proxy: Proxy) -> None:
    """Cut connections before the COMMIT reaches the server, then after it."""
    cut_before_the_commit(proxy, lambda: 0)
    cut_after_the_commit(proxy, lambda: 0)


FAULTS = [_kill_connections, _cause_deadlocks, _cut_at_commits]


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_given_waiting_jobs_when_mariadb_fails_then_nothing_is_lost(
    fault: Callable[[Engine, Proxy], None],
    tmp_path: Path,
    database: Engine,
    proxy: Proxy,
    sandbox: Sandbox,
    broker: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No process exits, and all jobs complete after the fault."""
    monkeypatch.setenv("RECOVERY_SECONDS", "120")  # leases outlast the fault, so that no job is polled twice
    with up(tmp_path):
        track_many([sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS)])
        time.sleep(1)
        fault(database, proxy)
        log = tmp_path / "up.log"
        wait_completed(database, JOBS, tmp_path)
    assert_nothing_lost(database, sandbox, tmp_path, JOBS)
    assert "restart in" not in log.read_text(), "a process exited because of the fault"
