"""The demo as a user runs it: a process of its own, real parts, files at the end, and nothing left running."""

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
MOST_SECONDS = 75.0
MARK = "DEMO_TEST"

pytestmark = [
    pytest.mark.every_python,
    pytest.mark.usefixtures("interruptible"),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc"),
]


@dataclass(frozen=True, slots=True)
class World:
    """A place to run demos in, and the mark that all their processes carry."""

    folder: Path
    mark: str

    def start(self, *words: str, **environment: str) -> "subprocess.Popen[str]":
        """Starts a demo as from a shell whose environment is full of settings for something else."""
        return subprocess.Popen(
            [*DEMO, "--longest", "2", "--folder", str(self.folder / "demo"), *words],
            cwd=self.folder,
            env={**os.environ, MARK: self.mark, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def processes(self) -> list[int]:
        """The living processes with the mark."""
        found: list[int] = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"{MARK}={self.mark}".encode() in entry.read_bytes():
                    found.append(int(entry.parent.name))
            except OSError:
                continue
        return found


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("w"), secrets.token_hex(8))
    yield world
    for pid in world.processes():
        os.kill(pid, signal.SIGKILL)


def test_the_demo_stores_every_picture_lists_it_on_the_page_and_leaves_no_process(world: World) -> None:
    """Settings of the surroundings have no say: with these nothing would work."""
    (world.folder / ".env").write_text("SD_API_RPS=nonsense\n")
    foreign = {"DATABASE_URL": "postgresql://127.0.0.1:1/x", "REDIS_URL": "redis://127.0.0.1:1", "PORT": "1"}

    with world.start("--jobs", "3", **foreign, POLL_POLICEY="x", STORAGE_URI="s3://x", SD_API_KEY="foreign") as demo:
        said = demo.communicate(timeout=MOST_SECONDS)[0]

    folder = world.folder / "demo"
    page = (folder / "contact-sheet.html").read_text()
    files = sorted((folder / "outputs").rglob("*.png"))
    assert demo.returncode == 0, said
    assert len(files) >= 3
    assert [path.name for path in (folder / "outputs" / ".partial").iterdir()] == []
    assert all(file.read_bytes().startswith(PNG) for file in files)
    assert sorted(set(re.findall(r'src="(outputs/[^"]+)"', page))) == sorted(str(f.relative_to(folder)) for f in files)
    assert "://" not in re.sub(r"<code>.*?</code>", "", page)
    assert (folder / "contact-sheet.html").as_uri() in said
    assert re.search(r"http://127\.0\.0\.1:\d+ \(user admin, password \S+\)", said)
    assert not world.processes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_end_in_the_middle_it_leaves_nothing_running(world: World, number: signal.Signals) -> None:
    with world.start("--no-flower") as demo:
        wait_until(lambda: len(world.processes()) >= 5, "five processes run")
        demo.send_signal(number)
        said = demo.communicate(timeout=MOST_SECONDS)[0]

    assert demo.returncode == 130
    assert "Traceback" not in said
    assert not world.processes()


def test_killed_in_the_middle_it_leaves_nothing_running(world: World) -> None:
    with world.start("--no-flower") as demo:
        wait_until(lambda: len(world.processes()) >= 5, "five processes run")
        demo.kill()

    wait_until(lambda: not world.processes(), "no process is left")


def test_a_part_that_dies_ends_the_demo_with_its_last_words(world: World) -> None:
    with world.start("--no-flower") as demo:
        pid_file = world.folder / "demo" / "redis" / "server.pid"
        wait_until(lambda: len(world.processes()) >= 5 and pid_file.exists(), "five processes run, Redis among them")
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        said = demo.communicate(timeout=MOST_SECONDS)[0]

    assert demo.returncode == 1
    assert "redis ended unexpectedly" in said
    assert "Traceback" not in said
    assert not world.processes()


def test_a_folder_with_something_in_it_is_refused(world: World) -> None:
    (world.folder / "demo").mkdir()
    (world.folder / "demo" / "mine.txt").touch()

    with world.start() as demo:
        said = demo.communicate(timeout=MOST_SECONDS)[0]

    assert demo.returncode == 2
    assert "is not empty" in said
