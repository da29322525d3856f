"""The worker processes as a web app sees them: it wakes them, and waits for what they do."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from worker.client import pace_models
from worker.client.connection import after_commit, loaded_settings
from worker.settings import Settings
from worker.system.locked_cache import locked_cache

if TYPE_CHECKING:
    from worker.client.jobs import Job
    from worker.coordination.wakeups import WakeUps


class Workers:
    """The worker processes, woken over Redis pub/sub.

    `in_steps` is True for workers in the process of a test: time passes in steps, and each wait makes one.
    """

    in_steps = False

    def wake(self, settings: Settings) -> None:
        """Wake the worker processes, because a job is due earlier than they know. Call it after the commit."""
        _wake_ups(settings.redis).send()

    def check_database(self, connection: Connection) -> None:
        """Raise an error if the jobs of this connection's database are not those of the workers, in tests."""

    def clock(self) -> float:
        """Return the time in seconds, for time-outs."""
        return time.monotonic()

    def pause(self, job: "Job", max_seconds: float | None) -> None:
        """Make a step in which the job may change, of at most `max_seconds`. Only for workers in steps."""


_workers = Workers()


def current_workers() -> Workers:
    """Return the workers of this process."""
    return _workers


def wake(settings: Settings) -> None:
    """Wake the worker processes, because a job is due earlier than they know. Call it after the commit.

    If the app's framework manages the transaction, they are woken after its commit.
    """
    after_commit(lambda: _workers.wake(settings))


@contextmanager
def workers_in_place(workers: Workers) -> Iterator[None]:
    """Replace the workers of this process, for tests. Cached settings and models are cleared before and after."""
    global _workers
    replaced, _workers = _workers, workers
    _clear_caches()
    try:
        yield
    finally:
        _workers = replaced
        _clear_caches()


def _clear_caches() -> None:
    loaded_settings.cache_clear()
    pace_models.clear_cache()


@locked_cache
def _wake_ups(redis_url: str) -> "WakeUps":
    from worker.coordination.wakeups import WakeUps  # only here: redis is slow to import, and reading needs none

    return WakeUps(redis_url)
