"""When to ask about a job next. Pure: ages in seconds come in, a wait in seconds goes out.

The default is the scale-free rule of optimum checking procedures (Barlow, Hunter and Proschan 1963; Munford and Shahani
1972) for a duration about which nothing is known: with hazard 1/t the accumulated odds I(x, y) = (y - x)² / 2x of a job
last seen at age x reach the price c at y = x + √(2·c·x). So the waits grow with the square root of the age, and one
request is spent for about c seconds of delay.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Policy = Literal["learned", "fixed", "exponential", "eta"]

FIRST_LEAST = 2.0
FIRST_MOST = 60.0
FIRST_UNKNOWN = 2.5
WAIT_MOST = 300.0
FIXED_WAIT = 5.0
EXPONENT = 1.5
SPREAD = 0.1


@dataclass(frozen=True, slots=True)
class Waiting:
    """What pacing looks at: age since submission and the eta, both in seconds, and how often it was asked."""

    age: float
    eta: float | None
    polls: int


@dataclass(frozen=True, slots=True)
class Pace:
    """How to pace: the policy, what one request is worth in seconds of delay, and the least wait in seconds."""

    policy: Policy
    price: float
    least: float

    def first_poll(self, eta: float | None, *, spread: float) -> float:
        """Age in seconds at which a job is asked about first: its eta between 2 and 60 s. `spread` is 0 to 1."""
        wait = FIRST_UNKNOWN if eta is None else min(max(FIRST_LEAST, eta), FIRST_MOST)
        return wait * (1 + SPREAD * spread)

    def next_poll(self, job: Waiting, *, spread: float) -> float:
        """Seconds from now until the next request about a job that was not ready just now. `spread` is 0 to 1."""
        wait = _POLICIES[self.policy](job, self.price)
        return max(self.least, min(wait, WAIT_MOST)) * (1 + SPREAD * spread)


def _learned(job: Waiting, price: float) -> float:
    return math.sqrt(2 * price * max(job.age, 1.0))


def _fixed(job: Waiting, price: float) -> float:
    return FIXED_WAIT


def _exponential(job: Waiting, price: float) -> float:
    return FIXED_WAIT / 2 * EXPONENT ** min(job.polls, 20)


def _eta(job: Waiting, price: float) -> float:
    remaining = (job.eta or 0.0) - job.age
    return remaining if remaining > 0 else max(FIXED_WAIT / 2, (job.eta or 2 * FIXED_WAIT) / 4)


_POLICIES: dict[Policy, Callable[[Waiting, float], float]] = {
    "learned": _learned,
    "fixed": _fixed,
    "exponential": _exponential,
    "eta": _eta,
}
