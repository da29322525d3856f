"""Draws the picture for a prompt. The same prompt, id, index and size always give the same PNG. Pure, no I/O."""

import re
from colorsys import hls_to_rgb, rgb_to_hls
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from worker.sandbox.canvas import Colour
from worker.sandbox.scenes import SCENES, Mood, Palette

MIN_SIZE, MAX_SIZE = 16, 1024

_WORD = re.compile(r"[a-z]+")

_MOODS = {
    "dawn": Mood("dawn", Palette.of("3b4a86", "d79aa8", "ffe2bd", "fff3d8", "2a2748"), 0.46, 0.0),
    "day": Mood("day", Palette.of("2f7fc4", "86c0e8", "eaf5f4", "fffbe8", "12363f"), 0.2, 0.0),
    "sunset": Mood("sunset", Palette.of("35205c", "d1476a", "ffb65a", "fff0b8", "1b0e26"), 0.44, 0.05),
    "dusk": Mood("dusk", Palette.of("10183c", "5f4b8f", "f39c8f", "ffe6d0", "0d0f26"), 0.5, 0.3),
    "night": Mood("night", Palette.of("040817", "0e2148", "37618a", "f6f2dc", "03060f"), 0.2, 1.0),
    "mist": Mood("mist", Palette.of("7d9097", "b3bfbf", "e6e7df", "fffdf2", "24323a"), 0.3, 0.0),
    "aurora": Mood("aurora", Palette.of("050b22", "0c2b44", "1f6b6b", "7df7b4", "030a12"), 0.15, 1.0),
    "ember": Mood("ember", Palette.of("22070f", "8f2420", "ff9a3f", "fff0a8", "16060a"), 0.5, 0.15),
    "spring": Mood("spring", Palette.of("3fa9b5", "a9dfd0", "fff6da", "fffdf0", "0f4a45"), 0.26, 0.0),
    "candy": Mood("candy", Palette.of("5b55cf", "ef8fc8", "ffe3ea", "fffaf0", "2c1c52"), 0.34, 0.15),
}
_MOOD_WORDS = {
    "dawn": "dawn sunrise morning early awakening soft pastel",
    "day": "day noon summer sunny bright blue clear sky beach tropical island",
    "sunset": "sunset evening golden gold orange warm autumn fall",
    "dusk": "dusk twilight violet purple lavender calm",
    "night": "night moon moonlight midnight stars starry dark star",
    "mist": "mist fog foggy misty rain storm cloudy grey gray winter snow snowy ice",
    "aurora": "aurora borealis northern polar arctic neon",
    "ember": "fire lava volcano dragon mars red hell ember burning apocalypse",
    "spring": "spring fresh green turquoise teal mint meadow garden",
    "candy": "candy pink magic fairy unicorn dream dreamy anime cyberpunk vaporwave",
}
_SCENE_WORDS = {
    "mountains": "mountain mountains alps peak peaks hill cliff canyon valley volcano rock castle dragon eagle",
    "lake": "lake river reflection pond mirror fjord calm water swan",
    "sea": "sea ocean beach coast ship boat sail wave waves island harbour harbor lighthouse whale",
    "forest": "forest tree trees wood woods pine jungle fox wolf deer bear cabin owl",
    "city": "city skyline town street tokyo york building buildings cyberpunk neon skyscraper car",
    "desert": "desert dune dunes sahara sand camel egypt pyramid mars",
    "space": "space planet galaxy nebula astronaut cosmos universe rocket saturn alien robot",
    "meadow": "meadow field flower flowers garden spring tulip rose horse village farm countryside",
    "flow": "abstract swirl flow silk marble liquid smoke music pattern texture portrait face fluid ink",
}
_DEFAULT_MOODS = ("dawn", "sunset", "dusk", "night", "day", "candy", "spring")
_DEFAULT_SCENES = ("mountains", "lake", "sea", "forest", "meadow", "flow", "desert", "space")


@dataclass(frozen=True, slots=True)
class Subject:
    """Scene and mood for a prompt."""

    scene: str
    mood: str
    hue_shift: float
    words: frozenset[str]


def subject(prompt: str) -> Subject:
    """Choose scene and mood by keywords in the prompt, or by its hash if it has none."""
    words = _WORD.findall(prompt.lower())
    rng = _rng(f"subject|{prompt}")
    scene = _first_match(words, _SCENE_WORDS) or rng.choice(_DEFAULT_SCENES)
    mood = _first_match(words, _MOOD_WORDS) or rng.choice(_DEFAULT_MOODS)
    return Subject(scene, mood, rng.uniform(-0.035, 0.035), frozenset(words))


def _first_match(words: list[str], table: dict[str, str]) -> str | None:
    for word in words:
        for name, keywords in table.items():
            if word in keywords.split():
                return name
    return None


def draw(prompt: str, job_id: str, index: int, size: int) -> bytes:
    """Return the PNG for one output of a job, `size` pixels wide and high."""
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"a picture is {MIN_SIZE} to {MAX_SIZE} pixels wide, not {size}")
    chosen = subject(prompt)
    rng = _rng(f"{prompt}|{job_id}|{index}")
    mood = _MOODS[chosen.mood]
    shift = partial(_shift_hue, chosen.hue_shift + rng.uniform(-0.015, 0.015))
    mood = replace(mood, palette=mood.palette.map_colours(shift))
    return SCENES[chosen.scene](size, mood, rng, chosen.words).png()


def _rng(seed: str) -> Random:
    return Random(seed.encode("utf-8", "surrogatepass"))  # a prompt from JSON may contain a lone surrogate


def _shift_hue(shift: float, colour: Colour) -> Colour:
    hue, light, saturation = rgb_to_hls(*(value / 255 for value in colour))
    red, green, blue = hls_to_rgb((hue + shift) % 1.0, light, saturation)
    return (red * 255, green * 255, blue * 255)
