"""Reads the live snapshot of `worker.operations.snapshot`.

Each snapshot takes one short transaction of bounded queries and one read from Redis after it. Rates are differences
between two snapshots: a reader keeps samples of the last minute.
"""

import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, Row

from worker.coordination.rate_limiter import BudgetStatus, RateLimiter
from worker.core.circuit_breaker import CircuitBreaker, Scope
from worker.core.histograms import DELAYS, quantile
from worker.core.identity import can_be_asked
from worker.core.lifecycle import OutputFacts, address_index
from worker.core.redaction.masking import link_host, mask_personal_data
from worker.operations.overview import (
    AccountState,
    account_states,
    held_hosts,
    lost_claims,
    no_key,
    overdue_jobs,
    workers_poll,
)
from worker.operations.snapshot import (
    NO_WORKER,
    AccountNow,
    Counted,
    Failure,
    KindNow,
    LateJob,
    LateWebhook,
    LostClaimNow,
    OverdueJob,
    Snapshot,
    Transfer,
    UnstoredByHost,
)
from worker.settings import Settings
from worker.store.breakers import all_breakers, last_asked
from worker.store.claims import claim_holders
from worker.store.counters import ANSWERS, DELAY, POLLED, CounterKey, Total, read_counters
from worker.store.due_groups import due_groups
from worker.store.engine import database_now, translate_errors
from worker.store.jobs import waiting_accounts
from worker.store.reports import snapshot_rows
from worker.system.process_identity import dead_holders

WINDOW_SECONDS = 60.0  # for delays and polls per job
RATE_SECONDS = 10.0  # for requests per second
OVER_SECONDS = 5.0  # a running worker claims the work of an ended lease sooner
LATE_SECONDS = 1.0  # work that is due for less is not late yet
LATE_EVENT_SECONDS = 60.0
MAX_LATE_JOBS = 20
MAX_TRANSFERS = 100
MAX_UNSTORED = 1_000
MAX_EVENTS = 500
MAX_FAILURES = 20


