"""Statistics: jobs by state, due jobs, accounts, holds, unstored outputs. The queries read indexes, not rows.

Jobs that an operator holds are counted as a separate state, `held`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, case, func, literal, select

from worker.core.circuit_breaker import Scope, hold_class
from worker.core.lifecycle import JOB_STATES, ORDER_STATES
from worker.store.counters import OTHER
from worker.store.jobs import count_not_pending
from worker.store.outputs import UnstoredGroup, unstored_by_code
from worker.store.reports.work_state import WorkState
from worker.store.schema import IS_HELD, jobs
from worker.store.sql_functions import DUE_ACCOUNT, HAS_DUE_TIME

HELD = "held"
_AFTER_PENDING = JOB_STATES.index("pending") + 1
STATES = (*JOB_STATES[:_AFTER_PENDING], HELD, *JOB_STATES[_AFTER_PENDING:])
KINDS_COUNTED = 100_000  # with more waiting jobs, kinds are not counted separately: that would read every row


@dataclass(frozen=True, slots=True)
class WaitingCount:
    """The number of jobs of an account and kind that have a due time, that an operator holds, and that are due now.

    Nearly all of them are pending. A few are downloading and wait for fresh links.
    """

    account: str
    kind: str
    count: int
    held: int
    due: int


@dataclass(frozen=True, slots=True)
class Account:
    """The due jobs and the rate of an account.

    `oldest_due` is the number of seconds since the oldest job that may be polled became due. `rps` is the present limit
    of requests per second, `configured` the one in the workers' settings, and `ceiling` the rate that the API accepted
    when it last refused a request.
    """

    name: str
    due: int
    oldest_due: float
    rps: float
    configured: float
    ceiling: float | None
    held: bool


@dataclass(frozen=True, slots=True)
class Hold:
    """A hold on an account or host, with one of a few reasons, and its start."""

    scope: Scope
    name: str
    reason: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Stats:
    """The statistics at `now`, by the database's clock. `oldest_due` is in seconds, and 0 if no job is due."""

    now: datetime
    jobs: Mapping[str, int]
    accounts: Sequence[Account]
    holds: Sequence[Hold]
    oldest_due: float
    unstored: Sequence[UnstoredGroup]

    @property
    def oldest_unstored(self) -> float:
        """The number of seconds since the oldest unstored output was listed."""
        return max((_age(group.oldest, self.now) for group in self.unstored), default=0.0)


def waiting_by_account(connection: Connection, *, now: datetime) -> list[WaitingCount]:
    """Return the waiting jobs by account."""
    return _waiting(connection, now)


def waiting_by_kind(connection: Connection, *, now: datetime) -> list[WaitingCount]:
    """Return the waiting jobs by account and kind. If there are very many, all kinds are counted together."""
    waiting_jobs = select(DUE_ACCOUNT).where(HAS_DUE_TIME).limit(KINDS_COUNTED + 1)
    too_many = (
        connection.execute(select(func.count()).select_from(waiting_jobs.subquery())).scalar_one() > KINDS_COUNTED
    )
    return _waiting(connection, now) if too_many else _waiting(connection, now, jobs.c.kind)


def _waiting(connection: Connection, now: datetime, *by: ColumnElement[str]) -> list[WaitingCount]:
    query = select(
        DUE_ACCOUNT,
        *(by or (literal(OTHER),)),
        func.count(),
        _count(IS_HELD),
        _count(jobs.c.due_at <= now),
    )
    waiting = query.where(HAS_DUE_TIME).group_by(DUE_ACCOUNT, *by)
    return [WaitingCount(*row) for row in connection.execute(waiting)]


def count_unfinished(connection: Connection, waiting: Iterable[WaitingCount]) -> Counter[tuple[str, str, str]]:
    """Return the numbers of unfinished jobs by account, kind and state. `waiting` comes from `waiting_by_kind`."""
    counts: Counter[tuple[str, str, str]] = Counter()
    by_kind = True
    for entry in waiting:
        counts[entry.account, entry.kind, "pending"] += entry.count - entry.held
        counts[entry.account, entry.kind, HELD] += entry.held
        by_kind = by_kind and entry.kind != OTHER
    has_due_time = jobs.c.due_at.is_not(None)
    downloading = (
        select(jobs.c.account, jobs.c.kind, func.count(), _count(has_due_time), _count(IS_HELD))
        .where(jobs.c.status == "downloading")
        .group_by(jobs.c.account, jobs.c.kind)
    )
    for account, kind, count, renewing, paused in connection.execute(downloading):
        counts[account, kind, "downloading"] += count
        counted_kind = kind if by_kind else OTHER
        counts[account, counted_kind, "pending"] -= renewing - paused
        counts[account, counted_kind, HELD] -= paused
    orders = select(jobs.c.account, jobs.c.kind, jobs.c.status, func.count()).where(jobs.c.status.in_(ORDER_STATES))
    for account, kind, state, count in connection.execute(orders.group_by(jobs.c.account, jobs.c.kind, jobs.c.status)):
        counts[account, kind, state] += count
    return counts


def read_stats(
    connection: Connection,
    waiting: Sequence[WaitingCount],
    work: WorkState,
    count_others: Callable[[Connection], Mapping[str, int]] = count_not_pending,
) -> Stats:
    """Return the statistics. `waiting` comes from `waiting_by_account` or `waiting_by_kind`.

    `count_others` returns the numbers of jobs in all states but `pending`.
    """
    due: Counter[str] = Counter()
    for entry in waiting:
        due[entry.account] += entry.due
    oldest: dict[str, datetime] = {}
    for group in work.due_work:
        oldest[group.account] = min(group.due_at, oldest.get(group.account, group.due_at))
    accounts = [
        Account(
            name=state.account,
            due=due[state.account],
            oldest_due=_age(oldest.get(state.account, work.now), work.now),
            rps=state.rps,
            configured=state.configured,
            ceiling=state.ceiling,
            held=state.reason is not None,
        )
        for state in work.accounts
    ]
    return Stats(
        now=work.now,
        jobs=_jobs(connection, waiting, count_others(connection)),
        accounts=accounts,
        holds=_holds(work),
        oldest_due=work.oldest_due_seconds,
        unstored=unstored_by_code(connection),
    )


def _holds(work: WorkState) -> list[Hold]:
    accounts = [
        Hold("account", state.account, state.reason_class or "other", state.since or work.now)
        for state in work.accounts
        if state.reason is not None
    ]
    hosts = [Hold("host", host.host, hold_class(host.reason), host.since or work.now) for host in work.hosts]
    return [*accounts, *hosts]


def _age(since: datetime, now: datetime) -> float:
    return max(0.0, (now - since).total_seconds())


def _count(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.count(case((condition, 1)))


def _jobs(connection: Connection, waiting: Sequence[WaitingCount], others: Mapping[str, int]) -> dict[str, int]:
    renewing, paused = connection.execute(
        select(func.count(), _count(IS_HELD)).where(jobs.c.status == "downloading", jobs.c.due_at.is_not(None))
    ).one()
    held_count = max(
        0, sum(entry.held for entry in waiting) - paused
    )  # without a snapshot, a job may change its state between the queries
    pending = max(0, sum(entry.count for entry in waiting) - renewing - held_count)
    return dict.fromkeys(STATES, 0) | dict(others) | {"pending": pending, HELD: held_count}
