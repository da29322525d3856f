"""Polls: what one costs a whole worker, and how many go.

Beside it a bare `requests` call, a Celery task per poll, and a small poller on asyncio.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from tests.benchmarks.stand import BIN, ROOT, Api, Stand, api, cpu_seconds, make_certificate, resident_mib, stand
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


def bare(server: Api, calls: int = BARE_CALLS) -> float:
    """Processor seconds per call of a loop over one `requests.Session`, with its defaults."""
    environment = {"PATH": str(BIN), "HOME": "/", "LANG": "C.UTF-8"}
    if server.certificate:
        environment["REQUESTS_CA_BUNDLE"] = str(server.certificate)
    program = [sys.executable, "-c", BARE, f"{server.base}/fetch/12202888", str(calls)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True, timeout=300)
    return float(json.loads(done.stdout)[0])


@contextmanager
def working(
    folder: Path, server: Api, *, workers: int = 1, rows: int = 0, finished: int = 0
) -> Iterator[tuple[Stand, list[int]]]:
    """A stand whose workers have proven their key and are idle; `rows` wait, due much later."""
    with stand(folder, **settings_for(server)) as made:
        if rows:
            made.put_rows(server.base, rows, prefix="later", first=30_000)
        if finished:
            made.put_rows(server.base, finished, prefix="over", status="completed")
        yield made, start_workers(made, server, workers)


def settings_for(server: Api) -> dict[str, str]:
    """What a worker that asks this server is set to."""
    settings = {"SD_API_URL": server.base, "SD_API_HOSTS": f"localhost:{server.port}"}
    if server.certificate:
        settings["SD_API_CA_BUNDLE"] = str(server.certificate)
    return settings


def start_workers(made: Stand, server: Api, workers: int) -> list[int]:
    """Starts workers and lets them prove their key; the ids of their processes."""
    made.settle()
    asked = server.count()
    pids = [made.start_worker(number) for number in range(1, workers + 1)]
    made.put_rows(server.base, 1, prefix="key")
    until = time.monotonic() + 20
    while server.count() == asked:
        if time.monotonic() > until:
            raise RuntimeError((made.folder / "worker1.log").read_text()[-2000:])
        time.sleep(0.1)
    time.sleep(1.5)
    return pids


def window(made: Stand, pids: list[int], server: Api, name: str, *, rows: int, seconds: float) -> tuple[float, float]:
    """Lets the workers loose on due jobs: (processor seconds per poll, polls per second) amid them.

    `rows` is how many are thought to be enough; where they are not, it begins anew with twice as many.
    """
    while True:
        before = server.count()
        made.put_rows(server.base, rows, prefix=f"{name}{rows}x")
        while server.count() < before + rows / 20:
            time.sleep(0.02)
        asked, used, began = server.count(), cpu_seconds(pids), time.perf_counter()
        time.sleep(seconds)
        polls, spent, took = server.count() - asked, cpu_seconds(pids) - used, time.perf_counter() - began
        enough = server.count() < before + rows
        while server.count() < before + rows:  # nothing of this round runs into the next
            time.sleep(0.1)
        time.sleep(1.0)
        if enough:
            return spent / polls, polls / took
        rows *= 2


def measure_polls(table: Table, folder: Path, rounds: int, seconds: float) -> None:
    """One worker process: http, https, and http with latency; beside it the bare loop, the naive way and the peer."""
    folder.mkdir()
    certificate = make_certificate(folder)
    with api() as plain, api(certificate=certificate) as tls, api(LATENCY) as slow:
        ours, naive, peer, ours_tls, ours_slow, rate_slow, naive_by_ours = (Rounds() for _ in range(7))
        best = 0.0
        with (
            working(folder / "plain", plain) as one,
            working(folder / "tls", tls) as two,
            working(folder / "slow", slow) as three,
            api() as naive_server,
            naive_worker(folder / "naive", naive_server) as naive_pid,
            api() as peer_server,
            peer_worker(folder / "peer", peer_server) as peer_pid,
        ):
            for number in range(rounds):
                yardstick = bare(plain)
                cost, rate = window(*one, plain, f"p{number}x", rows=int(seconds * 4_000), seconds=seconds)
                best = max(best, rate)
                ours.add(cost, yardstick)
                cost_peer, rate_peer = window_of_other(peer_pid, peer_server, seconds)
                peer.add(cost_peer, yardstick)
                cost_naive, rate_naive = window_of_other(naive_pid, naive_server, seconds)
                naive.add(cost_naive, yardstick)
                naive_by_ours.add(cost_naive, cost)
                cost, rate = window(*three, slow, f"s{number}x", rows=int(seconds * 1_300), seconds=seconds)
                ours_slow.add(cost, yardstick)
                rate_slow.add(rate, IN_FLIGHT / LATENCY)
                yardstick = bare(tls)
                cost, _ = window(*two, tls, f"t{number}x", rows=int(seconds * 4_000), seconds=seconds)
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
def naive_worker(folder: Path, server: Api) -> Iterator[int]:
    """A worker of the naive app; its process id."""
    with stand(folder, NAIVE_API=server.base) as made:
        made.run(sys.executable, "-m", "tests.benchmarks.naive")
        words = [str(BIN / "celery"), "-A", "tests.benchmarks.naive", "worker", "-Q", "naive", "-c", "2", "-n", "n@%h"]
        with stopped(made, words, server) as pid:
            yield pid


@contextmanager
def peer_worker(folder: Path, server: Api) -> Iterator[int]:
    """The poller on asyncio; its process id."""
    with stand(folder) as made:
        words = [sys.executable, "-m", "tests.benchmarks.peer", server.base, made.database_url]
        with stopped(made, words, server) as pid:
            yield pid


@contextmanager
def stopped(made: Stand, words: list[str], server: Api) -> Iterator[int]:
    """Start a program that polls without end, and stop it (SIGSTOP) once it has begun; its process id."""
    process = subprocess.Popen(
        words, cwd=ROOT, env=made.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    made.processes.append(process)
    until = time.monotonic() + 60
    while not server.count():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"{' '.join(words)} does not poll")
        time.sleep(0.1)
    subprocess.run(["kill", "-STOP", *tree(process.pid)], check=True)
    try:
        yield process.pid
    finally:
        subprocess.run(["kill", "-CONT", *tree(process.pid)], check=True)


def window_of_other(pid: int, server: Api, seconds: float) -> tuple[float, float]:
    """Let a stopped program go on for a while: (processor seconds per poll, polls per second)."""
    subprocess.run(["kill", "-CONT", *tree(pid)], check=True)
    time.sleep(1.0)
    asked, used, began = server.count(), cpu_seconds([pid]), time.perf_counter()
    time.sleep(seconds)
    polls, spent, took = server.count() - asked, cpu_seconds([pid]) - used, time.perf_counter() - began
    subprocess.run(["kill", "-STOP", *tree(pid)], check=True)
    return spent / max(1, polls), polls / took


def tree(pid: int) -> list[str]:
    """A process and its children, as words."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [str(pid), *children]


