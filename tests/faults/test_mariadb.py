"""MariaDB cuts connections, is cut off in the middle of a COMMIT, or finds deadlocks: nothing is lost."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pymysql
import pytest
from sqlalchemy import Engine, select
from sqlalchemy.engine import URL, make_url

from tests import servers
from tests.faults.hurts import cut_after_the_commit, cut_before_the_commit
from tests.faults.proxy import Proxy, proxy
from tests.faults.servers import HurtRedis, assert_nothing_lost, up, wait_completed
from worker import track_many
from worker.sandbox import Sandbox
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs, outputs

JOBS = 60
HURT_SECONDS, HURT_SECONDS_MOST = 6.0, 90.0
LOCKED, DEADLOCK = 1205, 1213


@pytest.fixture
def database() -> Iterator[Engine]:
    """A database of this test's own, as the test itself reaches it."""
    with servers.mariadb() as url:
        engine = make_engine(make_url(url).set(drivername="mariadb+pymysql"))
        migrate(engine)
        yield engine
        engine.dispose()


@pytest.fixture
def way(database: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The product's way to that database, which can be hurt."""
    url = database.url
    with proxy(url.host or "127.0.0.1", url.port or 3_306) as made:
        through = url.set(host="127.0.0.1", port=made.port)
        monkeypatch.setenv("DATABASE_URL", through.render_as_string(hide_password=False))
        yield made


def _connected(url: URL, database: str | None = None) -> "pymysql.Connection[pymysql.cursors.Cursor]":
    return pymysql.connect(
        host=url.host, port=url.port or 3_306, user=url.username, password=url.password or "", database=database
    )


def _killed_again_and_again(database: Engine, way: Proxy) -> None:
    """Every connection to the database, three times a second."""
    database.dispose()
    killed, began = 0, time.monotonic()
    with _connected(database.url) as connection, connection.cursor() as cursor:
        while killed <= 20 or time.monotonic() < began + HURT_SECONDS:
            assert time.monotonic() < began + HURT_SECONDS_MOST, f"only {killed} connections were there to be killed"
            cursor.execute("SELECT id FROM information_schema.processlist WHERE db = %s", (database.url.database,))
            for (one,) in cursor.fetchall():
                with suppress(pymysql.err.OperationalError):  # it has gone by itself
                    cursor.execute(f"KILL CONNECTION {one}")
                    killed += 1
            time.sleep(0.3)


def _deadlocked(database: Engine, way: Proxy) -> None:
    """By somebody who locks the same rows the other way round, and has written so much that others have to yield."""
    before, mine, began = _deadlocks(database.url), 0, time.monotonic()
    with _connected(database.url, database.url.database) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE ballast (number INT)")
        while _deadlocks(database.url) - before <= mine or time.monotonic() < began + HURT_SECONDS:
            assert time.monotonic() < began + HURT_SECONDS_MOST, "the product never had to yield"
            try:
                cursor.executemany("INSERT INTO ballast VALUES (%s)", [(number,) for number in range(2_000)])
                for table in (outputs, jobs):
                    locked = select(table.c.id).where(table.c.due_at.is_not(None)).order_by(table.c.id.desc())
                    cursor.execute(str(locked.with_for_update().compile(database)))
                    time.sleep(0.05)
            except pymysql.err.OperationalError as error:
                if error.args[0] not in (DEADLOCK, LOCKED):
                    raise
                mine += error.args[0] == DEADLOCK
            connection.rollback()
            time.sleep(0.02)


def _deadlocks(url: URL) -> int:
    with _connected(url) as connection, connection.cursor() as cursor:
        cursor.execute("SHOW GLOBAL STATUS LIKE 'Innodb_deadlocks'")
        found = cursor.fetchone()
        return int(found[1]) if found else 0


def _cut_at_commits(database: Engine, way: Proxy) -> None:
    """Before what was said reaches the server, then after it."""
    cut_before_the_commit(way, lambda: 0)
    cut_after_the_commit(way, lambda: 0)


HURTS = [_killed_again_and_again, _deadlocked, _cut_at_commits]


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize("hurt", HURTS, ids=lambda hurt: hurt.__name__.strip("_"))
def test_given_jobs_under_way_when_mariadb_is_hurt_then_nothing_is_lost(
    hurt: Callable[[Engine, Proxy], None],
    tmp_path: Path,
    database: Engine,
    way: Proxy,
    sandbox: Sandbox,
    broker: HurtRedis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No process ends for it, and all is done soon after it."""
    monkeypatch.setenv("RECOVERY_SECONDS", "120")  # leases outlast it: nothing may be asked twice
    with up(tmp_path):
        track_many([sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS)])
        time.sleep(1)
        hurt(database, way)
        log = tmp_path / "up.log"
        wait_completed(database, JOBS, tmp_path)
    assert_nothing_lost(database, sandbox, tmp_path, JOBS)
    assert "it is started again" not in log.read_text(), "a process ended for it"
