"""From the minutes that were written down to curves: what happened between two of them is their difference. Pure."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

from worker.core.histograms import DELAYS, quantile
from worker.core.lifecycle import JOB_STATES

ACCOUNTS_MOST = 6
WAITING = ("pending", "held", "downloading")
ENDS = tuple(state for state in JOB_STATES if state not in WAITING)

Point = tuple[datetime, float | None]


@dataclass(frozen=True, slots=True)
class Span:
    """A length of time to look back over, and how far apart its points are."""

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
    """How everything stood in a minute. The counts in it only ever grow."""

    minute: datetime
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line; `dashed` for what is allowed beside what is."""

    name: str
    points: Sequence[Point]
    dashed: bool = False


def minutes_of(span: Span, now: datetime) -> list[datetime]:
    """The minutes that a span is drawn by, oldest first, the same ones however often it is looked at.

    >>> from datetime import UTC
    >>> [minute.strftime("%d %H:%M") for minute in minutes_of(SPANS[1], datetime(2026, 1, 2, 0, 5, tzinfo=UTC))][:2]
    ['01 00:08', '01 00:16']
    """
    step = span.step.total_seconds()
    last = now.timestamp() // step
    count = int(span.length / span.step)
    return [datetime.fromtimestamp((last - back) * step, tz=now.tzinfo) for back in range(count - 1, -1, -1)]


def samples(rows: Iterable[Any]) -> list[Sample]:
    """Rows as they were written down."""
    return [Sample(row.minute, json.loads(row.body)) for row in rows]


def delay_curves(seen: Sequence[Sample]) -> list[Curve]:
    """Seconds from ready to seen: half of the jobs, and 95 % of them, were seen within."""
    grown = [(after.minute, _grown(before, after, "delay")) for before, after in pairwise(seen)]
    return [
        Curve(name, [(minute, quantile(counts, DELAYS, share)) for minute, counts in grown])
        for name, share in (("half within", 0.5), ("95 % within", 0.95))
    ]


def request_curves(seen: Sequence[Sample]) -> list[Curve]:
    """Requests per second of the busiest accounts, each beside what it may make."""
    curves = []
    for name in _busiest(seen):
        asked = [(after.minute, _answers_per_second(before, after, name)) for before, after in pairwise(seen)]
        allowed = [(sample.minute, _of(sample, name, "rps")) for sample in seen]
        curves += [Curve(name, asked), Curve(f"{name}, allowed", allowed, dashed=True)]
    return curves


def waiting_curves(seen: Sequence[Sample]) -> list[Curve]:
    """Jobs that are not final, by state."""
    found = [Curve(state, [(one.minute, one.body["jobs"].get(state, 0)) for one in seen]) for state in WAITING]
    return [curve for curve in found if curve.name != "held" or any(value for _, value in curve.points)]


def ended_curves(seen: Sequence[Sample]) -> list[Curve]:
    """Jobs that ended per minute, by state."""
    grown = [(before, after, _grown(before, after, "finished")) for before, after in pairwise(seen)]
    return [
        Curve(
            state,
            [(after.minute, counts.get(state, 0) * 60 / _seconds(before, after)) for before, after, counts in grown],
        )
        for state in ENDS
    ]


def late_curves(seen: Sequence[Sample]) -> list[Curve]:
    """For how long the oldest work was due."""
    return [Curve("oldest due", [(sample.minute, sample.body.get("oldest_due", 0)) for sample in seen])]


def _grown(before: Sample, after: Sample, name: str) -> dict[str, float]:
    """What was added to counts; nothing where they were begun anew."""
    old = before.body.get(name, {})
    grown = {label: count - old.get(label, 0) for label, count in after.body.get(name, {}).items()}
    return grown if all(count >= 0 for count in grown.values()) else {}


def _busiest(seen: Sequence[Sample]) -> list[str]:
    if not seen:
        return []
    first, last = seen[0].body.get("accounts", {}), seen[-1].body.get("accounts", {})
    asked = {name: one["answers"] - first.get(name, {}).get("answers", 0) for name, one in last.items()}
    return sorted(asked, key=lambda name: (-asked[name], name))[:ACCOUNTS_MOST]


def _answers_per_second(before: Sample, after: Sample, name: str) -> float | None:
    now, then = _of(after, name, "answers"), _of(before, name, "answers") or 0.0
    return None if now is None or now < then else (now - then) / _seconds(before, after)


def _of(sample: Sample, account: str, name: str) -> float | None:
    value = sample.body.get("accounts", {}).get(account, {}).get(name)
    return None if value is None else float(value)


def _seconds(before: Sample, after: Sample) -> float:
    return (after.minute - before.minute).total_seconds()
