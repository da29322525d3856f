"""Request rates per account: time slots for requests, and the rate after a rate limit. Pure. All times in seconds.

`worker.core.circuit_breaker` keeps the learned rate and the pause after HTTP 429. `worker.coordination.rate_limiter`
reserves the slots in Redis, for all processes together.

Slots are reserved with the generic cell rate algorithm in its virtual scheduling form. The state is one number per
account, the next free slot. Each reservation takes the next slots in a row, so requests are spread evenly. After a
pause a small burst is allowed.

After a rate limit the rate falls to half of the rate that the API accepted. It recovers along the cubic function of
RFC 9438 (section 4.2): fast at first, flat near the known ceiling, then faster again in case the limit has changed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

BURST_SECONDS = 0.1  # a burst after a pause may have the requests of this period
AHEAD_SECONDS = 0.1  # slots are reserved at most this far ahead
MIN_RATE = 0.2
RECOVERY_SECONDS = 60.0  # from half of the ceiling to the ceiling
PLATEAU_SHARE = 0.95  # the flat part of the curve as a share of the ceiling, just below the rate that was refused
MIN_CEILING_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class RequestRates:
    """The maximum requests per second of each account. `default` is for accounts that are not in `by_account`."""

    default: float
    by_account: Mapping[str, float] = field(default_factory=dict)

    def of(self, account: str) -> float:
        """Return the requests per second that all processes together may make for the account."""
        return self.by_account.get(account, self.default)


@dataclass(frozen=True, slots=True)
class RateSlots:
    """Reserved slots for `count` requests: the first after `first` seconds, the others at intervals of `step`.

    More slots can be reserved after `wait` seconds. `free` is the next free slot after these.
    """

    count: int
    first: float
    step: float
    wait: float
    free: float


def reserve_slots(free: float, now: float, *, rate: float, requested: int) -> RateSlots:
    """Reserve up to `requested` slots from `free` on, at `rate` per second, at most AHEAD_SECONDS ahead.

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
    """Return how many requests may be sent at once after a pause: those of BURST_SECONDS, at least one.

    >>> burst(50.0), burst(2.0)
    (5, 1)
    """
    return max(1, int(rate * BURST_SECONDS))


def current_rate(configured: float, ceiling: float | None, age: float) -> float:
    """Return the rate that is allowed `age` seconds after the pause of a rate limit.

    >>> [round(current_rate(100.0, 20.0, age), 1) for age in (0.0, 30.0, 60.0, 90.0, 180.0)]
    [9.5, 17.8, 19.0, 20.2, 95.0]
    """
    if ceiling is None:
        return configured
    along = (max(age, 0.0) - RECOVERY_SECONDS) / RECOVERY_SECONDS
    grown = ceiling * PLATEAU_SHARE * (1 + min(along**3, 1e6) / 2)
    return max(min(configured, grown), min(configured, MIN_RATE))


def learned_ceiling(rate: float, measured: float) -> float:
    """Return the estimated ceiling of the API. It accepted `measured` requests per second and refused one at `rate`.

    >>> learned_ceiling(100.0, 20.0), learned_ceiling(100.0, 300.0), learned_ceiling(100.0, 0.0)
    (20.0, 100.0, 100.0)
    """
    if measured <= 0:
        return max(rate, MIN_RATE)
    return max(min(rate, measured), rate * MIN_CEILING_SHARE, MIN_RATE)
