"""Late looks: when an expired job is polled again."""

from collections.abc import Sequence
from datetime import datetime, timedelta


def next_look(deadline_at: datetime, looks: int, after: Sequence[float], *, now: datetime) -> datetime | None:
    """Return when the next late look is due, after `looks` late looks. None if there are no more.

    `after` lists the seconds from the deadline to each late look, in order. Times in the past are skipped.

    >>> from datetime import UTC
    >>> deadline = datetime(2026, 3, 1, 12, tzinfo=UTC)
    >>> next_look(deadline, 1, (3600.0, 10800.0), now=deadline).hour
    15
    >>> next_look(deadline, 0, (3600.0, 10800.0), now=deadline + timedelta(hours=3)) is None
    True
    """
    moments = [deadline_at + timedelta(seconds=seconds) for seconds in after[looks:]]
    return next((moment for moment in moments if moment > now), None)
