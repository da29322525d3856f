"""Queries for the live snapshot. Each has a limit, so its cost does not grow with the number of jobs.

A query that could read all jobs reads an index in its order instead, and stops at the limit.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, func, or_, select

from worker.core.lifecycle import JOB_STATES
from worker.store.due_groups import DueGroup, in_due_group
from worker.store.schema import IS_HELD, MYSQL_FAMILY, events, jobs, orders, outputs
from worker.store.sql_functions import DUE_ACCOUNT, HAS_DUE_TIME

COUNTED_MOST = 10_000  # jobs of one state; a larger number is shown as "more than"
CLAIMS_MOST = 200
FAILURES_LOOKED_AT = 100  # per state: those with the highest ids, which are not always the ones that ended last
LEVELS_MOST = 500


def count_jobs(connection: Connection) -> dict[str, int]:
    """Return the number of jobs in each state, up to COUNTED_MOST + 1.

    Pending jobs include downloading jobs that wait for fresh links.
    """
    return {state: count_in_state(connection, state) for state in JOB_STATES}


def count_in_state(connection: Connection, state: str) -> int:
    """Return the number of jobs in a state, up to COUNTED_MOST + 1."""
    if state == "pending":
        query = select(DUE_ACCOUNT).where(HAS_DUE_TIME)
        # In the order of its partial index, PostgreSQL stops early. MariaDB has another index.
        index_order = (jobs.c.account, jobs.c.priority, jobs.c.fetch_host, jobs.c.due_at)
        query = query if connection.dialect.name in MYSQL_FAMILY else query.order_by(*index_order)
    else:
        query = _in_final_state(connection, state, jobs.c.id)
    count_query = select(func.count()).select_from(query.limit(COUNTED_MOST + 1).subquery())
    return int(connection.execute(count_query).scalar_one())


def _in_final_state(
    connection: Connection, state: str, *columns: ColumnElement[Any], newest_first: bool = False
) -> Select[Any]:
    """Return a query for the jobs in a state, in a form for which each server reads the index and does not sort."""
    order: tuple[ColumnElement[Any], ...] = (jobs.c.id,)
    conditions: tuple[ColumnElement[bool], ...] = (jobs.c.status == state,)
    if connection.dialect.name not in MYSQL_FAMILY:
        order = (jobs.c.status, jobs.c.id)
        conditions = (jobs.c.status.between(state, state), jobs.c.status != "pending")
    query = select(*columns).where(*conditions)
    return query.order_by(*(column.desc() if newest_first else column for column in order))


def longest_due(connection: Connection, groups: Iterable[DueGroup], *, before: datetime, limit: int) -> list[Row[Any]]:
    """Return the jobs that were due before a time, earliest due time first. Circuit breakers are ignored.

    A job that an operator holds is not due.
    """
    late_groups = sorted((group for group in groups if group.due_at < before), key=lambda group: group.due_at)
    rows: list[Row[Any]] = []
    for group in late_groups[:limit]:  # the jobs of later groups can't be among the first `limit`
        if len(rows) == limit and rows[-1].due_at <= group.due_at:
            break
        query = (
            select(*_LATE_COLUMNS)
            .where(*in_due_group(group), jobs.c.due_at < before)
            .order_by(jobs.c.due_at)
            .limit(limit)
        )
        rows += list(connection.execute(query))
        rows = sorted(rows, key=lambda row: (row.due_at, row.id))[:limit]
    return rows


def count_late(connection: Connection, groups: Iterable[DueGroup], *, before: datetime) -> int:
    """Count the jobs that were due before a time, up to COUNTED_MOST + 1."""
    count = 0
    for group in [group for group in groups if group.due_at < before][:LEVELS_MOST]:
        limit = COUNTED_MOST + 1 - count
        query = select(jobs.c.account).where(*in_due_group(group), jobs.c.due_at < before).limit(limit).subquery()
        count += int(connection.execute(select(func.count()).select_from(query)).scalar_one())
        if count > COUNTED_MOST:
            break
    return count


_LATE_COLUMNS = (
    jobs.c.id,
    jobs.c.account,
    jobs.c.kind,
    jobs.c.fetch_host,
    jobs.c.due_at,
    jobs.c.deadline_at,
    jobs.c.claim_token,
    jobs.c.claim_holder,
)


def count_due_before(
    connection: Connection, groups: Sequence[DueGroup], job: Row[Any], *, now: datetime, limit: int
) -> int:
    """Count the due jobs of the same account that come before a job, at most `limit`.

    They have a higher priority, or the same priority and an earlier due time.
    """
    count = 0
    for group in groups[:LEVELS_MOST]:
        if group.account != job.account or group.priority < job.priority or group.due_at > now:
            continue
        until = now if group.priority > job.priority else min(now, job.due_at)
        earlier = (
            select(jobs.c.account).where(*in_due_group(group), jobs.c.due_at < until).limit(limit - count).subquery()
        )
        count += int(connection.execute(select(func.count()).select_from(earlier)).scalar_one())
        if count >= limit:
            break
    return count


@dataclass(frozen=True, slots=True)
class StaleClaim:
    """A claim on a job, an output, an event or an order (`what`), and the end of its lease."""

    what: str
    id: int
    holder: str
    until: datetime
    job_id: int


def stale_claims(
    connection: Connection,
    *,
    dead: Collection[str],
    expired_before: datetime,
    polled_before: datetime,
    claimed_before: datetime,
) -> list[StaleClaim]:
    """Return the claims that should have been released, earliest end of the lease first.

    Their lease ended before `expired_before`, or their holder is in `dead`, or they are older than any work can take: a
    poll that began before `polled_before`, or a download that began before `claimed_before`.
    """
    claims: list[StaleClaim] = []
    older = {"job": jobs.c.asked_at < polled_before, "output": outputs.c.claimed_at < claimed_before}
    for name, table in (("job", jobs), ("output", outputs), ("event", events), ("order", orders)):
        held_by_dead = (table.c.claim_holder.in_(sorted(dead)),) if dead else ()
        too_old = (older[name],) if name in older else ()
        is_stale = or_(table.c.due_at < expired_before, *held_by_dead, *too_old)
        query = _claims(table).where(is_stale).order_by(table.c.due_at).limit(CLAIMS_MOST)
        claims += [
            StaleClaim(name, row.id, row.claim_holder, row.due_at, row.job_id) for row in connection.execute(query)
        ]
    return sorted(claims, key=lambda claim: claim.until)


def _claims(table: Table) -> Any:
    job_id = (table.c.id if table in (jobs, orders) else table.c.job_id).label("job_id")
    return select(table.c.id, job_id, table.c.claim_holder, table.c.due_at).where(table.c.claim_holder.is_not(None))


def jobs_past_deadline(connection: Connection, *, now: datetime, later: datetime, limit: int) -> list[Row[Any]]:
    """Return jobs past their deadline whose next poll is after `later`, oldest deadline first.

    It reads all jobs with a due time.
    """
    columns = (jobs.c.id, jobs.c.account, jobs.c.kind, jobs.c.deadline_at, jobs.c.due_at)
    query = select(*columns).where(
        HAS_DUE_TIME,
        jobs.c.due_at >= later,
        ~IS_HELD,
        jobs.c.deadline_at < now,
        jobs.c.status == "pending",
        jobs.c.claim_token.is_(None),
    )
    return list(connection.execute(query.order_by(jobs.c.deadline_at).limit(limit)))


def count_running_polls(connection: Connection, *, now: datetime) -> int:
    """Count the jobs that are being polled: their claim is valid."""
    query = select(func.count()).where(jobs.c.claim_holder.is_not(None), jobs.c.due_at > now)
    return int(connection.execute(query).scalar_one())


def running_downloads(connection: Connection, *, now: datetime, limit: int) -> Sequence[Row[Any]]:
    """Return the outputs that are being downloaded, oldest attempt first, with the remote ids of their jobs."""
    query = (
        select(outputs, jobs.c.remote_id, jobs.c.fetch_base)
        .join(jobs, jobs.c.id == outputs.c.job_id)
        .where(outputs.c.claim_holder.is_not(None), outputs.c.due_at > now)
        .order_by(outputs.c.claimed_at, outputs.c.id)
        .limit(limit)
    )
    return list(connection.execute(query))


def oldest_unstored(connection: Connection, *, limit: int) -> Sequence[Row[Any]]:
    """Return the pending outputs, including running downloads, oldest link first."""
    columns = (
        outputs.c.id,
        outputs.c.job_id,
        outputs.c.url,
        outputs.c.error_code,
        outputs.c.error_message,
        outputs.c.listed_at,
        outputs.c.due_at,
        outputs.c.claim_token,
    )
    waiting = select(*columns).where(outputs.c.due_at.is_not(None))
    return list(connection.execute(waiting.order_by(outputs.c.listed_at, outputs.c.id).limit(limit)))


def last_failures(connection: Connection, *, limit: int) -> list[Row[Any]]:
    """Return the jobs that failed or expired last, among those with the highest ids."""
    rows: list[Row[Any]] = []
    for state in ("failed", "expired"):
        columns = (jobs.c.id, jobs.c.account, jobs.c.kind, jobs.c.status, jobs.c.error_code, jobs.c.completed_at)
        newest = _in_final_state(connection, state, *columns, newest_first=True)
        rows += list(connection.execute(newest.limit(FAILURES_LOOKED_AT)))
    return sorted(rows, key=lambda row: (row.completed_at, row.id), reverse=True)[:limit]


def pending_events(connection: Connection, *, limit: int) -> Sequence[Row[Any]]:
    """Return the events that wait to be sent, earliest due time first, without their bodies."""
    columns = [column for column in events.c if column.name != "body"]
    waiting = select(*columns).where(events.c.due_at.is_not(None))
    return connection.execute(waiting.order_by(events.c.due_at, events.c.id).limit(limit)).all()


def jobs_without_event(connection: Connection, *, before: datetime, limit: int) -> Sequence[Row[Any]]:
    """Return the jobs that became final before a time and have no webhook event yet, oldest first."""
    query = (
        select(jobs.c.id, jobs.c.completed_at)
        .where(jobs.c.completed_at < before, jobs.c.webhook_url.is_not(None), jobs.c.announced_at.is_(None))
        .order_by(jobs.c.completed_at)
        .limit(limit)
    )
    return list(connection.execute(query))
