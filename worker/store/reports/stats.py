"""How everything stands now, in figures: jobs by state, what is due, accounts, holds. Read from indexes, not from rows.

Jobs that an operator holds are a state of their own here, `held`: they wait, but for nobody's request.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, case, func, literal, select

from worker.core.circuit_breaker import CircuitBreaker, Scope, hold_class
from worker.core.lifecycle import JOB_STATES
from worker.store.breakers import all_breakers
from worker.store.claims import DueGroup, due_groups
from worker.store.counters import OTHER
from worker.store.outputs import UnstoredGroup, unstored_by_code
from worker.store.schema import HELD_UNTIL, breakers, jobs
from worker.store.sql_functions import HAS_DUE_TIME

HELD = "held"
STATES = (*JOB_STATES[:1], HELD, *JOB_STATES[1:])
NO_KEY = "no key"
KINDS_COUNTED = 100_000  # waiting jobs; of more the kinds are not told, since that would mean to read every one of them


@dataclass(frozen=True, slots=True)
class WaitingCount:
    """How many jobs of an account and kind have a due time; how many of them an operator holds, and are due now.

    Nearly all are pending; a few are downloading and wait for fresh links.
    """

    account: str
    kind: str
    count: int
    held: int
    due: int


@dataclass(frozen=True, slots=True)
class Account:
    """One account: its jobs that are due now, for how many seconds the oldest that may be asked about is, and its rate.

    `rps` is the requests per second that it may make now, `ceiling` what the API took when it last refused one.
    """

    name: str
    due: int
    oldest_due: float
    rps: float
    ceiling: float | None
    held: bool


@dataclass(frozen=True, slots=True)
class Hold:
    """What keeps an account or a host from being asked: a reason out of few, and since when."""

    scope: Scope
    name: str
    reason: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Stats:
    """How everything stood at `now`, by the database's clock. `oldest_due` is in seconds, 0 where nothing is due."""

    now: datetime
    jobs: Mapping[str, int]
    accounts: Sequence[Account]
    holds: Sequence[Hold]
    oldest_due: float
    unstored: Sequence[UnstoredGroup]

    @property
    def oldest_unstored(self) -> float:
        """For how many seconds the oldest link is known whose output is not stored."""
        return max((_age(one.oldest, self.now) for one in self.unstored), default=0.0)


def waiting_by_account(connection: Connection, *, now: datetime) -> list[WaitingCount]:
    """What waits, by account alone."""
    return _waiting(connection, now)


def waiting_by_kind(connection: Connection, *, now: datetime) -> list[WaitingCount]:
    """What waits, by account and kind; all kinds together where there is very much."""
    some = select(jobs.c.account).where(HAS_DUE_TIME).limit(KINDS_COUNTED + 1)
    many = connection.execute(select(func.count()).select_from(some.subquery())).scalar_one() > KINDS_COUNTED
    return _waiting(connection, now) if many else _waiting(connection, now, jobs.c.kind)


def _waiting(connection: Connection, now: datetime, *by: ColumnElement[str]) -> list[WaitingCount]:
    query = select(
        jobs.c.account,
        *(by or (literal(OTHER),)),
        func.count(),
        _count(jobs.c.due_at >= HELD_UNTIL),
        _count(jobs.c.due_at <= now),
    )
    waiting = query.where(HAS_DUE_TIME).group_by(jobs.c.account, *by)
    return [WaitingCount(*row) for row in connection.execute(waiting)]


def count_unfinished(connection: Connection, waiting: Iterable[WaitingCount]) -> Counter[tuple[str, str, str]]:
    """Jobs that are not final, by account, kind and state; `waiting` is as `waiting_by_kind` read it."""
    found: Counter[tuple[str, str, str]] = Counter()
    fine = True
    for one in waiting:
        found[one.account, one.kind, "pending"] += one.count - one.held
        found[one.account, one.kind, HELD] += one.held
        fine = fine and one.kind != OTHER
    due = jobs.c.due_at.is_not(None)
    downloading = (
        select(jobs.c.account, jobs.c.kind, func.count(), _count(due), _count(jobs.c.due_at >= HELD_UNTIL))
        .where(jobs.c.status == "downloading")
        .group_by(jobs.c.account, jobs.c.kind)
    )
    for account, kind, count, renewing, paused in connection.execute(downloading):
        found[account, kind, "downloading"] += count
        waits_as = kind if fine else OTHER
        found[account, waits_as, "pending"] -= renewing - paused
        found[account, waits_as, HELD] -= paused
    return found


