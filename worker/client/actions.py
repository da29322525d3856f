"""Acting on many jobs at once: those that a filter finds, some hundred per transaction, however many there are."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Literal

from sqlalchemy import Connection, Engine, select

from worker.client import tracking
from worker.settings import Settings
from worker.store import holds
from worker.store.counters import Tally
from worker.store.engine import database_now, engine_for, transact, translate_errors
from worker.store.events import create_events
from worker.store.holds import work_limits
from worker.store.jobs import cancel_all, retry_all
from worker.store.reports.search import FEW, JobFilter, Search, find_job_ids, lock_matching, prepare_search
from worker.store.schema import jobs

log = logging.getLogger(__name__)

Action = Literal["cancel", "retry", "hold", "resume"]

BATCH = 300  # jobs of one transaction: their rows are locked for some ten milliseconds
REST_SHARE = 0.5  # of a transaction's time nobody is in the way afterwards: SQLite has room for one writer alone
CHANGEABLE = {"cancel": ("pending", "downloading"), "retry": ("failed", "expired"), "hold": ("pending",),
              "resume": ("pending", "downloading")}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Acted:
    """One job that was acted on: whether that changed it, and its state now."""

    id: int
    changed: bool
    status: str


def changeable(action: Action, wanted: JobFilter) -> JobFilter:
    """Of the jobs that are meant, those that the action can change.

    >>> changeable("retry", JobFilter(accounts=("shop",))).statuses
    ('failed', 'expired')
    """
    states = CHANGEABLE[action]
    if wanted.statuses:
        states = tuple(state for state in states if state in wanted.statuses)
    if not states:
        return replace(wanted, ids=(0,))  # none at all
    if action == "resume" and wanted.output_codes:  # whose downloads are in trouble: they are tried at once
        return replace(wanted, statuses=states)
    by_hand = {"hold": False, "resume": True}.get(action, wanted.by_hand)
    return replace(wanted, statuses=states, by_hand=by_hand)


def act(action: Action, wanted: JobFilter, settings: Settings) -> Iterator[list[Acted]]:
    """Does it to all jobs that are meant, newest first, and tells of each transaction once it is committed.

    What no longer is as it was meant when its turn comes is left alone. Raises Unavailable; what was told of is done.
    """
    changed = 0
    try:
        for acted in _batches(action, wanted, settings):
            changed += sum(one.changed for one in acted)
            yield acted
    finally:
        if changed:
            log.info("an operator acted on a filter action=%s jobs=%s", action, changed)


def _batches(action: Action, wanted: JobFilter, settings: Settings) -> Iterator[list[Acted]]:
    engine = engine_for(settings.database)
    with translate_errors(settings.database), engine.begin() as connection:
        found = prepare_search(connection, changeable(action, wanted))
    for ids in _pages(engine, found, settings):
        for start in range(0, len(ids), BATCH):
            began = time.monotonic()
            work = partial(_act, action=action, found=found, ids=ids[start : start + BATCH], settings=settings)
            with translate_errors(settings.database):
                acted = transact(engine, work)
            if action in ("retry", "resume"):
                tracking.wake(settings)
            yield acted
            time.sleep(REST_SHARE * (time.monotonic() - began))


def _pages(engine: Engine, found: Search, settings: Settings) -> Iterator[list[int]]:
    after: int | None = None
    while True:
        with translate_errors(settings.database), engine.begin() as connection:
            ids = find_job_ids(connection, found, limit=FEW, after=after)
        if ids:
            yield ids
        if len(ids) < FEW:
            return
        after = ids[-1]


def _act(
    connection: Connection, *, action: Action, found: Search, ids: Sequence[int], settings: Settings
) -> list[Acted]:
    now = database_now(connection)
    locked = lock_matching(connection, found, ids)
    tally = Tally()
    changed = _change(connection, action, locked, tally, now, settings)
    rows = connection.execute(select(jobs.c.id, jobs.c.status).where(jobs.c.id.in_(locked)).order_by(jobs.c.id.desc()))
    acted = [Acted(row.id, row.id in changed, row.status) for row in rows.all()]
    tally.write(connection)
    return acted


def _change(
    connection: Connection, action: Action, ids: Sequence[int], tally: Tally, now: datetime, settings: Settings
) -> set[int]:
    match action:
        case "cancel":
            return cancel_all(connection, ids, tally, now=now)
        case "retry":
            create_events(connection, now=now, of=ids)  # of the ends that are taken back
            return retry_all(connection, ids, now=now)
        case "hold":
            return holds.hold(connection, ids, now=now)
        case "resume":
            return holds.resume(connection, ids, work_limits(settings), now=now)
