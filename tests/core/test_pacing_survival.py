"""The survival model: the odds are correct, true durations are learned, and no input breaks it."""

import json
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.odds import next_age, odds
from worker.core.pacing.survival import BUCKETS, EDGES, MAX_POLL_AGE, LogDurationStats, SurvivalModel, bucket

AGES = st.floats(0, 1e6)
PRICES = st.floats(1e-4, 1e4)
ANSWERS = st.lists(st.tuples(AGES, st.floats(1e-3, 1e5), st.booleans()), max_size=40)


def model_after(answers: list[tuple[float, float, bool]]) -> SurvivalModel:
    """Return a model after these answers: (last seen not ready at, seconds until the poll, ready or not)."""
    model = SurvivalModel()
    for not_ready_age, later, ready in answers:
        model.observe(not_ready_age, not_ready_age + later, ready)
    return model


def poll_until_ready(model: SurvivalModel, duration: float, price: float = 0.5) -> list[float]:
    """Poll a job of this duration until it is ready. Return the ages of the polls. The model learns from them."""
    not_ready_age, ages = 0.0, list[float]()
    while not ages or ages[-1] < duration:
        ages.append(next_age(model, not_ready_age, price))
        model.observe(not_ready_age, ages[-1], ages[-1] >= duration)
        not_ready_age = ages[-1]
    return ages


def test_every_age_has_one_bucket() -> None:
    assert [bucket(edge) for edge in EDGES] == list(range(BUCKETS))
    assert [bucket(math.nextafter(edge, 0)) for edge in EDGES[1:]] == list(range(BUCKETS - 1))


def test_without_jobs_waits_grow_with_the_root_of_age_and_price() -> None:
    model = SurvivalModel()

    for age, price in ((16.0, 0.5), (100.0, 0.5), (100.0, 2.0), (3_600.0, 0.5)):
        # I(x, y) = (y - x)² / 2x for the hazard 1/t
        assert next_age(model, age, price) - age == pytest.approx(math.sqrt(2 * price * age), rel=0.12)


@given(ANSWERS, AGES, PRICES)
def test_the_odds_at_the_next_age_are_the_price(
    answers: list[tuple[float, float, bool]], not_ready_age: float, price: float
) -> None:
    model = model_after(answers)

    age = next_age(model, not_ready_age, price)

    assert not_ready_age <= age <= max(MAX_POLL_AGE, not_ready_age)
    if age < MAX_POLL_AGE and age - not_ready_age > 1e-6 * max(age, 1.0):
        assert odds(model, not_ready_age, age) == pytest.approx(price, rel=0.02)


@given(ANSWERS, AGES, st.lists(PRICES, min_size=1, max_size=5))
def test_a_higher_price_is_never_earlier_and_one_pass_equals_single_calls(
    answers: list[tuple[float, float, bool]], not_ready_age: float, prices: list[float]
) -> None:
    model, rising = model_after(answers), sorted(prices)

    ages = model.next_ages(not_ready_age, rising)

    assert all(later >= sooner * (1 - 1e-6) for sooner, later in pairwise(ages))  # Newton stops at steps of 1e-6
    assert ages == pytest.approx([next_age(model, not_ready_age, price) for price in rising])


@given(ANSWERS, AGES, st.floats(0, 1e5), st.floats(0, 1e5))
def test_odds_and_chances_only_grow_with_age(
    answers: list[tuple[float, float, bool]], not_ready_age: float, first_wait: float, second_wait: float
) -> None:
    model = model_after(answers)
    sooner, later = sorted((not_ready_age + first_wait, not_ready_age + second_wait))

    assert odds(model, not_ready_age, sooner) <= odds(model, not_ready_age, later) * (1 + 1e-9) + 1e-9
    assert 0.0 <= model.chance(not_ready_age, sooner) <= model.chance(not_ready_age, later) + 1e-12 <= 1.0 + 1e-12


@given(ANSWERS, AGES, st.floats(0.01, 0.99))
def test_a_quantile_is_the_age_of_its_chance(
    answers: list[tuple[float, float, bool]], not_ready_age: float, share: float
) -> None:
    model = model_after(answers)

    age = model.quantile(not_ready_age, share)

    assert age >= not_ready_age
    if age - not_ready_age > 1e-6 * max(age, 1.0) and not math.isinf(age):
        assert model.chance(not_ready_age, age) == pytest.approx(share, rel=1e-3)


@given(ANSWERS)
@settings(max_examples=50)
def test_all_results_are_finite_after_any_answers(answers: list[tuple[float, float, bool]]) -> None:
    model = model_after(answers)

    assert all(0 <= value < math.inf for value in (*model.ended, *model.time, model.delay))
    assert all(0 < model.hazard(at) < math.inf for at in range(BUCKETS))


