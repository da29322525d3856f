"""Finding jobs among a million by what operators ask for: newest first, in ways that indexes can serve.

What few jobs have (a remote id, a reference, a claim, being late, being held) is looked up first, by its index, and
their ids become the condition: no guess of the database about rows that change all the time can lead it astray. Where
that would be more than a few thousand, going through the jobs newest first finds them soon enough.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, false, func, or_, select, true, union_all

from worker.core.lifecycle import FINAL_STATES, JOB_STATES
from worker.store.breakers import all_breakers
from worker.store.claims import DueGroup, due_groups, in_due_group
from worker.store.engine import database_now
from worker.store.jobs import OUT_OF_ORDER, first_tracked, waiting_accounts
from worker.store.schema import HELD_UNTIL, MYSQL_FAMILY, jobs, outputs, waiting_account
from worker.store.sql_functions import HAS_DUE_TIME

FEW = 5_000  # so many ids are a condition; more are not looked up


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs are meant: those that have one of the values of each field that has any.

    Times are aware; `…_since` belongs to what is meant, `…_until` does not. `codes` are those that a job ended with,
    `output_codes` those that any of its outputs has. `late`: due and not claimed for longer than so many seconds.
    `stuck`: its claim is over, and nobody took it up. `past_deadline`: pending beyond it. `held`: by hand, or with its
    account or host, whoever holds that; `by_hand`: held by hand itself, or (False) not.
    """

    statuses: tuple[str, ...] = ()
    accounts: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    remote_ids: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    output_codes: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    submitted_since: datetime | None = None
    submitted_until: datetime | None = None
    finished_since: datetime | None = None
    finished_until: datetime | None = None
    late: float | None = None
    stuck: bool = False
    past_deadline: bool = False
    held: bool = False
    by_hand: bool | None = None

    @property
    def named(self) -> bool:
        """Whether it names jobs by nothing but their remote ids, of all accounts or of some."""
        return bool(self.remote_ids) and replace(self, remote_ids=(), accounts=()) == JobFilter()

    @property
    def states(self) -> frozenset[str]:
        """The states that such a job can be in."""
        left = frozenset(self.statuses or JOB_STATES)
        if self.codes:
            left &= {"expired" if code == "expired" else "failed" for code in self.codes}
        if self.output_codes:
            left &= {"downloading", "failed", "cancelled"}
        if self.finished_since is not None or self.finished_until is not None:
            left &= FINAL_STATES
        if self.late is not None or self.stuck:
            left &= {"pending", "downloading"}
        if self.past_deadline or self.held or self.by_hand:
            left &= {"pending"}
        return left


@dataclass(frozen=True, slots=True)
class Search:
    """A filter made ready: each of `ways` finds some of the jobs in the order of an index, and together all of them."""

    ways: tuple[tuple[ColumnElement[bool], ...], ...]


def prepare_search(connection: Connection, wanted: JobFilter) -> Search:
    """Makes a filter ready: its moments are fixed, and what few jobs have is looked up."""
    now = database_now(connection)
    common = [*_same(wanted), *_times(connection, wanted), *_conditions(wanted, now), *_few(connection, wanted, now)]
    if wanted.states == _implied(wanted):
        return Search((tuple(common),))
    return Search(tuple((*_in_state(state), *common) for state in JOB_STATES if state in wanted.states))


def _implied(wanted: JobFilter) -> frozenset[str]:
    """The states that the conditions leave by themselves, where they need not be told."""
    finished = wanted.finished_since is not None or wanted.finished_until is not None
    return FINAL_STATES if finished else frozenset(JOB_STATES)


def find_jobs(
    connection: Connection,
    wanted: JobFilter | Search,
    *,
    limit: int,
    after: int | None = None,
    columns: Sequence[ColumnElement[Any]] = tuple(jobs.c),
) -> Sequence[Row[Any]]:
    """Up to `limit` of these jobs, newest first; those that come after the id `after`, where that is given."""
    below = () if after is None else (jobs.c.id < after,)
    ways = [
        select(*columns).where(*way, *below).order_by(jobs.c.id.desc()).limit(limit)
        for way in _ready(connection, wanted).ways
    ]
    if not ways:
        return []
    if len(ways) == 1:
        return connection.execute(ways[0]).all()
    each = union_all(*(select(way.subquery()) for way in ways)).subquery()
    return connection.execute(select(each).order_by(each.c.id.desc()).limit(limit)).all()


