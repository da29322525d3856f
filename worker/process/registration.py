"""Records this worker process in the database, so that everyone sees that it runs and which accounts it serves."""

import logging
import threading
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime

from redis.exceptions import RedisError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from worker import __version__
from worker.coordination.rate_limiter import redis_client
from worker.core.queues import POLLS
from worker.errors import WorkerError
from worker.settings import Settings
from worker.store.engine import close_unused_connections, database_now
from worker.store.processes import RECORD_SECONDS, WorkerProcess, record_process, remove_process
from worker.system.process_identity import holder_name

log = logging.getLogger(__name__)

REDIS_SECONDS = 2.0


class Registration:
    """Records this process every few seconds, and removes the record when the process stops. Used by one thread."""

    def __init__(self, engine: Engine, settings: Settings, *, name: str, queues: Iterable[str]) -> None:
        self._engine = engine
        self._settings = settings
        self._redis = redis_client(settings.redis, seconds=REDIS_SECONDS)
        self._started_at: datetime | None = None
        never = datetime.fromtimestamp(0, UTC)
        queue_names = frozenset(queues)
        self._process = WorkerProcess(holder_name(), name, queue_names, {}, __version__, True, never, never)

    def record(self) -> None:
        """Write the record. Raises the errors of the database."""
        polls = POLLS in self._process.queues
        accounts = {account: self._settings.rps(account) for account in self._settings.keys} if polls else {}
        redis_answers = self._redis_answers()
        with self._engine.begin() as connection:
            now = database_now(connection)
            self._started_at = self._started_at or now
            self._process = replace(
                self._process,
                accounts=accounts,
                redis_answers=redis_answers,
                started_at=self._started_at,
                seen_at=now,
            )
            record_process(connection, self._process)

    def run(self, stopping: threading.Event) -> None:
        """Record the process until `stopping` is set, then remove the record."""
        while True:
            try:
                self.record()
            except (SQLAlchemyError, WorkerError) as error:
                log.debug("this process is not recorded reason=%s", type(error).__name__)
            close_unused_connections(self._engine)
            if stopping.wait(RECORD_SECONDS):
                break
        try:
            with self._engine.begin() as connection:
                remove_process(connection, self._process.holder)
        except (SQLAlchemyError, WorkerError) as error:
            log.debug("the record of this process stays reason=%s", type(error).__name__)

    def _redis_answers(self) -> bool:
        try:
            return bool(self._redis.ping())
        except (RedisError, OSError):
            return False
