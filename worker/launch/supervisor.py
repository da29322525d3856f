"""Process supervisor: starts the processes of a Procfile, restarts those that die, and stops all of them on a signal.

It runs one loop in one thread. The loop sleeps until a process writes a line, a process dies, a signal arrives or a
restart is due. Each process leads its own session, so Ctrl-C reaches only the supervisor. On Linux the kernel kills
the processes if the supervisor itself is killed.
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
REFUSED = 2  # exit code of a process that refuses its settings
REFUSALS = 3  # stop after this many such exits in a row, each soon after the start
LONGEST_LINE = 65_536
TICK_SECONDS = 1.0  # the loop wakes up on events, and at least this often
OWN_NAME = "up"
ABORT_SECONDS = 3.0  # from SIGABRT, after which a process prints its stack traces, to SIGKILL
PAUSE_SECONDS = 5.0  # the loop runs every second; a longer gap means that this process itself was paused
HEARTBEATS = 4  # per watchdog interval that systemd gives this process
START_SECONDS = 180.0  # as in the systemd units; a worker reports its own limit as soon as it starts

_PR_SET_PDEATHSIG = 1
_PACKAGE = Path(__file__).parents[1]
_LINE = re.compile(r"(?P<name>[A-Za-z0-9_-]+):\s*(?P<command>\S.*)")
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Say = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a Procfile."""

    name: str
    command: str


@dataclass(frozen=True, slots=True)
class Program:
    """A program to start, with its whole environment. If it `outlives` the others, it is stopped after them.

    A program that is `watched` gets a heartbeat socket. Once it has sent a heartbeat, it must go on sending them.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    outlives: bool = False
    watched: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Time limits, all in seconds.

    `first_restart` and `longest_restart` bound the restart delay. `reset_after` is the uptime after which the delay
    starts from the beginning again. `min_uptime` is the uptime after which a clean exit counts as requested.
    `stop_seconds` is the time that a process has to end after SIGTERM. `refusal_seconds` is the uptime below which exit
    code 2 counts as refused settings.
    """

    first_restart: float = 1.0
    longest_restart: float = 30.0
    reset_after: float = 60.0
    min_uptime: float = 2.0
    stop_seconds: float = 25.0
    refusal_seconds: float = 10.0

    def restart_delay(self, failures: int) -> float:
        """Return the seconds to wait before the next start, after this many failures in a row."""
        return min(self.first_restart * 2.0 ** min(failures - 1, 30), self.longest_restart)


# ── what to run ───────────────────────────────────────────────────────────────────────────────────────────────────────


def own_procfile() -> Path:
    """Return the Procfile of this version: inside the installed package, or beside it in a source checkout."""
    inside = _PACKAGE / "Procfile"
    return inside if inside.is_file() else _PACKAGE.parent / "Procfile"


def read_procfile(path: Path) -> list[Line]:
    """Return the lines of a Procfile. Raises SettingsError for a line that cannot be read."""
    lines: list[Line] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(text.strip())
        if match is None:
            raise SettingsError(f"{path}, line {number}: a Procfile line must have the form `name: command`")
        if any(line.name == match["name"] for line in lines):
            raise SettingsError(f"{path}, line {number}: the name {match['name']} is used twice")
        lines.append(Line(match["name"], match["command"]))
    return lines


def merged_environment(dotenv: Path | None) -> dict[str, str]:
    """Return the environment for our processes, including the `.env` file, which they need not read again."""
    return prepared(dict(os.environ) | read_environment(os.environ, dotenv))


