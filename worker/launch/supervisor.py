"""Process supervisor: starts the processes of a Procfile, restarts those that die, and stops all of them on a signal.

It runs one loop in one thread. The loop sleeps until a process writes a line, a process dies, a signal arrives or a
restart is due. Each process leads its own session, so Ctrl-C reaches only the supervisor. On Linux the kernel kills
the processes if the supervisor itself is killed.
"""

import selectors
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from worker.launch.heartbeats import Heartbeat, HeartbeatSockets, OwnHeartbeat
from worker.launch.procfile import Program
from worker.launch.supervised_process import OWN_NAME, REFUSED, RunOptions, Say, SupervisedProcess, Timing

TICK_SECONDS = 1.0  # the loop wakes up on events, and at least this often
PAUSE_SECONDS = 5.0  # the loop runs every second; a longer gap means that this process itself was paused

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
        self._options = RunOptions(folder, say, logs, timing or Timing(), clock)
        self._processes: list[SupervisedProcess] = []
        self._stop_by: float | None = None
        self._code = 0
        self._selector = selectors.DefaultSelector()
        self._cleanup = ExitStack()
        self.stop_signals = 0
        self.exits = Counter[str]()
        sockets = HeartbeatSockets()
        self._cleanup.callback(sockets.close)
        self._heartbeats: HeartbeatSockets | None = sockets  # None if they can't be made
        self._own_heartbeat = OwnHeartbeat(clock())
        self._checked_at = clock()

    def __enter__(self) -> Self:
        wake, woken = socket.socketpair()
        for end in (wake, woken):
            end.setblocking(False)
            self._cleanup.callback(end.close)
        self._cleanup.callback(self._selector.close)
        self._selector.register(woken, selectors.EVENT_READ, lambda: _drain(woken))
        previous = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._cleanup.callback(signal.set_wakeup_fd, previous)
        for number in _STOP_SIGNALS:
            self._cleanup.callback(signal.signal, number, signal.signal(number, self._on_stop_signal))
        # The SIGCHLD handler does nothing: the signal only has to wake the loop.
        self._cleanup.callback(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, lambda *_: None))
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._cleanup:
            try:
                self.stop()
                self._run_until_empty()
            finally:
                for process in self._processes:
                    process.kill()

    @property
    def stopping(self) -> bool:
        """Whether the programs are asked to end."""
        return self._stop_by is not None or self.stop_signals > 0

    def start(self, program: Program) -> None:
        """Start a program and keep it running."""
        heartbeat = self._new_heartbeat(program) if program.watched else None
        process = SupervisedProcess(program, self._options, self._selector, heartbeat)
        self._processes.append(process)
        process.spawn()

    def run_once(self, program: Program) -> int | None:
        """Run a program until it ends. Return its exit code, or None if the supervisor was stopped in the meantime."""
        process = SupervisedProcess(program, self._options, self._selector, None)
        process.spawn()
        while not self.stop_signals and process.running:
            self._sleep(TICK_SECONDS)
        code = process.exit_code
        process.clean_up()
        return code

    def run(self) -> int:
        """Keep everything running until a stop. Return the exit code: 0, or 2 if a program refuses its settings."""
        self._run_until_empty()
        return self._code

    def stop(self) -> None:
        """Ask all programs to end. Those still running after the time limit are killed."""
        if self._stop_by is None:
            self._stop_by = self._options.clock() + self._options.timing.stop_seconds
            self._apply_stop()

    def step(self, seconds: float) -> None:
        """Wait up to this many seconds for an event and handle it."""
        self._sleep(seconds)
        self._apply_stop()
        self._end_stalled()
        for process in list(self._processes):
            code = process.exit_code
            if code is not None:
                self._after_exit(process, code)
            elif process.process is None and self._stop_by is None:
                process.spawn_if_due()

    def wait_until(self, condition: Callable[[], bool], seconds: float, interval: float) -> bool:
        """Run until the condition holds, the time is over or a stop signal comes. Return whether it holds."""
        deadline = self._options.clock() + seconds
        while not (holds := condition()) and not self.stop_signals and self._options.clock() < deadline:
            self.step(interval)
        return holds

    def _on_stop_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signals += 1

    def _run_until_empty(self) -> None:
        while self._processes:
            self.step(TICK_SECONDS)

    def _sleep(self, seconds: float) -> None:
        now = self._options.clock()
        due = [process.restarts.at - now for process in self._processes if process.process is None]
        if self._stop_by is not None:
            due.append(self._stop_by - now)
        for key, _ in self._selector.select(max(0.0, min([seconds, *due]))):
            key.data()
        self._own_heartbeat.send_if_due(self._options.clock())

    def _new_heartbeat(self, program: Program) -> Heartbeat | None:
        """Make a heartbeat socket for a watched program. Without one the program runs unwatched."""
        if self._heartbeats is None:
            return None
        try:
            heartbeat = self._heartbeats.new(program.name)
        except OSError as error:
            self._options.say(OWN_NAME, f"no watchdog: cannot make its socket ({error.strerror or error})")
            self._heartbeats = None
            return None
        self._selector.register(heartbeat.socket, selectors.EVENT_READ, lambda: heartbeat.read(self._options.clock()))
        return heartbeat

    def _end_stalled(self) -> None:
        now = self._options.clock()
        paused, self._checked_at = now - self._checked_at > PAUSE_SECONDS, now
        if self._stop_by is None:
            for process in self._processes:
                process.end_if_stalled(now, paused=paused)

    def _after_exit(self, process: SupervisedProcess, code: int) -> None:
        process.clean_up()
        if self._stop_by is not None:
            self._processes.remove(process)
            return
        self.exits[process.program.name] += 1
        if not process.schedule_restart(code):
            self._code = REFUSED
            self._processes.remove(process)
            self.stop()

    def _apply_stop(self) -> None:
        clock, stop_seconds = self._options.clock, self._options.timing.stop_seconds
        if self.stop_signals and self._stop_by is None:
            self._stop_by = clock() + stop_seconds
            self._options.say(OWN_NAME, "stopping; a second signal kills at once")
        if self._stop_by is None:
            return
        self._processes = [process for process in self._processes if process.process is not None]
        if self.stop_signals > 1 or clock() >= self._stop_by:
            for process in self._processes:
                process.kill()
            self._stop_by = clock() + stop_seconds
            return
        others = [process for process in self._processes if not process.program.outlives]
        for process in others or self._processes:
            process.terminate()


def _drain(sock: socket.socket) -> None:
    with suppress(BlockingIOError):
        sock.recv(4_096)
