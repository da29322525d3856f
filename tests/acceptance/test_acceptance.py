"""The acceptance programs in small, each in a process of its own, as anybody runs them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.stand import postgresql_answers
from tests.servers import missing

REPO = Path(__file__).parents[2]


def accept(folder: Path, *words: str) -> None:
    database = "postgresql" if postgresql_answers() else "sqlite"
    program = [sys.executable, "-m", "tests.acceptance", *words, "--database", database, "--keep", str(folder / "kept")]
    done = subprocess.run(program, cwd=REPO, text=True, capture_output=True, timeout=110)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["main-job", "--jobs", "50", "--slowest", "6"], id="the main job"),
        pytest.param(
            ["kills", "--jobs", "30", "--slowest", "5", "--kills", "1", "--recovery-seconds", "5"], id="one kill"
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
    accept(tmp_path, "admin", "--rows", "2000")
