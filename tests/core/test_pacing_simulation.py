"""The simulator: the worker's own scheduling on a virtual clock, exact where the answer is known beforehand."""

import math
import random

import pytest

from worker.core.pacing.policy import POLICIES, Pace, Policy
from worker.core.pacing.simulation import Simulation, TraceJob, quantile, simulate


def hour(_: str) -> float:
    """The deadline of any kind."""
    return 3_600.0


def lognormal(
    count: int, *, median: float = 8.0, spread: float = 0.6, apart: float = 0.5, seed: int = 1
) -> list[TraceJob]:
    """Jobs of such durations, one each `apart` seconds."""
    draw = random.Random(seed)
    return [TraceJob(number * apart, median * math.exp(draw.gauss(0, spread))) for number in range(count)]


def mean(done: Simulation) -> float:
    """The mean delay."""
    return sum(done.delays) / len(done.delays)


def test_a_job_of_the_fixed_policy_is_seen_at_the_first_poll_after_it_is_ready() -> None:
    done = simulate([TraceJob(10.0, 6.0)], Pace("fixed", 0.5, 3.0), deadline_for=hour)

    # asked 2.5 to 2.75 s after submission, then after 5 to 5.5 s each
    assert done.polls == 2
    assert 1.5 <= done.delays[0] <= 2.25


def test_a_job_that_never_ends_is_asked_until_its_deadline_and_counts_in_polls_alone() -> None:
    done = simulate([TraceJob(0.0, None)], Pace("fixed", 0.5, 3.0), deadline_for=lambda kind: 60.0)

    assert 11 <= done.polls <= 14
    assert done.delays == []


@pytest.mark.parametrize("policy", POLICIES)
def test_every_job_that_ends_is_seen_and_never_before_it_is_ready(policy: Policy) -> None:
    done = simulate(lognormal(300), Pace(policy, 0.5, 3.0), deadline_for=hour)

    assert done.jobs == len(done.delays) == 300
    assert min(done.delays) >= 0.0
    assert done.polls >= 300


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_is_kept_by_every_policy(policy: Policy) -> None:
    trace = lognormal(400, apart=0.1)
    done = simulate(trace, Pace(policy, 0.05, 0.0), deadline_for=hour, rps=20.0)

    last = max(job.submitted + (job.duration or 0.0) for job in trace)
    assert len(done.delays) == 400
    assert done.polls <= 20.0 * (last + max(done.delays) + 1) + 4


def test_the_same_seed_gives_the_same_and_another_one_another() -> None:
    runs = [simulate(lognormal(200), Pace("learned", 0.5, 3.0), deadline_for=hour, seed=seed) for seed in (0, 0, 1)]

    assert runs[0] == runs[1]
    assert runs[0].delays != runs[2].delays


def test_learning_beats_backing_off_by_far_at_the_same_number_of_requests() -> None:
    trace = lognormal(1_500)
    backing_off = simulate(trace, Pace("exponential", 0.5, 0.0), deadline_for=hour)
    learned = min(
        (simulate(trace, Pace("learned", price, 0.0), deadline_for=hour) for price in (0.1, 0.15, 0.2, 0.3)),
        key=lambda done: abs(done.polls - backing_off.polls),
    )

    assert learned.polls <= backing_off.polls * 1.1
    assert mean(learned) < mean(backing_off) / 1.8


def test_where_requests_are_short_the_urgent_ones_go_first() -> None:
    draw = random.Random(7)
    kinds = ["video" if number % 10 == 0 else "image" for number in range(1_500)]
    medians = {"video": 300.0, "image": 8.0}
    trace = [
        TraceJob(number * 0.5, medians[kind] * math.exp(draw.gauss(0, 0.4)), kind) for number, kind in enumerate(kinds)
    ]
    runs = {
        policy: simulate(trace, Pace(policy, 0.5, 0.0), deadline_for=hour, rps=4.0)
        for policy in ("learned", "exponential")
    }

    assert len(runs["learned"].delays) == 1_500
    assert mean(runs["learned"]) < mean(runs["exponential"]) / 2.5


def test_quantiles_are_of_the_nearest_rank() -> None:
    assert [quantile([1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.25, 0.26, 0.5, 0.95, 1.0)] == [1, 1, 2, 2, 4, 4]
    assert quantile([], 0.5) == 0.0
