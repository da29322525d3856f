"""The watchdog: a process that stands still is ended and started again, one that waits for a server is left alone."""

import os
import queue
import shutil
import signal
import socket
import sqlite3
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
from worker.launch.supervisor import OWN_NAME, Program, Supervisor, Timing, merged_environment
from worker.system.watchdog import Loop, Watchdog, notify, watched_seconds

HERE = Path(__file__).parent
LIMIT = 6.0
QUICK = Timing(first_restart=0.02, longest_restart=0.05, stop_seconds=5.0)


class Clock:
    """The watchdog's, which a test moves."""

    def __init__(self) -> None:
        self.moved = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.moved


@contextmanager
def thread(work: Callable[[Loop], object], name: str = "loop") -> Iterator[Loop]:
    """A thread that turns its loop once, and then works."""
    loop, turned = Loop(), threading.Event()

    def run() -> None:
        loop.beat()
        turned.set()
        work(loop)

    threading.Thread(target=run, name=name, daemon=True).start()
    turned.wait(10)
    time.sleep(0.05)  # until it is where it will stay
    yield loop


def looks(watchdog: Watchdog, clock: Clock, seconds: float) -> list[str]:
    """What stood still in any of the looks of so many seconds."""
    found = []
    for _ in range(round(seconds / watchdog.interval)):
        clock.moved += watchdog.interval
        standing = watchdog.find_stall()
        if standing is not None:
            found.append(standing)
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watchdog(clock: Clock) -> Watchdog:
    """One to which the code of this file is its own."""
    return Watchdog(LIMIT, own_code=HERE, clock=clock)


def test_a_loop_that_waits_for_a_lock_for_ever_is_found_after_the_limit(watchdog: Watchdog, clock: Clock) -> None:
    lock = threading.Lock()
    with lock, thread(lambda _: lock.acquire()) as loop:
        watchdog.watch("the loop", loop)
        assert looks(watchdog, clock, LIMIT - 1) == []
        assert looks(watchdog, clock, 4)[0].startswith("the loop for ")


def test_a_loop_that_computes_for_ever_is_found(watchdog: Watchdog, clock: Clock) -> None:
    done = threading.Event()

    def spin(_: Loop) -> None:
        while not done.is_set():
            sum(range(100))

    with thread(spin) as loop:
        watchdog.watch("the loop", loop)
        # A thread that an earlier test left behind may be in a database's library at any look, which is no standstill.
        wait_until(lambda: looks(watchdog, clock, 2 * LIMIT), "it is found")
        done.set()


def test_a_loop_that_goes_round_is_alive_however_long(watchdog: Watchdog, clock: Clock) -> None:
    done = threading.Event()

    def go_round(loop: Loop) -> None:
        while not done.wait(0.01):
            loop._last_beat = (clock(), threading.get_ident())

    with thread(go_round) as loop:
        watchdog.watch("the loop", loop)
        for _ in range(20):
            clock.moved += watchdog.interval
            time.sleep(0.03)
            assert watchdog.find_stall() is None
        done.set()


def test_a_loop_that_rests_is_alive_and_its_time_begins_anew(watchdog: Watchdog, clock: Clock) -> None:
    lock = threading.Lock()
    with lock, thread(lambda _: lock.acquire()) as loop:
        resting = [True]
        watchdog.watch("the loop", lambda: None if resting[0] else loop())
        assert looks(watchdog, clock, 10 * LIMIT) == []
        resting[0] = False
        assert looks(watchdog, clock, LIMIT - 1) == []


def test_a_loop_that_waits_for_a_server_is_left_alone(watchdog: Watchdog, clock: Clock) -> None:
    """Its frames are those of a library; a plain `recv` of our own code is in one of our network modules."""
    near, far = socket.socketpair()
    with near, far, thread(lambda _: near.makefile("rb").read(1)) as loop:
        watchdog.watch("the loop", loop)
        assert looks(watchdog, clock, 10 * LIMIT) == []
        far.close()


