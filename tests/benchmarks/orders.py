"""Orders: the processor time of an order, from the app's call to the recorded answer, beside a poll and a `track`."""

import json
import sys
import time
from pathlib import Path

from tests.benchmarks.deployment import BenchmarkDeployment, api_server, cpu_seconds, deploy
from tests.benchmarks.polls import deploy_workers, settings_for, start_workers, window
from tests.benchmarks.table import Rounds, Table

CALLS = 400
# Runs in a separate process, as a web app does: the processor seconds of a call.
CALL = """
import json, sys, time
from worker import order, track
kind, number, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
def call(n):
    if kind == "track":
        track(f"t{number}x{n}", eta=30_000)
    else:
        order("v6/images/text2img", {"prompt": f"a lighthouse, {number}, {n}", "samples": 1})
for n in range(20): call(-n)
cpu = time.process_time()
for n in range(calls): call(n)
print(json.dumps((time.process_time() - cpu) / calls))
"""


def measure_orders(table: Table, folder: Path, rounds: int, seconds: float) -> None:
    """Measure an order beside one poll plus one `track`, in the app and in the worker."""
    folder.mkdir()
    costs, calls = Rounds(), Rounds()
    with api_server() as plain, api_server() as orders_api:
        settings = {**settings_for(orders_api), "SD_API_SLOTS": "1000"}
        with (
            deploy_workers(folder / "polls", plain) as poll_workers,
            deploy(folder / "orders", **settings) as deployment,
        ):
            pids = start_workers(deployment, orders_api, 1)
            for number in range(rounds):
                poll, _ = window(*poll_workers, plain, f"o{number}x", rows=int(seconds * 4_000), seconds=seconds)
                track = _call(poll_workers[0], "track", number)
                used, sent = cpu_seconds(pids), orders_api.count()
                order = _call(deployment, "order", number)
                _wait_sent(deployment)
                worker = (cpu_seconds(pids) - used) / (orders_api.count() - sent)
                costs.add(order + worker, poll + track)
                calls.add(order, track)
    table.ratio("order: app and worker ÷ one poll and one track", costs, "µs CPU", 1e6, must=2.0)
    table.ratio("order, the app's call ÷ track", calls, "µs CPU", 1e6)


def _call(deployment: BenchmarkDeployment, kind: str, number: int) -> float:
    """Return the processor seconds of a call in an app."""
    return float(json.loads(deployment.run(sys.executable, "-c", CALL, kind, str(number), str(CALLS))))


def _wait_sent(deployment: BenchmarkDeployment) -> None:
    """Wait until no order waits."""
    deadline = time.monotonic() + 120
    while True:
        jobs = json.loads(deployment.run(sys.executable, "-c", WAITING))
        if not jobs:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{jobs} orders are not sent: {(deployment.folder / 'worker1.log').read_text()[-2000:]}")
        time.sleep(0.2)


WAITING = """
import json
from sqlalchemy import func, select
from worker.settings import load
from worker.store.engine import engine_for
from worker.store.schema import jobs
with engine_for(load().database).connect() as connection:
    print(json.dumps(connection.execute(select(func.count()).where(jobs.c.status == "ordered")).scalar_one()))
"""
