"""Draws the picture for a prompt. The same prompt, id, index and size always give the same PNG. Pure, no I/O."""

import re
from random import Random
from typing import NamedTuple

from worker.sandbox.scenes import SCENES, Mood, mix

MIN_SIZE, MAX_SIZE = 16, 1024

_SCENE_WORDS = {
    "mountains": "mountain mountains alps peak peaks hill hills cliff canyon valley volcano rock castle dragon eagle "
    "forest tree trees wood woods pine jungle fox wolf deer bear cabin owl desert dune dunes sahara pyramid",
    "lake": "lake river reflection pond mirror fjord calm water swan",
    "sea": "sea ocean beach coast ship boat sail wave waves island harbour harbor lighthouse whale",
    "meadow": "meadow field flower flowers garden spring tulip rose horse village farm countryside",
    "silk": "abstract swirl flow silk marble liquid smoke music pattern texture portrait face fluid city space neon",
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
_MOODS = {  # colours of the sky from top to horizon, of the light and of the ground; height of the light; stars
    "dawn": ("3b4a86 d79aa8 ffe2bd fff3d8 2a2748", 0.46, 0.0),
    "day": ("2f7fc4 86c0e8 eaf5f4 fffbe8 12363f", 0.2, 0.0),
    "sunset": ("35205c d1476a ffb65a fff0b8 1b0e26", 0.44, 0.05),
    "dusk": ("10183c 5f4b8f f39c8f ffe6d0 0d0f26", 0.5, 0.3),
    "night": ("040817 0e2148 37618a f6f2dc 03060f", 0.2, 1.0),
    "mist": ("7d9097 b3bfbf e6e7df fffdf2 24323a", 0.3, 0.0),
    "aurora": ("050b22 0c2b44 1f6b6b 7df7b4 030a12", 0.15, 1.0),
    "ember": ("22070f 8f2420 ff9a3f fff0a8 16060a", 0.5, 0.15),
    "spring": ("3fa9b5 a9dfd0 fff6da fffdf0 0f4a45", 0.26, 0.0),
    "candy": ("5b55cf ef8fc8 ffe3ea fffaf0 2c1c52", 0.34, 0.15),
}


class Subject(NamedTuple):
    """Scene and mood for a prompt."""

    scene: str
    mood: str


def subject(prompt: str) -> Subject:
    """Choose scene and mood by keywords in the prompt, or by its hash if it has none."""
    words = re.findall("[a-z]+", prompt.lower())
    rng = Random(ascii(prompt))  # ascii() because a prompt from JSON may contain a lone surrogate
    scene = _first_match(words, _SCENE_WORDS) or rng.choice(list(SCENES))
    return Subject(scene, _first_match(words, _MOOD_WORDS) or rng.choice(list(_MOODS)))


def _first_match(words: list[str], table: dict[str, str]) -> str | None:
    matches = (name for word in words for name, keywords in table.items() if word in keywords.split())
    return next(matches, None)


def draw(prompt: str, job_id: str, index: int, size: int) -> bytes:
    """Return the PNG for one output of a job, `size` pixels wide and high."""
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"a picture is {MIN_SIZE} to {MAX_SIZE} pixels wide, not {size}")
    scene, mood = subject(prompt)
    rng = Random(ascii((prompt, job_id, index)))
    colours, light_height, stars = _MOODS[mood]
    tint = [rng.uniform(0, 255) for _ in range(3)]
    top, middle, horizon, light, ground = (mix(bytes.fromhex(colour), tint, 0.07) for colour in colours.split())
    return SCENES[scene](size, Mood(top, middle, horizon, light, ground, light_height, stars), rng).png()
