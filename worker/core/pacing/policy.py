"""When to ask about a job next, and which of several that are due. Pure: ages in seconds come in, waits go out.

The default policy asks when the odds that a job is ready (see `durations`) have grown to the price of a request, in
seconds of delay: that is the optimum for one job, and for memoryless jobs the odds are the Whittle index of the problem
with a limited number of requests, so they also say whom to ask first where requests are short. An eta is a unit, not a
promise: a second clock learns on ages in units of it, and whichever predicted the recent answers better decides.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from worker.core.pacing.survival import Clock, Moments

Policy = Literal["learned", "fixed", "exponential", "eta"]
POLICIES: tuple[Policy, ...] = ("learned", "fixed", "exponential", "eta")

ETA_UNITS = 16.0  # the eta clock counts in sixteenths of an eta
FADING = 0.98  # of what says which clock predicts better, per answer
RECORD_FADING = 0.99  # of the record of what was predicted and seen, per answer
RECORD_JOBS = 50.0  # as many jobs go into the mean delays
STEEPNESS = 64.0  # how the odds grow is told by when they are so many times the price
GROWTH_LEAST, GROWTH_MOST = 0.25, 64.0
SOONEST = 0.001

FIRST_LEAST = 2.0
FIRST_MOST = 60.0
FIRST_UNKNOWN = 2.5
FIRST_LEARNED = 1.0  # the learned policy asks no sooner, unless POLL_MIN is less
WAIT_MOST = 900.0
SIMPLE_MOST = 300.0  # of the other policies
AGE_MOST = 1e8
FIXED_WAIT = 5.0
EXPONENT, EXPONENTIAL_FIRST, EXPONENTIAL_MOST = 1.5, 1.0, 20.0  # as google-api-core polls operations by default
SPREAD = 0.1
WINDOW = 250  # where requests are short a claim weighs so many due jobs of each of four windows
AT_DEADLINE = 0.5  # the last question is asked so many seconds after the deadline


class Waiting(NamedTuple):
    """A job as pacing sees it: ages in seconds since submission.

    `seen` is its age when it was last seen not ready (0 where it never was), `eta` what the API expected `eta_age`
    seconds after submission, `left` the seconds to its deadline. A tuple, since two are made for every request.
    """

    age: float
    seen: float = 0.0
    eta: float | None = None
    eta_age: float = 0.0
    polls: int = 0
    left: float = math.inf

    @classmethod
    def at(
        cls,
        now: datetime,
        *,
        submitted_at: datetime,
        not_ready_at: datetime | None,
        eta: float | None,
        eta_at: datetime | None,
        deadline_at: datetime,
    ) -> "Waiting":
        """A job at a moment, with numbers that can be reckoned with, whatever a clock or an API said."""

        def age(moment: datetime | None) -> float:
            return 0.0 if moment is None else max((moment - submitted_at).total_seconds(), 0.0)

        seen = age(not_ready_at)
        left = (deadline_at - now).total_seconds()
        return _sane(cls(max(age(now), seen), seen, eta, age(eta_at), left=left))


class Plan(NamedTuple):
    """When to ask next: `wait` seconds from now; and how the worth of asking grows after that (see `urgency`).

    `scale` is after how many seconds unseen it is worth its price, `growth` the power it grows by; both are None where
    the policy knows no such thing, and the longest due is asked first.
    """

    wait: float
    scale: float | None = None
    growth: float | None = None


def urgency(unseen: float, scale: float | None, growth: float | None) -> float:
    """How much asking is worth, as a logarithm of prices, `unseen` seconds after a job was last seen not ready.

    >>> round(urgency(8.0, 4.0, 2.0), 3)  # twice the time, at a power of two: four times the price
    1.386
    """
    if scale is None or growth is None:
        return 0.0
    return growth * math.log(max(unseen, SOONEST) / scale)


class Model:
    """What is known of one class of jobs: by their age, and by their age since their eta came, in units of it.

    `asked`, `expected` and `ready` count recent requests, the chances that they would find their job ready, and those
    that did; `planned` and `seen` are the mean delay in seconds that was aimed at, and that came about.
    """

    __slots__ = ("asked", "by_age", "by_eta", "expected", "lead", "planned", "ready", "seen")

    def __init__(self, by_age: Clock | None = None, by_eta: Clock | None = None, lead: float = 0.0) -> None:
        self.by_age = by_age or Clock()
        self.by_eta = by_eta or Clock()
        self.lead = lead  # how much better the eta clock predicted the recent answers, as a log likelihood
        self.asked = self.expected = self.ready = self.planned = self.seen = 0.0

    @classmethod
    def after(cls, parent: "Model") -> "Model":
        """A class that was never seen begins where the account's jobs are as a whole."""
        return cls(Clock(parent.by_age.moments), Clock(parent.by_eta.moments))

    def observe(self, job: Waiting, ready: bool, planned: float | None = None) -> None:
        """Learns from an answer at `job.age`: ready, or not. `planned` is the age at which it was to be asked about."""
        job = _sane(job)
        if job.age - job.seen < SOONEST:
            return
        known = planned is not None and job.seen < planned < AGE_MOST
        aimed = self.by_age.delay_at(job.seen, planned or 0.0) if ready and known else None
        said = self.by_age.observe(job.seen, job.age, ready)
        if job.eta is not None:
            by_eta = self.by_eta.observe(*_in_etas(job, job.seen, job.age), ready)
            self.lead = FADING * self.lead + by_eta - said
        chance = math.exp(said) if ready else -math.expm1(said)
        self.asked = RECORD_FADING * self.asked + 1
        self.expected = RECORD_FADING * self.expected + chance
        self.ready = RECORD_FADING * self.ready + ready
        if ready:
            rate = 1 / min(max(self.ready, 1.0), RECORD_JOBS)
            self.seen += (self.by_age.delay - self.seen) * rate
            self.planned += ((self.by_age.delay if aimed is None else aimed) - self.planned) * rate

    def note(self, job: Waiting) -> None:
        """Takes a job that was found ready into mean and variance only: all that an account as a whole has."""
        job = _sane(job)
        if job.age - job.seen >= SOONEST:
            self.by_age.note(job.seen, job.age)
            if job.eta is not None:
                self.by_eta.note(*_in_etas(job, job.seen, job.age))

    def clock(self, job: Waiting) -> tuple[Clock, float, float]:
        """The clock that decides about a job: with its unit in seconds, and the age at which it started."""
        if job.eta is None or self.lead <= 0:
            return self.by_age, 1.0, 0.0
        return self.by_eta, job.eta / ETA_UNITS, job.eta_age

    def due(self, job: Waiting, price: float) -> tuple[float, float]:
        """Ages in seconds at which asking is worth `price`, and STEEPNESS times that."""
        clock, unit, start = self.clock(job)
        seen = max(0.0, job.seen - start) / unit
        first, later = clock.next_ages(seen, (price / unit, STEEPNESS * price / unit))
        return start + unit * first, start + unit * later

    def chance(self, job: Waiting, age: float) -> float:
        """The chance that a job is ready at `age`, by the clock that decides."""
        clock, unit, start = self.clock(job)
        return clock.chance(max(0.0, job.seen - start) / unit, max(0.0, age - start) / unit)

    def quantile(self, job: Waiting, share: float) -> float:
        """The age in seconds by which so many of such jobs are ready; infinite where so many never are."""
        clock, unit, start = self.clock(job)
        return start + unit * clock.quantile(max(0.0, job.seen - start) / unit, share)

    # ── keeping and sharing ───────────────────────────────────────────────────────────────────────────────────────────

    def mark(self) -> None:
        """From here on it is noted what is learned."""
        self.by_age.mark()
        self.by_eta.mark()

    def teach(self, other: "Model") -> None:
        """Adds what was learned since the mark to a model that others have taught meanwhile."""
        self.by_age.teach(other.by_age)
        self.by_eta.teach(other.by_eta)
        other.lead = (self.lead + other.lead) / 2
        for name in ("asked", "expected", "ready", "planned", "seen"):
            setattr(other, name, (getattr(self, name) + getattr(other, name)) / 2)

    def snapshot(self) -> dict[str, Any]:
        """All that is known, as JSON takes it: a few hundred bytes, never more than four thousand."""
        record = (self.asked, self.expected, self.ready, self.planned, self.seen)
        return {
            "age": self.by_age.snapshot(),
            "eta": self.by_eta.snapshot(),
            "lead": float(f"{self.lead:.4g}"),
            "record": [float(f"{value:.4g}") for value in record],
        }

    @classmethod
    def restored(cls, snapshot: Mapping[str, Any], parent: "Model") -> "Model":
        """The model of a snapshot. Raises KeyError, TypeError, ValueError where it is none."""
        model = cls(
            Clock.restored(snapshot["age"], parent.by_age.moments),
            Clock.restored(snapshot["eta"], parent.by_eta.moments),
            float(snapshot["lead"]),
        )
        model.asked, model.expected, model.ready, model.planned, model.seen = map(float, snapshot["record"])
        return model