@dataclass(frozen=True, slots=True)
class _Sample:
    """The values of a snapshot that rates are computed from."""

    at: float
    counters: Mapping[CounterKey, Total]
    received: Mapping[tuple[int, int], int]


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows that the transaction of a snapshot reads."""

    now: datetime
    breakers: Mapping[tuple[Scope, str], CircuitBreaker]
    account_states: Sequence[AccountState]
    last_request_at: datetime | None
    asking: int
    dead_holders: Collection[str]
    jobs: Mapping[str, int]
    late: Sequence[Row[Any]]
    late_count: int
    overdue: Sequence[Row[Any]]
    claims: Sequence[snapshot_rows.StaleClaim]
    transfers: Sequence[Row[Any]]
    unstored: Sequence[Row[Any]]
    events: Sequence[Row[Any]]
    unannounced: Sequence[Row[Any]]
    failures: Sequence[Row[Any]]
    counters: Sequence[Total]


def _read_rows(connection: Connection, settings: Settings) -> _Rows:
    now = database_now(connection)
    breakers = all_breakers(connection)
    groups = due_groups(connection, waiting_accounts(connection))
    dead_names = dead_holders(claim_holders(connection))
    late = now - timedelta(seconds=LATE_SECONDS)
    jobs = snapshot_rows.count_jobs(connection)
    return _Rows(
        now=now,
        breakers=breakers,
        account_states=account_states(breakers, groups, settings, now),
        last_request_at=last_asked(connection),
        asking=snapshot_rows.count_running_polls(connection, now=now),
        dead_holders=dead_names,
        jobs=jobs,
        late=snapshot_rows.longest_due(connection, groups, before=late, limit=MAX_LATE_JOBS),
        late_count=snapshot_rows.count_late(connection, groups, before=late),
        overdue=overdue_jobs(connection, jobs["pending"], now, limit=MAX_LATE_JOBS) or (),
        claims=lost_claims(connection, settings, now, grace=OVER_SECONDS, dead=dead_names),
        transfers=snapshot_rows.running_downloads(connection, now=now, limit=MAX_TRANSFERS),
        unstored=snapshot_rows.oldest_unstored(connection, limit=MAX_UNSTORED),
        events=snapshot_rows.pending_events(connection, limit=MAX_EVENTS),
        unannounced=snapshot_rows.jobs_without_event(
            connection, before=now - timedelta(seconds=LATE_EVENT_SECONDS), limit=MAX_EVENTS
        ),
        failures=snapshot_rows.last_failures(connection, limit=MAX_FAILURES),
        counters=read_counters(connection, (ANSWERS, DELAY, POLLED)),
    )


class SnapshotReader:
    """Reads snapshots, and keeps samples of the last minute to compute rates."""

    def __init__(self, engine: Engine, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._settings = settings
        self._clock = clock
        self._limiter = RateLimiter(settings.redis)
        self._samples: deque[_Sample] = deque()

    def read(self) -> Snapshot:
        """Read a snapshot. Raises the errors of `worker.store.engine.translate_errors`."""
        with translate_errors(self._settings.database), self._engine.connect() as connection:
            rows = _read_rows(connection, self._settings)
        # After the transaction: no network call inside it.
        peeks = self._limiter.peek({state.account: state.rps for state in rows.account_states})
        sample = _Sample(self._clock(), {total.key: total for total in rows.counters}, _received(rows.transfers))
        snapshot = self._snapshot(rows, peeks, sample)
        self._samples.append(sample)
        return snapshot

    def _snapshot(self, rows: "_Rows", peeks: Mapping[str, BudgetStatus], sample: _Sample) -> Snapshot:
        now, before = rows.now, self._previous(sample)
        kinds, kinds_seconds = self._kinds(sample)
        return Snapshot(
            at=now,
            asked_seconds=None if rows.last_request_at is None else _seconds(now - rows.last_request_at),
            asking=rows.asking,
            budget_known=bool(peeks) or not rows.account_states,
            jobs=[_count(state, count) for state, count in rows.jobs.items()],
            accounts=[
                self._account(state, rows.breakers, peeks.get(state.account), sample) for state in rows.account_states
            ],
            hosts=[replace(host, reason=mask_personal_data(host.reason)) for host in held_hosts(rows.breakers, now)],
            late=[_late_job(row, rows) for row in rows.late],
            late_count=_count("late", rows.late_count),
            overdue=[
                OverdueJob(row.id, row.account, row.kind, _seconds(now - row.deadline_at), _seconds(row.due_at - now))
                for row in rows.overdue
            ],
            claims=[_lost(claim, rows.dead_holders, now) for claim in rows.claims],
            transfers=[_transfer(row, sample, before, now) for row in rows.transfers],
            unstored=_unstored(rows.unstored, now),
            unstored_more=len(rows.unstored) == MAX_UNSTORED,
            webhooks=_webhooks(rows.events, rows.unannounced, now),
            failures=[
                Failure(row.id, row.account, row.kind, row.status, row.error_code, row.completed_at)
                for row in rows.failures
            ],
            kinds=kinds,
            kinds_seconds=kinds_seconds,
        )

    def _previous(self, sample: _Sample) -> _Sample | None:
        while self._samples and sample.at - self._samples[0].at > WINDOW_SECONDS:
            self._samples.popleft()
        return self._samples[-1] if self._samples else None

    def _account(
        self,
        state: AccountState,
        breakers: Mapping[tuple[Scope, str], CircuitBreaker],
        peek: BudgetStatus | None,
        sample: _Sample,
    ) -> AccountNow:
        first = next((earlier for earlier in self._samples if sample.at - earlier.at <= RATE_SECONDS), None)
        if first is None:
            used = None if peek is None else peek.accepted
        else:
            requests = sum(
                times for key, (times, _) in _growth(first, sample, ANSWERS).items() if key.account == state.account
            )
            used = requests / max(sample.at - first.at, 1e-3)
        breaker = breakers.get(("account", state.account))
        return AccountNow(
            account=state.account,
            used=None if used is None else round(used, 2),
            rps=state.rps,
            ceiling=None if breaker is None or breaker.ceiling is None else round(breaker.ceiling, 2),
            left=None if peek is None else peek.available,
            reason=state.reason,
            since=state.since,
            until=state.until,
        )

    def _kinds(self, sample: _Sample) -> tuple[list[KindNow], float | None]:
        """Return the kinds since the oldest sample; for all time if no job became ready since then."""
        if self._samples:
            kinds = _kinds(_growth(self._samples[0], sample, DELAY), _growth(self._samples[0], sample, POLLED))
            if kinds:
                return kinds, round(sample.at - self._samples[0].at, 1)
        zero = _Sample(0.0, {}, {})
        return _kinds(_growth(zero, sample, DELAY), _growth(zero, sample, POLLED)), None


def _seconds(span: timedelta) -> float:
    return round(span.total_seconds(), 1)


def _count(state: str, count: int) -> Counted:
    return Counted(state, min(count, snapshot_rows.COUNTED_MOST), count > snapshot_rows.COUNTED_MOST)


def _late_job(job: Row[Any], rows: _Rows) -> LateJob:
    past = (rows.now - job.deadline_at).total_seconds()
    return LateJob(
        id=job.id,
        account=job.account,
        kind=job.kind,
        late_seconds=_seconds(rows.now - job.due_at),
        past_deadline_seconds=round(past, 1) if past > 0 else None,
        why=_why_late(job, rows),
    )


def _why_late(job: Row[Any], rows: _Rows) -> str:
    """Return why a due job was not polled."""
    account = next((state.reason for state in rows.account_states if state.account == job.account), None)
    if account is not None:
        return account if account == no_key(job.account) else f"held: {mask_personal_data(account)}"
    host = rows.breakers.get(("host", job.fetch_host))
    if host is not None and host.held(rows.now):
        return f"held: {host.name} {mask_personal_data(host.why or '')}"
    if job.claim_token is not None:
        liveness = "dead" if job.claim_holder in rows.dead_holders else "silent"
        return f"claimed by {job.claim_holder}, which is {liveness}"
    return "the rate limit is used up" if workers_poll(rows.last_request_at, rows.now) else NO_WORKER


def _lost(claim: snapshot_rows.StaleClaim, dead_holders: Collection[str], now: datetime) -> LostClaimNow:
    return LostClaimNow(claim.what, claim.id, claim.holder, claim.holder in dead_holders, _seconds(now - claim.until))


def _received(rows: Iterable[Row[Any]]) -> dict[tuple[int, int], int]:
    return {(row.id, row.attempts): row.received_bytes for row in rows if row.received_bytes is not None}


def _transfer(row: Row[Any], sample: _Sample, before: _Sample | None, now: datetime) -> Transfer:
    age = None if row.claimed_at is None else max(0.0, (now - row.claimed_at).total_seconds())
    return Transfer(
        output_id=row.id,
        job_id=row.job_id,
        host=attempt_host(row, renewable=can_be_asked(row.fetch_base, row.remote_id)),
        attempts=row.attempts,
        age_seconds=None if age is None else round(age, 1),
        bytes=row.received_bytes,
        bytes_per_second=_speed(row, sample, before, age),
        holder=row.claim_holder,
    )


def _speed(row: Row[Any], sample: _Sample, before: _Sample | None, age: float | None) -> float | None:
    """Return the bytes per second between two snapshots, or else of a first attempt, which began with no bytes."""
    attempt = (row.id, row.attempts)
    if before is not None and attempt in before.received and attempt in sample.received:
        received = sample.received[attempt] - before.received[attempt]
        return float(round(max(received, 0) / max(sample.at - before.at, 1e-3)))
    if row.attempts == 1 and age and row.received_bytes is not None:
        return float(round(row.received_bytes / age))
    return None


def attempt_host(row: Row[Any], *, renewable: bool) -> str:
    """Return the host of an output's current or next attempt: the host of its link or of a proxy link."""
    proxies = json.loads(row.proxy_urls)
    facts = OutputFacts(
        attempts=max(row.attempts, 1),
        proxies=len(proxies),
        ready_at=row.listed_at,
        dead_since=row.dead_since,
        renewed=row.renewed,
        dead_attempts=row.dead_attempts,
        renewable=renewable,
        last_code=row.error_code,
    )
    return link_host((row.url, *proxies)[address_index(facts)])


