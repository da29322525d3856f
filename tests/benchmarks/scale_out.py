"""More of it: two processes beside one, pgbouncer beside PostgreSQL alone, RabbitMQ beside Redis, in the same rounds.

A process on another host does what one more process here does; the cores are shared here, so two of everything show a
little less than two hosts would. The variants wait idle for their turn, each on a database and a Redis of its own.
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

from tests.benchmarks.polls import settings_for, start_workers, window
from tests.benchmarks.stand import Api, Stand, api, cpu_seconds, stand
from tests.benchmarks.table import Rounds, Table
from tests.benchmarks.transfer import LISTED, QUEUE, big_png, served, until_stored
from tests.faults.pooler import pgbouncer
from tests.servers import rabbitmq

PICTURES, PICTURE_BYTES = 96, 300_000
DOWNLOAD_THREADS = 16
US = "µs CPU"

Lead = Callable[[Stand, ExitStack], Sequence[int]]


@dataclass
class Variant:
    """Workers on servers of their own, and what each round found: polls per second, and processor time per poll.

    `between` are the processes that stand between the workers and their servers.
    """

    made: Stand
    pids: list[int]
    server: Api
    between: Sequence[int]
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    database: list[float] = field(default_factory=list)
    passing: list[float] = field(default_factory=list)

    def measure(self, name: str, seconds: float) -> None:
        """One window."""
        asked, used, passed = self.server.count(), self.made.database_cpu_seconds(), cpu_seconds(self.between)
        rows = int(seconds * 4_000 * len(self.pids))
        cost, rate = window(self.made, self.pids, self.server, name, rows=rows, seconds=seconds)
        polls = self.server.count() - asked
        self.rates.append(rate)
        self.costs.append(cost)
        self.database.append((self.made.database_cpu_seconds() - used) / polls)
        self.passing.append((cpu_seconds(self.between) - passed) / polls)


@contextmanager
def variant(folder: Path, workers: int, lead: Lead) -> Iterator[Variant]:
    """Workers that are led to their servers by `lead`, with an API of their own."""
    with api() as server, ExitStack() as servers, stand(folder, **settings_for(server)) as made:
        between = lead(made, servers)
        yield Variant(made, start_workers(made, server, workers), server, between)


def straight(made: Stand, servers: ExitStack) -> Sequence[int]:
    """To PostgreSQL and Redis."""
    return ()


def pooled(made: Stand, servers: ExitStack) -> Sequence[int]:
    """To PostgreSQL through pgbouncer, in transaction mode."""
    way = servers.enter_context(pgbouncer(made.database_url, made.folder / "pgbouncer"))
    made.settings["DATABASE_URL"] = way.url
    return (way.pid,)


def by_rabbit(made: Stand, servers: ExitStack) -> Sequence[int]:
    """To RabbitMQ as the broker; the budget stays on Redis."""
    made.settings["BROKER_URL"] = servers.enter_context(rabbitmq())
    return ()


def measure_scale_out(table: Table, folder: Path, rounds: int, seconds: float) -> None:
    """Polls in four variants, then downloads by one process and by two."""
    folder.mkdir()
    _measure_polls(table, folder, rounds, seconds)
    _measure_downloads(table, folder, rounds)


def _measure_polls(table: Table, folder: Path, rounds: int, seconds: float) -> None:
    wanted = {"one": (1, straight), "two": (2, straight), "pooled": (1, pooled), "rabbit": (1, by_rabbit)}
    with ExitStack() as stack:
        found = dict[str, Variant]()
        for name, (workers, lead) in wanted.items():
            try:
                found[name] = stack.enter_context(variant(folder / name, workers, lead))
            except (pytest.skip.Exception, pytest.fail.Exception) as missing:
                print(f"  {name} is left out: {missing}", flush=True)
        for number in range(rounds):
            for one in found.values():
                one.measure(f"r{number}x", seconds)
    one = found["one"]
    for name, what in (
        ("two", "two processes ÷ one"),
        ("pooled", "through pgbouncer ÷ straight"),
        ("rabbit", "RabbitMQ as broker ÷ Redis"),
    ):
        if (other := found.get(name)) is None:
            continue
        table.ratio(f"polls/s, {what}", Rounds(other.rates, one.rates), "/s", 1, more=True)
        table.ratio(f"a poll, {what}", Rounds(other.costs, one.costs), US, 1e6)
        table.ratio(f"PostgreSQL per poll, {what}", Rounds(other.database, one.database), US, 1e6)
    table.figure("PostgreSQL, processor time per poll", median(one.database) * 1e6, "µs", more=False)
    if "pooled" in found:
        table.figure("pgbouncer, processor time per poll", median(found["pooled"].passing) * 1e6, "µs", more=False)


def _measure_downloads(table: Table, folder: Path, rounds: int) -> None:
    file = folder / "source.png"
    file.write_bytes(big_png(PICTURE_BYTES))
    settings = {"OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8", "DOWNLOADS_PER_HOST": str(DOWNLOAD_THREADS)}
    speeds, costs = Rounds(), Rounds()
    with ExitStack() as stack:
        url = stack.enter_context(served(file))
        stands = []
        for processes in (1, 2):
            place = folder / f"downloads{processes}"
            made = stack.enter_context(stand(place, STORAGE_URL=f"file:{place}/out", **settings))
            stands.append((made, [made.start_worker(number + 1, "downloads") for number in range(processes)]))
        for number in range(rounds + 1):
            alone, both = (_downloaded(made, pids, url, number) for made, pids in stands)
            if number:  # the first round warms up
                speeds.add(both[0], alone[0])
                costs.add(both[1], alone[1])
    what = f"of {PICTURE_BYTES / 1e3:g} kB, two processes ÷ one"
    table.ratio(f"downloads/s {what}", speeds, "/s", 1, more=True)
    table.ratio(f"a download {what}", costs, "ms CPU", 1e3)


def _downloaded(made: Stand, pids: list[int], url: str, number: int) -> tuple[float, float]:
    """Has pictures fetched: how many per second, and processor seconds for each."""
    with psycopg.connect(made.database_url, autocommit=True) as connection:
        ids = [str(row[0]) for row in connection.execute(LISTED, (f"s{number}", url, PICTURES - 1))]
        used = cpu_seconds(pids)
        sender = subprocess.Popen([sys.executable, "-c", QUEUE, *ids], cwd=made.folder, env=made.environment)
        until_stored(connection, PICTURES * number + 1)  # starting the sender is no part of it
        began = time.perf_counter()
        until_stored(connection, PICTURES * (number + 1))
        took, spent = time.perf_counter() - began, cpu_seconds(pids) - used
    if sender.wait(30):
        raise RuntimeError("the messages were not sent")
    return (PICTURES - 1) / took, spent / PICTURES
