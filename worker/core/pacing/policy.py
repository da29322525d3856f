"""When to poll a job next, and which due jobs come first. Pure: it takes ages in seconds and returns waits in seconds.

The `learned` policy polls a job when its accumulated odds of being ready (see `survival`) reach the price of a request,
in seconds of delay. For a single job that time is optimal. For memoryless jobs the odds are also the Whittle index of
the problem with a limited number of requests, so they order the due jobs when requests are scarce.

An eta is a unit of time, not a promise. A second model learns from ages that are measured in units of the eta. The
model that predicted the recent answers better makes the decision.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from worker.core.pacing.survival import LogDurationStats, SurvivalModel

Policy = Literal["learned", "fixed", "exponential", "eta"]
POLICIES: tuple[Policy, ...] = ("learned", "fixed", "exponential", "eta")

ETA_UNITS = 16.0  # the unit of the eta model is a sixteenth of the eta
FADING = 0.98  # decay per answer of the comparison between the two models
RECORD_FADING = 0.99  # decay per answer of the record of predictions and results
RECORD_JOBS = 50.0  # the number of jobs that the mean delays cover
STEEPNESS = 64.0  # the growth of the odds is measured between 1 and 64 times the price
MIN_GROWTH, MAX_GROWTH = 0.25, 64.0
MIN_SECONDS = 0.001

# First polls of the policies other than learned: after the eta, within these ages, or after the default.
MIN_FIRST_AGE = 2.0
MAX_FIRST_AGE = 60.0
DEFAULT_FIRST_AGE = 2.5
MIN_LEARNED_AGE = 1.0  # earliest first poll of the learned policy, unless POLL_MIN is lower
MAX_WAIT = 900.0  # longest wait of the learned policy
MAX_SIMPLE_WAIT = 300.0  # longest wait of the policies other than learned
MAX_AGE = 1e8  # three years: a higher age is a wrong clock
FIXED_WAIT = 5.0
EXPONENT, EXPONENTIAL_FIRST, MAX_EXPONENTIAL_WAIT = 1.5, 1.0, 20.0  # google-api-core's defaults for polling operations
SPREAD = 0.1  # of a wait, so that jobs that were submitted together are not polled together
WINDOW = 250  # when requests are scarce, a claim compares this number of due jobs from each of four windows
AT_DEADLINE = 0.5  # seconds after the deadline at which the last poll is made


class PacedJob(NamedTuple):
    """A job as the pacing code sees it. Ages are in seconds since submission.

    `not_ready_age` is the age at which the job was last seen not ready, or 0 if it was never polled. `eta` is the
    estimate that the API gave at `eta_age`. `seconds_left` is the time until the deadline. This is a tuple for speed:
    every request creates two of them.
    """

    age: float
    not_ready_age: float = 0.0
    eta: float | None = None
    eta_age: float = 0.0
    polls: int = 0
    seconds_left: float = math.inf

    @classmethod
    def at(cls, now: datetime, job: Any) -> "PacedJob":
        """Return a row of a job as it is at `now`. Values out of range, from a clock or the API, are corrected."""

        def age(moment: datetime | None) -> float:
            return 0.0 if moment is None else max((moment - job.submitted_at).total_seconds(), 0.0)

        not_ready_age = age(job.not_ready_at)
        seconds_left = (job.deadline_at - now).total_seconds()
        age_now = max(age(now), not_ready_age)
        return _sane(cls(age_now, not_ready_age, job.eta, age(job.eta_at), seconds_left=seconds_left))


class PollPlan(NamedTuple):
    """When to poll next, in `wait` seconds, and how the value of a poll grows after that (see `urgency`).

    `scale` is the number of unseen seconds after which a poll is worth its price. `growth` is the exponent of the
    growth. Both are None for policies without such values; the job that is due for longest then comes first.
    """

    wait: float
    scale: float | None = None
    growth: float | None = None


def urgency(unseen: float, scale: float | None, growth: float | None) -> float:
    """Return the logarithm of the value of a poll, in prices. `unseen` is the seconds since the job was seen not ready.

    >>> round(urgency(8.0, 4.0, 2.0), 3)  # twice the time, at a power of two: four times the price
    1.386
    """
    if scale is None or growth is None:
        return 0.0
    return growth * math.log(max(unseen, MIN_SECONDS) / scale)


_RECORD = ("polls", "expected_ready", "found_ready", "planned_delay", "actual_delay")  # in this order in a snapshot


class PaceModel:
    """The learned durations of one kind of jobs: by age, and by age since the eta arrived, in units of the eta.

    `polls`, `expected_ready` and `found_ready` count the recent polls, the sum of their predicted chances, and the
    polls that found their job ready. `planned_delay` and `actual_delay` are mean delays in seconds from ready to seen.
    """

    __slots__ = (
        "actual_delay",
        "by_age",
        "by_eta",
        "expected_ready",
        "found_ready",
        "lead",
        "planned_delay",
        "polls",
    )

    def __init__(
        self, by_age: SurvivalModel | None = None, by_eta: SurvivalModel | None = None, lead: float = 0.0
    ) -> None:
        self.by_age = by_age or SurvivalModel()
        self.by_eta = by_eta or SurvivalModel()
        self.lead = lead  # by how much the eta model predicted the recent answers better, as a log likelihood
        self.polls = self.expected_ready = self.found_ready = self.planned_delay = self.actual_delay = 0.0

    @classmethod
    def after(cls, parent: "PaceModel") -> "PaceModel":
        """Return the model of a new kind. It starts from the durations of all jobs of the account."""
        return cls(SurvivalModel(parent.by_age.moments), SurvivalModel(parent.by_eta.moments))

    def observe(self, job: PacedJob, ready: bool, planned: float | None = None) -> None:
        """Learn from an answer at `job.age`. `planned` is the age at which the poll was planned."""
        job = _sane(job)
        if job.age - job.not_ready_age < MIN_SECONDS:
            return
        plan_is_valid = planned is not None and job.not_ready_age < planned < MAX_AGE
        planned_delay = self.by_age.delay_at(job.not_ready_age, planned or 0.0) if ready and plan_is_valid else None
        log_likelihood = self.by_age.observe(job.not_ready_age, job.age, ready)
        if job.eta is not None:
            by_eta = self.by_eta.observe(*_in_etas(job, job.not_ready_age, job.age), ready)
            self.lead = FADING * self.lead + by_eta - log_likelihood
        chance = math.exp(log_likelihood) if ready else -math.expm1(log_likelihood)
        self.polls = RECORD_FADING * self.polls + 1
        self.expected_ready = RECORD_FADING * self.expected_ready + chance
        self.found_ready = RECORD_FADING * self.found_ready + ready
        if ready:
            rate = 1 / min(max(self.found_ready, 1.0), RECORD_JOBS)
            self.actual_delay += (self.by_age.delay - self.actual_delay) * rate
            self.planned_delay += (
                (self.by_age.delay if planned_delay is None else planned_delay) - self.planned_delay
            ) * rate

    def note(self, job: PacedJob) -> None:
        """Add a job that was found ready to mean and variance only. The model of a whole account needs nothing else."""
        job = _sane(job)
        if job.age - job.not_ready_age >= MIN_SECONDS:
            self.by_age.note(job.not_ready_age, job.age)
            if job.eta is not None:
                self.by_eta.note(*_in_etas(job, job.not_ready_age, job.age))

    def clock(self, job: PacedJob) -> tuple[SurvivalModel, float, float]:
        """Return the model that decides about a job, its unit in seconds, and the age at which its time starts."""
        if job.eta is None or self.lead <= 0:
            return self.by_age, 1.0, 0.0
        return self.by_eta, job.eta / ETA_UNITS, job.eta_age

    def due(self, job: PacedJob, price: float) -> tuple[float, float]:
        """Return the ages in seconds at which a poll is worth `price` and `STEEPNESS` times `price`."""
        clock, unit, start = self.clock(job)
        not_ready_age = max(0.0, job.not_ready_age - start) / unit
        first, later = clock.next_ages(not_ready_age, (price / unit, STEEPNESS * price / unit))
        return start + unit * first, start + unit * later

    def chance(self, job: PacedJob, age: float) -> float:
        """Return the chance that a job is ready at `age`."""
        clock, unit, start = self.clock(job)
        return clock.chance(max(0.0, job.not_ready_age - start) / unit, max(0.0, age - start) / unit)

    def quantile(self, job: PacedJob, share: float) -> float:
        """Return the age in seconds by which this share of such jobs is ready. Infinite if that never happens."""
        clock, unit, start = self.clock(job)
        return start + unit * clock.quantile(max(0.0, job.not_ready_age - start) / unit, share)

    # ── storing and merging ───────────────────────────────────────────────────────────────────────────────────────────

    def mark(self) -> None:
        """Start to record what is learned, for `merge_into`."""
        self.by_age.mark()
        self.by_eta.mark()

    def merge_into(self, other: "PaceModel") -> None:
        """Add what was learned since `mark` to a model that other processes have changed in the meantime."""
        self.by_age.merge_into(other.by_age)
        self.by_eta.merge_into(other.by_eta)
        other.lead = (self.lead + other.lead) / 2
        for name in _RECORD:
            setattr(other, name, (getattr(self, name) + getattr(other, name)) / 2)

    def snapshot(self) -> dict[str, Any]:
        """Return the model as JSON data: a few hundred bytes, at most 4,000."""
        return {
            "age": self.by_age.snapshot(),
            "eta": self.by_eta.snapshot(),
            "lead": float(f"{self.lead:.4g}"),
            "record": [float(f"{getattr(self, name):.4g}") for name in _RECORD],
        }

    @classmethod
    def restored(cls, snapshot: Mapping[str, Any], parent: "PaceModel") -> "PaceModel":
        """Return the model of a snapshot. Raises KeyError, TypeError or ValueError if the snapshot is invalid."""
        model = cls(
            SurvivalModel.restored(snapshot["age"], parent.by_age.moments),
            SurvivalModel.restored(snapshot["eta"], parent.by_eta.moments),
            float(snapshot["lead"]),
        )
        for name, value in zip(_RECORD, snapshot["record"], strict=True):
            setattr(model, name, float(value))
        return model


NOTHING_KNOWN = PaceModel(SurvivalModel(LogDurationStats()), SurvivalModel(LogDurationStats()))


def _in_etas(job: PacedJob, not_ready_age: float, age: float) -> tuple[float, float]:
    unit = (job.eta or 1.0) / ETA_UNITS
    return max(0.0, not_ready_age - job.eta_age) / unit, max(0.0, age - job.eta_age) / unit


@dataclass(frozen=True, slots=True)
class Pace:
    """The pacing settings: the policy, the price of a request in seconds of delay, and the shortest wait in seconds."""

    policy: Policy
    price: float
    min_wait: float

    def first(self, job: PacedJob, model: PaceModel, *, spread: float) -> PollPlan:
        """Return when to poll a job that was never polled. `spread` is a random number from 0 to 1."""
        job = _sane(job)
        if self.policy == "learned":
            plan = self._learned(job, model, spread)
            min_age = min(self.min_wait, MIN_LEARNED_AGE)
        else:
            plan = PollPlan(self._first_age(job.eta) * (1 + SPREAD * spread) - job.age)
            min_age = 0.0
        return PollPlan(
            _until_deadline(max(plan.wait, min_age - job.age, 0.0), job.seconds_left), plan.scale, plan.growth
        )

    def next(self, job: PacedJob, model: PaceModel, *, spread: float) -> PollPlan:
        """Return when to poll a job next that was polled just now. `spread` is a random number from 0 to 1."""
        job = _sane(job)
        if self.policy == "learned":
            plan = self._learned(job, model, spread)
        else:
            wait = max(self.min_wait, min(_WAITS[self.policy](job), MAX_SIMPLE_WAIT))
            plan = PollPlan(wait * (1 + SPREAD * spread))
        return PollPlan(max(_until_deadline(plan.wait, job.seconds_left), self.min_wait), plan.scale, plan.growth)

    def _learned(self, job: PacedJob, model: PaceModel, spread: float) -> PollPlan:
        due, later = model.due(job, self.price)
        scale = max(due - job.not_ready_age, MIN_SECONDS)
        growth = math.log(STEEPNESS) / math.log(max(later - job.not_ready_age, scale * 1.01) / scale)
        # Jobs that were submitted together are not polled together.
        wait = min((due - job.age) * (1 + SPREAD * (spread - 0.5)), MAX_WAIT)
        return PollPlan(wait, scale, min(max(growth, MIN_GROWTH), MAX_GROWTH))

    def _first_age(self, eta: float | None) -> float:
        if self.policy == "exponential":
            return EXPONENTIAL_FIRST
        return DEFAULT_FIRST_AGE if eta is None else min(max(MIN_FIRST_AGE, eta), MAX_FIRST_AGE)


def _until_deadline(wait: float, seconds_left: float) -> float:
    """Shorten a wait that ends after the deadline: the first answer after the deadline decides about the job."""
    return min(wait, seconds_left + AT_DEADLINE) if seconds_left > 0 else wait


def _sane(job: PacedJob) -> PacedJob:
    """Return the job with all values in range. A clock or the API may have given any number."""
    if (
        0.0 <= job.not_ready_age <= job.age <= MAX_AGE
        and 0.0 <= job.eta_age <= job.age
        and (job.eta is None or 1e-3 <= job.eta <= MAX_AGE)
    ):
        return job
    age = min(max(job.age, 0.0), MAX_AGE) if job.age == job.age else 0.0
    not_ready_age = min(max(job.not_ready_age, 0.0), age) if job.not_ready_age == job.not_ready_age else 0.0
    eta = job.eta if job.eta is not None and 1e-3 <= job.eta <= MAX_AGE else None
    eta_age = job.eta_age if 0.0 <= job.eta_age <= age else 0.0
    return job._replace(age=age, not_ready_age=not_ready_age, eta=eta, eta_age=eta_age)


def _fixed(job: PacedJob) -> float:
    return FIXED_WAIT


def _exponential(job: PacedJob) -> float:
    return min(EXPONENTIAL_FIRST * EXPONENT ** min(job.polls, 20), MAX_EXPONENTIAL_WAIT)


def _eta(job: PacedJob) -> float:
    remaining = (job.eta or 0.0) - job.age
    return remaining if remaining > 0 else max(FIXED_WAIT / 2, (job.eta or 2 * FIXED_WAIT) / 4)


_WAITS: dict[Policy, Callable[[PacedJob], float]] = {"fixed": _fixed, "exponential": _exponential, "eta": _eta}
