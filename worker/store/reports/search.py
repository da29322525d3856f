"""Search jobs by the filters of operators, newest first, with queries that can use indexes.

Some properties are rare: a remote id, a reference, a claim, being late, being held. Jobs with a rare property are
looked up first by its index, and only these ids are searched, some hundred in a query. So the query does not depend on
the planner's statistics, which are often wrong for rows that change all the time. If more than a few thousand jobs have
the property, a scan from the newest job finds them soon enough.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import product
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, func, or_, select, true, union_all

from worker.core.circuit_breaker import Scope
from worker.core.lifecycle import FINAL_STATES, JOB_STATES
from worker.store.breakers import all_breakers
from worker.store.due_groups import DueGroup, due_groups, in_due_group
from worker.store.engine import database_now
from worker.store.jobs import OUT_OF_ORDER, first_tracked, waiting_accounts
from worker.store.schema import IS_HELD, MYSQL_FAMILY, jobs, outputs, waiting_account
from worker.store.sql_functions import HAS_DUE_TIME

FEW = 5_000  # the largest number of ids that are looked up
CHUNK = 500  # ids in a query: the time to prepare a statement grows with them


@dataclass(frozen=True, slots=True)
class JobFilter:
    """A filter for jobs. For each field with values, a job must have one of them. Empty fields are ignored.

    Times are aware. `…_since` is inclusive, `…_until` is exclusive.

    - `codes`: error codes of the job; `output_codes`: error codes of any of its outputs.
    - `late`: due for more than this number of seconds, and not claimed.
    - `stuck`: its lease has ended, but it was not released or claimed again.
    - `past_deadline`: pending after its deadline.
    - `held`: held by an operator, or its account or host is held for any reason.
    - `by_hand`: True for jobs that an operator holds, False for all others.
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
    def only_remote_ids(self) -> bool:
        """Whether the filter has remote ids, and nothing else except accounts."""
        return bool(self.remote_ids) and replace(self, remote_ids=(), accounts=()) == JobFilter()

    @property
    def states(self) -> frozenset[str]:
        """The states that a matching job can have."""
        states = frozenset(self.statuses or JOB_STATES)
        if self.codes:
            states &= {"expired" if code == "expired" else "failed" for code in self.codes}
        if self.output_codes:
            states &= {"downloading", "failed", "cancelled"}
        if self.finished_since is not None or self.finished_until is not None:
            states &= FINAL_STATES
        if self.late is not None or self.stuck:
            states &= {"pending", "downloading"}
        if self.past_deadline or self.held or self.by_hand:
            states &= {"pending"}
        return states


@dataclass(frozen=True, slots=True)
class Search:
    """A prepared filter. Each alternative selects some of the jobs by an index; together they select all of them.

    `ids` are the jobs with all rare properties of the filter, newest first, or `None` if they are not known.
    """

    alternatives: tuple[tuple[ColumnElement[bool], ...], ...]
    ids: tuple[int, ...] | None = None


def prepare_search(connection: Connection, job_filter: JobFilter) -> Search:
    """Prepare a filter: fix its times, and look up the jobs with rare properties."""
    now = database_now(connection)
    id_sets = [ids for ids in _rare_ids(connection, job_filter, now) if ids is not None]
    ids = tuple(sorted(set.intersection(*id_sets), reverse=True)) if id_sets else None
    common = [
        *_equal_conditions(job_filter),
        *_time_conditions(connection, job_filter),
        *_state_conditions(connection, job_filter, now),
    ]
    if job_filter.states == _implied_states(job_filter):
        return Search((tuple(common),), ids)
    return Search(tuple((*_in_state(state), *common) for state in JOB_STATES if state in job_filter.states), ids)


def _implied_states(job_filter: JobFilter) -> frozenset[str]:
    """Return the states that the other conditions already imply, so that no condition on the state is needed."""
    finished = job_filter.finished_since is not None or job_filter.finished_until is not None
    return FINAL_STATES if finished else frozenset(JOB_STATES)


def find_jobs(
    connection: Connection,
    job_filter: JobFilter | Search,
    *,
    limit: int,
    after: int | None = None,
    columns: Sequence[ColumnElement[Any]] = tuple(jobs.c),
) -> Sequence[Row[Any]]:
    """Return up to `limit` matching jobs, newest first. With `after`, only jobs with lower ids."""
    search = _prepared(connection, job_filter)
    if search.ids is None:
        return _newest(connection, search, () if after is None else (jobs.c.id < after,), limit, columns)
    ids = [job_id for job_id in search.ids if after is None or job_id < after]
    rows: list[Row[Any]] = []
    for start in range(0, len(ids), CHUNK):
        chunk = jobs.c.id.in_(ids[start : start + CHUNK])
        rows += _newest(connection, search, (chunk,), limit - len(rows), columns)
        if len(rows) >= limit:
            break
    return rows


