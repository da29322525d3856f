"""One reading of the database, of all that a scrape tells; scrapes that come together share it."""

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
from worker.operations.overview import HEALTHY_SECONDS
from worker.settings import Settings
from worker.store.counters import KINDS_MOST, OTHER, Total, read_counters
from worker.store.engine import SCHEMA_VERSION, SNAPSHOT, database_now, error_name, schema_version, translate_errors
from worker.store.events import PendingEvents, count_overdue_events, count_pending_events
from worker.store.outputs import count_claims, count_expired_claims
from worker.store.reports.stats import Stats, count_unfinished, read_stats, waiting_by_kind

log = logging.getLogger(__name__)

SHARED_SECONDS = 1.0
PATIENCE_SECONDS = 8.0  # Prometheus itself gives up after 10, unless it is told otherwise
LATE_SECONDS = 60.0  # webhooks that are due for so long are late


@dataclass(frozen=True, slots=True)
class Reading:
    """All that a scrape tells. `unfinished` counts jobs by account, kind and state, with no more kinds than totals."""

    schema: str
    standing: Stats
    unfinished: Mapping[tuple[str, str, str], int]
    counters: Sequence[Total]
    claims: Mapping[str, int]
    stuck: int
    webhooks: PendingEvents
    webhooks_late: int
    full_rps: Callable[[str], float]


def read(engine: Engine, settings: Settings) -> Reading:
    """Reads it. Raises SchemaOutdated where the tables are of an older version, Unavailable where nobody answers."""
    snapshots = engine.execution_options(**{SNAPSHOT: True})  # else a job on its way is counted twice, or not at all
    with translate_errors(engine.url), snapshots.connect() as connection:
        schema = schema_version(connection)
        if schema is None or schema < SCHEMA_VERSION:
            raise SchemaOutdated(f"the schema is {schema}, {SCHEMA_VERSION} is needed: run `fetch-worker migrate`")
        now = database_now(connection)
        waiting = waiting_by_kind(connection, now=now)
        counters = read_counters(connection)
        return Reading(
            schema=schema,
            standing=read_stats(connection, waiting, now=now, full_rps=settings.rps),
            unfinished=bounded(count_unfinished(connection, waiting), {one.key.kind for one in counters} - {""}),
            counters=counters,
            claims=count_claims(connection),
            stuck=count_expired_claims(
                connection, before=now - timedelta(seconds=settings.recovery_seconds + HEALTHY_SECONDS)
            ),
            webhooks=count_pending_events(connection),
            webhooks_late=count_overdue_events(connection, before=now - timedelta(seconds=LATE_SECONDS)),
            full_rps=settings.rps,
        )


def bounded(counts: Mapping[tuple[str, str, str], int], known: set[str]) -> Counter[tuple[str, str, str]]:
    """Counts by account, kind and state; kinds that are not known are told by name only as long as there is room."""
    fresh = sorted({kind for _, kind, _ in counts} - known)
    named = known | set(fresh[: max(0, KINDS_MOST - len(known))])
    found: Counter[tuple[str, str, str]] = Counter()
    for (account, kind, state), count in counts.items():
        found[account, kind if kind in named else OTHER, state] += count
    return found


class SharedReading:
    """The newest reading: scrapes within a second get the same, so that ten of them cost what one does.

    None where the database can't be read, or is so slow that nobody would wait for it: never an old one.
    """

    def __init__(self, read: Callable[[], Reading], *, patience: float = PATIENCE_SECONDS) -> None:
        self._read = read
        self._patience = patience
        self._lock = threading.Lock()
        self._last: Reading | None = None
        self._read_at = float("-inf")
        self._trouble: str | None = None

    def get(self) -> Reading | None:
        """The reading, and whoever comes meanwhile waits for it."""
        if not self._lock.acquire(timeout=self._patience):
            return None
        try:
            if time.monotonic() - self._read_at > SHARED_SECONDS:
                self._last = self._attempt()
                self._read_at = time.monotonic()
            return self._last
        finally:
            self._lock.release()

    def _attempt(self) -> Reading | None:
        try:
            found, trouble = self._read(), None
        except WorkerError as wrong:
            found, trouble = None, str(wrong)
        except SQLAlchemyError as error:
            found, trouble = None, error_name(error)
        if trouble is not None and trouble != self._trouble:
            log.warning("no figures: %s", trouble)
        self._trouble = trouble
        return found
