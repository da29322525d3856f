"""The public interface does not change by accident."""

from pathlib import Path

import pytest

from tests.public.faces import FACES

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Path:
    """Return the golden file of one part of the public interface."""
    return GOLDEN / f"{name}.txt"


@pytest.mark.parametrize("name", FACES)
def test_the_public_interface_equals_its_golden_file(name: str) -> None:
    """For an intended change, run `python -m tests.public` and add the change to the changelog."""
    assert FACES[name]() == golden(name).read_text()


def test_every_golden_file_is_compared() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(FACES)
