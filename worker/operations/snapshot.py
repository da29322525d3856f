"""What goes on right now, for whoever watches: rates, holds, late work, downloads, troubles. Read anew for each frame.

A frame is one short transaction of bounded queries, and one look into Redis after it. What is a rate is the difference
between two frames; a reader keeps those of the last minute.
"""

import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, Row

from worker.coordination.rate_limiter import BudgetStatus, RateLimiter
from worker.core.circuit_breaker import CircuitBreaker, Scope
from worker.core.histograms import DELAYS, quantile
from worker.core.identity import can_be_asked
from worker.core.lifecycle import OutputFacts, address_index
from worker.core.redaction.masking import link_host, mask_personal_data
from worker.operations.overview import HEALTHY_SECONDS, AccountState, account_states, no_key
from worker.settings import Settings
from worker.store.breakers import all_breakers, last_asked
from worker.store.claims import claim_holders, due_groups
from worker.store.counters import ANSWERS, DELAY, POLLED, CounterKey, Total, read_counters
from worker.store.engine import database_now, translate_errors
from worker.store.holds import work_limits
from worker.store.jobs import waiting_accounts
from worker.store.reports import live
from worker.system.process_identity import dead_holders

NO_WORKER = "no worker asks"
WINDOW_SECONDS = 60.0  # over which delays and polls are told
RATE_SECONDS = 10.0  # over which requests per second are told
OVER_SECONDS = 5.0  # a claim that is over is taken up sooner, where anybody works
LATE_SECONDS = 1.0  # what is due for less is about to be asked about
LATE_EVENT_SECONDS = 60.0
SOON = timedelta(seconds=60)  # a job past its deadline that is asked sooner ends by itself
LATE_MOST = 20
TRANSFERS_MOST = 100
UNSTORED_MOST = 1_000
EVENTS_MOST = 500
FAILURES_MOST = 20


@dataclass(frozen=True, slots=True)
class Counted:
    """Jobs of a state; `more` where counting stopped at that number."""

    state: str
    count: int
    more: bool


@dataclass(frozen=True, slots=True)
class AccountNow:
    """An account: the requests per second that are made and may be made, and why and how long it is held, if it is.

    `used` is None where nothing can be told yet; `left` is how many requests could go out at once, None where Redis is
    away. `until` is when the hold ends or is tried again; None where that takes somebody.
    """

    account: str
    used: float | None
    rps: float
    ceiling: float | None
    left: int | None
    reason: str | None
    since: datetime | None
    until: datetime | None


@dataclass(frozen=True, slots=True)
class HeldHost:
    """A host of the API that nobody asks: why, since when, and when it is tried again."""

    host: str
    reason: str
    since: datetime | None
    until: datetime | None


@dataclass(frozen=True, slots=True)
class LateJob:
    """A job that is due and was not asked about: how late it is, and why; how long past its deadline, if it is."""

    id: int
    account: str
    kind: str
    late_seconds: float
    past_deadline_seconds: float | None
    why: str


@dataclass(frozen=True, slots=True)
class Overdue:
    """A job past its deadline that is not asked about soon, so that it does not end either."""

    id: int
    account: str
    kind: str
    past_deadline_seconds: float
    asked_in_seconds: float


@dataclass(frozen=True, slots=True)
class LostClaim:
    """Work that a process took and will not end: whose, whether that process is known to be dead, how long it is over.

    `over_seconds` is below zero while the lease still runs: its process is dead, or has it longer than any work takes.
    """

    what: str
    id: int
    holder: str
    dead: bool
    over_seconds: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """A download that is under way. `bytes` and `bytes_per_second` are None where they are not known (yet)."""

    output_id: int
    job_id: int
    host: str
    attempts: int
    age_seconds: float | None
    bytes: int | None
    bytes_per_second: float | None
    holder: str


@dataclass(frozen=True, slots=True)
class Unstored:
    """Outputs that are not stored yet, of one host and one kind of trouble (None: none so far).

    `next_seconds` is when the first of them is tried again; below zero where it is due and nobody took it.
    """

    code: str | None
    host: str
    job_id: int
    count: int
    oldest_seconds: float
    next_seconds: float
    message: str | None


@dataclass(frozen=True, slots=True)
class LateWebhook:
    """Events to one receiver that are late or were refused: how many, how late the first of them is, what it met."""

    receiver: str
    count: int
    late_seconds: float
    attempts: int
    http_status: int | None
    message: str | None


@dataclass(frozen=True, slots=True)
class Failure:
    """A job that failed or expired."""

    id: int
    account: str
    kind: str
    status: str
    code: str
    at: datetime


