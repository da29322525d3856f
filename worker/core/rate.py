"""Requests per second and account: which moments to ask at, and what a rate limit teaches. Pure; seconds throughout.

Moments are given out by the generic cell rate algorithm in its scheduling form: one number per account, the next free
moment; a request takes the next ones in a row, so that requests go out evenly. After a pause a few may go at once.

After a rate limit the rate falls to half of what the API was seen to take, and comes back along the cubic of RFC 9438
(section 4.2): fast at first, flat near the ceiling that was found, then ever faster, in case the limit is gone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

BURST_SECONDS = 0.1  # so many seconds' worth may go at once after a pause
AHEAD_SECONDS = 0.1  # moments are given out so far ahead
LEAST_RATE = 0.2
RECOVERY_SECONDS = 60.0  # from the half to the ceiling
KEPT_BELOW = 0.95  # the flat part of the curve, as a share of the ceiling: just below what was refused
DEEPEST_CUT = 0.1


@dataclass(frozen=True, slots=True)
class RequestRates:
    """The most requests per second of each account: `default` where `by_account` does not name it."""

    default: float
    by_account: Mapping[str, float] = field(default_factory=dict)

    def of(self, account: str) -> float:
        """Requests per second that the account may make, all processes together."""
        return self.by_account.get(account, self.default)


@dataclass(frozen=True, slots=True)
class RateSlots:
    """So many requests: the first after `first` seconds, each next one `step` later.

    `wait` is when it is worth asking for more; `free` is the next free moment after these.
    """

    count: int
    first: float
    step: float
    wait: float
    free: float


def reserve_slots(free: float, now: float, *, rate: float, requested: int) -> RateSlots:
    """Takes up to `wanted` moments from `free` on, at `rate` per second, none further ahead than AHEAD_SECONDS.

    >>> reserve_slots(0.0, 100.0, rate=50.0, requested=3)
    RateSlots(count=3, first=-0.1, step=0.02, wait=0.0, free=99.96)
    >>> reserve_slots(100.08, 100.0, rate=50.0, requested=9).count
    2
    """
    step = 1 / rate
    begin = max(free, now - burst(rate) * step)
    room = math.floor((now + AHEAD_SECONDS - begin) / step + 1e-6) + 1
    count = max(0, min(requested, room))
    free = begin + count * step
    return RateSlots(count, round(begin - now, 6), step, max(0.0, round(free - now - AHEAD_SECONDS, 6)), round(free, 6))


def burst(rate: float) -> int:
    """The requests that may go out at once after a pause: a tenth of a second's worth, at least one.

    >>> burst(50.0), burst(2.0)
    (5, 1)
    """
    return max(1, int(rate * BURST_SECONDS))


def current_rate(full: float, ceiling: float | None, age: float) -> float:
    """The rate to ask at, `age` seconds after the pause that a rate limit brought; `full` is the configured one.

    >>> [round(current_rate(100.0, 20.0, age), 1) for age in (0.0, 30.0, 60.0, 90.0, 180.0)]
    [9.5, 17.8, 19.0, 20.2, 95.0]
    """
    if ceiling is None:
        return full
    along = (max(age, 0.0) - RECOVERY_SECONDS) / RECOVERY_SECONDS
    grown = ceiling * KEPT_BELOW * (1 + min(along**3, 1e6) / 2)
    return max(min(full, grown), min(full, LEAST_RATE))


def learned_ceiling(rate: float, seen: float) -> float:
    """What the API takes, as far as can be told when it refused a request at `rate`, having taken `seen` per second.

    >>> learned_ceiling(100.0, 20.0), learned_ceiling(100.0, 300.0), learned_ceiling(100.0, 0.0)
    (20.0, 100.0, 100.0)
    """
    if seen <= 0:
        return max(rate, LEAST_RATE)
    return max(min(rate, seen), rate * DEEPEST_CUT, LEAST_RATE)
