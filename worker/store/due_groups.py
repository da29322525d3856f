"""Due groups: the jobs with a due time, by account, priority and API host. Read from an index, one look per group."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, bindparam, func, select

from worker.store.schema import MYSQL_FAMILY, jobs, waiting_account


@dataclass(frozen=True, slots=True)
class DueGroup:
    """The jobs with a due time of one account, priority and API host. `due_at` is the earliest of their due times."""

    account: str
    priority: int
    host: str
    due_at: datetime


def in_due_group(group: DueGroup) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions that select the jobs of a group, in the form that matches their index."""
    return (
        jobs.c.account == group.account,
        jobs.c.priority == group.priority,
        jobs.c.fetch_host == group.host,
        jobs.c.due_at.is_not(None),
    )


def due_groups(connection: Connection, accounts: Iterable[str]) -> list[DueGroup]:
    """Return the due groups of these accounts, ordered by account, highest priority and earliest due time.

    The due time of a claimed job is the end of its lease. The query jumps from one group to the next in the index, so
    its cost depends on the number of groups, not of jobs.
    """
    if connection.dialect.name in MYSQL_FAMILY:
        return _due_groups_mysql(connection, list(accounts))
    return [
        DueGroup(account, row.priority, row.host, row.due_at)
        for account in accounts
        for row in connection.execute(_DUE_GROUPS, {"account": account}).all()
    ]


def _due_groups_mysql(connection: Connection, accounts: list[str]) -> list[DueGroup]:
    """Do the same with a loose index scan of MariaDB and MySQL: one index lookup per group."""
    rows = connection.execute(_DUE_GROUPS_MYSQL, {"accounts": accounts}).all()
    groups = [DueGroup(*row) for row in rows]
    return sorted(groups, key=lambda group: (accounts.index(group.account), -group.priority, group.due_at))


def _due_groups_query() -> Select[Any]:
    waiting = (jobs.c.account == bindparam("account"), jobs.c.due_at.is_not(None))
    highest = select(func.max(jobs.c.priority).label("priority")).where(*waiting).cte("priorities", recursive=True)
    lower = select(func.max(jobs.c.priority)).where(*waiting, jobs.c.priority < highest.c.priority).scalar_subquery()
    priorities = highest.union_all(select(lower).where(highest.c.priority.is_not(None)))

    def last_host(priority: ColumnElement[int], *before: ColumnElement[bool]) -> Any:
        query = select(func.max(jobs.c.fetch_host)).where(*waiting, jobs.c.priority == priority, *before)
        return query.scalar_subquery()

    last = select(priorities.c.priority, last_host(priorities.c.priority).label("host")).cte("hosts", recursive=True)
    earlier = last_host(last.c.priority, jobs.c.fetch_host < last.c.host)
    groups = last.union_all(select(last.c.priority, earlier).where(last.c.host.is_not(None)))
    first = (
        select(jobs.c.due_at)
        .where(*waiting, jobs.c.priority == groups.c.priority, jobs.c.fetch_host == groups.c.host)
        .order_by(jobs.c.due_at)
        .limit(1)
        .scalar_subquery()
    )
    query = select(groups.c.priority, groups.c.host, first.label("due_at")).where(groups.c.host.is_not(None))
    return query.order_by(groups.c.priority.desc(), "due_at")


_DUE_GROUPS = _due_groups_query()
_DUE_GROUPS_MYSQL = (
    select(waiting_account, jobs.c.priority, jobs.c.fetch_host, func.min(jobs.c.due_at))
    .where(waiting_account.in_(bindparam("accounts", expanding=True)))
    .group_by(waiting_account, jobs.c.priority, jobs.c.fetch_host)
)
