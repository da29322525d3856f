"""How long jobs of a class take, learned from what polls revealed. Pure: ages come in, ages and odds go out.

Of a job that was last seen not ready at age x, let p(u) be the chance that it is ready by age u. The accumulated odds

    I(x, y) = ∫ₓʸ p(u) / (1 - p(u)) du

are what asking at age y is worth, in units of time: optimum checking procedures (Barlow, Hunter and Proschan 1963;
Munford and Shahani 1972). p comes from a hazard that is constant on log-spaced buckets of age, and learned from
intervals alone: "ended, or not, between the ages x and y". The time of the answer itself teaches nothing, since it was
our own choice.
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
OLDEST = 1e9  # an age beyond which nothing is asked

PRIOR_JOBS = 3.0  # what the prior weighs
PRIOR_FLOOR = 0.1  # of a job, where the prior has none left: so that a tail without an end is believed soon
PRIOR_SPREAD = 0.5  # standard deviation of log duration, before any was seen; worth two jobs
TAIL = 0.03  # some jobs never end: this share of the prior has a heavy tail
NEVER_MOST = 0.5  # of that tail never ends at all, where a class has jobs of its own that took much the same time
NEVER_JOBS = 50.0  # after so many of them
FORGET_JOBS = 150.0  # old evidence fades by 1/e as so many jobs end
FORGET_PASSES = 60.0  # but of a bucket no faster than so many jobs pass through it: few come so far, and are remembered
SLOWEST_RATE = 0.03  # mean and variance follow at least this fast
LEAST_CHANCE = 1e-9
TINY = 1e-6
SINCE_MOST = 5_000


def bucket(age: float) -> int:
    """The bucket that an age falls into.

    >>> bucket(0.0), bucket(0.25), bucket(8.0), bucket(1e12)
    (0, 1, 21, 65)
    """
    return bisect_right(EDGES, age) - 1


@dataclass(frozen=True, slots=True)
class LogDurationStats:
    """Mean and variance of log duration, over `count` jobs (old ones fade)."""

    count: float = 0.0
    mean: float = 0.0
    variance: float = 0.0

    def after(self, value: float) -> "LogDurationStats":
        """With one more job."""
        count = self.count + 1
        rate = max(1 / count, SLOWEST_RATE)
        step = value - self.mean
        return LogDurationStats(count, self.mean + rate * step, (1 - rate) * (self.variance + rate * step * step))

    @property
    def spread(self) -> float:
        """The variance to expect of the next job, however few were seen."""
        seen = (2 * PRIOR_SPREAD**2 + self.count * self.variance) / (2 + self.count)
        return seen * (1 + 1 / max(self.count, 1.0))


class SurvivalModel:
    """What is known of one class on one clock: for each bucket of age, how many jobs ended there, out of what time."""

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
        self.parent = parent  # of all kinds of the account: where a kind that was never seen begins
        self.moments = LogDurationStats()
        self.ended = [0.0] * BUCKETS
        self.time = [0.0] * BUCKETS
        self.delay = 0.0  # of the last job that ended: how long it had been ready, as far as can be told
        self._jobs = 0.0  # that ended so far, or might have
        self._touched = [0.0] * BUCKETS  # how many those were when something was last learned of a bucket
        self.mark()
        self._follow()

    def _follow(self) -> None:
        """Sets the prior anew: in each bucket, the time it is worth and the jobs that would have ended in it."""
        known = self.moments if self.moments.count else self.parent
        self._pull, self._base = _prior(*_rounded(known, _never(self.moments)))

    def hazard(self, at: int) -> float:
        """Jobs that end per unit of age, of those that are still under way in bucket `at`."""
        return (self.ended[at] + self._base[at]) / (self.time[at] + self._pull[at])

    # ── deciding ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def next_age(self, seen: float, price: float) -> float:
        """The age at which the odds since `seen` have grown to `price`, both in units of this clock."""
        return self.next_ages(seen, (price,))[0]

    def next_ages(self, seen: float, prices: Sequence[float]) -> list[float]:
        """The same for several prices, rising, on one walk through the buckets."""
        ended, time, base, pull = self.ended, self.time, self._base, self._pull
        ages: list[float] = []
        wanted = iter(prices)
        price = next(wanted)
        odds, factor, age = 0.0, 1.0, seen
        at = bisect_right(EDGES, seen) - 1
        while True:
            hazard = (ended[at] + base[at]) / (time[at] + pull[at])
            length = ENDS[at] - age
            power = hazard * length
            if power < 30.0:
                grown = factor * math.expm1(power) / hazard - length if power > 1e-9 else (factor - 1.0) * length
                while odds + grown >= price:
                    ages.append(min(age + _stretch(price - odds, factor, hazard, length), OLDEST))
                    following = next(wanted, None)
                    if following is None:
                        return ages
                    price = following
                odds += grown
                factor *= math.exp(power)
                at += 1
                age = ENDS[at - 1]
            else:
                ages += [min(age + _stretch(left - odds, factor, hazard, length), OLDEST) for left in (price, *wanted)]
                return ages

    def odds(self, seen: float, age: float) -> float:
        """I(seen, age): how much one request about a job is worth, in units of this clock."""
        odds, factor = 0.0, 1.0
        for at, length in _pieces(seen, age):
            hazard = self.hazard(at)
            power = min(hazard * length, 300.0)
            odds += (factor * math.expm1(power) / hazard - length) if power > 1e-9 else (factor - 1) * length
            factor = min(factor * math.exp(power), 1e100)
        return odds

    def chance(self, seen: float, age: float) -> float:
        """The chance that a job that was not ready at age `seen` is ready at `age`."""
        return -math.expm1(-sum(self.hazard(at) * length for at, length in _pieces(seen, age)))

    def delay_at(self, seen: float, age: float) -> float:
        """How long a job has been ready on average that is found ready at `age`, and was not at `seen`."""
        alive, under_way = 1.0, 0.0
        for at, length in _pieces(seen, age):
            hazard = self.hazard(at)
            ending = -alive * math.expm1(-hazard * length)
            under_way += ending / hazard
            alive -= ending
        ended = 1.0 - alive
        return age - seen - (under_way - alive * (age - seen)) / ended if ended > LEAST_CHANCE else (age - seen) / 2

    def quantile(self, seen: float, share: float) -> float:
        """The age by which so many of the jobs that are not ready at `seen` will be; infinite where never."""
        left = -math.log1p(-share)
        at, age = bucket(seen), seen
        while True:
            hazard, length = self.hazard(at), ENDS[at] - age
            if left <= hazard * length:
                return age + left / hazard if hazard * OLDEST > left else math.inf
            left -= hazard * length
            at += 1
            age = EDGES[at]

    # ── learning ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def observe(self, seen: float, age: float, ready: bool) -> float:
        """Learns from an answer: not ready at `seen`, ready or not at `age`. How likely it was, as a logarithm."""
        ended, time, base, pull = self.ended, self.time, self._base, self._pull
        touched, faded, jobs = self._touched, self._faded, self._jobs
        pieces: list[tuple[int, float, float]] = []
        total = 0.0
        for at, length in _pieces(seen, age):
            hazard = (ended[at] + base[at]) / (time[at] + pull[at])
            pieces.append((at, length, hazard))
            total += length * hazard
            # Old evidence makes room as new evidence comes.
            by_jobs, by_passes = (jobs - touched[at]) / FORGET_JOBS, length / WIDTHS[at] / FORGET_PASSES
            fading = by_jobs if by_jobs < by_passes else by_passes
            keep = 1.0 - fading if fading < 1.0 else 0.0
            touched[at] = jobs
            ended[at] *= keep
            time[at] *= keep
            faded[at] *= keep
        chance = max(-math.expm1(-total), LEAST_CHANCE)
        if ready and pieces:
            self.delay = age - seen - self._spread(pieces, math.exp(-total), 1 / chance)
            self.note(seen, age)
            self._follow()
        else:
            for at, length, _ in pieces:
                time[at] += length
        self._jobs += 1.0 if ready else chance
        return math.log(chance) if ready else -total

    def note(self, seen: float, age: float) -> None:
        """Takes a job that ended between two ages into mean and variance."""
        value = math.log(max(seen, age / 4, TINY) * max(age, TINY)) / 2
        self.moments = self.moments.after(value)
        self._since.append(value)
        if len(self._since) > SINCE_MOST:  # nobody takes up what is learned
            self.mark()

    def _spread(self, pieces: Sequence[tuple[int, float, float]], left: float, weight: float) -> float:
        """One step of expectation: the job ended somewhere in these pieces, by their present chances.

        How long it was under way in them, as far as can be told.
        """
        alive, under_way = 1.0, 0.0
        for at, length, hazard in pieces:
            ending = -alive * math.expm1(-hazard * length)
            time = weight * max(ending / hazard - left * length, 0.0)
            self.ended[at] += weight * ending
            self.time[at] += time
            alive -= ending
            under_way += time
        return under_way

    # ── keeping and sharing ───────────────────────────────────────────────────────────────────────────────────────────

    def mark(self) -> None:
        """From here on it is noted what is learned, so that it can be told apart from what was known."""
        self._marked = (self.ended.copy(), self.time.copy())
        self._faded = [1.0] * BUCKETS
        self._since: list[float] = []

    def merge_into(self, other: "SurvivalModel") -> None:
        """Adds what was learned since the mark to another clock, as if the other had seen it after all it knows."""
        for mine, before, theirs in (
            (self.ended, self._marked[0], other.ended),
            (self.time, self._marked[1], other.time),
        ):
            for at, faded in enumerate(self._faded):
                theirs[at] = theirs[at] * faded + max(mine[at] - before[at] * faded, 0.0)
        for value in self._since:
            other.moments = other.moments.after(value)
        other._follow()

    def snapshot(self) -> dict[str, Any]:
        """All that is known, as JSON takes it."""
        return {
            "jobs": [_short(value) for value in (self.moments.count, self.moments.mean, self.moments.variance)],
            "ended": _trimmed(self.ended),
            "time": _trimmed(self.time),
        }

    @classmethod
    def restored(cls, snapshot: Mapping[str, Any], parent: LogDurationStats) -> "SurvivalModel":
        """The clock of a snapshot. Raises KeyError, TypeError, ValueError where it is none."""
        clock = cls(parent)
        count, mean, variance = (_finite(value) for value in snapshot["jobs"])
        clock.moments = LogDurationStats(count, mean, variance)
        for values, saved in ((clock.ended, snapshot["ended"]), (clock.time, snapshot["time"])):
            if len(saved) > BUCKETS:
                raise ValueError("more buckets than there are")
            values[: len(saved)] = [max(_finite(value), 0.0) for value in saved]
        clock.mark()
        clock._follow()
        return clock


def _short(value: float) -> float:
    """Four significant digits are more than is known."""
    return float(f"{value:.4g}")


def _finite(value: object) -> float:
    number = float(value)  # type: ignore[arg-type]  # a TypeError is what it is to raise
    if not math.isfinite(number):
        raise ValueError("no finite number")
    return number


def _trimmed(values: Sequence[float]) -> list[float]:
    """Without the empty buckets at the end, and without what is too little to matter."""
    short = [_short(value) if value > 1e-6 else 0.0 for value in values]
    while short and not short[-1]:
        short.pop()
    return short


def _pieces(seen: float, age: float) -> list[tuple[int, float]]:
    """The buckets between two ages, and how much of each."""
    if not seen < age:
        return []
    first, last = bisect_right(EDGES, seen) - 1, bisect_right(EDGES, age) - 1
    if first == last:
        return [(first, age - seen)]
    whole = [(at, WIDTHS[at]) for at in range(first + 1, last)]
    return [(first, ENDS[first] - seen), *whole, (last, age - EDGES[last])]


def _stretch(odds: float, factor: float, hazard: float, longest: float) -> float:
    """How long it takes the odds to grow by `odds`: the d of factor·(e^(hazard·d) - 1)/hazard - d = odds.

    Newton's method from above, where the curve is convex, so it only ever comes closer.
    """
    slope, bend = factor - 1.0, factor * hazard
    if odds <= 0:
        return 0.0
    if bend <= 1e-300:
        return min(odds / slope, longest) if slope > 1e-300 else longest
    # e^z - 1 ≥ z + z²/2, so the root of the parabola lies above the one that is sought
    length = 2 * odds / (slope + math.sqrt(slope * slope + 2 * bend * odds))
    if hazard * length > 30.0:
        length = math.log1p(hazard * (odds + length) / factor) / hazard  # one step of the fixed point is closer by far
    for _ in range(4):
        power = math.exp(hazard * length)
        step = (factor * (power - 1.0) / hazard - length - odds) / (factor * power - 1.0)
        length -= step
        if abs(step) < 1e-6 * length:
            break
    return min(length, longest)


def _never(moments: LogDurationStats) -> float:
    """Which part of the prior's tail never ends: more of it the more jobs were seen, and the less they differ.

    Late jobs of a class that is not known yet, or whose durations differ by orders of magnitude, are just late.
    """
    return NEVER_MOST * min(moments.count / NEVER_JOBS, 1.0) * max(1.0 - moments.spread, 0.0)


def _rounded(moments: LogDurationStats, never: float) -> tuple[bool, float, float, float]:
    """As much of the moments as a prior depends on, coarsely: it is made anew for each finished job otherwise."""
    spread = round(math.log(moments.spread) * 10) / 10
    return moments.count > 0, round(moments.mean * 20) / 20, spread, round(never * 10) / 10


@lru_cache(maxsize=4_096)
def _prior(known: bool, mean: float, log_variance: float, never: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The prior: (time it is worth, jobs that ended in it) by bucket.

    A log-logistic with a share of a heavy tail; where nothing is known the scale-free hazard 1/t.
    """
    shape = math.pi / math.sqrt(3 * math.exp(log_variance))
    pulls, bases = list[float](), list[float]()
    for start, width in zip(EDGES, WIDTHS, strict=True):
        if known:
            alive, left = _alive(start, mean, shape, never), _alive(start + width, mean, shape, never)
            hazard = math.log(alive / left) / width
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
