"""Runs the lines of a Procfile: starts them, starts again what dies, and ends all of them when it is told to.

One thread, one loop: it sleeps until a process says something, a process dies, a signal comes or a restart is due.
Every process leads a session of its own, so that a Ctrl-C reaches the supervisor alone, and on Linux the kernel kills
it when the supervisor itself is killed.
"""

import ctypes
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from worker.configuration.environment import read_environment
from worker.errors import SettingsError
from worker.settings import DOTENV_SWITCH, KEY_NAMES
from worker.system.watchdog import MICROSECONDS, NAMES, SOCKET, notify, watched_seconds

RELEASE = "release"  # run once before the others
KEY_HOLDER = "worker"  # the only process that is given the API keys
REFUSED = 2  # the exit code that says: wrong settings
REFUSALS = 3  # so many in a row, each soon after its start, and nothing more is tried
LONGEST_LINE = 65_536
LOOK_SECONDS = 1.0  # deaths wake the loop; it looks by itself this often, too
OWN_NAME = "up"
ABORT_SECONDS = 3.0  # from SIGABRT, which has a process write where its threads are, to SIGKILL
AWAY_SECONDS = 5.0  # a loop that looks every second and comes this late stood still itself
BEATS = 4  # within the time that systemd gives this process
START_SECONDS = 180.0  # as in the units for systemd; a worker tells its own limit as soon as it starts

_PR_SET_PDEATHSIG = 1
_PACKAGE = Path(__file__).parents[1]
_LINE = re.compile(r"(?P<name>[A-Za-z0-9_-]+):\s*(?P<command>\S.*)")
_ORDERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Say = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a Procfile."""

    name: str
    command: str


@dataclass(frozen=True, slots=True)
class Program:
    """What to start: its name, its words, its whole environment. One that `outlives` the others ends after them.

    One that is `watched` is given a socket to say at that it is alive; once it has done so it must go on.
    """

    name: str
    words: Sequence[str]
    environment: Mapping[str, str]
    outlives: bool = False
    watched: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds: the first and the longest delay of a restart, the life after which delays begin anew, the life after
    which one that ended politely was asked to, the time a process has to end when asked, and the life below which an
    exit for wrong settings counts."""

    first_restart: float = 1.0
    longest_restart: float = 30.0
    steady: float = 60.0
    started: float = 2.0
    polite: float = 25.0
    soon: float = 10.0

    def restart(self, deaths: int) -> float:
        """Seconds until the start after so many deaths in a row."""
        return min(self.first_restart * 2.0 ** min(deaths - 1, 30), self.longest_restart)


# ── what to run ───────────────────────────────────────────────────────────────────────────────────────────────────────


def own_procfile() -> Path:
    """The Procfile that belongs to this version: inside the package where it was installed, beside it in a checkout."""
    inside = _PACKAGE / "Procfile"
    return inside if inside.is_file() else _PACKAGE.parent / "Procfile"


def read_procfile(path: Path) -> list[Line]:
    """The lines of a Procfile. Raises SettingsError where one of them can't be read."""
    lines: list[Line] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(text.strip())
        if found is None:
            raise SettingsError(f"{path}, line {number}: a line of a Procfile reads `name: command`")
        if any(line.name == found["name"] for line in lines):
            raise SettingsError(f"{path}, line {number}: {found['name']} is there twice")
        lines.append(Line(found["name"], found["command"]))
    return lines


def merged_environment(dotenv: Path | None) -> dict[str, str]:
    """The environment for our processes: the real one, filled up from a `.env` file which they need not read again."""
    return prepared(dict(os.environ) | read_environment(os.environ, dotenv))


