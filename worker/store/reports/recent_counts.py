"""The numbers of jobs by state, for a page or a scrape that asks for them all the time."""

import time
from collections.abc import Callable, Sequence
from datetime import datetime

from sqlalchemy import Connection

from worker.store.jobs import count_not_pending, count_pending
from worker.store.reports.stats import WaitingCount, waiting_by_kind

MANY = 100_000  # jobs
RECENT_SECONDS = 30.0


class RecentCounts:
    """Counts the jobs. May be called from any thread.

    Counting a million jobs takes the database some 50 ms. So a number of many jobs may be half a minute old. Final jobs
    and pending jobs are counted apart: few pending jobs are always counted, however many final ones there are.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: tuple[Sequence[WaitingCount], float] = ((), 0.0)
        self._last: dict[Callable[[Connection], dict[str, int]], tuple[dict[str, int], float]] = {}

    def __call__(self, connection: Connection) -> dict[str, int]:
        """Return the number of jobs in each state that has jobs."""
        return self.not_pending(connection) | self._recent(_pending, connection)

    def not_pending(self, connection: Connection) -> dict[str, int]:
        """Return the number of jobs in each state that has jobs, without pending jobs."""
        return self._recent(count_not_pending, connection)

    def waiting(self, connection: Connection, *, now: datetime) -> Sequence[WaitingCount]:
        """Return the waiting jobs by account and kind."""
        counts, counted_at = self._waiting
        if sum(entry.count for entry in counts) < MANY or self._clock() - counted_at > RECENT_SECONDS:
            counts = waiting_by_kind(connection, now=now)
            self._waiting = counts, self._clock()
        return counts

    def _recent(self, count: Callable[[Connection], dict[str, int]], connection: Connection) -> dict[str, int]:
        counts, counted_at = self._last.get(count, ({}, 0.0))
        if sum(counts.values()) < MANY or self._clock() - counted_at > RECENT_SECONDS:
            counts = count(connection)
            self._last[count] = (counts, self._clock())
        return counts


def _pending(connection: Connection) -> dict[str, int]:
    return {"pending": count_pending(connection)}
