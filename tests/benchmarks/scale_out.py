"""Scaling out: two processes beside one, pgbouncer beside a direct connection, RabbitMQ beside Redis.

A process on another host works like one more process here. The processes share the cores of this machine, so the
figures are a little lower than with two hosts. Each variant has its own database and Redis, and is idle between its
turns.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psycopg
import pytest

from tests.benchmarks.deployment import ApiServer, BenchmarkDeployment, api_server, cpu_seconds, deploy
from tests.benchmarks.polls import settings_for, start_workers, window
from tests.benchmarks.table import Rounds, Table
from tests.benchmarks.transfer import INSERT_OUTPUTS, QUEUE_OUTPUTS, big_png, served, wait_until_stored
from tests.faults.pooler import pgbouncer
from tests.servers import rabbitmq

PICTURES, PICTURE_BYTES = 96, 300_000
DOWNLOAD_THREADS = 16
US = "µs CPU"

Connect = Callable[[BenchmarkDeployment, ExitStack], Sequence[int]]


@dataclass
class Variant:
    """Workers with their own servers, and their figures per round: polls per second, and processor time per poll.

    `poolers` are the ids of the processes between the workers and their servers.
    """

    deployment: BenchmarkDeployment
    pids: list[int]
    server: ApiServer
    poolers: Sequence[int]
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    database_costs: list[float] = field(default_factory=list)
    pooler_costs: list[float] = field(default_factory=list)

    def measure(self, name: str, seconds: float) -> None:
        """Measure one round."""
        requests, used, pooler_used = (
            self.server.count(),
            self.deployment.database_cpu_seconds(),
            cpu_seconds(self.poolers),
        )
        rows = int(seconds * 4_000 * len(self.pids))
        cost, rate = window(self.deployment, self.pids, self.server, name, rows=rows, seconds=seconds)
        polls = self.server.count() - requests
        self.rates.append(rate)
        self.costs.append(cost)
        self.database_costs.append((self.deployment.database_cpu_seconds() - used) / polls)
        self.pooler_costs.append((cpu_seconds(self.poolers) - pooler_used) / polls)


@contextmanager
def variant(folder: Path, workers: int, connect: Connect) -> Iterator[Variant]:
    """Start workers with their own API. `connect` sets up their connections to the servers."""
    with api_server() as server, ExitStack() as servers, deploy(folder, **settings_for(server)) as deployment:
        poolers = connect(deployment, servers)
        yield Variant(deployment, start_workers(deployment, server, workers), server, poolers)


def direct(deployment: BenchmarkDeployment, servers: ExitStack) -> Sequence[int]:
    """Connect to PostgreSQL and Redis directly."""
    return ()


def pooled(deployment: BenchmarkDeployment, servers: ExitStack) -> Sequence[int]:
    """Connect to PostgreSQL through pgbouncer in transaction mode."""
    pooler = servers.enter_context(pgbouncer(deployment.database_url, deployment.folder / "pgbouncer"))
    deployment.settings["DATABASE_URL"] = pooler.url
    return (pooler.pid,)


def rabbitmq_broker(deployment: BenchmarkDeployment, servers: ExitStack) -> Sequence[int]:
    """Use RabbitMQ as the broker. The rate limit stays in Redis."""
    deployment.settings["BROKER_URL"] = servers.enter_context(rabbitmq())
    return ()


def measure_scale_out(table: Table, folder: Path, rounds: int, seconds: float) -> None:
    """Measure polls in four variants, then downloads with one process and with two."""
    folder.mkdir()
    _measure_polls(table, folder, rounds, seconds)
    _measure_downloads(table, folder, rounds)


def _measure_polls(table: Table, folder: Path, rounds: int, seconds: float) -> None:
    setups = {"one": (1, direct), "two": (2, direct), "pooled": (1, pooled), "rabbit": (1, rabbitmq_broker)}
    with ExitStack() as stack:
        variants = dict[str, Variant]()
        for name, (workers, connect) in setups.items():
            try:
                variants[name] = stack.enter_context(variant(folder / name, workers, connect))
            except (pytest.skip.Exception, pytest.fail.Exception) as missing:
                print(f"  {name} is left out: {missing}", flush=True)
        for number in range(rounds):
            for item in variants.values():
                item.measure(f"r{number}x", seconds)
    baseline = variants["one"]
    for name, label in (
        ("two", "two processes ÷ one"),
        ("pooled", "through pgbouncer ÷ straight"),
        ("rabbit", "RabbitMQ as broker ÷ Redis"),
    ):
        if (compared := variants.get(name)) is None:
            continue
        table.ratio(f"polls/s, {label}", Rounds(compared.rates, baseline.rates), "/s", 1, more=True)
        table.ratio(f"a poll, {label}", Rounds(compared.costs, baseline.costs), US, 1e6)
        table.ratio(f"PostgreSQL per poll, {label}", Rounds(compared.database_costs, baseline.database_costs), US, 1e6)
    table.figure("PostgreSQL, processor time per poll", median(baseline.database_costs) * 1e6, "µs", more=False)
    if "pooled" in variants:
        table.figure(
            "pgbouncer, processor time per poll", median(variants["pooled"].pooler_costs) * 1e6, "µs", more=False
        )


def _measure_downloads(table: Table, folder: Path, rounds: int) -> None:
    file = folder / "source.png"
    file.write_bytes(big_png(PICTURE_BYTES))
    settings = {"OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8", "DOWNLOADS_PER_HOST": str(DOWNLOAD_THREADS)}
    speeds, costs = Rounds(), Rounds()
    with ExitStack() as stack:
        url = stack.enter_context(served(file))
        deployments = []
        for processes in (1, 2):
            path = folder / f"downloads{processes}"
            deployment = stack.enter_context(deploy(path, STORAGE_URL=f"file:{path}/out", **settings))
            deployments.append(
                (deployment, [deployment.start_worker(number + 1, "downloads") for number in range(processes)])
            )
        for number in range(rounds + 1):
            single, double = (_download(deployment, pids, url, number) for deployment, pids in deployments)
            if number:  # the first round is a warm-up
                speeds.add(double[0], single[0])
                costs.add(double[1], single[1])
    label = f"of {PICTURE_BYTES / 1e3:g} kB, two processes ÷ one"
    table.ratio(f"downloads/s {label}", speeds, "/s", 1, more=True)
    table.ratio(f"a download {label}", costs, "ms CPU", 1e3)


def _download(deployment: BenchmarkDeployment, pids: list[int], url: str, number: int) -> tuple[float, float]:
    """Download pictures. Return the pictures per second and the processor seconds per picture."""
    with psycopg.connect(deployment.database_url, autocommit=True) as connection:
        ids = [str(row[0]) for row in connection.execute(INSERT_OUTPUTS, (f"s{number}", url, PICTURES - 1))]
        used = cpu_seconds(pids)
        sender = subprocess.Popen(
            [sys.executable, "-c", QUEUE_OUTPUTS, *ids], cwd=deployment.folder, env=deployment.environment
        )
        wait_until_stored(connection, PICTURES * number + 1)  # do not measure the start of the sender
        began = time.perf_counter()
        wait_until_stored(connection, PICTURES * (number + 1))
        elapsed, spent = time.perf_counter() - began, cpu_seconds(pids) - used
    if sender.wait(30):
        raise RuntimeError("the messages were not sent")
    return (PICTURES - 1) / elapsed, spent / PICTURES
