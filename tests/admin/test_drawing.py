"""The plots as SVG: round ticks, gaps, names and sizes."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.admin.curves import SPANS, Curve
from worker.admin.drawing import NARROW, SMALLEST, TIME_STEPS, WIDE, draw, time_ticks, value_ticks

NOW = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def drawn(*curves: Curve, paired: bool = False, unit: str = "s", narrow: bool = False) -> ElementTree.Element:
    """Return the drawn SVG, parsed."""
    svg = draw(curves, SPANS[0], NOW, unit=unit, paired=paired, size=NARROW if narrow else WIDE)
    return ElementTree.fromstring(svg)  # noqa: S314  # drawn just now


def elements(svg: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return [element for element in svg.iter() if str(element.tag).endswith(f"}}{tag}")]


def texts(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in elements(svg, "text")]


def lines(svg: ElementTree.Element, style: str) -> list[list[tuple[float, float]]]:
    """Return the points of the lines of this style, without the line in the legend, which comes last."""
    polylines = [line for line in elements(svg, "polyline") if line.get("class") == style]
    pairs = [[pair.split(",") for pair in str(line.get("points")).split()] for line in polylines]
    return [[(float(x), float(y)) for x, y in points] for points in pairs][:-1]


def minutes(*values: float | None) -> list[tuple[datetime, float | None]]:
    """Return points, one a minute, that end now."""
    return [(NOW - (len(values) - 1 - place) * MINUTE, value) for place, value in enumerate(values)]


@given(st.floats(min_value=0, max_value=1e15))
def test_given_any_largest_value_then_there_are_a_few_ticks_that_reach_it(largest: float) -> None:
    ticks = value_ticks(largest)

    assert ticks[0] == 0
    assert ticks[-1] >= largest * (1 - 1e-9)
    assert 2 <= len(ticks) <= 6
    assert ticks[-2] < largest or largest <= SMALLEST * 1.1


@pytest.mark.parametrize(
    ("largest", "ticks"),
    [(0, [0, 0.25, 0.5, 0.75, 1]), (1, [0, 0.25, 0.5, 0.75, 1]), (7, [0, 2, 4, 6, 8]), (10, [0, 2.5, 5, 7.5, 10]),
     (18_000, [0, 5_000, 10_000, 15_000, 20_000]), (0.3, [0, 0.1, 0.2, 0.3])],
)  # fmt: skip
def test_ticks_of_values_are_round(largest: float, ticks: list[float]) -> None:
    assert value_ticks(largest) == ticks


@pytest.mark.parametrize("span", SPANS, ids=lambda span: span.name)
@pytest.mark.parametrize("most", [4, 7])
def test_ticks_of_time_are_round_and_not_too_many(span: object, most: int) -> None:
    length = next(each.length for each in SPANS if each is span)
    ticks = time_ticks(NOW - length - 7 * MINUTE, NOW - 7 * MINUTE, most=most)

    assert 2 <= len(ticks) <= most + 1
    assert {after - before for before, after in pairwise(ticks)} <= set(TIME_STEPS)
    assert all(moment.minute % 15 == 0 for moment in ticks)


def test_given_a_curve_then_its_last_value_is_at_the_right_edge_and_the_largest_near_the_top() -> None:
    (points,) = lines(drawn(Curve("half", minutes(0, 5, 10))), "curve c0")

    assert points[-1][0] == WIDE.width - 14
    assert [y for _, y in points] == [WIDE.height - 26, (WIDE.height - 26 + 12) / 2, 12]


def test_given_a_missing_value_or_a_minute_without_a_row_then_the_line_is_broken() -> None:
    without_value = lines(drawn(Curve("a", minutes(1, 2, None, 3, 4))), "curve c0")
    without_row = lines(drawn(Curve("a", [(NOW - 10 * MINUTE, 1), (NOW - 9 * MINUTE, 1), *minutes(2, 2)])), "curve c0")

    assert [len(points) for points in without_value] == [2, 2]
    assert [len(points) for points in without_row] == [2, 2]


def test_given_a_point_between_two_gaps_then_it_is_visible() -> None:
    (points,) = lines(drawn(Curve("a", minutes(None, 3, None))), "curve c0")

    assert points[1][0] - points[0][0] == 2


def test_given_a_curve_and_its_limit_then_they_have_one_colour_and_the_limit_is_dashed() -> None:
    curves = [Curve("shop", minutes(1, 2)), Curve("shop, allowed", minutes(3, 3), dashed=True)]
    svg = drawn(*curves, Curve("bulk", minutes(1, 1)), paired=True)

    assert lines(svg, "curve c0")
    assert lines(svg, "curve c0 limit")
    assert lines(svg, "curve c1")


def test_given_names_with_markup_then_they_are_text() -> None:
    svg = drawn(Curve("<script>alert(1)</script>", minutes(1, 2)))

    assert "<script>alert(1)</script>" in texts(svg)
    assert not elements(svg, "script")


@pytest.mark.parametrize("narrow", [False, True])
def test_given_many_long_names_then_the_legend_grows_and_nothing_leaves_the_picture(*, narrow: bool) -> None:
    svg = drawn(*(Curve(f"{place} {'long name ' * 20}", minutes(1, 2)) for place in range(8)), narrow=narrow)
    _, _, width, height = map(float, str(svg.get("viewBox")).split())

    assert all(0 <= float(str(text.get("y"))) <= height for text in elements(svg, "text"))
    assert all(float(str(text.get("x"))) <= width for text in elements(svg, "text"))
    assert len([text for text in texts(svg) if "long name" in text]) == 8


def test_given_no_values_then_the_plot_says_so() -> None:
    assert "nothing was recorded in this period" in texts(drawn())
    assert "nothing was recorded in this period" in texts(drawn(Curve("a", minutes(None, None))))


@pytest.mark.parametrize(("unit", "label"), [("s", "10 s"), ("/min", "10/min"), ("", "10")])
def test_labels_have_the_unit(unit: str, label: str) -> None:
    assert label in texts(drawn(Curve("a", minutes(1, 10)), unit=unit))