def find_job_ids(
    connection: Connection, wanted: JobFilter | Search, *, limit: int, after: int | None = None
) -> list[int]:
    """The ids of the same."""
    return [row.id for row in find_jobs(connection, wanted, limit=limit, after=after, columns=(jobs.c.id,))]


def count_matching(connection: Connection, wanted: JobFilter | Search, *, most: int | None = None) -> int:
    """How many there are; no more than `most` are counted, where that is given."""
    count = 0
    for way in _ready(connection, wanted).ways:
        found = select(jobs.c.id).where(*way)
        if most is not None:
            found = found.limit(most - count)
        count += connection.execute(select(func.count()).select_from(found.subquery())).scalar_one()
        if most is not None and count >= most:
            break
    return count


def lock_matching(connection: Connection, wanted: Search, ids: Iterable[int]) -> list[int]:
    """Those of these ids that match now, locked by this transaction in their order."""
    if not wanted.ways:
        return []
    any_way = or_(*(and_(*way) for way in wanted.ways)) if all(wanted.ways) else true()
    query = select(jobs.c.id).where(jobs.c.id.in_(list(ids)), any_way).order_by(jobs.c.id).with_for_update()
    return list(connection.execute(query).scalars())


def _ready(connection: Connection, wanted: JobFilter | Search) -> Search:
    return wanted if isinstance(wanted, Search) else prepare_search(connection, wanted)


# ── conditions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _in_state(state: str) -> tuple[ColumnElement[bool], ...]:
    # What is pending is due, as they all are: said, so that an index of such jobs serves.
    return (jobs.c.status == state, *((HAS_DUE_TIME,) if state == "pending" else ()))


def _same(wanted: JobFilter) -> list[ColumnElement[bool]]:
    fields: tuple[tuple[ColumnElement[Any], tuple[Any, ...]], ...] = (
        (jobs.c.account, wanted.accounts),
        (jobs.c.kind, wanted.kinds),
        (jobs.c.remote_id, wanted.remote_ids),
        (jobs.c.reference, wanted.references),
        (jobs.c.error_code, wanted.codes),
        (jobs.c.fetch_host, wanted.hosts),
        (jobs.c.claim_holder, wanted.holders),
        (jobs.c.id, wanted.ids),
    )
    same = [column == values[0] if len(values) == 1 else column.in_(values) for column, values in fields if values]
    if wanted.output_codes:  # counted job by job: joined, the database would go through all outputs there are
        with_code = select(func.count()).where(
            outputs.c.job_id == jobs.c.id, outputs.c.error_code.in_(wanted.output_codes)
        )
        same.append(with_code.scalar_subquery() > 0)
    return same


def _times(connection: Connection, wanted: JobFilter) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if wanted.submitted_since is not None:  # it was tracked no earlier than that
        first = first_tracked(connection, wanted.submitted_since - OUT_OF_ORDER)
        found += [jobs.c.submitted_at >= wanted.submitted_since, jobs.c.id >= first]
    if wanted.submitted_until is not None:
        found.append(jobs.c.submitted_at < wanted.submitted_until)
    if wanted.finished_since is not None:
        found.append(jobs.c.completed_at >= wanted.finished_since)
    if wanted.finished_until is not None:  # it was tracked before that
        first = first_tracked(connection, wanted.finished_until + OUT_OF_ORDER)
        found += [jobs.c.completed_at < wanted.finished_until, jobs.c.id < first]
    return found


def _conditions(wanted: JobFilter, now: datetime) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if wanted.late is not None:
        found += [*_late(wanted.late, now)]
    if wanted.stuck:
        found += [*_stuck(now)]
    if wanted.past_deadline:
        found.append(jobs.c.deadline_at < now)
    if wanted.by_hand is not None:
        found.append(jobs.c.held_at.is_not(None) if wanted.by_hand else jobs.c.held_at.is_(None))
    return found