NOTHING_KNOWN = Model(Clock(Moments()), Clock(Moments()))


def _in_etas(job: Waiting, seen: float, age: float) -> tuple[float, float]:
    unit = (job.eta or 1.0) / ETA_UNITS
    return max(0.0, seen - job.eta_age) / unit, max(0.0, age - job.eta_age) / unit


@dataclass(frozen=True, slots=True)
class Pace:
    """How to pace: the policy, what one request is worth in seconds of delay, and the least wait in seconds."""

    policy: Policy
    price: float
    least: float

    def first(self, job: Waiting, model: Model, *, spread: float) -> Plan:
        """When to ask about a job that was never asked about. `spread` is 0 to 1."""
        job = _sane(job)
        if self.policy == "learned":
            plan = self._learned(job, model, spread)
            least = min(self.least, FIRST_LEARNED)
        else:
            plan = Plan(self._first_age(job.eta) * (1 + SPREAD * spread) - job.age)
            least = 0.0
        return Plan(_until_deadline(max(plan.wait, least - job.age, 0.0), job.left), plan.scale, plan.growth)

    def next(self, job: Waiting, model: Model, *, spread: float) -> Plan:
        """When to ask next about a job that was asked about just now. `spread` is 0 to 1."""
        job = _sane(job)
        if self.policy == "learned":
            plan = self._learned(job, model, spread)
        else:
            wait = max(self.least, min(_WAITS[self.policy](job), SIMPLE_MOST))
            plan = Plan(wait * (1 + SPREAD * spread))
        return Plan(max(_until_deadline(plan.wait, job.left), self.least), plan.scale, plan.growth)

    def _learned(self, job: Waiting, model: Model, spread: float) -> Plan:
        due, later = model.due(job, self.price)
        scale = max(due - job.seen, SOONEST)
        growth = math.log(STEEPNESS) / math.log(max(later - job.seen, scale * 1.01) / scale)
        # Jobs that were handed over together are not asked about together.
        wait = min((due - job.age) * (1 + SPREAD * (spread - 0.5)), WAIT_MOST)
        return Plan(wait, scale, min(max(growth, GROWTH_LEAST), GROWTH_MOST))

    def _first_age(self, eta: float | None) -> float:
        if self.policy == "exponential":
            return EXPONENTIAL_FIRST
        return FIRST_UNKNOWN if eta is None else min(max(FIRST_LEAST, eta), FIRST_MOST)


