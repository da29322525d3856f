"""The worker's side of a watchdog: say "I am alive" to whoever started this process, while its loops go round.

The protocol is systemd's (`sd_notify`): datagrams to the socket that NOTIFY_SOCKET names. `up` speaks it, too. A
process that says nothing for longer than its limit is ended from outside and started again.

The thread that says so needs the interpreter's lock. While C code holds it (a catastrophic regular expression does),
nothing is said. Once one of the process's loops, or a thread of its pool, waits in our own code for too long, the
process says so and asks to be ended.

Waiting for a server is no standstill, however long. A thread inside a library, or in our network and file modules, is
left alone. While any thread is inside the database driver all are left alone: they may wait for a lock that it holds.
The children of a prefork pool are not looked into.
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

log = logging.getLogger(__name__)

SOCKET, MICROSECONDS, PROCESS = NAMES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")  # of the environment
LOOKS = 6  # within a limit
LONGEST_INTERVAL = 2.0  # seconds between two looks

OUR_CODE = Path(__file__).parents[1]
OUR_IO = frozenset(
    {"timed_http.py", "lean_http.py", "addresses.py", "storage.py", "partials.py", "s3.py", "sent_requests.py"}
)
BEHIND_IO = frozenset(
    {("downloader.py", "_prepare_storage"), ("redelivery.py", "counted")}
)  # wait for one that asks a server
POOLS = ("ThreadPoolExecutor", "webhook")  # how the threads are named that run tasks and send webhooks
WAITING = ("threading.py", "queue.py")  # the standard library's own waits: who called them is looked at
DATABASE = ("sqlalchemy", "psycopg", "pymysql")

Progress = Callable[[], tuple[float, int] | None]


def notify(*lines: str) -> bool:
    """Send lines to the service manager; return whether there is one that could be reached."""
    address = os.environ.get(SOCKET, "")
    if not address:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)  # a full queue is no reason to wait
            sender.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            sender.send("\n".join(lines).encode())
    except OSError:
        return False
    return True


def watched_seconds() -> float | None:
    """Return the seconds after which whoever started this process ends it, if it says nothing; None: nobody watches."""
    try:
        seconds = int(os.environ[MICROSECONDS]) / 1e6
        mine = int(os.environ.get(PROCESS) or os.getpid()) == os.getpid()
    except (KeyError, ValueError):
        return None
    return seconds if mine and seconds > 0 and os.environ.get(SOCKET) else None


class Loop:
    """A loop that is watched: it calls `turn` each time it goes round."""

    def __init__(self) -> None:
        self.turn()

    def turn(self) -> None:
        """Note that the loop goes round, in this thread."""
        self._turned = (time.monotonic(), threading.get_ident())

    def __call__(self) -> tuple[float, int]:
        """Return when it last did, by the monotonic clock, and in which thread."""
        return self._turned


class Watchdog:
    """Looks at this process's loops and pool threads, and says that it is alive while none stands still.

    `limit` is in seconds. `our_code` is the folder of the code that may stand still.
    """

    def __init__(self, limit: float, *, our_code: Path = OUR_CODE, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval = min(limit / LOOKS, LONGEST_INTERVAL)
        self.limit = limit + self.interval
        self._our_code = str(our_code)
        self._clock = clock
        self._loops: dict[str, Progress] = {}
        self._since: dict[str, float] = {}  # since when a loop gets nowhere
        self._places: dict[int, tuple[FrameType, int, float]] = {}  # by thread: where it waits, and since when
        self._lock = threading.Lock()

    def watch(self, name: str, progress: Progress) -> None:
        """Look at a loop from now on: when it last got on, and in which thread; None while it rests."""
        with self._lock:
            self._loops[name] = progress

    def forget(self, name: str) -> None:
        """Look at a loop no more."""
        with self._lock:
            self._loops.pop(name, None)
            self._since.pop(name, None)

    def rest(self) -> None:
        """Look at nothing any more, since the process is about to end; go on saying that it is alive."""
        with self._lock:
            self._loops.clear()
            self._our_code = ""

    def start(self) -> None:
        """Say from now on that this process is alive, from a thread of its own."""
        if sys.__stderr__ is not None:  # SIGABRT, which ends a process that stands still, shows where it stood
            with suppress(ValueError, OSError):
                faulthandler.enable(file=sys.__stderr__)
        notify("READY=1", f"{MICROSECONDS}={int(self.limit * 1e6)}", "WATCHDOG=1")
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def standstill(self) -> str | None:
        """Look once; return what stands still and for how long, or None."""
        now, frames = self._clock(), sys._current_frames()
        with self._lock:
            if any(_is_in(frame, DATABASE) for frame in frames.values()):
                self._forget_times(now)
                return None
            standing = [self._standing_loop(name, progress, frames, now) for name, progress in self._loops.items()]
            standing += self._standing_threads(frames, now)
        return next((text for text in standing if text), None)

    def _begin_anew(self, now: float) -> None:
        with self._lock:
            self._forget_times(now)

    def _forget_times(self, now: float) -> None:
        self._places.clear()
        self._since = dict.fromkeys(self._loops, now)

    def _run(self) -> None:
        rest, looked_at = threading.Event(), self._clock()
        while not rest.wait(self.interval):
            now, before = self._clock(), looked_at
            looked_at = now
            if now - before > self.limit / 2:  # the whole process was stopped (SIGSTOP, a frozen container)
                self._begin_anew(now)
            standing = self.standstill()
            if standing is None:
                notify("WATCHDOG=1")
                continue
            log.critical("this process stands still: %s; it asks to be ended", standing)
            notify("WATCHDOG=trigger")
            return

    def _standing_loop(self, name: str, progress: Progress, frames: Mapping[int, FrameType], now: float) -> str | None:
        turned = progress()
        at, thread = turned or (now, 0)
        frame = frames.get(thread)
        if frame is None or not self._waits_in_our_code(frame):
            self._since[name] = now
            return None
        since = max(at, self._since.get(name, at))
        return f"{name} for {now - since:.0f} s" if now - since > self.limit else None

    def _standing_threads(self, frames: Mapping[int, FrameType], now: float) -> list[str]:
        """The threads of pools that are at the very same place of our code for too long."""
        places, standing = {}, []
        for thread in threading.enumerate():
            frame = frames.get(thread.ident or 0)
            if frame is None or not thread.name.startswith(POOLS) or not self._waits_in_our_code(frame):
                continue
            before = self._places.get(thread.ident or 0)
            same = before is not None and before[0] is frame and before[1] == frame.f_lasti
            since = before[2] if before is not None and same else now
            places[thread.ident or 0] = (frame, frame.f_lasti, since)  # kept, so that it can't be taken for another
            if now - since > self.limit:
                standing.append(f"{thread.name} for {now - since:.0f} s")
        self._places = places
        return standing

    def _waits_in_our_code(self, frame: FrameType) -> bool:
        """Whether a thread is in our own code, and not where that talks to a network or a disk."""
        at: FrameType | None = frame
        while at is not None and at.f_code.co_filename.endswith(WAITING):
            at = at.f_back
        if at is None or not self._our_code:
            return False
        file = at.f_code.co_filename
        name = Path(file).name
        return file.startswith(self._our_code) and name not in OUR_IO and (name, at.f_code.co_name) not in BEHIND_IO


def _is_in(frame: FrameType, libraries: tuple[str, ...]) -> bool:
    """Whether a thread is in one of these libraries, or in what they have called."""
    at: FrameType | None = frame
    for _ in range(12):  # drivers are some frames deep
        if at is None:
            return False
        if any(f"{os.sep}{library}" in at.f_code.co_filename for library in libraries):
            return True
        at = at.f_back
    return False