def prepared(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which our own programs are found first, and which is all that they read."""
    programs = [str(Path(sys.executable).parent)]
    if Path(sys.argv[0]).is_file():
        programs.append(str(Path(sys.argv[0]).absolute().parent))
    path = [*dict.fromkeys(programs), environment.get("PATH", os.defpath)]
    kept = {name: value for name, value in environment.items() if not name.startswith("CELERY_")}  # for the web app
    return kept | {"PATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", DOTENV_SWITCH: "off"}


def program(line: Line, environment: Mapping[str, str]) -> Program:
    """A line as a program. Only the process that polls is given the API keys."""
    own = {
        name: value for name, value in environment.items() if line.name == KEY_HOLDER or name.upper() not in KEY_NAMES
    }
    become = "exec env" if re.match(r"[A-Za-z_]\w*=", line.command) else "exec"  # no shell stays in between
    return Program(line.name, ("/bin/sh", "-c", f"{become} {line.command}"), own, watched=True)


# ── running it ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Beats:
    """What a program says of itself, by systemd's protocol: one socket for each, in a folder of this process alone."""

    def __init__(self, folder: Path, name: str) -> None:
        self.address = str(folder / name)
        self.limit: float | None = None  # seconds it may say nothing; None until it says so itself: nobody watches it
        self.heard_at = 0.0
        self.triggered = False
        self.aborted_at: float | None = None
        self.stopped = False
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        try:
            self.socket.bind(self.address)
        except OSError:
            self.socket.close()
            raise

    def begin(self, now: float) -> None:
        """Forget what the process before said: a new one starts."""
        self.hear(now)
        self.limit, self.heard_at, self.triggered, self.aborted_at, self.stopped = None, now, False, None, False

    def hear(self, now: float) -> None:
        """Take in all that was said."""
        with suppress(BlockingIOError):
            while True:
                for line in self.socket.recv(LONGEST_LINE).decode("utf-8", "replace").splitlines():
                    name, _, value = line.partition("=")
                    if name == "WATCHDOG":
                        self.heard_at, self.triggered = now, self.triggered or value == "trigger"
                    elif name == MICROSECONDS and value.isascii() and value.isdigit() and len(value) < 16:
                        self.heard_at, self.limit = now, int(value) / 1e6

    def overdue(self, now: float) -> bool:
        """Whether it said nothing for longer than it may, or says itself that it stands still."""
        return self.triggered or (self.limit is not None and now - self.heard_at > self.limit)


@dataclass(slots=True)
class _Child:
    program: Program
    beats: _Beats | None = None
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    start_at: float = 0.0
    deaths: int = 0
    refusals: int = 0
    asked: bool = False
    output: bytearray = field(default_factory=bytearray)


class Supervisor:
    """Keeps programs running inside its `with` block, and leaves none behind. To be used by the main thread.

    What they write is handed to `say(name, line)`; with `logs` it goes to one file each in that folder instead, and
    `say` hears of starts and deaths alone.
    """

    def __init__(
        self,
        folder: Path,
        say: Say,
        *,
        logs: Path | None = None,
        timing: Timing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._say, self._logs, self._clock = folder, say, logs, clock
        self._timing = timing or Timing()
        self._children: list[_Child] = []
        self._stop_by: float | None = None
        self._code = 0
        self._selector = selectors.DefaultSelector()
        self._before: dict[signal.Signals, Any] = {}
        self._wake, self._woken = socket.socketpair()
        self.told = 0
        self.deaths: dict[str, int] = {}
        self._beats: list[_Beats] = []
        self._beats_folder: tempfile.TemporaryDirectory[str] | None = None
        self._unwatched = False
        self._watched_at = clock()
        self._beat_every = (watched_seconds() or 0.0) / BEATS  # where systemd watches this process, too
        self._beat_at = clock()

    def __enter__(self) -> Self:
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._drain)
        self._wakeup_before = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for order in _ORDERS:
            self._before[order] = signal.signal(order, self._hear)
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)  # it only has to wake us
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        try:
            self.stop()
            self._until_all_ended()
        finally:
            for child in self._children:
                _kill_group(child)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
            self._selector.close()
            self._wake.close()
            self._woken.close()
            for beats in self._beats:
                beats.socket.close()
            if self._beats_folder is not None:
                self._beats_folder.cleanup()

    def start(self, program: Program) -> None:
        """Starts a program and keeps it running."""
        child = _Child(program, self._new_beats(program))
        self._children.append(child)
        self._spawn(child)

    def run_once(self, program: Program) -> int | None:
        """Runs a program to its end; its exit code, or None where the supervisor was told to stop meanwhile."""
        child = _Child(program)
        self._spawn(child)
        while not self.told and child.process is not None and child.process.poll() is None:
            self._sleep(LOOK_SECONDS)
        code = None if child.process is None else child.process.poll()
        _kill_group(child)
        self._close_output(child)
        return code

    def run(self) -> int:
        """Keeps everything running until it is told to stop; the exit code: 0, or 2 where settings are refused."""
        self._until_all_ended()
        return self._code

    def stop(self) -> None:
        """Asks everything to end; what has not within the bound is killed."""
        if self._stop_by is None:
            self._stop_by = self._clock() + self._timing.polite
            self._follow_orders()

    def step(self, seconds: float) -> None:
        """Waits up to so many seconds for something to happen, and does what it asks for."""
        self._sleep(seconds)
        self._follow_orders()
        self._end_standing()
        for child in list(self._children):
            code = None if child.process is None else child.process.poll()
            if code is not None:
                self._bury(child, code)
            elif child.process is None and self._stop_by is None and self._clock() >= child.start_at:
                self._spawn_again(child)

    def wait_until(self, condition: Callable[[], bool], seconds: float, look_every: float) -> bool:
        """Runs on until the condition holds; whether it did before the time was over or the supervisor told to stop."""
        until = self._clock() + seconds
        while not (held := condition()) and not self.told and self._clock() < until:
            self.step(look_every)
        return held

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.told += 1

    def _until_all_ended(self) -> None:
        while self._children:
            self.step(LOOK_SECONDS)

    def _sleep(self, seconds: float) -> None:
        now = self._clock()
        due = [child.start_at - now for child in self._children if child.process is None]
        if self._stop_by is not None:
            due.append(self._stop_by - now)
        for key, _ in self._selector.select(max(0.0, min([seconds, *due]))):
            key.data()
        if self._beat_every and self._clock() >= self._beat_at:
            self._beat_at = self._clock() + self._beat_every
            notify("WATCHDOG=1")

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4_096)

    def _spawn(self, child: _Child) -> None:
        wanted = child.program
        log = None if self._logs is None else (self._logs / f"{wanted.name}.log").open("ab")
        try:
            child.process = subprocess.Popen(
                list(wanted.words),
                cwd=self._folder,
                env=_environment(child),
                stdin=subprocess.DEVNULL,
                stdout=log or subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_tie_to_this_process(),  # safe where it is used: the process has one thread
            )
        finally:
            if log is not None:
                log.close()
        child.started_at = self._clock()
        if child.beats is not None:
            child.beats.begin(child.started_at)
        if child.process.stdout is not None:
            os.set_blocking(child.process.stdout.fileno(), False)
            self._selector.register(child.process.stdout, selectors.EVENT_READ, partial(self._read, child))

    def _spawn_again(self, child: _Child) -> None:
        """Start a program again, or later where the machine has no room for a process or an open file just now."""
        try:
            self._spawn(child)
        except OSError as error:
            child.process = None
            child.deaths += 1
            delay = self._timing.restart(child.deaths)
            child.start_at = self._clock() + delay
            reason = error.strerror or str(error)
            self._say(OWN_NAME, f"{child.program.name} can't be started ({reason}); it is tried again in {delay:g} s")

    def _read(self, child: _Child) -> bool:
        """Says what a process wrote; False at the end of it."""
        pipe = None if child.process is None else child.process.stdout
        if pipe is None or pipe.closed:
            return False
        try:
            chunk = os.read(pipe.fileno(), LONGEST_LINE)
        except BlockingIOError:
            return False
        if not chunk:
            self._close_output(child, read=False)
            return False
        child.output += chunk
        *lines, rest = child.output.split(b"\n")
        if len(rest) >= LONGEST_LINE:
            lines, rest = [*lines, rest], bytearray()
        child.output = bytearray(rest)
        for line in lines:
            self._say(child.program.name, line.decode("utf-8", "replace").rstrip("\r"))
        return True

    def _close_output(self, child: _Child, *, read: bool = True) -> None:
        pipe = None if child.process is None else child.process.stdout
        if pipe is None or pipe.closed:
            return
        while read and self._read(child):
            pass
        if not pipe.closed:
            self._selector.unregister(pipe)
            pipe.close()
        if child.output:
            self._say(child.program.name, child.output.decode("utf-8", "replace"))
            child.output.clear()

    # ── the watchdog ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _new_beats(self, program: Program) -> _Beats | None:
        """A socket to hear from a program that may say when it is alive; without one it is run unwatched."""
        if not program.watched:
            return None
        try:
            if self._beats_folder is None:
                self._beats_folder = tempfile.TemporaryDirectory(prefix="fetch-worker-up-")  # 0700
            beats = _Beats(Path(self._beats_folder.name), program.name)
        except OSError as error:
            if not self._unwatched:
                self._unwatched = True
                self._say(OWN_NAME, f"no watchdog: can't make a socket for it ({error.strerror or error})")
            return None
        self._beats.append(beats)
        self._selector.register(beats.socket, selectors.EVENT_READ, lambda: beats.hear(self._clock()))
        return beats

    def _end_standing(self) -> None:
        """End processes that say nothing for longer than they may: SIGABRT, for a trace of their threads, then kill."""
        now = self._clock()
        away, self._watched_at = now - self._watched_at > AWAY_SECONDS, now
        for child in self._children:
            beats = child.beats
            if beats is None or child.process is None or child.process.poll() is not None or self._stop_by is not None:
                continue
            if away:  # this process was the one that stood still, and could not hear them
                beats.hear(now)
                beats.heard_at = now
            if beats.aborted_at is not None:
                if now - beats.aborted_at >= ABORT_SECONDS:
                    _send_to_group(child, signal.SIGKILL)
            elif beats.overdue(now):
                self._end_overdue(child, beats, now)

    def _end_overdue(self, child: _Child, beats: _Beats, now: float) -> None:
        process = child.process
        if process is None:
            return
        name, silent = child.program.name, now - beats.heard_at
        if not beats.triggered and _is_stopped(process.pid):
            if not beats.stopped:
                self._say(OWN_NAME, f"{name} was stopped by a signal: nothing is done until it goes on (SIGCONT)")
            beats.stopped, beats.heard_at = True, now
            return
        beats.aborted_at = now
        why = "says that it stands still" if beats.triggered else f"stood still for {silent:.0f} s"
        self._say(OWN_NAME, f"{name} {why}: it is ended")
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGABRT)

    def _bury(self, child: _Child, code: int) -> None:
        """After a death: ends what the process left in its group, and plans the next start."""
        _kill_group(child)
        self._close_output(child)
        child.process = None
        if self._stop_by is not None:
            self._children.remove(child)
            return
        name, now = child.program.name, self._clock()
        lived = now - child.started_at
        asked = code in (0, -signal.SIGTERM) and lived >= self._timing.started  # by an operator: no crash
        child.deaths = 1 if asked or lived >= self._timing.steady else child.deaths + 1
        child.refusals = child.refusals + 1 if code == REFUSED and lived < self._timing.soon else 0
        self.deaths[name] = self.deaths.get(name, 0) + 1
        if child.refusals >= REFUSALS:
            self._say(OWN_NAME, f"{name} refuses its settings (exit code {code}, {REFUSALS} times): stopping")
            self._code = REFUSED
            self._children.remove(child)
            self.stop()
            return
        delay = self._timing.restart(child.deaths)
        child.start_at = now + delay
        self._say(OWN_NAME, f"{name} {_how_it_ended(code)}; it is started again in {delay:g} s")

    def _follow_orders(self) -> None:
        if self.told and self._stop_by is None:
            self._stop_by = self._clock() + self._timing.polite
            self._say(OWN_NAME, "stopping; once more kills at once")
        if self._stop_by is None:
            return
        self._children = [child for child in self._children if child.process is not None]
        if self.told > 1 or self._clock() >= self._stop_by:
            for child in self._children:
                _kill_group(child)
            self._stop_by = self._clock() + self._timing.polite
            return
        first = [child for child in self._children if not child.program.outlives]
        for child in first or self._children:
            if not child.asked and child.process is not None and child.process.poll() is None:
                child.process.terminate()
                child.asked = True


def _tie_to_this_process() -> Callable[[], None] | None:
    """What a new process does first, on Linux: asks the kernel for SIGKILL when this process dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return tie


def _environment(child: _Child) -> dict[str, str]:
    """A program's environment, with the address that it is to say at that it is alive. Systemd's own is ours."""
    own = {name: value for name, value in child.program.environment.items() if name not in NAMES}
    if child.beats is None:
        return own
    return own | {SOCKET: child.beats.address, MICROSECONDS: str(int(START_SECONDS * 1e6))}


def _is_stopped(pid: int) -> bool:
    """Whether an operator or a debugger stopped a process. Known on Linux alone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")  # the name before it may hold anything


def _send_to_group(child: _Child, number: int) -> None:
    if child.process is not None:
        with suppress(ProcessLookupError, PermissionError):  # macOS says so of a group that has ended
            os.killpg(child.process.pid, number)


def _kill_group(child: _Child) -> None:
    """Kills a process and all it started, and takes note of its end."""
    if child.process is None:
        return
    _send_to_group(child, signal.SIGKILL)
    child.process.wait()


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
