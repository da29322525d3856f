"""What operators ask: how everything stands, and why one job is where it is."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row

from worker.core.answer_history import parse_history
from worker.core.circuit_breaker import BY_OPERATOR, NOT_LISTED, CircuitBreaker, Scope
from worker.core.lifecycle import JOB_STATES
from worker.core.pacing.policy import PacedJob, PaceModel
from worker.core.pacing.survival import OLDEST
from worker.core.redaction.masking import mask_personal_data
from worker.polling.pace_learner import read_models
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

KINDS_MOST = 50  # those learned about last
HEALTHY_SECONDS = 30.0  # due work is done within it, or a request was made within it


@dataclass(frozen=True, slots=True)
class AccountState:
    """One account: why it is held, if it is, since and until when; and the requests per second that it may make."""

    account: str
    reason: str | None
    since: datetime | None
    until: datetime | None
    rps: float


@dataclass(frozen=True, slots=True)
class HostState:
    """A host of the API that is held: why, since and until when."""

    host: str
    reason: str
    since: datetime | None
    until: datetime | None


@dataclass(frozen=True, slots=True)
class KindState:
    """What is believed of one kind of an account's jobs. Times in seconds; None where so many are never ready.

    `median` and `p90` are the ages by which half and 90 % are ready. Of recent requests `expected` is the share that
    was thought to find its job ready, `ready` the share that did; of those `planned_delay` and `seen_delay` are the
    mean times from ready to seen as they were aimed at, and as they came about.
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
class Belief:
    """What is believed of one waiting job: the chances of its being ready now and when it is asked about.

    `median` and `p90` are the seconds from now until half, or 90 %, of such jobs are ready; `by` is the clock that
    decides, of age or of eta.
    """

    chance_now: float
    chance_then: float
    median: float | None
    p90: float | None
    by: str
    jobs: float


@dataclass(frozen=True, slots=True)
class Unstored:
    """Outputs that are paid for and not stored yet: how many, and for how long the oldest link is known, in seconds.

    `trouble` counts them by the code of their last trouble; `storage` is what our own storage said last, if it is that.
    """

    count: int
    oldest_seconds: float
    trouble: Mapping[str, int]
    storage: str | None


@dataclass(frozen=True, slots=True)
class Overview:
    """How everything stands. `oldest_due_seconds` counts work that could be done now; 0 where there is none."""

    jobs: Mapping[str, int]
    accounts: Sequence[AccountState]
    oldest_due_seconds: float
    healthy: bool
    unstored: Unstored
    kinds: Sequence[KindState] = ()
    hosts: Sequence[HostState] = ()


def overview(connection: Connection, settings: Settings) -> Overview:
    """The state of all jobs and accounts."""
    now = database_now(connection)
    known = all_breakers(connection)
    levels = due_groups(connection, waiting_accounts(connection))
    accounts = account_states(known, levels, settings, now)
    free = [state.account for state in accounts if state.reason is None]
    shut = [breaker.name for breaker in known.values() if breaker.scope == "host" and breaker.held(now)]
    since = [
        level.due_at for level in levels if level.due_at <= now and level.account in free and level.host not in shut
    ]
    oldest = max(0.0, (now - min(since)).total_seconds()) if since else 0.0
    asked = last_asked(connection)
    working = asked is not None and now - asked <= timedelta(seconds=HEALTHY_SECONDS)
    found = count_by_state(connection)
    return Overview(
        jobs={state: found.get(state, 0) for state in JOB_STATES},
        accounts=accounts,
        oldest_due_seconds=round(oldest, 3),
        healthy=oldest <= HEALTHY_SECONDS or working,
        unstored=_unstored(connection, now),
        kinds=_kinds(connection),
        hosts=[
            HostState(breaker.name, breaker.why or "", breaker.paused_at or breaker.since, _tried_at(breaker))
            for (scope, _), breaker in sorted(known.items())
            if scope == "host" and breaker.held(now)
        ],
    )


