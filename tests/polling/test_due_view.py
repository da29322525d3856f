"""The view of due groups and circuit breakers: when it is read again, and when to look for due jobs."""

from collections.abc import Sequence
from datetime import timedelta

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

from tests.polling.clocks import Clock
from tests.rows import NOW, add_job, seconds
from worker.core.circuit_breaker import CircuitBreaker
from worker.polling import due_view
from worker.polling.due_view import (
    ALERT_SECONDS,
    IDLE_SECONDS,
    LOOK_SECONDS,
    VIEW_SECONDS,
    DueView,
    LookTimes,
    ViewReader,
)
from worker.store.breakers import locked_breaker, save_breaker
from worker.store.due_groups import DueGroup

HELD = {"default": "none"}
OPEN = {"default": "all"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the view."""
    clock = Clock()
    monkeypatch.setattr(due_view, "time", clock)
    return clock


# ── one view ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def view_at(clock: Clock, *, due_in: Sequence[float] = (), breakers: Sequence[CircuitBreaker] = ()) -> DueView:
    """Return a view that is read now, with a group for each of these due times."""
    groups = [DueGroup("default", 0, "api.test", NOW + seconds(wait)) for wait in due_in]
    return DueView(clock.now, NOW, {(breaker.scope, breaker.name): breaker for breaker in breakers}, groups)


def test_given_a_view_then_its_time_goes_on_by_the_monotonic_clock(clock: Clock) -> None:
    view = view_at(clock)
    clock.now += 0.3

    assert view.time() == NOW + timedelta(seconds=0.3)


def test_given_an_account_without_a_row_then_its_breaker_is_that_of_a_key_that_was_never_used(clock: Clock) -> None:
    held = CircuitBreaker("account", "held", reason="no credits", since=NOW)
    view = view_at(clock, breakers=[held])

    assert view.breaker("account", "held") is held
    assert view.breaker("account", "new") == CircuitBreaker("account", "new")
    assert view.breaker("host", "held") == CircuitBreaker("host", "held")


def test_given_jobs_that_are_due_soon_then_the_pause_ends_with_the_first(clock: Clock) -> None:
    view = view_at(clock, due_in=[0.7, 0.4, -5.0])
    clock.now += 0.1

    assert view.pause(HELD, 0) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "breaker",
    [
        CircuitBreaker("account", "default", reason="rate limited", since=NOW, until=NOW + seconds(0.2)),
        CircuitBreaker("host", "api.test", reason="unreachable", since=NOW, probe_at=NOW + seconds(0.2)),
    ],
    ids=["end", "probe"],
)
def test_given_a_hold_that_ends_or_is_probed_soon_then_the_pause_ends_with_it(
    clock: Clock, breaker: CircuitBreaker
) -> None:
    assert view_at(clock, due_in=[0.7], breakers=[breaker]).pause(HELD, 0) == pytest.approx(0.2)


def test_given_nothing_to_wait_for_then_the_pause_is_a_second_and_it_is_never_longer(clock: Clock) -> None:
    """A wake-up can get lost."""
    assert view_at(clock).pause(HELD, 0) == IDLE_SECONDS
    assert view_at(clock, due_in=[-3.0, 900.0]).pause(HELD, 0) == IDLE_SECONDS


def test_given_due_jobs_that_others_claim_then_the_looks_become_less_frequent(clock: Clock) -> None:
    view = view_at(clock, due_in=[-1.0])

    pauses = [view.pause(OPEN, empty_looks) for empty_looks in (0, 1, 2, 4, 5, 99)]

    assert pauses == [LOOK_SECONDS, 2 * LOOK_SECONDS, 4 * LOOK_SECONDS, 16 * LOOK_SECONDS, IDLE_SECONDS, IDLE_SECONDS]


def test_given_a_job_that_is_due_in_an_instant_then_the_pause_is_at_least_a_millisecond(clock: Clock) -> None:
    assert view_at(clock, due_in=[0.000_01]).pause(HELD, 0) == 0.001


# ── reading views ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_a_view_when_it_is_half_a_second_old_or_stale_then_it_is_read_again(engine: Engine, clock: Clock) -> None:
    reader = ViewReader(engine, {"default": SecretStr("a-key")})
    assert reader.recent() is None
    view = reader.current()
    clock.now += VIEW_SECONDS - 0.01
    assert reader.current() is reader.recent() is view

    clock.now += 0.01
    assert reader.recent() is None
    second_view = reader.current()
    assert second_view is not view

    reader.stale = True
    assert reader.current() is not second_view


def test_given_jobs_and_breakers_then_a_view_has_those_of_the_accounts_with_a_key(engine: Engine, clock: Clock) -> None:
    breaker = CircuitBreaker("account", "default", proven=True)
    with engine.begin() as connection:
        add_job(connection, "1")
        add_job(connection, "2", account="other")
        locked_breaker(connection, "account", "default")
        save_breaker(connection, breaker)
    keys = {"default": SecretStr("a-key")}
    reader = ViewReader(engine, keys)

    assert [group.account for group in reader.current().groups] == ["default"]
    assert reader.breakers == {("account", "default"): breaker}

    keys["other"] = SecretStr("another-key")
    reader.stale = True
    assert [group.account for group in reader.current().groups] == ["default", "other"]


def test_given_a_key_that_is_replaced_or_removed_then_jobs_that_were_claimed_are_polled_with_the_last_one(
    engine: Engine, clock: Clock
) -> None:
    keys = {"default": SecretStr("first")}
    reader = ViewReader(engine, keys)
    keys["default"] = SecretStr("second")
    assert reader.key("default").get_secret_value() == "second"

    reader.current()
    del keys["default"]

    assert reader.key("default").get_secret_value() == "second"


# ── times of looks ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_a_planned_look_then_it_is_due_at_its_time_and_not_before(clock: Clock) -> None:
    look_times = LookTimes()
    look_times.look_after(0.5)

    assert [look_times.due(clock.now + passed) for passed in (0.0, 0.49, 0.5, 9.0)] == [False, False, True, True]
    assert look_times.wait(clock.now, clock.now + 9.0) == pytest.approx(0.5)
    assert look_times.wait(clock.now, clock.now + 9.0, clock.now + 0.2) == pytest.approx(0.2)


def test_given_a_wake_up_then_looks_are_due_for_a_while_whatever_is_planned(clock: Clock) -> None:
    look_times = LookTimes()
    look_times.alert()
    look_times.look_after(0.9)
    soon, later, end = clock.now + ALERT_SECONDS - 0.01, clock.now + ALERT_SECONDS, clock.now + 9.0

    assert [look_times.due(soon), look_times.due(later)] == [True, False]
    assert look_times.wait(soon, end) == LOOK_SECONDS
    assert look_times.wait(later, end) == pytest.approx(0.9 - ALERT_SECONDS)
