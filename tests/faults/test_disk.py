"""No room for the SQLite file: the worker says so, goes on when there is room again, and nothing is lost."""

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

from tests.faults.servers import HurtRedis, all_completed, assert_nothing_lost, children, tail, up, wait_completed
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
    """Another file takes all that is left."""
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
    """No file of the product's may grow beyond what the database has already: for those who are not root."""
    least = min(path.stat().st_size for path in folder.glob("worker.db*") if path.stat().st_size)
    for one in children(pid):
        resource.prlimit(one, resource.RLIMIT_FSIZE, (least, resource.RLIM_INFINITY))
    yield
    for one in children(pid):
        resource.prlimit(one, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own, of a few megabytes where we may mount one."""
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
    """A file on it, which DATABASE_URL names."""
    url = f"sqlite:///{small}/worker.db"
    monkeypatch.setenv("DATABASE_URL", url)
    engine = make_engine(make_url(url))
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.mark.long
@pytest.mark.parametrize("full", [_full_disk, _limited], ids=["full_disk", "limited"])
def test_given_jobs_under_way_when_there_is_no_room_for_sqlite_then_it_says_so_and_goes_on_afterwards(
    full: Callable[[Path, int], AbstractContextManager[None]],
    tmp_path: Path,
    small: Path,
    database: Engine,
    sandbox: Sandbox,
    broker: HurtRedis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file is readable all the while, and no process ends for it."""
    monkeypatch.setenv("RECOVERY_SECONDS", "20")  # leases outlast it: nothing may be asked twice
    if full is _full_disk and not small.is_mount():
        missing("the right to mount a small disk, which root has,")
    log = tmp_path / "up.log"
    with up(tmp_path) as process:
        track_many([sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS)])
        time.sleep(1)
        with full(small, process.pid):
            wait_until(
                lambda: any(words in log.read_text() for words in NO_ROOM), "the log says so", seen=lambda: tail(log)
            )
            time.sleep(FULL_SECONDS)
            assert not all_completed(database, JOBS), "there was room all the while"
        wait_completed(database, JOBS, tmp_path)
    assert_nothing_lost(database, sandbox, tmp_path, JOBS)
    assert "it is started again" not in log.read_text(), "a process ended for it"
    with sqlite3.connect(small / "worker.db") as plain:
        assert plain.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    plain.close()