@dataclass(frozen=True, slots=True)
class KindNow:
    """Jobs of a kind that were found ready, or ended: the delay from ready to seen, and the requests each took."""

    account: str
    kind: str
    jobs: int
    delay_p50: float | None
    delay_p95: float | None
    polls_per_job: float | None


@dataclass(frozen=True, slots=True)
class Frame:
    """How everything stands at a moment. `kinds_seconds` is over how long `kinds` tells; None: since counting began.

    `asked_seconds` is how long ago the last request was made for due work; None where none ever was. `late` has the
    latest of `late_count` jobs. `overdue` is empty where more jobs wait than can be gone through in a moment.
    """

    at: datetime
    asked_seconds: float | None
    asking: int
    budget_known: bool
    jobs: Sequence[Counted]
    accounts: Sequence[AccountNow]
    hosts: Sequence[HeldHost]
    late: Sequence[LateJob]
    late_count: Counted
    overdue: Sequence[Overdue]
    claims: Sequence[LostClaim]
    transfers: Sequence[Transfer]
    unstored: Sequence[Unstored]
    unstored_more: bool
    webhooks: Sequence[LateWebhook]
    failures: Sequence[Failure]
    kinds: Sequence[KindNow]
    kinds_seconds: float | None


@dataclass(frozen=True, slots=True)
class _Sample:
    """What has to be known of a frame to tell what changed since."""

    at: float
    counters: Mapping[CounterKey, Total]
    received: Mapping[tuple[int, int], int]


@dataclass(frozen=True, slots=True)
class _Read:
    """What one transaction read."""

    now: datetime
    known: Mapping[tuple[Scope, str], CircuitBreaker]
    states: Sequence[AccountState]
    asked: datetime | None
    asking: int
    gone: Collection[str]
    jobs: Mapping[str, int]
    late: Sequence[Row[Any]]
    late_count: int
    overdue: Sequence[Row[Any]]
    claims: Sequence[live.StaleClaim]
    transfers: Sequence[Row[Any]]
    unstored: Sequence[Row[Any]]
    events: Sequence[Row[Any]]
    unannounced: Sequence[Row[Any]]
    failures: Sequence[Row[Any]]
    counters: Sequence[Total]


def _read(connection: Connection, settings: Settings) -> _Read:
    now = database_now(connection)
    known = all_breakers(connection)
    levels = due_groups(connection, waiting_accounts(connection))
    gone = dead_holders(claim_holders(connection))
    late, work = now - timedelta(seconds=LATE_SECONDS), work_limits(settings)
    jobs = live.count_jobs(connection)
    return _Read(
        now=now,
        known=known,
        states=account_states(known, levels, settings, now),
        asked=last_asked(connection),
        asking=live.count_running_polls(connection, now=now),
        gone=gone,
        jobs=jobs,
        late=live.longest_due(connection, levels, before=late, limit=LATE_MOST),
        late_count=live.count_late(connection, levels, before=late),
        overdue=live.jobs_past_deadline(connection, now=now, later=now + SOON, limit=LATE_MOST)
        if jobs["pending"] <= live.COUNTED_MOST
        else (),
        claims=live.stale_claims(
            connection,
            dead=gone,
            expired_before=now - timedelta(seconds=OVER_SECONDS),
            polled_before=now - work.poll_max,
            claimed_before=now - work.download_max,
        ),
        transfers=live.running_downloads(connection, now=now, limit=TRANSFERS_MOST),
        unstored=live.oldest_unstored(connection, limit=UNSTORED_MOST),
        events=live.pending_events(connection, limit=EVENTS_MOST),
        unannounced=live.jobs_without_event(
            connection, before=now - timedelta(seconds=LATE_EVENT_SECONDS), limit=EVENTS_MOST
        ),
        failures=live.last_failures(connection, limit=FAILURES_MOST),
        counters=read_counters(connection, (ANSWERS, DELAY, POLLED)),
    )


def _working(read: _Read) -> bool:
    return read.asked is not None and read.now - read.asked <= timedelta(seconds=HEALTHY_SECONDS)