def account_states(
    known: Mapping[tuple[Scope, str], CircuitBreaker], levels: Iterable[DueGroup], settings: Settings, now: datetime
) -> list[AccountState]:
    """Every account that has a key, a gate, or jobs that wait, by its name."""
    by_time = sorted(levels, key=lambda level: level.due_at, reverse=True)
    waiting = {level.account: level.due_at for level in by_time if level.due_at < HELD_UNTIL}
    gated = (name for scope, name in known if scope == "account")
    names = sorted({*(level.account for level in by_time), *settings.keys, *gated})
    return [_account(name, known, waiting, settings, now) for name in names]


def _unstored(connection: Connection, now: datetime) -> Unstored:
    found = unstored_by_code(connection)
    oldest = min((one.oldest for one in found), default=now)
    return Unstored(
        count=sum(one.count for one in found),
        oldest_seconds=round(max(0.0, (now - oldest).total_seconds()), 3),
        trouble={one.code: one.count for one in found if one.code is not None},
        storage=next((one.message for one in found if one.code == "storage"), None),
    )


def _kinds(connection: Connection) -> list[KindState]:
    classes = sorted((row.account, row.kind) for row in newest_paces(connection, limit=KINDS_MOST))
    return [_kind(account, kind, read[0]) for (account, kind), read in read_models(connection, classes).items()]


def _kind(account: str, kind: str, model: PaceModel) -> KindState:
    asked = max(model.polls, 1e-9)
    return KindState(
        account=account,
        kind=kind,
        jobs=model.by_age.moments.count,
        median=_finite(model.by_age.quantile(0.0, 0.5)),
        p90=_finite(model.by_age.quantile(0.0, 0.9)),
        expected=round(model.expected_ready / asked, 3),
        ready=round(model.found_ready / asked, 3),
        planned_delay=round(model.planned_delay, 2),
        seen_delay=round(model.actual_delay, 2),
    )


def belief(connection: Connection, job: Row[Any]) -> Belief | None:
    """What is believed of a job that waits for its next poll; None for any other, and for one that is held."""
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
    return Belief(
        chance_now=round(model.chance(waiting, waiting.age), 3),
        chance_then=round(model.chance(waiting, due), 3),
        median=_finite(model.quantile(waiting, 0.5) - waiting.age),
        p90=_finite(model.quantile(waiting, 0.9) - waiting.age),
        by="age" if clock is model.by_age else "eta",
        jobs=clock.moments.count,
    )


def _finite(seconds: float) -> float | None:
    return round(max(seconds, 0.0), 1) if seconds < OLDEST else None


def _in_words(believed: Belief) -> str:
    if not believed.jobs:
        return "nothing is known of such jobs yet"
    half = "never" if believed.median is None else f"in {believed.median:.0f} s"
    most = "never" if believed.p90 is None else f"in {believed.p90:.0f} s"
    return (
        f"it is ready now with a chance of {believed.chance_now:.0%}, then with {believed.chance_then:.0%}"
        f"; of {believed.jobs:.0f} such jobs by their {believed.by}: half {half}, 90 % {most}"
    )


def _account(
    name: str,
    known: Mapping[tuple[Scope, str], CircuitBreaker],
    waiting: Mapping[str, datetime],
    settings: Settings,
    now: datetime,
) -> AccountState:
    breaker = known.get(("account", name), CircuitBreaker("account", name))
    host = known.get(("host", settings.api_host))
    rps = round(breaker.rate(settings.rps(name), now), 2)
    if breaker.held(now):
        return AccountState(name, breaker.why, breaker.paused_at or breaker.since, _tried_at(breaker), rps)
    if name not in settings.keys and not breaker.proven and name in waiting:
        return AccountState(name, no_key(name), waiting[name], None, rps)
    if host is not None and host.held(now):
        return AccountState(name, f"{host.name} {host.why}", host.paused_at or host.since, _tried_at(host), rps)
    return AccountState(name, None, None, None, rps)


