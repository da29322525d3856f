"""Statistics: jobs by state, due jobs, accounts, holds, unstored outputs. The queries read indexes, not rows.

Jobs that an operator holds are counted as a separate state, `held`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, case, func, literal, select

from worker.core.circuit_breaker import CircuitBreaker, Scope, hold_class
from worker.core.lifecycle import JOB_STATES
from worker.store.breakers import all_breakers
from worker.store.counters import OTHER
from worker.store.due_groups import DueGroup, due_groups
from worker.store.outputs import UnstoredGroup, unstored_by_code
from worker.store.schema import IS_HELD, breakers, jobs
from worker.store.sql_functions import HAS_DUE_TIME

HELD = "held"
STATES = (*JOB_STATES[:1], HELD, *JOB_STATES[1:])
NO_KEY = "no key"
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
    of requests per second. `ceiling` is the rate that the API accepted when it last refused a request.
    """

    name: str
    due: int
    oldest_due: float
    rps: float
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
    waiting_jobs = select(jobs.c.account).where(HAS_DUE_TIME).limit(KINDS_COUNTED + 1)
    too_many = (
        connection.execute(select(func.count()).select_from(waiting_jobs.subquery())).scalar_one() > KINDS_COUNTED
    )
    return _waiting(connection, now) if too_many else _waiting(connection, now, jobs.c.kind)


def _waiting(connection: Connection, now: datetime, *by: ColumnElement[str]) -> list[WaitingCount]:
    query = select(
        jobs.c.account,
        *(by or (literal(OTHER),)),
        func.count(),
        _count(IS_HELD),
        _count(jobs.c.due_at <= now),
    )
    waiting = query.where(HAS_DUE_TIME).group_by(jobs.c.account, *by)
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
    return counts


def read_stats(
    connection: Connection, waiting: Sequence[WaitingCount], *, now: datetime, full_rps: Callable[[str], float]
) -> Stats:
    """Return the statistics. `waiting` comes from `waiting_by_account` or `waiting_by_kind`.

    `full_rps` returns the requests per second that the settings allow an account.
    """
    breakers_by_key = all_breakers(connection)
    due: Counter[str] = Counter()
    for entry in waiting:
        due[entry.account] += entry.due
    due_groups_now = [entry for entry in due_groups(connection, sorted(due)) if entry.due_at <= now]
    holds = [
        *_breaker_holds(breakers_by_key.values(), now),
        *_accounts_without_key(connection, breakers_by_key, due_groups_now),
    ]
    held_accounts = {entry.name for entry in holds if entry.scope == "account"}
    held_hosts = {entry.name for entry in holds if entry.scope == "host"}
    since = _oldest_by_account(
        entry for entry in due_groups_now if entry.account not in held_accounts and entry.host not in held_hosts
    )
    accounts = []
    for name in sorted({*due, *(name for scope, name in breakers_by_key if scope == "account")}):
        breaker = breakers_by_key.get(("account", name), CircuitBreaker("account", name))
        late = _age(since.get(name, now), now)
        accounts.append(
            Account(name, due[name], late, breaker.rate(full_rps(name), now), breaker.ceiling, name in held_accounts)
        )
    return Stats(
        now=now,
        jobs=_jobs(connection, waiting),
        accounts=accounts,
        holds=holds,
        oldest_due=max((entry.oldest_due for entry in accounts), default=0.0),
        unstored=unstored_by_code(connection),
    )


def _age(since: datetime, now: datetime) -> float:
    return max(0.0, (now - since).total_seconds())


def _count(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.count(case((condition, 1)))


def _jobs(connection: Connection, waiting: Sequence[WaitingCount]) -> dict[str, int]:
    not_pending = select(jobs.c.status, func.count()).where(jobs.c.status != "pending").group_by(jobs.c.status)
    counts = {row[0]: int(row[1]) for row in connection.execute(not_pending)}
    renewing, paused = connection.execute(
        select(func.count(), _count(IS_HELD)).where(jobs.c.status == "downloading", jobs.c.due_at.is_not(None))
    ).one()
    held_count = max(
        0, sum(entry.held for entry in waiting) - paused
    )  # without a snapshot, a job may change its state between the queries
    pending = max(0, sum(entry.count for entry in waiting) - renewing - held_count)
    return dict.fromkeys(STATES, 0) | counts | {"pending": pending, HELD: held_count}


def _oldest_by_account(groups: Iterable[DueGroup]) -> dict[str, datetime]:
    """Return the earliest due time of each account."""
    oldest: dict[str, datetime] = {}
    for group in groups:
        oldest[group.account] = min(group.due_at, oldest.get(group.account, group.due_at))
    return oldest


def _breaker_holds(breakers: Iterable[CircuitBreaker], now: datetime) -> list[Hold]:
    held_breakers = [breaker for breaker in breakers if breaker.held(now)]
    return [
        Hold(breaker.scope, breaker.name, hold_class(breaker.why or ""), breaker.held_since or now)
        for breaker in sorted(held_breakers, key=lambda breaker: (breaker.scope, breaker.name))
    ]


def _accounts_without_key(
    connection: Connection, breakers_by_key: Mapping[tuple[Scope, str], CircuitBreaker], due: Iterable[DueGroup]
) -> list[Hold]:
    """Return holds for the accounts with due jobs for which, by the tables, no worker process ever had a key.

    A worker with a key creates the account's circuit breaker when it starts, and records the first answer there.
    """
    polled = select(breakers.c.name).where(breakers.c.scope == "account", breakers.c.asked_at.is_not(None))
    polled_accounts = set(connection.execute(polled).scalars())
    return [
        Hold("account", name, NO_KEY, since)
        for name, since in sorted(_oldest_by_account(due).items())
        if name not in polled_accounts and _is_unused(breakers_by_key.get(("account", name)))
    ]


def _is_unused(breaker: CircuitBreaker | None) -> bool:
    return breaker is None or (not breaker.proven and breaker.why is None)
