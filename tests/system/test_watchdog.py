"""The watchdog: a stalled process is detected. A process that waits for a server is left alone."""

import os
import queue
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from tests.waiting import wait_until
from worker.system.watchdog import IO_PLACES, IO_WAITS, OWN_CODE, Loop, Watchdog, notify, watched_seconds

HERE = Path(__file__).parent
LIMIT = 6.0


class Clock:
    """The watchdog's clock, moved by the test."""

    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.offset


@contextmanager
def thread(work: Callable[[Loop], object], name: str = "loop") -> Iterator[Loop]:
    """Start a thread that beats once for its loop and then runs `work`."""
    loop, started = Loop(), threading.Event()

    def run() -> None:
        loop.beat()
        started.set()
        work(loop)

    threading.Thread(target=run, name=name, daemon=True).start()
    started.wait(10)
    time.sleep(0.05)  # let it reach the place where it stays
    yield loop


def stalls_in(watchdog: Watchdog, clock: Clock, seconds: float) -> list[str]:
    """Return the stalls that the watchdog finds in this many seconds."""
    stalls = []
    for _ in range(round(seconds / watchdog.interval)):
        clock.offset += watchdog.interval
        stall = watchdog.find_stall()
        if stall is not None:
            stalls.append(stall)
    return stalls


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watchdog(clock: Clock) -> Watchdog:
    """A watchdog that treats this file as its own code."""
    return Watchdog(LIMIT, own_code=HERE, clock=clock)


def test_a_loop_that_waits_for_a_lock_forever_is_found_after_the_limit(watchdog: Watchdog, clock: Clock) -> None:
    lock = threading.Lock()
    with lock, thread(lambda _: lock.acquire()) as loop:
        watchdog.watch("the loop", loop)
        assert stalls_in(watchdog, clock, LIMIT - 1) == []
        assert stalls_in(watchdog, clock, 4)[0].startswith("the loop for ")


def test_a_loop_that_computes_forever_is_found(watchdog: Watchdog, clock: Clock) -> None:
    stop = threading.Event()

    def spin(_: Loop) -> None:
        while not stop.is_set():
            sum(range(100))

    with thread(spin) as loop:
        watchdog.watch("the loop", loop)
        # A thread of an earlier test may be inside a database library at any check. This hides the stall once.
        wait_until(lambda: stalls_in(watchdog, clock, 2 * LIMIT), "it is found")
        stop.set()


def test_a_loop_that_makes_progress_is_alive_however_long_it_runs(watchdog: Watchdog, clock: Clock) -> None:
    stop = threading.Event()

    def keep_beating(loop: Loop) -> None:
        while not stop.wait(0.01):
            loop._last_beat = (clock(), threading.get_ident())

    with thread(keep_beating) as loop:
        watchdog.watch("the loop", loop)
        for _ in range(20):
            clock.offset += watchdog.interval
            time.sleep(0.03)
            assert watchdog.find_stall() is None
        stop.set()


def test_an_idle_loop_is_alive_and_its_limit_starts_when_it_is_active_again(watchdog: Watchdog, clock: Clock) -> None:
    lock = threading.Lock()
    with lock, thread(lambda _: lock.acquire()) as loop:
        idle = [True]
        watchdog.watch("the loop", lambda: None if idle[0] else loop())
        assert stalls_in(watchdog, clock, 10 * LIMIT) == []
        idle[0] = False
        assert stalls_in(watchdog, clock, LIMIT - 1) == []


def test_a_loop_that_waits_for_a_server_is_left_alone(watchdog: Watchdog, clock: Clock) -> None:
    """It is inside a library. A plain `recv` of our own code is in one of our network modules."""
    client, server = socket.socketpair()
    with client, server, thread(lambda _: client.makefile("rb").read(1)) as loop:
        watchdog.watch("the loop", loop)
        assert stalls_in(watchdog, clock, 10 * LIMIT) == []
        server.close()


