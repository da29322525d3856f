"""Compute curves from the recorded minutes: the difference of two samples is what happened between them. Pure."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

from worker.core.histograms import DELAYS, quantile
from worker.core.lifecycle import JOB_STATES, ORDER_STATES

MAX_ACCOUNTS = 6
WAITING = ("pending", "held", "downloading", *ORDER_STATES)
RARE = frozenset({"held", *ORDER_STATES})  # states whose curve is left out while no job has them
ENDS = tuple(state for state in JOB_STATES if state not in WAITING)

Point = tuple[datetime, float | None]


@dataclass(frozen=True, slots=True)
class Span:
    """A period to plot, and the distance of its points."""

    name: str
    label: str
    length: timedelta
    step: timedelta


SPANS = (
    Span("3h", "3 hours", timedelta(hours=3), timedelta(minutes=1)),
    Span("day", "1 day", timedelta(days=1), timedelta(minutes=8)),
    Span("week", "1 week", timedelta(days=7), timedelta(minutes=56)),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """The recorded state of one minute. Its counters never decrease."""

    minute: datetime
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Curve:
    """A named curve. `dashed` marks a limit."""

    name: str
    points: Sequence[Point]
    dashed: bool = False


def minutes_of(span: Span, now: datetime) -> list[datetime]:
    """Return the minutes of the points of a span, oldest first. They are equal for all calls within one step.

    >>> from datetime import UTC
    >>> [minute.strftime("%d %H:%M") for minute in minutes_of(SPANS[1], datetime(2026, 1, 2, 0, 5, tzinfo=UTC))][:2]
    ['01 00:08', '01 00:16']
    """
    step = span.step.total_seconds()
    last = now.timestamp() // step
    count = int(span.length / span.step)
    return [datetime.fromtimestamp((last - back) * step, tz=now.tzinfo) for back in range(count - 1, -1, -1)]


def samples(rows: Iterable[Any]) -> list[Sample]:
    """Parse rows of the history into samples."""
    return [Sample(row.minute, json.loads(row.body)) for row in rows]


def delay_curves(history: Sequence[Sample]) -> list[Curve]:
    """Return the median and the 95 % quantile of the seconds from ready to seen."""
    grown = [(after.minute, _grown(before, after, "delay")) for before, after in pairwise(history)]
    return [
        Curve(name, [(minute, quantile(counts, DELAYS, share)) for minute, counts in grown])
        for name, share in (("half within", 0.5), ("95 % within", 0.95))
    ]


def request_curves(history: Sequence[Sample]) -> list[Curve]:
    """Return the requests per second of the busiest accounts, each with its limit."""
    curves = []
    for name in _busiest(history):
        requests = [(after.minute, _answers_per_second(before, after, name)) for before, after in pairwise(history)]
        allowed = [(sample.minute, _account_value(sample, name, "rps")) for sample in history]
        curves += [Curve(name, requests), Curve(f"{name}, allowed", allowed, dashed=True)]
    return curves


def waiting_curves(history: Sequence[Sample]) -> list[Curve]:
    """Return the number of jobs that are not final, by state."""
    curves = [
        Curve(state, [(sample.minute, sample.body["jobs"].get(state, 0)) for sample in history]) for state in WAITING
    ]
    return [curve for curve in curves if curve.name not in RARE or any(value for _, value in curve.points)]


def ended_curves(history: Sequence[Sample]) -> list[Curve]:
    """Return the number of jobs that ended per minute, by state."""
    grown = [(before, after, _grown(before, after, "finished")) for before, after in pairwise(history)]
    return [
        Curve(
            state,
            [(after.minute, counts.get(state, 0) * 60 / _seconds(before, after)) for before, after, counts in grown],
        )
        for state in ENDS
    ]


def late_curves(history: Sequence[Sample]) -> list[Curve]:
    """Return the waiting time of the oldest due work."""
    return [Curve("oldest due", [(sample.minute, sample.body.get("oldest_due", 0)) for sample in history])]


def _grown(before: Sample, after: Sample, name: str) -> dict[str, float]:
    """Return the growth of counters; an empty dict if they were reset."""
    old = before.body.get(name, {})
    grown = {label: count - old.get(label, 0) for label, count in after.body.get(name, {}).items()}
    return grown if all(count >= 0 for count in grown.values()) else {}


def _busiest(history: Sequence[Sample]) -> list[str]:
    if not history:
        return []
    first, last = history[0].body.get("accounts", {}), history[-1].body.get("accounts", {})
    requests = {name: state["answers"] - first.get(name, {}).get("answers", 0) for name, state in last.items()}
    return sorted(requests, key=lambda name: (-requests[name], name))[:MAX_ACCOUNTS]


def _answers_per_second(before: Sample, after: Sample, name: str) -> float | None:
    now, then = _account_value(after, name, "answers"), _account_value(before, name, "answers") or 0.0
    return None if now is None or now < then else (now - then) / _seconds(before, after)


def _account_value(sample: Sample, account: str, name: str) -> float | None:
    value = sample.body.get("accounts", {}).get(account, {}).get(name)
    return None if value is None else float(value)


def _seconds(before: Sample, after: Sample) -> float:
    return (after.minute - before.minute).total_seconds()
