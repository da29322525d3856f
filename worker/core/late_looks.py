"""When a job that expired is asked about again."""

from collections.abc import Sequence
from datetime import datetime, timedelta


def next_look(deadline_at: datetime, looks: int, after: Sequence[float], *, now: datetime) -> datetime | None:
    """Return when the next look is due, after so many looks; None where there is none to come.

    `after` are the seconds from the deadline to each look, in order. A look whose time has passed is left out.

    >>> from datetime import UTC
    >>> deadline = datetime(2026, 3, 1, 12, tzinfo=UTC)
    >>> next_look(deadline, 1, (3600.0, 10800.0), now=deadline).hour
    15
    >>> next_look(deadline, 0, (3600.0, 10800.0), now=deadline + timedelta(hours=3)) is None
    True
    """
    moments = [deadline_at + timedelta(seconds=seconds) for seconds in after[looks:]]
    return next((moment for moment in moments if moment > now), None)
