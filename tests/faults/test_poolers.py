"""PostgreSQL behind a pooler in transaction mode: each transaction may find itself on another server's connection."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

from tests import servers
from tests.faults.pooler import SERVERS, Pooled, own_pooler, pgbouncer
from tests.faults.servers import HurtRedis, assert_nothing_lost, up, wait_completed
from worker import track_many
from worker.sandbox import Sandbox
from worker.store.engine import SCHEMA_VERSION, make_engine
from worker.store.migrate import migrate

JOBS, CLIENTS = 60, 10
SETTINGS = ("TimeZone", "lock_timeout", "statement_timeout", "synchronous_commit")
LOCKS = (
    b"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    b" AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


@pytest.fixture
def straight(tmp_path: Path) -> Iterator[str]:
    """An empty database of this test's own, past any pooler."""
    with servers.postgres(tmp_path / "postgres") as url:
        yield url


@pytest.fixture(params=["own", "pgbouncer"])
def pooled(
    request: pytest.FixtureRequest, straight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pooled]:
    """The way to it through a pooler, which DATABASE_URL names."""
    with own_pooler(straight) if request.param == "own" else pgbouncer(straight, tmp_path / "pgbouncer") as made:
        monkeypatch.setenv("DATABASE_URL", made.url)
        yield made


def _session(connection: "psycopg.Connection[tuple[object, ...]]") -> tuple[object, ...]:
    """Which of the server's processes it is, and what the settings are there."""
    names = ", ".join(f"current_setting('{name}')" for name in SETTINGS)
    return connection.execute(f"SELECT pg_backend_pid(), {names}".encode()).fetchone() or ()


@pytest.mark.long
@pytest.mark.server
def test_given_a_pooler_in_transaction_mode_when_jobs_are_done_then_nothing_is_mixed_up_and_nothing_left_behind(
    tmp_path: Path, straight: str, pooled: Pooled, sandbox: Sandbox, broker: HurtRedis
) -> None:
    """Four sessions for all: no prepared statement is missed, no time zone and no time-out outlives its transaction."""
    engines = [make_engine(make_url(pooled.url)) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        assert set(threads.map(lambda engine: migrate(engine)[1], engines)) == {SCHEMA_VERSION}
    database = engines[0]

    with up(tmp_path), ExitStack() as stack:
        others = [stack.enter_context(psycopg.connect(pooled.url, prepare_threshold=None)) for _ in range(6)]
        for number in range(JOBS // 6):
            track_many([sandbox.submit(f"a lighthouse, {number}, {other}") for other in range(6)])
            for other in others:  # an app's own work in between
                assert other.execute(b"SELECT 1").fetchone() == (1,)
                other.commit()
        log = tmp_path / "up.log"
        wait_completed(database, JOBS, tmp_path)
        assert pooled.clients() >= CLIENTS
        # each in a transaction that goes on, so that each has a session of its own
        sessions = [_session(other) for other in others[:SERVERS]]
        with psycopg.connect(straight) as connection:
            untouched = _session(connection)
            assert connection.execute(LOCKS).fetchone() == (0,)

        assert len({session[0] for session in sessions}) == SERVERS
        assert {session[1:] for session in sessions} == {untouched[1:]}
        engines[1].dispose()
    assert_nothing_lost(database, sandbox, tmp_path, JOBS)
    database.dispose()
    said = log.read_text().lower()
    assert "prepared statement" not in said
    assert "waits for the database" not in said
