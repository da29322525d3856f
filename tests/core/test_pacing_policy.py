"""When to poll next: bounds of every policy, the choice of the model, urgency, snapshots and merging."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.odds import next_age, odds
from worker.core.pacing.policy import (
    AT_DEADLINE,
    DEFAULT_FIRST_AGE,
    EXPONENTIAL_FIRST,
    MAX_EXPONENTIAL_WAIT,
    MAX_SIMPLE_WAIT,
    MAX_WAIT,
    NOTHING_KNOWN,
    POLICIES,
    Pace,
    PacedJob,
    PaceModel,
    Policy,
    urgency,
)

ANY_NUMBER = st.floats() | st.integers(-(10**30), 10**30).map(float)
SPREADS = st.floats(0, 1)


def waits(policy: Policy, *, age: float, eta: float | None = None, polls: int = 1, price: float = 0.5) -> float:
    """Return the wait for a job that was not ready at `age`."""
    return Pace(policy, price, 3.0).next(PacedJob(age, age, eta, 0.0, polls), NOTHING_KNOWN, spread=0.0).wait


@pytest.mark.parametrize(
    ("eta", "first"),
    [
        (None, DEFAULT_FIRST_AGE),
        (0.25, 2.0),  # the minimum is 2 s
        (13.07, 13.07),
        (60.0, 60.0),
        (960.0, 60.0),  # the maximum is one minute
        (math.inf, DEFAULT_FIRST_AGE),
        (math.nan, DEFAULT_FIRST_AGE),
        (-5.0, DEFAULT_FIRST_AGE),
    ],
)
@pytest.mark.parametrize("policy", ["fixed", "eta"])
def test_simple_policies_poll_first_at_the_eta_within_bounds(policy: Policy, eta: float | None, first: float) -> None:
    pace = Pace(policy, 0.5, 3.0)

    assert pace.first(PacedJob(0.0, eta=eta), NOTHING_KNOWN, spread=0.0).wait == pytest.approx(first)
    assert pace.first(PacedJob(0.0, eta=eta), NOTHING_KNOWN, spread=1.0).wait == pytest.approx(first * 1.1)


def test_the_learned_policy_polls_first_at_its_odds_but_not_at_once() -> None:
    model = model_of(8.0, spread=0.2)

    assert Pace("learned", 0.5, 3.0).first(PacedJob(0.0), NOTHING_KNOWN, spread=0.5).wait == pytest.approx(1.0)
    assert Pace("learned", 0.5, 0.0).first(PacedJob(0.0), NOTHING_KNOWN, spread=0.5).wait < 1.0
    assert 5.0 < Pace("learned", 0.5, 3.0).first(PacedJob(0.0), model, spread=0.5).wait < 8.0
    assert Pace("learned", 0.5, 3.0).first(PacedJob(0.4), NOTHING_KNOWN, spread=0.5).wait == pytest.approx(0.6)
    assert Pace("learned", 0.5, 3.0).first(PacedJob(12.0), model, spread=0.5).wait == 0.0


@pytest.mark.parametrize(
    ("polls", "wait"), [(0, 3.0), (3, 3.375), (5, 7.59375), (100, MAX_EXPONENTIAL_WAIT), (10**9, MAX_EXPONENTIAL_WAIT)]
)
def test_the_exponential_policy_grows_by_a_half_each_time(polls: int, wait: float) -> None:
    assert waits("exponential", age=5.0, polls=polls) == pytest.approx(wait)


def test_the_exponential_policy_starts_after_one_second() -> None:
    assert Pace("exponential", 0.5, 3.0).first(PacedJob(0.0), NOTHING_KNOWN, spread=0.0).wait == EXPONENTIAL_FIRST


@pytest.mark.parametrize(
    ("age", "eta", "wait"),
    [(10.0, 40.0, 30.0), (40.0, 40.0, 10.0), (60.0, 8.0, 3.0), (60.0, None, 3.0), (0.0, 9_999.0, MAX_SIMPLE_WAIT)],
)
def test_the_eta_policy_waits_for_the_eta_and_then_polls_by_quarters(
    age: float, eta: float | None, wait: float
) -> None:
    assert waits("eta", age=age, eta=eta) == pytest.approx(wait)


def test_the_fixed_policy_is_fixed() -> None:
    assert {waits("fixed", age=age, polls=polls) for age in (0.0, 9e9) for polls in (0, 99)} == {5.0}


@given(
    st.sampled_from(POLICIES),
    ANY_NUMBER,
    ANY_NUMBER,
    st.none() | ANY_NUMBER,
    ANY_NUMBER,
    st.integers(-5, 10**9),
    st.floats(0.001, 1e9),
    st.sampled_from([0.0, 3.0, 20.0, 1_000.0]),
    SPREADS,
)
def test_every_plan_has_values_within_bounds(
    policy: Policy,
    age: float,
    not_ready_age: float,
    eta: float | None,
    eta_age: float,
    polls: int,
    price: float,
    min_wait: float,
    spread: float,
) -> None:
    pace, model = Pace(policy, price, min_wait), PaceModel()
    job = PacedJob(age, not_ready_age, eta, eta_age, polls)

    for ready in (False, True, False):
        model.observe(job, ready, planned=not_ready_age)
        plan = pace.next(job, model, spread=spread)
        first = pace.first(job, model, spread=spread)

        assert min_wait <= plan.wait <= max(min_wait, MAX_WAIT) * 1.1
        assert 0.0 <= first.wait <= max(66.0, MAX_WAIT * 1.1)
        assert math.isfinite(urgency(10.0, plan.scale, plan.growth))
    assert json.loads(json.dumps(model.snapshot(), allow_nan=False))


@given(st.sampled_from(POLICIES), st.floats(0, 1e6), SPREADS, SPREADS)
def test_the_spread_moves_a_poll_by_at_most_ten_percent(
    policy: Policy, age: float, first_spread: float, second_spread: float
) -> None:
    low, high = sorted((first_spread, second_spread))
    pace, job = Pace(policy, 0.5, 3.0), PacedJob(age, age, None, 0.0, 3)
    bare = pace.next(job, NOTHING_KNOWN, spread=0.0).wait

    sooner, later = (pace.next(job, NOTHING_KNOWN, spread=spread).wait for spread in (low, high))

    assert bare <= sooner <= later <= bare * 1.106 + 1e-9


@given(st.floats(0.01, 1e3), st.floats(1.0, 50.0), st.floats(0, 1e4))
def test_a_higher_price_means_a_later_poll(price: float, factor: float, age: float) -> None:
    job, model = PacedJob(age, age), model_of(20.0, spread=0.5)

    cheap, dear = (Pace("learned", c, 0.0).next(job, model, spread=0.5).wait for c in (price, price * factor))

    assert cheap <= dear * (1 + 1e-9)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_wait_ends_long_after_the_deadline(policy: Policy) -> None:
    pace = Pace(policy, 100.0, 3.0)

    assert (
        pace.next(PacedJob(3_590.0, 3_590.0, 4_000.0, seconds_left=4.0), NOTHING_KNOWN, spread=0.0).wait
        <= 4.0 + AT_DEADLINE
    )
    assert pace.next(PacedJob(3_590.0, 3_590.0, seconds_left=1.0), NOTHING_KNOWN, spread=0.0).wait == 3.0
    assert pace.next(PacedJob(3_700.0, 3_700.0, seconds_left=-100.0, polls=9), NOTHING_KNOWN, spread=0.0).wait >= 3.0


def test_an_answer_without_information_does_not_change_the_odds() -> None:
    job = PacedJob(20.0, 10.0)  # polled at 20 s without an answer about the job; last seen not ready at 10 s
    plan = Pace("learned", 0.5, 3.0).next(job, NOTHING_KNOWN, spread=0.5)

    assert plan.wait == 3.0
    assert plan.scale == pytest.approx(next_age(NOTHING_KNOWN.by_age, 10.0, 0.5) - 10.0)


# ── urgency ───────── ─────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.floats(0.5, 300.0), st.floats(0.5, 300.0), st.floats(1.1, 6.0))
@settings(max_examples=60)
def test_the_urgency_approximates_the_odds(first_age: float, second_age: float, times: float) -> None:
    model = model_of(20.0, spread=0.6)
    pace = Pace("learned", 0.5, 0.0)
    for age in (first_age, second_age):
        plan = pace.next(PacedJob(age, age), model, spread=0.5)
        assert plan.scale is not None
        unseen = plan.scale * times
        log_odds = math.log(odds(model.by_age, age, age + unseen) / 0.5)
        assert urgency(unseen, plan.scale, plan.growth) == pytest.approx(log_odds, abs=max(0.6, 0.35 * log_odds))


def test_a_job_that_is_about_to_end_comes_before_one_that_rarely_ends() -> None:
    pictures, trainings = model_of(8.0, spread=0.3), model_of(1_500.0, spread=0.3)
    pace = Pace("learned", 0.5, 0.0)
    picture = pace.next(PacedJob(7.0, 7.0), pictures, spread=0.5)
    training = pace.next(PacedJob(60.0, 60.0), trainings, spread=0.5)

    assert urgency(2.0, picture.scale, picture.growth) > urgency(20.0, training.scale, training.growth)


# ── two models ────────────────────────────────────────────────────────────────────────────────────────────────────────


def model_of(median: float, *, spread: float, eta: float | None = None, jobs: int = 200, seed: int = 3) -> PaceModel:
    """Return a model that has learned such durations. With `eta`, the eta of a job is this multiple of its duration."""
    model, draw = PaceModel(), random.Random(seed)
    for _ in range(jobs):
        duration = median * math.exp(draw.gauss(0, spread))
        job_eta = None if eta is None else duration * eta
        not_ready_age = 0.0
        while not_ready_age < duration:
            age = model.due(PacedJob(not_ready_age, not_ready_age, job_eta), 0.5)[0]
            model.observe(PacedJob(age, not_ready_age, job_eta), age >= duration)
            not_ready_age = age
    return model


@pytest.mark.parametrize("bias", [0.5, 1.0, 3.0])
def test_an_eta_with_a_constant_error_is_as_good_as_a_correct_one(bias: float) -> None:
    model = model_of(20.0, spread=1.0, eta=bias)

    assert model.lead > 0
    for duration in (10.0, 60.0):
        due, _ = model.due(PacedJob(0.0, eta=duration * bias), 0.5)
        assert due == pytest.approx(duration, rel=0.35)


def test_an_eta_without_information_is_not_used() -> None:
    model, draw = PaceModel(), random.Random(4)
    for _ in range(300):
        duration, eta = 20.0 * math.exp(draw.gauss(0, 0.4)), 20.0 * math.exp(draw.gauss(0, 1.5))
        not_ready_age = 0.0
        while not_ready_age < duration:
            age = model.due(PacedJob(not_ready_age, not_ready_age, eta), 0.5)[0]
            model.observe(PacedJob(age, not_ready_age, eta), age >= duration)
            not_ready_age = age

    assert model.lead < 0


def test_a_later_eta_counts_from_its_arrival() -> None:
    model = model_of(20.0, spread=1.0, eta=1.0)

    early, _ = model.due(PacedJob(0.0, eta=30.0), 0.5)
    late, _ = model.due(PacedJob(100.0, 100.0, eta=30.0, eta_age=100.0), 0.5)

    assert late == pytest.approx(100.0 + early)


# ── storing and merging ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_survives_a_snapshot() -> None:
    model = model_of(20.0, spread=0.6, eta=2.0)
    text = json.dumps(model.snapshot())

    again = PaceModel.restored(json.loads(text), PaceModel())

    assert len(text) < 4_000
    assert again.lead == pytest.approx(model.lead, rel=1e-3)
    for job in (PacedJob(5.0, 5.0), PacedJob(5.0, 5.0, 40.0)):
        assert again.due(job, 0.5) == pytest.approx(model.due(job, 0.5), rel=0.02)
    with pytest.raises((KeyError, TypeError, ValueError)):
        PaceModel.restored({"age": {}, "eta": {}, "lead": 0, "record": []}, PaceModel())


def test_a_new_kind_starts_from_the_model_of_its_account() -> None:
    account = PaceModel()
    for _ in range(50):
        account.note(PacedJob(42.0, 38.0))

    fresh = PaceModel.after(account)

    assert fresh.quantile(PacedJob(0.0), 0.5) == pytest.approx(40.0, rel=0.3)
    assert PaceModel().quantile(PacedJob(0.0), 0.5) < 5.0


def test_predictions_and_results_are_counted() -> None:
    model = model_of(20.0, spread=0.4, jobs=400)

    assert model.polls > 50
    assert model.found_ready == pytest.approx(model.expected_ready, rel=0.25)
    assert 0.3 < model.actual_delay < 5.0
    assert model.planned_delay == pytest.approx(model.actual_delay, rel=0.05)  # every request was made as planned
