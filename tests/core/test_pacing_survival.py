"""What polls teach about how long jobs take: the odds are right, learning finds the truth, and nothing can break it."""

import json
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.core.pacing.survival import BUCKETS, EDGES, OLDEST, LogDurationStats, SurvivalModel, bucket

AGES = st.floats(0, 1e6)
PRICES = st.floats(1e-4, 1e4)
ANSWERS = st.lists(st.tuples(AGES, st.floats(1e-3, 1e5), st.booleans()), max_size=40)


def taught(answers: list[tuple[float, float, bool]]) -> SurvivalModel:
    """A clock that was given these answers: seen at an age, asked so much later, ready or not."""
    clock = SurvivalModel()
    for seen, later, ready in answers:
        clock.observe(seen, seen + later, ready)
    return clock


def asked_until_ready(clock: SurvivalModel, duration: float, price: float = 0.5) -> list[float]:
    """The ages at which a job of this duration is asked about; the clock learns from it."""
    seen, ages = 0.0, list[float]()
    while not ages or ages[-1] < duration:
        ages.append(clock.next_age(seen, price))
        clock.observe(seen, ages[-1], ages[-1] >= duration)
        seen = ages[-1]
    return ages


def test_every_age_falls_into_one_bucket() -> None:
    assert [bucket(edge) for edge in EDGES] == list(range(BUCKETS))
    assert [bucket(math.nextafter(edge, 0)) for edge in EDGES[1:]] == list(range(BUCKETS - 1))


def test_where_nothing_is_known_waits_grow_with_the_root_of_age_and_price() -> None:
    clock = SurvivalModel()

    for age, price in ((16.0, 0.5), (100.0, 0.5), (100.0, 2.0), (3_600.0, 0.5)):
        # I(x, y) = (y - x)² / 2x for the hazard 1/t
        assert clock.next_age(age, price) - age == pytest.approx(math.sqrt(2 * price * age), rel=0.12)


@given(ANSWERS, AGES, PRICES)
def test_the_odds_at_the_next_age_are_the_price(
    answers: list[tuple[float, float, bool]], seen: float, price: float
) -> None:
    clock = taught(answers)

    age = clock.next_age(seen, price)

    assert seen <= age <= max(OLDEST, seen)
    if age < OLDEST and age - seen > 1e-6 * max(age, 1.0):
        assert clock.odds(seen, age) == pytest.approx(price, rel=0.02)


@given(ANSWERS, AGES, st.lists(PRICES, min_size=1, max_size=5))
def test_a_higher_price_never_means_sooner_and_one_walk_finds_what_many_find(
    answers: list[tuple[float, float, bool]], seen: float, prices: list[float]
) -> None:
    clock, rising = taught(answers), sorted(prices)

    ages = clock.next_ages(seen, rising)

    assert all(later >= sooner * (1 - 1e-9) for sooner, later in pairwise(ages))  # as far as numbers go
    assert ages == pytest.approx([clock.next_age(seen, price) for price in rising])


@given(ANSWERS, AGES, st.floats(0, 1e5), st.floats(0, 1e5))
def test_odds_and_chances_only_grow_with_age(
    answers: list[tuple[float, float, bool]], seen: float, one: float, other: float
) -> None:
    clock = taught(answers)
    sooner, later = sorted((seen + one, seen + other))

    assert clock.odds(seen, sooner) <= clock.odds(seen, later) * (1 + 1e-9) + 1e-9
    assert 0.0 <= clock.chance(seen, sooner) <= clock.chance(seen, later) + 1e-12 <= 1.0 + 1e-12


@given(ANSWERS, AGES, st.floats(0.01, 0.99))
def test_a_quantile_is_the_age_of_its_chance(
    answers: list[tuple[float, float, bool]], seen: float, share: float
) -> None:
    clock = taught(answers)

    age = clock.quantile(seen, share)

    assert age >= seen
    if age - seen > 1e-6 * max(age, 1.0) and not math.isinf(age):
        assert clock.chance(seen, age) == pytest.approx(share, rel=1e-3)


@given(ANSWERS)
@settings(max_examples=50)
def test_whatever_was_learned_all_numbers_stay_numbers(answers: list[tuple[float, float, bool]]) -> None:
    clock = taught(answers)

    assert all(0 <= value < math.inf for value in (*clock.ended, *clock.time, clock.delay))
    assert all(0 < clock.hazard(at) < math.inf for at in range(BUCKETS))


