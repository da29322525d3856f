"""Read the figures of a scrape from the database. Concurrent scrapes share one read."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from worker.errors import SchemaOutdated, WorkerError
from worker.operations.troubles import Trouble, read_evidence, read_troubles
from worker.settings import Settings
from worker.store.counters import KINDS_MOST, OTHER, Total, read_counters
from worker.store.engine import SCHEMA_VERSION, SNAPSHOT, error_name, schema_version, translate_errors
from worker.store.events import PendingEvents, count_overdue_events, count_pending_events
from worker.store.outputs import count_claims, count_expired_claims
from worker.store.reports.recent_counts import RecentCounts
from worker.store.reports.stats import Stats, count_unfinished, read_stats
from worker.store.reports.work_state import HEALTHY_SECONDS, WorkState

log = logging.getLogger(__name__)

SHARED_SECONDS = 1.0
WAIT_SECONDS = 8.0  # below the default scrape time-out of Prometheus, 10 s
WEBHOOK_LATE_SECONDS = 60.0  # webhooks that are due for longer are late


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a scrape. `unfinished` counts jobs by account, kind and state, for a limited number of kinds."""

    schema: str
    stats: Stats
    unfinished: Mapping[tuple[str, str, str], int]
    counters: Sequence[Total]
    claims: Mapping[str, int]
    stuck: int
    webhooks: PendingEvents
    webhooks_late: int
    work: WorkState
    troubles: Sequence[Trouble]


def read_figures(engine: Engine, settings: Settings, counts: RecentCounts | None = None) -> Figures:
    """Read the figures. With `counts` from the last scrape, many jobs are not counted each time.

    Raises SchemaOutdated if the tables have an older version, and Unavailable.
    """
    counts = counts or RecentCounts()
    snapshots = engine.execution_options(
        **{SNAPSHOT: True}
    )  # else a job that changes meanwhile is counted twice or not at all
    with translate_errors(engine.url), snapshots.connect() as connection:
        schema = schema_version(connection)
        if schema is None or schema < SCHEMA_VERSION:
            raise SchemaOutdated(f"the schema is {schema}, {SCHEMA_VERSION} is needed: run `fetch-worker migrate`")
        evidence = read_evidence(connection, settings)
        work, now = evidence.work, evidence.work.now
        waiting = counts.waiting(connection, now=now)
        counters = read_counters(connection)
        return Figures(
            schema=schema,
            stats=read_stats(connection, waiting, work, counts.not_pending),
            unfinished=limit_kinds(
                count_unfinished(connection, waiting), {total.key.kind for total in counters} - {""}
            ),
            counters=counters,
            claims=count_claims(connection),
            stuck=count_expired_claims(
                connection, before=now - timedelta(seconds=settings.recovery_seconds + HEALTHY_SECONDS)
            ),
            webhooks=count_pending_events(connection),
            webhooks_late=count_overdue_events(connection, before=now - timedelta(seconds=WEBHOOK_LATE_SECONDS)),
            work=work,
            troubles=read_troubles(connection, settings, evidence),
        )


def limit_kinds(counts: Mapping[tuple[str, str, str], int], known_kinds: set[str]) -> Counter[tuple[str, str, str]]:
    """Return counts by account, kind and state. Kinds beyond KINDS_MOST are counted as OTHER, known kinds last."""
    new_kinds = sorted({kind for _, kind, _ in counts} - known_kinds)
    named = known_kinds | set(new_kinds[: max(0, KINDS_MOST - len(known_kinds))])
    limited: Counter[tuple[str, str, str]] = Counter()
    for (account, kind, state), count in counts.items():
        limited[account, kind if kind in named else OTHER, state] += count
    return limited


class SharedFigures:
    """The newest figures. All scrapes within a second share them, so that ten scrapes cost as much as one.

    `get` returns `None` if the database can't be read or is too slow. It never returns old figures.
    """

    def __init__(self, read: Callable[[], Figures], *, wait_seconds: float = WAIT_SECONDS) -> None:
        self._read = read
        self._wait_seconds = wait_seconds
        self._lock = threading.Lock()
        self._last: Figures | None = None
        self._read_at = float("-inf")
        self._error: str | None = None

    def get(self) -> Figures | None:
        """Return the figures. Concurrent calls wait for the same read."""
        if not self._lock.acquire(timeout=self._wait_seconds):
            return None
        try:
            if time.monotonic() - self._read_at > SHARED_SECONDS:
                self._last = self._attempt()
                self._read_at = time.monotonic()
            return self._last
        finally:
            self._lock.release()

    def _attempt(self) -> Figures | None:
        try:
            figures, message = self._read(), None
        except WorkerError as error:
            figures, message = None, str(error)
        except SQLAlchemyError as error:
            figures, message = None, error_name(error)
        if message is not None and message != self._error:
            log.warning("no figures: %s", message)
        self._error = message
        return figures