def prepared(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which our own programs are found first and no `.env` file is read."""
    programs = [str(Path(sys.executable).parent)]
    if Path(sys.argv[0]).is_file():
        programs.append(str(Path(sys.argv[0]).absolute().parent))
    path = [*dict.fromkeys(programs), environment.get("PATH", os.defpath)]
    # CELERY_* variables belong to the web app.
    inherited = {name: value for name, value in environment.items() if not name.startswith("CELERY_")}
    return inherited | {"PATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", DOTENV_SWITCH: "off"}


def program(line: Line, environment: Mapping[str, str]) -> Program:
    """Return the program for a line. Only the process that polls gets the API keys."""
    variables = {
        name: value for name, value in environment.items() if line.name == KEY_HOLDER or name.upper() not in KEY_NAMES
    }
    prefix = "exec env" if re.match(r"[A-Za-z_]\w*=", line.command) else "exec"  # replace the shell
    return Program(line.name, ("/bin/sh", "-c", f"{prefix} {line.command}"), variables, watched=True)


# ── running it ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Heartbeat:
    """Heartbeats of one program, sent by systemd's protocol to a socket in a private folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.address = str(folder / name)
        self.limit: float | None = None  # seconds allowed without a heartbeat; None until the program reports its limit
        self.last_at = 0.0
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
        """Reset the state for a new process."""
        self.read(now)
        self.limit, self.last_at, self.triggered, self.aborted_at, self.stopped = None, now, False, None, False

    def read(self, now: float) -> None:
        """Read all messages that have arrived."""
        with suppress(BlockingIOError):
            while True:
                for line in self.socket.recv(LONGEST_LINE).decode("utf-8", "replace").splitlines():
                    name, _, value = line.partition("=")
                    if name == "WATCHDOG":
                        self.last_at, self.triggered = now, self.triggered or value == "trigger"
                    elif name == MICROSECONDS and value.isascii() and value.isdigit() and len(value) < 16:
                        self.last_at, self.limit = now, int(value) / 1e6

    def overdue(self, now: float) -> bool:
        """Return whether the heartbeat is late, or the program itself reported a stall."""
        return self.triggered or (self.limit is not None and now - self.last_at > self.limit)


@dataclass(slots=True)
class _Child:
    program: Program
    heartbeat: _Heartbeat | None = None
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    start_at: float = 0.0
    failures: int = 0
    refusals: int = 0
    terminated: bool = False
    output: bytearray = field(default_factory=bytearray)


class Supervisor:
    """Keep programs running inside its `with` block and end all of them at its end. Main thread only.

    Each line that a program writes is passed to `say(name, line)`. With `logs`, output goes to one file per program in
    that folder, and `say` gets only starts and exits.
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
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._wake, self._woken = socket.socketpair()
        self.stop_signals = 0
        self.exits: dict[str, int] = {}
        self._heartbeats: list[_Heartbeat] = []
        self._heartbeat_folder: tempfile.TemporaryDirectory[str] | None = None
        self._no_watchdog_logged = False
        self._checked_at = clock()
        self._notify_interval = (watched_seconds() or 0.0) / HEARTBEATS  # if systemd watches this process too
        self._notify_at = clock()

    def __enter__(self) -> Self:
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._drain)
        self._previous_wakeup_fd = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in _STOP_SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._on_stop_signal)
        # The SIGCHLD handler does nothing: the signal only has to wake the loop.
        self._previous_handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        try:
            self.stop()
            self._run_until_empty()
        finally:
            for child in self._children:
                _kill_group(child)
            for number, handler in self._previous_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_wakeup_fd)
            self._selector.close()
            self._wake.close()
            self._woken.close()
            for heartbeat in self._heartbeats:
                heartbeat.socket.close()
            if self._heartbeat_folder is not None:
                self._heartbeat_folder.cleanup()

    def start(self, program: Program) -> None:
        """Start a program and keep it running."""
        child = _Child(program, self._new_heartbeat(program))
        self._children.append(child)
        self._spawn(child)

    def run_once(self, program: Program) -> int | None:
        """Run a program until it ends. Return its exit code, or None if the supervisor was stopped in the meantime."""
        child = _Child(program)
        self._spawn(child)
        while not self.stop_signals and child.process is not None and child.process.poll() is None:
            self._sleep(TICK_SECONDS)
        code = None if child.process is None else child.process.poll()
        _kill_group(child)
        self._close_output(child)
        return code

    def run(self) -> int:
        """Keep everything running until a stop. Return the exit code: 0, or 2 if a program refuses its settings."""
        self._run_until_empty()
        return self._code

    def stop(self) -> None:
        """Ask all programs to end. Those still running after the time limit are killed."""
        if self._stop_by is None:
            self._stop_by = self._clock() + self._timing.stop_seconds
            self._apply_stop()

    def step(self, seconds: float) -> None:
        """Wait up to this many seconds for an event and handle it."""
        self._sleep(seconds)
        self._apply_stop()
        self._end_stalled()
        for child in list(self._children):
            code = None if child.process is None else child.process.poll()
            if code is not None:
                self._after_exit(child, code)
            elif child.process is None and self._stop_by is None and self._clock() >= child.start_at:
                self._spawn_again(child)

    def wait_until(self, condition: Callable[[], bool], seconds: float, interval: float) -> bool:
        """Run until the condition holds, the time is over or a stop signal comes. Return whether it holds."""
        deadline = self._clock() + seconds
        while not (holds := condition()) and not self.stop_signals and self._clock() < deadline:
            self.step(interval)
        return holds

    # ── internals ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_stop_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signals += 1

    def _run_until_empty(self) -> None:
        while self._children:
            self.step(TICK_SECONDS)

    def _sleep(self, seconds: float) -> None:
        now = self._clock()
        due = [child.start_at - now for child in self._children if child.process is None]
        if self._stop_by is not None:
            due.append(self._stop_by - now)
        for key, _ in self._selector.select(max(0.0, min([seconds, *due]))):
            key.data()
        if self._notify_interval and self._clock() >= self._notify_at:
            self._notify_at = self._clock() + self._notify_interval
            notify("WATCHDOG=1")

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4_096)

    def _spawn(self, child: _Child) -> None:
        program = child.program
        log = None if self._logs is None else (self._logs / f"{program.name}.log").open("ab")
        try:
            child.process = subprocess.Popen(
                list(program.command),
                cwd=self._folder,
                env=_environment(child),
                stdin=subprocess.DEVNULL,
                stdout=log or subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent(),  # safe here: this process has one thread
            )
        finally:
            if log is not None:
                log.close()
        child.started_at = self._clock()
        if child.heartbeat is not None:
            child.heartbeat.begin(child.started_at)
        if child.process.stdout is not None:
            os.set_blocking(child.process.stdout.fileno(), False)
            self._selector.register(child.process.stdout, selectors.EVENT_READ, partial(self._read, child))

    def _spawn_again(self, child: _Child) -> None:
        """Restart a program, or schedule another try if the system lacks processes or file descriptors."""
        try:
            self._spawn(child)
        except OSError as error:
            child.process = None
            child.failures += 1
            delay = self._timing.restart_delay(child.failures)
            child.start_at = self._clock() + delay
            reason = error.strerror or str(error)
            self._say(OWN_NAME, f"{child.program.name} cannot be started ({reason}); next try in {delay:g} s")

    def _read(self, child: _Child) -> bool:
        """Pass on what a process wrote. Return False if there was nothing to read."""
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

    def _new_heartbeat(self, program: Program) -> _Heartbeat | None:
        """Make a heartbeat socket for a watched program. Without one the program runs unwatched."""
        if not program.watched:
            return None
        try:
            if self._heartbeat_folder is None:
                self._heartbeat_folder = tempfile.TemporaryDirectory(prefix="fetch-worker-up-")  # 0700
            heartbeat = _Heartbeat(Path(self._heartbeat_folder.name), program.name)
        except OSError as error:
            if not self._no_watchdog_logged:
                self._no_watchdog_logged = True
                self._say(OWN_NAME, f"no watchdog: cannot make its socket ({error.strerror or error})")
            return None
        self._heartbeats.append(heartbeat)
        self._selector.register(heartbeat.socket, selectors.EVENT_READ, lambda: heartbeat.read(self._clock()))
        return heartbeat

    def _end_stalled(self) -> None:
        """End processes whose heartbeat is late: SIGABRT first, for stack traces of their threads, then SIGKILL."""
        now = self._clock()
        paused, self._checked_at = now - self._checked_at > PAUSE_SECONDS, now
        for child in self._children:
            heartbeat = child.heartbeat
            if (
                heartbeat is None
                or child.process is None
                or child.process.poll() is not None
                or self._stop_by is not None
            ):
                continue
            if paused:  # this process was paused and could not read the heartbeats
                heartbeat.read(now)
                heartbeat.last_at = now
            if heartbeat.aborted_at is not None:
                if now - heartbeat.aborted_at >= ABORT_SECONDS:
                    _send_to_group(child, signal.SIGKILL)
            elif heartbeat.overdue(now):
                self._end_overdue(child, heartbeat, now)

    def _end_overdue(self, child: _Child, heartbeat: _Heartbeat, now: float) -> None:
        process = child.process
        if process is None:
            return
        name, silent = child.program.name, now - heartbeat.last_at
        if not heartbeat.triggered and _is_stopped(process.pid):
            if not heartbeat.stopped:
                self._say(OWN_NAME, f"{name} was stopped by a signal and does nothing until SIGCONT")
            heartbeat.stopped, heartbeat.last_at = True, now
            return
        heartbeat.aborted_at = now
        reason = "reports that it is stalled" if heartbeat.triggered else f"was stalled for {silent:.0f} s"
        self._say(OWN_NAME, f"{name} {reason}: ending it")
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGABRT)

    def _after_exit(self, child: _Child, code: int) -> None:
        """End what an exited process left in its group, and schedule the next start."""
        _kill_group(child)
        self._close_output(child)
        child.process = None
        if self._stop_by is not None:
            self._children.remove(child)
            return
        name, now = child.program.name, self._clock()
        lived = now - child.started_at
        # An operator asked it to end: this is no crash.
        requested = code in (0, -signal.SIGTERM) and lived >= self._timing.min_uptime
        child.failures = 1 if requested or lived >= self._timing.reset_after else child.failures + 1
        child.refusals = child.refusals + 1 if code == REFUSED and lived < self._timing.refusal_seconds else 0
        self.exits[name] = self.exits.get(name, 0) + 1
        if child.refusals >= REFUSALS:
            self._say(OWN_NAME, f"{name} refuses its settings (exit code {code}, {REFUSALS} times): stopping")
            self._code = REFUSED
            self._children.remove(child)
            self.stop()
            return
        delay = self._timing.restart_delay(child.failures)
        child.start_at = now + delay
        self._say(OWN_NAME, f"{name} {_exit_text(code)}; restart in {delay:g} s")

    def _apply_stop(self) -> None:
        if self.stop_signals and self._stop_by is None:
            self._stop_by = self._clock() + self._timing.stop_seconds
            self._say(OWN_NAME, "stopping; a second signal kills at once")
        if self._stop_by is None:
            return
        self._children = [child for child in self._children if child.process is not None]
        if self.stop_signals > 1 or self._clock() >= self._stop_by:
            for child in self._children:
                _kill_group(child)
            self._stop_by = self._clock() + self._timing.stop_seconds
            return
        others = [child for child in self._children if not child.program.outlives]
        for child in others or self._children:
            if not child.terminated and child.process is not None and child.process.poll() is None:
                child.process.terminate()
                child.terminated = True


def _die_with_parent() -> Callable[[], None] | None:
    """Return a function for the new process that has the Linux kernel kill it when this process dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def set_death_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # the parent died before prctl was called
            os._exit(1)

    return set_death_signal


def _environment(child: _Child) -> dict[str, str]:
    """Return a program's environment with its heartbeat socket. Systemd's own variables are for this process only."""
    variables = {name: value for name, value in child.program.environment.items() if name not in NAMES}
    if child.heartbeat is None:
        return variables
    return variables | {SOCKET: child.heartbeat.address, MICROSECONDS: str(int(START_SECONDS * 1e6))}


def _is_stopped(pid: int) -> bool:
    """Return whether a signal or a debugger stopped the process. Always False outside Linux."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")  # the process name before it may contain any character


def _send_to_group(child: _Child, number: int) -> None:
    if child.process is not None:
        with suppress(ProcessLookupError, PermissionError):  # macOS raises PermissionError for a group that has ended
            os.killpg(child.process.pid, number)


def _kill_group(child: _Child) -> None:
    """Kill a process and its whole group, and wait for it."""
    if child.process is None:
        return
    _send_to_group(child, signal.SIGKILL)
    child.process.wait()


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
