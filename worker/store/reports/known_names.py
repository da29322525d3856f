"""Names of accounts, API hosts and kinds: which ones exist, so that a mistyped name is an error.

They are read from small tables, and by jumps through indexes of the jobs. No query reads all jobs.
"""

from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Select, func, select

from worker.settings import Settings
from worker.store.breakers import all_breakers
from worker.store.due_groups import due_groups
from worker.store.jobs import waiting_accounts
from worker.store.orders import UNNAMED, accounts_with_orders
from worker.store.processes import read_processes
from worker.store.reports.pages import jobs_page
from worker.store.reports.search import JobFilter
from worker.store.schema import counters, jobs, orders, paces

DEFAULT_ACCOUNT = "default"
CHOICES_MOST = 200
NAMES_SHOWN = 30
STEPS_MOST = 1_000  # jumps through an index
NEWEST_JOBS = 5_000


def unknown_name(connection: Connection, job_filter: JobFilter, settings: Settings) -> str | None:
    """Return what is wrong with a filter if no account, host or kind has one of its names, or else None."""
    problems = (
        *(_unknown_account(connection, name, settings) for name in job_filter.accounts),
        *(_unknown_host(connection, name, settings) for name in job_filter.hosts),
        *(_unknown_kind(connection, name) for name in job_filter.kinds),
    )
    return next((problem for problem in problems if problem is not None), None)


def known_accounts(connection: Connection) -> list[str]:
    """Return accounts for a choice."""
    return sorted(_accounts(connection))[:CHOICES_MOST]


def known_kinds(connection: Connection) -> list[str]:
    """Return kinds for a choice."""
    return sorted(_kinds(connection))[:CHOICES_MOST]


def _accounts(connection: Connection) -> set[str]:
    """Return the accounts with a circuit breaker, a counter, waiting jobs or a worker process that has their key."""
    with_breaker = {name for scope, name in all_breakers(connection) if scope == "account"}
    counted = select(counters.c.account).where(counters.c.account != "").distinct()
    served = {name for process in read_processes(connection) for name in process.accounts or ()}
    waiting = {*waiting_accounts(connection), *accounts_with_orders(connection)}
    return {*with_breaker, *connection.execute(counted).scalars(), *waiting, *served}


def _kinds(connection: Connection) -> set[str]:
    """Return the kinds of the newest jobs, and those with a counter or a learned pace."""
    newest = select(jobs.c.kind).order_by(jobs.c.id.desc()).limit(NEWEST_JOBS).subquery()
    queries = (
        select(newest.c.kind).distinct(),
        select(counters.c.kind).where(counters.c.kind != "").distinct(),
        select(paces.c.kind).where(paces.c.kind != "").distinct(),
    )
    return {kind for query in queries for kind in connection.execute(query).scalars()}


def _unknown_account(connection: Connection, name: str, settings: Settings) -> str | None:
    known = {DEFAULT_ACCOUNT, *settings.keys, *_accounts(connection)}
    if name in known or connection.execute(select(jobs.c.id).where(jobs.c.account == name).limit(1)).first():
        return None
    known |= set(islice(_accounts_with_jobs(connection), CHOICES_MOST))
    return f"there is no account {name!r}; the known accounts are {_listed(known)}"


def _unknown_host(connection: Connection, name: str, settings: Settings) -> str | None:
    known = {*settings.api.hosts, *(host for scope, host in all_breakers(connection) if scope == "host")}
    known |= {group.host for group in due_groups(connection, waiting_accounts(connection))}
    known |= set(connection.execute(select(orders.c.host).where(orders.c.queue.is_not(None)).distinct()).scalars())
    if name in known:
        return None
    for step, host in enumerate(_hosts_of_jobs(connection)):
        if host == name or step == STEPS_MOST:  # after so many steps, it is not known whether the host exists
            return None
        known.add(host)
    return f"no job is fetched from {name!r}; the known hosts are {_listed(known)}"


def _unknown_kind(connection: Connection, name: str) -> str | None:
    known = _kinds(connection)
    if name in known or jobs_page(connection, JobFilter(kinds=(name,)), before=None, limit=1).rows:
        return None
    return f"no job is of the kind {name!r}; the known kinds are {_listed(known)}"


def _accounts_with_jobs(connection: Connection) -> Iterator[str]:
    """Yield the accounts of all jobs, by jumps through the index of the jobs' identities."""
    first: Select[Any] = select(func.min(jobs.c.account))
    account: str | None = connection.execute(first).scalar()
    while account is not None:
        yield account
        account = connection.execute(first.where(jobs.c.account > account)).scalar()


def _hosts_of_jobs(connection: Connection) -> Iterator[str]:
    """Yield the host of each account and fetch address that jobs have, by jumps through the same index."""
    for account in _accounts_with_jobs(connection):
        named = (jobs.c.account == account, ~jobs.c.fetch_base.startswith(UNNAMED))
        first = select(jobs.c.fetch_base, jobs.c.fetch_host).where(*named)
        first = first.order_by(jobs.c.fetch_base).limit(1)
        row = connection.execute(first).first()
        while row is not None:
            yield row.fetch_host
            row = connection.execute(first.where(jobs.c.fetch_base > row.fetch_base)).first()


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)[:NAMES_SHOWN]
    more = f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else ""
    return (", ".join(shown) or "none yet") + more
