"""What becomes of a message that a broker delivers again: every requeue has an end, or waits for a server.

A message that ends its process each time is counted in Redis and set aside. While the database is away messages go
back to their queue, with pauses that grow: nothing is lost then, however long it takes.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.exceptions import RedisError

log = logging.getLogger(__name__)

DELIVERIES_MOST = 5
COUNT_SECONDS = 86_400
KEY = "fetch-worker.deliveries."
PAUSE_LEAST, PAUSE_MOST = 1.0, 30.0  # seconds; Redis hands out again what was not acknowledged for 60
PAUSE_SHARE = 0.25  # of the time for which the database is away
LOG_EVERY_SECONDS = 60.0


class TooManyDeliveries(Exception):
    """Each of the last deliveries of a message ended its process."""


class DeliveryCounter:
    """Counts the deliveries of a message that began and did not end, for messages that are delivered again."""

    def __init__(self, client: "redis.Redis", most: int = DELIVERIES_MOST) -> None:
        self._client = client
        self._most = most
        self._alone = threading.Lock()

    @contextmanager
    def counted(self, message_id: str | None, *, redelivered: bool) -> Iterator[None]:
        """Run what a message asks for. Raises TooManyDeliveries instead where that has ended processes before.

        Those delivered again run one at a time, so that the others in the process are not counted with the one that
        ends it. Without Redis nothing is counted.
        """
        if not redelivered or message_id is None:
            yield
            return
        with self._alone:
            count = self._begin(KEY + message_id)
            try:
                if count > self._most:
                    raise TooManyDeliveries
                yield
            finally:
                self._end(KEY + message_id)

    def _begin(self, key: str) -> int:
        try:
            with self._client.pipeline() as pipe:
                pipe.incr(key)
                pipe.expire(key, COUNT_SECONDS)
                count, _ = pipe.execute()
        except (RedisError, OSError) as error:
            log.warning("deliveries are not counted reason=%s", type(error).__name__)
            return 0
        return int(count)

    def _end(self, key: str) -> None:
        try:
            self._client.delete(key)
        except (RedisError, OSError) as error:
            log.warning("deliveries are not counted reason=%s", type(error).__name__)


class DatabaseOutage:
    """How long messages wait while the database is away: longer the longer it is, and not after it answers again."""

    def __init__(self, answers: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._answers = answers
        self._clock = clock
        self._lock = threading.Lock()
        self._since: float | None = None
        self._logged_at = float("-inf")
        self._woke_early = False

    def wait(self, stopping: threading.Event) -> None:
        """Wait before a message goes back to its queue: a quarter of the outage so far, 30 s at most.

        The wait ends early once the database answers, but not twice in a row: some failures a look does not show.
        """
        now = self._clock()
        with self._lock:
            self._since = now if self._since is None else self._since
            away, look = now - self._since, not self._woke_early
            self._woke_early = False
            is_due = now - self._logged_at >= LOG_EVERY_SECONDS
            self._logged_at = now if is_due else self._logged_at
        if is_due:
            log.warning("messages go back to their queue: the database is away seconds=%.0f", away)
        until = now + min(max(PAUSE_LEAST, away * PAUSE_SHARE), PAUSE_MOST)
        while self._clock() < until and not stopping.wait(PAUSE_LEAST):
            if look and self._answers():
                self._woke_early = True
                return

    def over(self) -> None:
        """Note that the database did what it was asked for."""
        if self._since is None:
            return
        with self._lock:
            since, self._since, self._woke_early = self._since, None, False
        if since is not None:
            log.info("the database answers again seconds=%.0f", self._clock() - since)


def remote_id_of(remote: Any) -> str:
    """Return by which remote id a log line can name what was to be tracked, cut to 128 characters."""
    known = remote.get("id") if isinstance(remote, dict) else remote
    return str(known)[:128] if isinstance(known, (str, int)) else "unknown"
