"""Whether an account, or a host of the API, may be asked: open, shut, or open for a single probe.

Trouble belongs to whom it concerns. A refused key, missing credits or a plan shut the account; a host that does not
answer is shut too; a rate limit shuts the account for a known time. A shut gate costs its jobs nothing: they stay
pending and are not asked. One probe at a time, after 10, 20, 40 and then every 60 seconds, opens it again by itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from worker.core.rate import current_rate, learned_ceiling
from worker.core.reply import AccountRefused, ApiDown, RateLimited, Reply, Unread

Scope = Literal["account", "host"]
PROBE_WAITS = (10.0, 20.0, 40.0, 60.0)
UNDECIDED_WAIT = 1.0
FAILURES_TO_TRIP = 5
BY_OPERATOR = "held by an operator"
REFUSALS = {"key": "key rejected", "credits": "no credits", "plan": "plan", "request": "request refused"}
NOT_LISTED = "not on SD_API_HOSTS"
NO_SUCH_PATH = "no such path"  # in the reason of a hold: SD_API_URL itself is mistyped, so the host's jobs all are
HOLD_CLASSES = (*REFUSALS.values(), "rate limited", "unreachable", NOT_LISTED, "by hand", "other")


@dataclass(frozen=True, slots=True)
class CircuitBreaker:
    """One account or host as all processes see it. `until` is set for holds that end at a known time.

    `ceiling` is how many requests per second the API took when it last refused one for being too many, and `cut_at`
    the end of the pause that followed. While `paused_at` is set an operator holds it, whatever else is known of it.
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
        """Why it is held, if it is: by whom, or what the API said."""
        return BY_OPERATOR if self.paused_at is not None else self.reason

    def rate(self, full: float, now: datetime) -> float:
        """Requests per second that may be made now, where `full` is what the settings allow."""
        age = 0.0 if self.cut_at is None else (now - self.cut_at).total_seconds()
        return current_rate(full, self.ceiling, age)

    def held(self, now: datetime) -> bool:
        """Whether it is held at `now`."""
        if self.paused_at is not None:
            return True
        return self.reason is not None and (self.until is None or now < self.until)

    def allows(self, now: datetime) -> Literal["all", "probe", "none"]:
        """How many calls may be made: `one` means a probe, to be taken by one process alone."""
        if self.paused_at is not None:
            return "none"
        if self.held(now):
            return "probe" if self.until is None and self.probe_at is not None and now >= self.probe_at else "none"
        if self.scope == "host" or self.proven:
            return "all"
        return "probe" if self.probe_at is None or now >= self.probe_at else "none"

    def last_hold_end(self, now: datetime) -> datetime | None:
        """When the last hold ended, or None where there was none."""
        if self.held(now):
            return now
        return max((at for at in (self.released_at, self.until) if at is not None), default=None)


@dataclass(frozen=True, slots=True)
class BreakerInput:
    """What a gate needs to know of one answer: the reply, when the request was sent, and whether it was a probe."""

    reply: Reply
    sent_at: datetime
    probe: bool


@dataclass(frozen=True, slots=True)
class RateMeasurement:
    """Requests per second of an account: as the settings allow, and as the API took them just now."""

    configured: float
    measured: float


def hold_class(why: str) -> str:
    """The reason of a hold as one of a few words, without what the API said.

    >>> hold_class("key rejected: Invalid API key"), hold_class(BY_HAND), hold_class("something new")
    ('key rejected', 'by hand', 'other')
    """
    word = "by hand" if why == BY_OPERATOR else why.partition(":")[0]
    return word if word in HOLD_CLASSES else "other"


def after_replies(
    breaker: CircuitBreaker, heard: Iterable[BreakerInput], limit: RateMeasurement, *, now: datetime
) -> CircuitBreaker:
    """The gate after the replies of a batch, in their order."""
    for one in heard:
        breaker = _after(breaker, one, limit, now)
    return breaker


def _after(breaker: CircuitBreaker, heard: BreakerInput, limit: RateMeasurement, now: datetime) -> CircuitBreaker:
    if breaker.scope == "host":
        if isinstance(heard.reply, ApiDown) and heard.reply.no_such_path and heard.reply.answered:
            return _after_own_path(breaker, now) if heard.probe else breaker
        if isinstance(heard.reply, ApiDown):
            return after_failures(breaker, f"unreachable: {heard.reply.message}", 1, now=now, probe=heard.probe)
        return after_job_answer(breaker, now=now, probe=heard.probe)
    match heard.reply:
        case AccountRefused(reason, message):
            return after_refusal(breaker, f"{REFUSALS[reason]}: {message}", now=now, probe=heard.probe)
        case RateLimited(seconds, _):
            limited = after_rate_limit(breaker, seconds, now=now)
            return with_learned_rate(
                limited, configured=limit.configured, measured=limit.measured, sent_at=heard.sent_at
            )
        case ApiDown():  # says nothing of the key; the host's own gate counts these
            return with_probe_postponed(breaker, now=now, wait=0.0) if heard.probe else breaker
        case Unread():
            return with_probe_postponed(breaker, now=now, wait=UNDECIDED_WAIT) if heard.probe else breaker
        case _:
            return after_job_answer(breaker, now=now, probe=heard.probe)


