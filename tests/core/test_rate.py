"""Moments and rates: evenly spaced, never ahead of the rate, and slower after a rate limit for as long as needed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.rate import (
    AHEAD_SECONDS,
    LEAST_RATE,
    RECOVERY_SECONDS,
    burst,
    current_rate,
    learned_ceiling,
    reserve_slots,
)

RATES = st.floats(0.2, 5_000)


@given(rate=RATES, asks=st.lists(st.tuples(st.floats(0, 2), st.integers(1, 200)), max_size=40))
def test_no_window_holds_more_moments_than_rate_and_burst(rate: float, asks: list[tuple[float, int]]) -> None:
    """Whoever asks when and for how many."""
    now, free = 1_000.0, 0.0
    moments: list[float] = []
    for pause, wanted in asks:
        now += pause
        taken = reserve_slots(free, now, rate=rate, requested=wanted)
        assert taken.count <= wanted
        assert taken.wait >= 0
        free = taken.free
        moments += [max(now, now + taken.first + index * taken.step) for index in range(taken.count)]
    assert moments == sorted(moments)
    assert all(moment <= now + AHEAD_SECONDS + 1e-3 for moment in moments)
    # A window from one moment to a later one holds as many as their numbers differ, and one. Of all windows that end at
    # a moment the fullest begins where number - rate * moment was lowest.
    lowest = float("inf")
    for number, moment in enumerate(moments):
        lead = number - rate * moment
        lowest = min(lowest, lead)
        assert lead - lowest + 1 <= rate * 1e-3 + burst(rate) + 2


@given(rate=RATES)
def test_who_asks_again_and_again_gets_the_whole_rate(rate: float) -> None:
    """Nothing of the budget is lost as long as somebody looks twice in a tenth of a second."""
    now, free, count = 1_000.0, 0.0, 0
    for _ in range(400):
        taken = reserve_slots(free, now, rate=rate, requested=1_000)
        free, count, now = taken.free, count + taken.count, now + 0.05
    assert count >= int(rate * 20)


@given(full=RATES, ceiling=st.one_of(st.none(), RATES), age=st.floats(-100, 1e7))
def test_the_rate_is_never_above_the_configured_one_nor_nothing(full: float, ceiling: float | None, age: float) -> None:
    """For any history."""
    rate = current_rate(full, ceiling, age)
    assert min(full, LEAST_RATE) <= rate <= full


@given(ceiling=RATES, age=st.floats(0, 1e4), later=st.floats(0, 1e4))
def test_the_rate_only_grows_between_two_limits(ceiling: float, age: float, later: float) -> None:
    """So whatever was learned wrongly is forgotten."""
    assert current_rate(1e6, ceiling, age) <= current_rate(1e6, ceiling, age + later) + 1e-9


def test_the_rate_halves_comes_back_below_the_ceiling_and_then_looks_beyond_it() -> None:
    """Half at once, just below it after a minute, and far beyond if nothing happens."""
    at = [current_rate(1_000.0, 100.0, RECOVERY_SECONDS * minutes) for minutes in (0, 1, 2, 4)]
    assert at == [pytest.approx(47.5), pytest.approx(95), pytest.approx(142.5), 1_000.0]


def test_an_account_that_was_never_limited_has_the_configured_rate() -> None:
    """And one whose limit is above it, too."""
    assert current_rate(10.0, None, 0.0) == 10.0
    assert current_rate(10.0, 500.0, 0.0) == 10.0


@given(rate=RATES, seen=st.floats(0, 1e5))
def test_a_ceiling_is_what_was_seen_within_bounds(rate: float, seen: float) -> None:
    """Never above the rate at which it was found, never less than a tenth of it."""
    assert max(rate / 10, LEAST_RATE) - 1e-9 <= learned_ceiling(rate, seen) <= max(rate, LEAST_RATE)


@pytest.mark.parametrize("limit", [3.0, 20.0, 150.0])
def test_an_unannounced_limit_is_found_and_seldom_met_again(limit: float) -> None:
    """A minute of an API that takes `limit` requests in any second, played through on a clock of our own."""
    full, ceiling, cut_at, now = 200.0, None, 0.0, 0.0
    free, taken, refused = 0.0, list[float](), list[float]()
    while now < 300:
        rate = current_rate(full, ceiling, now - cut_at)
        grant = reserve_slots(free, now, rate=rate, requested=200)
        free = grant.free
        for index in range(grant.count):
            moment = now + max(0.0, grant.first + index * grant.step)
            recent = [at for at in taken[-400:] if at > moment - 1]
            if len(recent) < limit:
                taken.append(moment)
                continue
            refused.append(moment)
            ceiling, cut_at = learned_ceiling(rate, float(len(recent))), moment + 2
            now = cut_at
            break
        now += 0.02
    late = [at for at in refused if at > 60]
    assert len(late) < 0.03 * len([at for at in taken if at > 60])
    assert len([at for at in taken if at > 60]) > 0.5 * limit * 240
