"""A worker under a real `up` hangs: it is killed and restarted, and the jobs that it had claimed continue."""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.engine import make_url

from tests.servers import celery_worker
from tests.waiting import wait_until
from worker import track_many
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs

UP = (sys.executable, "-c", "from worker.cli import main; main()", "up")
KEY = "a-key-of-the-sandbox"
LEASE = 5
GRACE = 8.0  # seconds beyond the lease: two checks, the stack trace, and other load on the machine
PROCFILE = "".join(
    f"{name}: celery -A worker.app worker --queues {queues} --pool threads --concurrency 4 --hostname {name}@%h"
    " --loglevel INFO --without-mingle --without-gossip\n"
    for name, queues in (("worker", "fetch-worker,fetch-worker.polls"), ("downloads", "fetch-worker.downloads"))
)
# Runs at the start of every Python process of the test. In the polling worker, a file named "hold" or "deadlock" causes
# that fault.
TROUBLE = """
import os, sys, threading, time
def wait_for_trouble():
    while not any("worker@" in argument for argument in getattr(sys, "argv", ())):
        time.sleep(0.1)
    while True:
        time.sleep(0.05)
        if os.path.exists("hold"):
            os.rename("hold", "hold.begun")
            import ctypes
            ctypes.PyDLL(None).sleep(1000)  # C code that does not release the GIL
        if os.path.exists("deadlock"):
            from worker.process.resources import process_resources
            process_resources().poller._release_lost_claims = deadlock
            return
def deadlock():
    try:
        os.rename("deadlock", "deadlock.begun")
    except OSError:
        return
    lock = threading.Lock()
    lock.acquire()
    from worker.process import bootsteps
    exec(compile("lock.acquire()", bootsteps.__file__, "exec"), {"lock": lock})  # for its name in the stack trace
if os.environ.get("STANDSTILL_TEST"):
    threading.Thread(target=wait_for_trouble, daemon=True).start()
"""


class RunningUp:
    """A running `fetch-worker up`, and its output lines with the monotonic time of each."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[tuple[float, str]] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))

    def wait_for(self, text: str, since: float = 0.0, seconds: float = 60.0) -> float:
        """Wait for an output line with this text that came after `since`. Return the time of the line."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for at, line in list(self.lines):
                if text in line and at >= since:
                    return at
            time.sleep(0.05)
        raise AssertionError(f"no output line with {text!r}: " + "\n".join(line for _, line in self.lines[-40:]))

    def count(self, text: str) -> int:
        """Return the number of output lines with this text."""
        return sum(text in line for _, line in self.lines)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SandboxOptions(key=KEY, min_seconds=1.0, max_seconds=8.0, size=32)) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """Create a migrated database that no other test uses."""
    if request.param == "postgresql":
        yield request.getfixturevalue("migrated_postgres")
        return
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def up(tables: Engine, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningUp]:
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
        running = RunningUp(process)
        try:
            running.wait_for("worker@", seconds=90)
            yield running
        finally:
            process.terminate()
            process.wait(60)
            running.reader.join(10)


def _wait_completed(engine: Engine, ids: Sequence[int], up: RunningUp) -> None:
    """Wait until all jobs are completed."""

    def states() -> object:
        with engine.connect() as connection:
            rows = connection.execute(select(jobs.c.status, func.count()).group_by(jobs.c.status)).all()
        return [tuple(row) for row in rows], [line for _, line in up.lines[-60:]]

    final = (jobs.c.status == "completed", jobs.c.id.in_(ids))
    wait_until(lambda: _count(engine, *final) == len(ids), "all are completed", 90, seen=states)


def _count(engine: Engine, *conditions: object) -> int:
    with engine.connect() as connection:
        return int(connection.execute(select(func.count()).select_from(jobs).where(*conditions)).scalar_one())  # type: ignore[arg-type]  # conditions of a query


@pytest.mark.long
@pytest.mark.parametrize(
    ("trouble", "message"),
    [("hold", "worker was stalled for"), ("deadlock", "worker reports that it is stalled")],
    ids=["the GIL is held", "the poll loop is deadlocked"],
)
def test_given_a_worker_that_hangs_when_its_lease_expires_then_it_is_replaced_and_no_job_is_lost(
    trouble: str, message: str, up: RunningUp, tables: Engine, sandbox: Sandbox, tmp_path: Path
) -> None:
    ids = track_many([sandbox.submit(f"picture {number}") for number in range(40)])
    wait_until(lambda: _count(tables, jobs.c.polls > 0, jobs.c.id.in_(ids)) > 10, "some jobs were polled")
    (tmp_path / trouble).touch()
    wait_until((tmp_path / f"{trouble}.begun").exists, "the trouble began")
    began = time.monotonic()

    detected = up.wait_for(message, since=began) - began
    assert LEASE - 1 <= detected <= LEASE + GRACE
    up.wait_for("worker was killed by SIG", since=began)
    up.wait_for("restart in", since=began)
    assert up.count("downloads was killed") == 0
    _wait_completed(tables, ids, up)
    assert up.count(message) == 1


@pytest.mark.long
def test_given_a_database_that_blocks_a_worker_for_longer_than_its_lease_then_no_worker_is_killed(
    up: RunningUp, tables: Engine, sandbox: Sandbox
) -> None:
    ids = track_many([sandbox.submit(f"picture {number}") for number in range(20)])
    wait_until(lambda: _count(tables, jobs.c.polls > 0, jobs.c.id.in_(ids)), "a job was polled")
    if tables.dialect.name == "sqlite":
        with closing(sqlite3.connect(str(tables.url.database), isolation_level=None, timeout=30)) as locker:
            locker.execute("BEGIN EXCLUSIVE")
            time.sleep(3 * LEASE)
            locker.execute("ROLLBACK")
    else:
        with tables.begin() as locker:
            locker.exec_driver_sql("LOCK TABLE fetch_jobs IN ACCESS EXCLUSIVE MODE")
            time.sleep(3 * LEASE)
    _wait_completed(tables, ids, up)
    assert up.count("it is ended") == 0
    assert up.count("restart in") == 0


@pytest.mark.long
def test_given_a_worker_that_nobody_watches_when_it_hangs_then_it_ends_itself(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs one process: the container's runtime starts it again."""
    (tmp_path / "sitecustomize.py").write_text(TROUBLE)
    for name, value in {
        "DATABASE_URL": f"sqlite:///{tmp_path}/worker.db", "REDIS_URL": redis_url, "RECOVERY_SECONDS": str(LEASE),
        "END_WHEN_STALLED": "on", "PYTHONPATH": str(tmp_path), "STANDSTILL_TEST": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    engine.dispose()
    with celery_worker(tmp_path, "--queues", "fetch-worker.polls", "--hostname", "worker@test") as process:
        time.sleep(2 * LEASE)
        assert process.poll() is None, "it lives while it works"
        (tmp_path / "hold").touch()

        assert process.wait(LEASE + 30) == 1

    log = (tmp_path / "worker.log").read_text()
    assert "Timeout (0:00:0" in log
    assert "wait_for_trouble" in log
