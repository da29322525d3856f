"""Malformed messages in the queue of a running worker: each one is refused and logged, and the worker continues."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests import servers
from tests.faults import malformed
from tests.faults.servers import WORKER, RedisServer, celery, states, until
from tests.servers import celery_worker
from worker.store.engine import make_engine
from worker.store.migrate import migrate

GOOD = 200
POOL_SIZE = 4
QUEUES = ("--queues", "fetch-worker,fetch-worker.polls")


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Create a migrated SQLite file. DATABASE_URL names it. SD_API_URL leads to a closed port."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")
    monkeypatch.setenv("SD_API_URL", "http://127.0.0.1:9/api/v3")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    yield engine
    engine.dispose()


def refusals(folder: Path) -> list[str]:
    """Return the log lines about refused messages."""
    return [line for line in (folder / "worker.log").read_text().splitlines() if "message refused" in line]


def track_one_by_one(client: Celery, first: int, count: int) -> None:
    """Send `count` valid messages."""
    for number in range(first, first + count):
        client.send_task("worker.track", [f"good-{number}"], queue="fetch-worker")


def assert_worker_is_healthy(folder: Path, pid: int, client: Celery, engine: Engine) -> None:
    """Assert that the process did not restart, is idle and still uses its whole thread pool."""
    log = (folder / "worker.log").read_text()
    os.kill(pid, 0)
    assert log.count(" ready.") == 1
    assert log.count("Connection to broker lost") == 0
    assert "Traceback" not in log, log[-3_000:]
    inspect = client.control.inspect(timeout=20, limit=1)
    for tasks in (inspect.active(), inspect.reserved(), inspect.scheduled()):
        assert list(tasks.values()) == [[]], tasks
    before = states(engine)["pending"]
    track_one_by_one(client, 10_000, 4 * POOL_SIZE)
    until(lambda: states(engine)["pending"] == before + 4 * POOL_SIZE, 20, lambda: states(engine))


@pytest.mark.server
def test_given_malformed_messages_on_redis_among_good_ones_then_each_is_logged_once_and_all_good_ones_run(
    tmp_path: Path, broker: RedisServer, database: Engine
) -> None:
    bad = [json.dumps(malformed.redis_element(sent, malformed.QUEUE)).encode() for sent in malformed.MALFORMED.values()]
    bad += malformed.ELEMENTS.values()
    client = Celery(broker=broker.url, backend=broker.url, set_as_current=False)
    with celery_worker(tmp_path, *QUEUES) as process, client:
        share = GOOD // len(bad) + 1
        sent = 0
        for element in bad:
            track_one_by_one(client, sent, min(share, GOOD - sent))
            sent += min(share, GOOD - sent)
            malformed.push(broker.url, [element])
        until(lambda: states(database).get("pending") == GOOD, 60, lambda: (states(database), refusals(tmp_path)[-3:]))
        until(lambda: len(refusals(tmp_path)) >= len(bad), 20, lambda: (len(bad), Counter(refusals(tmp_path))))
        with broker.client as connection:
            until(lambda: not connection.exists("fetch-worker.unacked", "fetch-worker.unacked_index"), 10)
        assert_worker_is_healthy(tmp_path, process.pid, client, database)
    assert len(refusals(tmp_path)) == len(bad)


@pytest.mark.server
def test_given_malformed_messages_on_rabbitmq_among_good_ones_then_each_is_logged_once_and_all_good_ones_run(
    tmp_path: Path, broker: RedisServer, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = list(malformed.MALFORMED.values())
    with servers.rabbitmq() as url, Celery(broker=url, backend=broker.url, set_as_current=False) as client:
        monkeypatch.setenv("BROKER_URL", url)
        with celery_worker(tmp_path, *QUEUES) as process:
            track_one_by_one(client, 0, GOOD // 2)
            malformed.publish(url, bad)
            malformed.publish_wire(url, list(malformed.PROPERTIES.values()))
            track_one_by_one(client, GOOD // 2, GOOD // 2)
            count = len(bad) + len(malformed.PROPERTIES)
            until(lambda: states(database).get("pending") == GOOD, 60, lambda: states(database))
            until(lambda: len(refusals(tmp_path)) >= count, 20, lambda: (count, len(refusals(tmp_path))))
            assert_worker_is_healthy(tmp_path, process.pid, client, database)
        assert len(refusals(tmp_path)) == count


def test_given_malformed_control_messages_and_events_then_a_worker_with_gossip_continues(
    tmp_path: Path, broker: RedisServer, database: Engine
) -> None:
    envelopes = [json.dumps(malformed.redis_element(sent, "")).encode() for sent in malformed.BODIES.values()]
    bad = [*envelopes, *malformed.ELEMENTS.values()]
    client = Celery(broker=broker.url, backend=broker.url, set_as_current=False)
    with celery(tmp_path, "worker", *WORKER, "--hostname", "worker@%h") as process, client, broker.client as connection:
        for data in bad:
            for channel in ("celery.pidbox", "celeryev/worker.heartbeat", "celeryev/worker.elect"):
                assert connection.publish(f"/0.{channel}", data) == 1
        track_one_by_one(client, 0, 1)
        until(lambda: states(database).get("pending") == 1, 20, lambda: states(database))
        assert_worker_is_healthy(tmp_path, process.pid, client, database)
    assert len(refusals(tmp_path)) > len(bad)
