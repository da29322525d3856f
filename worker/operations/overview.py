"""Overview of all jobs and accounts: the states of accounts, hosts, learned paces and unstored outputs."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row

from worker.core.circuit_breaker import CircuitBreaker, Scope
from worker.core.lifecycle import JOB_STATES
from worker.core.pacing.policy import PaceModel
from worker.core.pacing.survival import MAX_POLL_AGE
from worker.polling.duration_learner import read_models
from worker.settings import Settings
from worker.store.breakers import all_breakers, last_asked
from worker.store.due_groups import DueGroup, due_groups
from worker.store.engine import database_now
from worker.store.holds import work_limits
from worker.store.jobs import count_by_state, waiting_accounts
from worker.store.outputs import unstored_by_code
from worker.store.paces import newest_paces
from worker.store.reports.snapshot_rows import COUNTED_MOST, StaleClaim, jobs_past_deadline, stale_claims
from worker.store.schema import HELD_UNTIL

MAX_KINDS = 50  # the most recently updated kinds
SOON = timedelta(seconds=60)  # a job past its deadline that is polled sooner expires by itself
HEALTHY_SECONDS = 30.0  # healthy: no work is due for longer, or a request was made within it


@dataclass(frozen=True, slots=True)
class AccountState:
    """An account: the reason, start and end of its hold, if it is held, and the requests per second it may make."""

    account: str
    reason: str | None
    since: datetime | None
    until: datetime | None
    rps: float


@dataclass(frozen=True, slots=True)
class HeldHost:
    """A held host of the API: the reason, start and end of the hold. `until` is `None` if an operator must end it."""

    host: str
    reason: str
    since: datetime | None
    until: datetime | None


@dataclass(frozen=True, slots=True)
class KindState:
    """The learned pace of one kind of an account's jobs. Times are in seconds.

    `median` and `p90` are the ages at which half and 90 % of the jobs are ready, or `None` if fewer ever become ready.
    `expected` and `ready` are shares of the recent requests: those predicted to find the job ready, and those that did.
    `planned_delay` and `seen_delay` are the mean times from ready to seen, as planned and as measured.
    """

    account: str
    kind: str
    jobs: float
    median: float | None
    p90: float | None
    expected: float
    ready: float
    planned_delay: float
    seen_delay: float


@dataclass(frozen=True, slots=True)
class UnstoredOutputs:
    """Outputs that are not stored yet: their number, and the seconds since the oldest link was first seen.

    `trouble` counts them by the code of their last error. `storage` is the last error message of the storage, if any.
    """

    count: int
    oldest_seconds: float
    trouble: Mapping[str, int]
    storage: str | None


@dataclass(frozen=True, slots=True)
class Overview:
    """The state of all jobs and accounts. `oldest_due_seconds` is the age of the oldest due work that is not held."""

    jobs: Mapping[str, int]
    accounts: Sequence[AccountState]
    oldest_due_seconds: float
    healthy: bool
    unstored: UnstoredOutputs
    kinds: Sequence[KindState] = ()
    hosts: Sequence[HeldHost] = ()


def overview(connection: Connection, settings: Settings) -> Overview:
    """Read the state of all jobs and accounts."""
    now = database_now(connection)
    breakers = all_breakers(connection)
    groups = due_groups(connection, waiting_accounts(connection))
    accounts = account_states(breakers, groups, settings, now)
    free_accounts = [state.account for state in accounts if state.reason is None]
    hosts = held_hosts(breakers, now)
    held_names = {host.host for host in hosts}
    due_times = [
        group.due_at
        for group in groups
        if group.due_at <= now and group.account in free_accounts and group.host not in held_names
    ]
    oldest = max(0.0, (now - min(due_times)).total_seconds()) if due_times else 0.0
    job_counts = count_by_state(connection)
    return Overview(
        jobs={state: job_counts.get(state, 0) for state in JOB_STATES},
        accounts=accounts,
        oldest_due_seconds=round(oldest, 3),
        healthy=oldest <= HEALTHY_SECONDS or workers_poll(last_asked(connection), now),
        unstored=_unstored(connection, now),
        kinds=_kinds(connection),
        hosts=hosts,
    )


def workers_poll(last_request_at: datetime | None, now: datetime) -> bool:
    """Return whether any worker made a request within the last `HEALTHY_SECONDS`."""
    return last_request_at is not None and now - last_request_at <= timedelta(seconds=HEALTHY_SECONDS)


def lost_claims(
    connection: Connection, settings: Settings, now: datetime, *, grace: float, dead: Collection[str] = ()
) -> list[StaleClaim]:
    """Return the claims whose process will not complete the work.

    That is so if their lease ended `grace` seconds ago, if they are older than any work takes, or if their holder is
    known to be `dead`.
    """
    limits = work_limits(settings)
    return stale_claims(
        connection,
        dead=dead,
        expired_before=now - timedelta(seconds=grace),
        polled_before=now - limits.poll_max,
        claimed_before=now - limits.download_max,
    )


def overdue_jobs(connection: Connection, pending: int, now: datetime, *, limit: int) -> list[Row[Any]] | None:
    """Return the jobs past their deadline that are not polled soon, and so do not expire.

    Return `None` if too many jobs are `pending` to check each of them.
    """
    if pending > COUNTED_MOST:
        return None
    return jobs_past_deadline(connection, now=now, later=now + SOON, limit=limit)


def held_hosts(breakers: Mapping[tuple[Scope, str], CircuitBreaker], now: datetime) -> list[HeldHost]:
    """Return the held hosts, sorted by name."""
    return [
        HeldHost(breaker.name, breaker.why or "", breaker.held_since, breaker.tried_at)
        for (scope, _), breaker in sorted(breakers.items())
        if scope == "host" and breaker.held(now)
    ]


def account_states(
    breakers: Mapping[tuple[Scope, str], CircuitBreaker], groups: Iterable[DueGroup], settings: Settings, now: datetime
) -> list[AccountState]:
    """Return the state of each account that has a key, a circuit breaker or waiting jobs, sorted by name."""
    by_due_time = sorted(groups, key=lambda group: group.due_at, reverse=True)
    waiting_since = {group.account: group.due_at for group in by_due_time if group.due_at < HELD_UNTIL}
    with_breaker = (name for scope, name in breakers if scope == "account")
    names = sorted({*(group.account for group in by_due_time), *settings.keys, *with_breaker})
    return [_account(name, breakers, waiting_since, settings, now) for name in names]


def _unstored(connection: Connection, now: datetime) -> UnstoredOutputs:
    groups = unstored_by_code(connection)
    oldest = min((group.oldest for group in groups), default=now)
    return UnstoredOutputs(
        count=sum(group.count for group in groups),
        oldest_seconds=round(max(0.0, (now - oldest).total_seconds()), 3),
        trouble={group.code: group.count for group in groups if group.code is not None},
        storage=next((group.message for group in groups if group.code == "storage"), None),
    )


def _kinds(connection: Connection) -> list[KindState]:
    classes = sorted((row.account, row.kind) for row in newest_paces(connection, limit=MAX_KINDS))
    return [_kind(account, kind, read[0]) for (account, kind), read in read_models(connection, classes).items()]


def _kind(account: str, kind: str, model: PaceModel) -> KindState:
    requests = max(model.polls, 1e-9)
    return KindState(
        account=account,
        kind=kind,
        jobs=model.by_age.moments.count,
        median=finite_seconds(model.by_age.quantile(0.0, 0.5)),
        p90=finite_seconds(model.by_age.quantile(0.0, 0.9)),
        expected=round(model.expected_ready / requests, 3),
        ready=round(model.found_ready / requests, 3),
        planned_delay=round(model.planned_delay, 2),
        seen_delay=round(model.actual_delay, 2),
    )


def finite_seconds(seconds: float) -> float | None:
    """Return a number of seconds from now, at least 0, or `None` for never."""
    return round(max(seconds, 0.0), 1) if seconds < MAX_POLL_AGE else None


def _account(
    name: str,
    breakers: Mapping[tuple[Scope, str], CircuitBreaker],
    waiting_since: Mapping[str, datetime],
    settings: Settings,
    now: datetime,
) -> AccountState:
    breaker = breakers.get(("account", name), CircuitBreaker("account", name))
    host = breakers.get(("host", settings.api_host))
    rps = round(breaker.rate(settings.rps(name), now), 2)
    if breaker.held(now):
        return AccountState(name, breaker.why, breaker.held_since, breaker.tried_at, rps)
    if name not in settings.keys and not breaker.proven and name in waiting_since:
        return AccountState(name, no_key(name), waiting_since[name], None, rps)
    if host is not None and host.held(now):
        return AccountState(name, f"{host.name} {host.why}", host.held_since, host.tried_at, rps)
    return AccountState(name, None, None, None, rps)


def no_key(account: str) -> str:
    """Return the reason for holding the jobs of an account without a key."""
    return f"no key for account {account}"
