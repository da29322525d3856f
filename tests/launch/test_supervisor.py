"""The supervisor with small real processes: start, restart, stop, and no process left behind."""

import os
import resource
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_until
from worker.launch.procfile import Line, Program, merged_environment, program
from worker.launch.supervised_process import Timing
from worker.launch.supervisor import Supervisor

pytestmark = pytest.mark.every_python

QUICK = Timing(first_restart=0.02, longest_restart=0.05, stop_seconds=60.0)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can kill children when the parent dies")
TIMEOUT_SECONDS = 60.0


class Messages:
    """Collects what the supervisor says, as (name, line)."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str]] = []

    def __call__(self, name: str, text: str) -> None:
        self.entries.append((name, text))

    def of(self, name: str) -> list[str]:
        return [text for source, text in self.entries if source == name]


@pytest.fixture
def messages() -> Messages:
    return Messages()


@pytest.fixture
def marker(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A marker in the environment of all processes of a test. None of them may be left afterwards."""
    value = secrets.token_hex(8)
    monkeypatch.setenv("SUPERVISOR_TEST", value)
    yield value
    wait_until(lambda: not marked_processes(value), "no process of the test is left")


def marked_processes(value: str) -> list[int]:
    """Return the processes that were started with the marker, except this one."""
    pids: list[int] = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SUPERVISOR_TEST={value}".encode() in entry.read_bytes():
                pids.append(int(entry.parent.name))
        except OSError:
            continue
    return [pid for pid in pids if pid != os.getpid()]


def python_program(name: str, code: str) -> Program:
    return Program(name, (sys.executable, "-c", code), merged_environment(None))


def stops_after(supervisor: Supervisor, condition: Callable[[], bool]) -> int:
    """Run until the condition holds, then stop as after SIGTERM. Return the exit code."""
    assert supervisor.wait_until(condition, TIMEOUT_SECONDS, 0.02)
    os.kill(os.getpid(), signal.SIGTERM)
    return supervisor.run()


def test_output_lines_are_passed_on_with_the_name_of_the_process(
    tmp_path: Path, messages: Messages, marker: str
) -> None:
    with Supervisor(tmp_path, messages, timing=QUICK) as supervisor:
        line = Line("shell", "A=b sh -c 'echo $A; echo two >&2; printf three'")
        supervisor.start(program(line, merged_environment(None)))
        code = stops_after(supervisor, lambda: bool(supervisor.exits))

    assert code == 0
    assert messages.of("shell")[:3] == ["b", "two", "three"]


def test_with_a_log_folder_each_process_writes_its_own_file(tmp_path: Path, messages: Messages, marker: str) -> None:
    with Supervisor(tmp_path, messages, logs=tmp_path, timing=QUICK) as supervisor:
        supervisor.start(python_program("talker", "print('hello', flush=True); import time; time.sleep(60)"))
        stops_after(supervisor, lambda: "hello\n" in (tmp_path / "talker.log").read_text())

    assert messages.of("talker") == []


def test_a_process_that_dies_is_restarted_and_its_exit_code_is_reported(
    tmp_path: Path, messages: Messages, marker: str
) -> None:
    with Supervisor(tmp_path, messages, timing=QUICK) as supervisor:
        supervisor.start(python_program("dies", "raise SystemExit(7)"))
        supervisor.start(python_program("killed", "import os; os.kill(os.getpid(), 9)"))
        stops_after(supervisor, lambda: min(supervisor.exits.get(name, 0) for name in ("dies", "killed")) >= 3)

    log_lines = messages.of("up")
    assert "dies ended with exit code 7; restart in 0.02 s" in log_lines
    assert "dies ended with exit code 7; restart in 0.04 s" in log_lines
    assert "killed was killed by SIGKILL; restart in 0.05 s" in log_lines


def test_after_a_long_uptime_the_shortest_delay_applies_again(tmp_path: Path, messages: Messages, marker: str) -> None:
    timing = Timing(first_restart=0.02, longest_restart=1.0, reset_after=0.0)

    with Supervisor(tmp_path, messages, timing=timing) as supervisor:
        supervisor.start(python_program("dies", "raise SystemExit(1)"))
        stops_after(supervisor, lambda: supervisor.exits.get("dies", 0) >= 3)

    assert [text for text in messages.of("up") if "restart" in text and "0.02" not in text] == []


def test_a_process_that_was_asked_to_end_is_restarted_with_the_shortest_delay(
    tmp_path: Path, messages: Messages, marker: str
) -> None:
    timing = Timing(first_restart=0.02, longest_restart=1.0, min_uptime=0.0)

    with Supervisor(tmp_path, messages, timing=timing) as supervisor:
        supervisor.start(python_program("polite", "raise SystemExit(0)"))
        stops_after(supervisor, lambda: supervisor.exits.get("polite", 0) >= 4)

    assert [text for text in messages.of("up") if "restart" in text and "0.02" not in text] == []


def test_while_one_process_crashes_the_others_keep_running(tmp_path: Path, messages: Messages, marker: str) -> None:
    with Supervisor(tmp_path, messages, timing=QUICK) as supervisor:
        supervisor.start(python_program("lives", "print('up', flush=True); import time; time.sleep(60)"))
        supervisor.start(python_program("dies", "raise SystemExit(1)"))
        stops_after(supervisor, lambda: supervisor.exits.get("dies", 0) >= 3 and bool(messages.of("lives")))

    assert messages.of("lives") == ["up"]


