"""How everything stands now, in figures: jobs by state, what is due, accounts, holds. Read from indexes, not from rows.

Jobs that an operator holds are a state of their own here, `held`: they wait, but for nobody's request.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, case, func, select

from worker.core.gate import Gate, Scope, hold_class
from worker.core.lifecycle import JOB_STATES
from worker.store.claims import Level, waiting_levels
from worker.store.gates import all_gates
from worker.store.outputs import Unstored, unstored
from worker.tables import HELD_UNTIL, gates, jobs

HELD = "held"
STATES = (*JOB_STATES[:1], HELD, *JOB_STATES[1:])
NO_KEY = "no key"


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
class Standing:
    """How everything stood at `now`, by the database's clock. `oldest_due` is in seconds, 0 where nothing is due."""

    now: datetime
    jobs: Mapping[str, int]
    accounts: Sequence[Account]
    holds: Sequence[Hold]
    oldest_due: float
    unstored: Sequence[Unstored]

    @property
    def oldest_unstored(self) -> float:
        """For how many seconds the oldest link is known whose output is not stored."""
        return max((_age(one.oldest, self.now) for one in self.unstored), default=0.0)


def standing(connection: Connection, *, now: datetime, full_rps: float) -> Standing:
    """Reads it. `full_rps` is what the settings allow each account."""
    known = all_gates(connection)
    waiting = _waiting(connection, now)
    levels = waiting_levels(connection, sorted(waiting))
    due = [level for level in levels if level.due_at <= now]
    keyless = _keyless(connection, known, due)
    holds = [*_gate_holds(known.values(), now), *keyless]
    held = {one.name for one in holds if one.scope == "account"}
    shut = {one.name for one in holds if one.scope == "host"}
    free = [level for level in due if level.account not in held and level.host not in shut]
    oldest = {level.account: level.due_at for level in sorted(free, key=lambda level: level.due_at, reverse=True)}
    names = sorted({*waiting, *(name for scope, name in known if scope == "account")})
    accounts = []
    for name in names:
        gate = known.get(("account", name), Gate("account", name))
        seconds = _age(oldest.get(name, now), now)
        rps = gate.rate(full_rps, now)
        accounts.append(Account(name, _due(waiting.get(name)), seconds, rps, gate.ceiling, name in held))
    return Standing(
        now=now,
        jobs=_jobs(connection, waiting.values()),
        accounts=accounts,
        holds=holds,
        oldest_due=max((one.oldest_due for one in accounts), default=0.0),
        unstored=unstored(connection),
    )


def _age(since: datetime, now: datetime) -> float:
    return max(0.0, (now - since).total_seconds())


def _waiting(connection: Connection, now: datetime) -> dict[str, Any]:
    """The jobs with a due time, by account: how many, how many of them are held, and due now."""
    query = (
        select(
            jobs.c.account,
            func.count().label("all"),
            _count(jobs.c.due_at >= HELD_UNTIL).label("held"),
            _count(jobs.c.due_at <= now).label("due"),
        )
        .where(jobs.c.due_at.is_not(None))
        .group_by(jobs.c.account)
    )
    return {row.account: row for row in connection.execute(query)}


def _count(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.count(case((condition, 1)))


def _due(row: Any) -> int:
    return 0 if row is None else int(row.due)


def _jobs(connection: Connection, waiting: Iterable[Any]) -> dict[str, int]:
    """Jobs by state. One with a due time is pending, or downloading and in want of fresh links."""
    rest = select(jobs.c.status, func.count()).where(jobs.c.status != "pending").group_by(jobs.c.status)
    found = {row[0]: int(row[1]) for row in connection.execute(rest)}
    renewing, paused = connection.execute(
        select(func.count(), _count(jobs.c.due_at >= HELD_UNTIL)).where(
            jobs.c.status == "downloading", jobs.c.due_at.is_not(None)
        )
    ).one()
    rows = list(waiting)
    held = sum(row.held for row in rows) - paused
    pending = sum(row._mapping["all"] for row in rows) - renewing - held
    return dict.fromkeys(STATES, 0) | found | {"pending": int(pending), HELD: int(held)}


def _gate_holds(known: Iterable[Gate], now: datetime) -> list[Hold]:
    held = [gate for gate in known if gate.held(now)]
    return [
        Hold(gate.scope, gate.name, hold_class(gate.why or ""), gate.paused_at or gate.since or now)
        for gate in sorted(held, key=lambda gate: (gate.scope, gate.name))
    ]


def _keyless(connection: Connection, known: Mapping[tuple[Scope, str], Gate], due: Iterable[Level]) -> list[Hold]:
    """Accounts whose jobs are due and for which no worker process ever had a key, as far as the tables know.

    A worker that has one makes the account's gate as it starts, and notes the first answer there.
    """
    since: dict[str, datetime] = {}
    for level in due:
        since[level.account] = min(level.due_at, since.get(level.account, level.due_at))
    asked = select(gates.c.name).where(gates.c.scope == "account", gates.c.asked_at.is_not(None))
    proven = set(connection.execute(asked).scalars())
    silent = [name for name in sorted(since) if name not in proven and _says_nothing(known.get(("account", name)))]
    return [Hold("account", name, NO_KEY, since[name]) for name in silent]


def _says_nothing(gate: Gate | None) -> bool:
    return gate is None or (not gate.proven and gate.why is None)
