"""The numbers of jobs by state, for a page that loads itself again all the time."""

import time
from collections.abc import Callable

from sqlalchemy import Connection

from worker.store.jobs import count_not_pending, count_pending

MANY = 100_000  # jobs
RECENT_SECONDS = 30.0


class RecentCounts:
    """Counts the jobs. May be called from any thread.

    Counting a million final jobs takes the database some 50 ms. If there are many, their numbers may be half a minute
    old. Pending jobs are always counted.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: dict[str, int] = {}
        self._counted_at = float("-inf")

    def __call__(self, connection: Connection) -> dict[str, int]:
        """Return the number of jobs in each state that has jobs."""
        counts, now = self._counts, self._clock()
        if sum(counts.values()) < MANY or now - self._counted_at > RECENT_SECONDS:
            counts = count_not_pending(connection)
            self._counts, self._counted_at = counts, now
        return counts | {"pending": count_pending(connection)}
