"""The `on_done` calls of final jobs: which are due, which were sent, which a broker refused."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, and_, case, func, or_, select, update

from worker.core.lifecycle import FINAL_STATES
from worker.core.webhook import retry_delay
from worker.store.schema import jobs
from worker.store.sql_functions import Moment

BATCH = 200
RECENT = 1_000  # jobs
CLAIM = timedelta(seconds=60)  # the lease of a batch; after it, another process may send the calls again
GIVE_UP = timedelta(days=7)  # after the job's end, for a queue that refuses each message


@dataclass(frozen=True, slots=True)
class OnDoneCall:
    """A message that this process sends now. `attempts` includes this attempt."""

    job_id: int
    on_done: str
    attempts: int


@dataclass(frozen=True, slots=True)
class RefusedCalls:
    """The numbers of refused calls that are tried again and that are given up, and details of the newest one."""

    waiting: int
    given_up: int
    job_id: int | None = None
    on_done: str | None = None
    reason: str | None = None


def claim_calls(connection: Connection, *, now: datetime, job_ids: Sequence[int] | None = None) -> list[OnDoneCall]:
    """Claim the calls that are due, in the order in which the jobs ended. With `job_ids`, only claim their calls."""
    query = (
        select(jobs.c.id, jobs.c.on_done, jobs.c.on_done_attempts)
        .where(*due_calls(now, now - GIVE_UP))
        .order_by(jobs.c.completed_at)
        .limit(BATCH)
        .with_for_update(skip_locked=True)
    )
    rows = connection.execute(query if job_ids is None else query.where(jobs.c.id.in_(job_ids))).all()
    if rows:
        claimed = jobs.c.id.in_([row.id for row in rows])
        connection.execute(update(jobs).where(claimed).values(on_done_due_at=now + CLAIM))
    return [OnDoneCall(row.id, row.on_done, row.on_done_attempts + 1) for row in rows]


def record_sent(connection: Connection, job_ids: Collection[int], *, now: datetime) -> None:
    """Mark calls as sent."""
    is_sent = and_(jobs.c.id.in_(job_ids), jobs.c.status.in_(FINAL_STATES))
    connection.execute(update(jobs).where(is_sent).values(told_at=now, on_done_due_at=None, on_done_error=None))


def record_refused(connection: Connection, refused: Mapping[OnDoneCall, str], *, now: datetime) -> None:
    """Record why calls were refused. Each is due again after a delay that grows up to an hour."""
    for call, reason in refused.items():
        wait = timedelta(seconds=retry_delay(call.attempts, call.job_id % 100 / 100))
        connection.execute(
            update(jobs)
            .where(jobs.c.id == call.job_id, jobs.c.told_at.is_(None))
            .values(on_done_attempts=call.attempts, on_done_due_at=now + wait, on_done_error=reason)
        )


def release_calls(connection: Connection, job_ids: Collection[int]) -> None:
    """Release claimed calls, due now."""
    is_unsent = and_(jobs.c.id.in_(job_ids), jobs.c.told_at.is_(None))
    connection.execute(update(jobs).where(is_unsent).values(on_done_due_at=None))


def refused_calls(connection: Connection, *, now: datetime) -> RefusedCalls:
    """Return the calls that a broker has refused and not accepted since."""
    is_refused = and_(_unsent(), jobs.c.on_done_error.is_not(None))
    count = select(func.count(case((_still_tried(now - GIVE_UP), 1))), func.count()).where(is_refused)
    waiting, total = connection.execute(count).one()
    newest = select(jobs.c.id, jobs.c.on_done, jobs.c.on_done_error).order_by(jobs.c.completed_at.desc()).limit(1)
    row = connection.execute(newest.where(is_refused)).first()
    if row is None:
        return RefusedCalls(0, 0)
    return RefusedCalls(waiting, total - waiting, row.id, row.on_done, row.on_done_error)


def unsent_calls(connection: Connection, *, before: datetime) -> int:
    """Count the jobs that ended before this time and whose call was never tried."""
    query = select(func.count()).where(_unsent(), jobs.c.on_done_attempts == 0, jobs.c.completed_at < before)
    return int(connection.execute(query).scalar_one())


def recent_on_done(connection: Connection) -> list[str]:
    """Return the distinct `on_done` values of the newest jobs."""
    newest = select(jobs.c.on_done).order_by(jobs.c.id.desc()).limit(RECENT).subquery()
    query = select(newest.c.on_done).where(newest.c.on_done.is_not(None)).distinct()
    return list(connection.execute(query).scalars())


def _unsent() -> ColumnElement[bool]:
    return and_(jobs.c.completed_at.is_not(None), jobs.c.on_done.is_not(None), jobs.c.told_at.is_(None))


def due_calls(now: Moment, given_up_before: Moment) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions of the jobs whose call `claim_calls` finds: refused calls are given up after a while."""
    is_due = or_(jobs.c.on_done_due_at.is_(None), jobs.c.on_done_due_at <= now)
    return _unsent(), _still_tried(given_up_before), is_due


def _still_tried(given_up_before: Moment) -> ColumnElement[bool]:
    return or_(jobs.c.on_done_attempts == 0, jobs.c.completed_at > given_up_before)