@given(st.floats(1e-3, 1e4), st.floats(1e-3, 1e4), st.booleans())
def test_how_likely_an_answer_was_is_never_more_than_certain(seen: float, later: float, ready: bool) -> None:
    assert SurvivalModel().observe(seen, seen + later, ready) <= 0.0


def test_jobs_of_one_duration_are_soon_found_where_they_are() -> None:
    clock, draw = SurvivalModel(), random.Random(1)
    for _ in range(300):
        asked_until_ready(clock, 8.0 * math.exp(draw.gauss(0, 0.3)))

    assert clock.quantile(0.0, 0.5) == pytest.approx(8.0, rel=0.12)
    assert clock.quantile(0.0, 0.9) == pytest.approx(8.0 * math.exp(0.3 * 1.2816), rel=0.2)
    assert clock.chance(0.0, 3.0) < 0.05


def test_a_change_is_followed_within_a_few_dozen_jobs() -> None:
    clock = SurvivalModel()
    for _ in range(200):
        asked_until_ready(clock, 8.0)
    for _ in range(100):
        asked_until_ready(clock, 40.0)

    assert clock.quantile(0.0, 0.75) == pytest.approx(40.0, rel=0.25)


def test_jobs_that_never_end_are_asked_about_ever_less_often() -> None:
    clock = SurvivalModel()
    for _ in range(200):
        asked_until_ready(clock, 8.0)
    ages = [0.0]
    while ages[-1] < 3_600.0:
        ages.append(clock.next_age(ages[-1], 0.5))
        clock.observe(ages[-2], ages[-1], False)
    late = [later - sooner for sooner, later in pairwise(ages) if sooner > 60.0]

    fives = [sum(late[start : start + 5]) for start in range(0, len(late) - 4, 5)]
    assert len(fives) > 1
    assert fives == sorted(fives)
    assert fives[-1] > 3 * fives[0]
    assert len(late) < 30


def test_the_delay_of_a_job_is_told_from_the_interval_alone() -> None:
    clock = SurvivalModel(LogDurationStats(50.0, math.log(10.0), 0.2))
    clock.observe(8.0, 12.0, True)

    assert 1.0 < clock.delay < 3.0
    assert clock.delay_at(8.0, 12.0) == pytest.approx(clock.delay, rel=0.3)
    assert clock.delay_at(8.0, 8.0) == 0.0


# ── keeping and sharing ───────────────────────────────────────────────────────────────────────────────────────────────


@given(ANSWERS)
@settings(max_examples=50)
def test_what_is_written_down_is_what_is_known(answers: list[tuple[float, float, bool]]) -> None:
    clock = taught(answers)
    text = json.dumps(clock.snapshot())

    again = SurvivalModel.restored(json.loads(text), LogDurationStats())

    assert len(text) < 2_000
    for age in (1.0, 8.0, 60.0, 500.0):
        assert again.chance(0.0, age) == pytest.approx(clock.chance(0.0, age), abs=0.02)
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
def test_what_is_no_snapshot_is_refused(snapshot: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        SurvivalModel.restored(snapshot, LogDurationStats())


def test_two_that_learn_side_by_side_know_together_what_one_alone_would() -> None:
    draw = random.Random(2)
    durations = [8.0 * math.exp(draw.gauss(0, 0.4)) for _ in range(200)]
    alone = SurvivalModel()
    for duration in durations:
        asked_until_ready(alone, duration)
    shared = SurvivalModel()
    for start in range(0, 200, 20):
        both = [SurvivalModel.restored(shared.snapshot(), LogDurationStats()) for _ in range(2)]
        for number, duration in enumerate(durations[start : start + 20]):
            asked_until_ready(both[number % 2], duration)
        for one in both:
            one.merge_into(shared)
        shared.mark()

    assert shared.moments.count == alone.moments.count == 200
    assert shared.moments.mean == pytest.approx(alone.moments.mean, abs=0.1)
    for share in (0.25, 0.5, 0.75):
        assert shared.quantile(0.0, share) == pytest.approx(alone.quantile(0.0, share), rel=0.12)
