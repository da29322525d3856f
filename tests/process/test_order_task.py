"""The task `worker.order` in a real worker, for apps that only send tasks."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import Engine, select
from sqlalchemy.engine import make_url

from tests.servers import celery_worker
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs, orders

ENDPOINT = "v6/images/text2img"
PAYLOAD = {"prompt": "a lake at dawn"}


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Create a migrated SQLite file. DATABASE_URL names it. SD_API_URL leads to a closed port."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")
    monkeypatch.setenv("SD_API_URL", "http://127.0.0.1:9/api/v3")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.mark.server
def test_given_a_message_that_is_delivered_twice_then_it_is_one_order_and_both_results_are_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Engine, redis_url: str
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    options = {"reference": "r", "priority": 3, "on_done": "shop.ready", "deadline": 600}
    with (
        celery_worker(tmp_path, "--pool", "threads", "--concurrency", "1", "--queues", "fetch-worker"),
        Celery(broker=redis_url, backend=redis_url, set_as_current=False) as client,
    ):

        def send(task_id: str, payload: object) -> object:
            sent = client.send_task("worker.order", [ENDPOINT, payload], options, queue="fetch-worker", task_id=task_id)
            try:
                return sent.get(timeout=60)
            except Exception as error:  # of a type that Celery makes from its name
                return str(error)

        results = [send("message-1", PAYLOAD), send("message-1", PAYLOAD), send("message-2", PAYLOAD)]
        refused = send("message-3", ["no", "mapping"])

    assert results == [1, 1, 2]
    assert "payload must be a mapping with the fields of the order, not list" in str(refused)
    with database.connect() as connection:
        rows = connection.execute(select(jobs, orders.c.payload).join(orders, orders.c.id == jobs.c.id)).all()
    assert [(row.reference, row.priority, row.on_done, row.deadline_seconds) for row in rows] == [
        ("r", 3, "shop.ready", 600.0)
    ] * 2
    assert [json.loads(row.payload) for row in rows] == [PAYLOAD] * 2
