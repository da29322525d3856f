"""When to ask next: bounds for every policy, and the arithmetic of the default one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.pace import FIRST_UNKNOWN, WAIT_MOST, Pace, Policy, Waiting

POLICIES: tuple[Policy, ...] = ("learned", "fixed", "exponential", "eta")
ANY_NUMBER = st.floats() | st.integers(-(10**30), 10**30).map(float)
SPREADS = st.floats(0, 1)


def waits(policy: Policy, *, age: float, eta: float | None = None, polls: int = 1, price: float = 0.5) -> float:
    return Pace(policy, price, 3.0).next_poll(Waiting(age, eta, polls), spread=0.0)


@pytest.mark.parametrize(
    ("eta", "first"),
    [
        (None, FIRST_UNKNOWN),
        (0.25, 2.0),  # never sooner than 2 s
        (2.0, 2.0),
        (13.07, 13.07),
        (60.0, 60.0),
        (416.94, 60.0),  # an eta only places the first poll, and no later than after a minute
        (960.0, 60.0),
        (math.inf, 60.0),
        (math.nan, 2.0),
        (-5.0, 2.0),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_first_poll_is_at_the_eta_within_bounds(policy: Policy, eta: float | None, first: float) -> None:
    pace = Pace(policy, 0.5, 3.0)

    assert pace.first_poll(eta, spread=0.0) == pytest.approx(first)
    assert pace.first_poll(eta, spread=1.0) == pytest.approx(first * 1.1)


@pytest.mark.parametrize(
    ("age", "price", "wait"),
    [
        (16.0, 0.5, 4.0),  # √(2 · 0.5 · 16)
        (100.0, 0.5, 10.0),
        (100.0, 2.0, 20.0),  # four times the price, twice the wait
        (3_600.0, 0.5, 60.0),
        (4.0, 0.5, 3.0),  # √4 = 2 is less than the least
        (-50.0, 0.5, 3.0),  # a clock that went back
        (1e9, 0.5, WAIT_MOST),
    ],
)
def test_the_wait_grows_with_the_root_of_age_and_price(age: float, price: float, wait: float) -> None:
    assert waits("learned", age=age, price=price) == pytest.approx(wait)


@pytest.mark.parametrize(("polls", "wait"), [(1, 3.75), (2, 5.625), (5, 18.984375), (100, WAIT_MOST), (10**9, 300.0)])
def test_the_exponential_policy_grows_by_a_half_each_time(polls: int, wait: float) -> None:
    assert waits("exponential", age=5.0, polls=polls) == pytest.approx(wait)


@pytest.mark.parametrize(
    ("age", "eta", "wait"),
    [(10.0, 40.0, 30.0), (40.0, 40.0, 10.0), (60.0, 8.0, 3.0), (60.0, None, 3.0), (0.0, 9_999.0, WAIT_MOST)],
)
def test_the_eta_policy_waits_for_the_eta_and_then_asks_by_quarters(age: float, eta: float | None, wait: float) -> None:
    assert waits("eta", age=age, eta=eta) == pytest.approx(wait)


def test_the_fixed_policy_is_fixed() -> None:
    assert {waits("fixed", age=age, polls=polls) for age in (0.0, 9e9) for polls in (0, 99)} == {5.0}


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.floats(0.01, 100))
def test_an_older_job_is_never_asked_more_often(one: float, other: float, price: float) -> None:
    younger, older = sorted((one, other))

    assert waits("learned", age=younger, price=price) <= waits("learned", age=older, price=price)


@given(
    st.sampled_from(POLICIES),
    ANY_NUMBER,
    st.none() | ANY_NUMBER,
    st.integers(-5, 10**9),
    st.floats(0.001, 1e9),
    st.sampled_from([0.0, 3.0, 20.0, 1_000.0]),
    SPREADS,
)
def test_every_wait_is_a_number_within_bounds(
    policy: Policy, age: float, eta: float | None, polls: int, price: float, least: float, spread: float
) -> None:
    pace = Pace(policy, price, least)

    wait = pace.next_poll(Waiting(age, eta, polls), spread=spread)
    first = pace.first_poll(eta, spread=spread)

    assert least <= wait <= max(least, WAIT_MOST) * 1.1
    assert 2.0 <= first <= 66.0


@given(st.sampled_from(POLICIES), st.floats(0, 1e6), SPREADS, SPREADS)
def test_the_spread_only_delays_and_by_a_tenth_at_most(policy: Policy, age: float, one: float, other: float) -> None:
    low, high = sorted((one, other))
    pace, job = Pace(policy, 0.5, 3.0), Waiting(age, None, 3)

    bare = pace.next_poll(job, spread=0.0)

    assert bare <= pace.next_poll(job, spread=low) <= pace.next_poll(job, spread=high) <= bare * 1.1 + 1e-9