def _after_own_path(breaker: CircuitBreaker, now: datetime) -> CircuitBreaker:
    """Return the gate of a host after its probe asked at a path that only one job names, and that is not there.

    That the host answered ends a hold for silence. It says nothing about the path in SD_API_URL: a hold for that one
    goes on, and is probed again by the schedule.
    """
    if breaker.held(now) and breaker.reason is not None and NO_SUCH_PATH in breaker.reason:
        return _held(breaker, breaker.reason, now)
    return after_job_answer(breaker, now=now, probe=True)


def after_job_answer(breaker: CircuitBreaker, *, now: datetime, probe: bool) -> CircuitBreaker:
    """The gate after the API spoke about a job: that proves an account, and ends a hold if this was its probe."""
    settled = _settled(breaker, now)
    if settled.reason is not None and not probe and settled.scope == "account":
        return settled  # an answer that was under way when the hold began
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
    """The gate after the API refused the account: held until a probe is accepted."""
    settled = _settled(breaker, now)
    if settled.held(now) and settled.until is None and not probe:
        return settled  # calls that were under way when the hold began
    return _held(settled, reason, now)


def after_rate_limit(breaker: CircuitBreaker, seconds: float, *, now: datetime) -> CircuitBreaker:
    """The gate after a rate limit: shut for so many seconds, never shorter than it already is."""
    settled = _settled(breaker, now)
    if settled.held(now) and settled.until is None:
        return replace(settled, probe_at=max(settled.probe_at or now, now + timedelta(seconds=seconds)))
    until = max(settled.until or now, now + timedelta(seconds=seconds))
    return replace(settled, reason="rate limited", since=settled.since or now, until=until)


def with_learned_rate(
    breaker: CircuitBreaker, *, configured: float, measured: float, sent_at: datetime
) -> CircuitBreaker:
    """The gate of an account whose request of `sent_at` was one too many: it learns what the API takes.

    `seen` is how many requests per second the API took just then. The requests that were under way when the pause
    began teach nothing more.
    """
    pause_end = max(at for at in (breaker.until, breaker.cut_at, sent_at) if at is not None)
    if breaker.cut_at is not None and sent_at < breaker.cut_at:
        return replace(breaker, cut_at=pause_end)
    return replace(breaker, ceiling=learned_ceiling(breaker.rate(configured, sent_at), measured), cut_at=pause_end)


def after_failures(breaker: CircuitBreaker, reason: str, count: int, *, now: datetime, probe: bool) -> CircuitBreaker:
    """The gate of a host after `count` calls in a row came to nothing: held once there were five."""
    settled = _settled(breaker, now)
    if settled.held(now):
        return _held(settled, reason, now) if probe else settled
    troubles = settled.troubles + count
    counted = replace(settled, troubles=troubles)
    return _held(counted, reason, now) if troubles >= FAILURES_TO_TRIP else counted


def with_unproven_key(breaker: CircuitBreaker, *, now: datetime) -> CircuitBreaker:
    """The gate of an account as a worker starts, maybe with another key: one call alone shows if it is accepted."""
    settled = _settled(breaker, now)
    if settled.reason is not None and settled.until is not None:
        return replace(settled, proven=False)
    # Jobs of an account that was never asked with were held for want of a key: they get their grace from now on.
    released_at = settled.released_at if settled.proven else now
    return replace(settled, proven=False, probe_at=now, released_at=released_at)


def held_as_unlisted(breaker: CircuitBreaker, *, now: datetime) -> CircuitBreaker:
    """Return the gate of a host that the settings keep the key from: held, until a worker whose settings list it asks.

    Such a worker may do so at once, by one call alone.
    """
    settled = _settled(breaker, now)
    if settled.reason is not None and settled.reason.startswith(NOT_LISTED):
        return settled
    reason = f"{NOT_LISTED}: add {breaker.name} to it and restart the worker"
    return replace(settled, reason=reason, since=now, until=None, probe_at=now)


def held_by_operator(breaker: CircuitBreaker, *, now: datetime) -> CircuitBreaker:
    """The gate once an operator holds it: nothing is asked until it is resumed, not even by a probe."""
    return breaker if breaker.paused_at is not None else replace(breaker, paused_at=now)


def resumed_by_operator(breaker: CircuitBreaker, *, now: datetime) -> CircuitBreaker:
    """The gate once an operator says to go on: what held it is tried at once, by one call alone.

    A rate limit ends here, too: whoever asks for that knows better.
    """
    opened = replace(breaker, paused_at=None, released_at=now, probe_at=now)
    if opened.until is not None:
        return replace(opened, reason=None, since=None, until=None, probe_at=None)
    return opened if opened.scope == "host" or opened.reason is not None else replace(opened, proven=False)


def with_probe_started(breaker: CircuitBreaker, *, now: datetime, lease: timedelta) -> CircuitBreaker:
    """The gate while its one probe is under way: nobody else probes before the lease is over."""
    return replace(breaker, probe_at=now + lease)


def with_probe_postponed(breaker: CircuitBreaker, *, now: datetime, wait: float) -> CircuitBreaker:
    """The gate after a probe that said nothing about it: the next one may try in `wait` seconds."""
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
