"""PostgreSQL restarts, cannot be reached, or is cut off in the middle of a COMMIT: work waits, and nothing is lost."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests import servers
from tests.faults.hurts import cut_after_the_commit, cut_before_the_commit, restarted, swallowing, unreachable
from tests.faults.proxy import Proxy, proxy
from tests.faults.servers import HurtRedis, all_completed, assert_nothing_lost, hurt_postgres, up, wait_completed
from worker import track_many
from worker.sandbox import Sandbox
from worker.store.engine import make_engine
from worker.store.migrate import migrate

JOBS = 40


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Engine]:
    """A database of this test's own, as the test itself reaches it."""
    with servers.postgres(tmp_path / "postgres") as url:
        engine = make_engine(make_url(url))
        migrate(engine)
        yield engine
        engine.dispose()


@pytest.fixture
def way(database: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The product's way to that database, which can be hurt."""
    url = database.url
    with proxy(url.host or "127.0.0.1", url.port or 5_432) as made:
        through = url.set(host="127.0.0.1", port=made.port)
        monkeypatch.setenv("DATABASE_URL", through.render_as_string(hide_password=False))
        yield made


HURTS = [restarted, unreachable, swallowing, cut_before_the_commit, cut_after_the_commit]


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize("hurt", HURTS, ids=lambda hurt: hurt.__name__)
def test_nothing_is_lost_when_the_database_is(
    hurt: Callable[[Proxy, Callable[[], int]], None],
    tmp_path: Path,
    database: Engine,
    way: Proxy,
    sandbox: Sandbox,
    broker: HurtRedis,
) -> None:
    """Under load. No process ends for it, and all is done soon after it is back."""
    with up(tmp_path):
        track_many([sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS)])
        time.sleep(2)
        hurt(way, lambda: sum(sandbox.calls.fetches.values()))
        log = tmp_path / "up.log"
        wait_completed(database, JOBS, tmp_path)
    assert_nothing_lost(database, sandbox, tmp_path, JOBS)
    assert "it is started again" not in log.read_text(), "a process ended for it"


@pytest.mark.long
@pytest.mark.server
def test_given_a_server_that_crashes_twice_when_jobs_are_under_way_then_nothing_is_lost(
    tmp_path: Path, sandbox: Sandbox, broker: HurtRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pg_ctl restart -m immediate`: what was committed in passing is undone, too, and made again."""
    with hurt_postgres(tmp_path / "postgres") as server:
        monkeypatch.setenv("DATABASE_URL", server.url)
        database = make_engine(make_url(server.url))
        migrate(database)
        with up(tmp_path):
            track_many([sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS)])
            for _ in range(2):
                time.sleep(2)
                assert not all_completed(database, JOBS), "it crashed too late"
                server.crash()
                database.dispose()
            log = tmp_path / "up.log"
            wait_completed(database, JOBS, tmp_path)
        assert_nothing_lost(database, sandbox, tmp_path, JOBS, asked_again=JOBS)
        database.dispose()
        assert "it is started again" not in log.read_text(), "a process ended for it"