def _late(seconds: float, now: datetime) -> tuple[ColumnElement[bool], ...]:
    return (HAS_DUE_TIME, jobs.c.due_at < _before(now, seconds), jobs.c.claim_token.is_(None))


def _stuck(now: datetime) -> tuple[ColumnElement[bool], ...]:
    return (jobs.c.claim_holder.is_not(None), jobs.c.due_at < now)


def _before(now: datetime, seconds: float) -> datetime:
    try:
        return now - timedelta(seconds=seconds)
    except OverflowError:
        return now.replace(year=1)


# ── what few jobs have ────────────────────────────────────────────────────────────────────────────────────────────────


def _few(connection: Connection, wanted: JobFilter, now: datetime) -> list[ColumnElement[bool]]:
    """What an index finds at once, as ids where they are few enough."""
    found: list[ColumnElement[bool]] = []
    if wanted.remote_ids:
        found += _ids(connection, jobs.c.remote_id, [(jobs.c.remote_id == one,) for one in wanted.remote_ids])
    if wanted.references:
        found += _ids(connection, jobs.c.reference, [(jobs.c.reference == one,) for one in wanted.references])
    if wanted.holders:
        found += _ids(connection, jobs.c.claim_holder, [(jobs.c.claim_holder == one,) for one in wanted.holders])
    if wanted.stuck:
        found += _ids(connection, jobs.c.claim_holder, [_stuck(now)])
    if wanted.late is not None or wanted.past_deadline or wanted.held or wanted.by_hand:
        levels = due_groups(connection, wanted.accounts or waiting_accounts(connection))
        if wanted.past_deadline:
            past = [(*_waiting_in(connection, level), jobs.c.deadline_at < now) for level in levels]
            found += _ids(connection, jobs.c.due_at, past)
        if wanted.late is not None:
            late = _late(wanted.late, now)
            due = [(*in_due_group(level), *late) for level in levels if level.due_at < _before(now, wanted.late)]
            found += _ids(connection, jobs.c.due_at, due)
        if wanted.by_hand:
            found += _ids(connection, jobs.c.due_at, [(*in_due_group(level), _resting()) for level in levels])
        if wanted.held:
            found += _held(connection, levels, now)
    return found


def _held(connection: Connection, levels: Sequence[DueGroup], now: datetime) -> list[ColumnElement[bool]]:
    shut = {key for key, breaker in all_breakers(connection).items() if breaker.held(now)}
    ways = [
        in_due_group(level)
        if ("account", level.account) in shut or ("host", level.host) in shut
        else (*in_due_group(level), _resting())
        for level in levels
    ]
    found = _ids(connection, jobs.c.due_at, ways)
    names = {scope: [name for kind, name in sorted(shut) if kind == scope] for scope in ("account", "host")}
    held = or_(jobs.c.held_at.is_not(None), jobs.c.account.in_(names["account"]), jobs.c.fetch_host.in_(names["host"]))
    return [held, *found]


def _resting() -> ColumnElement[bool]:
    return jobs.c.due_at >= HELD_UNTIL


def _waiting_in(connection: Connection, level: DueGroup) -> tuple[ColumnElement[bool], ...]:
    """The jobs of a level, in words for which an index has the deadline on MariaDB."""
    if connection.dialect.name not in MYSQL_FAMILY:
        return in_due_group(level)
    return (
        waiting_account == level.account,
        jobs.c.priority == level.priority,
        jobs.c.fetch_host == level.host,
    )


def _ids(
    connection: Connection, order: ColumnElement[Any], ways: Iterable[tuple[ColumnElement[bool], ...]]
) -> list[ColumnElement[bool]]:
    """The ids that any of these ways finds, as a condition; none where they are too many. `order` is the index's."""
    ids: set[int] = set()
    for way in ways:
        query = select(jobs.c.id).where(*way).order_by(order).limit(FEW + 1 - len(ids))
        ids.update(connection.execute(query).scalars())
        if len(ids) > FEW:
            return []
    return [jobs.c.id.in_(sorted(ids)) if ids else false()]
