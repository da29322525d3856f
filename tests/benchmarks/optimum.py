"""The optimal polling schedule for a known distribution of durations, by dynamic programming. For comparison only.

For one job, F(t) is the probability that it is ready by age t, and a request costs `c` seconds of delay. W(x) is the
expected future cost of a job that was polled at age x, times the probability that it was not ready then:

    W(x) = min over y > x of  c(y)·(1 - F(x)) + ∫ₓʸ (F(t) - F(x)) dt + W(y),

on a grid of ages up to the deadline. The sums of requests and delay for all c give the least delay for each number of
requests; no policy that knows less can be better. If requests are limited, a price that changes with time gives a lower
bound for many jobs that are submitted at once (the Lagrangian dual: for any prices, the cost minus the value of the
allowed requests).
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Alive = Callable[[float], float]  # the probability that a job is not ready at an age

DEADLINE = 3_600.0


def grid_of(longest_step: float) -> list[float]:
    """Return ages up to the deadline. Steps are a fortieth of the age, at most `longest_step` seconds."""
    ages = [0.0, 0.1]
    while ages[-1] < DEADLINE:
        ages.append(ages[-1] + min(ages[-1] / 40, longest_step))
    return [*ages[:-1], DEADLINE]


GRID = grid_of(math.inf)
PRICES = [0.01 * 1.35**step for step in range(35)]


def lognormal(median: float, spread: float) -> Alive:
    """Return the survival function of a lognormal duration. `spread` is the standard deviation of its logarithm."""

    def alive(age: float) -> float:
        return 1.0 if age <= 0 else 0.5 * math.erfc(math.log(age / median) / spread / math.sqrt(2))

    return alive


def mixed(*parts: tuple[float, Alive]) -> Alive:
    """Return the survival function of a mixture whose parts cannot be distinguished."""
    return lambda age: sum(share * alive(age) for share, alive in parts)


def never(_: float) -> float:
    """Survival function of jobs that never end."""
    return 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """The average cost per job: requests, and seconds of delay."""

    polls: float
    delay: float


def cheapest(
    survival: Sequence[float], prices: Sequence[float], grid: Sequence[float] = GRID
) -> tuple[Cost, list[float]]:
    """Return the optimal cost if a request at `grid[i]` costs `prices[i]`, and the number of requests at each age."""
    count = len(grid)
    ready = [0.0] * count  # ∫ F
    for at in range(1, count):
        ready[at] = ready[at - 1] + (grid[at] - grid[at - 1]) * (2 - survival[at] - survival[at - 1]) / 2
    worth, next_index, delays = [0.0] * count, [0] * count, [0.0] * count
    for at in range(count - 2, -1, -1):
        alive, dead = survival[at], 1 - survival[at]
        best = math.inf
        for to in range(at + 1, count):
            delay = ready[to] - ready[at] - dead * (grid[to] - grid[at])
            if delay >= best:
                break
            cost = prices[to] * alive + delay + worth[to]
            if cost < best:
                best, next_index[at], delays[at] = cost, to, delay
        worth[at] = best
    requests = [0.0] * count
    at, polls, delay = 0, 0.0, 0.0
    while at < count - 1:
        polls += survival[at]
        delay += delays[at]
        requests[next_index[at]] += survival[at]
        at = next_index[at]
    return Cost(polls, delay), requests


def replayed(ages: Sequence[float], durations: Sequence[float | None]) -> Cost:
    """Return the cost of polling jobs with these durations at these ages. The last age is the deadline."""
    polls, delay = 0, 0.0
    for duration in durations:
        at = len(ages) - 1 if duration is None else bisect_left(ages, duration)
        polls += at + 1
        delay += ages[at] - duration if duration is not None else 0.0
    return Cost(polls / len(durations), delay / len(durations))


def optimum_of(alive: Alive, durations: Sequence[float | None]) -> list[Cost]:
    """Return the optimum of one class, evaluated on these jobs, so that chance does not affect the comparison."""
    survival = [alive(age) for age in GRID]
    costs = []
    for price in PRICES:
        requests = cheapest(survival, [price] * len(GRID))[1]
        costs.append(replayed([age for age, count in zip(GRID, requests, strict=True) if count], durations))
    return sorted(costs, key=lambda cost: cost.polls)


def frontier(classes: Sequence[tuple[float, Alive]], longest_step: float = math.inf) -> list[Cost]:
    """Return the least delay for each number of requests, for classes that can be distinguished."""
    frontier_costs = []
    grid = grid_of(longest_step)
    tables = [(share, [alive(age) for age in grid]) for share, alive in classes]
    for price in PRICES:
        costs = [(share, cheapest(survival, [price] * len(grid), grid)[0]) for share, survival in tables]
        frontier_costs.append(Cost(sum(s * c.polls for s, c in costs), sum(s * c.delay for s, c in costs)))
    return sorted(frontier_costs, key=lambda cost: cost.polls)


def least_delay(costs: Sequence[Cost], polls: float) -> float:
    """Interpolate the least delay at a number of requests per job on a frontier."""
    at = min(max(bisect_left([cost.polls for cost in costs], polls), 1), len(costs) - 1)
    low, high = costs[at - 1], costs[at]
    part = (polls - low.polls) / (high.polls - low.polls)
    return math.exp((1 - part) * math.log(low.delay) + part * math.log(high.delay))


def burst_bound(alive: Alive, jobs: int, rps: float) -> float:
    """Return a lower bound on the mean delay of jobs that are submitted at once, at `rps` requests per second.

    Any prices give a bound. The function takes the best of a family that falls from `first` to zero during the burst.
    """
    survival = [alive(age) for age in GRID]
    allowed = [
        rps * (later - sooner) / jobs for sooner, later in pairwise([0.0, *GRID])
    ]  # requests per job in each step
    best = 0.0
    for seconds in (jobs / rps * times for times in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)):
        for first in (2.0, 4.0, 7.0, 10.0, 15.0, 22.0, 32.0, 50.0):
            for bend in (0.5, 1.0, 2.0):
                prices = [first * max(0.0, 1 - age / seconds) ** bend for age in GRID]
                cost, requests = cheapest(survival, prices)
                worth = sum(
                    price * (count - limit) for price, count, limit in zip(prices, requests, allowed, strict=True)
                )
                best = max(best, cost.delay + worth)
    return best


def slot_bound(durations: Sequence[float], rps: float) -> float:
    """Return another lower bound for a burst: each job needs one request after it is ready, one after the other."""
    request_time, delay = 0.0, 0.0
    for duration in sorted(durations):
        request_time = max(request_time + 1 / rps, duration)
        delay += request_time - duration
    return delay / len(durations)
