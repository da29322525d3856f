"""How far a job is, for a bar on a page: the chance that it is ready by now, and how long it may still take. Pure.

What is told of a job that waits comes from how long its kind took before, given that it was not ready when the API last
said so. Of a kind that nobody has seen yet, the scale-free prior is told, whose 90 % point is far from its median.
"""

import math
from dataclasses import dataclass
from typing import Literal

from worker.core.lifecycle import FINAL_STATES
from worker.core.pacing.policy import PacedJob, PaceModel
from worker.core.pacing.survival import OLDEST

Phase = Literal["waiting", "downloading", "final"]

UNSEEN_MEDIAN = 15.0  # seconds; of a kind without any experience
WAITING_PART = 0.9  # of the bar, until the job is seen ready
DOWNLOADING_PART = 0.95


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is.

    `chance`: that the API has it ready by now. `median_seconds`, `p90_seconds`: within how long from now it will be
    ready with a chance of 50 % and 90 %; 0 where it probably is already, None where that is beyond its deadline.
    `phase`: `waiting` for the API, `downloading` what is ready, or `final`. `fraction`: for a bar, 0 to 1. No answer
    moves it back, only what is learned of the kind meanwhile can, by little: a page shows the most it was told.
    """

    chance: float
    median_seconds: float | None
    p90_seconds: float | None
    phase: Phase
    fraction: float


def progress(status: str, job: PacedJob, model: PaceModel) -> Progress:
    """The progress of a job in this state, by what is known of its kind.

    >>> progress("completed", PacedJob(9.0), PaceModel())
    Progress(chance=1.0, median_seconds=0.0, p90_seconds=0.0, phase='final', fraction=1.0)
    >>> new = progress("pending", PacedJob(5.0, 5.0), PacePaceModel())  # nothing is known: as long again, and 15 s
    >>> round(new.median_seconds), round(new.p90_seconds), new.chance
    (20, 180, 0.0)
    """
    if status in FINAL_STATES:
        return Progress(1.0, 0.0, 0.0, "final", 1.0)
    if status == "downloading":
        return Progress(1.0, 0.0, 0.0, "downloading", DOWNLOADING_PART)
    clock, _, _ = model.clock(job)
    curve = model if clock.moments.count or clock.parent.count else _Unseen(job.eta)
    return Progress(
        chance=curve.chance(job, job.age),
        median_seconds=_within(job, curve.quantile(job, 0.5)),
        p90_seconds=_within(job, curve.quantile(job, 0.9)),
        phase="waiting",
        fraction=WAITING_PART * curve.chance(job._replace(not_ready_age=0.0), job.age),
    )


class _Unseen:
    """The curve of a kind without experience: half of those that took so long are ready after as long again.

    An eta is half believed: its scale is the geometric mean of it and of what is usual.
    """

    def __init__(self, eta: float | None) -> None:
        self._median = UNSEEN_MEDIAN if eta is None else math.sqrt(UNSEEN_MEDIAN * eta)

    def chance(self, job: PacedJob, age: float) -> float:
        """The chance that a job is ready at `age`, given when it was last seen not ready."""
        return max(age - job.not_ready_age, 0.0) / (self._median + max(age, job.not_ready_age))

    def quantile(self, job: PacedJob, share: float) -> float:
        """The age in seconds by which so many of such jobs are ready."""
        return (self._median + job.not_ready_age) / (1 - share) - self._median


def _within(job: PacedJob, age: float) -> float | None:
    """The seconds until `age`; what lies beyond the deadline was never seen, and will not be waited for."""
    seconds = max(age - job.age, 0.0)
    return seconds if seconds <= max(job.seconds_left, 0.0) and age < OLDEST else None
