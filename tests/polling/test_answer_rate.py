"""The rate of answers: how long a batch waits for more of them, and how many jobs are claimed ahead."""

import pytest

from tests.polling.clocks import Clock
from worker.polling import answer_rate
from worker.polling.answer_rate import AHEAD_SECONDS, GATHER_SECONDS, AnswerRate

NO_LIMIT = 1e9  # a budget of requests per second that never decides


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which answers are counted."""
    clock = Clock()
    monkeypatch.setattr(answer_rate, "time", clock)
    return clock


def steady_rate(clock: Clock, per_second: float) -> AnswerRate:
    """Return the rate after a long time with this many answers per second."""
    rate = AnswerRate()
    for _ in range(100):
        clock.now += 1.0
        rate.count(int(per_second))
    return rate


def test_given_no_answers_yet_then_batches_are_small_and_no_job_is_claimed_ahead(clock: Clock) -> None:
    rate = AnswerRate()

    assert rate.gather_seconds == GATHER_SECONDS
    assert rate.ahead(NO_LIMIT) == 0


@pytest.mark.parametrize(("per_second", "seconds"), [(100, 0.05), (300, 0.15), (2_000, 0.075), (6_000, 0.05)])
def test_given_more_answers_per_second_then_a_batch_waits_for_150_of_them_within_its_limits(
    clock: Clock, per_second: float, seconds: float
) -> None:
    assert steady_rate(clock, per_second).gather_seconds == pytest.approx(seconds, rel=1e-3)


def test_given_a_large_budget_then_as_many_jobs_are_claimed_ahead_as_are_answered_in_a_third_of_a_second(
    clock: Clock,
) -> None:
    assert steady_rate(clock, 1_000).ahead(NO_LIMIT) == pytest.approx(1_000 * AHEAD_SECONDS, abs=1)


def test_given_a_small_budget_then_only_a_share_of_it_is_claimed_ahead(clock: Clock) -> None:
    """A stalled API could get all of these requests at once."""
    assert steady_rate(clock, 1_000).ahead(200.0) == 10


def test_given_a_burst_of_answers_then_a_single_batch_changes_the_rate_by_a_quarter(clock: Clock) -> None:
    """Answers of the same moment count as those of the shortest batch."""
    rate = AnswerRate()

    rate.count(100)

    assert rate.ahead(NO_LIMIT) == 100 / GATHER_SECONDS / 4 * AHEAD_SECONDS


def test_given_a_pause_then_the_rate_falls_with_each_look(clock: Clock) -> None:
    rate = steady_rate(clock, 1_000)
    clock.now += 10.0

    rate.count(0)

    assert rate.ahead(NO_LIMIT) == pytest.approx(0.75 * 1_000 * AHEAD_SECONDS, abs=1)
