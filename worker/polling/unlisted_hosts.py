"""Holds the hosts of due jobs that SD_API_HOSTS does not list, and ends the jobs that are past their deadline."""

import time
from collections.abc import Sequence

from sqlalchemy import Engine

from worker.polling.options import AfterCommit, PollOptions
from worker.store.due_groups import DueGroup
from worker.store.engine import database_now
from worker.store.late_looks import plan_looks
from worker.store.unlisted_hosts import hold_unlisted


class UnlistedHosts:
    """Checks unlisted hosts every few seconds, for one poller."""

    def __init__(self, engine: Engine, options: PollOptions, after_commit: AfterCommit) -> None:
        self._engine = engine
        self._options = options
        self._after_commit = after_commit
        self._checked_at = 0.0

    def hold(self, groups: Sequence[DueGroup]) -> None:
        """Hold the hosts of these groups, unless they were checked just now. Notify the apps of jobs that end by it."""
        if time.monotonic() < self._checked_at + self._options.unlisted_seconds:
            return
        self._checked_at = time.monotonic()
        with self._engine.begin() as connection:
            now = database_now(connection)
            ended = hold_unlisted(connection, groups, now=now)
            plan_looks(connection, ended, self._options.late_looks, now=now)
        self._after_commit.notify(ended)