def test_given_no_free_file_descriptor_when_a_program_must_restart_then_it_restarts_later_and_the_others_keep_running(
    tmp_path: Path, messages: Messages, marker: str
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Supervisor(tmp_path, messages, timing=QUICK) as supervisor:
        supervisor.start(python_program("lives", "import time; print('up', flush=True); time.sleep(60)"))
        supervisor.start(python_program("dies", "raise SystemExit(1)"))
        assert supervisor.wait_until(lambda: bool(messages.of("lives")), TIMEOUT_SECONDS, 0.02)
        try:
            lowest_free = os.dup(0)
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
            refused = supervisor.wait_until(
                lambda: any("dies cannot be started" in text for text in messages.of("up")), TIMEOUT_SECONDS, 0.02
            )
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        failures = supervisor.exits["dies"]
        assert refused
        assert supervisor.wait_until(lambda: supervisor.exits["dies"] > failures + 1, TIMEOUT_SECONDS, 0.02)

    assert messages.of("lives") == ["up"]


def test_repeated_wrong_settings_stop_everything_with_exit_code_2(
    tmp_path: Path, messages: Messages, marker: str
) -> None:
    with Supervisor(tmp_path, messages, timing=QUICK) as supervisor:
        supervisor.start(python_program("lives", "import time; time.sleep(60)"))
        supervisor.start(python_program("refuses", "raise SystemExit(2)"))
        code = supervisor.run()

    assert code == 2
    assert any("refuses its settings" in text for text in messages.of("up"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_is_passed_on_as_sigterm(
    tmp_path: Path, messages: Messages, marker: str, number: signal.Signals
) -> None:
    polite = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), sys.exit(0)))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    with Supervisor(tmp_path, messages, timing=QUICK) as supervisor:
        supervisor.start(python_program("polite", polite))
        assert supervisor.wait_until(lambda: messages.of("polite") == ["ready"], TIMEOUT_SECONDS, 0.02)
        os.kill(os.getpid(), number)
        code = supervisor.run()

    assert code == 0
    assert messages.of("polite") == ["ready", "asked"]


STUBBORN = (
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: print('no', flush=True))\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "print('ready', flush=True)\nwhile True: time.sleep(60)"
)


def test_a_process_that_does_not_end_in_time_is_killed_with_its_children(
    tmp_path: Path, messages: Messages, marker: str
) -> None:
    with Supervisor(tmp_path, messages, timing=Timing(stop_seconds=0.3)) as supervisor:
        supervisor.start(python_program("stubborn", STUBBORN))
        code = stops_after(supervisor, lambda: messages.of("stubborn") == ["ready"])

    assert code == 0
    assert messages.of("stubborn") == ["ready", "no"]


def test_a_second_signal_kills_at_once(tmp_path: Path, messages: Messages, marker: str) -> None:
    with Supervisor(tmp_path, messages, timing=Timing(stop_seconds=600.0)) as supervisor:
        supervisor.start(python_program("stubborn", STUBBORN))
        assert supervisor.wait_until(lambda: messages.of("stubborn") == ["ready"], TIMEOUT_SECONDS, 0.02)
        os.kill(os.getpid(), signal.SIGTERM)

        def refuses() -> bool:
            supervisor.step(0.02)
            return "no" in messages.of("stubborn")

        wait_until(refuses, "it refuses to end")
        os.kill(os.getpid(), signal.SIGINT)
        assert supervisor.run() == 0


def test_a_program_that_others_need_ends_after_them(tmp_path: Path, messages: Messages, marker: str) -> None:
    slow = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), print('ended', flush=True), sys.exit(0)))\n"
        "print('ready', flush=True)\nwhile True: time.sleep(60)"
    )
    needed = Program("needed", (sys.executable, "-c", slow.replace("0.2", "0")), merged_environment(None), True)

    with Supervisor(tmp_path, messages, timing=QUICK) as supervisor:
        supervisor.start(needed)
        supervisor.start(python_program("slow", slow))
        stops_after(supervisor, lambda: messages.of("slow") == ["ready"] == messages.of("needed"))

    assert [name for name, text in messages.entries if text == "ended"] == ["slow", "needed"]


def test_an_error_inside_the_block_leaves_no_process_and_restores_the_signal_handlers(
    tmp_path: Path, messages: Messages, marker: str
) -> None:
    previous = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]

    def fail() -> None:
        with Supervisor(tmp_path, messages, timing=QUICK) as supervisor:
            supervisor.start(python_program("lives", "import time; time.sleep(60)"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)] == previous


def test_a_program_that_runs_once_returns_its_exit_code(tmp_path: Path, messages: Messages, marker: str) -> None:
    with Supervisor(tmp_path, messages, timing=QUICK) as supervisor:
        code = supervisor.run_once(python_program("release", "print('migrated'); raise SystemExit(3)"))

    assert code == 3
    assert messages.of("release") == ["migrated"]


@LINUX
def test_when_the_supervisor_is_killed_no_process_survives(tmp_path: Path, marker: str) -> None:
    code = (
        "from pathlib import Path\nfrom worker.launch.procfile import *\nfrom worker.launch.supervisor import *\n"
        "with Supervisor(Path('.'), lambda name, text: print(text, flush=True)) as supervisor:\n"
        "    env = merged_environment(None)\n"
        "    supervisor.start(program(Line('a', 'sh -c \"echo ready; exec sleep 60\"'), env))\n"
        "    supervisor.run()"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        wait_until(
            lambda: len(marked_processes(marker)) == 2, "both processes run"
        )  # one of them may still be the shell
        process.kill()

    wait_until(lambda: not marked_processes(marker), "no process is left")
