"""A message kills its worker at each delivery: after some deliveries it is removed from the queue."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import Engine, select
from sqlalchemy.engine import make_url

from tests import servers
from tests.faults.servers import RedisServer, celery, until
from worker.process.redelivery import DELIVERIES_MOST
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs

# Exits the process that inserts the job "poison", as a crash in a database driver would.
PLANT = """
import os, sys, threading, time
def watch():
    while "worker.store.jobs" not in sys.modules or not hasattr(sys.modules["worker.store.jobs"], "insert_jobs"):
        time.sleep(0.01)
    store = sys.modules["worker.store.jobs"]
    insert = store.insert_jobs
    def guarded(connection, new, **options):
        if any(job.remote_id == "poison" for job in new):
            os._exit(9)
        return insert(connection, new, **options)
    store.insert_jobs = guarded
threading.Thread(target=watch, daemon=True).start()
"""


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Create a migrated SQLite file. DATABASE_URL names it. SD_API_URL leads to a closed port."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")
    monkeypatch.setenv("SD_API_URL", "http://127.0.0.1:9/api/v3")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.mark.long
@pytest.mark.server
@pytest.mark.timeout(400)
def test_given_a_message_that_kills_each_worker_then_it_is_set_aside_and_the_other_messages_run(
    tmp_path: Path, broker: RedisServer, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tracked() -> set[str]:
        with database.connect() as connection:
            return set(connection.execute(select(jobs.c.remote_id)).scalars())

    good = {f"good-{number}" for number in range(8)}
    with servers.rabbitmq() as url, Celery(broker=url, backend=broker.url, set_as_current=False) as client:
        monkeypatch.setenv("BROKER_URL", url)
        for number, remote in enumerate(["poison", *sorted(good)]):
            client.send_task("worker.track", [remote], queue="fetch-worker", task_id=f"message-{number}")
        died = 0
        while died <= DELIVERIES_MOST:  # the first delivery is not counted
            with celery(tmp_path, f"doomed-{died}", plant=PLANT, says="[tasks]") as doomed:
                until(lambda doomed=doomed: doomed.poll() is not None, 60)  # type: ignore[misc]
                assert doomed.returncode == 9
            died += 1
        with celery(tmp_path, "survivor", plant=PLANT) as survivor:
            log = tmp_path / "survivor.log"
            until(lambda: "message rejected" in log.read_text(), 60, log.read_text)
            until(lambda: tracked() == good, 60, tracked)
            assert survivor.poll() is None
        lines = [line for line in log.read_text().splitlines() if "message rejected" in line]
        assert len(lines) == 1
        assert "remote='poison'" in lines[0]
