"""Runs small versions of the acceptance programs, each in a separate process."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.acceptance.deployment import postgresql_answers
from tests.servers import missing

REPO = Path(__file__).parents[2]


def accept(folder: Path, *arguments: str) -> None:
    database = "postgresql" if postgresql_answers() else "sqlite"
    program = [
        sys.executable,
        "-m",
        "tests.acceptance",
        *arguments,
        "--database",
        database,
        "--keep",
        str(folder / "kept"),
    ]
    log = folder / "accept.log"
    with log.open("wb") as out:
        process = subprocess.Popen(program, cwd=REPO, stdout=out, stderr=out, start_new_session=True)
    try:
        code = process.wait(270)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its child processes, if it did not finish
        process.wait()
    print(log.read_text())
    assert code == 0, log.read_text()[-8_000:]


@pytest.mark.parametrize(
    "arguments",
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
        pytest.param(["track-races"], id="one job tracked a hundred times at once"),
        pytest.param(["canary-key"], id="the key appears nowhere"),
    ],
)
def test_an_acceptance_program_passes(arguments: list[str], tmp_path: Path) -> None:
    """The programs use only the environment, Procfile, task names, tables and command."""
    accept(tmp_path, *arguments)


@pytest.mark.server
def test_the_admin_pages_are_fast_and_show_no_secret(tmp_path: Path) -> None:
    """A small version; the program is meant for a million rows."""
    if not postgresql_answers():
        missing("PostgreSQL")
    accept(tmp_path, "admin", "--rows", "2000", "--page-milliseconds", "3000")


@pytest.mark.long
def test_every_family_is_stored_in_every_way_of_tracking(tmp_path: Path) -> None:
    """Takes about two minutes, because an unknown id is polled for a minute."""
    accept(tmp_path, "families")
