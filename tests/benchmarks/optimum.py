"""The optimum of polling where the true distribution of durations is known: a dynamic programme, for comparison only.

One job, F(t) the chance that it is ready by age t, a request worth `c` seconds of delay. With W(x) the cost to come of
a job that was asked about at age x, times the chance that it was not ready then,

    W(x) = min over y > x of  c(y)·(1 - F(x)) + ∫ₓʸ (F(t) - F(x)) dt + W(y),

on a grid of ages up to the deadline. Its two sums, requests and delay, for all c, are the least delay for each number
of requests: no policy that knows less can be better. Where requests are short a price that changes with time gives a
lower bound for many jobs handed over at once (the Lagrangian dual: for any prices, the cost less the budget's worth).
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Alive = Callable[[float], float]  # the chance that a job is not ready at an age

DEADLINE = 3_600.0


def grid_of(longest_step: float) -> list[float]:
    """Ages up to the deadline, a fortieth apart, but no more than so many seconds."""
    ages = [0.0, 0.1]
    while ages[-1] < DEADLINE:
        ages.append(ages[-1] + min(ages[-1] / 40, longest_step))
    return [*ages[:-1], DEADLINE]


GRID = grid_of(math.inf)
PRICES = [0.01 * 1.35**step for step in range(35)]


def lognormal(median: float, spread: float) -> Alive:
    """Of a lognormal duration; `spread` is the standard deviation of its logarithm."""

    def alive(age: float) -> float:
        return 1.0 if age <= 0 else 0.5 * math.erfc(math.log(age / median) / spread / math.sqrt(2))

    return alive


def mixed(*parts: tuple[float, Alive]) -> Alive:
    """Of a mixture whose parts nobody can tell apart."""
    return lambda age: sum(share * alive(age) for share, alive in parts)


def never(_: float) -> float:
    """Of jobs that never end."""
    return 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one job on average: requests, and seconds of delay."""

    polls: float
    delay: float


def cheapest(left: Sequence[float], prices: Sequence[float], grid: Sequence[float] = GRID) -> tuple[Cost, list[float]]:
    """The optimum where a request at `grid[i]` costs `prices[i]`; and how many requests go out at each age."""
    count = len(grid)
    ready = [0.0] * count  # ∫ F
    for at in range(1, count):
        ready[at] = ready[at - 1] + (grid[at] - grid[at - 1]) * (2 - left[at] - left[at - 1]) / 2
    worth, following, delays = [0.0] * count, [0] * count, [0.0] * count
    for at in range(count - 2, -1, -1):
        alive, gone = left[at], 1 - left[at]
        best = math.inf
        for to in range(at + 1, count):
            delay = ready[to] - ready[at] - gone * (grid[to] - grid[at])
            if delay >= best:
                break
            cost = prices[to] * alive + delay + worth[to]
            if cost < best:
                best, following[at], delays[at] = cost, to, delay
        worth[at] = best
    asked = [0.0] * count
    at, polls, delay = 0, 0.0, 0.0
    while at < count - 1:
        polls += left[at]
        delay += delays[at]
        asked[following[at]] += left[at]
        at = following[at]
    return Cost(polls, delay), asked


def replayed(ages: Sequence[float], durations: Sequence[float | None]) -> Cost:
    """What asking at these ages comes to with jobs of these durations; the last age is the deadline."""
    polls, delay = 0, 0.0
    for duration in durations:
        at = len(ages) - 1 if duration is None else bisect_left(ages, duration)
        polls += at + 1
        delay += ages[at] - duration if duration is not None else 0.0
    return Cost(polls / len(durations), delay / len(durations))


def optimum_of(alive: Alive, durations: Sequence[float | None]) -> list[Cost]:
    """The optimum of one class, as it does with these very jobs: so that their luck is no part of a comparison."""
    left = [alive(age) for age in GRID]
    found = []
    for price in PRICES:
        asked = cheapest(left, [price] * len(GRID))[1]
        found.append(replayed([age for age, many in zip(GRID, asked, strict=True) if many], durations))
    return sorted(found, key=lambda cost: cost.polls)


def frontier(classes: Sequence[tuple[float, Alive]], longest_step: float = math.inf) -> list[Cost]:
    """The least delay for each number of requests, over classes that can be told apart, by their shares."""
    found = []
    grid = grid_of(longest_step)
    tables = [(share, [alive(age) for age in grid]) for share, alive in classes]
    for price in PRICES:
        costs = [(share, cheapest(left, [price] * len(grid), grid)[0]) for share, left in tables]
        found.append(Cost(sum(s * c.polls for s, c in costs), sum(s * c.delay for s, c in costs)))
    return sorted(found, key=lambda cost: cost.polls)


def least_delay(costs: Sequence[Cost], polls: float) -> float:
    """The least delay at so many requests per job, between the points of a frontier."""
    at = min(max(bisect_left([cost.polls for cost in costs], polls), 1), len(costs) - 1)
    low, high = costs[at - 1], costs[at]
    part = (polls - low.polls) / (high.polls - low.polls)
    return math.exp((1 - part) * math.log(low.delay) + part * math.log(high.delay))


def burst_bound(alive: Alive, jobs: int, rps: float) -> float:
    """A lower bound on the mean delay of jobs that are all handed over at once, at `rps` requests per second.

    Any prices give a bound; the best of a family that falls from `first` to nothing while the burst lasts is taken.
    """
    left = [alive(age) for age in GRID]
    room = [rps * (later - sooner) / jobs for sooner, later in pairwise([0.0, *GRID])]  # requests per job in each step
    best = 0.0
    for seconds in (jobs / rps * times for times in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)):
        for first in (2.0, 4.0, 7.0, 10.0, 15.0, 22.0, 32.0, 50.0):
            for bend in (0.5, 1.0, 2.0):
                prices = [first * max(0.0, 1 - age / seconds) ** bend for age in GRID]
                cost, asked = cheapest(left, prices)
                worth = sum(price * (many - there) for price, many, there in zip(prices, asked, room, strict=True))
                best = max(best, cost.delay + worth)
    return best


def slot_bound(durations: Sequence[float], rps: float) -> float:
    """Another lower bound for a burst: each job takes a request of its own after it is ready, one after the other."""
    asked, delay = 0.0, 0.0
    for duration in sorted(durations):
        asked = max(asked + 1 / rps, duration)
        delay += asked - duration
    return delay / len(durations)