def _unstored(rows: Iterable[Row[Any]], now: datetime) -> list[UnstoredByHost]:
    """Group the outputs: groups with errors first, then by waiting time."""
    groups: dict[tuple[str | None, str], list[Row[Any]]] = defaultdict(list)
    for row in rows:
        host = "" if row.error_code in (None, "storage") else link_host(row.url)
        groups[row.error_code, host].append(row)
    unstored = [
        UnstoredByHost(
            code=code,
            host=host,
            job_id=min(group, key=lambda row: row.listed_at).job_id,
            count=len(group),
            oldest_seconds=_seconds(now - min(row.listed_at for row in group)),
            next_seconds=_seconds(min(row.due_at for row in group) - now),
            message=next((mask_personal_data(row.error_message) for row in group if row.error_message), None),
        )
        for (code, host), group in groups.items()
    ]
    return sorted(unstored, key=lambda outputs: (outputs.code is None, -outputs.oldest_seconds))


def _webhooks(events: Sequence[Row[Any]], unannounced: Sequence[Row[Any]], now: datetime) -> list[LateWebhook]:
    groups: dict[str, list[Row[Any]]] = defaultdict(list)
    for row in events:
        late = (now - row.due_at).total_seconds() > LATE_EVENT_SECONDS
        if late or row.error_message is not None:
            groups[link_host(row.url)].append(row)
    webhooks = [_webhook(receiver, rows, now) for receiver, rows in groups.items()]
    if unannounced:
        late_seconds = _seconds(now - unannounced[0].completed_at)
        webhooks.append(
            LateWebhook("(not created yet)", len(unannounced), late_seconds, 0, None, "no process creates these events")
        )
    return sorted(webhooks, key=lambda webhook: -webhook.late_seconds)


