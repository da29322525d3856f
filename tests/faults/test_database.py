"""PostgreSQL restarts, is unreachable, or loses the connection during COMMIT: work waits, and nothing is lost."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests import servers
from tests.faults.connection_faults import (
    cut_after_the_commit,
    cut_before_the_commit,
    restarted,
    swallowing,
    unreachable,
)
from tests.faults.proxy import Proxy, running_proxy
from tests.faults.servers import RedisServer, all_completed, assert_nothing_lost, running_postgres, up, wait_completed
from worker import track_many
from worker.sandbox import Sandbox
from worker.store.engine import make_engine
from worker.store.migrate import migrate

JOBS = 40


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Engine]:
    """Create a migrated database. The test connects to it without the proxy."""
    with servers.postgres(tmp_path / "postgres") as url:
        engine = make_engine(make_url(url))
        migrate(engine)
        yield engine
        engine.dispose()


@pytest.fixture
def proxy(database: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Start a proxy between the worker and the database. DATABASE_URL leads through it."""
    url = database.url
    with running_proxy(url.host or "127.0.0.1", url.port or 5_432) as proxy:
        proxied_url = url.set(host="127.0.0.1", port=proxy.port)
        monkeypatch.setenv("DATABASE_URL", proxied_url.render_as_string(hide_password=False))
        yield proxy


FAULTS = [restarted, unreachable, swallowing, cut_before_the_commit, cut_after_the_commit]


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_nothing_is_lost_when_the_database_fails(
    fault: Callable[[Proxy, Callable[[], int]], None],
    tmp_path: Path,
    database: Engine,
    proxy: Proxy,
    sandbox: Sandbox,
    broker: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fault happens under load. No process exits, and all jobs complete after the fault ends."""
    monkeypatch.setenv("RECOVERY_SECONDS", "120")  # leases outlast the fault, so that no job is polled twice
    with up(tmp_path):
        track_many([sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS)])
        time.sleep(2)
        fault(proxy, lambda: sum(sandbox.calls.fetches.values()))
        log = tmp_path / "up.log"
        wait_completed(database, JOBS, tmp_path)
    assert_nothing_lost(database, sandbox, tmp_path, JOBS)
    assert "restart in" not in log.read_text(), "a process exited because of the fault"


@pytest.mark.long
@pytest.mark.server
def test_given_a_server_that_crashes_twice_when_jobs_are_under_way_then_nothing_is_lost(
    tmp_path: Path, sandbox: Sandbox, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pg_ctl restart -m immediate`: commits without `synchronous_commit` may be lost, and their work is repeated."""
    with running_postgres(tmp_path / "postgres") as server:
        monkeypatch.setenv("DATABASE_URL", server.url)
        database = make_engine(make_url(server.url))
        migrate(database)
        with up(tmp_path):
            track_many([sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS)])
            for _ in range(2):
                time.sleep(2)
                assert not all_completed(database, JOBS), "the server crashed too late"
                server.crash()
                database.dispose()
            log = tmp_path / "up.log"
            wait_completed(database, JOBS, tmp_path)
        assert_nothing_lost(database, sandbox, tmp_path, JOBS, asked_again=JOBS)
        database.dispose()
        assert "restart in" not in log.read_text(), "a process exited because of the fault"
