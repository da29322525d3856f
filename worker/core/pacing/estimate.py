"""Estimate the progress of a job: the chance that it is ready now, and the remaining time. Pure.

For a waiting job the estimate comes from the past durations of its kind, given when it was last seen not ready. For a
kind without past jobs it comes from a scale-free prior, whose 90 % point is far from its median. An order that is not
sent yet also waits for the orders before it.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from worker.core.lifecycle import FINAL_STATES
from worker.core.pacing.policy import PacedJob, PaceModel
from worker.core.pacing.survival import MAX_POLL_AGE

Phase = Literal["ordered", "uncertain", "waiting", "downloading", "final"]

UNSEEN_MEDIAN = 15.0  # seconds, for a kind without past jobs
WAITING_PART = 0.9  # the part of the bar until the job is seen ready
DOWNLOADING_PART = 0.95
MAX_LOG_VARIANCE = 2.0  # so that a few odd durations do not make the mean absurd


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a job.

    `chance`: the chance that the job is ready at the API now. `median_seconds`, `p90_seconds`: the time from now until
    the job is ready with a chance of 50 % and 90 %. They are 0 if the job is probably ready already, and None if that
    is not expected within its deadline, or if nobody knows. `phase`: `ordered` and not sent yet, `uncertain` because
    the answer to the order is lost, `waiting` for the API, `downloading`, or `final`. `fraction`: a value from 0 to 1
    for a progress bar. It can go down a little when the worker learns from other jobs of the kind, so show the highest
    value so far. `before`: for an order that is not sent yet, how many orders of its account are sent first.
    """

    chance: float
    median_seconds: float | None
    p90_seconds: float | None
    phase: Phase
    fraction: float
    before: int | None = None


class OrderQueue(NamedTuple):
    """The place of an order that is not sent yet: the orders before it, and the slots of its account."""

    before: int
    taken: int
    slots: int

    def wait(self, mean_seconds: float) -> float:
        """Return the expected seconds until the order is sent, if jobs take `mean_seconds` on average.

        >>> OrderQueue(before=2, taken=1, slots=5).wait(10.0)
        0.0
        >>> OrderQueue(before=9, taken=5, slots=5).wait(10.0)
        20.0
        """
        slots_to_free = self.before + 1 - max(self.slots - self.taken, 0)
        return max(slots_to_free, 0) * mean_seconds / max(self.slots, 1)


def progress(status: str, job: PacedJob, model: PaceModel, queue: OrderQueue | None = None) -> Progress:
    """Return the progress of a job in this state. `model` is the model of its kind, `queue` the place of an order.

    >>> progress("completed", PacedJob(9.0), PaceModel())
    Progress(chance=1.0, median_seconds=0.0, p90_seconds=0.0, phase='final', fraction=1.0, before=None)
    >>> new = progress("pending", PacedJob(5.0, 5.0), PaceModel())  # no past jobs: its age again, plus 15 s
    >>> round(new.median_seconds), round(new.p90_seconds), new.chance
    (20, 180, 0.0)
    """
    if status in FINAL_STATES:
        return Progress(1.0, 0.0, 0.0, "final", 1.0)
    if status == "downloading":
        return Progress(1.0, 0.0, 0.0, "downloading", DOWNLOADING_PART)
    if status == "uncertain":
        return Progress(0.0, None, None, "uncertain", 0.0)
    curve = _curve(job, model)
    if status == "ordered":
        return _ordered(job, curve, mean_seconds(job, model), queue or OrderQueue(0, 0, 1))
    return Progress(
        chance=curve.chance(job, job.age),
        median_seconds=_within(job, curve.quantile(job, 0.5)),
        p90_seconds=_within(job, curve.quantile(job, 0.9)),
        phase="waiting",
        fraction=WAITING_PART * curve.chance(job._replace(not_ready_age=0.0), job.age),
    )


def mean_seconds(job: PacedJob, model: PaceModel) -> float:
    """Return how long a job of a kind takes on average, from its past jobs or else from those of its account."""
    stats = model.by_age.moments if model.by_age.moments.count else model.by_age.parent
    if not stats.count:
        return _Unseen(job.eta).median
    return min(math.exp(stats.mean + min(stats.variance, MAX_LOG_VARIANCE) / 2), MAX_POLL_AGE)


def _ordered(job: PacedJob, curve: "PaceModel | _Unseen", mean: float, queue: OrderQueue) -> Progress:
    """Return the progress of an order that is not sent yet. Its age counts from the moment at which it is sent."""
    sent = PacedJob(0.0, eta=job.eta, seconds_left=job.age + job.seconds_left)
    wait = queue.wait(mean)
    seconds = [_within(sent, curve.quantile(sent, share)) for share in (0.5, 0.9)]
    median, p90 = (None if remaining is None else wait + remaining for remaining in seconds)
    return Progress(0.0, median, p90, "ordered", 0.0, queue.before)


def _curve(job: PacedJob, model: PaceModel) -> "PaceModel | _Unseen":
    clock, _, _ = model.clock(job)
    return model if clock.moments.count or clock.parent.count else _Unseen(job.eta)


class _Unseen:
    """The curve of a kind without past jobs: the remaining time has a median of the age so far plus a constant.

    With an eta, the constant is the geometric mean of the eta and the usual 15 s.
    """

    def __init__(self, eta: float | None) -> None:
        self.median = UNSEEN_MEDIAN if eta is None else math.sqrt(UNSEEN_MEDIAN * eta)

    def chance(self, job: PacedJob, age: float) -> float:
        """Return the chance that a job is ready at `age`, given the age at which it was last seen not ready."""
        return max(age - job.not_ready_age, 0.0) / (self.median + max(age, job.not_ready_age))

    def quantile(self, job: PacedJob, share: float) -> float:
        """Return the age in seconds by which this share of such jobs is ready."""
        return (self.median + job.not_ready_age) / (1 - share) - self.median


def _within(job: PacedJob, age: float) -> float | None:
    """Return the seconds until `age`, or None if that is after the deadline, where no job was ever observed."""
    seconds = max(age - job.age, 0.0)
    return seconds if seconds <= max(job.seconds_left, 0.0) and age < MAX_POLL_AGE else None
