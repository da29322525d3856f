"""Late looks at expired jobs. A row says when the next one is due; a look moves it on before its request is sent."""

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

LOST_LOOKS = 3  # beyond those planned: more began and never ended, so the look kills its process again and again
STALE = timedelta(days=1)  # after its last look's time a row is of no use: by then no link lives


@dataclass(frozen=True, slots=True)
class DueLook:
    """An expired job whose look is due: its account, and the host that it is asked at."""

    job_id: int
    account: str
    host: str


@dataclass(frozen=True, slots=True)
class ClaimedLook:
    """A look that is ours to make until `until`. `looks` counts it, and `job.polls` its request."""

    job: ClaimedJob
    looks: int
    until: datetime


def plan_looks(connection: Connection, job_ids: Collection[int], after: Sequence[float], *, now: datetime) -> None:
    """Plan the looks at jobs that expired just now, by the seconds after their deadline.

    A job whose promised links are tried before it expires is downloading meanwhile, and has its looks from then on.
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
    """Forget the looks at jobs that left `expired`. The caller has their rows."""
    connection.execute(delete(late_looks).where(late_looks.c.job_id.in_(list(job_ids))))


def due_looks(connection: Connection, accounts: Sequence[str], *, now: datetime, limit: int) -> list[DueLook]:
    """Return the looks at jobs of these accounts that are due, those due longest first."""
    query = (
        select(late_looks.c.job_id, jobs.c.account, jobs.c.fetch_host)
        .join(jobs, jobs.c.id == late_looks.c.job_id)
        .where(late_looks.c.due_at <= now, jobs.c.status == "expired", jobs.c.account.in_(accounts))
        .order_by(late_looks.c.due_at, late_looks.c.job_id)
        .limit(limit)
    )
    return [DueLook(*row) for row in connection.execute(query).all()]


def claim_look(connection: Connection, job_id: int, *, now: datetime, lease: timedelta) -> ClaimedLook | None:
    """Take a look that is due: nobody else makes it before the lease is over. None where it is not ours to make.

    The request to come is counted in `polls`; `give_back_look` takes that back.
    """
    row = _locked(connection, job_id)
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
    return ClaimedLook(_claimed(row), look.looks + 1, until)


def _locked(connection: Connection, job_id: int) -> Row[Any] | None:
    # The job is locked before its look, as everywhere.
    locked = select(jobs).where(jobs.c.id == job_id).with_for_update(skip_locked=True)
    return connection.execute(locked).one_or_none()


def _claimed(row: Row[Any]) -> ClaimedJob:
    return ClaimedJob(
        row.id,
        "",  # no token: the look's own row is what is claimed
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
    """Lock the job of a look, and return whether it is still expired and the look still ours."""
    locked = select(jobs.c.status).where(jobs.c.id == look.job.id).with_for_update()
    if connection.execute(locked).scalar_one_or_none() != "expired":
        return False
    row = connection.execute(select(late_looks).where(late_looks.c.job_id == look.job.id)).one_or_none()
    return row is not None and (row.looks, row.due_at) == (look.looks, look.until)


def plan_next_look(connection: Connection, look: ClaimedLook, after: Sequence[float], *, now: datetime) -> None:
    """Plan the look after this one, or none. The caller has the job's row, and the look is still ours."""
    due_at = next_look(look.job.facts.deadline_at, look.looks, after, now=now)
    if due_at is None:
        delete_looks(connection, [look.job.id])
    else:
        connection.execute(update(late_looks).where(late_looks.c.job_id == look.job.id).values(due_at=due_at))


def defer_look(connection: Connection, look: ClaimedLook, *, due_at: datetime, sent: bool) -> None:
    """Put a look off that came to nothing: it does not count. The request does where it was sent. As above."""
    connection.execute(
        update(late_looks).where(late_looks.c.job_id == look.job.id).values(due_at=due_at, looks=look.looks - 1)
    )
    if not sent:
        connection.execute(
            update(jobs).where(jobs.c.id == look.job.id, jobs.c.polls > 0).values(polls=jobs.c.polls - 1)
        )


def defer_due_looks(connection: Connection, job_ids: Sequence[int], *, now: datetime, due_at: datetime) -> None:
    """Put due looks off that can't be made now, so that they keep no other waiting."""
    # Jobs are locked before their looks, as everywhere.
    locked = select(jobs.c.id).where(jobs.c.id.in_(job_ids)).order_by(jobs.c.id).with_for_update(skip_locked=True)
    ours = list(connection.execute(locked).scalars()) if job_ids else []
    if ours:
        due = (late_looks.c.job_id.in_(ours), late_looks.c.due_at <= now)
        connection.execute(update(late_looks).where(*due).values(due_at=due_at))


def delete_stale_looks(connection: Connection, after: Sequence[float], *, now: datetime, limit: int) -> int:
    """Forget due looks that are of no use; return how many.

    Their job is not expired, or their last time is more than a day ago, or they began too often without an end.
    """
    last = timedelta(seconds=after[-1]) + STALE
    over = or_(
        jobs.c.status.not_in(("expired", "downloading")),
        jobs.c.deadline_at < now - last,
        late_looks.c.looks > len(after) + LOST_LOOKS,
    )
    query = select(jobs.c.id).join(late_looks, late_looks.c.job_id == jobs.c.id)
    query = query.where(late_looks.c.due_at <= now, over).order_by(jobs.c.id).limit(limit)
    stale = list(connection.execute(query.with_for_update(skip_locked=True)).scalars())
    if stale:
        delete_looks(connection, stale)
    return len(stale)


def look_of(connection: Connection, job_id: int) -> Row[Any] | None:
    """Return when a job is looked at next, and how often it was; None where it is not."""
    return connection.execute(select(late_looks).where(late_looks.c.job_id == job_id)).one_or_none()