class SnapshotReader:
    """Reads frame after frame, and knows what the last ones were."""

    def __init__(self, engine: Engine, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._settings = settings
        self._clock = clock
        self._budget = RateLimiter(settings.redis)
        self._samples: deque[_Sample] = deque()

    def frame(self) -> Frame:
        """Return the present state. Raises what `worker.store.engine.translate_errors` raises."""
        with translate_errors(self._settings.database), self._engine.connect() as connection:
            read = _read(connection, self._settings)
        # Redis is looked into after the transaction: no network inside of one.
        peeks = self._budget.peek({state.account: state.rps for state in read.states})
        sample = _Sample(self._clock(), {one.key: one for one in read.counters}, _received(read.transfers))
        frame = self._frame(read, peeks, sample)
        self._samples.append(sample)
        return frame

    def _frame(self, read: "_Read", peeks: Mapping[str, BudgetStatus], sample: _Sample) -> Frame:
        now, before = read.now, self._before(sample)
        why = _Why(read.known, {state.account: state for state in read.states}, read.gone, _working(read), now)
        kinds, kinds_seconds = self._kinds(sample)
        return Frame(
            at=now,
            asked_seconds=None if read.asked is None else _seconds(now - read.asked),
            asking=read.asking,
            budget_known=bool(peeks) or not read.states,
            jobs=_counted(read.jobs),
            accounts=[self._account(state, read.known, peeks.get(state.account), sample) for state in read.states],
            hosts=_held_hosts(read.known, now),
            late=[why.late(row) for row in read.late],
            late_count=_count("late", read.late_count),
            overdue=[
                Overdue(row.id, row.account, row.kind, _seconds(now - row.deadline_at), _seconds(row.due_at - now))
                for row in read.overdue
            ],
            claims=[_lost(claim, read.gone, now) for claim in read.claims],
            transfers=[_transfer(row, sample, before, now) for row in read.transfers],
            unstored=_unstored(read.unstored, now),
            unstored_more=len(read.unstored) == UNSTORED_MOST,
            webhooks=_webhooks(read.events, read.unannounced, now),
            failures=[
                Failure(row.id, row.account, row.kind, row.status, row.error_code, row.completed_at)
                for row in read.failures
            ],
            kinds=kinds,
            kinds_seconds=kinds_seconds,
        )

    def _before(self, sample: _Sample) -> _Sample | None:
        while self._samples and sample.at - self._samples[0].at > WINDOW_SECONDS:
            self._samples.popleft()
        return self._samples[-1] if self._samples else None

    def _account(
        self,
        state: AccountState,
        known: Mapping[tuple[Scope, str], CircuitBreaker],
        peek: BudgetStatus | None,
        sample: _Sample,
    ) -> AccountNow:
        first = next((one for one in self._samples if sample.at - one.at <= RATE_SECONDS), None)
        if first is None:
            used = None if peek is None else peek.taken
        else:
            made = sum(
                times
                for figure, (times, _) in _grown(first, sample, ANSWERS).items()
                if figure.account == state.account
            )
            used = made / max(sample.at - first.at, 1e-3)
        breaker = known.get(("account", state.account))
        return AccountNow(
            account=state.account,
            used=None if used is None else round(used, 2),
            rps=state.rps,
            ceiling=None if breaker is None or breaker.ceiling is None else round(breaker.ceiling, 2),
            left=None if peek is None else peek.left,
            reason=state.reason,
            since=state.since,
            until=state.until,
        )

    def _kinds(self, sample: _Sample) -> tuple[list[KindNow], float | None]:
        """Of the frames that are remembered where anything was found ready since the first of them; else of all."""
        if self._samples:
            kinds = _kinds(_grown(self._samples[0], sample, DELAY), _grown(self._samples[0], sample, POLLED))
            if kinds:
                return kinds, round(sample.at - self._samples[0].at, 1)
        nothing = _Sample(0.0, {}, {})
        return _kinds(_grown(nothing, sample, DELAY), _grown(nothing, sample, POLLED)), None


def _seconds(span: timedelta) -> float:
    return round(span.total_seconds(), 1)


def _counted(found: Mapping[str, int]) -> list[Counted]:
    return [_count(state, count) for state, count in found.items()]


def _count(state: str, count: int) -> Counted:
    return Counted(state, min(count, live.COUNTED_MOST), count > live.COUNTED_MOST)


def _held_hosts(known: Mapping[tuple[Scope, str], CircuitBreaker], now: datetime) -> list[HeldHost]:
    held = (breaker for (scope, _), breaker in sorted(known.items()) if scope == "host" and breaker.held(now))
    return [
        HeldHost(
            breaker.name,
            mask_personal_data(breaker.why or ""),
            breaker.paused_at or breaker.since,
            None if breaker.paused_at else breaker.until or breaker.probe_at,
        )
        for breaker in held
    ]


@dataclass(frozen=True, slots=True)
class _Why:
    """What there is to know of why a job that is due was not asked about."""

    known: Mapping[tuple[Scope, str], CircuitBreaker]
    accounts: Mapping[str, AccountState]
    gone: Collection[str]
    working: bool
    now: datetime

    def late(self, job: Row[Any]) -> LateJob:
        past = (self.now - job.deadline_at).total_seconds()
        return LateJob(
            id=job.id,
            account=job.account,
            kind=job.kind,
            late_seconds=_seconds(self.now - job.due_at),
            past_deadline_seconds=round(past, 1) if past > 0 else None,
            why=self._why(job),
        )

    def _why(self, job: Row[Any]) -> str:
        state = self.accounts.get(job.account)
        host = self.known.get(("host", job.fetch_host))
        if state is not None and state.reason is not None:
            return f"held: {mask_personal_data(state.reason)}" if state.reason != no_key(job.account) else state.reason
        if host is not None and host.held(self.now):
            return f"held: {host.name} {mask_personal_data(host.why or '')}"
        if job.claim_token is not None:
            return f"claimed by {job.claim_holder}, which is {'dead' if job.claim_holder in self.gone else 'silent'}"
        return "the budget is short" if self.working else NO_WORKER


def _lost(claim: live.StaleClaim, gone: Collection[str], now: datetime) -> LostClaim:
    return LostClaim(claim.what, claim.id, claim.holder, claim.holder in gone, _seconds(now - claim.until))


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
    """Between two frames; before that only of a first attempt, which surely began with nothing."""
    attempt = (row.id, row.attempts)
    if before is not None and attempt in before.received and attempt in sample.received:
        grown = sample.received[attempt] - before.received[attempt]
        return float(round(max(grown, 0) / max(sample.at - before.at, 1e-3)))
    if row.attempts == 1 and age and row.received_bytes is not None:
        return float(round(row.received_bytes / age))
    return None


def attempt_host(row: Row[Any], *, renewable: bool) -> str:
    """The host that an output's present or next attempt goes to: of its link, or of one of its proxy links."""
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


def _unstored(rows: Iterable[Row[Any]], now: datetime) -> list[Unstored]:
    """Those in trouble first, then those that wait longest."""
    groups: dict[tuple[str | None, str], list[Row[Any]]] = defaultdict(list)
    for row in rows:
        host = "" if row.error_code in (None, "storage") else link_host(row.url)
        groups[row.error_code, host].append(row)
    found = [
        Unstored(
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
    return sorted(found, key=lambda one: (one.code is None, -one.oldest_seconds))


def _webhooks(events: Sequence[Row[Any]], unannounced: Sequence[Row[Any]], now: datetime) -> list[LateWebhook]:
    groups: dict[str, list[Row[Any]]] = defaultdict(list)
    for row in events:
        late = (now - row.due_at).total_seconds() > LATE_EVENT_SECONDS
        if late or row.error_message is not None:
            groups[link_host(row.url)].append(row)
    found = [_webhook(receiver, rows, now) for receiver, rows in groups.items()]
    if unannounced:
        late_seconds = _seconds(now - unannounced[0].completed_at)
        found.append(
            LateWebhook("(not made yet)", len(unannounced), late_seconds, 0, None, "nobody makes these events")
        )
    return sorted(found, key=lambda one: -one.late_seconds)


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


def _grown(before: _Sample, after: _Sample, name: str) -> dict[CounterKey, tuple[int, float]]:
    """What was counted under a name between two frames: how often, and the sum."""
    found = {}
    for figure, total in after.counters.items():
        old = before.counters.get(figure)
        times = total.times - (old.times if old else 0)
        if figure.name == name and times > 0:
            found[figure] = (times, total.total - (old.total if old else 0.0))
    return found


def _kinds(
    delays: Mapping[CounterKey, tuple[int, float]], polls: Mapping[CounterKey, tuple[int, float]]
) -> list[KindNow]:
    seen: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for figure, (times, _) in delays.items():
        seen[figure.account, figure.kind][figure.label] = times
    asked: dict[tuple[str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for figure, (times, total) in polls.items():
        known = asked[figure.account, figure.kind]
        asked[figure.account, figure.kind] = (known[0] + times, known[1] + total)
    found = [_kind(one, seen.get(one, {}), asked[one]) for one in {*seen, *asked}]
    return sorted(found, key=lambda one: (-one.jobs, one.account, one.kind))


def _kind(one: tuple[str, str], seen: Mapping[str, float], asked: tuple[int, float]) -> KindNow:
    p50, p95 = (quantile(seen, DELAYS, share) for share in (0.5, 0.95))
    return KindNow(
        account=one[0],
        kind=one[1],
        jobs=asked[0] or int(sum(seen.values())),
        delay_p50=None if p50 is None else round(p50, 2),
        delay_p95=None if p95 is None else round(p95, 2),
        polls_per_job=round(asked[1] / asked[0], 2) if asked[0] else None,
    )
