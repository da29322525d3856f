"""Claims: taking due rows under a lease with a fencing token, renewing the lease, giving rows back."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
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
from worker.core.pacing.policy import SOONEST, WINDOW
from worker.store.schema import MYSQL_FAMILY, bodies, events, jobs, outputs, promises, waiting_account
from worker.store.sql_functions import seconds_between

Claim = tuple[int, str]  # the id of a row, and the token that its claim is known by

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
    """A job that is ours to ask about while the lease lasts. `polls` counts the request about to be made.

    A tuple, since one is made for every single request.
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
    """An output that is ours to download while the lease lasts. `attempts` counts this one."""

    id: int
    token: str
    job_id: int
    position: int
    urls: tuple[str, ...]
    body: bytes | None
    facts: OutputFacts
    claimed_at: datetime


@dataclass(frozen=True, slots=True)
class DueGroup:
    """Jobs of one account, priority and API host that wait for a request: when the first of them is due."""

    account: str
    priority: int
    host: str
    due_at: datetime


def in_due_group(level: DueGroup) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions of the jobs of a level, in the words of the index that finds them."""
    return (
        jobs.c.account == level.account,
        jobs.c.priority == level.priority,
        jobs.c.fetch_host == level.host,
        jobs.c.due_at.is_not(None),
    )


def due_groups(connection: Connection, accounts: Iterable[str]) -> list[DueGroup]:
    """Return the levels of these accounts: account by account, the highest priority first, then the longest due.

    Claimed jobs count with the end of their lease. The query leaps from one level to the next in the index, so its cost
    is the number of levels, not of jobs.
    """
    if connection.dialect.name in MYSQL_FAMILY:
        return _waiting_levels_mysql(connection, list(accounts))
    return [
        DueGroup(account, row.priority, row.host, row.due_at)
        for account in accounts
        for row in connection.execute(_LEVELS, {"account": account}).all()
    ]


def _waiting_levels_mysql(connection: Connection, accounts: list[str]) -> list[DueGroup]:
    """Do the same with a loose index scan, which MariaDB and MySQL have: one look-up per level."""
    rows = connection.execute(_LEVELS_MYSQL, {"accounts": accounts}).all()
    levels = [DueGroup(*row) for row in rows]
    return sorted(levels, key=lambda level: (accounts.index(level.account), -level.priority, level.due_at))


def _levels() -> Select[Any]:
    waiting = (jobs.c.account == bindparam("account"), jobs.c.due_at.is_not(None))
    highest = select(func.max(jobs.c.priority).label("priority")).where(*waiting).cte("priorities", recursive=True)
    lower = select(func.max(jobs.c.priority)).where(*waiting, jobs.c.priority < highest.c.priority).scalar_subquery()
    priorities = highest.union_all(select(lower).where(highest.c.priority.is_not(None)))

    def last_host(priority: ColumnElement[int], *before: ColumnElement[bool]) -> Any:
        of_priority = select(func.max(jobs.c.fetch_host)).where(*waiting, jobs.c.priority == priority, *before)
        return of_priority.scalar_subquery()

    last = select(priorities.c.priority, last_host(priorities.c.priority).label("host")).cte("hosts", recursive=True)
    earlier = last_host(last.c.priority, jobs.c.fetch_host < last.c.host)
    levels = last.union_all(select(last.c.priority, earlier).where(last.c.host.is_not(None)))
    first = (
        select(jobs.c.due_at)
        .where(*waiting, jobs.c.priority == levels.c.priority, jobs.c.fetch_host == levels.c.host)
        .order_by(jobs.c.due_at)
        .limit(1)
        .scalar_subquery()
    )
    found = select(levels.c.priority, levels.c.host, first.label("due_at")).where(levels.c.host.is_not(None))
    return found.order_by(levels.c.priority.desc(), "due_at")


_LEVELS = _levels()
_LEVELS_MYSQL = (
    select(waiting_account, jobs.c.priority, jobs.c.fetch_host, func.min(jobs.c.due_at))
    .where(waiting_account.in_(bindparam("accounts", expanding=True)))
    .group_by(waiting_account, jobs.c.priority, jobs.c.fetch_host)
)


def claim_jobs(
    connection: Connection,
    level: DueGroup,
    *,
    limit: int,
    token: str,
    holder: str,
    lease: timedelta,
    now: datetime,
    around: Sequence[datetime] = (),
) -> list[ClaimedJob]:
    """Takes up to `limit` due jobs of a level, the longest due first.

    Where requests are short, `around` names two moments between the first due time and now: then the most urgent are
    taken, out of those due longest, those due last, and those due just before these moments.

    Every request to come is counted here, so that a crash can't hide one; `release_jobs` takes it back.
    """
    values = {
        "of_account": level.account,
        "of_priority": level.priority,
        "of_host": level.host,
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
    if len(rows) < limit:  # or the most urgent ones are locked by somebody else: they keep no other job
        values["most"] = limit - len(rows)
        rows += _take(connection, jobs, _DUE, _CLAIM, _JOB_COLUMNS, values)
    return [_claimed_job(row, level, token) for row in rows]


_OF_LEVEL = (
    jobs.c.account == bindparam("of_account"),
    jobs.c.priority == bindparam("of_priority"),
    jobs.c.fetch_host == bindparam("of_host"),
    jobs.c.due_at.is_not(None),
)
_DUE = (
    select(jobs.c.id)
    .where(*_OF_LEVEL, jobs.c.due_at <= bindparam("now"))
    .order_by(jobs.c.due_at)
    .limit(bindparam("most", type_=Integer))
    .with_for_update(skip_locked=True)
)


def _urgent() -> Select[Any]:
    """The same by urgency (`worker.core.pacing.policy.urgency`): what was nudged, or never planned, comes first."""
    now = bindparam("now", type_=jobs.c.due_at.type)
    unseen = seconds_between(func.coalesce(jobs.c.not_ready_at, jobs.c.submitted_at), now)
    odds = jobs.c.pace_growth * func.ln(case((unseen > SOONEST, unseen), else_=SOONEST) / jobs.c.pace_scale)
    worth = func.coalesce(odds, UNPLANNED)

    def window(until: str, *, oldest: bool = False) -> Select[Any]:
        order = jobs.c.due_at if oldest else jobs.c.due_at.desc()
        near = select(jobs.c.id, jobs.c.due_at, worth.label("worth"))
        near = near.where(*_OF_LEVEL, jobs.c.due_at <= bindparam(until)).order_by(order).limit(WINDOW)
        return select(near.subquery())

    windows = [window("first", oldest=True), window("first"), window("second"), window("third")]
    candidates = union(*windows).subquery()
    most = bindparam("most", type_=Integer)
    # A few more than are wanted, since others may be taking the same; and few, so that they are looked up by their ids.
    some = bindparam("most_and_spare", type_=Integer)
    best = select(candidates.c.id).order_by(candidates.c.worth.desc(), candidates.c.due_at).limit(some)
    # Asked in a way that no index serves: where nothing is known of the table yet a server would go through all of it.
    still_due = seconds_between(jobs.c.due_at, now) >= 0
    return (
        select(jobs.c.id)
        .where(jobs.c.id.in_(select(best.subquery().c.id)), still_due)
        .order_by(worth.desc(), jobs.c.due_at)
        .limit(most)
        .with_for_update(skip_locked=True)
    )


SPARE = 64
UNPLANNED = 1e9
_URGENT = _urgent()
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
    due: Select[Any],
    taken: Update,
    columns: tuple[Any, ...],
    values: Mapping[str, Any],
) -> Sequence[Row[Any]]:
    """Updates the rows that are due, at most once by anybody. `values` are the parameters of both statements."""
    if connection.dialect.name in MYSQL_FAMILY:  # no UPDATE … RETURNING there
        ids = list(connection.execute(due, values).scalars())
        if not ids:
            return []
        connection.execute(taken.where(table.c.id.in_(ids)), values)
        return connection.execute(select(*columns).where(table.c.id.in_(ids))).all()
    return connection.execute(_taking(table, due, taken, columns), values).all()


@cache
def _taking(table: Table, due: Select[Any], taken: Update, columns: tuple[Any, ...]) -> Any:
    picked = due.cte("picked")  # a plain IN could be planned so that it picks more than the limit
    return taken.where(table.c.id == picked.c.id).returning(*columns)


_UNBLEMISHED = Strikes()


def _claimed_job(row: Any, level: DueGroup, token: str) -> ClaimedJob:
    # Unpacked in the order of _JOB_COLUMNS: this is done for every single request.
    (
        job_id, remote_id, kind, url, base, status, eta, polls,
        failed, unknown, error, empty, struck_at, submitted_at, tracked_at, deadline_at,
        eta_at, not_ready_at, pace_scale,
    ) = row  # fmt: skip
    strikes = _UNBLEMISHED if struck_at is None else Strikes(failed, unknown, error, empty, struck_at)
    return ClaimedJob(
        job_id,
        token,
        level.account,
        remote_id,
        kind,
        FetchAddress(url, base, level.host),
        eta,
        polls,
        submitted_at,
        JobFacts(status, tracked_at, deadline_at, strikes, eta=eta),
        eta_at,
        not_ready_at,
        pace_scale,
    )


def release_jobs(connection: Connection, ids: list[int], token: str, *, due_at: datetime) -> None:
    """Give back claimed jobs that were not asked about after all: due at `due_at`, the request not counted.

    A job whose claim was lost meanwhile stays as it is, but for the count.
    """
    lost = or_(jobs.c.claim_token.is_(None), jobs.c.claim_token != token)
    connection.execute(update(jobs).where(jobs.c.id.in_(ids), lost, jobs.c.polls > 0).values(polls=jobs.c.polls - 1))
    connection.execute(
        update(jobs)
        .where(jobs.c.id.in_(ids), jobs.c.claim_token == token)
        .values(due_at=due_at, claim_token=None, claim_holder=None, polls=jobs.c.polls - 1)
    )


def release_claimed_jobs(connection: Connection, holder: str, tokens: Sequence[str], *, now: datetime) -> int:
    """Gives back whatever this process claimed with these tokens and never asked about; how many jobs."""
    mine = (jobs.c.claim_holder == holder, jobs.c.claim_token.in_(tokens))
    released = update(jobs).where(*mine).values(due_at=now, claim_token=None, claim_holder=None, polls=jobs.c.polls - 1)
    return connection.execute(released).rowcount


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
    """Takes a due output: the oldest one there is, or the one named. None where there is nothing to do.

    A message stands for one download, not for one output: so one that was put back after a crash does not wait behind a
    backlog of younger ones, and where two messages cross, each having taken the other's output, none is left over.
    Outputs whose link is on one of the hosts in `without` are passed over.
    """
    elsewhere = tuple(not_(_link_is_on(host)) for host in sorted(without))
    due = (outputs.c.due_at.is_not(None), outputs.c.due_at <= now, *elsewhere)
    wanted = select(outputs.c.listed_at).where(outputs.c.id == output_id, *due).with_for_update(skip_locked=True)
    # Locked already here: on MariaDB updates that meet in an index block each other.
    named = connection.execute(wanted).scalar()
    older = () if named is None else (outputs.c.listed_at < named,)
    oldest = (
        select(outputs.c.id)
        .where(*due, *older)
        .order_by(outputs.c.listed_at, outputs.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    found = connection.execute(oldest).scalar()
    if found is None and named is None:
        return None
    output_id = output_id if found is None else found
    taken = connection.execute(
        update(outputs)
        .where(outputs.c.id == output_id, *due)
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
    if not taken.rowcount:
        return None
    row = connection.execute(
        select(outputs, jobs.c.remote_id, jobs.c.fetch_base, bodies.c.body, promises.c.end_status)
        .join(jobs, jobs.c.id == outputs.c.job_id)
        .outerjoin(promises, promises.c.job_id == outputs.c.job_id)
        .outerjoin(bodies, bodies.c.output_id == outputs.c.id)
        .where(outputs.c.id == output_id)
    ).one()
    proxies = tuple(json.loads(row.proxy_urls))
    return ClaimedOutput(
        id=row.id,
        token=token,
        job_id=row.job_id,
        position=row.position,
        urls=(row.url, *proxies),
        body=row.body,
        facts=OutputFacts(
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
        ),
        claimed_at=now,
    )


def _link_is_on(host: str) -> ColumnElement[bool]:
    name = f"[{host}]" if ":" in host else host
    starts = [f"{scheme}://{name}{end}" for scheme in ("https", "http") for end in ("/", ":")]
    return or_(*(outputs.c.url.startswith(start, autoescape=True) for start in starts))


def release_output(connection: Connection, output: ClaimedOutput, *, due_at: datetime, now: datetime) -> None:
    """Gives a claimed output back that was not tried after all: due at `due_at`, the attempt not counted."""
    connection.execute(
        update(outputs)
        .where(outputs.c.id == output.id, outputs.c.claim_token == output.token, outputs.c.due_at > now)
        .values(due_at=due_at, claim_token=None, claim_holder=None, attempts=outputs.c.attempts - 1)
    )


def release_claimed_outputs(connection: Connection, holder: str, tokens: Sequence[str], *, now: datetime) -> int:
    """Gives back whatever this process claimed with these tokens and has lost sight of; how many outputs."""
    mine = (outputs.c.claim_holder == holder, outputs.c.claim_token.in_(tokens))
    released = update(outputs).where(*mine).values(due_at=now, claim_token=None, claim_holder=None)
    return connection.execute(released).rowcount


def renew_leases(connection: Connection, holder: str, *, lease: timedelta, now: datetime) -> set[Claim]:
    """Extend every lease of this process that is not over yet; return the claims. One that is over is lost for good.

    Rows that are locked are being recorded just now: waiting for them, in another order than the recorder's, could
    block both for good.
    """
    values = {"of_holder": holder, "now": now, "leased_until": now + lease}
    return {
        (row.id, row.claim_token)
        for table, live, longer in _LIVE_CLAIMS
        for row in _take(connection, table, live, longer, (table.c.id, table.c.claim_token), values)
    }


_LIVE_CLAIMS = [
    (
        table,
        select(table.c.id)
        .where(table.c.claim_holder == bindparam("of_holder"), table.c.due_at > bindparam("now"))
        .with_for_update(skip_locked=True),
        update(table).values(due_at=bindparam("leased_until")),
    )
    for table in (jobs, outputs, events)
]


def record_progress(connection: Connection, holder: str, received: Mapping[Claim, int], *, now: datetime) -> int:
    """Notes how many bytes of these outputs are there, where the claim still stands; how many outputs.

    One that is locked is being recorded just now, and told of no more.
    """
    standing = (
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
    noted = update(outputs).values(received_bytes=case(sizes, value=outputs.c.claim_token))
    if connection.dialect.name in MYSQL_FAMILY:
        ids = list(connection.execute(standing).scalars())
        return connection.execute(noted.where(outputs.c.id.in_(ids))).rowcount if ids else 0
    picked = standing.cte("picked")
    return len(connection.execute(noted.where(outputs.c.id == picked.c.id).returning(outputs.c.id)).all())


def claim_holders(connection: Connection) -> set[str]:
    """The processes that hold claims now."""
    return {
        holder
        for table in (jobs, outputs, events)
        for holder in connection.execute(
            select(table.c.claim_holder).where(table.c.claim_holder.is_not(None)).distinct()
        ).scalars()
    }


def queue_due_outputs(connection: Connection, *, now: datetime, queued_before: datetime, limit: int) -> list[int]:
    """Outputs that are due and were put on no queue, or so long ago that the message must be lost; oldest link first.

    They are marked as queued at `now`; the caller sends their tasks after the commit.
    """
    due = (
        select(outputs.c.id)
        .where(
            outputs.c.due_at.is_not(None),
            outputs.c.due_at <= now,
            or_(outputs.c.queued_at.is_(None), outputs.c.queued_at < queued_before),
        )
        .order_by(outputs.c.listed_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    ids = list(connection.execute(due).scalars())
    if ids:
        connection.execute(update(outputs).where(outputs.c.id.in_(ids)).values(queued_at=now))
    return ids
