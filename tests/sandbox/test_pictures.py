"""The drawn pictures are valid PNG files, equal for equal prompts, and different for different ones."""

import struct
import zlib

import pytest

from worker.sandbox.files import file_name
from worker.sandbox.pictures import MAX_SIZE, MIN_SIZE, draw, subject
from worker.sandbox.scenes import SCENES

SCENE_PROMPTS = {
    "mountains": "an eagle over the alps in winter",
    "lake": "aurora over a lake",
    "sea": "waves and a ship at night",
    "meadow": "spring flowers by a farm",
    "silk": "abstract silk",
}


def pixels(png: bytes) -> tuple[int, int, bytes]:
    """Return width, height and uncompressed lines of a PNG, after checking every length and checksum."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, position = [], 8
    while position < len(png):
        (length,) = struct.unpack_from(">I", png, position)
        chunk = png[position + 4 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", png, position + 8 + length)
        assert zlib.crc32(chunk) == checksum
        chunks.append((chunk[:4], chunk[4:]))
        position += 12 + length
    assert position == len(png)
    assert [name for name, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colours, *flags = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, colours, flags) == (8, 2, [0, 0, 0])
    lines = zlib.decompress(chunks[1][1])
    assert len(lines) == height * (1 + width * 3)
    assert set(lines[:: 1 + width * 3]) == {0}
    return width, height, lines


@pytest.mark.parametrize(("scene", "prompt"), SCENE_PROMPTS.items(), ids=SCENE_PROMPTS)
def test_every_scene_is_a_valid_png_with_many_colours(scene: str, prompt: str) -> None:
    """Each scene is chosen by common words, and none is a single colour."""
    assert subject(prompt).scene == scene

    width, height, lines = pixels(draw(prompt, "12202888", 0, 128))

    assert (width, height) == (128, 128)
    assert len({lines[position : position + 3] for position in range(1, len(lines) - 3, 37)}) > 60


def test_the_table_has_a_prompt_for_every_scene() -> None:
    """A new scene needs a prompt in the table."""
    assert set(SCENE_PROMPTS) == set(SCENES)


@pytest.mark.parametrize("prompt", SCENE_PROMPTS.values(), ids=SCENE_PROMPTS)
@pytest.mark.parametrize("size", [MIN_SIZE, 17, 33, 100])
def test_unusual_sizes_are_drawn(prompt: str, size: int) -> None:
    """No size draws outside the canvas."""
    assert pixels(draw(prompt, "7", 3, size))[:2] == (size, size)


@pytest.mark.parametrize("size", [0, MIN_SIZE - 1, MAX_SIZE + 1])
def test_a_size_out_of_range_is_refused(size: int) -> None:
    """This prevents gigabyte pictures by accident."""
    with pytest.raises(ValueError, match="pixels wide"):
        draw("sea", "1", 0, size)


def test_the_same_prompt_id_and_index_give_the_same_bytes() -> None:
    """Downloads can be compared with a picture that is drawn again."""
    assert draw("sunset", "1", 0, 64) == draw("sunset", "1", 0, 64)


def test_prompt_id_and_index_each_change_the_picture() -> None:
    """All outputs look different."""
    cases = [("sunset sea", "1", 0), ("sunset lake", "1", 0), ("sunset sea", "2", 0), ("sunset sea", "1", 1)]

    assert len({draw(*case, 64) for case in cases}) == len(cases)


@pytest.mark.parametrize("prompt", ["", "   ", "日本の山", "\ud800", "x" * 10_000, "a cat with a hat"])
def test_any_text_gives_a_picture(prompt: str) -> None:
    """A text without keywords is drawn by its hash."""
    assert pixels(draw(prompt, "1", 0, 32))[:2] == (32, 32)


def test_file_names_are_fixed_and_differ_by_seed_family_id_and_index() -> None:
    """A name is safe in a URL and belongs to one output of one seed."""
    names = {
        file_name(*parts, index=index, extension="png")
        for *parts, index in (
            (0, "v3", "1", 0),
            (1, "v3", "1", 0),
            (0, "v6", "1", 0),
            (0, "v3", "2", 0),
            (0, "v3", "1", 1),
        )
    }

    assert len(names) == 5
    assert file_name(0, "v3", "1", index=0, extension="png") in names
    assert all(name.replace("-", "").removesuffix(".png").isalnum() for name in names)
