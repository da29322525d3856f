"""Change all jobs that match a filter, some hundred per transaction."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

from sqlalchemy import Connection, Engine, select

from worker.client.job_actions import JOB_ACTIONS, Action
from worker.client.selection import filter_options
from worker.client.workers import wake
from worker.settings import Settings
from worker.store import holds
from worker.store import jobs as job_store
from worker.store.audit import CountedAction
from worker.store.counters import Tally
from worker.store.engine import database_now, engine_for, transact, translate_errors
from worker.store.events import create_events
from worker.store.holds import work_limits
from worker.store.reports.search import FEW, JobFilter, Search, find_job_ids, lock_matching, prepare_search
from worker.store.schema import jobs

log = logging.getLogger(__name__)

BATCH = 300  # jobs per transaction: their rows stay locked for some ten milliseconds
PAUSE_SHARE = 0.5  # pause after a transaction, as a share of its time: SQLite allows only one writer


@dataclass(frozen=True, slots=True)
class ActionResult:
    """The result for one job: whether it changed, and its state now."""

    id: int
    changed: bool
    status: str


def changeable(action: Action, job_filter: JobFilter) -> JobFilter:
    """Return the filter, limited to jobs that the action can change.

    Uncertain orders may be paid twice if they are retried, so they must be named, by id or by state.

    >>> changeable("retry", JobFilter(accounts=("shop",))).statuses
    ('failed', 'expired')
    >>> changeable("retry", JobFilter(statuses=("uncertain",))).statuses
    ('uncertain',)
    """
    states = JOB_ACTIONS[action].states
    if job_filter.statuses:
        states = tuple(state for state in states if state in job_filter.statuses)
    elif action == "retry" and not job_filter.ids:
        states = tuple(state for state in states if state != "uncertain")
    if not states:
        return replace(job_filter, ids=(0,))  # matches no job
    if action == "resume" and job_filter.output_codes:  # also jobs that are not held: their downloads are tried at once
        return replace(job_filter, statuses=states)
    by_hand = {"hold": False, "resume": True}.get(action, job_filter.by_hand)
    return replace(job_filter, statuses=states, by_hand=by_hand)


def change_matching(action: Action, job_filter: JobFilter, settings: Settings) -> Iterator[list[ActionResult]]:
    """Apply an action to all matching jobs, newest first. Yield the results of each transaction after its commit.

    A job that no longer matches when its turn comes is not changed. The audit trail has one row for all of them. Raises
    Unavailable; the results yielded before that are committed.
    """
    changed = 0
    try:
        for results in _batches(action, job_filter, settings):
            changed += sum(result.changed for result in results)
            yield results
    finally:
        if changed:
            log.info("an operator changed jobs by filter action=%s jobs=%s", action, changed)


def _batches(action: Action, job_filter: JobFilter, settings: Settings) -> Iterator[list[ActionResult]]:
    engine = engine_for(settings.database)
    with translate_errors(settings.database), engine.begin() as connection:
        search = prepare_search(connection, changeable(action, job_filter))
    audit = CountedAction(action, filter_options(job_filter))
    for ids in _pages(engine, search, settings):
        for start in range(0, len(ids), BATCH):
            started = time.monotonic()
            batch = ids[start : start + BATCH]
            work = partial(_act, action=action, search=search, ids=batch, audit=audit, settings=settings)
            with translate_errors(settings.database):
                results = transact(engine, work)
            if action in ("retry", "resume"):
                wake(settings)
            yield results
            time.sleep(PAUSE_SHARE * (time.monotonic() - started))


def _pages(engine: Engine, search: Search, settings: Settings) -> Iterator[list[int]]:
    last_id: int | None = None
    while True:
        with translate_errors(settings.database), engine.begin() as connection:
            ids = find_job_ids(connection, search, limit=FEW, after=last_id)
        if ids:
            yield ids
        if len(ids) < FEW:
            return
        last_id = ids[-1]


def _act(
    connection: Connection,
    *,
    action: Action,
    search: Search,
    ids: Sequence[int],
    audit: CountedAction,
    settings: Settings,
) -> list[ActionResult]:
    now = database_now(connection)
    locked = lock_matching(connection, search, ids)
    tally = Tally()
    changed = _change(connection, action, locked, tally, now, settings)
    rows = connection.execute(select(jobs.c.id, jobs.c.status).where(jobs.c.id.in_(locked)).order_by(jobs.c.id.desc()))
    results = [ActionResult(row.id, row.id in changed, row.status) for row in rows.all()]
    audit.add(connection, len(changed), now=now)
    tally.write(connection)
    return results


def _change(
    connection: Connection, action: Action, ids: Sequence[int], tally: Tally, now: datetime, settings: Settings
) -> set[int]:
    match action:
        case "cancel":
            return job_store.cancel_all(connection, ids, tally, now=now)
        case "retry":
            create_events(connection, now=now, of=ids)  # the events of the final states, before leaving them
            return job_store.retry_all(connection, ids, now=now)
        case "hold":
            return holds.hold(connection, ids, now=now)
        case "resume":
            return holds.resume(connection, ids, work_limits(settings), now=now)
