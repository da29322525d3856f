"""The disk of the SQLite file is full: the worker logs it, continues when there is room again, and nothing is lost."""

import os
import resource
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests.faults.servers import RedisServer, all_completed, assert_nothing_lost, children, tail, up, wait_completed
from tests.servers import missing
from tests.waiting import wait_until
from worker import track_many
from worker.sandbox import Sandbox
from worker.store.engine import make_engine
from worker.store.migrate import migrate

JOBS = 60
FULL_SECONDS = 6.0
NO_ROOM = ("SQLITE_FULL", "SQLITE_IOERR")


@contextmanager
def _full_disk(folder: Path, pid: int) -> Iterator[None]:
    """Fill the disk with another file."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as out:
        while True:
            try:
                out.write(bytes(4_096))
            except OSError:
                break
    yield
    filler.unlink()


@contextmanager
def _limited(folder: Path, pid: int) -> Iterator[None]:
    """Limit the file size of the worker's processes to that of the database. This works without root."""
    smallest = min(path.stat().st_size for path in folder.glob("worker.db*") if path.stat().st_size)
    for child in children(pid):
        resource.prlimit(child, resource.RLIMIT_FSIZE, (smallest, resource.RLIM_INFINITY))
    yield
    for child in children(pid):
        resource.prlimit(child, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk of 16 MB, or on the normal disk if the test may not mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=False, stderr=subprocess.DEVNULL
        ).returncode
    )
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def database(small: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Create a migrated SQLite file on that disk. DATABASE_URL names it."""
    url = f"sqlite:///{small}/worker.db"
    monkeypatch.setenv("DATABASE_URL", url)
    engine = make_engine(make_url(url))
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.mark.long
@pytest.mark.parametrize("full", [_full_disk, _limited], ids=["full_disk", "limited"])
def test_given_waiting_jobs_when_the_disk_of_sqlite_is_full_then_the_worker_logs_it_and_continues_afterwards(
    full: Callable[[Path, int], AbstractContextManager[None]],
    tmp_path: Path,
    small: Path,
    database: Engine,
    sandbox: Sandbox,
    broker: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file stays readable, and no process exits."""
    monkeypatch.setenv("RECOVERY_SECONDS", "20")  # leases outlast the fault, so that no job is polled twice
    if full is _full_disk and not small.is_mount():
        missing("the right to mount a small disk, which root has,")
    log = tmp_path / "up.log"
    with up(tmp_path) as process:
        track_many([sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS)])
        time.sleep(1)
        with full(small, process.pid):
            wait_until(
                lambda: any(code in log.read_text() for code in NO_ROOM),
                "it is logged",
                seen=lambda: tail(log),
            )
            time.sleep(FULL_SECONDS)
            assert not all_completed(database, JOBS), "the disk was never full"
        wait_completed(database, JOBS, tmp_path)
    assert_nothing_lost(database, sandbox, tmp_path, JOBS)
    assert "restart in" not in log.read_text(), "a process exited because of the fault"
    with sqlite3.connect(small / "worker.db") as plain:
        assert plain.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    plain.close()