def test_all_threads_are_left_alone_while_one_waits_for_the_database(
    watchdog: Watchdog, clock: Clock, tmp_path: Path
) -> None:
    """They may wait for a lock that this thread holds."""
    engine = create_engine(f"sqlite:///{tmp_path}/locked.db", connect_args={"timeout": 60})
    lock, waiting, written = threading.Lock(), threading.Event(), threading.Event()

    def write(_: Loop) -> None:
        with engine.connect() as connection:
            waiting.set()
            connection.execute(text("CREATE TABLE t (x)"))
        written.set()

    with closing(sqlite3.connect(tmp_path / "locked.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with lock, thread(write, "ThreadPoolExecutor-1_0"), thread(lambda _: lock.acquire()) as loop:
            waiting.wait(10)
            time.sleep(0.1)
            watchdog.watch("the loop", loop)
            assert stalls_in(watchdog, clock, 10 * LIMIT) == []
        holder.execute("ROLLBACK")
    assert written.wait(30)
    engine.dispose()


def test_two_pool_threads_in_a_deadlock_are_found(watchdog: Watchdog, clock: Clock) -> None:
    first, second, barrier = threading.Lock(), threading.Lock(), threading.Barrier(2)

    def acquire_both(own: threading.Lock, next_lock: threading.Lock) -> None:
        own.acquire()
        barrier.wait()
        next_lock.acquire()

    with (
        thread(lambda _: acquire_both(first, second), "ThreadPoolExecutor-2_0"),
        thread(lambda _: acquire_both(second, first), "ThreadPoolExecutor-2_1"),
    ):
        time.sleep(0.1)
        assert stalls_in(watchdog, clock, LIMIT - 1) == []
        assert stalls_in(watchdog, clock, 4)[0].startswith("ThreadPoolExecutor-2_")
        first.release()
        second.release()


@pytest.mark.parametrize(
    ("path", "is_found"),
    [
        ("net/pooled_adapter.py", False),
        ("net/deadlines.py", False),
        ("storage/partial_files.py", False),
        ("storage/s3.py", False),
        ("coordination/sent_requests.py", False),
        ("coordination/leases.py", True),
        ("polling/poller.py", True),
        ("process/redelivery.py", True),
    ],
)
def test_a_pool_thread_may_wait_in_modules_that_talk_to_a_network_or_a_disk_and_nowhere_else(
    path: str, is_found: bool, clock: Clock
) -> None:
    watchdog, lock = Watchdog(LIMIT, clock=clock), threading.Lock()
    assert (OWN_CODE / path).is_file()
    wait = compile("lock.acquire()", str(OWN_CODE / path), "exec")
    with lock, thread(lambda _: exec(wait, {"lock": lock}), "ThreadPoolExecutor-3_0"):  # noqa: S102  # our own code
        assert bool(stalls_in(watchdog, clock, 2 * LIMIT)) is is_found


def test_every_place_where_threads_may_wait_exists() -> None:
    """A renamed module or function would be watched without anybody noticing."""
    for place in IO_PLACES:
        assert (OWN_CODE / place).exists(), place
    for path, function in IO_WAITS:
        assert f"def {function}(" in (OWN_CODE / path).read_text(), (path, function)


def test_a_pool_thread_that_repeats_the_same_call_is_alive(watchdog: Watchdog, clock: Clock) -> None:
    """Each check finds it at the same place, but in another call."""
    stop = threading.Event()

    def wait_shortly() -> None:
        stop.wait(0.005)

    def work(_: Loop) -> None:
        while not stop.is_set():
            wait_shortly()

    with thread(work, "ThreadPoolExecutor-3_0"):
        for _ in range(30):
            clock.offset += watchdog.interval
            time.sleep(0.02)
            assert watchdog.find_stall() is None
        stop.set()


def test_a_thread_that_does_not_belong_to_a_pool_may_wait_forever(watchdog: Watchdog, clock: Clock) -> None:
    """A publisher waits for messages."""
    messages: queue.Queue[int] = queue.Queue()
    with thread(lambda _: messages.get(), "publisher"):
        assert stalls_in(watchdog, clock, 10 * LIMIT) == []
        messages.put(1)


def test_a_process_that_is_about_to_end_is_not_checked(watchdog: Watchdog, clock: Clock) -> None:
    lock = threading.Lock()
    with lock, thread(lambda _: lock.acquire()) as loop:
        watchdog.watch("the loop", loop)
        watchdog.ignore_all()
        assert stalls_in(watchdog, clock, 10 * LIMIT) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000"}, 3.0),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"NOTIFY_SOCKET": "/x"}, None),
        ({"WATCHDOG_USEC": "3000000"}, None),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_a_process_knows_whether_it_is_watched(
    values: dict[str, str], expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert watched_seconds() == expected


def test_messages_reach_a_path_socket_and_an_abstract_socket_without_blocking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tempfile.mkdtemp(prefix="fw-")  # short, because the path of a socket has at most 107 bytes
    names = [f"{folder}/socket"] + ([f"@fetch-worker-test-{os.getpid()}"] if sys.platform == "linux" else [])
    for name in names:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(name.replace("@", "\0", 1))
            monkeypatch.setenv("NOTIFY_SOCKET", name)
            assert notify("WATCHDOG=1", "STATUS=x")
            assert receiver.recv(100) == b"WATCHDOG=1\nSTATUS=x"
            started_at = time.monotonic()
            while notify("WATCHDOG=1"):  # until its queue is full
                assert time.monotonic() - started_at < 10
    monkeypatch.setenv("NOTIFY_SOCKET", f"{folder}/no-socket")
    assert not notify("WATCHDOG=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not notify("WATCHDOG=1")
    shutil.rmtree(folder)


UNWATCHED = """
import ctypes, sys, threading, time
from pathlib import Path
from worker.system.watchdog import Loop, Watchdog

watchdog, loop, lock = Watchdog(1.0, own_code=Path.cwd()), Loop(), threading.Lock()
watchdog.watch("the loop", loop)
watchdog.start(ends_process=True)
for _ in range(20):
    time.sleep(0.1)
    loop.beat()
print("works", flush=True)
{trouble}
print("survived", flush=True)
"""


@pytest.mark.every_python
@pytest.mark.parametrize(
    ("trouble", "output"),
    [
        ("ctypes.PyDLL(None).sleep(60)", "Timeout (0:00:01"),  # C code that does not release the GIL
        ("lock.acquire(); lock.acquire()", "the loop for 1 s"),
    ],
    ids=["the GIL is held", "a loop waits for a lock forever"],
)
def test_given_a_process_that_nobody_watches_when_it_stalls_then_it_ends_itself_with_its_stack_traces(
    trouble: str, output: str, tmp_path: Path
) -> None:
    script = tmp_path / "stalls.py"
    script.write_text(UNWATCHED.format(trouble=trouble))
    process = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (process.returncode, process.stdout) == (1, "works\n")
    assert output in process.stderr
    assert f'File "{script}", line 13 in <module>' in process.stderr
