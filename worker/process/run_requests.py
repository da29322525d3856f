"""Requests a run of polls or orders, or a sweep, by a message, so that monitors show it as a task.

All processes notice the same work. A key in Redis, which expires soon, makes one of them send the message.
"""

import logging

from celery import Celery
from redis.exceptions import RedisError

from worker.coordination.publisher import Publisher
from worker.coordination.rate_limiter import redis_client
from worker.core.queues import POLLS, QUEUE
from worker.process.publishing import log_broker_errors

log = logging.getLogger(__name__)

QUEUES = {"worker.poll": POLLS, "worker.submit": POLLS, "worker.sweep": QUEUE}
EXPIRES_SECONDS = 10.0
REDIS_SECONDS = 0.5
QUIET_SECONDS = 0.5  # after a request: long enough for the run to begin
ACTIVE_SECONDS = 3.0  # an active run renews its key about once a second


class RunRequests:
    """Sends the requests of one process, from the publisher's thread. Safe to call from any thread."""

    def __init__(self, app: Celery, redis_url: str, publisher: Publisher) -> None:
        self._app = app
        self._redis = redis_client(redis_url, seconds=REDIS_SECONDS)
        self._publisher = publisher

    def request(self, task: str) -> None:
        """Request a run of this task, unless a process did so just now or such a run is active."""
        self._publisher.send(task, lambda: self._request(task))

    def active(self, task: str) -> None:
        """Say that a run of this task is active, so that nobody requests one for a while."""
        self._publisher.send(task, lambda: self._mark(task, ACTIVE_SECONDS, only_first=False))

    def ended(self, task: str) -> None:
        """Say that a run of this task has ended, so that the next one can be requested at once."""
        self._publisher.send(task, lambda: self._unmark(task))

    def _request(self, task: str) -> None:
        if self._mark(task, QUIET_SECONDS, only_first=True):
            log_broker_errors(
                task,
                lambda: self._app.send_task(
                    task, queue=QUEUES[task], expires=EXPIRES_SECONDS, ignore_result=True, retry=False
                ),
            )

    def _mark(self, task: str, seconds: float, *, only_first: bool) -> bool:
        """Set the key of a task. Return whether it was set; without Redis each process sends its own message."""
        try:
            return bool(self._redis.set(_key(task), b"", px=int(seconds * 1e3), nx=only_first))
        except (RedisError, OSError) as error:
            log.debug("a request can't be marked reason=%s", type(error).__name__)
            return True

    def _unmark(self, task: str) -> None:
        try:
            self._redis.delete(_key(task))
        except (RedisError, OSError) as error:
            log.debug("the mark of a request can't be removed reason=%s", type(error).__name__)


def _key(task: str) -> str:
    return f"fetch-worker:requested:{task}"
