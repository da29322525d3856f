"""The scenes that can be drawn, from mountains to folded silk. Pure: all randomness comes from the given `rng`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, hypot, pi, sin, sqrt
from random import Random

from worker.sandbox.canvas import Canvas, Colour, Ramp, gradient, hex_colour, mix, ramp, smooth_field

Scene = Callable[[int, "Mood", Random, frozenset[str]], Canvas]

_TONES = 10  # steps from the lit to the shaded side of a dune
_WHITE: Colour = (255.0, 255.0, 255.0)
_PETALS = (("e8425a", "ff8a5c", "fff1e6"), ("8c5bd6", "c9a0f0", "fff6ff"), ("ffd23f", "ff9f1c", "fffbe0"))


@dataclass(frozen=True, slots=True)
class Palette:
    """Five colours: sky from top to horizon, sun or moon, and the nearest ground."""

    top: Colour
    middle: Colour
    horizon: Colour
    light: Colour
    ground: Colour

    @classmethod
    def of(cls, top: str, middle: str, horizon: str, light: str, ground: str) -> "Palette":
        """Return a palette from five texts `rrggbb`."""
        return cls(*(hex_colour(text) for text in (top, middle, horizon, light, ground)))

    def map_colours(self, change: Callable[[Colour], Colour]) -> "Palette":
        """Return the palette with a function applied to each colour."""
        return Palette(
            change(self.top), change(self.middle), change(self.horizon), change(self.light), change(self.ground)
        )


@dataclass(frozen=True, slots=True)
class Mood:
    """Light and colours of a picture. Heights are fractions of the picture from the top."""

    name: str
    palette: Palette
    light_height: float
    stars: float


class Noise:
    """Smooth random values on a line or plane, interpolated from a lattice of random numbers."""

    __slots__ = ("_lattice",)

    def __init__(self, rng: Random) -> None:
        self._lattice = [rng.random() for _ in range(1024)]

    def at(self, x: float, y: float) -> float:
        """Return the value at a point, from 0 to 1. The lattice has one number per unit."""
        column, row = int(x // 1), int(y // 1)
        right, down = x - column, y - row
        right = right * right * (3 - 2 * right)
        down = down * down * (3 - 2 * down)
        lattice = self._lattice
        index = (column * 37 + row * 193) & 1023
        top = lattice[index] * (1 - right) + lattice[(index + 37) & 1023] * right
        bottom = lattice[(index + 193) & 1023] * (1 - right) + lattice[(index + 230) & 1023] * right
        return top * (1 - down) + bottom * down

    def cloud(self, x: float, y: float) -> float:
        """Return the sum of four octaves, from 0 to about 1."""
        return (
            self.at(x, y) * 0.53
            + self.at(x * 2.1 + 7, y * 2.1 + 3) * 0.27
            + self.at(x * 4.3 + 1, y * 4.3 + 9) * 0.14
            + self.at(x * 8.9 + 5, y * 8.9 + 2) * 0.06
        )


def _mountain_line(rng: Random, size: int, base: float, rise: float, rough: float) -> list[float]:
    """Return a mountain line by midpoint displacement: heights in pixels from the top, about `rise` around the base."""
    heights = [rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5)]
    swing = 0.7
    while len(heights) < size:
        finer: list[float] = []
        for left, right in pairwise(heights):
            finer += (left, (left + right) / 2 + rng.uniform(-swing, swing))
        heights = [*finer, heights[-1]]
        swing *= rough
    return [base + rise * height for height in heights[:size]]


def _hill_line(rng: Random, size: int, base: float, rise: float, waves: float) -> list[float]:
    """Return a line of soft hills."""
    pitches = ((0.6, rng.uniform(0.8, 1.2)), (0.3, rng.uniform(1.8, 2.4)), (0.12, rng.uniform(3.5, 4.6)))
    parts = [(rise * share, waves * pitch * 2 * pi / size, rng.uniform(0, 2 * pi)) for share, pitch in pitches]
    return [base + sum(part * sin(x * pitch + phase) for part, pitch, phase in parts) for x in range(size)]


def _sky(size: int, mood: Mood, rng: Random, horizon: float = 0.62) -> tuple[Canvas, float, float]:
    """Draw the sky with sun or moon, clouds and stars. Also return the position of the light in pixels."""
    palette, noise = mood.palette, Noise(rng)
    stops = ((0.0, palette.top), (horizon * 0.55, palette.middle), (horizon, palette.horizon), (1.0, palette.horizon))
    sun_x, sun_y = rng.uniform(0.24, 0.76), mood.light_height * rng.uniform(0.85, 1.12)
    is_low = mood.light_height > 0.3
    threshold = rng.uniform(0.44, 0.56)
    stretch = rng.uniform(2.0, 3.0)
    lit = mix(palette.light, palette.horizon, 0.35)
    offset = rng.random() * 50

    def values(x: float, y: float) -> Colour:
        colour = gradient(stops, y)
        distance = hypot(x - sun_x, (y - sun_y) * 1.15)
        glow = exp(-distance * (5.0 if is_low else 8.0)) * (0.9 if mood.stars < 0.5 else 0.5)
        thickness = noise.cloud(x * stretch + offset, y * stretch * 3.4) - threshold
        if thickness > 0 and mood.name != "aurora":
            share = min(1.0, thickness * 4.5) * max(0.0, 1 - y / horizon * 0.7) * (0.2 if mood.stars > 0.5 else 0.75)
            colour = mix(colour, mix(lit, palette.middle, min(1.0, distance * 1.3)), share)
        if mood.name == "aurora":
            colour = _aurora(colour, palette.light, noise, x, y, offset)
        return mix(colour, palette.light, min(1.0, glow))

    red, green, blue = smooth_field(size, values, 3)
    canvas = Canvas(size, (red, green, blue))
    _stars(canvas, rng, int(mood.stars * 170), horizon)
    radius = size * (rng.uniform(0.05, 0.075) if is_low else rng.uniform(0.035, 0.05))
    if mood.name != "aurora":
        canvas.disc(sun_x * size, sun_y * size, radius * 1.12, palette.light, 0.35)
        canvas.disc(sun_x * size, sun_y * size, radius, mix(palette.light, _WHITE, 0.4))
    return canvas, sun_x * size, sun_y * size


def _aurora(colour: Colour, light: Colour, noise: Noise, x: float, y: float, offset: float) -> Colour:
    for band, (tint, strength) in enumerate(((light, 0.85), ((90.0, 160.0, 255.0), 0.5), ((190.0, 90.0, 230.0), 0.4))):
        fold = 0.36 + 0.1 * band + 0.2 * (noise.at(x * 3 + offset + band * 9, band * 5.0) - 0.5) - 0.12 * x
        above = fold - y
        rays = 0.45 + 0.75 * noise.at(x * 17 + band * 31 + above * 2, offset)
        share = exp(-above * 5.5) * rays if above > 0 else exp(above * 34) * rays
        colour = mix(colour, tint, min(1.0, share * strength))
    return colour


def _stars(canvas: Canvas, rng: Random, count: int, horizon: float) -> None:
    size = canvas.size
    for _ in range(count):
        x, y = rng.randrange(size), int(rng.random() ** 1.3 * horizon * size)
        bright = rng.random() ** 2.2 * 0.85 + 0.15
        tint = mix(_WHITE, (170.0, 200.0, 255.0) if rng.random() < 0.6 else (255.0, 220.0, 180.0), 0.6)
        canvas.dot(x, y, tint, bright)
        canvas.dot(x, y + 1, tint, bright * 0.4)


def _ground_colour(mood: Mood, near: float) -> Colour:
    """Return the colour of the ground at a distance: 0 is the horizon, 1 is the viewer."""
    palette = mood.palette
    veil = mix(palette.horizon, palette.middle, 0.45)
    return gradient(((0.0, mix(veil, palette.middle, 0.3)), (0.55, mix(palette.middle, palette.ground, 0.62)),
                     (1.0, palette.ground)), near)  # fmt: skip


def _misty_ramp(mood: Mood, near: float, length: int, mist: float = 0.5) -> Ramp:
    """Return a ramp for ground that is clear at its ridge and fades into mist below."""
    ridge = _ground_colour(mood, near)
    valley = mix(ridge, mix(mood.palette.horizon, mood.palette.middle, 0.35), mist * (1.0 - near * 0.85))
    return ramp(((0.0, ridge), (0.34, valley), (1.0, valley)), length)


def _flat_ramp(colour: Colour, length: int) -> Ramp:
    return ramp(((0.0, colour), (1.0, colour)), length)


def mountains(size: int, mood: Mood, rng: Random, words: frozenset[str]) -> Canvas:
    """Draw ranges of mountains behind each other, with mist between them."""
    canvas, _, _ = _sky(size, mood, rng)
    _ranges(canvas, mood, rng, first=0.46, last=0.93, count=6)
    return canvas


def _ranges(canvas: Canvas, mood: Mood, rng: Random, *, first: float, last: float, count: int) -> None:
    size = canvas.size
    for step in range(count):
        near = step / (count - 1)
        edge = _mountain_line(rng, size, size * (first + (last - first) * near), size * (0.17 - 0.09 * near), 0.52)
        canvas.fill_below(edge, _misty_ramp(mood, near, size))
    _trees(canvas, mood, rng, edge, count=30, height=0.075, near=1.0)


def lake(size: int, mood: Mood, rng: Random, words: frozenset[str]) -> Canvas:
    """Draw mountains that are reflected in still water."""
    canvas, _, _ = _sky(size, mood, rng, horizon=0.5)
    line = int(size * rng.uniform(0.56, 0.62))
    _ranges(canvas, mood, rng, first=0.38, last=line / size - 0.015, count=4)
    canvas.mirror(line, mix(mood.palette.middle, mood.palette.ground, 0.5), 0.28)
    _ripples(canvas, rng, line, mix(mood.palette.horizon, mood.palette.light, 0.4), 240)
    shore = [max(edge, size * 0.9) for edge in _hill_line(rng, size, size * 0.985, size * 0.05, 0.7)]
    canvas.fill_below(shore, _flat_ramp(mood.palette.ground, size))
    return canvas


def sea(size: int, mood: Mood, rng: Random, words: frozenset[str]) -> Canvas:
    """Draw open water with reflected light, often a distant coast, and a sail if the prompt asks for one."""
    line = int(size * rng.uniform(0.54, 0.62))
    canvas, sun_x, _ = _sky(size, mood, rng, horizon=line / size)
    palette = mood.palette
    if rng.random() < 0.55:
        coast = _mountain_line(rng, size, line, size * 0.085, 0.5)
        lean = rng.choice((-1, 1))
        canvas.fill_below([y + size * 0.13 * (0.5 + lean * (x / size - 0.5)) for x, y in enumerate(coast)],
                     _misty_ramp(mood, 0.3, size, 0.3))  # fmt: skip
    deep = mix(palette.middle, palette.ground, 0.78)
    near = mix(palette.horizon, palette.middle, 0.45)
    canvas.fill_below([float(line)] * size, ramp(((0.0, near), (0.2, deep), (1.0, palette.ground)), size))
    _ripples(canvas, rng, line, palette.ground, 200)
    _ripples(canvas, rng, line, mix(palette.horizon, palette.middle, 0.4), 200)
    for _ in range(520):
        far = rng.random()
        y = line + 1 + int(far**1.3 * (size - line - 1))
        half = size * (0.005 + 0.028 * far * rng.random())
        glint = mix(palette.light, palette.horizon, 0.25)
        canvas.streak(rng.gauss(sun_x, size * (0.018 + 0.09 * far)), y, half, glint, 0.75 - 0.4 * far)
    if words & {"ship", "boat", "sail", "sailing"}:
        height_pixels, x0 = size * rng.uniform(0.08, 0.14), rng.uniform(0.2, 0.8) * size
        for step in range(-int(height_pixels * 0.36), int(height_pixels * 0.46) + 1):
            sail = height_pixels * abs(step) / (height_pixels * (0.36 if step < 0 else 0.46))
            canvas.vertical(
                int(x0 + step), line + sail - height_pixels, line + height_pixels * 0.1, mix(palette.light, near, 0.3)
            )
            canvas.vertical(
                int(x0 + step), line + height_pixels * 0.14, line + height_pixels * 0.3 - sail * 0.1, palette.ground
            )
    return canvas


def _ripples(canvas: Canvas, rng: Random, line: int, colour: Colour, count: int) -> None:
    size = canvas.size
    for _ in range(count):
        deep = rng.random()
        y = line + 1 + int(deep**1.6 * (size - line - 1))
        canvas.streak(rng.uniform(0, size), y, size * (0.012 + 0.07 * deep * rng.random()), colour, 0.18)


def forest(size: int, mood: Mood, rng: Random, words: frozenset[str]) -> Canvas:
    """Draw rows of firs that emerge from fog."""
    canvas, _, _ = _sky(size, mood, rng, horizon=0.58)
    canvas.fill_below(_mountain_line(rng, size, size * 0.44, size * 0.13, 0.5), _misty_ramp(mood, 0.05, size))
    for step in range(6):
        near = (step + 0.6) / 5.6
        edge = _hill_line(rng, size, size * (0.56 + 0.085 * step), size * 0.035, 0.9)
        _trees(canvas, mood, rng, edge, count=int(46 - 5.5 * step), height=0.075 + 0.037 * step, near=near)
    return canvas


def _trees(
    canvas: Canvas, mood: Mood, rng: Random, edge: Sequence[float], *, count: int, height: float, near: float
) -> None:
    """Draw firs along an edge, as one raised outline."""
    size = canvas.size
    outline = list(edge)
    for _ in range(count):
        cx, height_pixels = rng.uniform(0, size), size * height * rng.uniform(0.55, 1.15)
        half, layers = height_pixels * rng.uniform(0.2, 0.27), rng.uniform(5, 8)
        foot = edge[min(int(cx), size - 1)] + height_pixels * 0.06
        for x in range(max(0, int(cx - half)), min(size, int(cx + half) + 2)):
            out = abs(x - cx) / half
            if out < 1:
                jag = (out * layers) % 1.0 * 0.55 / layers
                outline[x] = min(outline[x], foot - height_pixels * max(0.0, 1 - out**0.82 - jag))
    canvas.fill_below(outline, _misty_ramp(mood, near, size, 0.75))


def city(size: int, mood: Mood, rng: Random, words: frozenset[str]) -> Canvas:
    """Draw a skyline in layers over water, with lit windows if the light is low."""
    canvas, _, _ = _sky(size, mood, rng, horizon=0.7)
    line = int(size * 0.8)
    lamps = mix((255.0, 208.0, 120.0), mood.palette.light, 0.3)
    for step, near in enumerate((0.1, 0.4, 0.72, 0.95)):
        edge = [float(line)] * size
        x = -rng.randrange(max(2, size // 20))
        while x < size:
            wide = max(2, int(size * rng.uniform(0.035, 0.075) * (0.8 + near * 0.35)))
            middle = 1 - abs((x + wide / 2) / size - 0.5)
            height_pixels = size * rng.uniform(0.08, 0.3) * (0.5 + middle) * (1.3 - 0.62 * near)
            roof = wide * rng.choice((0.0, 0.0, 0.5, 1.0))
            for column in range(max(0, x), min(size, x + wide)):
                edge[column] = line - height_pixels - roof * (0.5 - abs((column - x) / wide - 0.5))
            x += wide + rng.randrange(3)
        canvas.fill_below(edge, _misty_ramp(mood, near, size, 0.7))
        pitch = max(3, round(size / 110 * (0.6 + near * 0.5)))
        for x in range(pitch, size - pitch, pitch) if mood.name != "day" and step else ():
            for y in range(int(max(edge[x - 1 : x + 2])) + pitch, line - pitch // 2, pitch + 1):
                if rng.random() < 0.12 + 0.26 * near:
                    canvas.vertical(x, y, y + max(1.0, pitch * 0.5), lamps, (0.25 + 0.65 * near) * rng.uniform(0.5, 1))
    canvas.mirror(line, mood.palette.ground, 0.42)
    _ripples(canvas, rng, line, mix(mood.palette.horizon, mood.palette.ground, 0.3), 260)
    return canvas


def desert(size: int, mood: Mood, rng: Random, words: frozenset[str]) -> Canvas:
    """Draw dunes with a lit and a shaded side."""
    canvas, sun_x, _ = _sky(size, mood, rng, horizon=0.55)
    palette = mood.palette
    sand = mix(palette.horizon, (236.0, 176.0, 112.0), 0.55 if mood.stars < 0.5 else 0.1)
    if words & {"pyramid", "egypt"}:
        cx, height_pixels = rng.uniform(0.3, 0.7) * size, 0.22 * size
        for x in range(int(cx - height_pixels * 0.8), int(cx + height_pixels * 0.8)):
            side = _ground_colour(mood, 0.25 if (x < cx) == (sun_x < cx) else 0.65)
            canvas.vertical(x, size * (0.58 - 0.22 * (1 - abs(x - cx) / (height_pixels * 0.8))), size * 0.62, side)
    for step in range(6):
        near = step / 5
        edge = _hill_line(rng, size, size * (0.54 + 0.3 * near**1.2), size * (0.025 + 0.06 * near), 1.7 - 1.05 * near)
        lit = mix(mix(palette.horizon, palette.middle, 0.3), sand, 0.35 + 0.6 * near)
        dark = mix(lit, mix(palette.ground, palette.middle, 0.35), 0.25 + 0.4 * near)
        slopes = [edge[min(x + 3, size - 1)] - edge[max(x - 3, 0)] for x in range(size)]
        steep = max(0.01, *map(abs, slopes)) * (1 if sun_x > size / 2 else -1)
        for tone in range(_TONES):
            crest = mix(lit, dark, tone / (_TONES - 1))
            paint = ramp(((0.0, mix(crest, palette.light, 0.2)), (0.03, crest), (0.3, mix(crest, dark, 0.7)),
                          (1.0, dark)), size)  # fmt: skip
            matches = [tone == int(_TONES * (0.499 + 0.499 * slope / steep)) for slope in slopes]
            canvas.fill_below(
                [y if selected else float(size) for y, selected in zip(edge, matches, strict=True)], paint
            )
    return canvas


def space(size: int, mood: Mood, rng: Random, words: frozenset[str]) -> Canvas:
    """Draw a nebula, stars, and a banded planet, often with a ring."""
    palette, noise = mood.palette, Noise(rng)
    night = (5.0, 6.0, 18.0)
    veil, fire = mix(palette.middle, palette.top, 0.3), mix(palette.horizon, palette.light, 0.25)
    lean, offset = rng.uniform(-1, 1), rng.random() * 40

    def values(x: float, y: float) -> Colour:
        warp = noise.cloud(x * 2.2 + offset, y * 2.2) - 0.5
        gas = noise.cloud(x * 3 + warp * 2.4 + offset, y * 3 + warp * 2.4 + 11)
        dense = max(0.0, gas - 0.3) * 1.9 * exp(-((y - 0.5 + lean * (x - 0.5) + warp * 0.45) ** 2) * 9)
        return mix(mix(night, veil, min(0.9, dense * 1.35)), fire, min(0.85, max(0.0, dense - 0.34) * 1.9))

    red, green, blue = smooth_field(size, values, 3)
    canvas = Canvas(size, (red, green, blue))
    _stars(canvas, rng, 330, 1.0)
    radius = size * rng.uniform(0.15, 0.23)
    cx, cy = rng.uniform(0.32, 0.68) * size, rng.uniform(0.34, 0.64) * size
    tilt = rng.uniform(0.16, 0.3) * rng.choice((-1, 1))
    ringed = "saturn" in words or rng.random() < 0.6
    for front in (False, True) if ringed else ():
        _ring(canvas, mix(palette.light, palette.horizon, 0.45), (cx, cy), radius, tilt, 1 if front else -1)
        if not front:
            _globe(canvas, mood, noise, (cx, cy), radius)
    if not ringed:
        _globe(canvas, mood, noise, (cx, cy), radius)
    return canvas


def _globe(canvas: Canvas, mood: Mood, noise: Noise, centre: tuple[float, float], radius: float) -> None:
    """Draw a ball with bands, lit from the upper left."""
    (cx, cy), palette = centre, mood.palette
    bands = ((0.0, palette.light), (0.4, palette.horizon), (0.65, palette.middle), (1.0, palette.top))
    belt = [gradient(bands, noise.at(step / 12, 7.0)) for step in range(65)]
    for x in range(max(0, int(cx - radius)), min(canvas.size, int(cx + radius) + 1)):
        across = (x - cx) / radius
        half = sqrt(max(0.0, 1 - across * across))
        for y in range(max(0, int(cy - half * radius)), min(canvas.size, int(cy + half * radius))):
            down = (y - cy) / radius
            facing = 0.62 * sqrt(max(0.0, 1 - across * across - down * down)) - 0.62 * across - 0.5 * down
            colour = belt[int(32 + 31 * down)]
            lit = 0.04 + 0.94 * min(1.0, max(0.0, facing))
            canvas.dot(x, y, (colour[0] * lit, colour[1] * lit, colour[2] * lit), 1.0)


def _ring(canvas: Canvas, tint: Colour, centre: tuple[float, float], radius: float, tilt: float, side: int) -> None:
    """Draw the half of a ring that is behind its planet (side -1) or in front of it."""
    for x in range(-int(radius * 2.15), int(radius * 2.15) + 1):
        across = x / radius
        nearest, furthest = (0.27 * sqrt(max(0.0, edge - across * across)) for edge in (1.3**2, 2.15**2))
        for y in range(int(nearest * radius), int(furthest * radius) + 1):
            groove = 0.35 + 0.5 * abs(sin(hypot(across, y / radius / 0.27) * 11))
            canvas.dot(int(centre[0] + x), int(centre[1] + side * y + tilt * x), tint, groove * 0.8)


def meadow(size: int, mood: Mood, rng: Random, words: frozenset[str]) -> Canvas:
    """Draw rolling hills under a wide sky, with flowers that grow larger toward the viewer."""
    canvas, _, _ = _sky(size, mood, rng, horizon=0.55)
    ground = mood.palette.ground
    canvas.fill_below(_mountain_line(rng, size, size * 0.5, size * 0.09, 0.48), _misty_ramp(mood, 0.05, size))
    grass = mix((94.0, 150.0, 62.0), ground, 0.72 if mood.stars > 0.5 else 0.2)
    for step in range(5):
        edge = _hill_line(rng, size, size * (0.55 + 0.085 * step), size * 0.035, 1.3 - 0.15 * step)
        ridge = mix(mix(mood.palette.horizon, grass, 0.35 + 0.15 * step), mood.palette.light, 0.14 - 0.035 * step)
        canvas.fill_below(
            edge, ramp(((0.0, ridge), (0.3, mix(ridge, ground, 0.45)), (1.0, mix(ridge, ground, 0.6))), size)
        )
    petals = [mix(hex_colour(text), ground, 0.4 if mood.stars > 0.5 else 0.0) for text in rng.choice(_PETALS)]
    for near in sorted(rng.random() ** 0.75 for _ in range(330)):
        x, y = rng.uniform(0, size), size * (0.72 + 0.28 * near)
        bloom = size * (0.0016 + 0.0085 * near**2) * rng.uniform(0.6, 1.2)
        canvas.vertical(int(x), y, y + bloom * 4, mix(grass, ground, 0.3), 0.8)
        canvas.disc(x, y, max(0.7, bloom), rng.choice(petals), 0.5 + 0.5 * near)
    return canvas


def flow(size: int, mood: Mood, rng: Random, words: frozenset[str]) -> Canvas:
    """Draw folded silk in the colours of the mood."""
    palette, noise = mood.palette, Noise(rng)
    scale, folds, offset = rng.uniform(1.3, 2.1), rng.uniform(2.6, 4.2), rng.random() * 60
    stops = ((0.0, palette.ground), (0.22, palette.top), (0.45, palette.middle), (0.66, palette.horizon),
             (0.8, palette.light), (0.9, palette.middle), (1.0, palette.ground))  # fmt: skip

    def values(x: float, y: float) -> Colour:
        x, y = x * scale + offset, y * scale + offset
        bend = noise.at(x, y) + 0.5 * noise.at(x * 2.1 + 9, y * 2.1)
        curl = noise.at(x + 1.7 * bend + 3, y + 1.4 * bend + 7)
        height = noise.at(x + 2.1 * curl, y + 1.9 * bend + 5) + 0.35 * curl
        sheen = 0.5 + 0.5 * sin(height * folds * 2 * pi)
        colour = gradient(stops, (height * 0.75 + 0.1 * bend) % 1.0)
        return mix(mix(colour, palette.ground, 0.55 * (1 - sheen)), _WHITE, 0.3 * sheen**6)

    red, green, blue = smooth_field(size, values, 3)
    return Canvas(size, (red, green, blue))


SCENES: dict[str, Scene] = {
    scene.__name__: scene for scene in (mountains, lake, sea, forest, city, desert, space, meadow, flow)
}
