"""Names that web apps and operators rely on do not change by accident."""

from pathlib import Path

import pytest

from tests.public.faces import FACES

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Path:
    """The file that holds one part of the public face."""
    return GOLDEN / f"{name}.txt"


@pytest.mark.parametrize("name", FACES)
def test_the_public_face_is_the_one_that_is_written_down(name: str) -> None:
    """Where a change is meant, `python -m tests.public` writes the files anew; the changelog then names the change."""
    assert FACES[name]() == golden(name).read_text()


def test_every_golden_file_is_compared() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(FACES)