def _tried_at(breaker: CircuitBreaker) -> datetime | None:
    """When a held gate ends or is tried again; None where only an operator can end it."""
    if breaker.paused_at is not None or (breaker.reason or "").startswith(NOT_LISTED):
        return None
    return breaker.until or breaker.probe_at


def no_key(account: str) -> str:
    """Why an account's jobs are held that has no key."""
    return f"no key for account {account}"


def why(connection: Connection, job: Row[Any], outputs: Sequence[Row[Any]], settings: Settings) -> str:
    """Why a job is where it is, in a sentence or two."""
    now = database_now(connection)
    match job.status:
        case "completed":
            return f"all {len(outputs)} outputs are stored"
        case "failed" if job.error_code == "not_found":
            place = f"asked at {job.fetch_base}"
            return f"not_found: {job.error_message}; {place}: if it is of another family, track it with its endpoint"
        case "failed" | "expired":
            look = look_of(connection, job.id) if job.status == "expired" else None
            again = "" if look is None else f"; it is asked about once more at {look.due_at:%Y-%m-%d %H:%M} UTC"
            return f"{job.error_code}: {job.error_message}{again}"
        case "cancelled":
            return "it was cancelled"
        case "downloading":
            promise = promise_row(connection, job.id)
            code = None if promise is None else promise.end_code
            tried = f"it ends as {code} unless a promised link brings an output; " if code is not None else ""
            return tried + _why_downloading(job, outputs, now)
    if job.held_at is not None:
        return f"{BY_OPERATOR} since {job.held_at:%Y-%m-%d %H:%M:%S} UTC; it costs the job nothing, `resume` lets it go"
    known = all_breakers(connection)
    state = _account(job.account, known, {job.account: job.due_at}, settings, now)
    if state.reason is not None:
        until = f", tried again at {state.until:%H:%M:%S} UTC" if state.until else ""
        return f"held: {state.reason}{until}; it costs the job nothing"
    host = known.get(("host", job.fetch_host))
    if host is not None and host.held(now):
        costs = "it ends by its deadline" if (host.why or "").startswith(NOT_LISTED) else "it costs the job nothing"
        return f"held: {host.name} {host.why}; {costs}"
    said = parse_history(job.last_answer)
    last = f"; last answer: {mask_personal_data(said[0].note)}" if said else ""
    if job.claim_token is not None and job.due_at < now:
        return f"{job.claim_holder} took it, and its lease is over: no worker has taken it up since{last}"
    if job.claim_token is not None and job.asked_at is not None and now - job.asked_at > work_limits(settings).poll_max:
        took = (now - job.asked_at).total_seconds()
        return (
            f"{job.claim_holder} took it {took:.0f} s ago, longer than any request takes: `resume` has it go on{last}"
        )
    if job.claim_token is not None:
        return f"it is being asked about, by {job.claim_holder}{last}"
    believed = belief(connection, job)
    thought = f"; {_in_words(believed)}" if believed is not None and settings.poll_policy == "learned" else ""
    if job.due_at > now:
        return f"waiting for its next poll in {(job.due_at - now).total_seconds():.0f} s{thought}{last}"
    return (
        f"due since {(now - job.due_at).total_seconds():.0f} s: no worker has asked yet, or the budget is short{last}"
    )


def _why_downloading(job: Row[Any], outputs: Sequence[Row[Any]], now: datetime) -> str:
    waiting = [output for output in outputs if output.status == "pending"]
    stored = sum(output.status == "stored" for output in outputs)
    said = f"{stored} of {len(outputs)} outputs are stored"
    if job.due_at is not None:
        said += "; the API is asked for a fresh link"
    for output in waiting:
        if output.claim_token is not None:
            said += f"; output {output.position} is being downloaded"
        elif output.error_code is not None:
            wait = max(0.0, (output.due_at - now).total_seconds())
            said += f"; output {output.position}: {output.error_code} ({output.error_message}), again in {wait:.0f} s"
        else:
            said += f"; output {output.position} is waiting for a download process"
    return said
