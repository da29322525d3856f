"""An app's Celery workers use the same Redis database: neither side consumes or loses tasks of the other."""

import subprocess
import sys
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy.engine import make_url

from tests.faults.servers import RedisServer, up, wait_completed
from tests.waiting import wait_until
from worker import track_many
from worker.sandbox import Sandbox
from worker.store.engine import make_engine
from worker.store.migrate import migrate

SHOP = """
import os
from celery import Celery
app = Celery("shop", broker=os.environ["REDIS_URL"])
def write(line):
    with open(os.environ["SHOP_LOG"], "a") as log:
        log.write(line + "\\n")
@app.task(name="shop.ready")
def ready(job_id):
    write(f"ready {job_id}")
@app.task(name="shop.own")
def own(number):
    write(f"own {number}")
"""
JOBS = 40


@pytest.mark.long
@pytest.mark.server
def test_tasks_of_an_app_and_of_the_worker_share_a_redis_and_none_is_lost_or_consumed_by_the_other(
    tmp_path: Path, sandbox: Sandbox, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The `on_done` tasks go to the app's default queue and to a queue with another name."""
    (tmp_path / "shop.py").write_text(SHOP)
    log = tmp_path / "shop.log"
    monkeypatch.setenv("SHOP_LOG", str(log))
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    command = [sys.executable, "-m", "celery", "-A", "shop", "worker", "--queues", "celery,orders", "--pool", "threads"]
    with (tmp_path / "shop_worker.log").open("wb") as out:
        shop = subprocess.Popen([*command, "--hostname", "shop@%h"], cwd=tmp_path, stdout=out, stderr=out)
    client = Celery(broker=broker.url, set_as_current=False)
    try:
        with up(tmp_path):
            ids = track_many([sandbox.submit(f"a, {n}") for n in range(JOBS // 2)], on_done="shop.ready")
            ids += track_many([sandbox.submit(f"b, {n}") for n in range(JOBS // 2)], on_done="orders/shop.ready")
            own = [f"own {number}" for number in range(JOBS)]
            expected = {*own, *(f"ready {job_id}" for job_id in ids)}
            for number in range(JOBS):
                client.send_task("shop.own", (number,), queue="celery" if number % 2 else "orders")
            wait_completed(engine, JOBS, tmp_path)
            wait_until(
                lambda: log.exists() and expected <= set(log.read_text().splitlines()),
                "the app has run all its tasks",
                seen=lambda: f"missing: {expected - set(log.read_text().splitlines())}",
            )
    finally:
        shop.terminate()
        shop.wait(60)
        client.close()
        engine.dispose()
    lines = log.read_text().splitlines()
    assert set(lines) == expected
    assert sorted(line for line in lines if line.startswith("own")) == sorted(own)  # on_done tasks may run twice
    for log_text in ((tmp_path / "shop_worker.log").read_text(), (tmp_path / "up.log").read_text()):
        assert "unregistered task" not in log_text
