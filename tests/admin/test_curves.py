"""Curves are differences of recorded minutes; tested with handmade samples."""

import doctest
import importlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from worker.admin.curves import (
    SPANS,
    Sample,
    delay_curves,
    ended_curves,
    late_curves,
    minutes_of,
    request_curves,
    waiting_curves,
)

START = datetime(2026, 3, 1, 12, tzinfo=UTC)


def make_samples(*bodies: dict[str, Any], minutes: int = 1) -> list[Sample]:
    """Return samples that are `minutes` apart."""
    return [Sample(START + timedelta(minutes=minutes * number), body) for number, body in enumerate(bodies)]


def values(curves: list[Any]) -> dict[str, list[float | None]]:
    """Return the values of each curve."""
    return {curve.name: [value for _, value in curve.points] for curve in curves}


@pytest.mark.parametrize("name", ["worker.admin.formatting", "worker.admin.curves"])
def test_the_doctests_pass(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))

    assert (result.failed, result.attempted > 0) == (0, True)


def test_the_delay_of_a_minute_is_computed_from_its_own_jobs() -> None:
    delays = values(
        delay_curves(
            make_samples(
                {"delay": {"1": 100}},
                {"delay": {"1": 100, "2": 10}},  # ten jobs between 1.5 and 2 s
                {"delay": {"1": 100, "2": 10}},  # none
                {"delay": {"1": 90, "2": 10}},  # the counters were reset
            )
        )
    )

    assert delays == {"half within": [1.75, None, None], "95 % within": [1.975, None, None]}


def test_requests_per_second_are_shown_with_their_limit() -> None:
    curves = request_curves(
        make_samples(
            {"accounts": {"quiet": {"rps": 5, "answers": 10}}},
            {"accounts": {"quiet": {"rps": 5, "answers": 16}, "busy": {"rps": 10, "answers": 600}}},
            {"accounts": {"quiet": {"rps": 2.5, "answers": 16}, "busy": {"rps": 10, "answers": 900}}},
            minutes=2,
        )
    )

    assert values(curves) == {
        "busy": [5.0, 2.5],
        "busy, allowed": [None, 10.0, 10.0],
        "quiet": [0.05, 0.0],
        "quiet, allowed": [5.0, 5.0, 2.5],
    }
    assert [curve.dashed for curve in curves] == [False, True, False, True]


def test_ended_jobs_are_counted_per_minute_and_waiting_jobs_in_total() -> None:
    samples = make_samples(
        {"jobs": {"pending": 7, "completed": 1}, "finished": {"completed": 10}, "oldest_due": 0.5},
        {"jobs": {"pending": 3, "downloading": 2}, "finished": {"completed": 30, "failed": 5}, "oldest_due": 2},
        minutes=5,
    )

    assert values(ended_curves(samples)) == {"completed": [4.0], "failed": [1.0], "expired": [0.0], "cancelled": [0.0]}
    assert values(waiting_curves(samples)) == {"pending": [7, 3], "downloading": [0, 2]}
    assert values(late_curves(samples)) == {"oldest due": [0.5, 2]}


@pytest.mark.parametrize("samples", [[], make_samples({"jobs": {}})], ids=["none", "one minute"])
def test_too_few_samples_give_empty_curves(samples: list[Sample]) -> None:
    for curves in (delay_curves, request_curves, waiting_curves, ended_curves, late_curves):
        assert all(len(curve.points) <= 1 for curve in curves(samples))


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_a_span_has_180_points_at_whole_minutes(span: Any) -> None:
    now = datetime(2026, 3, 1, 12, 34, 56, tzinfo=UTC)
    minutes = minutes_of(span, now)

    assert len(minutes) == 180
    assert minutes == minutes_of(span, now + timedelta(seconds=3))
    assert all((minute.second, minute.microsecond) == (0, 0) for minute in minutes)
    assert timedelta() <= now - minutes[-1] < span.step
