"""Watchdog of the worker process: sends heartbeats to systemd or `up` while the process's loops make progress.

It uses systemd's protocol (`sd_notify`): datagrams to the socket named by NOTIFY_SOCKET. `up` implements it too. A
process that sends no heartbeat within its limit is ended from outside and restarted. A process that nobody watches, as
in a container of its own, can end itself instead (END_WHEN_STALLED).

The heartbeat thread needs the GIL. While C code holds the GIL, as a catastrophic regular expression does, no heartbeat
is sent. If one of the process's loops, or a thread of its pool, waits in our own code for too long, the process reports
the stall and asks to be ended.

Waiting for a server never counts as a stall. A thread inside a library, or in our network and file modules, is ignored.
While any thread is inside the database driver all threads are ignored, because they may wait for a lock that it holds.
The children of a prefork pool are not checked.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

log = logging.getLogger(__name__)

SOCKET, MICROSECONDS, PROCESS = NAMES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")  # environment variables
CHECKS = 6  # per limit
MAX_INTERVAL_SECONDS = 2.0  # between two checks
STALLED = 1  # exit code of a process that ends itself; faulthandler's is the same

OWN_CODE = Path(__file__).parents[1]
# Code that waits for a network or a disk, as paths below the package: packages, and one module.
IO_PLACES = ("net/", "storage/", "coordination/sent_requests.py")
# Functions that wait for a thread that talks to a server.
IO_WAITS = frozenset({("downloads/downloader.py", "_prepare_storage"), ("process/redelivery.py", "counted")})
POOL_THREAD_NAMES = ("ThreadPoolExecutor", "webhook")  # name prefixes of the threads that run tasks and send webhooks
STDLIB_WAITS = ("threading.py", "queue.py")  # waits of the standard library: their caller counts
DATABASE_DRIVERS = ("sqlalchemy", "psycopg", "pymysql")

Progress = Callable[[], tuple[float, int] | None]


def notify(*lines: str) -> bool:
    """Send lines to the service manager. Return whether it could be reached."""
    address = os.environ.get(SOCKET, "")
    if not address:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)  # if the queue is full, drop the message
            sender.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            sender.send("\n".join(lines).encode())
    except OSError:
        return False
    return True


def watched_seconds() -> float | None:
    """Return the time limit for heartbeats in seconds, or None if this process is not watched."""
    try:
        seconds = int(os.environ[MICROSECONDS]) / 1e6
        for_this_process = int(os.environ.get(PROCESS) or os.getpid()) == os.getpid()
    except (KeyError, ValueError):
        return None
    return seconds if for_this_process and seconds > 0 and os.environ.get(SOCKET) else None


class Loop:
    """A watched loop. It calls `beat` on each iteration."""

    def __init__(self) -> None:
        self.beat()

    def beat(self) -> None:
        """Record an iteration of the loop in the current thread."""
        self._last_beat = (time.monotonic(), threading.get_ident())

    def __call__(self) -> tuple[float, int]:
        """Return the monotonic time of the last iteration, and its thread id."""
        return self._last_beat


class Watchdog:
    """Checks the loops and pool threads of this process, and sends heartbeats while none is stalled.

    `limit` is in seconds. `own_code` is the folder of the code that is checked.
    """

    def __init__(self, limit: float, *, own_code: Path = OWN_CODE, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval = min(limit / CHECKS, MAX_INTERVAL_SECONDS)
        self.limit = limit + self.interval
        self._own_code = str(own_code)
        self._traces_to: TextIO | None = None  # where a process that ends itself prints its stack traces
        self._clock = clock
        self._loops: dict[str, Progress] = {}
        self._since: dict[str, float] = {}  # loop -> time since which it makes no progress
        self._places: dict[int, tuple[FrameType, int, float]] = {}  # thread -> frame, instruction, and time since then
        self._lock = threading.Lock()

    def watch(self, name: str, progress: Progress) -> None:
        """Start to check a loop. `progress` returns time and thread of its last progress, or None while idle."""
        with self._lock:
            self._loops[name] = progress

    def forget(self, name: str) -> None:
        """Stop checking a loop."""
        with self._lock:
            self._loops.pop(name, None)
            self._since.pop(name, None)

    def ignore_all(self) -> None:
        """Stop all checks because the process is about to end. Heartbeats go on."""
        with self._lock:
            self._loops.clear()
            self._own_code = ""

    def start(self, *, ends_process: bool = False) -> None:
        """Start the thread that sends heartbeats. With `ends_process`, a stall ends this process with exit code 1."""
        self._traces_to = sys.__stderr__ if ends_process else None
        if sys.__stderr__ is not None:  # SIGABRT, which ends a stalled process, then prints all stack traces
            with suppress(ValueError, OSError):
                faulthandler.enable(file=sys.__stderr__)
        notify("READY=1", f"{MICROSECONDS}={int(self.limit * 1e6)}", "WATCHDOG=1")
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def find_stall(self) -> str | None:
        """Check once. Return what is stalled and for how long, or None."""
        now, frames = self._clock(), sys._current_frames()
        with self._lock:
            if any(_is_in(frame, DATABASE_DRIVERS) for frame in frames.values()):
                self._reset(now)
                return None
            stalled = [self._stalled_loop(name, progress, frames, now) for name, progress in self._loops.items()]
            stalled += self._stalled_threads(frames, now)
        return next((text for text in stalled if text), None)

    def _reset(self, now: float) -> None:
        """Forget all stalls so far. The caller holds the lock."""
        self._places.clear()
        self._since = dict.fromkeys(self._loops, now)

    def _run(self) -> None:
        never, checked_at = threading.Event(), self._clock()
        while not never.wait(self.interval):
            now, previous = self._clock(), checked_at
            checked_at = now
            if now - previous > self.limit / 2:  # the whole process was paused (SIGSTOP, a frozen container)
                with self._lock:
                    self._reset(now)
            stalled = self.find_stall()
            if stalled is None:
                notify("WATCHDOG=1")
                if self._traces_to is not None:  # a thread in C ends the process, unless this is called again in time
                    faulthandler.dump_traceback_later(self.limit, exit=True, file=self._traces_to)
                continue
            log.critical("this process is stalled: %s; it asks to be ended", stalled)
            notify("WATCHDOG=trigger")
            if self._traces_to is not None:
                faulthandler.dump_traceback(file=self._traces_to)
                os._exit(STALLED)
            return

    def _stalled_loop(self, name: str, progress: Progress, frames: Mapping[int, FrameType], now: float) -> str | None:
        progress_made = progress()
        at, thread = progress_made or (now, 0)
        frame = frames.get(thread)
        if frame is None or not self._waits_in_own_code(frame):
            self._since[name] = now
            return None
        since = max(at, self._since.get(name, at))
        return f"{name} for {now - since:.0f} s" if now - since > self.limit else None

    def _stalled_threads(self, frames: Mapping[int, FrameType], now: float) -> list[str]:
        """Return the pool threads that have been at the same place of our code for too long."""
        places, stalled = {}, []
        for thread in threading.enumerate():
            frame = frames.get(thread.ident or 0)
            if frame is None or not thread.name.startswith(POOL_THREAD_NAMES) or not self._waits_in_own_code(frame):
                continue
            previous = self._places.get(thread.ident or 0)
            unchanged = previous is not None and previous[0] is frame and previous[1] == frame.f_lasti
            since = previous[2] if previous is not None and unchanged else now
            places[thread.ident or 0] = (frame, frame.f_lasti, since)  # a stored frame's id cannot be reused
            if now - since > self.limit:
                stalled.append(f"{thread.name} for {now - since:.0f} s")
        self._places = places
        return stalled

    def _waits_in_own_code(self, frame: FrameType) -> bool:
        """Return whether a thread is in our own code, outside the modules that talk to a network or a disk."""
        caller: FrameType | None = frame
        while caller is not None and caller.f_code.co_filename.endswith(STDLIB_WAITS):
            caller = caller.f_back
        if caller is None or not self._own_code:
            return False
        file = Path(caller.f_code.co_filename)
        if not file.is_relative_to(self._own_code):
            return False
        path = file.relative_to(self._own_code).as_posix()
        return not path.startswith(IO_PLACES) and (path, caller.f_code.co_name) not in IO_WAITS


def _is_in(frame: FrameType, libraries: tuple[str, ...]) -> bool:
    """Return whether a thread is in one of these libraries, or in a function that they called."""
    caller: FrameType | None = frame
    for _ in range(12):  # a driver's call stack is several frames deep
        if caller is None:
            return False
        if any(f"{os.sep}{library}" in caller.f_code.co_filename for library in libraries):
            return True
        caller = caller.f_back
    return False
