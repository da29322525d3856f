"""PostgreSQL behind a pooler in transaction mode: each transaction may use another server connection."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

from tests import servers
from tests.faults.pooler import SERVERS, Pooled, own_pooler, pgbouncer
from tests.faults.servers import RedisServer, assert_nothing_lost, up, wait_completed
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
def direct_url(tmp_path: Path) -> Iterator[str]:
    """Create an empty database. The URL leads to it without a pooler."""
    with servers.postgres(tmp_path / "postgres") as url:
        yield url


@pytest.fixture(params=["own", "pgbouncer"])
def pooled(
    request: pytest.FixtureRequest, direct_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pooled]:
    """Start a pooler in front of the database. DATABASE_URL leads through it."""
    with own_pooler(direct_url) if request.param == "own" else pgbouncer(direct_url, tmp_path / "pgbouncer") as pooler:
        monkeypatch.setenv("DATABASE_URL", pooler.url)
        yield pooler


def _session(connection: "psycopg.Connection[tuple[object, ...]]") -> tuple[object, ...]:
    """Return the process id and the settings of the server session behind a connection."""
    names = ", ".join(f"current_setting('{name}')" for name in SETTINGS)
    return connection.execute(f"SELECT pg_backend_pid(), {names}".encode()).fetchone() or ()


@pytest.mark.long
@pytest.mark.server
def test_given_a_pooler_in_transaction_mode_when_jobs_complete_then_no_session_state_is_needed_or_left_behind(
    tmp_path: Path, direct_url: str, pooled: Pooled, sandbox: Sandbox, broker: RedisServer
) -> None:
    """All clients share four sessions. No prepared statement is missing, and no setting outlives its transaction."""
    engines = [make_engine(make_url(pooled.url)) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        assert set(threads.map(lambda engine: migrate(engine)[1], engines)) == {SCHEMA_VERSION}
    database = engines[0]

    with up(tmp_path), ExitStack() as stack:
        app_connections = [stack.enter_context(psycopg.connect(pooled.url, prepare_threshold=None)) for _ in range(6)]
        for number in range(JOBS // 6):
            track_many([sandbox.submit(f"a lighthouse, {number}, {index}") for index in range(6)])
            for connection in app_connections:  # queries of an app between those of the worker
                assert connection.execute(b"SELECT 1").fetchone() == (1,)
                connection.commit()
        log = tmp_path / "up.log"
        wait_completed(database, JOBS, tmp_path)
        assert pooled.clients() >= CLIENTS
        # each connection stays in its transaction, so that each one has its own session
        sessions = [_session(connection) for connection in app_connections[:SERVERS]]
        with psycopg.connect(direct_url) as direct:
            untouched = _session(direct)
            assert direct.execute(LOCKS).fetchone() == (0,)

        assert len({session[0] for session in sessions}) == SERVERS
        assert {session[1:] for session in sessions} == {untouched[1:]}
        engines[1].dispose()
    assert_nothing_lost(database, sandbox, tmp_path, JOBS)
    database.dispose()
    log_text = log.read_text().lower()
    assert "prepared statement" not in log_text
    assert "waits for the database" not in log_text
