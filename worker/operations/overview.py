"""Overview of all jobs and accounts, and the one-sentence reason for the state of a job."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row

from worker.core.answer_history import parse_history
from worker.core.circuit_breaker import BY_OPERATOR, NOT_LISTED, CircuitBreaker, Scope
from worker.core.lifecycle import JOB_STATES
from worker.core.pacing.policy import PacedJob, PaceModel
from worker.core.pacing.survival import MAX_POLL_AGE
from worker.core.redaction.masking import mask_personal_data
from worker.polling.duration_learner import read_models
from worker.settings import Settings
from worker.store.breakers import all_breakers, last_asked
from worker.store.claims import DueGroup, due_groups
from worker.store.engine import database_now
from worker.store.holds import work_limits
from worker.store.jobs import count_by_state, waiting_accounts
from worker.store.late_looks import look_of
from worker.store.outputs import unstored_by_code
from worker.store.paces import newest_paces
from worker.store.promises import promise_row
from worker.store.schema import HELD_UNTIL

MAX_KINDS = 50  # the most recently updated kinds
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
class HostState:
    """A held host of the API: the reason, start and end of the hold."""

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
class ReadyEstimate:
    """The estimate for one waiting job: the chances that it is ready now and at its next poll.

    `median` and `p90` are the seconds from now until half and 90 % of the jobs of this kind are ready. `by` says
    whether the estimate uses the job's `age` or its `eta`.
    """

    chance_now: float
    chance_then: float
    median: float | None
    p90: float | None
    by: str
    jobs: float


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
    hosts: Sequence[HostState] = ()


def overview(connection: Connection, settings: Settings) -> Overview:
    """Read the state of all jobs and accounts."""
    now = database_now(connection)
    breakers = all_breakers(connection)
    groups = due_groups(connection, waiting_accounts(connection))
    accounts = account_states(breakers, groups, settings, now)
    free_accounts = [state.account for state in accounts if state.reason is None]
    held_hosts = [breaker.name for breaker in breakers.values() if breaker.scope == "host" and breaker.held(now)]
    due_times = [
        group.due_at
        for group in groups
        if group.due_at <= now and group.account in free_accounts and group.host not in held_hosts
    ]
    oldest = max(0.0, (now - min(due_times)).total_seconds()) if due_times else 0.0
    last_request_at = last_asked(connection)
    workers_poll = last_request_at is not None and now - last_request_at <= timedelta(seconds=HEALTHY_SECONDS)
    job_counts = count_by_state(connection)
    return Overview(
        jobs={state: job_counts.get(state, 0) for state in JOB_STATES},
        accounts=accounts,
        oldest_due_seconds=round(oldest, 3),
        healthy=oldest <= HEALTHY_SECONDS or workers_poll,
        unstored=_unstored(connection, now),
        kinds=_kinds(connection),
        hosts=[
            HostState(breaker.name, breaker.why or "", breaker.paused_at or breaker.since, _tried_at(breaker))
            for (scope, _), breaker in sorted(breakers.items())
            if scope == "host" and breaker.held(now)
        ],
    )


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
        median=_finite(model.by_age.quantile(0.0, 0.5)),
        p90=_finite(model.by_age.quantile(0.0, 0.9)),
        expected=round(model.expected_ready / requests, 3),
        ready=round(model.found_ready / requests, 3),
        planned_delay=round(model.planned_delay, 2),
        seen_delay=round(model.actual_delay, 2),
    )


def ready_estimate(connection: Connection, job: Row[Any]) -> ReadyEstimate | None:
    """Estimate when a pending job is ready. Return `None` for a job that is held or not pending."""
    if job.status != "pending" or job.held_at is not None:
        return None
    now = database_now(connection)
    model, _ = read_models(connection, [(job.account, job.kind)])[job.account, job.kind]
    since = job.submitted_at
    waiting = PacedJob.at(
        now,
        submitted_at=since,
        not_ready_at=job.not_ready_at,
        eta=job.eta,
        eta_at=job.eta_at,
        deadline_at=job.deadline_at,
    )
    due = max((job.due_at - since).total_seconds(), waiting.not_ready_age)
    clock, _, _ = model.clock(waiting)
    return ReadyEstimate(
        chance_now=round(model.chance(waiting, waiting.age), 3),
        chance_then=round(model.chance(waiting, due), 3),
        median=_finite(model.quantile(waiting, 0.5) - waiting.age),
        p90=_finite(model.quantile(waiting, 0.9) - waiting.age),
        by="age" if clock is model.by_age else "eta",
        jobs=clock.moments.count,
    )


def _finite(seconds: float) -> float | None:
    return round(max(seconds, 0.0), 1) if seconds < MAX_POLL_AGE else None


def _describe(estimate: ReadyEstimate) -> str:
    if not estimate.jobs:
        return "no job of this kind has finished yet"
    half = "never" if estimate.median is None else f"in {estimate.median:.0f} s"
    ninety = "never" if estimate.p90 is None else f"in {estimate.p90:.0f} s"
    return (
        f"the chance that it is ready is {estimate.chance_now:.0%} now and {estimate.chance_then:.0%} then"
        f"; estimated from {estimate.jobs:.0f} jobs of this kind by {estimate.by}: half are ready {half}, 90 % {ninety}"
    )


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
        return AccountState(name, breaker.why, breaker.paused_at or breaker.since, _tried_at(breaker), rps)
    if name not in settings.keys and not breaker.proven and name in waiting_since:
        return AccountState(name, no_key(name), waiting_since[name], None, rps)
    if host is not None and host.held(now):
        return AccountState(name, f"{host.name} {host.why}", host.paused_at or host.since, _tried_at(host), rps)
    return AccountState(name, None, None, None, rps)


def _tried_at(breaker: CircuitBreaker) -> datetime | None:
    """Return when a held circuit breaker ends or is probed; `None` if only an operator can end the hold."""
    if breaker.paused_at is not None or (breaker.reason or "").startswith(NOT_LISTED):
        return None
    return breaker.until or breaker.probe_at


def no_key(account: str) -> str:
    """Return the reason for holding the jobs of an account without a key."""
    return f"no key for account {account}"


def why(connection: Connection, job: Row[Any], outputs: Sequence[Row[Any]], settings: Settings) -> str:
    """Return the reason for the state of a job, in one or two sentences."""
    now = database_now(connection)
    match job.status:
        case "completed":
            return f"all {len(outputs)} outputs are stored"
        case "failed" if job.error_code == "not_found":
            return (
                f"not_found: {job.error_message}; polled at {job.fetch_base}: "
                "if the job belongs to another endpoint, track it with `endpoint`"
            )
        case "failed" | "expired":
            late_poll = look_of(connection, job.id) if job.status == "expired" else None
            next_poll = (
                "" if late_poll is None else f"; it is polled once more at {late_poll.due_at:%Y-%m-%d %H:%M} UTC"
            )
            return f"{job.error_code}: {job.error_message}{next_poll}"
        case "cancelled":
            return "it was cancelled"
        case "downloading":
            promise = promise_row(connection, job.id)
            code = None if promise is None else promise.end_code
            promised = f"it ends as {code} unless a promised link gives an output; " if code is not None else ""
            return promised + _why_downloading(job, outputs, now)
    if job.held_at is not None:
        since = f"{job.held_at:%Y-%m-%d %H:%M:%S} UTC"
        return f"{BY_OPERATOR} since {since}; it does not expire during the hold; `resume` ends the hold"
    breakers = all_breakers(connection)
    state = _account(job.account, breakers, {job.account: job.due_at}, settings, now)
    if state.reason is not None:
        until = f", tried again at {state.until:%H:%M:%S} UTC" if state.until else ""
        return f"held: {state.reason}{until}; it does not expire during the hold"
    host = breakers.get(("host", job.fetch_host))
    if host is not None and host.held(now):
        not_listed = (host.why or "").startswith(NOT_LISTED)
        effect = "it expires at its deadline" if not_listed else "it does not expire during the hold"
        return f"held: {host.name} {host.why}; {effect}"
    kept_answers = parse_history(job.last_answer)
    last_answer = f"; last answer: {mask_personal_data(kept_answers[0].note)}" if kept_answers else ""
    if job.claim_token is not None and job.due_at < now:
        return f"{job.claim_holder} claimed it and its lease has ended: no worker has claimed it since{last_answer}"
    if job.claim_token is not None and job.asked_at is not None and now - job.asked_at > work_limits(settings).poll_max:
        age = (now - job.asked_at).total_seconds()
        return (
            f"{job.claim_holder} claimed it {age:.0f} s ago, longer than any request takes: "
            f"`resume` polls it at once{last_answer}"
        )
    if job.claim_token is not None:
        return f"it is being polled by {job.claim_holder}{last_answer}"
    estimate = ready_estimate(connection, job)
    prospect = f"; {_describe(estimate)}" if estimate is not None and settings.poll_policy == "learned" else ""
    if job.due_at > now:
        return f"waiting for its next poll in {(job.due_at - now).total_seconds():.0f} s{prospect}{last_answer}"
    late = (now - job.due_at).total_seconds()
    return f"due for {late:.0f} s: no worker has polled it yet, or the rate limit is used up{last_answer}"


def _why_downloading(job: Row[Any], outputs: Sequence[Row[Any]], now: datetime) -> str:
    waiting = [output for output in outputs if output.status == "pending"]
    stored = sum(output.status == "stored" for output in outputs)
    reason = f"{stored} of {len(outputs)} outputs are stored"
    if job.due_at is not None:
        reason += "; the API is asked for a fresh link"
    for output in waiting:
        if output.claim_token is not None:
            reason += f"; output {output.position} is being downloaded"
        elif output.error_code is not None:
            wait_seconds = max(0.0, (output.due_at - now).total_seconds())
            error = f"{output.error_code} ({output.error_message})"
            reason += f"; output {output.position}: {error}, again in {wait_seconds:.0f} s"
        else:
            reason += f"; output {output.position} is waiting for a download process"
    return reason