def _newest(
    connection: Connection,
    search: Search,
    conditions: Sequence[ColumnElement[bool]],
    limit: int,
    columns: Sequence[ColumnElement[Any]],
) -> Sequence[Row[Any]]:
    queries = [
        select(*columns).where(*alternative, *conditions).order_by(jobs.c.id.desc()).limit(limit)
        for alternative in search.alternatives
    ]
    if not queries:
        return []
    if len(queries) == 1:
        return connection.execute(queries[0]).all()
    all_rows = union_all(*(select(alternative.subquery()) for alternative in queries)).subquery()
    return connection.execute(select(all_rows).order_by(all_rows.c.id.desc()).limit(limit)).all()


def find_job_ids(
    connection: Connection, job_filter: JobFilter | Search, *, limit: int, after: int | None = None
) -> list[int]:
    """Return the ids of up to `limit` matching jobs, newest first. With `after`, only lower ids."""
    return [row.id for row in find_jobs(connection, job_filter, limit=limit, after=after, columns=(jobs.c.id,))]


def count_matching(connection: Connection, job_filter: JobFilter | Search, *, limit: int | None = None) -> int:
    """Count the matching jobs, up to `limit` if it is given."""
    search, count = _prepared(connection, job_filter), 0
    ids = search.ids
    chunks = [()] if ids is None else [(jobs.c.id.in_(ids[at : at + CHUNK]),) for at in range(0, len(ids), CHUNK)]
    for alternative, chunk in product(search.alternatives, chunks):
        query = select(jobs.c.id).where(*alternative, *chunk)
        if limit is not None:
            query = query.limit(limit - count)
        count += connection.execute(select(func.count()).select_from(query.subquery())).scalar_one()
        if limit is not None and count >= limit:
            break
    return count


def lock_matching(connection: Connection, search: Search, ids: Iterable[int]) -> list[int]:
    """Lock the jobs with these ids that still match, and return their ids in order."""
    if not search.alternatives:
        return []
    any_match = or_(*(and_(*conditions) for conditions in search.alternatives)) if all(search.alternatives) else true()
    matching_ids = list(ids) if search.ids is None else sorted(set(search.ids).intersection(ids))
    query = select(jobs.c.id).where(jobs.c.id.in_(matching_ids), any_match).order_by(jobs.c.id).with_for_update()
    return list(connection.execute(query).scalars())


def _prepared(connection: Connection, job_filter: JobFilter | Search) -> Search:
    return job_filter if isinstance(job_filter, Search) else prepare_search(connection, job_filter)


# ── conditions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _in_state(state: str) -> tuple[ColumnElement[bool], ...]:
    # All pending jobs have a due time. This condition makes the index of such jobs usable.
    return (jobs.c.status == state, *((HAS_DUE_TIME,) if state == "pending" else ()))


def _equal_conditions(job_filter: JobFilter) -> list[ColumnElement[bool]]:
    fields: tuple[tuple[ColumnElement[Any], tuple[Any, ...]], ...] = (
        (jobs.c.account, job_filter.accounts),
        (jobs.c.kind, job_filter.kinds),
        (jobs.c.remote_id, job_filter.remote_ids),
        (jobs.c.reference, job_filter.references),
        (jobs.c.error_code, job_filter.codes),
        (jobs.c.fetch_host, job_filter.hosts),
        (jobs.c.claim_holder, job_filter.holders),
        (jobs.c.id, job_filter.ids),
    )
    conditions = [
        column == values[0] if len(values) == 1 else column.in_(values) for column, values in fields if values
    ]
    if job_filter.output_codes:  # a subquery per job: with a join, the database would read all outputs
        with_code = select(func.count()).where(
            outputs.c.job_id == jobs.c.id, outputs.c.error_code.in_(job_filter.output_codes)
        )
        conditions.append(with_code.scalar_subquery() > 0)
    return conditions


