"""Claims: take due rows with a lease and a fencing token, renew leases, release rows."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Row,
    Select,
    Table,
    Update,
    bindparam,
    case,
    func,
    not_,
    or_,
    select,
    union,
    update,
)

from worker.core.identity import FetchAddress, can_be_asked
from worker.core.lifecycle import JobFacts, OutputFacts, Strikes
from worker.core.pacing.policy import MIN_SECONDS, WINDOW
from worker.store.due_groups import DueGroup
from worker.store.schema import MYSQL_FAMILY, bodies, events, jobs, orders, outputs, promises
from worker.store.sql_functions import Moment, seconds_between
from worker.store.transitions import NO_CLAIM

CLAIMED_TABLES = (jobs, outputs, events, orders)

Claim = tuple[int, str]  # the id of a row and the token of its claim

_JOB_COLUMNS = (
    jobs.c.id,
    jobs.c.remote_id,
    jobs.c.kind,
    jobs.c.fetch_url,
    jobs.c.fetch_base,
    jobs.c.status,
    jobs.c.eta,
    jobs.c.polls,
    jobs.c.failed_answers,
    jobs.c.unknown_answers,
    jobs.c.error_answers,
    jobs.c.empty_answers,
    jobs.c.struck_at,
    jobs.c.submitted_at,
    jobs.c.tracked_at,
    jobs.c.deadline_at,
    jobs.c.eta_at,
    jobs.c.not_ready_at,
    jobs.c.pace_scale,
)


class ClaimedJob(NamedTuple):
    """A job that this process may poll while the lease lasts. `polls` includes the request that comes next.

    It is a tuple for speed: each request creates one.
    """

    id: int
    token: str
    account: str
    remote_id: str
    kind: str
    address: FetchAddress
    eta: float | None
    polls: int
    submitted_at: datetime
    facts: JobFacts
    eta_at: datetime | None = None
    not_ready_at: datetime | None = None
    pace_scale: float | None = None


@dataclass(frozen=True, slots=True)
class ClaimedOutput:
    """An output that this process may download while the lease lasts. `facts.attempts` includes this attempt."""

    id: int
    token: str
    job_id: int
    position: int
    urls: tuple[str, ...]
    body: bytes | None
    facts: OutputFacts
    claimed_at: datetime


def claim_jobs(
    connection: Connection,
    group: DueGroup,
    *,
    limit: int,
    token: str,
    holder: str,
    lease: timedelta,
    now: datetime,
    around: Sequence[datetime] = (),
) -> list[ClaimedJob]:
    """Claim up to `limit` due jobs of a group, earliest due time first.

    If there are too few requests for all due jobs, pass two times between the first due time and now as `around`. Then
    the most urgent jobs are claimed. The candidates are the jobs with the earliest due times, those with the latest due
    times, and those that were due just before each of the two times.

    The coming request is added to `polls` here, so that it is counted even if the process crashes. `release_jobs`
    subtracts it again.
    """
    values = {
        "of_account": group.account,
        "of_priority": group.priority,
        "of_host": group.host,
        "most": limit,
        "now": now,
        "leased_until": now + lease,
        "token": token,
        "holder": holder,
    }
    rows: list[Row[Any]] = []
    if around:
        moments = {"first": now, "second": around[0], "third": around[1], "most_and_spare": limit + SPARE}
        rows += _take(connection, jobs, _URGENT, _CLAIM, _JOB_COLUMNS, values | moments)
    if len(rows) < limit:  # for example because other transactions have locked the most urgent jobs
        values["most"] = limit - len(rows)
        rows += _take(connection, jobs, _DUE, _CLAIM, _JOB_COLUMNS, values)
    return [_claimed_job(row, group, token) for row in rows]


_IN_GROUP = (
    jobs.c.account == bindparam("of_account"),
    jobs.c.priority == bindparam("of_priority"),
    jobs.c.fetch_host == bindparam("of_host"),
    jobs.c.due_at.is_not(None),
)
_DUE = (
    select(jobs.c.id)
    .where(*_IN_GROUP, jobs.c.due_at <= bindparam("now"))
    .order_by(jobs.c.due_at)
    .limit(bindparam("most", type_=Integer))
    .with_for_update(skip_locked=True)
)


def _urgent_jobs_query() -> Select[Any]:
    """Return the query that selects due jobs by urgency (`worker.core.pacing.policy.urgency`).

    Jobs without a plan, such as nudged ones, come first.
    """
    now = bindparam("now", type_=jobs.c.due_at.type)
    since_not_ready = seconds_between(func.coalesce(jobs.c.not_ready_at, jobs.c.submitted_at), now)
    log_odds = jobs.c.pace_growth * func.ln(
        case((since_not_ready > MIN_SECONDS, since_not_ready), else_=MIN_SECONDS) / jobs.c.pace_scale
    )
    urgency = func.coalesce(log_odds, UNPLANNED)

    def window(until: str, *, oldest: bool = False) -> Select[Any]:
        order = jobs.c.due_at if oldest else jobs.c.due_at.desc()
        near = select(jobs.c.id, jobs.c.due_at, urgency.label("worth"))
        near = near.where(*_IN_GROUP, jobs.c.due_at <= bindparam(until)).order_by(order).limit(WINDOW)
        return select(near.subquery())

    windows = [window("first", oldest=True), window("first"), window("second"), window("third")]
    candidates = union(*windows).subquery()
    limit = bindparam("most", type_=Integer)
    # A few more than the limit, because other processes may claim some of them. Few enough to be looked up by id.
    candidate_limit = bindparam("most_and_spare", type_=Integer)
    urgent = select(candidates.c.id).order_by(candidates.c.worth.desc(), candidates.c.due_at).limit(candidate_limit)
    # Written so that no index matches. Without statistics of the table, a server could use that index to read all jobs.
    still_due = seconds_between(jobs.c.due_at, now) >= 0
    return (
        select(jobs.c.id)
        .where(jobs.c.id.in_(select(urgent.subquery().c.id)), still_due)
        .order_by(urgency.desc(), jobs.c.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )


SPARE = 64
UNPLANNED = 1e9
_URGENT = _urgent_jobs_query()
_CLAIM = update(jobs).values(
    due_at=bindparam("leased_until"),
    claim_token=bindparam("token"),
    claim_holder=bindparam("holder"),
    asked_at=bindparam("now"),
    polls=jobs.c.polls + 1,
)


def _take(
    connection: Connection,
    table: Table,
    due_query: Select[Any],
    claim_update: Update,
    columns: tuple[Any, ...],
    values: Mapping[str, Any],
) -> Sequence[Row[Any]]:
    """Select rows with `due_query`, update them with `claim_update`, and return `columns` of the updated rows.

    `values` has the parameters of both statements. The row locks make sure that only one process claims a row.
    """
    if connection.dialect.name in MYSQL_FAMILY:  # no UPDATE … RETURNING there
        ids = list(connection.execute(due_query, values).scalars())
        if not ids:
            return []
        connection.execute(claim_update.where(table.c.id.in_(ids)), values)
        return connection.execute(select(*columns).where(table.c.id.in_(ids))).all()
    return connection.execute(_claim_statement(table, due_query, claim_update, columns), values).all()


@cache
def _claim_statement(table: Table, due_query: Select[Any], claim_update: Update, columns: tuple[Any, ...]) -> Any:
    picked = due_query.cte("picked")  # with a plain IN, a plan could select more rows than the limit
    return claim_update.where(table.c.id == picked.c.id).returning(*columns)


_NO_STRIKES = Strikes()


def _claimed_job(row: Any, group: DueGroup, token: str) -> ClaimedJob:
    # Unpacked in the order of _JOB_COLUMNS. This runs for every request.
    (
        job_id, remote_id, kind, url, base, status, eta, polls,
        failed, unknown, error, empty, struck_at, submitted_at, tracked_at, deadline_at,
        eta_at, not_ready_at, pace_scale,
    ) = row  # fmt: skip
    strikes = _NO_STRIKES if struck_at is None else Strikes(failed, unknown, error, empty, struck_at)
    return ClaimedJob(
        job_id,
        token,
        group.account,
        remote_id,
        kind,
        FetchAddress(url, base, group.host),
        eta,
        polls,
        submitted_at,
        JobFacts(status, tracked_at, deadline_at, strikes, eta=eta),
        eta_at,
        not_ready_at,
        pace_scale,
    )


def release_jobs(connection: Connection, ids: list[int], token: str, *, due_at: datetime) -> None:
    """Release claimed jobs that were not polled. They are due at `due_at`, and the request is subtracted from `polls`.

    If a claim was lost, only `polls` changes.
    """
    lost = or_(jobs.c.claim_token.is_(None), jobs.c.claim_token != token)
    connection.execute(update(jobs).where(jobs.c.id.in_(ids), lost, jobs.c.polls > 0).values(polls=jobs.c.polls - 1))
    connection.execute(
        update(jobs)
        .where(jobs.c.id.in_(ids), jobs.c.claim_token == token)
        .values(due_at=due_at, **NO_CLAIM, polls=jobs.c.polls - 1)
    )


def release_claimed_jobs(connection: Connection, holder: str, tokens: Sequence[str], *, now: datetime) -> int:
    """Release the jobs that this process claimed with these tokens and did not poll; return how many."""
    claimed = (jobs.c.claim_holder == holder, jobs.c.claim_token.in_(tokens))
    release = update(jobs).where(*claimed).values(due_at=now, **NO_CLAIM, polls=jobs.c.polls - 1)
    return connection.execute(release).rowcount


def claim_output(
    connection: Connection,
    output_id: int,
    *,
    token: str,
    holder: str,
    lease: timedelta,
    now: datetime,
    without: Collection[str] = (),
) -> ClaimedOutput | None:
    """Claim the oldest due output, or the output with this id if none is older. Return None if nothing is due.

    A message means "one download", not "this output". So an output that was released after a crash does not wait behind
    newer ones. And if two messages each claim the other's output, both outputs are downloaded. Outputs whose link is on
    a host in `without` are skipped.
    """
    on_other_hosts = (not_(_link_is_on(host)) for host in sorted(without))
    due = (outputs.c.due_at.is_not(None), outputs.c.due_at <= now, *on_other_hosts)
    oldest_id = _oldest_due_output(connection, output_id, due)
    if oldest_id is None:
        return None
    claimed = connection.execute(
        update(outputs)
        .where(outputs.c.id == oldest_id, *due)
        .values(
            due_at=now + lease,
            queued_at=None,
            claim_token=token,
            claim_holder=holder,
            claimed_at=now,
            received_bytes=None,
            attempts=outputs.c.attempts + 1,
        )
    )
    return _read_claimed_output(connection, oldest_id, token, now) if claimed.rowcount else None


def _oldest_due_output(connection: Connection, output_id: int, due: Sequence[ColumnElement[bool]]) -> int | None:
    """Return the id of the oldest due output, or `output_id` if it is due and none is older. The row is locked."""
    named_query = select(outputs.c.listed_at).where(outputs.c.id == output_id, *due).with_for_update(skip_locked=True)
    # Lock the row now: on MariaDB, updates of neighbouring index entries can deadlock.
    listed_at = connection.execute(named_query).scalar()
    older = () if listed_at is None else (outputs.c.listed_at < listed_at,)
    oldest = (
        select(outputs.c.id)
        .where(*due, *older)
        .order_by(outputs.c.listed_at, outputs.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    oldest_id = connection.execute(oldest).scalar()
    return output_id if oldest_id is None and listed_at is not None else oldest_id


def _read_claimed_output(connection: Connection, output_id: int, token: str, claimed_at: datetime) -> ClaimedOutput:
    row = connection.execute(
        select(outputs, jobs.c.remote_id, jobs.c.fetch_base, bodies.c.body, promises.c.end_status)
        .join(jobs, jobs.c.id == outputs.c.job_id)
        .outerjoin(promises, promises.c.job_id == outputs.c.job_id)
        .outerjoin(bodies, bodies.c.output_id == outputs.c.id)
        .where(outputs.c.id == output_id)
    ).one()
    proxies = tuple(json.loads(row.proxy_urls))
    facts = OutputFacts(
        attempts=row.attempts,
        proxies=len(proxies),
        ready_at=row.listed_at,
        bad_bodies=row.bad_bodies,
        dead_since=row.dead_since,
        renewed=row.renewed,
        dead_attempts=row.dead_attempts,
        renewable=can_be_asked(row.fetch_base, row.remote_id),
        last_code=row.error_code,
        promised=row.end_status is not None,
    )
    urls = (row.url, *proxies)
    return ClaimedOutput(row.id, token, row.job_id, row.position, urls, row.body, facts, claimed_at)


def _link_is_on(host: str) -> ColumnElement[bool]:
    host_name = f"[{host}]" if ":" in host else host
    prefixes = [f"{scheme}://{host_name}{end}" for scheme in ("https", "http") for end in ("/", ":")]
    return or_(*(outputs.c.url.startswith(start, autoescape=True) for start in prefixes))


def release_output(connection: Connection, output: ClaimedOutput, *, due_at: datetime, now: datetime) -> None:
    """Release a claimed output that was not tried. It is due at `due_at`, and the attempt is not counted."""
    connection.execute(
        update(outputs)
        .where(outputs.c.id == output.id, outputs.c.claim_token == output.token, outputs.c.due_at > now)
        .values(due_at=due_at, **NO_CLAIM, attempts=outputs.c.attempts - 1)
    )


def release_claimed_outputs(connection: Connection, holder: str, tokens: Sequence[str], *, now: datetime) -> int:
    """Release the outputs that this process claimed with these tokens; return how many.

    For claims whose result could not be recorded.
    """
    claimed = (outputs.c.claim_holder == holder, outputs.c.claim_token.in_(tokens))
    release = update(outputs).where(*claimed).values(due_at=now, **NO_CLAIM)
    return connection.execute(release).rowcount


def renew_leases(connection: Connection, holder: str, *, lease: timedelta, now: datetime) -> set[Claim]:
    """Extend every lease of this process that has not expired, and return the claims. An expired lease is lost.

    Locked rows are skipped, because their results are being recorded. The recorder locks rows in another order, so
    waiting for them could end in a deadlock.
    """
    values = {"of_holder": holder, "now": now, "leased_until": now + lease}
    return {
        (row.id, row.claim_token)
        for table, unexpired, extension in _UNEXPIRED_CLAIMS
        for row in _take(connection, table, unexpired, extension, (table.c.id, table.c.claim_token), values)
    }


_UNEXPIRED_CLAIMS = [
    (
        table,
        select(table.c.id)
        .where(table.c.claim_holder == bindparam("of_holder"), table.c.due_at > bindparam("now"))
        .with_for_update(skip_locked=True),
        update(table).values(due_at=bindparam("leased_until")),
    )
    for table in CLAIMED_TABLES
]


def record_progress(connection: Connection, holder: str, received: Mapping[Claim, int], *, now: datetime) -> int:
    """Write how many bytes of these outputs were received, and return the number of updated outputs.

    Outputs whose claim was lost are skipped. So are locked rows, because their results are being recorded.
    """
    valid = (
        select(outputs.c.id)
        .where(
            outputs.c.id.in_(sorted(output_id for output_id, _ in received)),
            outputs.c.claim_token.in_([token for _, token in received]),
            outputs.c.claim_holder == holder,
            outputs.c.due_at > now,
        )
        .with_for_update(skip_locked=True)
    )
    sizes = {token: size for (_, token), size in received.items()}
    progress_update = update(outputs).values(received_bytes=case(sizes, value=outputs.c.claim_token))
    if connection.dialect.name in MYSQL_FAMILY:
        ids = list(connection.execute(valid).scalars())
        return connection.execute(progress_update.where(outputs.c.id.in_(ids))).rowcount if ids else 0
    picked = valid.cte("picked")
    return len(connection.execute(progress_update.where(outputs.c.id == picked.c.id).returning(outputs.c.id)).all())


_HOLDERS = union(*(select(table.c.claim_holder).where(table.c.claim_holder.is_not(None)) for table in CLAIMED_TABLES))


def claim_holders(connection: Connection) -> set[str]:
    """Return the identities of all processes that hold claims."""
    return set(connection.execute(_HOLDERS).scalars())


def outputs_to_queue(now: Moment, queued_before: Moment) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions of the outputs that `queue_due_outputs` finds."""
    lost = or_(outputs.c.queued_at.is_(None), outputs.c.queued_at < queued_before)
    return outputs.c.due_at.is_not(None), outputs.c.due_at <= now, lost


def queue_due_outputs(connection: Connection, *, now: datetime, queued_before: datetime, limit: int) -> list[int]:
    """Mark due outputs as queued, and return their ids, oldest link first.

    These are outputs that were never queued, or were queued before `queued_before`, so that the message must be lost.
    The caller sends their messages after the commit.
    """
    due = (
        select(outputs.c.id)
        .where(*outputs_to_queue(now, queued_before))
        .order_by(outputs.c.listed_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    ids = list(connection.execute(due).scalars())
    if ids:
        connection.execute(update(outputs).where(outputs.c.id.in_(ids)).values(queued_at=now))
    return ids
