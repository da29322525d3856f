"""Redis stops, hangs, is emptied, is full or turns read-only. It holds only hints, so nothing is lost."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests.faults.servers import KEY, PATIENCE, RedisServer, assert_nothing_lost, states, tail, up, wait_completed
from tests.servers import celery_worker
from tests.waiting import wait_until
from worker import track_many
from worker.sandbox import Sandbox
from worker.store.engine import make_engine
from worker.store.migrate import migrate

JOBS = 40


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Create a migrated SQLite file. DATABASE_URL names it."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    yield engine
    engine.dispose()


def test_a_worker_survives_a_redis_restart_while_a_job_is_being_tracked(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """The connection is lost while a task with late acknowledgement runs."""
    client = Celery(broker=broker.url, set_as_current=False)
    with celery_worker(tmp_path, "--hostname", "hardy@%h") as process:
        with database.begin():  # locks the database against other writers
            client.send_task("worker.track", ["4711"], {"eta": 1}, queue="fetch-worker")
            log = tmp_path / "worker.log"
            wait_until(
                lambda: "worker.track" in log.read_text().partition(" ready.")[2],
                "the message has been received",
                seen=log.read_text,
            )
            broker.kill()
            time.sleep(1.5)
            broker.start()
        wait_until(lambda: sum(states(database).values()) == 1, "the job is tracked", PATIENCE, seen=lambda: tail(log))
        client.send_task("worker.track", ["4712"], {"eta": 1}, queue="fetch-worker")
        wait_until(lambda: sum(states(database).values()) == 2, "the next is tracked", PATIENCE, seen=lambda: tail(log))
        assert process.poll() is None, "the worker exited when the connection was lost"
    client.close()


def _restarted(broker: RedisServer) -> None:
    broker.kill()
    time.sleep(2)
    broker.start()


def _emptied(broker: RedisServer) -> None:
    broker.execute("FLUSHALL")


def _frozen(broker: RedisServer) -> None:
    broker.signal(signal.SIGSTOP)
    time.sleep(15)
    broker.signal(signal.SIGCONT)


def _full(broker: RedisServer) -> None:
    broker.execute("CONFIG", "SET", "maxmemory-policy", "noeviction")
    broker.execute("CONFIG", "SET", "maxmemory", "1mb")
    time.sleep(5)
    broker.execute("CONFIG", "SET", "maxmemory", "0")


def _read_only(broker: RedisServer) -> None:
    broker.execute("REPLICAOF", "127.0.0.1", "1")
    time.sleep(5)
    broker.execute("REPLICAOF", "NO", "ONE")


@pytest.mark.long
@pytest.mark.parametrize(
    "fault", [_restarted, _emptied, _frozen, _full, _read_only], ids=lambda fault: fault.__name__.strip("_")
)
def test_nothing_is_lost_when_redis_fails(
    fault: object, tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """The fault happens under load. Half of the jobs are tracked directly after it, and all are completed."""
    with up(tmp_path):
        track_many([sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS // 2)])
        time.sleep(2)
        fault(broker)  # type: ignore[operator]  # one of the functions above
        track_many([sandbox.submit(f"a harbour, {number}") for number in range(JOBS // 2)])
        log = tmp_path / "up.log"
        wait_completed(database, JOBS, tmp_path)
    assert_nothing_lost(database, sandbox, tmp_path, JOBS)
    assert KEY not in log.read_text()
