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
from worker.core.histograms import DELAYS, quantile
from worker.core.identity import can_be_asked
from worker.core.lifecycle import OutputFacts, address_index
from worker.core.redaction.masking import link_host, mask_personal_data
from worker.operations.lost_work import lost_claims
from worker.operations.snapshot import (
    NO_WORKER,
    AccountNow,
    Counted,
    Failure,
    KindNow,
    LateJob,
    LostClaimNow,
    OverdueJob,
    Snapshot,
    Transfer,
)
from worker.operations.troubles import Evidence, Trouble, read_evidence, read_troubles
from worker.settings import Settings
from worker.store.counters import ANSWERS, DELAY, POLLED, CounterKey, Total, read_counters
from worker.store.engine import translate_errors
from worker.store.reports import snapshot_rows
from worker.store.reports.order_state import OrderState
from worker.store.reports.work_state import AccountState, WorkState, no_key

WINDOW_SECONDS = 60.0  # for delays and polls per job
RATE_SECONDS = 10.0  # for requests per second
LATE_SECONDS = 1.0  # work that is due for less is not late yet
MAX_LATE_JOBS = 20
MAX_TRANSFERS = 100
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

    evidence: Evidence
    troubles: Sequence[Trouble]
    asking: int
    jobs: Mapping[str, int]
    late: Sequence[Row[Any]]
    late_count: int
    claims: Sequence[snapshot_rows.StaleClaim]
    transfers: Sequence[Row[Any]]
    failures: Sequence[Row[Any]]
    counters: Sequence[Total]

    @property
    def work(self) -> WorkState:
        """The state of accounts, hosts, processes and due work."""
        return self.evidence.work

    @property
    def now(self) -> datetime:
        """The time of the snapshot."""
        return self.work.now


def _read_rows(connection: Connection, settings: Settings) -> _Rows:
    evidence = read_evidence(connection, settings)
    now, groups = evidence.work.now, evidence.work.groups
    late = now - timedelta(seconds=LATE_SECONDS)
    return _Rows(
        evidence=evidence,
        troubles=read_troubles(connection, settings, evidence),
        asking=snapshot_rows.count_running_polls(connection, now=now),
        jobs=snapshot_rows.count_jobs(connection),
        late=snapshot_rows.longest_due(connection, groups, before=late, limit=MAX_LATE_JOBS),
        late_count=snapshot_rows.count_late(connection, groups, before=late),
        claims=lost_claims(connection, settings, now, dead=evidence.dead_holders),
        transfers=snapshot_rows.running_downloads(connection, now=now, limit=MAX_TRANSFERS),
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
        rates = {state.account: state.rps for state in rows.work.accounts}
        peeks = self._limiter.peek(rates or {"default": 1.0})
        sample = _Sample(self._clock(), {total.key: total for total in rows.counters}, _received(rows.transfers))
        snapshot = self._snapshot(rows, peeks, sample)
        self._samples.append(sample)
        return snapshot

    def _snapshot(self, rows: "_Rows", peeks: Mapping[str, BudgetStatus], sample: _Sample) -> Snapshot:
        now, before = rows.now, self._previous(sample)
        kinds, kinds_seconds = self._kinds(sample)
        return Snapshot(
            at=now,
            asked_seconds=None if rows.work.last_request_at is None else _seconds(now - rows.work.last_request_at),
            asking=rows.asking + sum(orders.sending for orders in rows.work.orders.accounts.values()),
            budget_known=bool(peeks),
            troubles=rows.troubles,
            jobs=[_count(state, count) for state, count in rows.jobs.items()],
            accounts=[
                self._account(state, rows.work.orders, peeks.get(state.account), sample)
                for state in rows.work.shown_accounts
            ],
            hosts=[replace(host, reason=mask_personal_data(host.reason)) for host in rows.work.hosts],
            late=[_late_job(row, rows) for row in rows.late],
            late_count=_count("late", rows.late_count),
            overdue=[overdue_now(row, now) for row in rows.evidence.overdue[:MAX_LATE_JOBS]],
            claims=[lost_now(claim, rows.evidence.dead_holders, now) for claim in rows.claims],
            transfers=[_transfer(row, sample, before, now) for row in rows.transfers],
            unstored=rows.evidence.unstored.groups,
            unstored_more=rows.evidence.unstored.more,
            webhooks=rows.evidence.webhooks,
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
        order_state: OrderState,
        peek: BudgetStatus | None,
        sample: _Sample,
    ) -> AccountNow:
        orders = order_state.of(state.account, self._settings.slots(state.account))
        first = next((earlier for earlier in self._samples if sample.at - earlier.at <= RATE_SECONDS), None)
        if first is None:
            used = None if peek is None else peek.accepted
        else:
            requests = sum(
                times for key, (times, _) in _growth(first, sample, ANSWERS).items() if key.account == state.account
            )
            used = requests / max(sample.at - first.at, 1e-3)
        return AccountNow(
            account=state.account,
            used=None if used is None else round(used, 2),
            rps=state.rps,
            ceiling=None if state.ceiling is None else round(state.ceiling, 2),
            left=None if peek is None else peek.available,
            ordered=orders.ordered,
            uncertain=orders.uncertain,
            slots_taken=orders.taken,
            slots=orders.slots,
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
    account = next((state.reason for state in rows.work.accounts if state.account == job.account), None)
    if account is not None:
        return account if account == no_key(job.account) else f"held: {mask_personal_data(account)}"
    host = rows.work.breakers.get(("host", job.fetch_host))
    if host is not None and host.held(rows.now):
        return f"held: {host.name} {mask_personal_data(host.why or '')}"
    if job.claim_token is not None:
        liveness = "dead" if job.claim_holder in rows.evidence.dead_holders else "silent"
        return f"claimed by {job.claim_holder}, which is {liveness}"
    return "the rate limit is used up" if rows.work.workers_poll else NO_WORKER


def lost_now(claim: snapshot_rows.StaleClaim, dead_holders: Collection[str], now: datetime) -> LostClaimNow:
    """Return a lost claim as it is shown."""
    return LostClaimNow(claim.what, claim.id, claim.holder, claim.holder in dead_holders, _seconds(now - claim.until))


def overdue_now(row: Row[Any], now: datetime) -> OverdueJob:
    """Return a job past its deadline as it is shown."""
    return OverdueJob(row.id, row.account, row.kind, _seconds(now - row.deadline_at), _seconds(row.due_at - now))


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