def _time_conditions(connection: Connection, job_filter: JobFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if job_filter.submitted_since is not None:  # a job is not tracked before its submission
        first_id = first_tracked(connection, job_filter.submitted_since - OUT_OF_ORDER)
        conditions += [jobs.c.submitted_at >= job_filter.submitted_since, jobs.c.id >= first_id]
    if job_filter.submitted_until is not None:
        conditions.append(jobs.c.submitted_at < job_filter.submitted_until)
    if job_filter.finished_since is not None:
        conditions.append(jobs.c.completed_at >= job_filter.finished_since)
    if job_filter.finished_until is not None:  # a job is tracked before it ends
        first_id = first_tracked(connection, job_filter.finished_until + OUT_OF_ORDER)
        conditions += [jobs.c.completed_at < job_filter.finished_until, jobs.c.id < first_id]
    return conditions


def _state_conditions(connection: Connection, job_filter: JobFilter, now: datetime) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if job_filter.late is not None:
        conditions += [*_is_late(job_filter.late, now)]
    if job_filter.stuck:
        conditions += [*_is_stuck(now)]
    if job_filter.past_deadline:
        conditions.append(jobs.c.deadline_at < now)
    if job_filter.held:
        conditions.append(_is_held(_held_keys(connection, now)))
    if job_filter.by_hand is not None:
        conditions.append(jobs.c.held_at.is_not(None) if job_filter.by_hand else jobs.c.held_at.is_(None))
    return conditions


def _is_late(seconds: float, now: datetime) -> tuple[ColumnElement[bool], ...]:
    return (HAS_DUE_TIME, jobs.c.due_at < _seconds_before(now, seconds), jobs.c.claim_token.is_(None))


def _is_stuck(now: datetime) -> tuple[ColumnElement[bool], ...]:
    return (jobs.c.claim_holder.is_not(None), jobs.c.due_at < now)


def _seconds_before(now: datetime, seconds: float) -> datetime:
    try:
        return now - timedelta(seconds=seconds)
    except OverflowError:
        return now.replace(year=1)


# ── rare properties ───────────────────────────────────────────────────────────────────────────────────────────────────


def _rare_ids(connection: Connection, job_filter: JobFilter, now: datetime) -> Iterator[set[int] | None]:
    """Yield the ids of the jobs with each rare property, or `None` if there are too many of them."""
    for column, values in (
        (jobs.c.remote_id, job_filter.remote_ids),
        (jobs.c.reference, job_filter.references),
        (jobs.c.claim_holder, job_filter.holders),
    ):
        if values:
            yield _ids_of(connection, column, [(column == value,) for value in values])
    if job_filter.stuck:
        yield _ids_of(connection, jobs.c.claim_holder, [_is_stuck(now)])
    if job_filter.late is None and not (job_filter.past_deadline or job_filter.held or job_filter.by_hand):
        return
    groups = due_groups(connection, job_filter.accounts or waiting_accounts(connection))
    if job_filter.past_deadline:
        past_deadline = [(*_in_due_group_indexed(connection, group), jobs.c.deadline_at < now) for group in groups]
        yield _ids_of(connection, jobs.c.due_at, past_deadline)
    if job_filter.late is not None:
        late, late_before = _is_late(job_filter.late, now), _seconds_before(now, job_filter.late)
        late_jobs = [(*in_due_group(group), *late) for group in groups if group.due_at < late_before]
        yield _ids_of(connection, jobs.c.due_at, late_jobs)
    if job_filter.by_hand:
        yield _ids_of(connection, jobs.c.due_at, [(*in_due_group(group), IS_HELD) for group in groups])
    if job_filter.held:
        held_keys = _held_keys(connection, now)
        held_jobs = [
            in_due_group(group)
            if ("account", group.account) in held_keys or ("host", group.host) in held_keys
            else (*in_due_group(group), IS_HELD)
            for group in groups
        ]
        yield _ids_of(connection, jobs.c.due_at, held_jobs)


def _held_keys(connection: Connection, now: datetime) -> set[tuple[Scope, str]]:
    return {key for key, breaker in all_breakers(connection).items() if breaker.held(now)}


def _is_held(held_keys: Iterable[tuple[Scope, str]]) -> ColumnElement[bool]:
    held_names = {scope: [name for kind, name in sorted(held_keys) if kind == scope] for scope in ("account", "host")}
    return or_(
        jobs.c.held_at.is_not(None),
        jobs.c.account.in_(held_names["account"]),
        jobs.c.fetch_host.in_(held_names["host"]),
    )


def _in_due_group_indexed(connection: Connection, group: DueGroup) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions of a group's jobs, in a form for which MariaDB's index contains the deadline."""
    if connection.dialect.name not in MYSQL_FAMILY:
        return in_due_group(group)
    return (
        waiting_account == group.account,
        jobs.c.priority == group.priority,
        jobs.c.fetch_host == group.host,
    )


def _ids_of(
    connection: Connection, index_order: ColumnElement[Any], alternatives: Iterable[tuple[ColumnElement[bool], ...]]
) -> set[int] | None:
    """Return the ids of the jobs that any of the alternatives finds, or `None` if there are too many.

    `index_order` is the column that orders the index to use.
    """
    ids: set[int] = set()
    for conditions in alternatives:
        query = select(jobs.c.id).where(*conditions).order_by(index_order).limit(FEW + 1 - len(ids))
        ids.update(connection.execute(query).scalars())
        if len(ids) > FEW:
            return None
    return ids
