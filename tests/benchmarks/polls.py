"""Polls: the cost of a poll and the number of polls per second of a complete worker.

Compared with a bare `requests` call, a Celery task per poll, and a small asyncio poller.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from tests.benchmarks.deployment import (
    BIN,
    ROOT,
    ApiServer,
    BenchmarkDeployment,
    api_server,
    cpu_seconds,
    deploy,
    make_certificate,
    resident_mib,
)
from tests.benchmarks.table import Rounds, Table

IN_FLIGHT = 128
LATENCY = 0.15
BARE_CALLS = 1_200
BARE = """
import json, sys, time, requests
url, calls = sys.argv[1], int(sys.argv[2])
session = requests.Session()
ask = lambda: session.post(url, json={"key": "sk-benchmark-0123456789abcdef"}).json()
for _ in range(20): ask()
cpu, wall = time.process_time(), time.perf_counter()
for _ in range(calls): ask()
print(json.dumps([(time.process_time() - cpu) / calls, calls / (time.perf_counter() - wall)]))
"""


def bare(server: ApiServer, calls: int = BARE_CALLS) -> float:
    """Return the processor seconds per call of a loop over one `requests.Session` with default settings."""
    environment = {"PATH": str(BIN), "HOME": "/", "LANG": "C.UTF-8"}
    if server.certificate:
        environment["REQUESTS_CA_BUNDLE"] = str(server.certificate)
    program = [sys.executable, "-c", BARE, f"{server.base}/fetch/12202888", str(calls)]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, check=True, timeout=300)
    return float(json.loads(result.stdout)[0])


@contextmanager
def deploy_workers(
    folder: Path, server: ApiServer, *, workers: int = 1, rows: int = 0, finished: int = 0
) -> Iterator[tuple[BenchmarkDeployment, list[int]]]:
    """Deploy idle workers whose key has been accepted. `rows` jobs wait with a much later due time."""
    with deploy(folder, **settings_for(server)) as deployment:
        if rows:
            deployment.insert_jobs(server.base, rows, prefix="later", first=30_000)
        if finished:
            deployment.insert_jobs(server.base, finished, prefix="over", status="completed")
        yield deployment, start_workers(deployment, server, workers)


def settings_for(server: ApiServer) -> dict[str, str]:
    """Return the settings of a worker that uses this server as API."""
    settings = {"SD_API_URL": server.base, "SD_API_HOSTS": f"localhost:{server.port}"}
    if server.certificate:
        settings["SD_API_CA_BUNDLE"] = str(server.certificate)
    return settings


def start_workers(deployment: BenchmarkDeployment, server: ApiServer, workers: int) -> list[int]:
    """Start workers and wait until the API has accepted their key. Return their process ids."""
    deployment.settle()
    before = server.count()
    pids = [deployment.start_worker(number) for number in range(1, workers + 1)]
    deployment.insert_jobs(server.base, 1, prefix="key")
    deadline = time.monotonic() + 20
    while server.count() == before:
        if time.monotonic() > deadline:
            raise RuntimeError((deployment.folder / "worker1.log").read_text()[-2000:])
        time.sleep(0.1)
    time.sleep(1.5)
    return pids


def window(
    deployment: BenchmarkDeployment, pids: list[int], server: ApiServer, name: str, *, rows: int, seconds: float
) -> tuple[float, float]:
    """Insert due jobs and measure the workers: return (processor seconds per poll, polls per second).

    `rows` is the expected number of jobs. If it is not enough, the measurement is repeated with twice as many.
    """
    while True:
        before = server.count()
        deployment.insert_jobs(server.base, rows, prefix=f"{name}{rows}x")
        while server.count() < before + rows / 20:
            time.sleep(0.02)
        requests, used, began = server.count(), cpu_seconds(pids), time.perf_counter()
        time.sleep(seconds)
        polls, spent, elapsed = server.count() - requests, cpu_seconds(pids) - used, time.perf_counter() - began
        enough = server.count() < before + rows
        while server.count() < before + rows:  # so that all polls of this round are finished
            time.sleep(0.1)
        time.sleep(1.0)
        if enough:
            return spent / polls, polls / elapsed
        rows *= 2


def measure_polls(table: Table, folder: Path, rounds: int, seconds: float) -> None:
    """Measure one worker with http, https, and latency, beside the bare loop, the naive way and the asyncio poller."""
    folder.mkdir()
    certificate = make_certificate(folder)
    with api_server() as plain, api_server(certificate=certificate) as tls, api_server(LATENCY) as slow:
        ours, naive, peer, ours_tls, ours_slow, rate_slow, naive_by_ours = (Rounds() for _ in range(7))
        best = 0.0
        with (
            deploy_workers(folder / "plain", plain) as plain_workers,
            deploy_workers(folder / "tls", tls) as tls_workers,
            deploy_workers(folder / "slow", slow) as slow_workers,
            api_server() as naive_server,
            naive_worker(folder / "naive", naive_server) as naive_pid,
            api_server() as peer_server,
            peer_worker(folder / "peer", peer_server) as peer_pid,
        ):
            for number in range(rounds):
                yardstick = bare(plain)
                cost, rate = window(*plain_workers, plain, f"p{number}x", rows=int(seconds * 4_000), seconds=seconds)
                best = max(best, rate)
                ours.add(cost, yardstick)
                cost_peer, rate_peer = window_of_process(peer_pid, peer_server, seconds)
                peer.add(cost_peer, yardstick)
                cost_naive, rate_naive = window_of_process(naive_pid, naive_server, seconds)
                naive.add(cost_naive, yardstick)
                naive_by_ours.add(cost_naive, cost)
                cost, rate = window(*slow_workers, slow, f"s{number}x", rows=int(seconds * 1_300), seconds=seconds)
                ours_slow.add(cost, yardstick)
                rate_slow.add(rate, IN_FLIGHT / LATENCY)
                yardstick = bare(tls)
                cost, _ = window(*tls_workers, tls, f"t{number}x", rows=int(seconds * 4_000), seconds=seconds)
                ours_tls.add(cost, yardstick)
        us = "µs CPU"
        table.ratio("poll: whole worker ÷ bare requests", ours, us, 1e6, must=0.6, aim=0.45)
        table.ratio("poll: asyncio, aiohttp, asyncpg, without our duties ÷ bare requests", peer, us, 1e6)
        table.ratio("poll over https: whole worker ÷ bare requests", ours_tls, us, 1e6)
        table.ratio("poll at 150 ms latency ÷ bare requests", ours_slow, us, 1e6, must=0.95, aim=0.65)
        table.ratio("polls/s at 150 ms ÷ (128 / 0.15 s)", rate_slow, "/s", 1, must=0.85, aim=0.95, more=True)
        table.ratio("naive: Celery task per poll ÷ bare requests", naive, us, 1e6)
        table.ratio("naive: Celery task per poll ÷ ours", naive_by_ours, us, 1e6, must=20, more=True)
        table.figure("polls/s, one process, best round", best, "/s")
        table.figure("polls/s of the asyncio way, last round", rate_peer, "/s")
        table.figure("polls/s of the naive way, prefork -c 2", rate_naive, "/s")


@contextmanager
def naive_worker(folder: Path, server: ApiServer) -> Iterator[int]:
    """Run a worker of the naive implementation, stopped. Return its process id."""
    with deploy(folder, NAIVE_API=server.base) as deployment:
        deployment.run(sys.executable, "-m", "tests.benchmarks.naive")
        app = ("-A", "tests.benchmarks.naive")
        command = [str(BIN / "celery"), *app, "worker", "-Q", "naive", "-c", "2", "-n", "n@%h"]
        with stopped(deployment, command, server) as pid:
            yield pid


@contextmanager
def peer_worker(folder: Path, server: ApiServer) -> Iterator[int]:
    """Run the asyncio poller, stopped. Return its process id."""
    with deploy(folder) as deployment:
        command = [sys.executable, "-m", "tests.benchmarks.peer", server.base, deployment.database_url]
        with stopped(deployment, command, server) as pid:
            yield pid


@contextmanager
def stopped(deployment: BenchmarkDeployment, command: list[str], server: ApiServer) -> Iterator[int]:
    """Start a program that polls endlessly. Stop it with SIGSTOP after its first poll, and return its process id."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=deployment.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deployment.processes.append(process)
    deadline = time.monotonic() + 60
    while not server.count():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{' '.join(command)} does not poll")
        time.sleep(0.1)
    subprocess.run(["kill", "-STOP", *tree(process.pid)], check=True)
    try:
        yield process.pid
    finally:
        subprocess.run(["kill", "-CONT", *tree(process.pid)], check=True)


