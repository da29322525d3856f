"""The supervisor, with small real processes: starts, restarts, stops, and leaves nothing behind."""

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
from worker.errors import SettingsError
from worker.launch.supervisor import (
    Line,
    Program,
    Supervisor,
    Timing,
    merged_environment,
    own_procfile,
    program,
    read_procfile,
)

pytestmark = pytest.mark.every_python

QUICK = Timing(first_restart=0.02, longest_restart=0.05, stop_seconds=60.0)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel is asked for it on Linux alone")
MOST_SECONDS = 60.0


class Words:
    """What was said, as (name, line)."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def __call__(self, name: str, text: str) -> None:
        self.said.append((name, text))

    def of(self, name: str) -> list[str]:
        return [text for who, text in self.said if who == name]


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A mark in the environment of all processes of a test; none of them may be there afterwards."""
    value = secrets.token_hex(8)
    monkeypatch.setenv("SUPERVISOR_TEST", value)
    yield value
    wait_until(lambda: not marked(value), "no process of the test is left")


def marked(value: str) -> list[int]:
    """The processes that were started with the mark, but for this one."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SUPERVISOR_TEST={value}".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def python(name: str, code: str) -> Program:
    return Program(name, (sys.executable, "-c", code), merged_environment(None))


def stops_after(supervisor: Supervisor, condition: Callable[[], bool]) -> int:
    """Runs on until the condition holds, then as after a SIGTERM; the exit code."""
    assert supervisor.wait_until(condition, MOST_SECONDS, 0.02)
    os.kill(os.getpid(), signal.SIGTERM)
    return supervisor.run()


# ── what to run ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_procfile_is_read_line_by_line_without_blank_lines_and_comments(tmp_path: Path) -> None:
    procfile = tmp_path / "Procfile"
    procfile.write_text("# ours\nrelease: fetch-worker migrate\n\nweb-1:gunicorn 'a b' --port $PORT \n")

    assert read_procfile(procfile) == [
        Line("release", "fetch-worker migrate"),
        Line("web-1", "gunicorn 'a b' --port $PORT"),
    ]


@pytest.mark.parametrize("text", ["worker celery", "worker:", ": celery", "a: true\na: true"])
def test_a_line_that_is_none_is_refused_with_its_number(tmp_path: Path, text: str) -> None:
    (tmp_path / "Procfile").write_text(text)

    with pytest.raises(SettingsError, match=r"Procfile, line \d"):
        read_procfile(tmp_path / "Procfile")


def test_our_own_procfile_is_found_without_a_checkout_as_working_directory() -> None:
    assert "worker" in [line.name for line in read_procfile(own_procfile())]


def test_the_dotenv_file_fills_the_environment_up_and_the_real_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("SD_API_KEY=from-file\nOF_THE_APP='a b'\nTAKEN=file\nEMPTY=file\nsd_api_rps=7\n")
    for name, value in (("TAKEN", "real"), ("EMPTY", ""), ("SD_API_RPS", "5")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SD_API_KEY", raising=False)

    merged = merged_environment(tmp_path / ".env")

    wanted = {"SD_API_KEY": "from-file", "OF_THE_APP": "a b", "TAKEN": "real", "EMPTY": "file", "SD_API_RPS": "5"}
    assert wanted.items() <= merged.items()
    assert "sd_api_rps" not in merged
    assert merged["FETCH_WORKER_DOTENV"] == "off"


def test_programs_of_our_own_environment_are_found_first() -> None:
    assert merged_environment(None)["PATH"].startswith(f"{Path(sys.executable).parent}{os.pathsep}")


@pytest.mark.parametrize(("name", "gets"), [("worker", True), ("downloads", False), ("release", False)])
def test_the_keys_go_to_the_process_named_worker_alone(name: str, gets: bool) -> None:
    keys = {"SD_API_KEY": "k1", "SD_API_KEYS": '{"a": "k2"}', "sd_api_key": "k3"}

    started = program(Line(name, "true"), {**keys, "OTHER": "x"})

    assert started.environment == ({**keys, "OTHER": "x"} if gets else {"OTHER": "x"})


@pytest.mark.parametrize(
    ("deaths", "seconds"),
    [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 16),
        (6, 30),  # 32 is more than the longest
        (10_000, 30),
    ],
)
def test_restarts_wait_longer_and_longer_up_to_a_bound(deaths: int, seconds: float) -> None:
    assert Timing().restart_delay(deaths) == seconds


# ── running it ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lines_of_a_process_are_said_with_its_name_as_they_come(tmp_path: Path, words: Words, mark: str) -> None:
    with Supervisor(tmp_path, words, timing=QUICK) as supervisor:
        line = Line("shell", "A=b sh -c 'echo $A; echo two >&2; printf three'")
        supervisor.start(program(line, merged_environment(None)))
        code = stops_after(supervisor, lambda: bool(supervisor.exits))

    assert code == 0
    assert words.of("shell")[:3] == ["b", "two", "three"]


def test_with_a_folder_for_logs_each_process_writes_a_file_of_its_own(tmp_path: Path, words: Words, mark: str) -> None:
    with Supervisor(tmp_path, words, logs=tmp_path, timing=QUICK) as supervisor:
        supervisor.start(python("talker", "print('hello', flush=True); import time; time.sleep(60)"))
        stops_after(supervisor, lambda: "hello\n" in (tmp_path / "talker.log").read_text())

    assert words.of("talker") == []


def test_what_dies_is_started_again_and_its_exit_code_is_told(tmp_path: Path, words: Words, mark: str) -> None:
    with Supervisor(tmp_path, words, timing=QUICK) as supervisor:
        supervisor.start(python("dies", "raise SystemExit(7)"))
        supervisor.start(python("killed", "import os; os.kill(os.getpid(), 9)"))
        stops_after(supervisor, lambda: min(supervisor.exits.get(name, 0) for name in ("dies", "killed")) >= 3)

    told = words.of("up")
    assert "dies ended with exit code 7; restart in 0.02 s" in told
    assert "dies ended with exit code 7; restart in 0.04 s" in told
    assert "killed was killed by SIGKILL; restart in 0.05 s" in told


def test_after_a_steady_life_the_shortest_delay_applies_again(tmp_path: Path, words: Words, mark: str) -> None:
    steady = Timing(first_restart=0.02, longest_restart=1.0, reset_after=0.0)

    with Supervisor(tmp_path, words, timing=steady) as supervisor:
        supervisor.start(python("dies", "raise SystemExit(1)"))
        stops_after(supervisor, lambda: supervisor.exits.get("dies", 0) >= 3)

    assert [text for text in words.of("up") if "again" in text and "0.02" not in text] == []


def test_one_that_was_asked_to_end_is_started_again_at_once_each_time(tmp_path: Path, words: Words, mark: str) -> None:
    settled = Timing(first_restart=0.02, longest_restart=1.0, min_uptime=0.0)

    with Supervisor(tmp_path, words, timing=settled) as supervisor:
        supervisor.start(python("polite", "raise SystemExit(0)"))
        stops_after(supervisor, lambda: supervisor.exits.get("polite", 0) >= 4)

    assert [text for text in words.of("up") if "again" in text and "0.02" not in text] == []


def test_while_one_process_crashes_the_others_live(tmp_path: Path, words: Words, mark: str) -> None:
    with Supervisor(tmp_path, words, timing=QUICK) as supervisor:
        supervisor.start(python("lives", "print('up', flush=True); import time; time.sleep(60)"))
        supervisor.start(python("dies", "raise SystemExit(1)"))
        stops_after(supervisor, lambda: supervisor.exits.get("dies", 0) >= 3 and bool(words.of("lives")))

    assert words.of("lives") == ["up"]


def test_given_no_file_left_to_open_when_a_program_is_to_be_started_again_then_the_others_live_and_it_starts_later(
    tmp_path: Path, words: Words, mark: str
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Supervisor(tmp_path, words, timing=QUICK) as supervisor:
        supervisor.start(python("lives", "import time; print('up', flush=True); time.sleep(60)"))
        supervisor.start(python("dies", "raise SystemExit(1)"))
        assert supervisor.wait_until(lambda: bool(words.of("lives")), MOST_SECONDS, 0.02)
        try:
            lowest_free = os.dup(0)
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
            refused = supervisor.wait_until(
                lambda: any("dies cannot be started" in text for text in words.of("up")), MOST_SECONDS, 0.02
            )
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        deaths = supervisor.exits["dies"]
        assert refused
        assert supervisor.wait_until(lambda: supervisor.exits["dies"] > deaths + 1, MOST_SECONDS, 0.02)

    assert words.of("lives") == ["up"]


def test_wrong_settings_again_and_again_stop_everything_with_exit_code_2(
    tmp_path: Path, words: Words, mark: str
) -> None:
    with Supervisor(tmp_path, words, timing=QUICK) as supervisor:
        supervisor.start(python("lives", "import time; time.sleep(60)"))
        supervisor.start(python("refuses", "raise SystemExit(2)"))
        code = supervisor.run()

    assert code == 2
    assert any("refuses its settings" in text for text in words.of("up"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_as_a_polite_request(
    tmp_path: Path, words: Words, mark: str, number: signal.Signals
) -> None:
    polite = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), sys.exit(0)))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    with Supervisor(tmp_path, words, timing=QUICK) as supervisor:
        supervisor.start(python("polite", polite))
        assert supervisor.wait_until(lambda: words.of("polite") == ["ready"], MOST_SECONDS, 0.02)
        os.kill(os.getpid(), number)
        code = supervisor.run()

    assert code == 0
    assert words.of("polite") == ["ready", "asked"]


STUBBORN = (
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: print('no', flush=True))\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "print('ready', flush=True)\nwhile True: time.sleep(60)"
)


def test_who_does_not_end_in_time_is_killed_with_all_it_started(tmp_path: Path, words: Words, mark: str) -> None:
    with Supervisor(tmp_path, words, timing=Timing(stop_seconds=0.3)) as supervisor:
        supervisor.start(python("stubborn", STUBBORN))
        code = stops_after(supervisor, lambda: words.of("stubborn") == ["ready"])

    assert code == 0
    assert words.of("stubborn") == ["ready", "no"]


def test_a_second_signal_kills_at_once(tmp_path: Path, words: Words, mark: str) -> None:
    with Supervisor(tmp_path, words, timing=Timing(stop_seconds=600.0)) as supervisor:
        supervisor.start(python("stubborn", STUBBORN))
        assert supervisor.wait_until(lambda: words.of("stubborn") == ["ready"], MOST_SECONDS, 0.02)
        os.kill(os.getpid(), signal.SIGTERM)

        def refuses() -> bool:
            supervisor.step(0.02)
            return "no" in words.of("stubborn")

        wait_until(refuses, "it refuses to end")
        os.kill(os.getpid(), signal.SIGINT)
        assert supervisor.run() == 0


def test_what_others_need_ends_after_them(tmp_path: Path, words: Words, mark: str) -> None:
    slow = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), print('ended', flush=True), sys.exit(0)))\n"
        "print('ready', flush=True)\nwhile True: time.sleep(60)"
    )
    needed = Program("needed", (sys.executable, "-c", slow.replace("0.2", "0")), merged_environment(None), True)

    with Supervisor(tmp_path, words, timing=QUICK) as supervisor:
        supervisor.start(needed)
        supervisor.start(python("slow", slow))
        stops_after(supervisor, lambda: words.of("slow") == ["ready"] == words.of("needed"))

    assert [name for name, text in words.said if text == "ended"] == ["slow", "needed"]


def test_leaving_the_block_by_an_error_leaves_no_process_and_puts_the_signals_back(
    tmp_path: Path, words: Words, mark: str
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]

    def fail() -> None:
        with Supervisor(tmp_path, words, timing=QUICK) as supervisor:
            supervisor.start(python("lives", "import time; time.sleep(60)"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)] == before


def test_a_program_that_runs_once_gives_its_exit_code(tmp_path: Path, words: Words, mark: str) -> None:
    with Supervisor(tmp_path, words, timing=QUICK) as supervisor:
        code = supervisor.run_once(python("release", "print('migrated'); raise SystemExit(3)"))

    assert code == 3
    assert words.of("release") == ["migrated"]


@LINUX
def test_when_the_supervisor_is_killed_no_process_survives(tmp_path: Path, mark: str) -> None:
    code = (
        "from pathlib import Path\nfrom worker.launch.supervisor import *\n"
        "with Supervisor(Path('.'), lambda name, text: print(text, flush=True)) as supervisor:\n"
        "    env = merged_environment(None)\n"
        "    supervisor.start(program(Line('a', 'sh -c \"echo ready; exec sleep 60\"'), env))\n"
        "    supervisor.run()"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "ready\n"
        wait_until(lambda: len(marked(mark)) == 2, "both processes are there")  # one may just be between two programs
        killed.kill()

    wait_until(lambda: not marked(mark), "no process is left")
