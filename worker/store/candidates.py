"""Candidates: remote ids that may belong to orders whose answer is not known.

A call of the API's webhook names one. A row has the time at which the API is asked about it. Claiming a candidate moves
this time forward before the request is sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, Select, func, select, update

from worker.core.lifecycle import ORDER_STATES
from worker.store.bulk_write import insert_missing
from worker.store.schema import candidates, jobs, orders

IDS_PER_QUERY = 500
SETTLED_MOST = 100  # jobs at once
RIVALS_MOST = 20
NAMED_MOST = 100  # orders of one reference that a call names
CANDIDATES_MOST = 20  # of one order: who knows the signed address can call it as often as they like


@dataclass(frozen=True, slots=True)
class DueCandidate:
    """A candidate that the API can be asked about, with the account and the API host of its order."""

    job_id: int
    remote_id: str
    account: str
    host: str


@dataclass(frozen=True, slots=True)
class ClaimedCandidate:
    """A candidate that this process may ask about until `until`. `tries` includes this request.

    `job` is the row of the uncertain job. `endpoint` and `payload` are those of its order. `named_at` is when
    the call came.
    """

    job: Row[Any]
    remote_id: str
    endpoint: str
    payload: str
    tries: int
    until: datetime
    named_at: datetime


def add_candidate(connection: Connection, reference: str, remote_id: str, *, now: datetime) -> int:
    """Note that the API named a job for the orders with this reference whose answer is not known. Return how many.

    An order of an account with a job of this remote id is left out, since the id is that job's. So is an order that
    has `CANDIDATES_MOST` already.
    """
    same_id = jobs.alias("same_id")
    is_known = select(same_id.c.id).where(same_id.c.account == jobs.c.account, same_id.c.remote_id == remote_id)
    count = select(func.count()).where(candidates.c.job_id == jobs.c.id).scalar_subquery()
    query = (
        select(jobs.c.id)
        .join(orders, orders.c.id == jobs.c.id)
        .where(
            jobs.c.reference == reference,
            jobs.c.status.in_(ORDER_STATES),
            orders.c.attempted_at.is_not(None),
            ~is_known.exists(),
            count < CANDIDATES_MOST,
        )
        .order_by(jobs.c.id)
        .limit(NAMED_MOST)
    )
    row = {"remote_id": remote_id, "named_at": now, "due_at": now}
    job_ids = list(connection.execute(query).scalars())
    return sum(insert_missing(connection, candidates, {"job_id": job_id, **row}) for job_id in job_ids)


def has_due_candidates(now: Any) -> Any:
    """Return the condition that a candidate of an uncertain order is due. `now` may be a bound parameter."""
    return _due(candidates.c.job_id, now=now).exists()


def due_candidates(connection: Connection, accounts: Sequence[str], *, now: datetime, limit: int) -> list[DueCandidate]:
    """Return the due candidates of uncertain orders of these accounts, earliest due time first."""
    columns = (candidates.c.job_id, candidates.c.remote_id, jobs.c.account, orders.c.host)
    query = _due(*columns, now=now).join(orders, orders.c.id == jobs.c.id).where(jobs.c.account.in_(accounts))
    query = query.order_by(candidates.c.due_at, candidates.c.job_id, candidates.c.remote_id).limit(limit)
    return [DueCandidate(*row) for row in connection.execute(query).all()]


def _due(*columns: Any, now: Any) -> Select[Any]:
    due = (candidates.c.due_at <= now, jobs.c.status == "uncertain")
    return select(*columns).select_from(candidates).join(jobs, jobs.c.id == candidates.c.job_id).where(*due)


def accounts_with_candidates(connection: Connection) -> list[str]:
    """Return the accounts with a candidate about which the API will be asked."""
    query = select(jobs.c.account).join(candidates, candidates.c.job_id == jobs.c.id)
    query = query.where(candidates.c.due_at.is_not(None), jobs.c.status == "uncertain").distinct()
    return sorted(connection.execute(query).scalars())


def next_candidate(connection: Connection, *, after: datetime) -> datetime | None:
    """Return when the API can be asked about the next candidate, or None if there is none."""
    query = select(func.min(candidates.c.due_at)).join(jobs, jobs.c.id == candidates.c.job_id)
    moment: datetime | None = connection.execute(
        query.where(candidates.c.due_at > after, jobs.c.status == "uncertain")
    ).scalar()
    return moment


def claim_candidate(
    connection: Connection, due: DueCandidate, *, now: datetime, lease: timedelta
) -> ClaimedCandidate | None:
    """Claim a due candidate, so that no other process asks about it before the lease ends. None if it is gone."""
    job = _locked_job(connection, due.job_id, skip_locked=True)
    row = _candidate_row(connection, due.job_id, due.remote_id)
    if job is None or job.status != "uncertain" or row is None or row.due_at is None or row.due_at > now:
        return None
    order = connection.execute(
        select(orders.c.endpoint, orders.c.payload).where(orders.c.id == due.job_id)
    ).one_or_none()
    if order is None:
        return None
    claimed = ClaimedCandidate(
        job, due.remote_id, order.endpoint, order.payload, row.tries + 1, now + lease, row.named_at
    )
    _update(connection, claimed, due_at=claimed.until, tries=claimed.tries)
    return claimed


def lock_candidate(connection: Connection, claimed: ClaimedCandidate) -> bool:
    """Lock the job of a candidate. Return whether it is still uncertain and this process still has the candidate."""
    job = _locked_job(connection, claimed.job.id)
    row = _candidate_row(connection, claimed.job.id, claimed.remote_id)
    if job is None or job.status != "uncertain" or row is None:
        return False
    return (row.tries, row.due_at) == (claimed.tries, claimed.until)


def defer_candidate(
    connection: Connection, claimed: ClaimedCandidate, note: str | None, *, due_at: datetime, counts: bool
) -> None:
    """Ask about a candidate again at `due_at`. The caller has called `lock_candidate`.

    Without a note, the earlier one stays.
    """
    tries = claimed.tries if counts else claimed.tries - 1
    values = {} if note is None else {"note": note}
    _update(connection, claimed, due_at=due_at, tries=tries, **values)


def decide_candidate(connection: Connection, claimed: ClaimedCandidate, note: str) -> None:
    """Ask no more about a candidate. The caller has called `lock_candidate`."""
    _update(connection, claimed, due_at=None, note=note)


def defer_due_candidates(connection: Connection, due: Sequence[DueCandidate], *, due_at: datetime) -> None:
    """Defer candidates that can't be asked about now, so that others need not wait for them."""
    for candidate in due:
        which = (candidates.c.job_id == candidate.job_id, candidates.c.remote_id == candidate.remote_id)
        connection.execute(update(candidates).where(*which, candidates.c.due_at < due_at).values(due_at=due_at))


