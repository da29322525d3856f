"""Late looks: polls of jobs that have expired. A row has the time of a job's next look.

Claiming a look moves this time forward before the request is sent.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, delete, or_, select, update

from worker.core.identity import FetchAddress, can_be_asked
from worker.core.late_looks import next_look
from worker.core.lifecycle import JobFacts
from worker.store.bulk_write import insert_missing
from worker.store.claims import ClaimedJob
from worker.store.schema import jobs, late_looks

LOST_LOOKS = 3  # looks beyond the planned number: more were claimed and lost, so the look may crash its process
STALE = timedelta(days=1)  # a row this long after its last planned look is useless, because its links have expired


@dataclass(frozen=True, slots=True)
class DueLook:
    """An expired job whose look is due, with its account and API host."""

    job_id: int
    account: str
    host: str


@dataclass(frozen=True, slots=True)
class ClaimedLook:
    """A look that this process may make until `until`. `looks` includes this look, `job.polls` its request."""

    job: ClaimedJob
    looks: int
    until: datetime


def plan_looks(connection: Connection, job_ids: Collection[int], after: Sequence[float], *, now: datetime) -> None:
    """Plan the looks of jobs that expired just now. `after` has the seconds after their deadline.

    A job whose promised links are tried before it expires is downloading. Its looks are planned at that time already.
    """
    if not job_ids or not after:
        return
    expired = select(jobs.c.id, jobs.c.deadline_at, jobs.c.fetch_base, jobs.c.remote_id)
    expired = expired.where(jobs.c.id.in_(job_ids), jobs.c.status.in_(("expired", "downloading"))).order_by(jobs.c.id)
    for row in connection.execute(expired).all():
        due_at = next_look(row.deadline_at, 0, after, now=now)
        if due_at is not None and can_be_asked(row.fetch_base, row.remote_id):
            insert_missing(connection, late_looks, {"job_id": row.id, "looks": 0, "due_at": due_at})


def delete_looks(connection: Connection, job_ids: Iterable[int]) -> None:
    """Delete the looks of jobs that are no longer expired. The caller has locked the jobs' rows."""
    connection.execute(delete(late_looks).where(late_looks.c.job_id.in_(list(job_ids))))


def due_looks(connection: Connection, accounts: Sequence[str], *, now: datetime, limit: int) -> list[DueLook]:
    """Return the due looks of jobs of these accounts, earliest due time first."""
    query = (
        select(late_looks.c.job_id, jobs.c.account, jobs.c.fetch_host)
        .join(jobs, jobs.c.id == late_looks.c.job_id)
        .where(late_looks.c.due_at <= now, jobs.c.status == "expired", jobs.c.account.in_(accounts))
        .order_by(late_looks.c.due_at, late_looks.c.job_id)
        .limit(limit)
    )
    return [DueLook(*row) for row in connection.execute(query).all()]


def claim_look(connection: Connection, job_id: int, *, now: datetime, lease: timedelta) -> ClaimedLook | None:
    """Claim a due look, so that no other process makes it before the lease ends. Return None if it is not available.

    The coming request is added to `polls`. `defer_look` subtracts it again if the request was not sent.
    """
    row = _lock_job(connection, job_id)
    if row is None:
        return None
    look = connection.execute(select(late_looks).where(late_looks.c.job_id == job_id)).one_or_none()
    if look is None or look.due_at > now or row.status != "expired":
        return None
    until = now + lease
    connection.execute(
        update(late_looks).where(late_looks.c.job_id == job_id).values(due_at=until, looks=look.looks + 1)
    )
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(polls=row.polls + 1, asked_at=now))
    return ClaimedLook(_claimed_job(row), look.looks + 1, until)


def _lock_job(connection: Connection, job_id: int) -> Row[Any] | None:
    # All transactions lock the job before its look.
    locked = select(jobs).where(jobs.c.id == job_id).with_for_update(skip_locked=True)
    return connection.execute(locked).one_or_none()