def test_all_are_left_alone_while_a_thread_waits_for_the_database(
    watchdog: Watchdog, clock: Clock, tmp_path: Path
) -> None:
    """They may wait for a lock of ours that this thread holds."""
    engine = create_engine(f"sqlite:///{tmp_path}/locked.db", connect_args={"timeout": 60})
    lock, waits, written = threading.Lock(), threading.Event(), threading.Event()

    def write(_: Loop) -> None:
        with engine.connect() as connection:
            waits.set()
            connection.execute(text("CREATE TABLE t (x)"))
        written.set()

    with closing(sqlite3.connect(tmp_path / "locked.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with lock, thread(write, "ThreadPoolExecutor-1_0"), thread(lambda _: lock.acquire()) as loop:
            waits.wait(10)
            time.sleep(0.1)
            watchdog.watch("the loop", loop)
            assert looks(watchdog, clock, 10 * LIMIT) == []
        holder.execute("ROLLBACK")
    assert written.wait(30)
    engine.dispose()


def test_two_threads_of_a_pool_that_wait_for_each_other_are_found(watchdog: Watchdog, clock: Clock) -> None:
    first, second, met = threading.Lock(), threading.Lock(), threading.Barrier(2)

    def cross(mine: threading.Lock, other: threading.Lock) -> None:
        mine.acquire()
        met.wait()
        other.acquire()

    with (
        thread(lambda _: cross(first, second), "ThreadPoolExecutor-2_0"),
        thread(lambda _: cross(second, first), "ThreadPoolExecutor-2_1"),
    ):
        time.sleep(0.1)
        assert looks(watchdog, clock, LIMIT - 1) == []
        assert looks(watchdog, clock, 4)[0].startswith("ThreadPoolExecutor-2_")
        first.release()
        second.release()


def test_a_pool_thread_that_does_the_same_thing_again_and_again_is_alive(watchdog: Watchdog, clock: Clock) -> None:
    """It is at the same place at every look, but in another call."""
    done = threading.Event()

    def wait_shortly() -> None:
        done.wait(0.005)

    def work(_: Loop) -> None:
        while not done.is_set():
            wait_shortly()

    with thread(work, "ThreadPoolExecutor-3_0"):
        for _ in range(30):
            clock.moved += watchdog.interval
            time.sleep(0.02)
            assert watchdog.find_stall() is None
        done.set()


def test_a_thread_that_is_no_pools_may_wait_for_ever(watchdog: Watchdog, clock: Clock) -> None:
    """A courier waits for messages."""
    messages: queue.Queue[int] = queue.Queue()
    with thread(lambda _: messages.get(), "courier"):
        assert looks(watchdog, clock, 10 * LIMIT) == []
        messages.put(1)


def test_a_process_that_is_about_to_end_is_not_looked_into(watchdog: Watchdog, clock: Clock) -> None:
    lock = threading.Lock()
    with lock, thread(lambda _: lock.acquire()) as loop:
        watchdog.watch("the loop", loop)
        watchdog.ignore_all()
        assert looks(watchdog, clock, 10 * LIMIT) == []


@pytest.mark.parametrize(
    ("values", "watched"),
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
def test_a_process_knows_whether_anybody_watches_it(
    values: dict[str, str], watched: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert watched_seconds() == watched


def test_messages_reach_a_socket_by_path_and_an_abstract_one_and_nobody_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tempfile.mkdtemp(prefix="fw-")  # a socket's path has at most 107 bytes
    names = [f"{folder}/socket"] + ([f"@fetch-worker-test-{os.getpid()}"] if sys.platform == "linux" else [])
    for name in names:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(name.replace("@", "\0", 1))
            monkeypatch.setenv("NOTIFY_SOCKET", name)
            assert notify("WATCHDOG=1", "STATUS=x")
            assert receiver.recv(100) == b"WATCHDOG=1\nSTATUS=x"
            began = time.monotonic()
            while notify("WATCHDOG=1"):  # until its queue is full
                assert time.monotonic() - began < 10
    monkeypatch.setenv("NOTIFY_SOCKET", f"{folder}/nobody")
    assert not notify("WATCHDOG=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not notify("WATCHDOG=1")
    shutil.rmtree(folder)


# ── the supervisor, with small processes ──────────────────────────────────────────────────────────────────────────────

SAYS = "import ctypes, os, signal, socket, sys, time\nfrom worker.system.watchdog import notify\n"


class Run:
    """A supervisor with one program, and what it said."""

    def __init__(self, folder: Path, code: str, *, watched: bool = True) -> None:
        self.said: list[str] = []
        self.supervisor = Supervisor(folder, lambda name, line: self.said.append(f"{name}: {line}"), timing=QUICK)
        words = (sys.executable, "-c", SAYS + code)
        self.program = Program("worker", words, merged_environment(None), watched=watched)

    def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> bool:
        """Runs until something holds; whether it did."""
        return self.supervisor.wait_until(condition, seconds, 0.1)

    def has_said(self, words: str, times: int = 1) -> bool:
        """Whether a line with these words came so many times."""
        return sum(words in line for line in self.said) >= times

    @property
    def pid(self) -> int:
        """The process that runs now."""
        process = self.supervisor._children[0].process
        return 0 if process is None else process.pid


@contextmanager
def running(folder: Path, code: str, *, watched: bool = True) -> Iterator[Run]:
    run = Run(folder, code, watched=watched)
    with run.supervisor:
        run.supervisor.start(run.program)
        yield run


BEATS = "notify('WATCHDOG_USEC=1000000', 'WATCHDOG=1'); print('started', flush=True)\n"
BEATS_ON = BEATS + "while True: time.sleep(0.2); notify('WATCHDOG=1')\n"
HOLDS = "ctypes.PyDLL(None).sleep(1000)\n"  # C code that keeps the interpreter's lock


def test_a_process_that_holds_the_interpreters_lock_is_ended_and_started_again_with_a_trace(tmp_path: Path) -> None:
    code = "import faulthandler; faulthandler.enable()\n" + BEATS + HOLDS
    with running(tmp_path, code) as run:
        assert run.until(lambda: run.has_said("started", 2))
    assert run.has_said("worker was stalled for 1 s: ending it")
    assert run.has_said("was killed by SIGABRT; restart")
    assert run.has_said('File "<string>", line'), "where its threads were is in the log"


def test_a_catastrophic_regular_expression_is_ended_too(tmp_path: Path) -> None:
    with running(tmp_path, BEATS + "import re; re.match('(a|a)*b', 'a' * 64)\n") as run:
        assert run.until(lambda: run.has_said("started", 2))


def test_a_process_that_does_not_end_by_sigabrt_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, "signal.signal(signal.SIGABRT, signal.SIG_IGN)\n" + BEATS + HOLDS) as run:
        assert run.until(lambda: run.has_said("started", 2))
    assert run.has_said("was killed by SIGKILL")


def test_a_process_that_says_that_it_stands_still_is_ended_at_once(tmp_path: Path) -> None:
    code = "notify('WATCHDOG_USEC=900000000', 'WATCHDOG=1'); print('started', flush=True); notify('WATCHDOG=trigger')\n"
    with running(tmp_path, code + "time.sleep(1000)\n") as run:
        assert run.until(lambda: run.has_said("started", 2), 15)
    assert run.has_said("worker reports that it is stalled: ending it")


def test_a_process_that_goes_on_saying_that_it_is_alive_is_left_alone(tmp_path: Path) -> None:
    with running(tmp_path, BEATS_ON) as run:
        assert run.until(lambda: run.has_said("started"))
        assert not run.until(lambda: bool(run.supervisor.exits), 3.0)


def test_a_process_that_never_said_so_is_not_watched(tmp_path: Path) -> None:
    """Beat, Flower, and whatever an operator's Procfile runs."""
    with running(tmp_path, "print('started', flush=True); time.sleep(1000)\n") as run:
        assert run.until(lambda: run.has_said("started"))
        assert not run.until(lambda: bool(run.supervisor.exits), 2.5)


def test_a_program_that_is_not_watched_is_told_of_no_socket_not_even_of_systemds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    show = "print([os.environ.get(name) for name in ('NOTIFY_SOCKET', 'WATCHDOG_USEC')], flush=True); time.sleep(60)\n"
    with running(tmp_path, show, watched=False) as run:
        assert run.until(lambda: run.has_said("worker: [None, None]"))
    with running(tmp_path, show) as run:
        assert run.until(lambda: run.has_said("worker: ["))
    assert not run.has_said("/run/systemd/notify")


@pytest.mark.skipif(sys.platform != "linux", reason="what an operator stopped is known on Linux alone")
def test_a_process_that_an_operator_stopped_is_left_alone_and_watched_again_when_it_goes_on(tmp_path: Path) -> None:
    with running(tmp_path, BEATS_ON) as run:
        assert run.until(lambda: run.has_said("started"))
        os.kill(run.pid, signal.SIGSTOP)
        assert run.until(lambda: run.has_said("was stopped by a signal"))
        assert not run.until(lambda: bool(run.supervisor.exits), 2.5)
        os.kill(run.pid, signal.SIGCONT)
        assert not run.until(lambda: bool(run.supervisor.exits), 1.5)


def test_a_supervisor_that_stood_still_itself_ends_nobody(tmp_path: Path) -> None:
    """A terminal that was paused, or a host that was suspended."""
    now = [0.0]
    run = Run(tmp_path, BEATS_ON)
    run.supervisor._clock = lambda: time.monotonic() + now[0]
    with run.supervisor:
        run.supervisor.start(run.program)
        assert run.until(lambda: run.has_said("started"))
        now[0] += 3_600
        assert not run.until(lambda: bool(run.supervisor.exits), 2.0)


def test_where_no_socket_can_be_made_processes_run_unwatched_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with running(tmp_path, "print('started', os.environ.get('NOTIFY_SOCKET'), flush=True); time.sleep(60)\n") as run:
        assert run.until(lambda: run.has_said("started None"))
    assert run.has_said(f"{OWN_NAME}: no watchdog: cannot make its socket")


def test_a_supervisor_that_systemd_watches_says_that_it_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tempfile.mkdtemp(prefix="fw-")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"{folder}/notify")
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", f"{folder}/notify")
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        with running(tmp_path, "time.sleep(60)\n") as run:
            run.until(lambda: False, 1.0)
        assert systemd.recv(100) == b"WATCHDOG=1"
        assert systemd.recv(100) == b"WATCHDOG=1"
    shutil.rmtree(folder)