def read_stats(
    connection: Connection, waiting: Sequence[WaitingCount], *, now: datetime, full_rps: Callable[[str], float]
) -> Stats:
    """How everything stands, where this is `waiting`. `full_rps` is what the settings allow each account."""
    known = all_breakers(connection)
    due: Counter[str] = Counter()
    for one in waiting:
        due[one.account] += one.due
    levels = [one for one in due_groups(connection, sorted(due)) if one.due_at <= now]
    holds = [*_gate_holds(known.values(), now), *_keyless(connection, known, levels)]
    held = {one.name for one in holds if one.scope == "account"}
    shut = {one.name for one in holds if one.scope == "host"}
    since = _oldest(one for one in levels if one.account not in held and one.host not in shut)
    accounts = []
    for name in sorted({*due, *(name for scope, name in known if scope == "account")}):
        breaker = known.get(("account", name), CircuitBreaker("account", name))
        late = _age(since.get(name, now), now)
        accounts.append(
            Account(name, due[name], late, breaker.rate(full_rps(name), now), breaker.ceiling, name in held)
        )
    return Stats(
        now=now,
        jobs=_jobs(connection, waiting),
        accounts=accounts,
        holds=holds,
        oldest_due=max((one.oldest_due for one in accounts), default=0.0),
        unstored=unstored_by_code(connection),
    )


def _age(since: datetime, now: datetime) -> float:
    return max(0.0, (now - since).total_seconds())


def _count(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.count(case((condition, 1)))


def _jobs(connection: Connection, waiting: Sequence[WaitingCount]) -> dict[str, int]:
    rest = select(jobs.c.status, func.count()).where(jobs.c.status != "pending").group_by(jobs.c.status)
    found = {row[0]: int(row[1]) for row in connection.execute(rest)}
    renewing, paused = connection.execute(
        select(func.count(), _count(jobs.c.due_at >= HELD_UNTIL)).where(
            jobs.c.status == "downloading", jobs.c.due_at.is_not(None)
        )
    ).one()
    held = max(0, sum(one.held for one in waiting) - paused)  # where no snapshot is read, a job may be on its way
    pending = max(0, sum(one.count for one in waiting) - renewing - held)
    return dict.fromkeys(STATES, 0) | found | {"pending": pending, HELD: held}


def _oldest(levels: Iterable[DueGroup]) -> dict[str, datetime]:
    """Since when each account's jobs are due."""
    found: dict[str, datetime] = {}
    for level in levels:
        found[level.account] = min(level.due_at, found.get(level.account, level.due_at))
    return found


def _gate_holds(known: Iterable[CircuitBreaker], now: datetime) -> list[Hold]:
    held = [breaker for breaker in known if breaker.held(now)]
    return [
        Hold(breaker.scope, breaker.name, hold_class(breaker.why or ""), breaker.paused_at or breaker.since or now)
        for breaker in sorted(held, key=lambda breaker: (breaker.scope, breaker.name))
    ]


def _keyless(
    connection: Connection, known: Mapping[tuple[Scope, str], CircuitBreaker], due: Iterable[DueGroup]
) -> list[Hold]:
    """Accounts whose jobs are due and for which no worker process ever had a key, as far as the tables know.

    A worker that has one makes the account's gate as it starts, and notes the first answer there.
    """
    asked = select(breakers.c.name).where(breakers.c.scope == "account", breakers.c.asked_at.is_not(None))
    heard = set(connection.execute(asked).scalars())
    return [
        Hold("account", name, NO_KEY, since)
        for name, since in sorted(_oldest(due).items())
        if name not in heard and _says_nothing(known.get(("account", name)))
    ]


def _says_nothing(breaker: CircuitBreaker | None) -> bool:
    return breaker is None or (not breaker.proven and breaker.why is None)
