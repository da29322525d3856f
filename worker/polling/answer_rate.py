"""How many answers arrive per second, and what follows from it for batches and claims."""

import time

GATHER_SECONDS = 0.05  # answers within this time are written together: the delay that a batch may add to an answer
MAX_GATHER_SECONDS = 0.15  # when busy, a batch may add as much delay as a request takes
BATCH = 150  # answers per batch to aim for when busy: by then the cost of a transaction is small per answer
BUSY_RATE = 200.0  # answers per second; below it, batches stay small, since the processor has time for them
# Jobs claimed ahead keep the threads busy while a batch is written and the next jobs are claimed: this many seconds'
# worth, but at most a share of a second's budget, since a stalled API could get all of them at once.
AHEAD_SECONDS = 0.3
AHEAD_SHARE = 0.05


class AnswerRate:
    """The answers per second of one poller, as a moving average over the last batches."""

    def __init__(self) -> None:
        self._per_second = 0.0
        self._counted_at = time.monotonic()

    def count(self, answers: int) -> None:
        """Count the answers since the last call."""
        now = time.monotonic()
        rate = answers / max(now - self._counted_at, GATHER_SECONDS)
        self._per_second += (rate - self._per_second) / 4
        self._counted_at = now

    @property
    def gather_seconds(self) -> float:
        """The seconds to wait for more answers after the first: the busier, the larger the batches may grow."""
        rate = self._per_second
        return GATHER_SECONDS if rate < BUSY_RATE else min(max(GATHER_SECONDS, BATCH / rate), MAX_GATHER_SECONDS)

    def ahead(self, budget: float) -> int:
        """Return how many jobs to claim ahead. `budget` is the requests per second of the fastest account."""
        return min(int(self._per_second * AHEAD_SECONDS), int(budget * AHEAD_SHARE))