def measure_scale(table: Table, folder: Path, rounds: int, seconds: float) -> None:
    """Two worker processes on one table, and one worker on tables of two sizes."""
    folder.mkdir()
    with api() as plain:
        with working(folder / "two", plain, workers=2) as (made, pids):
            rates, database = [], []
            for number in range(rounds):
                asked, used = plain.count(), made.database_cpu_seconds()
                rates.append(window(made, pids, plain, f"w{number}x", rows=int(seconds * 6_000), seconds=seconds)[1])
                database.append((made.database_cpu_seconds() - used) / (plain.count() - asked))
        table.figure("PostgreSQL, processor time per poll", median(database) * 1e6, "µs", more=False)
        table.figure("polls/s, two processes on two cores, best round", max(rates), "/s", must=1_500, aim=2_200)
    sizes = {"10⁴": 10_000, "10⁶": 1_000_000}
    cost, memory = dict[str, float](), dict[str, float]()
    for name, rows in sizes.items():
        with api() as plain, working(folder / str(rows), plain, rows=rows) as (made, pids):
            polls = [
                window(made, pids, plain, f"m{number}x", rows=int(seconds * 4_000), seconds=seconds)[0]
                for number in range(min(rounds, 3))
            ]
            cost[name], memory[name] = sorted(polls)[len(polls) // 2], resident_mib(pids[0])
    table.one("poll: whole worker, 10⁶ ÷ 10⁴ pending rows", cost["10⁶"] * 1e6, cost["10⁴"] * 1e6, "µs CPU")
    table.one("worker memory, 10⁶ ÷ 10⁴ pending rows", memory["10⁶"], memory["10⁴"], "MiB", must=1.1, aim=1.0)


def measure_idle(table: Table, folder: Path, seconds: float) -> None:
    """A worker that has nothing to do."""
    folder.mkdir()
    with api() as plain, working(folder / "idle", plain, rows=10_000) as (_, pids):
        used = cpu_seconds(pids)
        time.sleep(seconds)
        share = (cpu_seconds(pids) - used) / seconds * 100
    table.figure("idle worker, 10,000 rows not due", share, "% of a core", must=2.0, aim=0.5, more=False)