def window_of_process(pid: int, server: ApiServer, seconds: float) -> tuple[float, float]:
    """Resume a stopped program for a while: return (processor seconds per poll, polls per second)."""
    subprocess.run(["kill", "-CONT", *tree(pid)], check=True)
    time.sleep(1.0)
    requests, used, began = server.count(), cpu_seconds([pid]), time.perf_counter()
    time.sleep(seconds)
    polls, spent, elapsed = server.count() - requests, cpu_seconds([pid]) - used, time.perf_counter() - began
    subprocess.run(["kill", "-STOP", *tree(pid)], check=True)
    return spent / max(1, polls), polls / elapsed


def tree(pid: int) -> list[str]:
    """Return the ids of a process and its children as strings."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [str(pid), *children]


def measure_scale(table: Table, folder: Path, rounds: int, seconds: float) -> None:
    """Measure two workers on one table, and one worker on tables of two sizes."""
    folder.mkdir()
    with api_server() as plain:
        with deploy_workers(folder / "two", plain, workers=2) as (deployment, pids):
            rates, database = [], []
            for number in range(rounds):
                requests, used = plain.count(), deployment.database_cpu_seconds()
                rates.append(
                    window(deployment, pids, plain, f"w{number}x", rows=int(seconds * 6_000), seconds=seconds)[1]
                )
                database.append((deployment.database_cpu_seconds() - used) / (plain.count() - requests))
        table.figure("PostgreSQL, processor time per poll", median(database) * 1e6, "µs", more=False)
        table.figure("polls/s, two processes on two cores, best round", max(rates), "/s", must=1_500, aim=2_200)
    sizes = {"10⁴": 10_000, "10⁶": 1_000_000}
    cost, memory = dict[str, float](), dict[str, float]()
    for name, rows in sizes.items():
        with api_server() as plain, deploy_workers(folder / str(rows), plain, rows=rows) as (deployment, pids):
            polls = [
                window(deployment, pids, plain, f"m{number}x", rows=int(seconds * 4_000), seconds=seconds)[0]
                for number in range(min(rounds, 3))
            ]
            cost[name], memory[name] = sorted(polls)[len(polls) // 2], resident_mib(pids[0])
    table.single("poll: whole worker, 10⁶ ÷ 10⁴ pending rows", cost["10⁶"] * 1e6, cost["10⁴"] * 1e6, "µs CPU")
    table.single("worker memory, 10⁶ ÷ 10⁴ pending rows", memory["10⁶"], memory["10⁴"], "MiB", must=1.1, aim=1.0)


def measure_idle(table: Table, folder: Path, seconds: float) -> None:
    """Measure a worker without due jobs."""
    folder.mkdir()
    with api_server() as plain, deploy_workers(folder / "idle", plain, rows=10_000) as (_, pids):
        used = cpu_seconds(pids)
        time.sleep(seconds)
        share = (cpu_seconds(pids) - used) / seconds * 100
    table.figure("idle worker, 10,000 rows not due", share, "% of a core", must=2.0, aim=0.5, more=False)