def _until_deadline(wait: float, left: float) -> float:
    """No wait goes far beyond the deadline: the answer after it decides."""
    return min(wait, left + AT_DEADLINE) if left > 0 else wait


def _sane(job: Waiting) -> Waiting:
    """A job whose numbers can be reckoned with, whatever a clock or an API said."""
    if (
        0.0 <= job.seen <= job.age <= AGE_MOST
        and 0.0 <= job.eta_age <= job.age
        and (job.eta is None or 1e-3 <= job.eta <= AGE_MOST)
    ):
        return job
    age = min(max(job.age, 0.0), AGE_MOST) if job.age == job.age else 0.0
    seen = min(max(job.seen, 0.0), age) if job.seen == job.seen else 0.0
    eta = job.eta if job.eta is not None and 1e-3 <= job.eta <= AGE_MOST else None
    eta_age = job.eta_age if 0.0 <= job.eta_age <= age else 0.0
    return job._replace(age=age, seen=seen, eta=eta, eta_age=eta_age)


def _fixed(job: Waiting) -> float:
    return FIXED_WAIT


def _exponential(job: Waiting) -> float:
    return min(EXPONENTIAL_FIRST * EXPONENT ** min(job.polls, 20), EXPONENTIAL_MOST)


def _eta(job: Waiting) -> float:
    remaining = (job.eta or 0.0) - job.age
    return remaining if remaining > 0 else max(FIXED_WAIT / 2, (job.eta or 2 * FIXED_WAIT) / 4)


_WAITS: dict[Policy, Callable[[Waiting], float]] = {"fixed": _fixed, "exponential": _exponential, "eta": _eta}
