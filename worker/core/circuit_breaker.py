"""Circuit breakers of accounts and API hosts: whether requests are allowed (all, a single probe, or none).

After HTTP 429 the account's breaker has the pause and the learned rate (`after_rate_limit`, `with_learned_rate`). The
formula of the rate is in `worker.core.learned_rate`. `worker.coordination.rate_limiter` shares it between processes in
Redis.

A breaker that lets no requests through, or only a probe, is called held. A rejected key, missing credits or an
exhausted plan hold the account. A host that does not answer is held as well. A rate limit holds the account for a known
time. Jobs behind a held breaker stay pending and are not polled. A single probe after 10, 20, 40 and then every 60
seconds checks whether the hold can end.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from worker.core.learned_rate import current_rate, learned_ceiling
from worker.core.reply import AccountRefused, ApiDown, RateLimited, Reply, Unread

Scope = Literal["account", "host"]
PROBE_WAITS = (10.0, 20.0, 40.0, 60.0)
UNDECIDED_WAIT = 1.0
FAILURES_TO_TRIP = 5  # in a row
BY_OPERATOR = "held by an operator"
REFUSALS = {"key": "key rejected", "credits": "no credits", "plan": "plan", "request": "request refused"}
NOT_LISTED = "not on SD_API_HOSTS"
NO_SUCH_PATH = "no such path"  # part of the reason of a hold: SD_API_URL is wrong, which affects all jobs of the host
HOLD_CLASSES = (*REFUSALS.values(), "rate limited", "unreachable", NOT_LISTED, "by hand", "other")


@dataclass(frozen=True, slots=True)
class CircuitBreaker:
    """The shared state of one account or host. `until` is set for holds that end at a known time.

    `proven` means that the API has accepted the key. `ceiling` is the number of requests per second that the API
    accepted at the last rate limit, and `cut_at` is the end of the pause after it. While `paused_at` is set, an
    operator holds the breaker, regardless of the other fields.
    """

    scope: Scope
    name: str
    proven: bool = False
    reason: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    probe_at: datetime | None = None
    probes: int = 0
    troubles: int = 0
    released_at: datetime | None = None
    ceiling: float | None = None
    cut_at: datetime | None = None
    paused_at: datetime | None = None

    @property
    def why(self) -> str | None:
        """The reason of the hold, or None. It names the operator or contains the message of the API."""
        return BY_OPERATOR if self.paused_at is not None else self.reason

    @property
    def held_since(self) -> datetime | None:
        """When the hold began."""
        return self.paused_at or self.since

    @property
    def is_unlisted(self) -> bool:
        """Whether this is the breaker of a host that is not on SD_API_HOSTS."""
        return (self.reason or "").startswith(NOT_LISTED)

    @property
    def tried_at(self) -> datetime | None:
        """When a hold ends or is probed. None if only an operator, or other settings, can end it."""
        return None if self.paused_at is not None or self.is_unlisted else self.until or self.probe_at

    def rate(self, configured: float, now: datetime) -> float:
        """Return the requests per second that are allowed now. `configured` is the limit in the settings."""
        age = 0.0 if self.cut_at is None else (now - self.cut_at).total_seconds()
        return current_rate(configured, self.ceiling, age)

    def held(self, now: datetime) -> bool:
        """Return whether the breaker is held at `now`."""
        if self.paused_at is not None:
            return True
        return self.reason is not None and (self.until is None or now < self.until)

    def allows(self, now: datetime) -> Literal["all", "probe", "none"]:
        """Return which requests are allowed. `probe` means a single request of a single process."""
        if self.paused_at is not None:
            return "none"
        if self.held(now):
            return "probe" if self.until is None and self.probe_at is not None and now >= self.probe_at else "none"
        if self.scope == "host" or self.proven:
            return "all"
        return "probe" if self.probe_at is None or now >= self.probe_at else "none"

    def last_hold_end(self, now: datetime) -> datetime | None:
        """Return when the last hold ended: `now` if it has not ended yet, None if there was no hold."""
        if self.held(now):
            return now
        return max((at for at in (self.released_at, self.until) if at is not None), default=None)


@dataclass(frozen=True, slots=True)
class BreakerInput:
    """One answer for a breaker: the reply, when the request was sent, and whether it was a probe."""

    reply: Reply
    sent_at: datetime
    probe: bool


@dataclass(frozen=True, slots=True)
class RateMeasurement:
    """Requests per second of an account: the limit in the settings, and the rate that the API accepted just now."""

    configured: float
    measured: float


def hold_class(why: str) -> str:
    """Return the class of a hold, which is the reason without the message of the API.

    >>> hold_class("key rejected: Invalid API key"), hold_class(BY_OPERATOR), hold_class("something new")
    ('key rejected', 'by hand', 'other')
    """
    word = "by hand" if why == BY_OPERATOR else why.partition(":")[0]
    return word if word in HOLD_CLASSES else "other"


def after_replies(
    breaker: CircuitBreaker, answers: Iterable[BreakerInput], rates: RateMeasurement, *, now: datetime
) -> CircuitBreaker:
    """Return the breaker after a batch of answers, in order."""
    for answer in answers:
        breaker = _after(breaker, answer, rates, now)
    return breaker


def _after(breaker: CircuitBreaker, answer: BreakerInput, rates: RateMeasurement, now: datetime) -> CircuitBreaker:
    if breaker.scope == "host":
        if isinstance(answer.reply, ApiDown) and answer.reply.no_such_path and answer.reply.answered:
            return _after_own_path(breaker, now) if answer.probe else breaker
        if isinstance(answer.reply, ApiDown):
            return after_failures(breaker, f"unreachable: {answer.reply.message}", 1, now=now, probe=answer.probe)
        return after_job_answer(breaker, now=now, probe=answer.probe)
    match answer.reply:
        case AccountRefused(reason, message):
            return after_refusal(breaker, f"{REFUSALS[reason]}: {message}", now=now, probe=answer.probe)
        case RateLimited(seconds, _):
            limited = after_rate_limit(breaker, seconds, now=now)
            return with_learned_rate(
                limited, configured=rates.configured, measured=rates.measured, sent_at=answer.sent_at
            )
        case ApiDown():  # says nothing about the key; the breaker of the host counts it
            return with_probe_postponed(breaker, now=now, wait=0.0) if answer.probe else breaker
        case Unread():
            return with_probe_postponed(breaker, now=now, wait=UNDECIDED_WAIT) if answer.probe else breaker
        case _:
            return after_job_answer(breaker, now=now, probe=answer.probe)


def _after_own_path(breaker: CircuitBreaker, now: datetime) -> CircuitBreaker:
    """Return the breaker of a host after a probe at the own path of one job, which does not exist.

    The host answered, so a hold for missing answers ends. The answer says nothing about the path in SD_API_URL: a hold
    because of that path stays, and the next probe is made on schedule.
    """
    if breaker.held(now) and breaker.reason is not None and NO_SUCH_PATH in breaker.reason:
        return _held(breaker, breaker.reason, now)
    return after_job_answer(breaker, now=now, probe=True)


def after_job_answer(breaker: CircuitBreaker, *, now: datetime, probe: bool) -> CircuitBreaker:
    """Return the breaker after an answer about a job. The key is proven now, and a hold ends if this was its probe."""
    settled = _settled(breaker, now)
    if settled.reason is not None and not probe and settled.scope == "account":
        return settled  # this request was sent before the hold began
    if settled.reason is not None and settled.until is not None:
        return settled  # a rate limit ends at its time
    if settled.reason is None and settled.proven and settled.troubles == 0:
        return settled
    released_at = now if settled.reason is not None else settled.released_at
    return CircuitBreaker(
        settled.scope,
        settled.name,
        proven=True,
        released_at=released_at,
        ceiling=settled.ceiling,
        cut_at=settled.cut_at,
        paused_at=settled.paused_at,
    )


def after_refusal(breaker: CircuitBreaker, reason: str, *, now: datetime, probe: bool) -> CircuitBreaker:
    """Return the breaker after the API refused the account. It is held until a probe is accepted."""
    settled = _settled(breaker, now)
    if settled.held(now) and settled.until is None and not probe:
        return settled  # this request was sent before the hold began
    return _held(settled, reason, now)


def after_rate_limit(breaker: CircuitBreaker, seconds: float, *, now: datetime) -> CircuitBreaker:
    """Return the breaker after a rate limit. It is held for `seconds`, or longer if it already was."""
    settled = _settled(breaker, now)
    if settled.held(now) and settled.until is None:
        return replace(settled, probe_at=max(settled.probe_at or now, now + timedelta(seconds=seconds)))
    until = max(settled.until or now, now + timedelta(seconds=seconds))
    return replace(settled, reason="rate limited", since=settled.since or now, until=until)


def with_learned_rate(
    breaker: CircuitBreaker, *, configured: float, measured: float, sent_at: datetime
) -> CircuitBreaker:
    """Return the breaker of an account with the ceiling that a rate limit revealed. The request was sent at `sent_at`.

    `measured` is the number of requests per second that the API accepted at that time. Requests that were sent before
    the pause began don't change the ceiling again.
    """
    pause_end = max(at for at in (breaker.until, breaker.cut_at, sent_at) if at is not None)
    if breaker.cut_at is not None and sent_at < breaker.cut_at:
        return replace(breaker, cut_at=pause_end)
    return replace(breaker, ceiling=learned_ceiling(breaker.rate(configured, sent_at), measured), cut_at=pause_end)


def after_failures(breaker: CircuitBreaker, reason: str, count: int, *, now: datetime, probe: bool) -> CircuitBreaker:
    """Return the breaker of a host after `count` more failures in a row. It trips at FAILURES_TO_TRIP."""
    settled = _settled(breaker, now)
    if settled.held(now):
        return _held(settled, reason, now) if probe else settled
    troubles = settled.troubles + count
    counted = replace(settled, troubles=troubles)
    return _held(counted, reason, now) if troubles >= FAILURES_TO_TRIP else counted


def with_unproven_key(breaker: CircuitBreaker, *, now: datetime) -> CircuitBreaker:
    """Return the breaker of an account when a worker starts, maybe with a new key. A single probe tests the key."""
    settled = _settled(breaker, now)
    if settled.reason is not None and settled.until is not None:
        return replace(settled, proven=False)
    # If the key was never proven, the jobs were held because a key was missing. Their grace period starts now.
    released_at = settled.released_at if settled.proven else now
    return replace(settled, proven=False, probe_at=now, released_at=released_at)


def held_as_unlisted(breaker: CircuitBreaker, *, now: datetime) -> CircuitBreaker:
    """Return the breaker of a host that is not on SD_API_HOSTS.

    It is held until a worker whose settings list the host makes a successful request. That worker may probe at once.
    """
    settled = _settled(breaker, now)
    if settled.is_unlisted:
        return settled
    reason = f"{NOT_LISTED}: add {breaker.name} to it and restart the worker"
    return replace(settled, reason=reason, since=now, until=None, probe_at=now)


def held_by_operator(breaker: CircuitBreaker, *, now: datetime) -> CircuitBreaker:
    """Return the breaker after an operator has held it. No request is allowed until it is resumed, not even a probe."""
    return breaker if breaker.paused_at is not None else replace(breaker, paused_at=now)


def resumed_by_operator(breaker: CircuitBreaker, *, now: datetime) -> CircuitBreaker:
    """Return the breaker after an operator has resumed it. If there was a reason for a hold, a probe is made at once.

    This also ends a rate limit, because the operator asked for it.
    """
    opened = replace(breaker, paused_at=None, released_at=now, probe_at=now)
    if opened.until is not None:
        return replace(opened, reason=None, since=None, until=None, probe_at=None)
    return opened if opened.scope == "host" or opened.reason is not None else replace(opened, proven=False)


def with_probe_started(breaker: CircuitBreaker, *, now: datetime, lease: timedelta) -> CircuitBreaker:
    """Return the breaker while its probe is in flight. No other process probes before the lease ends."""
    return replace(breaker, probe_at=now + lease)


def with_probe_postponed(breaker: CircuitBreaker, *, now: datetime, wait: float) -> CircuitBreaker:
    """Return the breaker after a probe without a clear result. The next probe is allowed in `wait` seconds."""
    return replace(breaker, probe_at=now + timedelta(seconds=wait)) if breaker.reason is None else breaker


def _held(breaker: CircuitBreaker, reason: str, now: datetime) -> CircuitBreaker:
    probe_at = now + timedelta(seconds=PROBE_WAITS[min(breaker.probes, len(PROBE_WAITS) - 1)])
    if breaker.until is not None:
        probe_at = max(probe_at, breaker.until)  # no probe before the end of a rate limit
    since = breaker.since if breaker.reason is not None else now
    return replace(breaker, reason=reason, since=since, until=None, probe_at=probe_at, probes=breaker.probes + 1)


def _settled(breaker: CircuitBreaker, now: datetime) -> CircuitBreaker:
    if breaker.until is None or now < breaker.until:
        return breaker
    return replace(breaker, reason=None, since=None, until=None, released_at=breaker.until)
