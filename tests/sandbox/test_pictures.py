"""The drawn pictures are whole PNG files, the same for the same words, and different for different ones."""

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
    "forest": "a fox in the misty forest",
    "city": "city street, neon",
    "desert": "egypt, golden pyramid",
    "space": "saturn and stars",
    "meadow": "spring flowers by a farm",
    "flow": "abstract silk",
}


def pixels(png: bytes) -> tuple[int, int, bytes]:
    """Width, height and unpacked lines of a PNG, after a look at every length and checksum in it."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = [], 8
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        named = png[place + 4 : place + 8 + length]
        (checksum,) = struct.unpack_from(">I", png, place + 8 + length)
        assert zlib.crc32(named) == checksum
        chunks.append((named[:4], named[4:]))
        place += 12 + length
    assert place == len(png)
    assert [name for name, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colours, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, colours, rest) == (8, 2, [0, 0, 0])
    lines = zlib.decompress(chunks[1][1])
    assert len(lines) == height * (1 + width * 3)
    assert set(lines[:: 1 + width * 3]) == {0}
    return width, height, lines


@pytest.mark.parametrize(("scene", "prompt"), SCENE_PROMPTS.items(), ids=SCENE_PROMPTS)
def test_every_scene_is_a_whole_png_with_many_colours(scene: str, prompt: str) -> None:
    """Each scene is reached by plain words, and none of them comes out flat."""
    assert subject(prompt).scene == scene

    width, height, lines = pixels(draw(prompt, "12202888", 0, 128))

    assert (width, height) == (128, 128)
    assert len({lines[place : place + 3] for place in range(1, len(lines) - 3, 37)}) > 60


def test_all_scenes_are_tried_above() -> None:
    """A new scene wants a prompt in the table."""
    assert set(SCENE_PROMPTS) == set(SCENES)


@pytest.mark.parametrize("prompt", SCENE_PROMPTS.values(), ids=SCENE_PROMPTS)
@pytest.mark.parametrize("size", [MIN_SIZE, 17, 33, 100])
def test_odd_and_tiny_sizes_are_drawn(prompt: str, size: int) -> None:
    """No size trips over the edge of the canvas."""
    assert pixels(draw(prompt, "7", 3, size))[:2] == (size, size)


@pytest.mark.parametrize("size", [0, MIN_SIZE - 1, MAX_SIZE + 1])
def test_a_size_out_of_bounds_is_refused(size: int) -> None:
    """Nobody draws a picture of a gigabyte by accident."""
    with pytest.raises(ValueError, match="pixels wide"):
        draw("sea", "1", 0, size)


def test_the_same_words_id_and_index_give_the_same_bytes() -> None:
    """Downloads can be compared with a picture drawn again."""
    assert draw("sunset", "1", 0, 64) == draw("sunset", "1", 0, 64)


def test_prompt_id_and_index_each_change_the_picture() -> None:
    """No two outputs look alike."""
    cases = [("sunset sea", "1", 0), ("sunset lake", "1", 0), ("sunset sea", "2", 0), ("sunset sea", "1", 1)]

    assert len({draw(*case, 64) for case in cases}) == len(cases)


@pytest.mark.parametrize("prompt", ["", "   ", "日本の山", "\ud800", "x" * 10_000, "a cat with a hat"])
def test_any_text_gets_some_picture(prompt: str) -> None:
    """Words that nobody knows choose by their hash."""
    assert pixels(draw(prompt, "1", 0, 32))[:2] == (32, 32)


def test_names_of_pictures_are_fixed_and_differ_by_seed_family_id_and_index() -> None:
    """A name is safe in a URL and belongs to one output of one seed."""
    names = {
        file_name(*words, index=index, extension="png")
        for *words, index in (
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
