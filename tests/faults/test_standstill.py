"""A worker that stands still under a real `up`: it is ended and started again, and the jobs that it held go on."""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.engine import make_url

from tests.waiting import wait_until
from worker import track_many
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs

UP = (sys.executable, "-c", "from worker.cli import main; main()", "up")
KEY = "a-key-of-the-sandbox"
LEASE = 5
SOON = 5.0  # seconds beyond the lease: two looks, the trace, a machine that has other things to do
PROCFILE = "".join(
    f"{name}: celery -A worker.app worker --queues {queues} --pool threads --concurrency 4 --hostname {name}@%h"
    " --loglevel INFO --without-mingle --without-gossip\n"
    for name, queues in (("worker", "fetch-worker,fetch-worker.polls"), ("downloads", "fetch-worker.downloads"))
)
# What every Python of the test runs first. In the process that polls a file's name says what is to go wrong.
TROUBLE = """
import os, sys, threading, time
def wait_for_trouble():
    while not any("worker@" in word for word in getattr(sys, "argv", ())):
        time.sleep(0.1)
    while True:
        time.sleep(0.05)
        if os.path.exists("hold"):
            os.rename("hold", "hold.begun")
            import ctypes
            ctypes.PyDLL(None).sleep(1000)  # C code that keeps the interpreter's lock
        if os.path.exists("deadlock"):
            from worker.process.resources import process_resources
            process_resources().poller._give_back_lost = deadlock
            return
def deadlock():
    try:
        os.rename("deadlock", "deadlock.begun")
    except OSError:
        return
    lock = threading.Lock()
    lock.acquire()
    from worker.process import bootsteps
    exec(compile("lock.acquire()", bootsteps.__file__, "exec"), {"lock": lock})  # as if it stood in our own code
if os.environ.get("STANDSTILL_TEST"):
    threading.Thread(target=wait_for_trouble, daemon=True).start()
"""


class Running:
    """A running `up`, and what it said when, by the monotonic clock."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.said: list[tuple[float, str]] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append((time.monotonic(), line.rstrip()))

    def when(self, words: str, since: float = 0.0, seconds: float = 60.0) -> float:
        """When a line with these words came; it is waited for."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for at, line in list(self.said):
                if words in line and at >= since:
                    return at
            time.sleep(0.05)
        raise AssertionError(f"{words!r} was not said: " + "\n".join(line for _, line in self.said[-40:]))

    def times(self, words: str) -> int:
        """How often it came."""
        return sum(words in line for _, line in self.said)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SandboxOptions(key=KEY, min_seconds=1.0, max_seconds=8.0, size=32)) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """Tables that nothing else uses."""
    if request.param == "postgresql":
        yield request.getfixturevalue("migrated_postgres")
        return
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def up(tables: Engine, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(TROUBLE)
    (tmp_path / "Procfile").write_text(PROCFILE)
    for name, value in {
        "DATABASE_URL": tables.url.render_as_string(hide_password=False),
        "SD_API_URL": sandbox.url,
        "OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8",
        "RECOVERY_SECONDS": str(LEASE),
        "POLL_MIN": "1",
    }.items():
        monkeypatch.setenv(name, value)
    own = {"SD_API_KEY": KEY, "PYTHONPATH": str(site), "STANDSTILL_TEST": "1"}
    environment = dict(os.environ) | own
    with subprocess.Popen(
        UP, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        running = Running(process)
        try:
            running.when("worker@", seconds=90)
            yield running
        finally:
            process.terminate()
            process.wait(60)
            running.reader.join(10)


def _completed(engine: Engine, ids: list[int], up: Running) -> None:
    """Wait until all jobs are completed."""

    def states() -> object:
        with engine.connect() as connection:
            found = connection.execute(select(jobs.c.status, func.count()).group_by(jobs.c.status)).all()
        return [tuple(row) for row in found], [line for _, line in up.said[-60:]]

    final = (jobs.c.status == "completed", jobs.c.id.in_(ids))
    wait_until(lambda: _count(engine, *final) == len(ids), "all are completed", 90, seen=states)


def _count(engine: Engine, *conditions: object) -> int:
    with engine.connect() as connection:
        return int(connection.execute(select(func.count()).select_from(jobs).where(*conditions)).scalar_one())  # type: ignore[arg-type]  # conditions of a query


@pytest.mark.long
@pytest.mark.parametrize(
    ("trouble", "words"),
    [("hold", "worker stood still for"), ("deadlock", "worker says that it stands still")],
    ids=["the interpreter's lock is held", "the poll loop waits for a lock for ever"],
)
def test_given_a_worker_that_stands_still_when_its_lease_is_over_then_it_is_replaced_and_no_job_is_lost(
    trouble: str, words: str, up: Running, tables: Engine, sandbox: Sandbox, tmp_path: Path
) -> None:
    ids = track_many([sandbox.submit(f"picture {number}") for number in range(40)])
    wait_until(lambda: _count(tables, jobs.c.polls > 0, jobs.c.id.in_(ids)) > 10, "some jobs were asked about")
    (tmp_path / trouble).touch()
    wait_until((tmp_path / f"{trouble}.begun").exists, "the trouble began")
    began = time.monotonic()

    ended = up.when(words, since=began) - began
    assert LEASE - 1 <= ended <= LEASE + SOON
    up.when("worker was killed by SIG", since=began)
    up.when("it is started again", since=began)
    assert up.times("downloads was killed") == 0
    _completed(tables, ids, up)
    assert up.times(words) == 1


@pytest.mark.long
def test_given_a_database_that_keeps_a_worker_waiting_for_longer_than_its_lease_then_nobody_is_ended(
    up: Running, tables: Engine, sandbox: Sandbox
) -> None:
    ids = track_many([sandbox.submit(f"picture {number}") for number in range(20)])
    wait_until(lambda: _count(tables, jobs.c.polls > 0, jobs.c.id.in_(ids)), "a job was asked about")
    if tables.dialect.name == "sqlite":
        with closing(sqlite3.connect(str(tables.url.database), isolation_level=None, timeout=30)) as other:
            other.execute("BEGIN EXCLUSIVE")
            time.sleep(3 * LEASE)
            other.execute("ROLLBACK")
    else:
        with tables.begin() as other:
            other.exec_driver_sql("LOCK TABLE fetch_jobs IN ACCESS EXCLUSIVE MODE")
            time.sleep(3 * LEASE)
    _completed(tables, ids, up)
    assert up.times("it is ended") == 0
    assert up.times("is started again") == 0
