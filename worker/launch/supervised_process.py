"""One program of the supervisor: its process, output and heartbeat, and when it is started again."""

import ctypes
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from worker.launch.heartbeats import Heartbeat, environment_with
from worker.launch.procfile import Program

OWN_NAME = "up"
REFUSED = 2  # exit code of a process that refuses its settings
REFUSALS = 3  # stop after this many such exits in a row, each soon after the start
LONGEST_LINE = 65_536
ABORT_SECONDS = 3.0  # from SIGABRT, after which a process prints its stack traces, to SIGKILL

_PR_SET_PDEATHSIG = 1

Say = Callable[[str, str], None]


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
    stop_seconds: float = 110.0  # an order may be answered only when its picture is ready
    refusal_seconds: float = 10.0

    def restart_delay(self, failures: int) -> float:
        """Return the seconds to wait before the next start, after this many failures in a row."""
        return min(self.first_restart * 2.0 ** min(failures - 1, 30), self.longest_restart)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a supervisor runs all of its programs.

    Each line that a program writes is passed to `say(name, line)`. With `logs`, output goes to one file per program in
    that folder instead.
    """

    folder: Path
    say: Say
    logs: Path | None
    timing: Timing
    clock: Callable[[], float]


@dataclass(slots=True)
class Restarts:
    """When a program is started again: after a delay that grows with each failure."""

    timing: Timing
    at: float = 0.0
    failures: int = 0
    refusals: int = 0

    def after_failed_start(self, now: float) -> float:
        """Schedule another try. Return the delay."""
        self.failures += 1
        return self._schedule(now)

    def after_exit(self, code: int, lived: float, now: float) -> float | None:
        """Schedule the next start. Return the delay, or None if the program has refused its settings too often."""
        # An operator asked it to end: this is no crash.
        requested = code in (0, -signal.SIGTERM) and lived >= self.timing.min_uptime
        self.failures = 1 if requested or lived >= self.timing.reset_after else self.failures + 1
        self.refusals = self.refusals + 1 if code == REFUSED and lived < self.timing.refusal_seconds else 0
        return None if self.refusals >= REFUSALS else self._schedule(now)

    def _schedule(self, now: float) -> float:
        delay = self.timing.restart_delay(self.failures)
        self.at = now + delay
        return delay


class SupervisedProcess:
    """A program that is started again whenever it ends. Its output is read by the loop that owns `selector`."""

    def __init__(
        self, program: Program, options: RunOptions, selector: selectors.BaseSelector, heartbeat: Heartbeat | None
    ) -> None:
        self.program = program
        self.process: subprocess.Popen[bytes] | None = None
        self.restarts = Restarts(options.timing)
        self._options, self._selector, self._heartbeat = options, selector, heartbeat
        self._started_at = 0.0
        self._aborted_at: float | None = None
        self._pause_logged = False
        self._terminated = False
        self._output = bytearray()

    @property
    def exit_code(self) -> int | None:
        """The exit code of a process that has ended. None if it runs or was not started."""
        return None if self.process is None else self.process.poll()

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def spawn(self) -> None:
        """Start the process. Raises OSError."""
        program, logs = self.program, self._options.logs
        log = None if logs is None else (logs / f"{program.name}.log").open("ab")
        try:
            self.process = subprocess.Popen(
                list(program.command),
                cwd=self._options.folder,
                env=environment_with(self._heartbeat, program.environment),
                stdin=subprocess.DEVNULL,
                stdout=log or subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent(),  # safe here: this process has one thread
            )
        finally:
            if log is not None:
                log.close()
        self._started_at = self._options.clock()
        self._aborted_at, self._pause_logged = None, False
        if self._heartbeat is not None:
            self._heartbeat.begin(self._started_at)
        if self.process.stdout is not None:
            os.set_blocking(self.process.stdout.fileno(), False)
            self._selector.register(self.process.stdout, selectors.EVENT_READ, self._read)

    def spawn_if_due(self) -> None:
        """Start the process again if it is time to. If the system lacks a resource, schedule another try."""
        if self._options.clock() < self.restarts.at:
            return
        try:
            self.spawn()
        except OSError as error:
            self.process = None
            delay = self.restarts.after_failed_start(self._options.clock())
            reason = error.strerror or str(error)
            self._options.say(OWN_NAME, f"{self.program.name} cannot be started ({reason}); next try in {delay:g} s")

    def end_if_stalled(self, now: float, *, paused: bool) -> None:
        """End a process whose heartbeat is late: SIGABRT first, for stack traces of its threads, then SIGKILL.

        `paused` tells that this process itself was paused, so it could not read the heartbeats.
        """
        heartbeat = self._heartbeat
        if heartbeat is None or not self.running:
            return
        if paused:
            heartbeat.read(now)
            heartbeat.last_at = now
        if self._aborted_at is not None:
            if now - self._aborted_at >= ABORT_SECONDS:
                self._kill_group()
        elif heartbeat.overdue(now):
            self._end_overdue(heartbeat, now)

    def _end_overdue(self, heartbeat: Heartbeat, now: float) -> None:
        if self.process is None:
            return
        name, say = self.program.name, self._options.say
        if not heartbeat.triggered and _is_stopped(self.process.pid):
            if not self._pause_logged:
                say(OWN_NAME, f"{name} was stopped by a signal and does nothing until SIGCONT")
            self._pause_logged, heartbeat.last_at = True, now
            return
        self._aborted_at = now
        silent = now - heartbeat.last_at
        reason = "reports that it is stalled" if heartbeat.triggered else f"was stalled for {silent:.0f} s"
        say(OWN_NAME, f"{name} {reason}: ending it")
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGABRT)

    def terminate(self) -> None:
        """Ask the process to end, once."""
        if self.process is not None and self.running and not self._terminated:
            self.process.terminate()
            self._terminated = True

    def kill(self) -> None:
        """Kill the process and its whole group, and wait for it."""
        if self.process is not None:
            self._kill_group()
            self.process.wait()

    def clean_up(self) -> None:
        """End what an exited process left in its group, and pass on the rest of its output."""
        self.kill()
        self._close_output()
        self.process = None

    def schedule_restart(self, code: int) -> bool:
        """Schedule the next start after an exit. Return False if the program has refused its settings too often."""
        name, now = self.program.name, self._options.clock()
        delay = self.restarts.after_exit(code, now - self._started_at, now)
        if delay is None:
            text = f"{name} refuses its settings (exit code {code}, {REFUSALS} times): stopping"
        else:
            text = f"{name} {_exit_text(code)}; restart in {delay:g} s"
        self._options.say(OWN_NAME, text)
        return delay is not None

    def _kill_group(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError, PermissionError):  # macOS raises PermissionError for an ended group
                os.killpg(self.process.pid, signal.SIGKILL)

    def _read(self) -> bool:
        """Pass on what the process wrote. Return False if there was nothing to read."""
        pipe = None if self.process is None else self.process.stdout
        if pipe is None or pipe.closed:
            return False
        try:
            chunk = os.read(pipe.fileno(), LONGEST_LINE)
        except BlockingIOError:
            return False
        if not chunk:
            self._close_output(read=False)
            return False
        self._output += chunk
        *lines, rest = self._output.split(b"\n")
        if len(rest) >= LONGEST_LINE:
            lines, rest = [*lines, rest], bytearray()
        self._output = bytearray(rest)
        for line in lines:
            self._options.say(self.program.name, line.decode("utf-8", "replace").rstrip("\r"))
        return True

    def _close_output(self, *, read: bool = True) -> None:
        pipe = None if self.process is None else self.process.stdout
        if pipe is None or pipe.closed:
            return
        while read and self._read():
            pass
        if not pipe.closed:
            self._selector.unregister(pipe)
            pipe.close()
        if self._output:
            self._options.say(self.program.name, self._output.decode("utf-8", "replace"))
            self._output.clear()


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


def _is_stopped(pid: int) -> bool:
    """Return whether a signal or a debugger stopped the process. Always False outside Linux."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")  # the process name before it may contain any character


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