@given(st.floats(1e-3, 1e4), st.floats(1e-3, 1e4), st.booleans())
def test_log_likelihoods_are_never_positive(not_ready_age: float, later: float, ready: bool) -> None:
    assert SurvivalModel().observe(not_ready_age, not_ready_age + later, ready) <= 0.0


def test_a_constant_duration_is_learned_quickly() -> None:
    model, draw = SurvivalModel(), random.Random(1)
    for _ in range(300):
        poll_until_ready(model, 8.0 * math.exp(draw.gauss(0, 0.3)))

    assert model.quantile(0.0, 0.5) == pytest.approx(8.0, rel=0.12)
    assert model.quantile(0.0, 0.9) == pytest.approx(8.0 * math.exp(0.3 * 1.2816), rel=0.2)
    assert model.chance(0.0, 3.0) < 0.05


def test_a_change_is_learned_within_a_few_dozen_jobs() -> None:
    model = SurvivalModel()
    for _ in range(200):
        poll_until_ready(model, 8.0)
    for _ in range(100):
        poll_until_ready(model, 40.0)

    assert model.quantile(0.0, 0.75) == pytest.approx(40.0, rel=0.25)


def test_jobs_that_never_end_are_polled_less_and_less_often() -> None:
    model = SurvivalModel()
    for _ in range(200):
        poll_until_ready(model, 8.0)
    ages = [0.0]
    while ages[-1] < 3_600.0:
        ages.append(next_age(model, ages[-1], 0.5))
        model.observe(ages[-2], ages[-1], False)
    late = [later - sooner for sooner, later in pairwise(ages) if sooner > 60.0]

    fives = [sum(late[start : start + 5]) for start in range(0, len(late) - 4, 5)]
    assert len(fives) > 1
    assert fives == sorted(fives)
    assert fives[-1] > 3 * fives[0]
    assert len(late) < 30


def test_the_delay_is_estimated_from_the_interval() -> None:
    model = SurvivalModel(LogDurationStats(50.0, math.log(10.0), 0.2))
    model.observe(8.0, 12.0, True)

    assert 1.0 < model.delay < 3.0
    assert model.delay_at(8.0, 12.0) == pytest.approx(model.delay, rel=0.3)
    assert model.delay_at(8.0, 8.0) == 0.0


# ── storing and merging ───────────────────────────────────────────────────────────────────────────────────────────────


@given(ANSWERS)
@settings(max_examples=50)
def test_a_snapshot_contains_the_whole_model(answers: list[tuple[float, float, bool]]) -> None:
    model = model_after(answers)
    text = json.dumps(model.snapshot())

    again = SurvivalModel.restored(json.loads(text), LogDurationStats())

    assert len(text) < 2_000
    for age in (1.0, 8.0, 60.0, 500.0):
        assert again.chance(0.0, age) == pytest.approx(model.chance(0.0, age), abs=0.02)
    assert json.dumps(again.snapshot()) == json.dumps(
        SurvivalModel.restored(again.snapshot(), LogDurationStats()).snapshot()
    )


@pytest.mark.parametrize(
    "snapshot",
    [
        {},
        {"jobs": [1, 2], "ended": [], "time": []},
        {"jobs": [1, 2, "x"], "ended": [], "time": []},
        {"jobs": [1, 2, 3], "ended": [0.0] * 99, "time": []},
        {"jobs": [1, 2, math.nan], "ended": [], "time": []},
        {"jobs": None, "ended": [], "time": []},
    ],
)
def test_invalid_snapshots_are_refused(snapshot: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        SurvivalModel.restored(snapshot, LogDurationStats())


def test_two_merged_models_equal_one_model_with_all_answers() -> None:
    draw = random.Random(2)
    durations = [8.0 * math.exp(draw.gauss(0, 0.4)) for _ in range(200)]
    alone = SurvivalModel()
    for duration in durations:
        poll_until_ready(alone, duration)
    shared = SurvivalModel()
    for start in range(0, 200, 20):
        both = [SurvivalModel.restored(shared.snapshot(), LogDurationStats()) for _ in range(2)]
        for number, duration in enumerate(durations[start : start + 20]):
            poll_until_ready(both[number % 2], duration)
        for model in both:
            model.merge_into(shared)
        shared.mark()

    assert shared.moments.count == alone.moments.count == 200
    assert shared.moments.mean == pytest.approx(alone.moments.mean, abs=0.1)
    for share in (0.25, 0.5, 0.75):
        assert shared.quantile(0.0, share) == pytest.approx(alone.quantile(0.0, share), rel=0.12)
