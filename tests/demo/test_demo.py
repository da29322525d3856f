"""The demo as a user runs it: a separate process, real servers, stored files, and no process left behind."""

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.waiting import wait_until

DEMO = (sys.executable, "-c", "from worker.cli import main; main()", "demo")
PNG = b"\x89PNG\r\n\x1a\n"
TIMEOUT_SECONDS = 75.0
MARKER = "DEMO_TEST"

pytestmark = [
    pytest.mark.every_python,
    pytest.mark.usefixtures("interruptible"),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
]


@dataclass(frozen=True, slots=True)
class DemoRunner:
    """A folder to run demos in, and the marker in the environment of all their processes."""

    folder: Path
    mark: str

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """Start a demo in an environment that has settings for other programs."""
        return subprocess.Popen(
            [*DEMO, "--longest", "2", "--folder", str(self.folder / "demo"), *arguments],
            cwd=self.folder,
            env={**os.environ, MARKER: self.mark, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def processes(self) -> list[int]:
        """Return the running processes with the marker."""
        pids: list[int] = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"{MARKER}={self.mark}".encode() in entry.read_bytes():
                    pids.append(int(entry.parent.name))
            except OSError:
                continue
        return pids


@pytest.fixture
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoRunner]:
    runner = DemoRunner(tmp_path_factory.mktemp("w"), secrets.token_hex(8))
    yield runner
    for pid in runner.processes():
        os.kill(pid, signal.SIGKILL)


def test_the_demo_stores_every_picture_shows_it_on_the_page_and_leaves_no_process(runner: DemoRunner) -> None:
    """Settings in the environment and in a .env file have no effect. With them nothing would work."""
    (runner.folder / ".env").write_text("SD_API_RPS=nonsense\n")
    foreign = {"DATABASE_URL": "postgresql://127.0.0.1:1/x", "REDIS_URL": "redis://127.0.0.1:1", "PORT": "1"}

    with runner.start("--jobs", "3", **foreign, POLL_POLICEY="x", STORAGE_URI="s3://x", SD_API_KEY="foreign") as demo:
        output = demo.communicate(timeout=TIMEOUT_SECONDS)[0]

    folder = runner.folder / "demo"
    page = (folder / "contact-sheet.html").read_text()
    files = sorted((folder / "outputs").rglob("*.png"))
    assert demo.returncode == 0, output
    assert len(files) >= 3
    assert [path.name for path in (folder / "outputs" / ".partial").iterdir()] == []
    assert all(file.read_bytes().startswith(PNG) for file in files)
    assert sorted(set(re.findall(r'src="(outputs/[^"]+)"', page))) == sorted(str(f.relative_to(folder)) for f in files)
    assert "://" not in re.sub(r"<code>.*?</code>", "", page)
    assert (folder / "contact-sheet.html").as_uri() in output
    assert re.search(r"http://127\.0\.0\.1:\d+ \(user admin, password \S+\)", output)
    assert not runner.processes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_demo_and_leaves_no_process(runner: DemoRunner, number: signal.Signals) -> None:
    with runner.start("--no-flower") as demo:
        wait_until(lambda: len(runner.processes()) >= 5, "five processes run")
        demo.send_signal(number)
        output = demo.communicate(timeout=TIMEOUT_SECONDS)[0]

    assert demo.returncode == 130
    assert "Traceback" not in output
    assert not runner.processes()


def test_killing_the_demo_leaves_no_process(runner: DemoRunner) -> None:
    with runner.start("--no-flower") as demo:
        wait_until(lambda: len(runner.processes()) >= 5, "five processes run")
        demo.kill()

    wait_until(lambda: not runner.processes(), "no process is left")


def test_a_process_that_dies_ends_the_demo_with_an_error(runner: DemoRunner) -> None:
    with runner.start("--no-flower") as demo:
        pid_file = runner.folder / "demo" / "redis" / "server.pid"
        wait_until(lambda: len(runner.processes()) >= 5 and pid_file.exists(), "five processes run, Redis among them")
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        output = demo.communicate(timeout=TIMEOUT_SECONDS)[0]

    assert demo.returncode == 1
    assert "redis ended unexpectedly" in output
    assert "Traceback" not in output
    assert not runner.processes()


def test_a_folder_that_is_not_empty_is_refused(runner: DemoRunner) -> None:
    (runner.folder / "demo").mkdir()
    (runner.folder / "demo" / "mine.txt").touch()

    with runner.start() as demo:
        output = demo.communicate(timeout=TIMEOUT_SECONDS)[0]

    assert demo.returncode == 2
    assert "is not empty" in output
