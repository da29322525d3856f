"""The simulator: the worker's own scheduling on a virtual clock, with exact results where they are known."""

import math
import random

import pytest

from worker.core.pacing.policy import POLICIES, Pace, Policy
from worker.core.pacing.simulation import Simulation, TraceJob, quantile, simulate


def hour(_: str) -> float:
    """Return the deadline for every kind."""
    return 3_600.0


def lognormal(
    count: int, *, median: float = 8.0, spread: float = 0.6, apart: float = 0.5, seed: int = 1
) -> list[TraceJob]:
    """Return a trace of lognormal jobs, one every `apart` seconds."""
    draw = random.Random(seed)
    return [TraceJob(number * apart, median * math.exp(draw.gauss(0, spread))) for number in range(count)]


def mean(result: Simulation) -> float:
    """Return the mean delay."""
    return sum(result.delays) / len(result.delays)


def test_the_fixed_policy_sees_a_job_at_the_first_poll_after_it_is_ready() -> None:
    result = simulate([TraceJob(10.0, 6.0)], Pace("fixed", 0.5, 3.0), deadline_for=hour)

    # polled 2.5 to 2.75 s after submission, then every 5 to 5.5 s
    assert result.polls == 2
    assert 1.5 <= result.delays[0] <= 2.25


def test_a_job_that_never_ends_is_polled_until_its_deadline_and_has_no_delay() -> None:
    result = simulate([TraceJob(0.0, None)], Pace("fixed", 0.5, 3.0), deadline_for=lambda kind: 60.0)

    assert 11 <= result.polls <= 14
    assert result.delays == []


@pytest.mark.parametrize("policy", POLICIES)
def test_every_job_is_seen_after_it_is_ready(policy: Policy) -> None:
    result = simulate(lognormal(300), Pace(policy, 0.5, 3.0), deadline_for=hour)

    assert result.jobs == len(result.delays) == 300
    assert min(result.delays) >= 0.0
    assert result.polls >= 300


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_the_rate_limit(policy: Policy) -> None:
    trace = lognormal(400, apart=0.1)
    result = simulate(trace, Pace(policy, 0.05, 0.0), deadline_for=hour, rps=20.0)

    last = max(job.submitted + (job.duration or 0.0) for job in trace)
    assert len(result.delays) == 400
    assert result.polls <= 20.0 * (last + max(result.delays) + 1) + 4


def test_the_result_depends_only_on_the_seed() -> None:
    runs = [simulate(lognormal(200), Pace("learned", 0.5, 3.0), deadline_for=hour, seed=seed) for seed in (0, 0, 1)]

    assert runs[0] == runs[1]
    assert runs[0].delays != runs[2].delays


def test_learning_beats_exponential_backoff_with_the_same_number_of_requests() -> None:
    trace = lognormal(1_500)
    backing_off = simulate(trace, Pace("exponential", 0.5, 0.0), deadline_for=hour)
    learned = min(
        (simulate(trace, Pace("learned", price, 0.0), deadline_for=hour) for price in (0.1, 0.15, 0.2, 0.3)),
        key=lambda result: abs(result.polls - backing_off.polls),
    )

    assert learned.polls <= backing_off.polls * 1.1
    assert mean(learned) < mean(backing_off) / 1.8


def test_urgent_jobs_come_first_when_requests_are_scarce() -> None:
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


def test_given_one_slot_then_each_order_starts_when_the_end_of_the_one_before_is_seen() -> None:
    trace = [TraceJob(float(number), 6.0) for number in range(5)]
    result = simulate(trace, Pace("fixed", 0.5, 3.0), deadline_for=hour, slots=1)

    expected, free = [], 0.0
    for job, delay in zip(trace, result.delays, strict=True):
        started = max(free, job.submitted)
        expected.append(started - job.submitted)
        free = started + 6.0 + delay
    assert result.waits == pytest.approx(expected)


def test_given_enough_slots_then_nothing_waits_and_everything_else_is_the_same() -> None:
    trace, pace = lognormal(300), Pace("learned", 0.5, 3.0)
    unlimited, limited = simulate(trace, pace, deadline_for=hour), simulate(trace, pace, deadline_for=hour, slots=300)

    assert unlimited.waits == []
    assert limited.waits == [0.0] * 300
    assert (limited.polls, limited.delays) == (unlimited.polls, unlimited.delays)


def test_given_few_slots_then_never_more_jobs_are_at_the_api_and_all_of_them_end() -> None:
    trace = lognormal(400, apart=0.2)
    result = simulate(trace, Pace("learned", 0.5, 0.0), deadline_for=hour, rps=20.0, slots=5)

    assert len(result.waits) == len(result.delays) == 400
    busy = sum(job.duration or 0.0 for job in trace) + sum(result.delays)
    last_start = max(job.submitted + wait for job, wait in zip(trace, result.waits, strict=True))
    assert busy / 5 <= last_start + 60.0 <= busy / 5 * 1.1 + 60.0


def test_a_job_that_never_ends_keeps_its_slot_until_its_deadline() -> None:
    trace = [TraceJob(0.0, None), TraceJob(0.0, 6.0)]
    result = simulate(trace, Pace("fixed", 0.5, 3.0), deadline_for=lambda kind: 60.0, slots=1)

    assert 60.0 <= result.waits[1] <= 66.0
    assert len(result.delays) == 1


def test_polls_are_worth_more_while_orders_wait_for_a_slot() -> None:
    burst = [TraceJob(0.0, job.duration) for job in lognormal(300)]
    apart = [TraceJob(number * 100.0, job.duration) for number, job in enumerate(lognormal(300))]
    pace = Pace("learned", 0.5, 0.0)

    waiting, alone = (simulate(trace, pace, deadline_for=hour, slots=2) for trace in (burst, apart))

    assert mean(waiting) < mean(alone) / 2


def test_quantiles_use_the_nearest_rank() -> None:
    assert [quantile([1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.25, 0.26, 0.5, 0.95, 1.0)] == [1, 1, 2, 2, 4, 4]
    assert quantile([], 0.5) == 0.0
