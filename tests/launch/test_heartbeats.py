"""Heartbeats of real processes: one that sends none in time is ended and started again."""

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from worker.launch.procfile import Program, merged_environment
from worker.launch.supervised_process import OWN_NAME, Timing
from worker.launch.supervisor import Supervisor

QUICK = Timing(first_restart=0.02, longest_restart=0.05, stop_seconds=5.0)
IMPORTS = "import ctypes, os, signal, socket, sys, time\nfrom worker.system.watchdog import notify\n"


class Run:
    """A supervisor with one program, and the lines that it wrote."""

    def __init__(
        self, folder: Path, code: str, *, watched: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.lines: list[str] = []
        self.supervisor = Supervisor(
            folder, lambda name, line: self.lines.append(f"{name}: {line}"), timing=QUICK, clock=clock
        )
        text = (sys.executable, "-c", IMPORTS + code)
        self.program = Program("worker", text, merged_environment(None), watched=watched)

    def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> bool:
        """Run until the condition holds. Return whether it did."""
        return self.supervisor.wait_until(condition, seconds, 0.1)

    def has_line(self, text: str, times: int = 1) -> bool:
        """Return whether at least this many lines contain the text."""
        return sum(text in line for line in self.lines) >= times

    @property
    def pid(self) -> int:
        """The id of the current process."""
        process = self.supervisor._processes[0].process
        return 0 if process is None else process.pid


@contextmanager
def running(folder: Path, code: str, *, watched: bool = True) -> Iterator[Run]:
    run = Run(folder, code, watched=watched)
    with run.supervisor:
        run.supervisor.start(run.program)
        yield run


BEAT = "notify('WATCHDOG_USEC=1000000', 'WATCHDOG=1'); print('started', flush=True)\n"
KEEP_BEATING = BEAT + "while True: time.sleep(0.2); notify('WATCHDOG=1')\n"
HOLD_GIL = "ctypes.PyDLL(None).sleep(1000)\n"  # C code that does not release the GIL


def test_a_process_that_holds_the_gil_is_ended_with_a_stack_trace_and_restarted(tmp_path: Path) -> None:
    code = "import faulthandler; faulthandler.enable()\n" + BEAT + HOLD_GIL
    with running(tmp_path, code) as run:
        assert run.until(lambda: run.has_line("started", 2))
    assert run.has_line("worker was stalled for 1 s: ending it")
    assert run.has_line("was killed by SIGABRT; restart")
    assert run.has_line('File "<string>", line'), "the log has the stack traces of its threads"


def test_a_catastrophic_regular_expression_is_ended_too(tmp_path: Path) -> None:
    with running(tmp_path, BEAT + "import re; re.match('(a|a)*b', 'a' * 64)\n") as run:
        assert run.until(lambda: run.has_line("started", 2))


def test_a_process_that_does_not_end_by_sigabrt_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, "signal.signal(signal.SIGABRT, signal.SIG_IGN)\n" + BEAT + HOLD_GIL) as run:
        assert run.until(lambda: run.has_line("started", 2))
    assert run.has_line("was killed by SIGKILL")


def test_a_process_that_reports_a_stall_is_ended_at_once(tmp_path: Path) -> None:
    code = "notify('WATCHDOG_USEC=900000000', 'WATCHDOG=1'); print('started', flush=True); notify('WATCHDOG=trigger')\n"
    with running(tmp_path, code + "time.sleep(1000)\n") as run:
        assert run.until(lambda: run.has_line("started", 2), 15)
    assert run.has_line("worker reports that it is stalled: ending it")


def test_a_process_that_keeps_sending_heartbeats_is_left_alone(tmp_path: Path) -> None:
    with running(tmp_path, KEEP_BEATING) as run:
        assert run.until(lambda: run.has_line("started"))
        assert not run.until(lambda: bool(run.supervisor.exits), 3.0)


def test_a_process_that_never_sent_a_heartbeat_is_not_watched(tmp_path: Path) -> None:
    """This is the case for beat, Flower and other programs in an operator's Procfile."""
    with running(tmp_path, "print('started', flush=True); time.sleep(1000)\n") as run:
        assert run.until(lambda: run.has_line("started"))
        assert not run.until(lambda: bool(run.supervisor.exits), 2.5)


def test_a_program_that_is_not_watched_gets_neither_our_socket_nor_that_of_systemd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    show = "print([os.environ.get(name) for name in ('NOTIFY_SOCKET', 'WATCHDOG_USEC')], flush=True); time.sleep(60)\n"
    with running(tmp_path, show, watched=False) as run:
        assert run.until(lambda: run.has_line("worker: [None, None]"))
    with running(tmp_path, show) as run:
        assert run.until(lambda: run.has_line("worker: ["))
    assert not run.has_line("/run/systemd/notify")


@pytest.mark.skipif(sys.platform != "linux", reason="a stopped process is detected on Linux only")
def test_a_process_that_was_stopped_by_a_signal_is_left_alone_and_watched_again_after_sigcont(tmp_path: Path) -> None:
    with running(tmp_path, KEEP_BEATING) as run:
        assert run.until(lambda: run.has_line("started"))
        os.kill(run.pid, signal.SIGSTOP)
        assert run.until(lambda: run.has_line("was stopped by a signal"))
        assert not run.until(lambda: bool(run.supervisor.exits), 2.5)
        os.kill(run.pid, signal.SIGCONT)
        assert not run.until(lambda: bool(run.supervisor.exits), 1.5)


def test_a_supervisor_that_was_paused_itself_ends_no_process(tmp_path: Path) -> None:
    """The terminal was paused or the host was suspended."""
    now = [0.0]
    run = Run(tmp_path, KEEP_BEATING, clock=lambda: time.monotonic() + now[0])
    with run.supervisor:
        run.supervisor.start(run.program)
        assert run.until(lambda: run.has_line("started"))
        now[0] += 3_600
        assert not run.until(lambda: bool(run.supervisor.exits), 2.0)


def test_if_no_socket_can_be_made_processes_run_unwatched_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_folder = tmp_path / ("x" * 120)
    long_folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long_folder))
    with running(tmp_path, "print('started', os.environ.get('NOTIFY_SOCKET'), flush=True); time.sleep(60)\n") as run:
        assert run.until(lambda: run.has_line("started None"))
    assert run.has_line(f"{OWN_NAME}: no watchdog: cannot make its socket")


def test_a_supervisor_that_systemd_watches_sends_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
