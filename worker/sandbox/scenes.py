"""The scenes the painter knows, from mountains to folded silk. Pure: all chance comes from the dice handed in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, cos, exp, hypot, pi, sin, sqrt
from random import Random

from worker.sandbox.canvas import Canvas, Colour, Ramp, gradient, hex_colour, mix, ramp, smooth_field

Scene = Callable[[int, "Mood", Random, frozenset[str]], Canvas]

_TONES = 10  # from the lit to the shaded side of a dune
_WHITE: Colour = (255.0, 255.0, 255.0)


@dataclass(frozen=True, slots=True)
class Palette:
    """Five colours: the sky from top to horizon, the sun or moon, and the nearest ground."""

    top: Colour
    middle: Colour
    horizon: Colour
    light: Colour
    ground: Colour

    @classmethod
    def of(cls, top: str, middle: str, horizon: str, light: str, ground: str) -> "Palette":
        """A palette from five `rrggbb` texts."""
        return cls(*(hex_colour(text) for text in (top, middle, horizon, light, ground)))

    def turned(self, turn: Callable[[Colour], Colour]) -> "Palette":
        """The same palette with each colour changed alike."""
        return Palette(turn(self.top), turn(self.middle), turn(self.horizon), turn(self.light), turn(self.ground))


@dataclass(frozen=True, slots=True)
class Mood:
    """Light and colours of a picture; heights are shares of the picture from its top."""

    name: str
    palette: Palette
    light_height: float
    stars: float


class Noise:
    """Smooth random values over a line or a plane, from a lattice of random numbers."""

    __slots__ = ("_lattice",)

    def __init__(self, dice: Random) -> None:
        self._lattice = [dice.random() for _ in range(1024)]

    def at(self, x: float, y: float) -> float:
        """The value at a place, 0 to 1; the lattice has one number per unit."""
        column, row = int(x // 1), int(y // 1)
        right, down = x - column, y - row
        right = right * right * (3 - 2 * right)
        down = down * down * (3 - 2 * down)
        lattice = self._lattice
        here = (column * 37 + row * 193) & 1023
        top = lattice[here] * (1 - right) + lattice[(here + 37) & 1023] * right
        low = lattice[(here + 193) & 1023] * (1 - right) + lattice[(here + 230) & 1023] * right
        return top * (1 - down) + low * down

    def cloud(self, x: float, y: float) -> float:
        """Four octaves of it, 0 to about 1."""
        return (
            self.at(x, y) * 0.53
            + self.at(x * 2.1 + 7, y * 2.1 + 3) * 0.27
            + self.at(x * 4.3 + 1, y * 4.3 + 9) * 0.14
            + self.at(x * 8.9 + 5, y * 8.9 + 2) * 0.06
        )


def _crag(dice: Random, size: int, base: float, rise: float, rough: float) -> list[float]:
    """A line of mountains by halving: heights in pixels from the top, `rise` at most about the base."""
    heights = [dice.uniform(-0.5, 0.5), dice.uniform(-0.5, 0.5)]
    swing = 0.7
    while len(heights) < size:
        finer: list[float] = []
        for left, right in pairwise(heights):
            finer += (left, (left + right) / 2 + dice.uniform(-swing, swing))
        heights = [*finer, heights[-1]]
        swing *= rough
    return [base + rise * height for height in heights[:size]]


def _swell(dice: Random, size: int, base: float, rise: float, waves: float) -> list[float]:
    """A line of soft hills."""
    pitches = ((0.6, dice.uniform(0.8, 1.2)), (0.3, dice.uniform(1.8, 2.4)), (0.12, dice.uniform(3.5, 4.6)))
    parts = [(rise * share, waves * pitch * 2 * pi / size, dice.uniform(0, 2 * pi)) for share, pitch in pitches]
    return [base + sum(part * sin(x * pitch + phase) for part, pitch, phase in parts) for x in range(size)]


def _sky(size: int, mood: Mood, dice: Random, horizon: float = 0.62) -> tuple[Canvas, float, float]:
    """The sky with its light, clouds and stars; also where the light stands, in pixels."""
    palette, noise = mood.palette, Noise(dice)
    stops = ((0.0, palette.top), (horizon * 0.55, palette.middle), (horizon, palette.horizon), (1.0, palette.horizon))
    sun_x, sun_y = dice.uniform(0.24, 0.76), mood.light_height * dice.uniform(0.85, 1.12)
    low = mood.light_height > 0.3
    cover = dice.uniform(0.44, 0.56)
    stretch = dice.uniform(2.0, 3.0)
    lit = mix(palette.light, palette.horizon, 0.35)
    bank = dice.random() * 50

    def values(x: float, y: float) -> Colour:
        colour = gradient(stops, y)
        far = hypot(x - sun_x, (y - sun_y) * 1.15)
        glow = exp(-far * (5.0 if low else 8.0)) * (0.9 if mood.stars < 0.5 else 0.5)
        thick = noise.cloud(x * stretch + bank, y * stretch * 3.4) - cover
        if thick > 0 and mood.name != "aurora":
            share = min(1.0, thick * 4.5) * max(0.0, 1 - y / horizon * 0.7) * (0.2 if mood.stars > 0.5 else 0.75)
            colour = mix(colour, mix(lit, palette.middle, min(1.0, far * 1.3)), share)
        if mood.name == "aurora":
            colour = _aurora(colour, palette.light, noise, x, y, bank)
        return mix(colour, palette.light, min(1.0, glow))

    red, green, blue = smooth_field(size, values, 3)
    canvas = Canvas(size, (red, green, blue))
    _stars(canvas, dice, int(mood.stars * 170), horizon)
    radius = size * (dice.uniform(0.05, 0.075) if low else dice.uniform(0.035, 0.05))
    if mood.name == "aurora":
        return canvas, sun_x * size, sun_y * size
    canvas.disc(sun_x * size, sun_y * size, radius * 1.12, palette.light, 0.35)
    canvas.disc(sun_x * size, sun_y * size, radius, mix(palette.light, _WHITE, 0.4))
    if mood.stars > 0.5:
        for _ in range(6):
            crater = radius * dice.uniform(0.1, 0.26)
            cx, cy = dice.uniform(-0.55, 0.55) * radius, dice.uniform(-0.55, 0.55) * radius
            canvas.disc(sun_x * size + cx, sun_y * size + cy, crater, palette.middle, 0.16)
    return canvas, sun_x * size, sun_y * size


def _aurora(colour: Colour, light: Colour, noise: Noise, x: float, y: float, bank: float) -> Colour:
    for band, (tint, strength) in enumerate(((light, 0.85), ((90.0, 160.0, 255.0), 0.5), ((190.0, 90.0, 230.0), 0.4))):
        fold = 0.36 + 0.1 * band + 0.2 * (noise.at(x * 3 + bank + band * 9, band * 5.0) - 0.5) - 0.12 * x
        over = fold - y
        rays = 0.45 + 0.75 * noise.at(x * 17 + band * 31 + over * 2, bank)
        share = exp(-over * 5.5) * rays if over > 0 else exp(over * 34) * rays
        colour = mix(colour, tint, min(1.0, share * strength))
    return colour


def _stars(canvas: Canvas, dice: Random, count: int, horizon: float) -> None:
    size = canvas.size
    for _ in range(count):
        x, y = dice.randrange(size), int(dice.random() ** 1.3 * horizon * size)
        bright = dice.random() ** 2.2 * 0.85 + 0.15
        tint = mix(_WHITE, (170.0, 200.0, 255.0) if dice.random() < 0.6 else (255.0, 220.0, 180.0), 0.6)
        canvas.dot(x, y, tint, bright)
        if bright > 0.6 and size >= 128:
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                canvas.dot(x + dx, y + dy, tint, bright * 0.4)


def _haze(mood: Mood, near: float) -> Colour:
    """The colour of ground at a distance: 0 is the horizon, 1 is here."""
    palette = mood.palette
    veil = mix(palette.horizon, palette.middle, 0.45)
    return gradient(((0.0, mix(veil, palette.middle, 0.3)), (0.55, mix(palette.middle, palette.ground, 0.62)),
                     (1.0, palette.ground)), near)  # fmt: skip


def _misty(mood: Mood, near: float, length: int, mist: float = 0.5) -> Ramp:
    """Ground that is clear at its ridge and dissolves into the air of the valley below."""
    ridge = _haze(mood, near)
    valley = mix(ridge, mix(mood.palette.horizon, mood.palette.middle, 0.35), mist * (1.0 - near * 0.85))
    return ramp(((0.0, ridge), (0.34, valley), (1.0, valley)), length)


def mountains(size: int, mood: Mood, dice: Random, words: frozenset[str]) -> Canvas:
    """Ranges of mountains, one behind the other, with mist between."""
    canvas, _, _ = _sky(size, mood, dice)
    _ranges(canvas, mood, dice, words, first=0.46, last=0.93, count=6)
    if dice.random() < 0.6 or "eagle" in words:
        _birds(canvas, mood, dice)
    return canvas


def _ranges(
    canvas: Canvas, mood: Mood, dice: Random, words: frozenset[str], *, first: float, last: float, count: int
) -> None:
    size = canvas.size
    snowy = bool(words & {"snow", "snowy", "winter", "ice", "alps", "peak", "peaks"}) or dice.random() < 0.35
    for step in range(count):
        near = step / (count - 1)
        base = size * (first + (last - first) * near)
        edge = _crag(dice, size, base, size * (0.17 - 0.09 * near), 0.52)
        canvas.below(edge, _misty(mood, near, size))
        if snowy and 0 < step < 3:
            _snow(canvas, mood, dice, edge, base)
        if near == 1.0:
            _trees(canvas, mood, dice, edge, count=int(34 * (1 if size > 64 else 0.5)), height=0.075, near=1.0)


def _snow(canvas: Canvas, mood: Mood, dice: Random, edge: Sequence[float], base: float) -> None:
    size = canvas.size
    snow = mix(mood.palette.light, mix(mood.palette.horizon, mood.palette.middle, 0.4), 0.3)
    for x, top in enumerate(edge):
        deep = (base - size * 0.015 - top) * (0.34 + 0.3 * sin(x * 0.9) * sin(x * 0.23)) + dice.uniform(-1.5, 1.5)
        if deep > 1:
            rising = edge[min(x + 3, size - 1)] - edge[max(x - 3, 0)]
            canvas.upright(x, top, top + deep, snow, 0.78 if rising > 0 else 0.42)


def _birds(canvas: Canvas, mood: Mood, dice: Random) -> None:
    size = canvas.size
    cx, cy = dice.uniform(0.25, 0.75) * size, dice.uniform(0.16, 0.34) * size
    for _ in range(dice.randrange(3, 8)):
        x, y = cx + dice.gauss(0, 0.09) * size, cy + dice.gauss(0, 0.045) * size
        wing = size * dice.uniform(0.009, 0.017)
        for step in range(-int(wing), int(wing) + 1):
            lift = wing * 0.55 * sin(abs(step) / max(wing, 1) * 2.2)
            canvas.upright(int(x + step), y - lift, y - lift + max(1.0, size / 340), mood.palette.ground, 0.8)


def lake(size: int, mood: Mood, dice: Random, words: frozenset[str]) -> Canvas:
    """Mountains over still water."""
    canvas, _, _ = _sky(size, mood, dice, horizon=0.5)
    line = int(size * dice.uniform(0.56, 0.62))
    _ranges(canvas, mood, dice, words, first=0.38, last=line / size - 0.015, count=4)
    canvas.mirror_below(line, mix(mood.palette.middle, mood.palette.ground, 0.5), 0.28)
    _ripples(canvas, dice, line, mix(mood.palette.horizon, mood.palette.light, 0.4), 240)
    shore = [max(edge, size * 0.9) for edge in _swell(dice, size, size * 0.985, size * 0.05, 0.7)]
    canvas.below(shore, ramp(((0.0, mood.palette.ground), (1.0, mood.palette.ground)), size))
    _reeds(canvas, mood, dice, shore)
    return canvas


def _ripples(canvas: Canvas, dice: Random, line: int, colour: Colour, count: int) -> None:
    size = canvas.size
    for _ in range(count):
        deep = dice.random()
        y = line + 1 + int(deep**1.6 * (size - line - 1))
        canvas.streak(dice.uniform(0, size), y, size * (0.012 + 0.07 * deep * dice.random()), colour, 0.16)


def _reeds(canvas: Canvas, mood: Mood, dice: Random, shore: Sequence[float]) -> None:
    size = canvas.size
    for _ in range(size // 5):
        x = dice.randrange(size)
        tall, lean = size * dice.uniform(0.015, 0.07), dice.uniform(-0.22, 0.22)
        for step in range(int(tall)):
            canvas.dot(int(x + lean * step * step / tall), int(shore[x]) - step, mood.palette.ground, 0.9)


def sea(size: int, mood: Mood, dice: Random, words: frozenset[str]) -> Canvas:
    """Open water with the light on it, sometimes a far coast and a sail."""
    line = int(size * dice.uniform(0.54, 0.62))
    canvas, sun_x, _ = _sky(size, mood, dice, horizon=line / size)
    palette = mood.palette
    if dice.random() < 0.55 or words & {"island", "coast", "beach"}:
        for near in (0.12, 0.38):
            coast = _crag(dice, size, line + size * 0.012, size * 0.085, 0.5)
            lean = dice.choice((-1, 1))
            coast = [y + size * 0.13 * (0.5 + lean * (x / size - 0.5)) for x, y in enumerate(coast)]
            canvas.below(coast, _misty(mood, near, size, 0.3))
    deep = mix(palette.middle, palette.ground, 0.78)
    water = ramp(((0.0, mix(palette.horizon, palette.middle, 0.45)), (0.12, mix(palette.middle, deep, 0.35)),
                  (0.5, deep), (1.0, mix(deep, palette.ground, 0.5))), size - line)  # fmt: skip
    canvas.below([float(line)] * size, water)
    for _ in range(420):
        far = dice.random()
        y = line + 1 + int(far**1.7 * (size - line - 1))
        tint = palette.ground if dice.random() < 0.5 else mix(palette.horizon, palette.middle, 0.4)
        canvas.streak(dice.uniform(0, size), y, size * (0.008 + 0.07 * far * dice.random()), tint, 0.2)
    for _ in range(520):
        far = dice.random()
        y = line + 1 + int(far**1.3 * (size - line - 1))
        spread = size * (0.018 + 0.09 * far)
        half = size * (0.005 + 0.028 * far * dice.random())
        canvas.streak(dice.gauss(sun_x, spread), y, half, mix(palette.light, palette.horizon, 0.25), 0.75 - 0.4 * far)
    if dice.random() < 0.5 or words & {"ship", "boat", "sail"}:
        _sail(canvas, mood, dice, line)
    if words & {"wave", "waves", "surf", "storm", "beach"}:
        _surf(canvas, mood, dice)
    return canvas


def _sail(canvas: Canvas, mood: Mood, dice: Random, line: int) -> None:
    size, ground = canvas.size, mood.palette.ground
    tall = size * dice.uniform(0.07, 0.13)
    x0, keel = dice.uniform(0.2, 0.8) * size, line + tall * 0.22
    for step in range(-int(tall * 0.36), int(tall * 0.46) + 1):
        share = abs(step) / (tall * (0.36 if step < 0 else 0.46))
        cloth = mix(mood.palette.light, mood.palette.horizon, 0.2 if step > 0 else 0.55)
        if abs(step) > tall * 0.03:
            canvas.upright(int(x0 + step), keel - tall + tall * 0.82 * share**0.85, keel - tall * 0.12, cloth)
        canvas.upright(int(x0 + step), keel - tall * 0.08, keel + tall * 0.1 * (1 - share**3), ground)
    canvas.upright(int(x0), keel - tall * 1.05, keel, ground)


def _surf(canvas: Canvas, mood: Mood, dice: Random) -> None:
    size, palette = canvas.size, mood.palette
    for step in range(5):
        near = step / 4
        edge = _swell(dice, size, size * (0.74 + 0.055 * step), size * (0.012 + 0.016 * near), 1.9 - near)
        edge = [y - abs(sin(x * 9.0 / size + step * 1.3)) * size * 0.018 for x, y in enumerate(edge)]
        body = mix(palette.middle, palette.ground, 0.15 + 0.55 * near)
        crest = mix(palette.light, body, 0.1)
        canvas.below(edge, ramp(((0.0, crest), (0.003, crest), (0.009, mix(body, crest, 0.5)), (0.05, body),
                                 (0.3, mix(body, palette.ground, 0.5)), (1.0, palette.ground)), size))  # fmt: skip
        for _ in range(60):
            x = dice.randrange(size)
            y = int(edge[x] + size * dice.uniform(0.005, 0.045))
            canvas.streak(x, y, size * dice.uniform(0.004, 0.022), crest, 0.35)


def forest(size: int, mood: Mood, dice: Random, words: frozenset[str]) -> Canvas:
    """Rows of firs that come out of the fog."""
    canvas, _, _ = _sky(size, mood, dice, horizon=0.58)
    canvas.below(_crag(dice, size, size * 0.44, size * 0.13, 0.5), _misty(mood, 0.05, size))
    rows = 6
    for step in range(rows):
        near = (step + 0.6) / (rows - 0.4)
        edge = _swell(dice, size, size * (0.56 + 0.085 * step), size * 0.035, 0.9)
        canvas.below(edge, _misty(mood, near, size, 0.75))
        _trees(canvas, mood, dice, edge, count=int(46 - 5.5 * step), height=0.075 + 0.037 * step, near=near)
    return canvas


def _trees(
    canvas: Canvas, mood: Mood, dice: Random, edge: Sequence[float], *, count: int, height: float, near: float
) -> None:
    """Firs along an edge, drawn as its raised outline."""
    size = canvas.size
    outline = list(edge)
    for _ in range(count):
        cx, tall = dice.uniform(0, size), size * height * dice.uniform(0.55, 1.15)
        half = tall * dice.uniform(0.2, 0.27)
        layers = dice.uniform(5, 8)
        foot = edge[min(int(cx), size - 1)] + tall * 0.06
        for x in range(max(0, int(cx - half)), min(size, int(cx + half) + 2)):
            out = abs(x - cx) / half
            if out < 1:
                jag = (out * layers) % 1.0 * 0.55 / layers
                outline[x] = min(outline[x], foot - tall * max(0.0, 1 - out**0.82 - jag))
    canvas.below(outline, _misty(mood, near, size, 0.75))


def city(size: int, mood: Mood, dice: Random, words: frozenset[str]) -> Canvas:
    """A skyline in layers, with lit windows when the light is low, over water."""
    canvas, _, _ = _sky(size, mood, dice, horizon=0.7)
    line = int(size * 0.8)
    lamps = mix((255.0, 208.0, 120.0), mood.palette.light, 0.3)
    for step, near in enumerate((0.1, 0.4, 0.72, 0.95)):
        edge = [float(line)] * size
        x = -dice.randrange(max(2, size // 20))
        while x < size:
            wide = max(2, int(size * dice.uniform(0.035, 0.075) * (0.8 + near * 0.35)))
            middle = 1 - abs((x + wide / 2) / size - 0.5)
            tall = size * dice.uniform(0.08, 0.3) * (0.5 + middle) * (1.3 - 0.62 * near)
            _tower(edge, x, wide, line - tall, dice)
            x += wide + (dice.randrange(3) if step else 0)
        canvas.below(edge, _misty(mood, near, size, 0.7))
        if mood.name != "day" and step:
            _windows(canvas, dice, edge, line, lamps, near)
    canvas.mirror_below(line, mood.palette.ground, 0.42)
    _ripples(canvas, dice, line, mix(mood.palette.horizon, mood.palette.ground, 0.3), 260)
    return canvas


def _tower(edge: list[float], left: int, wide: int, top: float, dice: Random) -> None:
    shape, size = dice.random(), len(edge)
    for x in range(max(0, left), min(size, left + wide)):
        place = (x - left) / wide
        if shape < 0.2:
            roof = -abs(place - 0.5) * wide * 0.9 + wide * 0.45
        elif shape < 0.4:
            roof = wide * 0.5 if 0.25 < place < 0.75 else 0.0
        else:
            roof = 0.0
        edge[x] = min(edge[x], top - roof)
    mast = left + wide // 2
    if shape < 0.28 and 0 <= mast < size:
        edge[mast] -= wide * dice.uniform(0.4, 0.9)


def _windows(canvas: Canvas, dice: Random, edge: Sequence[float], line: int, lamps: Colour, near: float) -> None:
    size = canvas.size
    pitch = max(3, round(size / 110 * (0.6 + near * 0.5)))
    width = max(1, round(pitch * 0.45))
    for x in range(pitch, size - pitch, pitch):
        top = max(edge[x - 1 : x + width + 1]) + pitch
        for y in range(int(top), line - pitch // 2, pitch + 1):
            if dice.random() < 0.12 + 0.26 * near:
                tint = mix(lamps, (150.0, 200.0, 255.0), 0.7) if dice.random() < 0.15 else lamps
                share = (0.25 + 0.65 * near) * dice.uniform(0.5, 1)
                for dx in range(width):
                    canvas.upright(x + dx, y, y + max(1.0, pitch * 0.5), tint, share)


def desert(size: int, mood: Mood, dice: Random, words: frozenset[str]) -> Canvas:
    """Dunes with a lit and a shaded side."""
    canvas, sun_x, _ = _sky(size, mood, dice, horizon=0.55)
    palette = mood.palette
    sand = mix(palette.horizon, (236.0, 176.0, 112.0), 0.55 if mood.stars < 0.5 else 0.1)
    shade = mix(palette.ground, palette.middle, 0.35)
    if "pyramid" in words or "egypt" in words:
        _pyramids(canvas, mood, dice)
    side = 1 if sun_x > size / 2 else -1
    count = 6
    for step in range(count):
        near = step / (count - 1)
        rise = size * (0.025 + 0.06 * near)
        edge = _swell(dice, size, size * (0.54 + 0.3 * near**1.2), rise, 1.7 - 1.05 * near)
        lit = mix(mix(palette.horizon, palette.middle, 0.3), sand, 0.35 + 0.6 * near)
        dark = mix(lit, shade, 0.3 + 0.5 * near)
        valley = mix(lit, dark, 0.5)
        paints = []
        for tone in range(_TONES):
            crest = mix(lit, dark, tone / (_TONES - 1))
            paints.append(ramp(((0.0, mix(crest, palette.light, 0.2)), (0.025, crest), (0.2, mix(crest, valley, 0.85)),
                                (0.3, valley), (0.7, dark), (1.0, dark)), size))  # fmt: skip
        slopes = [edge[min(x + 2, size - 1)] - edge[max(x - 2, 0)] for x in range(size)]
        steep = max(0.01, max(abs(slope) for slope in slopes))
        tones = [int(_TONES * (0.499 + 0.499 * side * slope / steep) + (x * 3 % 4) / 4 - 0.4) for x, slope in
                 enumerate(slopes)]  # fmt: skip
        canvas.below_toned(edge, paints, [min(_TONES - 1, max(0, tone)) for tone in tones])
    return canvas


def _pyramids(canvas: Canvas, mood: Mood, dice: Random) -> None:
    size = canvas.size
    for near, share in ((0.2, 0.14), (0.4, 0.24)):
        cx, tall = dice.uniform(0.2, 0.8) * size, share * size
        lit, dark = _haze(mood, near * 0.6), _haze(mood, near + 0.25)
        for x in range(int(cx - tall * 0.8), int(cx + tall * 0.8)):
            top = size * 0.58 - tall * (1 - abs(x - cx) / (tall * 0.8))
            canvas.upright(x, top, size * 0.62, lit if x < cx else dark)


def space(size: int, mood: Mood, dice: Random, words: frozenset[str]) -> Canvas:
    """A nebula, stars, and a banded planet, often with a ring."""
    palette, noise = mood.palette, Noise(dice)
    night = (5.0, 6.0, 18.0)
    veil, fire = mix(palette.middle, palette.top, 0.3), mix(palette.horizon, palette.light, 0.25)
    turn, offset = dice.uniform(0, 2 * pi), dice.random() * 40

    def values(x: float, y: float) -> Colour:
        warp = noise.cloud(x * 2.2 + offset, y * 2.2) - 0.5
        along = (x - 0.5) * cos(turn) + (y - 0.5) * sin(turn)
        gas = noise.cloud(x * 3 + warp * 2.4 + offset, y * 3 + warp * 2.4 + 11)
        band = exp(-((along + warp * 0.45) ** 2) * 9)
        dense = max(0.0, gas - 0.3) * 1.9 * band
        colour = mix(night, veil, min(0.9, dense * 1.35))
        return mix(colour, fire, min(0.85, max(0.0, dense - 0.34) * 1.9))

    red, green, blue = smooth_field(size, values, 3)
    canvas = Canvas(size, (red, green, blue))
    _stars(canvas, dice, 330, 1.0)
    radius = size * dice.uniform(0.15, 0.23)
    cx, cy = dice.uniform(0.32, 0.68) * size, dice.uniform(0.34, 0.64) * size
    ringed = "saturn" in words or dice.random() < 0.6
    tilt = dice.uniform(0.16, 0.3) * dice.choice((-1, 1))
    if ringed:
        _ring(canvas, mood, (cx, cy), radius, tilt, front=False)
    _globe(canvas, mood, dice, (cx, cy), radius)
    if ringed:
        _ring(canvas, mood, (cx, cy), radius, tilt, front=True)
    return canvas


def _globe(canvas: Canvas, mood: Mood, dice: Random, centre: tuple[float, float], radius: float) -> None:
    size, palette, noise = canvas.size, mood.palette, Noise(dice)
    (cx, cy), bank = centre, dice.random() * 30
    bands = dice.uniform(3.5, 7.0)
    colours = ((0.0, mix(palette.horizon, palette.light, 0.3)), (0.4, palette.horizon),
               (0.65, palette.middle), (1.0, mix(palette.middle, palette.top, 0.6)))  # fmt: skip
    belt = [gradient(colours, noise.at(step / 128 * bands + bank, bank)) for step in range(-192, 193)]
    for x in range(max(0, int(cx - radius)), min(size, int(cx + radius) + 1)):
        across = (x - cx) / radius
        half = (max(0.0, 1 - across * across)) ** 0.5
        top, bottom = max(0, ceil(cy - half * radius)), min(size, int(cy + half * radius))
        wave = 192.5 + 6 * sin(across * 2.4 + bank)
        inside = 1 - across * across
        pixels = []
        for y in range(top, bottom):
            down = (y - cy) / radius
            bulge = inside - down * down
            facing = (sqrt(bulge) if bulge > 0 else 0.0) * 0.62 - 0.62 * across - 0.5 * down
            lit = 0.03 + 0.95 * facing if facing > 0 else 0.03
            red, green, blue = belt[int(wave + 128 * down)]
            pixels.append((int(red * lit), int(green * lit), int(blue * lit)))
        for channel, plane in enumerate(canvas.planes):
            plane[x][top:bottom] = bytes([pixel[channel] for pixel in pixels])


def _ring(canvas: Canvas, mood: Mood, centre: tuple[float, float], radius: float, tilt: float, *, front: bool) -> None:
    cx, cy = centre
    tint = mix(mood.palette.light, mood.palette.horizon, 0.45)
    for x in range(int(cx - radius * 2.15), int(cx + radius * 2.15) + 1):
        across = (x - cx) / radius
        nearest = 0.27 * sqrt(max(0.0, 1.3**2 - across * across))
        furthest = 0.27 * sqrt(max(0.0, 2.15**2 - across * across))
        for y_step in range(int(nearest * radius), int(furthest * radius) + 1):
            y = y_step if front else -y_step
            far = hypot(across, y / radius / 0.27)
            groove = 0.35 + 0.5 * abs(sin(far * 11)) - (0.6 if 1.72 < far < 1.78 else 0.0)
            if groove > 0 and 1.3 < far < 2.15:
                canvas.dot(x, int(cy + y + tilt * across * radius), tint, groove * 0.8)


def meadow(size: int, mood: Mood, dice: Random, words: frozenset[str]) -> Canvas:
    """Rolling hills under a wide sky, with flowers that grow toward the viewer."""
    canvas, _, _ = _sky(size, mood, dice, horizon=0.55)
    canvas.below(_crag(dice, size, size * 0.5, size * 0.09, 0.48), _misty(mood, 0.05, size))
    night = mood.stars > 0.5
    grass = mix((94.0, 150.0, 62.0), mood.palette.ground, 0.72 if night else 0.2)
    edges = []
    for step in range(5):
        near = step / 4
        edge = _swell(dice, size, size * (0.55 + 0.085 * step), size * 0.035, 1.3 - 0.15 * step)
        ridge = mix(mix(mood.palette.horizon, grass, 0.35 + 0.6 * near), mood.palette.light, 0.14 * (1 - near))
        canvas.below(edge, ramp(((0.0, ridge), (0.3, mix(ridge, mood.palette.ground, 0.45)),
                                 (1.0, mix(ridge, mood.palette.ground, 0.6))), size))  # fmt: skip
        if step in (1, 2):
            _copse(canvas, mood, dice, edge, 0.35 + 0.3 * near)
        edges.append(edge)
    petals = [mix(colour, mood.palette.ground, 0.4 if night else 0.0) for colour in _petals(mood, dice)]
    places = sorted(dice.random() ** 0.75 for _ in range(330))
    for near in places:
        x, y = dice.uniform(0, size), size * (0.68 + 0.32 * near)
        if y > edges[2][min(int(x), size - 1)]:
            bloom = size * (0.0016 + 0.0085 * near**2) * dice.uniform(0.6, 1.2)
            canvas.upright(int(x), y, y + bloom * 4, mix(grass, mood.palette.ground, 0.3), 0.8)
            canvas.disc(x, y, max(0.7, bloom), dice.choice(petals), 0.5 + 0.5 * near)
            canvas.disc(x, y - bloom * 0.2, bloom * 0.35, mood.palette.light, 0.8)
    return canvas


def _petals(mood: Mood, dice: Random) -> Sequence[Colour]:
    sets = (("e8425a", "ff8a5c", "fff1e6"), ("8c5bd6", "c9a0f0", "fff6ff"), ("ffd23f", "ff9f1c", "fffbe0"),
            ("ef5da8", "ffb3d1", "fff0f6"))  # fmt: skip
    return [mix(hex_colour(text), mood.palette.horizon, 0.12) for text in dice.choice(sets)]


def _copse(canvas: Canvas, mood: Mood, dice: Random, edge: Sequence[float], near: float) -> None:
    size = canvas.size
    for _ in range(dice.randrange(1, 4)):
        middle = dice.uniform(0.05, 0.95) * size
        for _ in range(dice.randrange(2, 7)):
            x, crown = middle + dice.gauss(0, 0.035) * size, size * dice.uniform(0.01, 0.022)
            foot = edge[min(max(int(x), 0), size - 1)]
            leaf = mix(_haze(mood, near), (40.0, 84.0, 48.0), 0.35)
            canvas.upright(int(x), foot - crown * 1.5, foot + 1, leaf)
            canvas.disc(x, foot - crown * 1.7, crown, leaf)
            canvas.disc(x - crown * 0.25, foot - crown * 1.95, crown * 0.6, mix(leaf, mood.palette.light, 0.2), 0.6)


def flow(size: int, mood: Mood, dice: Random, words: frozenset[str]) -> Canvas:
    """Folded silk in the colours of the mood."""
    palette, noise = mood.palette, Noise(dice)
    scale, folds, offset = dice.uniform(1.3, 2.1), dice.uniform(2.6, 4.2), dice.random() * 60
    stops = ((0.0, palette.ground), (0.22, palette.top), (0.45, palette.middle), (0.66, palette.horizon),
             (0.8, palette.light), (0.9, palette.middle), (1.0, palette.ground))  # fmt: skip

    def values(x: float, y: float) -> Colour:
        x, y = x * scale + offset, y * scale + offset
        bend = noise.at(x, y) + 0.5 * noise.at(x * 2.1 + 9, y * 2.1)
        curl = noise.at(x + 1.7 * bend + 3, y + 1.4 * bend + 7)
        height = noise.at(x + 2.1 * curl, y + 1.9 * bend + 5) + 0.35 * curl
        sheen = 0.5 + 0.5 * sin(height * folds * 2 * pi)
        colour = gradient(stops, (height * 0.75 + 0.1 * bend) % 1.0 if height >= 0 else 0.0)
        return mix(mix(colour, palette.ground, 0.55 * (1 - sheen)), _WHITE, 0.3 * sheen**6)

    red, green, blue = smooth_field(size, values, 3)
    return Canvas(size, (red, green, blue))


SCENES: dict[str, Scene] = {
    "mountains": mountains,
    "lake": lake,
    "sea": sea,
    "forest": forest,
    "city": city,
    "desert": desert,
    "space": space,
    "meadow": meadow,
    "flow": flow,
}
