"""What operators ask: how everything stands, and why one job is where it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row

from worker.core.gate import Gate, Scope
from worker.core.lifecycle import JOB_STATES
from worker.database import database_now
from worker.settings import Settings
from worker.store.claims import waiting_levels
from worker.store.gates import all_gates, last_asked
from worker.store.jobs import counts, waiting_accounts

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
class Overview:
    """How everything stands. `oldest_due_seconds` counts work that could be done now; 0 where there is none."""

    jobs: Mapping[str, int]
    accounts: Sequence[AccountState]
    oldest_due_seconds: float
    healthy: bool


def overview(connection: Connection, settings: Settings) -> Overview:
    """The state of all jobs and accounts."""
    now = database_now(connection)
    known = all_gates(connection)
    levels = waiting_levels(connection, waiting_accounts(connection))
    waiting = {level.account: level.due_at for level in sorted(levels, key=lambda level: level.due_at, reverse=True)}
    names = sorted({*waiting, *settings.keys, *(name for scope, name in known if scope == "account")})
    accounts = [_account(name, known, waiting, settings, now) for name in names]
    free = [state.account for state in accounts if state.reason is None]
    shut = [gate.name for gate in known.values() if gate.scope == "host" and gate.held(now)]
    since = [
        level.due_at for level in levels if level.due_at <= now and level.account in free and level.host not in shut
    ]
    oldest = max(0.0, (now - min(since)).total_seconds()) if since else 0.0
    asked = last_asked(connection)
    working = asked is not None and now - asked <= timedelta(seconds=HEALTHY_SECONDS)
    found = counts(connection)
    return Overview(
        jobs={state: found.get(state, 0) for state in JOB_STATES},
        accounts=accounts,
        oldest_due_seconds=round(oldest, 3),
        healthy=oldest <= HEALTHY_SECONDS or working,
    )


def _account(
    name: str,
    known: Mapping[tuple[Scope, str], Gate],
    waiting: Mapping[str, datetime],
    settings: Settings,
    now: datetime,
) -> AccountState:
    gate = known.get(("account", name), Gate("account", name))
    host = known.get(("host", settings.api_host))
    rps = round(gate.rate(settings.sd_api_rps, now), 2)
    if gate.held(now):
        return AccountState(name, gate.reason, gate.since, gate.until or gate.probe_at, rps)
    if name not in settings.keys and not gate.proven and name in waiting:
        return AccountState(name, no_key(name), waiting[name], None, rps)
    if host is not None and host.held(now):
        return AccountState(name, f"{host.name} {host.reason}", host.since, host.until or host.probe_at, rps)
    return AccountState(name, None, None, None, rps)


def no_key(account: str) -> str:
    """Why an account's jobs are held that has no key."""
    return f"no key for account {account}"


def why(connection: Connection, job: Row[Any], outputs: Sequence[Row[Any]], settings: Settings) -> str:
    """Why a job is where it is, in a sentence or two."""
    now = database_now(connection)
    match job.status:
        case "completed":
            return f"all {len(outputs)} outputs are stored"
        case "failed" | "expired":
            return f"{job.error_code}: {job.error_message}"
        case "cancelled":
            return "it was cancelled"
        case "downloading":
            return _why_downloading(job, outputs, now)
    known = all_gates(connection)
    state = _account(job.account, known, {job.account: job.due_at}, settings, now)
    if state.reason is not None:
        until = f", tried again at {state.until:%H:%M:%S} UTC" if state.until else ""
        return f"held: {state.reason}{until}; it costs the job nothing"
    host = known.get(("host", job.fetch_host))
    if host is not None and host.held(now):
        return f"held: {host.name} {host.reason}; it costs the job nothing"
    last = f"; last answer: {job.last_answer}" if job.last_answer else ""
    if job.claim_token is not None:
        return f"it is being asked about, by {job.claim_holder}{last}"
    if job.due_at > now:
        return f"waiting for its next poll in {(job.due_at - now).total_seconds():.0f} s{last}"
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