def _claimed_job(row: Row[Any]) -> ClaimedJob:
    return ClaimedJob(
        row.id,
        "",  # no token: the claim is on the look's row
        row.account,
        row.remote_id,
        row.kind,
        FetchAddress(row.fetch_url, row.fetch_base, row.fetch_host),
        row.eta,
        row.polls + 1,
        row.submitted_at,
        JobFacts(row.status, row.tracked_at, row.deadline_at, eta=row.eta),
        not_ready_at=row.not_ready_at,
    )


def lock_look(connection: Connection, look: ClaimedLook) -> bool:
    """Lock the job of a look. Return whether the job is still expired and this process still has the look."""
    locked = select(jobs.c.status).where(jobs.c.id == look.job.id).with_for_update()
    if connection.execute(locked).scalar_one_or_none() != "expired":
        return False
    row = connection.execute(select(late_looks).where(late_looks.c.job_id == look.job.id)).one_or_none()
    return row is not None and (row.looks, row.due_at) == (look.looks, look.until)


def plan_next_look(connection: Connection, look: ClaimedLook, after: Sequence[float], *, now: datetime) -> None:
    """Plan the next look, if there is one. The caller has called `lock_look`."""
    due_at = next_look(look.job.facts.deadline_at, look.looks, after, now=now)
    if due_at is None:
        delete_looks(connection, [look.job.id])
    else:
        connection.execute(update(late_looks).where(late_looks.c.job_id == look.job.id).values(due_at=due_at))


def defer_look(connection: Connection, look: ClaimedLook, *, due_at: datetime, sent: bool) -> None:
    """Defer a look without a result, which does not count. Its request counts if it was sent.

    The caller has called `lock_look`.
    """
    connection.execute(
        update(late_looks).where(late_looks.c.job_id == look.job.id).values(due_at=due_at, looks=look.looks - 1)
    )
    if not sent:
        connection.execute(
            update(jobs).where(jobs.c.id == look.job.id, jobs.c.polls > 0).values(polls=jobs.c.polls - 1)
        )


def defer_due_looks(connection: Connection, job_ids: Sequence[int], *, now: datetime, due_at: datetime) -> None:
    """Defer due looks that can't be made now, so that others need not wait for them."""
    # All transactions lock the jobs before their looks.
    locked = select(jobs.c.id).where(jobs.c.id.in_(job_ids)).order_by(jobs.c.id).with_for_update(skip_locked=True)
    locked_ids = list(connection.execute(locked).scalars()) if job_ids else []
    if locked_ids:
        due = (late_looks.c.job_id.in_(locked_ids), late_looks.c.due_at <= now)
        connection.execute(update(late_looks).where(*due).values(due_at=due_at))


def delete_stale_looks(connection: Connection, after: Sequence[float], *, now: datetime, limit: int) -> int:
    """Delete due looks that are useless; return how many.

    Their job is not expired, or the last planned time is more than a day ago, or they were claimed and lost too often.
    """
    last_look = timedelta(seconds=after[-1]) + STALE
    is_stale = or_(
        jobs.c.status.not_in(("expired", "downloading")),
        jobs.c.deadline_at < now - last_look,
        late_looks.c.looks > len(after) + LOST_LOOKS,
    )
    query = select(jobs.c.id).join(late_looks, late_looks.c.job_id == jobs.c.id)
    query = query.where(late_looks.c.due_at <= now, is_stale).order_by(jobs.c.id).limit(limit)
    stale_ids = list(connection.execute(query.with_for_update(skip_locked=True)).scalars())
    if stale_ids:
        delete_looks(connection, stale_ids)
    return len(stale_ids)


def look_of(connection: Connection, job_id: int) -> Row[Any] | None:
    """Return the row with a job's next look, or None."""
    return connection.execute(select(late_looks).where(late_looks.c.job_id == job_id)).one_or_none()