def _webhook(receiver: str, rows: Sequence[Row[Any]], now: datetime) -> LateWebhook:
    first = min(rows, key=lambda row: row.created_at)
    return LateWebhook(
        receiver=receiver,
        count=len(rows),
        late_seconds=_seconds(now - first.created_at),
        attempts=max(row.attempts for row in rows),
        http_status=first.http_status,
        message=None if first.error_message is None else mask_personal_data(first.error_message),
    )


def _growth(before: _Sample, after: _Sample, name: str) -> dict[CounterKey, tuple[int, float]]:
    """Return how often each counter of a name was counted between two samples, and the sum of its values."""
    grown = {}
    for key, total in after.counters.items():
        earlier = before.counters.get(key)
        times = total.times - (earlier.times if earlier else 0)
        if key.name == name and times > 0:
            grown[key] = (times, total.total - (earlier.total if earlier else 0.0))
    return grown


def _kinds(
    delays: Mapping[CounterKey, tuple[int, float]], polls: Mapping[CounterKey, tuple[int, float]]
) -> list[KindNow]:
    delay_counts: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for key, (times, _) in delays.items():
        delay_counts[key.account, key.kind][key.label] = times
    requests: dict[tuple[str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for key, (times, total) in polls.items():
        sums = requests[key.account, key.kind]
        requests[key.account, key.kind] = (sums[0] + times, sums[1] + total)
    kinds = [
        _kind(*account_kind, delay_counts.get(account_kind, {}), requests[account_kind])
        for account_kind in {*delay_counts, *requests}
    ]
    return sorted(kinds, key=lambda kind: (-kind.jobs, kind.account, kind.kind))


def _kind(account: str, kind: str, delays: Mapping[str, float], requests: tuple[int, float]) -> KindNow:
    p50, p95 = (quantile(delays, DELAYS, share) for share in (0.5, 0.95))
    return KindNow(
        account=account,
        kind=kind,
        jobs=requests[0] or int(sum(delays.values())),
        delay_p50=None if p50 is None else round(p50, 2),
        delay_p95=None if p95 is None else round(p95, 2),
        polls_per_job=round(requests[1] / requests[0], 2) if requests[0] else None,
    )
