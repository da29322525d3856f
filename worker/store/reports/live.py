"""What a person who watches wants to know now. Every query has a bound: it costs the same with a million jobs.

Where a question could lead through all jobs, it leaps through an index in the index's own order, and stops.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, func, or_, select

from worker.core.lifecycle import JOB_STATES
from worker.store.claims import DueGroup, in_due_group
from worker.store.schema import HELD_UNTIL, MYSQL_FAMILY, events, jobs, outputs
from worker.store.sql_functions import HAS_DUE_TIME

COUNTED_MOST = 10_000  # jobs of one state; beyond it "more than"
CLAIMS_MOST = 200
FAILURES_LOOKED_AT = 100  # of each state: those with the highest ids, which are not always those that ended last
LEVELS_MOST = 500


def count_jobs(connection: Connection) -> dict[str, int]:
    """How many jobs there are in each state, up to COUNTED_MOST + 1; pending ones with those that want fresh links."""
    best = (jobs.c.account, jobs.c.priority, jobs.c.fetch_host, jobs.c.due_at)
    found: dict[str, int] = {}
    for state in JOB_STATES:
        if state == "pending":
            some = select(jobs.c.account).where(HAS_DUE_TIME)
            # The order of the partial index makes PostgreSQL stop early. MariaDB's index is another one.
            some = some if connection.dialect.name in MYSQL_FAMILY else some.order_by(*best)
        else:
            some = _in_final_state(connection, state, jobs.c.id)
        counted = select(func.count()).select_from(some.limit(COUNTED_MOST + 1).subquery())
        found[state] = int(connection.execute(counted).scalar_one())
    return found


def _in_final_state(
    connection: Connection, state: str, *columns: ColumnElement[Any], newest_first: bool = False
) -> Select[Any]:
    """Select jobs by their state in the order of its index, in words that make each server read it, and not sort."""
    order: tuple[ColumnElement[Any], ...] = (jobs.c.id,)
    conditions: tuple[ColumnElement[bool], ...] = (jobs.c.status == state,)
    if connection.dialect.name not in MYSQL_FAMILY:
        order = (jobs.c.status, jobs.c.id)
        conditions = (jobs.c.status.between(state, state), jobs.c.status != "pending")
    query = select(*columns).where(*conditions)
    return query.order_by(*(column.desc() if newest_first else column for column in order))


def longest_due(connection: Connection, levels: Iterable[DueGroup], *, before: datetime, limit: int) -> list[Row[Any]]:
    """The jobs that are due longest, and since before that; whether they may be asked about or not.

    One that an operator holds is not due.
    """
    late = sorted((level for level in levels if level.due_at < before), key=lambda level: level.due_at)
    found: list[Row[Any]] = []
    for level in late[:limit]:  # no other has one that is due earlier than the first of each of these
        if len(found) == limit and found[-1].due_at <= level.due_at:
            break
        first = select(*_LATE).where(*in_due_group(level), jobs.c.due_at < before).order_by(jobs.c.due_at).limit(limit)
        found += list(connection.execute(first))
        found = sorted(found, key=lambda row: (row.due_at, row.id))[:limit]
    return found


def count_late(connection: Connection, levels: Iterable[DueGroup], *, before: datetime) -> int:
    """How many jobs are due since before that, up to COUNTED_MOST + 1."""
    count = 0
    for level in [level for level in levels if level.due_at < before][:LEVELS_MOST]:
        left = COUNTED_MOST + 1 - count
        late = select(jobs.c.account).where(*in_due_group(level), jobs.c.due_at < before).limit(left).subquery()
        count += int(connection.execute(select(func.count()).select_from(late)).scalar_one())
        if count > COUNTED_MOST:
            break
    return count


_LATE = (
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
    connection: Connection, levels: Sequence[DueGroup], job: Row[Any], *, now: datetime, most: int
) -> int:
    """How many due jobs of its account go before a job: of a higher priority, or due earlier; `most` at most."""
    count = 0
    for level in levels[:LEVELS_MOST]:
        if level.account != job.account or level.priority < job.priority or level.due_at > now:
            continue
        until = now if level.priority > job.priority else min(now, job.due_at)
        earlier = (
            select(jobs.c.account).where(*in_due_group(level), jobs.c.due_at < until).limit(most - count).subquery()
        )
        count += int(connection.execute(select(func.count()).select_from(earlier)).scalar_one())
        if count >= most:
            break
    return count


@dataclass(frozen=True, slots=True)
class StaleClaim:
    """A claim on a job, an output or an event (`what`), and when its lease ends or did."""

    what: str
    id: int
    holder: str
    until: datetime


def stale_claims(
    connection: Connection,
    *,
    dead: Collection[str],
    expired_before: datetime,
    polled_before: datetime,
    claimed_before: datetime,
) -> list[StaleClaim]:
    """Claims that were over before that, whose holder is known to be dead, or that are older than any work can be:
    a request of `polled_before`, a download of `claimed_before`. Those that are over longest come first."""
    found: list[StaleClaim] = []
    older = {"job": jobs.c.asked_at < polled_before, "output": outputs.c.claimed_at < claimed_before}
    for name, table in (("job", jobs), ("output", outputs), ("event", events)):
        of_the_dead = (table.c.claim_holder.in_(sorted(dead)),) if dead else ()
        too_old = (older[name],) if name in older else ()
        lost = or_(table.c.due_at < expired_before, *of_the_dead, *too_old)
        query = _claims(table).where(lost).order_by(table.c.due_at).limit(CLAIMS_MOST)
        found += [StaleClaim(name, row.id, row.claim_holder, row.due_at) for row in connection.execute(query)]
    return sorted(found, key=lambda one: one.until)


def _claims(table: Table) -> Any:
    return select(table.c.id, table.c.claim_holder, table.c.due_at).where(table.c.claim_holder.is_not(None))


def jobs_past_deadline(connection: Connection, *, now: datetime, later: datetime, limit: int) -> list[Row[Any]]:
    """Jobs past their deadline that nobody asks about before `later`, the longest first. It reads all that wait."""
    columns = (jobs.c.id, jobs.c.account, jobs.c.kind, jobs.c.deadline_at, jobs.c.due_at)
    query = select(*columns).where(
        HAS_DUE_TIME,
        jobs.c.due_at.between(later, HELD_UNTIL - timedelta(days=1)),
        jobs.c.deadline_at < now,
        jobs.c.status == "pending",
        jobs.c.claim_token.is_(None),
    )
    return list(connection.execute(query.order_by(jobs.c.deadline_at).limit(limit)))


def count_running_polls(connection: Connection, *, now: datetime) -> int:
    """How many jobs are claimed, to be asked about, and the claim stands."""
    standing = select(func.count()).where(jobs.c.claim_holder.is_not(None), jobs.c.due_at > now)
    return int(connection.execute(standing).scalar_one())


def running_downloads(connection: Connection, *, now: datetime, limit: int) -> Sequence[Row[Any]]:
    """The outputs that are being downloaded, those first whose attempt began first; with their jobs' remote ids."""
    query = (
        select(outputs, jobs.c.remote_id, jobs.c.fetch_base)
        .join(jobs, jobs.c.id == outputs.c.job_id)
        .where(outputs.c.claim_holder.is_not(None), outputs.c.due_at > now)
        .order_by(outputs.c.claimed_at, outputs.c.id)
        .limit(limit)
    )
    return list(connection.execute(query))


