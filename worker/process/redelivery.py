"""Bounds redelivered messages: each requeue has a limit, or waits for a server.

A message that ends its process at each delivery is counted in Redis and rejected in the end. While the database is
away, messages return to their queue with growing pauses, so none is lost, however long it takes.
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
PAUSE_LEAST, PAUSE_MOST = 1.0, 30.0  # seconds; Redis redelivers messages that were not acknowledged for 60
PAUSE_SHARE = 0.25  # of the time since the database went away
LOG_EVERY_SECONDS = 60.0


class TooManyDeliveries(Exception):
    """Each of the last deliveries of a message ended its process."""


class DeliveryCounter:
    """Counts deliveries that were started and not finished, for redelivered messages."""

    def __init__(self, client: "redis.Redis", max_deliveries: int = DELIVERIES_MOST) -> None:
        self._client = client
        self._max_deliveries = max_deliveries
        self._one_at_a_time = threading.Lock()

    @contextmanager
    def counted(self, message_id: str | None, *, redelivered: bool) -> Iterator[None]:
        """Run the task of a message. Raises TooManyDeliveries if the message has ended its process too often.

        Redelivered messages run one at a time, so that only the message that ends the process is counted. Without Redis
        nothing is counted.
        """
        if not redelivered or message_id is None:
            yield
            return
        with self._one_at_a_time:
            count = self._begin(KEY + message_id)
            try:
                if count > self._max_deliveries:
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
    """Delays messages while the database is away: longer during a long outage, and no longer once it answers."""

    def __init__(self, database_answers: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._database_answers = database_answers
        self._clock = clock
        self._lock = threading.Lock()
        self._since: float | None = None
        self._logged_at = float("-inf")
        self._woke_early = False

    def wait(self, stopping: threading.Event) -> None:
        """Wait before a message returns to its queue: a quarter of the outage so far, 30 s at most.

        The wait ends early once the database answers, but not twice in a row: a check does not show every failure.
        """
        now = self._clock()
        with self._lock:
            self._since = now if self._since is None else self._since
            outage_seconds, may_wake_early = now - self._since, not self._woke_early
            self._woke_early = False
            is_due = now - self._logged_at >= LOG_EVERY_SECONDS
            self._logged_at = now if is_due else self._logged_at
        if is_due:
            log.warning("messages return to their queue: the database is away seconds=%.0f", outage_seconds)
        until = now + min(max(PAUSE_LEAST, outage_seconds * PAUSE_SHARE), PAUSE_MOST)
        while self._clock() < until and not stopping.wait(PAUSE_LEAST):
            if may_wake_early and self._database_answers():
                self._woke_early = True
                return

    def over(self) -> None:
        """Note that the database works again."""
        if self._since is None:
            return
        with self._lock:
            since, self._since, self._woke_early = self._since, None, False
        if since is not None:
            log.info("the database answers again seconds=%.0f", self._clock() - since)


def remote_id_of(remote: Any) -> str:
    """Return the remote id of a `track` argument for a log line, cut to 128 characters."""
    remote_id = remote.get("id") if isinstance(remote, dict) else remote
    return str(remote_id)[:128] if isinstance(remote_id, (str, int)) else "unknown"