def is_twin_being_sent(connection: Connection, claimed: ClaimedCandidate) -> bool:
    """Return whether another order of the same reference is being sent: its answer may name this very job."""
    query = _others(claimed).where(jobs.c.status == "ordered", orders.c.claim_token.is_not(None))
    return connection.execute(query.limit(1)).first() is not None


def rival_payloads(connection: Connection, claimed: ClaimedCandidate) -> list[str]:
    """Return the payloads of the other orders of the same reference whose answer is not known, at most `RIVALS_MOST`.

    Payloads that are equal to the one of this order are left out.
    """
    own_hash = select(orders.c.payload_sha256).where(orders.c.id == claimed.job.id).scalar_subquery()
    query = _others(claimed).where(jobs.c.status.in_(ORDER_STATES), orders.c.payload_sha256 != own_hash)
    return list(connection.execute(query.order_by(jobs.c.id).limit(RIVALS_MOST)).scalars())


def _others(claimed: ClaimedCandidate) -> Select[Any]:
    same = (jobs.c.reference == claimed.job.reference, jobs.c.account == claimed.job.account)
    query = select(orders.c.payload).select_from(jobs).join(orders, orders.c.id == jobs.c.id)
    return query.where(*same, jobs.c.id != claimed.job.id, orders.c.attempted_at.is_not(None))


def settle_candidates(connection: Connection, *, now: datetime) -> int:
    """Ask no more about due candidates of jobs that are no orders any more. Return of how many jobs."""
    query = select(candidates.c.job_id).join(jobs, jobs.c.id == candidates.c.job_id).distinct()
    over = query.where(candidates.c.due_at <= now, jobs.c.status.not_in(ORDER_STATES)).limit(SETTLED_MOST)
    job_ids = sorted(connection.execute(over).scalars())
    if job_ids:
        connection.execute(update(candidates).where(candidates.c.job_id.in_(job_ids)).values(due_at=None))
    return len(job_ids)


def candidates_of(connection: Connection, job_id: int) -> Sequence[Row[Any]]:
    """Return the candidates of a job's order, oldest first."""
    query = select(candidates).where(candidates.c.job_id == job_id)
    return connection.execute(query.order_by(candidates.c.named_at, candidates.c.remote_id)).all()


def _locked_job(connection: Connection, job_id: int, *, skip_locked: bool = False) -> Row[Any] | None:
    # All transactions lock the job before its candidates.
    query = select(jobs).where(jobs.c.id == job_id).with_for_update(skip_locked=skip_locked)
    return connection.execute(query).one_or_none()


def _candidate_row(connection: Connection, job_id: int, remote_id: str) -> Row[Any] | None:
    query = select(candidates).where(candidates.c.job_id == job_id, candidates.c.remote_id == remote_id)
    return connection.execute(query).one_or_none()


def _update(connection: Connection, claimed: ClaimedCandidate, **values: Any) -> None:
    which = (candidates.c.job_id == claimed.job.id, candidates.c.remote_id == claimed.remote_id)
    connection.execute(update(candidates).where(*which).values(**values))


def known_remote_ids(connection: Connection, account: str, remote_ids: Sequence[str]) -> set[str]:
    """Return which of these remote ids some job of the account has, in any family."""
    known: set[str] = set()
    for start in range(0, len(remote_ids), IDS_PER_QUERY):
        in_batch = jobs.c.remote_id.in_(remote_ids[start : start + IDS_PER_QUERY])
        known.update(connection.execute(select(jobs.c.remote_id).where(in_batch, jobs.c.account == account)).scalars())
    return known
