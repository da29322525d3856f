"""A survival model of job durations, learned from polls. Pure: it takes ages and returns ages, chances and odds.

For a job that was last seen not ready at age x, let p(u) be the chance that it is ready by age u. The accumulated odds

    I(x, y) = ∫ₓʸ p(u) / (1 - p(u)) du

are the value of a poll at age y, in units of time. Source: optimum checking procedures (Barlow, Hunter and Proschan
1963; Munford and Shahani 1972). p comes from a hazard that is constant on log-spaced buckets of age. It is learned only
from intervals: "ended, or did not end, between the ages x and y". The time of the answer itself has no information,
because the worker chose it.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

BUCKETS = 66
PER_OCTAVE = 4
FIRST_EDGE = 0.25
EDGES = (0.0, *(FIRST_EDGE * 2 ** (step / PER_OCTAVE) for step in range(BUCKETS - 1)))
ENDS = (*EDGES[1:], math.inf)
WIDTHS = tuple(min(end, 2 * start + FIRST_EDGE) - start for start, end in zip(EDGES, ENDS, strict=True))
MAX_POLL_AGE = 1e9  # no job is polled at a higher age

PRIOR_JOBS = 3.0  # weight of the prior
PRIOR_FLOOR = 0.1  # minimum weight per bucket, in jobs, so that an endless tail is learned quickly
PRIOR_SPREAD = 0.5  # standard deviation of log duration before any job was seen; it weighs as much as two jobs
TAIL = 0.03  # some jobs never end: this share of the prior has a heavy tail
MAX_NEVER_SHARE = 0.5  # the largest share of that tail that never ends, for a kind whose jobs took similar times
NEVER_JOBS = 50.0  # the number of jobs after which that share is reached
FORGET_JOBS = 150.0  # old evidence decays by 1/e while this number of jobs ends
FORGET_PASSES = 60.0  # but no faster than this number of jobs passes the bucket: evidence of rare long jobs lasts
MIN_UPDATE_RATE = 0.03  # mean and variance follow new jobs at least at this rate
MIN_CHANCE = 1e-9
TINY = 1e-6
MAX_RECORDED = 5_000


def bucket(age: float) -> int:
    """Return the bucket of an age.

    >>> bucket(0.0), bucket(0.25), bucket(8.0), bucket(1e12)
    (0, 1, 21, 65)
    """
    return bisect_right(EDGES, age) - 1


@dataclass(frozen=True, slots=True)
class LogDurationStats:
    """Mean and variance of log duration over `count` jobs. Old jobs decay."""

    count: float = 0.0
    mean: float = 0.0
    variance: float = 0.0

    def after(self, value: float) -> "LogDurationStats":
        """Return the statistics with one more job."""
        count = self.count + 1
        rate = max(1 / count, MIN_UPDATE_RATE)
        step = value - self.mean
        return LogDurationStats(count, self.mean + rate * step, (1 - rate) * (self.variance + rate * step * step))

    @property
    def spread(self) -> float:
        """The expected variance of the next job. It is defined for any number of jobs, also zero."""
        pooled = (2 * PRIOR_SPREAD**2 + self.count * self.variance) / (2 + self.count)
        return pooled * (1 + 1 / max(self.count, 1.0))


class SurvivalModel:
    """The learned durations of one kind of jobs: per bucket of age, the jobs that ended and the time under observation.

    Ages are in the unit of the model, which is a second or a part of the eta.
    """

    __slots__ = (
        "_base",
        "_faded",
        "_jobs",
        "_marked",
        "_pull",
        "_since",
        "_touched",
        "delay",
        "ended",
        "moments",
        "parent",
        "time",
    )

    def __init__(self, parent: LogDurationStats = LogDurationStats()) -> None:  # frozen
        self.parent = parent  # the statistics of all kinds of the account: the start for a new kind
        self.moments = LogDurationStats()
        self.ended = [0.0] * BUCKETS
        self.time = [0.0] * BUCKETS
        self.delay = 0.0  # the estimated time that the last finished job had been ready before it was polled
        self._jobs = 0.0  # the jobs that have ended, including the chances of those that may have
        self._touched = [0.0] * BUCKETS  # the value of `_jobs` when each bucket was last updated
        self.mark()
        self._follow()

    def _follow(self) -> None:
        """Compute the prior again. Per bucket it has a weight in time and the number of jobs that end in it."""
        stats = self.moments if self.moments.count else self.parent
        self._pull, self._base = _prior(*_rounded(stats, _never(self.moments)))

    def hazard(self, at: int) -> float:
        """Return the hazard in bucket `at`: jobs that end per unit of age, of those that have not ended yet."""
        return (self.ended[at] + self._base[at]) / (self.time[at] + self._pull[at])

    # ── deciding ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def next_ages(self, not_ready_age: float, prices: Sequence[float]) -> list[float]:
        """Return the ages at which the odds since `not_ready_age` reach each of `prices`, which are in ascending order.

        All are in the unit of the model.
        """
        ended, time, base, pull = self.ended, self.time, self._base, self._pull
        ages: list[float] = []
        remaining_prices = iter(prices)
        price = next(remaining_prices)
        odds, factor, age = 0.0, 1.0, not_ready_age
        at = bisect_right(EDGES, not_ready_age) - 1
        while True:
            hazard = (ended[at] + base[at]) / (time[at] + pull[at])
            length = ENDS[at] - age
            power = hazard * length
            if power < 30.0:
                grown = factor * math.expm1(power) / hazard - length if power > 1e-9 else (factor - 1.0) * length
                while odds + grown >= price:
                    ages.append(min(age + _stretch(price - odds, factor, hazard, length), MAX_POLL_AGE))
                    next_price = next(remaining_prices, None)
                    if next_price is None:
                        return ages
                    price = next_price
                odds += grown
                factor *= math.exp(power)
                at += 1
                age = ENDS[at - 1]
            else:
                higher_prices = (price, *remaining_prices)
                ages += [
                    min(age + _stretch(each - odds, factor, hazard, length), MAX_POLL_AGE) for each in higher_prices
                ]
                return ages

    def chance(self, not_ready_age: float, age: float) -> float:
        """Return the chance that a job that was not ready at `not_ready_age` is ready at `age`."""
        return -math.expm1(-sum(self.hazard(at) * length for at, length in _pieces(not_ready_age, age)))

    def delay_at(self, not_ready_age: float, age: float) -> float:
        """Return how long a job that is found ready at `age`, and was not ready before, has been ready on average."""
        alive, under_way = 1.0, 0.0
        for at, length in _pieces(not_ready_age, age):
            hazard = self.hazard(at)
            ending = -alive * math.expm1(-hazard * length)
            under_way += ending / hazard
            alive -= ending
        ended = 1.0 - alive
        return (
            age - not_ready_age - (under_way - alive * (age - not_ready_age)) / ended
            if ended > MIN_CHANCE
            else (age - not_ready_age) / 2
        )

    def quantile(self, not_ready_age: float, share: float) -> float:
        """Return the age by which this share of the jobs not ready at `not_ready_age` is ready. Infinite if never."""
        cumulative_hazard = -math.log1p(-share)
        at, age = bucket(not_ready_age), not_ready_age
        while True:
            hazard, length = self.hazard(at), ENDS[at] - age
            if cumulative_hazard <= hazard * length:
                return age + cumulative_hazard / hazard if hazard * MAX_POLL_AGE > cumulative_hazard else math.inf
            cumulative_hazard -= hazard * length
            at += 1
            age = EDGES[at]

    # ── learning ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def observe(self, not_ready_age: float, age: float, ready: bool) -> float:
        """Learn from an answer: not ready at `not_ready_age`, ready or not at `age`. Return its log likelihood."""
        ended, time, base, pull = self.ended, self.time, self._base, self._pull
        touched, faded, jobs = self._touched, self._faded, self._jobs
        pieces: list[tuple[int, float, float]] = []
        total = 0.0
        for at, length in _pieces(not_ready_age, age):
            hazard = (ended[at] + base[at]) / (time[at] + pull[at])
            pieces.append((at, length, hazard))
            total += length * hazard
            # Old evidence decays as new evidence arrives.
            by_jobs, by_passes = (jobs - touched[at]) / FORGET_JOBS, length / WIDTHS[at] / FORGET_PASSES
            fading = by_jobs if by_jobs < by_passes else by_passes
            keep = 1.0 - fading if fading < 1.0 else 0.0
            touched[at] = jobs
            ended[at] *= keep
            time[at] *= keep
            faded[at] *= keep
        chance = max(-math.expm1(-total), MIN_CHANCE)
        if ready and pieces:
            self.delay = age - not_ready_age - self._spread(pieces, math.exp(-total), 1 / chance)
            self.note(not_ready_age, age)
            self._follow()
        else:
            for at, length, _ in pieces:
                time[at] += length
        self._jobs += 1.0 if ready else chance
        return math.log(chance) if ready else -total

    def note(self, not_ready_age: float, age: float) -> None:
        """Add a job that ended between two ages to mean and variance."""
        value = math.log(max(not_ready_age, age / 4, TINY) * max(age, TINY)) / 2
        self.moments = self.moments.after(value)
        self._since.append(value)
        if len(self._since) > MAX_RECORDED:  # nothing calls `merge_into`, so limit the memory
            self.mark()

    def _spread(self, pieces: Sequence[tuple[int, float, float]], survival: float, weight: float) -> float:
        """Add a job that ended in one of these pieces. It is distributed by their present chances (an EM step).

        Return the expected time in the pieces before it ended. `survival` is the chance of not ending in any of them.
        """
        alive, under_way = 1.0, 0.0
        for at, length, hazard in pieces:
            ending = -alive * math.expm1(-hazard * length)
            time = weight * max(ending / hazard - survival * length, 0.0)
            self.ended[at] += weight * ending
            self.time[at] += time
            alive -= ending
            under_way += time
        return under_way

    # ── storing and merging ───────────────────────────────────────────────────────────────────────────────────────────

    def mark(self) -> None:
        """Start to record what is learned. `merge_into` adds only that to another model."""
        self._marked = (self.ended.copy(), self.time.copy())
        self._faded = [1.0] * BUCKETS
        self._since: list[float] = []

    def merge_into(self, other: "SurvivalModel") -> None:
        """Add what was learned since `mark` to another model, as if the other had learned it last."""
        for own, before, theirs in (
            (self.ended, self._marked[0], other.ended),
            (self.time, self._marked[1], other.time),
        ):
            for at, faded in enumerate(self._faded):
                theirs[at] = theirs[at] * faded + max(own[at] - before[at] * faded, 0.0)
        for value in self._since:
            other.moments = other.moments.after(value)
        other._follow()

    def snapshot(self) -> dict[str, Any]:
        """Return the model as JSON data."""
        return {
            "jobs": [_short(value) for value in (self.moments.count, self.moments.mean, self.moments.variance)],
            "ended": _trimmed(self.ended),
            "time": _trimmed(self.time),
        }

    @classmethod
    def restored(cls, snapshot: Mapping[str, Any], parent: LogDurationStats) -> "SurvivalModel":
        """Return the model of a snapshot. Raises KeyError, TypeError or ValueError if the snapshot is invalid."""
        model = cls(parent)
        count, mean, variance = (_finite(value) for value in snapshot["jobs"])
        model.moments = LogDurationStats(count, mean, variance)
        for values, saved in ((model.ended, snapshot["ended"]), (model.time, snapshot["time"])):
            if len(saved) > BUCKETS:
                raise ValueError("too many buckets")
            values[: len(saved)] = [max(_finite(value), 0.0) for value in saved]
        model.mark()
        model._follow()
        return model


def _short(value: float) -> float:
    """Round to four significant digits, which is more precise than the model."""
    return float(f"{value:.4g}")


def _finite(value: object) -> float:
    number = float(value)  # type: ignore[arg-type]  # the TypeError is wanted
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def _trimmed(values: Sequence[float]) -> list[float]:
    """Set very small values to zero and remove the empty buckets at the end."""
    short = [_short(value) if value > 1e-6 else 0.0 for value in values]
    while short and not short[-1]:
        short.pop()
    return short


def _pieces(not_ready_age: float, age: float) -> list[tuple[int, float]]:
    """Return the buckets between two ages, each with the length that lies between them."""
    if not not_ready_age < age:
        return []
    first, last = bisect_right(EDGES, not_ready_age) - 1, bisect_right(EDGES, age) - 1
    if first == last:
        return [(first, age - not_ready_age)]
    whole = [(at, WIDTHS[at]) for at in range(first + 1, last)]
    return [(first, ENDS[first] - not_ready_age), *whole, (last, age - EDGES[last])]


def _stretch(odds: float, factor: float, hazard: float, longest: float) -> float:
    """Return the time d in which the odds grow by `odds`: factor·(e^(hazard·d) - 1)/hazard - d = odds.

    This is Newton's method from above. The curve is convex, so each step comes closer to the solution.
    """
    slope, bend = factor - 1.0, factor * hazard
    if odds <= 0:
        return 0.0
    if bend <= 1e-300:
        return min(odds / slope, longest) if slope > 1e-300 else longest
    # e^z - 1 ≥ z + z²/2, so the root of the parabola is above the solution
    length = 2 * odds / (slope + math.sqrt(slope * slope + 2 * bend * odds))
    if hazard * length > 30.0:
        length = math.log1p(hazard * (odds + length) / factor) / hazard  # one fixed-point step is much closer
    for _ in range(4):
        power = math.exp(hazard * length)
        step = (factor * (power - 1.0) / hazard - length - odds) / (factor * power - 1.0)
        length -= step
        if abs(step) < 1e-6 * length:
            break
    return min(length, longest)


def _never(moments: LogDurationStats) -> float:
    """Return the share of the prior's tail that never ends. It grows with the number of jobs and their similarity.

    Late jobs of a new kind, or of a kind whose durations differ by orders of magnitude, are expected to end.
    """
    return MAX_NEVER_SHARE * min(moments.count / NEVER_JOBS, 1.0) * max(1.0 - moments.spread, 0.0)


def _rounded(moments: LogDurationStats, never: float) -> tuple[bool, float, float, float]:
    """Round the statistics that the prior depends on. Otherwise each finished job would need a new prior."""
    spread = round(math.log(moments.spread) * 10) / 10
    return moments.count > 0, round(moments.mean * 20) / 20, spread, round(never * 10) / 10


@lru_cache(maxsize=4_096)
def _prior(
    has_jobs: bool, mean: float, log_variance: float, never: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the prior per bucket: its weight in time, and the number of jobs that end in it.

    It is a log-logistic distribution with a heavy tail. Without any jobs it is the scale-free hazard 1/t.
    """
    shape = math.pi / math.sqrt(3 * math.exp(log_variance))
    pulls, bases = list[float](), list[float]()
    for start, width in zip(EDGES, WIDTHS, strict=True):
        if has_jobs:
            alive, alive_after = _alive(start, mean, shape, never), _alive(start + width, mean, shape, never)
            hazard = math.log(alive / alive_after) / width
        else:
            alive = min(1.0, FIRST_EDGE / max(start, FIRST_EDGE))
            hazard = math.log((start + width) / start) / width if start else 0.1
        pull = width * PRIOR_JOBS * (alive + PRIOR_FLOOR)
        pulls.append(pull)
        bases.append(pull * hazard)
    return tuple(pulls), tuple(bases)


def _alive(age: float, mean: float, shape: float, never: float) -> float:
    if age <= 0:
        return 1.0
    distance = math.log(age) - mean
    main = 1 / (1 + math.exp(min(shape * distance, 700.0)))
    return (1 - TAIL) * main + TAIL * (never + (1 - never) / (1 + math.exp(min(distance, 700.0))))
