"""`fetch-worker up` on a real terminal: a few lines until it is ready, then silence until something happens."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launch.test_up import environment
from tests.servers import free_port

pytestmark = [pytest.mark.every_python, pytest.mark.usefixtures("interruptible")]

SECONDS = 120.0  # for processes that start within ten on an idle machine
BANNER = """\
# stands in for worker.app
release: python -c "print('migrated')"
worker: python -c "import time; print('[tasks]'); print('worker@here ready.', flush=True); time.sleep(60)"
"""


class Screen:
    """What `up` has written to its terminal."""

    def __init__(self, process: "subprocess.Popen[bytes]", terminal: int) -> None:
        self.process, self._terminal, self._text = process, terminal, ""

    @property
    def lines(self) -> list[str]:
        """The lines without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self._text).splitlines()

    def wait_for(self, text: str) -> None:
        """Read until a line contains the text."""
        deadline = time.monotonic() + SECONDS
        while not any(text in line for line in self.lines):
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self._text}"
            self.read()

    def read(self) -> None:
        """Read what has been written, for up to a tenth of a second."""
        if select.select([self._terminal], [], [], 0.1)[0]:
            try:
                self._text += os.read(self._terminal, 65_536).decode()
            except OSError:  # the terminal is closed
                time.sleep(0.1)

    def stop(self) -> int:
        """Press Ctrl-C, and return the exit code."""
        self.process.send_signal(signal.SIGINT)
        while self.process.poll() is None:
            self.read()
        self.read()
        return self.process.wait()


@contextmanager
def running_up(folder: Path, *options: str, **settings: str) -> Iterator[Screen]:
    """Run `up` in this folder, on a terminal of its own, with an API address at which nothing answers."""
    terminal, inside = pty.openpty()
    loopback = {"SD_API_URL": "http://127.0.0.1:1/api/v3", "STORAGE_URL": f"file:{folder}", "LOG_FORMAT": "auto"}
    with subprocess.Popen(
        [sys.executable, "-c", "from worker.cli import main; main()", "up", *options],
        cwd=folder,
        env=environment(loopback | settings),
        stdin=subprocess.DEVNULL,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    ) as process:
        os.close(inside)
        try:
            yield Screen(process, terminal)
        finally:
            process.terminate()
            process.wait(SECONDS)
            os.close(terminal)


def process_of(argument: str, folder: Path) -> int:
    """Return the id of a process of this folder that has an argument with this begin."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_text().split("\0")
            if (process / "cwd").resolve() == folder and any(text.startswith(argument) for text in arguments):
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"no process with {argument} in {folder}")


def test_given_the_real_processes_when_up_runs_then_six_lines_say_what_runs_and_a_dead_process_is_reported(
    tmp_path: Path,
) -> None:
    port = free_port()
    with running_up(
        tmp_path, SD_API_KEYS='{"shop": "a-secret-key-1", "lab": "a-secret-key-2"}', FLOWER_PORT=str(port)
    ) as up:
        up.wait_for("ready after")
        until_ready = up.lines[:]
        os.kill(process_of("downloads@", tmp_path), signal.SIGKILL)
        up.wait_for("downloads is ready again")
        assert up.stop() == 0

    text = "\n".join(until_ready)
    assert len(until_ready) <= 7, text
    assert "up        | starts worker, downloads, beat, flower, an embedded Redis on sqlite:///var/worker.db" in text
    assert "up        | accounts with a key: lab, shop" in text
    assert re.search(
        rf"flower    \| shows jobs and tasks at http://127\.0\.0\.1:{port}; log in as admin with \S+", text
    )
    assert "serves the page for operators at http://127.0.0.1:5556/" in text
    assert "a-secret" not in text
    later = [line.partition("| ")[2] for line in up.lines[len(until_ready) :] if line.startswith("up ")]
    assert later == [
        "downloads was killed by SIGKILL; restart in 1 s",
        "downloads is ready again",
        "stopping; a second signal kills at once",
    ]


def test_given_verbose_when_up_runs_then_the_terminal_shows_every_line(tmp_path: Path) -> None:
    (tmp_path / "Procfile").write_text(BANNER)

    with running_up(tmp_path, "--verbose") as up:
        up.wait_for("ready after")

    assert "worker  | [tasks]" in up.lines
    assert any("Ready to accept connections" in line for line in up.lines)


def test_given_a_process_that_ends_before_it_is_ready_when_up_runs_then_the_terminal_shows_its_output(
    tmp_path: Path,
) -> None:
    (tmp_path / "Procfile").write_text("worker: python -c \"print('no worker.app'); raise SystemExit(3)\"\n")

    with running_up(tmp_path) as up:
        up.wait_for("worker ended with exit code 3; restart in 1 s")

    lines = [line.partition("| ")[2] for line in up.lines]
    assert lines.index("no worker.app") < lines.index("worker ended with exit code 3; restart in 1 s")
    assert not any(line.startswith("redis") for line in up.lines)


def test_given_stdout_that_is_no_terminal_when_up_runs_then_every_line_goes_to_it(tmp_path: Path) -> None:
    (tmp_path / "Procfile").write_text(BANNER)

    with subprocess.Popen(
        [sys.executable, "-c", "from worker.cli import main; main()", "up"],
        cwd=tmp_path,
        env=environment({"LOG_FORMAT": "json"}),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        while "ready after" not in lines[-1]:
            lines.append(process.stdout.readline())
        process.send_signal(signal.SIGINT)

    assert any('"event": "[tasks]"' in line for line in lines)
    assert any("Ready to accept connections" in line for line in lines)
    assert '"process": "up"' in lines[-1]