def oldest_unstored(connection: Connection, *, limit: int) -> Sequence[Row[Any]]:
    """The outputs that are not stored yet and wait longest, on their way or not."""
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
    """The jobs that failed or expired last, of those with the highest ids."""
    found: list[Row[Any]] = []
    for state in ("failed", "expired"):
        columns = (jobs.c.id, jobs.c.account, jobs.c.kind, jobs.c.status, jobs.c.error_code, jobs.c.completed_at)
        newest = _in_final_state(connection, state, *columns, newest_first=True)
        found += list(connection.execute(newest.limit(FAILURES_LOOKED_AT)))
    return sorted(found, key=lambda row: (row.completed_at, row.id), reverse=True)[:limit]


def pending_events(connection: Connection, *, limit: int) -> Sequence[Row[Any]]:
    """Events that are to be sent, or sent again, those that are due first; without what they say."""
    columns = [column for column in events.c if column.name != "body"]
    waiting = select(*columns).where(events.c.due_at.is_not(None))
    return connection.execute(waiting.order_by(events.c.due_at, events.c.id).limit(limit)).all()


def jobs_without_event(connection: Connection, *, before: datetime, limit: int) -> Sequence[Row[Any]]:
    """Jobs that became final before that, and whose webhook event nobody has made yet; the first ones."""
    query = (
        select(jobs.c.id, jobs.c.completed_at)
        .where(jobs.c.completed_at < before, jobs.c.webhook_url.is_not(None), jobs.c.announced_at.is_(None))
        .order_by(jobs.c.completed_at)
        .limit(limit)
    )
    return list(connection.execute(query))
