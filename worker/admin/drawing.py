"""Draw curves over time as SVG, for light and dark screens, without scripts. Pure."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from xml.etree import ElementTree

from worker.admin.curves import Curve, Span

TICK_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
TIME_STEPS = tuple(timedelta(minutes=minutes) for minutes in (15, 30, 60, 120, 240, 360, 720, 1440, 2880))
SMALLEST = 1e-9  # a smaller value is drawn as 0
GAP_STEPS = 2.5  # points that are further apart than this number of steps are not connected
LINE_HEIGHT = 20
LEGEND_GAP = 6  # between the labels of the time and the legend
LETTER_WIDTH = 6.4  # of the 12 pixel font, at most, on average
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #5a6772; }
.guide { stroke: #e3e7eb; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.limit { stroke-dasharray: 6 5; }
.c0 { stroke: #1d6fb8; } .c1 { stroke: #d9822b; } .c2 { stroke: #3b8a5a; }
.c3 { stroke: #b23a48; } .c4 { stroke: #7a5ea8; } .c5 { stroke: #5f6b76; }
@media (prefers-color-scheme: dark) {
text { fill: #9aa7b3; }
.guide { stroke: #34404b; }
.c0 { stroke: #6db3f2; } .c1 { stroke: #f0b95c; } .c2 { stroke: #7fd0a0; }
.c3 { stroke: #f08a96; } .c4 { stroke: #b79be6; } .c5 { stroke: #b9c4ce; }
}
"""
COLOURS = 6


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a plot in pixels, without its legend."""

    width: int
    height: int


WIDE, NARROW = Size(640, 240), Size(370, 190)


@dataclass(frozen=True, slots=True)
class _Area:
    """The rectangle of the curves, and the values at its edges. `top` is the value at the upper edge."""

    left: float
    right: float
    upper: float
    lower: float
    start: datetime
    end: datetime
    top: float

    def x(self, moment: datetime) -> float:
        share = (moment - self.start) / (self.end - self.start)
        return round(self.left + share * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        return round(self.lower - value / self.top * (self.lower - self.upper), 1)


def draw(curves: Sequence[Curve], span: Span, now: datetime, *, unit: str, paired: bool, size: Size) -> bytes:
    """Draw the curves of a span that ends now. With `paired`, a curve and the next one, its limit, have one colour."""
    shown = [curve for curve in curves if any(value is not None for _, value in curve.points)]
    ticks = value_ticks(max((value or 0.0 for curve in shown for _, value in curve.points), default=0.0))
    labels = [_label(tick, unit) for tick in ticks]
    area = _Area(
        left=14 + LETTER_WIDTH * max(map(len, labels)), right=size.width - 14, upper=12, lower=size.height - 26,
        start=now - span.length, end=now, top=ticks[-1],
    )  # fmt: skip
    per_row = max(1, min(len(shown), int((size.width - 20) // _legend_width(shown)))) if shown else 1
    height = size.height + LEGEND_GAP + LINE_HEIGHT * math.ceil(len(shown) / per_row)
    svg = ElementTree.Element(
        "svg",
        {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {size.width} {height}",
         "width": str(size.width), "height": str(height)},
    )  # fmt: skip
    ElementTree.SubElement(svg, "style").text = STYLE
    for tick, label in zip(ticks, labels, strict=True):
        _guide(svg, area.left, area.y(tick), area.right, area.y(tick))
        _text(svg, label, area.left - 6, area.y(tick) + 4, anchor="end")
    for moment in time_ticks(area.start, area.end, most=size.width // 90):
        _guide(svg, area.x(moment), area.upper, area.x(moment), area.lower)
        pattern = "%a %d" if span.length > timedelta(days=2) else "%H:%M"
        _text(svg, f"{moment:{pattern}}", area.x(moment), area.lower + 17, anchor="middle")
    for place, curve in enumerate(shown):
        style = f"curve c{(place // 2 if paired else place) % COLOURS}{' limit' if curve.dashed else ''}"
        for points in _unbroken(curve, span.step * GAP_STEPS):
            _line(svg, style, [(area.x(moment), area.y(value)) for moment, value in points])
        x = 14 + (place % per_row) * (size.width - 20) / per_row
        y = size.height + LEGEND_GAP + LINE_HEIGHT * (place // per_row)
        _line(svg, style, [(x, y), (x + 20, y)])
        _text(svg, curve.name[: _letters(size)], x + 26, y + 4)
    if not shown:
        _text(svg, "nothing was recorded in this period", size.width / 2, size.height / 2, anchor="middle")
    return ElementTree.tostring(svg)


def value_ticks(largest: float) -> list[float]:
    """Return round values from 0 to at least the largest value, evenly spaced.

    >>> value_ticks(87)
    [0.0, 25.0, 50.0, 75.0, 100.0]
    """
    largest = largest if largest > SMALLEST else 1.0
    rough = largest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in TICK_STEPS if factor * power >= rough * (1 - 1e-9))
    count = max(1, math.ceil(largest / step - 1e-9))
    return [round(place * step, 12) for place in range(count + 1)]


def time_ticks(start: datetime, end: datetime, *, most: int) -> list[datetime]:
    """Return the round times, in UTC, between two moments, at most `most`.

    >>> start = datetime(2026, 1, 2, 0, 5, tzinfo=UTC)
    >>> [f"{moment:%H:%M}" for moment in time_ticks(start, start + timedelta(hours=3), most=4)]
    ['01:00', '02:00', '03:00']
    """
    step = next((step for step in TIME_STEPS if (end - start) / step <= most), TIME_STEPS[-1]).total_seconds()
    first = math.ceil(start.timestamp() / step)
    last = math.floor(end.timestamp() / step)
    return [datetime.fromtimestamp(place * step, tz=UTC) for place in range(first, last + 1)]


def _unbroken(curve: Curve, gap: timedelta) -> Iterator[list[tuple[datetime, float]]]:
    """Yield the parts of a curve between its gaps."""
    part, numbers = 0, []
    last: datetime | None = None
    for moment, value in curve.points:
        if value is None or (last is not None and moment - last > gap):
            part += 1
        if value is not None:
            numbers.append((part, moment, value))
            last = moment
    for _, points in groupby(numbers, key=lambda point: point[0]):
        yield [(moment, value) for _, moment, value in points]


def _label(value: float, unit: str) -> str:
    return f"{value:,.4g}{' ' if unit.isalpha() else ''}{unit}"


def _legend_width(curves: Sequence[Curve]) -> float:
    return 40 + LETTER_WIDTH * max(len(curve.name) for curve in curves)


def _letters(size: Size) -> int:
    """Return how many letters of a name fit into a row of the legend."""
    return int((size.width - 60) // LETTER_WIDTH)


def _guide(svg: ElementTree.Element, x1: float, y1: float, x2: float, y2: float) -> None:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    ElementTree.SubElement(svg, "line", {"class": "guide", **{name: str(value) for name, value in ends.items()}})


def _line(svg: ElementTree.Element, style: str, points: Sequence[tuple[float, float]]) -> None:
    """Draw a line. A single point becomes a dash of two pixels."""
    if len(points) == 1:
        ((x, y),) = points
        points = [(x - 1, y), (x + 1, y)]
    coordinates = " ".join(f"{x:g},{y:g}" for x, y in points)
    ElementTree.SubElement(svg, "polyline", {"class": style, "points": coordinates})


def _text(svg: ElementTree.Element, text: str, x: float, y: float, *, anchor: str = "start") -> None:
    place = {"x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor}
    ElementTree.SubElement(svg, "text", place).text = text
