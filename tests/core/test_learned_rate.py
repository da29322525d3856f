"""Request slots and rates: evenly spaced, never above the rate, and slower after a rate limit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.learned_rate import (
    AHEAD_SECONDS,
    MIN_RATE,
    RECOVERY_SECONDS,
    burst,
    current_rate,
    learned_ceiling,
    reserve_slots,
)

RATES = st.floats(0.2, 5_000)


@given(rate=RATES, asks=st.lists(st.tuples(st.floats(0, 2), st.integers(1, 200)), max_size=40))
def test_no_period_has_more_slots_than_rate_and_burst(rate: float, asks: list[tuple[float, int]]) -> None:
    """For any sequence of reservations."""
    now, free = 1_000.0, 0.0
    moments: list[float] = []
    for pause, requested in asks:
        now += pause
        reserved = reserve_slots(free, now, rate=rate, requested=requested)
        assert reserved.count <= requested
        assert reserved.wait >= 0
        free = reserved.free
        moments += [max(now, now + reserved.first + index * reserved.step) for index in range(reserved.count)]
    assert moments == sorted(moments)
    assert all(moment <= now + AHEAD_SECONDS + 1e-3 for moment in moments)
    # The number of slots between two slots is the difference of their indices plus one. Of all periods that end at a
    # slot, the fullest starts where index - rate * slot is lowest.
    lowest = float("inf")
    for number, moment in enumerate(moments):
        lead = number - rate * moment
        lowest = min(lowest, lead)
        assert lead - lowest + 1 <= rate * 1e-3 + burst(rate) + 2


@given(rate=RATES)
def test_repeated_reservations_get_the_full_rate(rate: float) -> None:
    """The full rate is used if slots are reserved at least twice per tenth of a second."""
    now, free, count = 1_000.0, 0.0, 0
    for _ in range(400):
        reserved = reserve_slots(free, now, rate=rate, requested=1_000)
        free, count, now = reserved.free, count + reserved.count, now + 0.05
    assert count >= int(rate * 20)


@given(full=RATES, ceiling=st.one_of(st.none(), RATES), age=st.floats(-100, 1e7))
def test_the_rate_is_positive_and_never_above_the_configured_rate(
    full: float, ceiling: float | None, age: float
) -> None:
    """For any history."""
    rate = current_rate(full, ceiling, age)
    assert min(full, MIN_RATE) <= rate <= full


@given(ceiling=RATES, age=st.floats(0, 1e4), later=st.floats(0, 1e4))
def test_the_rate_only_grows_between_two_rate_limits(ceiling: float, age: float, later: float) -> None:
    """So a wrong ceiling is corrected."""
    assert current_rate(1e6, ceiling, age) <= current_rate(1e6, ceiling, age + later) + 1e-9


def test_the_rate_is_halved_recovers_to_the_ceiling_and_then_exceeds_it() -> None:
    """Half of the ceiling at once, just below it after a minute, and far above it without another rate limit."""
    at = [current_rate(1_000.0, 100.0, RECOVERY_SECONDS * minutes) for minutes in (0, 1, 2, 4)]
    assert at == [pytest.approx(47.5), pytest.approx(95), pytest.approx(142.5), 1_000.0]


def test_an_account_without_rate_limits_has_the_configured_rate() -> None:
    """The same is true for an account whose ceiling is higher."""
    assert current_rate(10.0, None, 0.0) == 10.0
    assert current_rate(10.0, 500.0, 0.0) == 10.0


@given(rate=RATES, measured=st.floats(0, 1e5))
def test_the_ceiling_is_the_measured_rate_within_bounds(rate: float, measured: float) -> None:
    """It is never above the refused rate and never less than a tenth of it."""
    assert max(rate / 10, MIN_RATE) - 1e-9 <= learned_ceiling(rate, measured) <= max(rate, MIN_RATE)


@pytest.mark.parametrize("limit", [3.0, 20.0, 150.0])
def test_an_unknown_limit_is_learned_and_rarely_exceeded_again(limit: float) -> None:
    """Simulate an API that accepts `limit` requests in any second, with a controlled clock."""
    full, ceiling, cut_at, now = 200.0, None, 0.0, 0.0
    free, accepted, refused = 0.0, list[float](), list[float]()
    while now < 300:
        rate = current_rate(full, ceiling, now - cut_at)
        grant = reserve_slots(free, now, rate=rate, requested=200)
        free = grant.free
        for index in range(grant.count):
            moment = now + max(0.0, grant.first + index * grant.step)
            recent = [at for at in accepted[-400:] if at > moment - 1]
            if len(recent) < limit:
                accepted.append(moment)
                continue
            refused.append(moment)
            ceiling, cut_at = learned_ceiling(rate, float(len(recent))), moment + 2
            now = cut_at
            break
        now += 0.02
    late = [at for at in refused if at > 60]
    assert len(late) < 0.03 * len([at for at in accepted if at > 60])
    assert len([at for at in accepted if at > 60]) > 0.5 * limit * 240
