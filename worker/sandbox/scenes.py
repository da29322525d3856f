"""Draws five scenes (mountains, lake, sea, meadow, silk) as PNG. Pure: all randomness comes from the given `rng`."""

import struct
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil, exp, hypot, pi, sin
from random import Random
from typing import NamedTuple

Colour = tuple[float, float, float]

_CELL_PIXELS = 12  # distance between two computed points of a smooth area
_WHITE: Colour = (255, 255, 255)
_GRASS: Colour = (94, 150, 62)
_PETALS: list[Colour] = [(232, 66, 90), (255, 241, 230), (255, 196, 50), (150, 100, 220)]


class Mood(NamedTuple):
    """Colours and light of a picture. The light is the sun or the moon."""

    top: Colour  # of the sky
    middle: Colour
    horizon: Colour
    light: Colour
    ground: Colour  # nearest to the viewer
    light_height: float  # from 0, the top of the picture, to 1
    stars: float  # 1 is a clear night


def mix(first: Sequence[float], second: Sequence[float], share: float) -> Colour:
    """Return the colour that is `share` of the way from the first to the second."""
    (red, green, blue), (red2, green2, blue2) = first, second
    return (red + (red2 - red) * share, green + (green2 - green) * share, blue + (blue2 - blue) * share)


class Canvas:
    """A square picture: three bytes per pixel, line by line. Coordinates are in pixels from the top left."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rgb = bytearray(size * size * 3)

    def fill_smoothly(self, colour_at: Callable[[float, float], Colour], height: float) -> None:
        """Fill the upper part of the picture by interpolation. `colour_at` takes x and y from 0 to 1.

        Lines are mixed as large integers with 32 bits per value: much faster than a loop over their pixels. The weights
        of two lines add up to `size`, and byte 2 of each mixed value is the result.
        """
        size = self.size
        cells = max(size // _CELL_PIXELS, 4)
        places = [divmod(x * cells / size, 1.0) for x in range(size)]
        lines = []
        for row in range(ceil(cells * height) + 1):
            points = [colour_at(column / cells, row / cells) for column in range(cells + 1)]
            colours = [mix(points[int(cell)], points[int(cell) + 1], share) for cell, share in places]
            values = [int(value * 65536 / size) for colour in colours for value in colour]
            lines.append(int.from_bytes(struct.pack(f"<{len(values)}I", *values), "little"))
        for y in range(int(size * height)):
            row, remainder = divmod(y * cells, size)
            line = lines[row] * (size - remainder) + lines[row + 1] * remainder
            self.rgb[y * size * 3 : (y + 1) * size * 3] = line.to_bytes(size * 12, "little")[2::4]

    def fill_below(self, edge: Sequence[float], top: Colour, bottom: Colour, depth: float) -> None:
        """Paint everything below an edge with one height per column, from `top` to `bottom` within `depth` pixels."""
        size = self.size
        ramp = [mix(top, bottom, min(1.0, y / depth)) for y in range(size)]
        channels = [bytes(map(int, values)) for values in zip(*ramp, strict=True)]
        for x, height in enumerate(edge):
            first = min(max(ceil(height), 0), size)
            for channel, values in enumerate(channels):
                self.rgb[(first * size + x) * 3 + channel :: size * 3] = values[: size - first]
            self.blend(x, first - 1, top, first - height)

    def blend(self, x: int, y: int, colour: Colour, share: float) -> None:
        """Mix one pixel with a colour. Points outside the picture are ignored."""
        if 0 <= x < self.size and 0 <= y < self.size and share > 0:
            start = (y * self.size + x) * 3
            mixed = mix(self.rgb[start : start + 3], colour, min(share, 1.0))
            self.rgb[start : start + 3] = bytes(map(int, mixed))

    def streak(self, centre: float, y: int, half: float, colour: Colour, share: float) -> None:
        """Draw a horizontal stroke that fades at both ends."""
        for x in range(int(centre - half), int(centre + half) + 1):
            self.blend(x, y, colour, share * min(1.0, 2 - 2 * abs(x - centre) / max(half, 1.0)))

    def disc(self, centre_x: float, centre_y: float, radius: float, colour: Colour) -> None:
        """Draw a filled circle with a soft edge."""
        for y in range(int(centre_y - radius), int(centre_y + radius) + 2):
            for x in range(int(centre_x - radius), int(centre_x + radius) + 2):
                self.blend(x, y, colour, radius + 0.5 - hypot(x - centre_x, y - centre_y))

    def mirror(self, line: int) -> None:
        """Replace everything below `line` with a darker reflection of the part above it."""
        width, darker = self.size * 3, bytes([value * 3 // 4 for value in range(256)])
        for y in range(line, self.size):
            source = max(0, 2 * line - y - 1) * width
            self.rgb[y * width : (y + 1) * width] = self.rgb[source : source + width].translate(darker)

    def png(self) -> bytes:
        """Return the picture as a true-colour PNG file."""
        width = self.size * 3
        lines = b"".join(b"\0" + self.rgb[start : start + width] for start in range(0, len(self.rgb), width))
        header = struct.pack(">IIBBBBB", self.size, self.size, 8, 2, 0, 0, 0)
        png = b"\x89PNG\r\n\x1a\n"
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 2)), (b"IEND", b"")):
            png += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        return png


def _waves(rng: Random) -> Callable[[float, float], float]:
    """Return a smooth random function of a point: a sum of sine waves, from about -1 to 1."""
    waves = [(rng.uniform(-4, 4) * n, rng.uniform(4, 8) * n, rng.uniform(0, 2 * pi), 0.6 / n) for n in (1, 2, 3)]
    return lambda x, y: sum([high * sin(x * across + y * down + phase) for across, down, phase, high in waves])


def _hills(rng: Random, size: int, base: float, rise: float) -> list[float]:
    """Return a line of soft hills: one height in pixels per column. `base` and `rise` are parts of the size."""
    wave = _waves(rng)
    return [size * (base + rise * wave(0.0, x / size)) for x in range(size)]


def _ridge(rng: Random, size: int, base: float, rise: float) -> list[float]:
    """Return a line of mountains by midpoint displacement: one height per column, as `_hills` does."""
    heights = [rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5)]
    swing = 0.8
    while len(heights) < size:
        middles = [(left + right) / 2 + rng.uniform(-swing, swing) for left, right in pairwise(heights)]
        heights = [height for pair in zip(heights, [*middles, 0.0], strict=True) for height in pair][:-1]
        swing *= 0.52
    return [size * (base + rise * height) for height in heights[:size]]


def _with_firs(rng: Random, edge: list[float]) -> list[float]:
    """Return an edge raised by the outlines of firs."""
    size, outline = len(edge), edge.copy()
    for _ in range(45):
        centre, tall = rng.randrange(size), size * rng.uniform(0.045, 0.1)
        half = tall * rng.uniform(0.2, 0.27)
        for x in range(max(0, int(centre - half)), min(size, int(centre + half) + 1)):
            out = abs(x - centre) / half
            outline[x] = min(outline[x], edge[centre] - tall * (0.95 - out**0.82 - out * 6 % 1 * 0.09))
    return outline


def _sky(size: int, mood: Mood, rng: Random, horizon: float) -> tuple[Canvas, float]:
    """Draw the sky with sun or moon, clouds and stars. Also return the column of the light."""
    canvas, cloud = Canvas(size), _waves(rng)
    light_x, light_y = rng.uniform(0.24, 0.76), mood.light_height * rng.uniform(0.85, 1.12)
    cloud_colour, cloud_share = mix(mood.light, mood.horizon, 0.5), 0.3 if mood.stars > 0.5 else 0.7

    def colour_at(x: float, y: float) -> Colour:
        down = min(y / horizon, 1.0)
        colour = mix(mood.top, mood.middle, down * 2) if down < 0.5 else mix(mood.middle, mood.horizon, down * 2 - 1)
        thickness = cloud(x + 0.1 * sin(y * 40), y * 2.5) * (1 - down)
        colour = mix(colour, cloud_colour, min(max(thickness, 0.0), 1.0) * cloud_share)
        return mix(colour, mood.light, 0.85 * exp(-6 * hypot(x - light_x, y - light_y)))

    canvas.fill_smoothly(colour_at, horizon + 0.14)
    for _ in range(int(mood.stars * 170)):
        canvas.blend(rng.randrange(size), int(rng.random() ** 1.3 * horizon * size), _WHITE, rng.random() ** 2 + 0.1)
    canvas.disc(light_x * size, light_y * size, size * rng.uniform(0.035, 0.06), mix(mood.light, _WHITE, 0.4))
    return canvas, light_x * size


def _glints(canvas: Canvas, rng: Random, line: int, colour: Colour, share: float, centre: float | None = None) -> None:
    """Draw short waves below `line`, larger toward the viewer: everywhere, or in a path of light at `centre`."""
    size = canvas.size
    for _ in range(250 if centre is None else 500):
        near = rng.random()
        x = rng.uniform(0, size) if centre is None else rng.gauss(centre, size * (0.018 + 0.09 * near))
        half = size * (0.005 + (0.06 if centre is None else 0.028) * near * rng.random())
        canvas.streak(x, line + 1 + int(near**1.4 * (size - line - 1)), half, colour, share * (1 - near / 2))


def mountains(size: int, mood: Mood, rng: Random, first: float = 0.47, last: float = 0.93, count: int = 6) -> Canvas:
    """Draw ranges of mountains with mist between them, and firs on the last one."""
    canvas, _ = _sky(size, mood, rng, first + 0.14)
    for step in range(count):
        near = step / (count - 1)
        edge = _ridge(rng, size, first + (last - first) * near, 0.2 - 0.12 * near)
        colour = mix(mix(mood.horizon, mood.middle, 0.55), mood.ground, near**0.8)
        mist = mix(colour, mood.horizon, 0.5 * (1 - near))
        canvas.fill_below(_with_firs(rng, edge) if near == 1 else edge, colour, mist, size * 0.2)
    return canvas


def lake(size: int, mood: Mood, rng: Random) -> Canvas:
    """Draw mountains that are reflected in still water."""
    line = int(size * rng.uniform(0.56, 0.62))
    canvas = mountains(size, mood, rng, 0.38, line / size - 0.02, 4)
    canvas.mirror(line)
    _glints(canvas, rng, line, mix(mood.horizon, mood.light, 0.4), 0.3)
    canvas.fill_below(_hills(rng, size, 0.99, 0.06), mood.ground, mood.ground, size)
    return canvas


def sea(size: int, mood: Mood, rng: Random) -> Canvas:
    """Draw open water with a path of light, a coast, and a sailing boat."""
    line = int(size * rng.uniform(0.54, 0.62))
    canvas, light_x = _sky(size, mood, rng, line / size)
    far = mix(mood.horizon, mood.middle, 0.5)
    coast = [y + x * 0.15 for x, y in enumerate(_ridge(rng, size, line / size - 0.03, 0.06))]
    canvas.fill_below(coast, mix(far, mood.ground, 0.3), far, size * 0.1)
    canvas.fill_below([line] * size, far, mix(mood.middle, mood.ground, 0.75), size * 0.25)
    _glints(canvas, rng, line, mood.ground, 0.3)
    _glints(canvas, rng, line, far, 0.3)
    _glints(canvas, rng, line, mood.light, 0.8, light_x)
    tall, mast = size * rng.uniform(0.09, 0.14), size * rng.uniform(0.2, 0.8)
    for step in range(int(tall)):
        canvas.streak(mast + step * 0.2, int(line - tall + step), step * 0.28, mood.ground, 0.8)
        canvas.streak(mast + tall * 0.15, line + step // 7, tall * 0.45 - step * 0.15, mood.ground, 0.3)
    return canvas


def meadow(size: int, mood: Mood, rng: Random) -> Canvas:
    """Draw rolling hills with flowers that grow larger toward the viewer."""
    canvas, _ = _sky(size, mood, rng, 0.55)
    canvas.fill_below(_ridge(rng, size, 0.5, 0.1), mix(mood.horizon, mood.middle, 0.5), mood.horizon, size * 0.2)
    shade = 0.7 if mood.stars > 0.5 else 0.2
    for step in range(5):
        colour = mix(mood.horizon, mix(_GRASS, mood.ground, shade), 0.4 + 0.15 * step)
        edge = _hills(rng, size, 0.55 + 0.085 * step, 0.045)
        canvas.fill_below(edge, colour, mix(colour, mood.ground, 0.5), size * 0.3)
    petals = [mix(petal, mood.ground, shade / 2) for petal in rng.sample(_PETALS, 2)]
    for near in sorted(rng.random() for _ in range(260)):
        radius = size * (0.002 + 0.007 * near**2)
        canvas.disc(rng.uniform(0, size), size * (0.7 + 0.3 * near), radius, rng.choice(petals))
    return canvas


def silk(size: int, mood: Mood, rng: Random) -> Canvas:
    """Draw folds of silk in the colours of the mood."""
    canvas, lean = Canvas(size), rng.uniform(-0.5, 0.5)
    colours = rng.sample((mood.top, mood.middle, mood.horizon, mood.light), 4)
    for step in range(12):
        wave = _hills(rng, size, step / 9 - 0.25, 0.12)
        edge = [y + lean * (x - size / 2) for x, y in enumerate(wave)] if step else [0.0] * size
        colour = mix(colours[step // 3], colours[(step // 3 + 1) % 4], step % 3 / 3)
        canvas.fill_below(edge, mix(colour, _WHITE, 0.25), mix(colour, mood.ground, 0.6), size * 0.3)
    return canvas


SCENES: dict[str, Callable[[int, Mood, Random], Canvas]] = {
    scene.__name__: scene for scene in (mountains, lake, sea, meadow, silk)
}
