"""Several workers share a broker: each one reports its database, and an app's own workers log no error."""

from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests.faults.servers import RedisServer, celery
from tests.waiting import wait_until
from worker.process.other_workers import ask_nodes
from worker.sandbox import Sandbox
from worker.store.database_identity import database_id
from worker.store.engine import make_engine
from worker.store.migrate import migrate

APP = """
from celery import Celery

app = Celery("shop", broker={broker!r})

@app.task
def picture_ready(job_id):
    return job_id
"""


@pytest.mark.server
def test_given_workers_of_two_databases_and_of_an_app_when_inspected_then_each_reports_its_own_and_none_logs_errors(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_database = make_engine(make_url(f"sqlite:///{tmp_path / 'other.db'}"))
    migrate(other_database)
    with database.connect() as connection, other_database.connect() as other_connection:
        ids = {database_id(connection), database_id(other_connection)}
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "shop.py").write_text(APP.format(broker=broker.url))
    client = Celery(broker=broker.url)

    with (
        celery(tmp_path, "first"),
        celery(tmp_path, "second", DATABASE_URL=str(other_database.url)),
        celery(shop, "shop", "-A", "shop", "worker", "--pool", "solo", "--hostname", "shop@%h"),
    ):
        wait_until(lambda: {node.database for node in ask_nodes(client).values()} == {*ids, None}, "all three answer")
        nodes = {name.partition("@")[0]: node for name, node in ask_nodes(client).items()}
        logs = (tmp_path / "first.log", tmp_path / "second.log")  # whichever of the two starts last logs the warning
        wait_until(
            lambda: any("workers on another database" in log.read_text() for log in logs), "one of the two is warned"
        )

    assert nodes["shop"].database is None
    assert nodes["shop"].queues == {"celery"}
    for log in (tmp_path / "first.log", tmp_path / "second.log", shop / "shop.log"):
        assert "Traceback" not in log.read_text()
    other_database.dispose()
