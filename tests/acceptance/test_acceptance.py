"""The acceptance programs in small, each in a process of its own, as anybody runs them."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.acceptance.stand import postgresql_answers
from tests.servers import missing

REPO = Path(__file__).parents[2]


def accept(folder: Path, *words: str) -> None:
    database = "postgresql" if postgresql_answers() else "sqlite"
    program = [sys.executable, "-m", "tests.acceptance", *words, "--database", database, "--keep", str(folder / "kept")]
    log = folder / "accept.log"
    with log.open("wb") as out:
        process = subprocess.Popen(program, cwd=REPO, stdout=out, stderr=out, start_new_session=True)
    try:
        code = process.wait(270)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started, where it was cut off
        process.wait()
    print(log.read_text())
    assert code == 0, log.read_text()[-8_000:]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["main-job", "--jobs", "50", "--slowest", "6"], id="the main job"),
        pytest.param(
            [
                "kills",
                "--jobs",
                "30",
                "--slowest",
                "5",
                "--kills",
                "1",
                "--recovery-seconds",
                "5",
                "--restart-seconds",
                "60",
            ],
            id="one kill",
        ),
        pytest.param(["track-races"], id="the same job tracked a hundred times at once"),
        pytest.param(["canary-key"], id="a key that is looked for everywhere"),
    ],
)
def test_the_product_keeps_its_promises_when_driven_from_outside(words: list[str], tmp_path: Path) -> None:
    """Environment, Procfile, task names, tables and command are all that is used."""
    accept(tmp_path, *words)


@pytest.mark.server
def test_the_page_for_operators_is_quick_and_shows_nothing_secret(tmp_path: Path) -> None:
    """In small; what it is for is a million rows."""
    if not postgresql_answers():
        missing("PostgreSQL")
    accept(tmp_path, "admin", "--rows", "2000", "--page-milliseconds", "3000")


@pytest.mark.long
def test_every_family_is_stored_in_every_way_of_tracking(tmp_path: Path) -> None:
    """Some two minutes, nearly all of them waiting: an unknown id has a minute of patience."""
    accept(tmp_path, "families")
