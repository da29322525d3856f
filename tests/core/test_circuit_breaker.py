"""Circuit breakers of accounts and hosts, with a controlled clock."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.circuit_breaker import (
    BreakerInput,
    CircuitBreaker,
    RateMeasurement,
    after_failures,
    after_job_answer,
    after_rate_limit,
    after_refusal,
    after_replies,
    held_by_operator,
    resumed_by_operator,
    with_learned_rate,
    with_probe_postponed,
    with_probe_started,
    with_unproven_key,
)
from worker.core.reply import ApiDown
from worker.vendor.replies import NO_SUCH_PATH

T0 = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = timedelta(seconds=25)


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


NEW = CircuitBreaker("account", "default")
OPEN = after_job_answer(NEW, now=T0, probe=True)
HOST = CircuitBreaker("host", "modelslab.com")


def probe_times(breaker: CircuitBreaker, *, until: int) -> list[int]:
    """Return the seconds at which a worker that looks every second probes a breaker whose probes all fail."""
    seconds = []
    for second in range(until):
        now = at(second)
        if breaker.allows(now) == "probe":
            seconds.append(second)
            breaker = after_refusal(
                with_probe_started(breaker, now=now, lease=LEASE), "key rejected", now=now, probe=True
            )
        assert breaker.allows(now) == "none"
    return seconds


# ── accounts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unproven_key_is_tested_with_a_single_probe() -> None:
    trying = with_probe_started(NEW, now=T0, lease=LEASE)

    assert NEW.allows(T0) == "probe"
    assert [trying.allows(at(s)) for s in (0, 24, 25)] == ["none", "none", "probe"]
    assert after_job_answer(trying, now=at(1), probe=True).allows(at(1)) == "all"


def test_a_rejected_key_is_probed_after_10_20_40_and_then_every_60_seconds() -> None:
    held_breaker = after_refusal(OPEN, "key rejected", now=T0, probe=False)

    assert probe_times(held_breaker, until=320) == [10, 30, 70, 130, 190, 250, 310]


def test_a_new_key_that_is_rejected_has_the_same_probe_schedule() -> None:
    assert probe_times(NEW, until=140) == [0, 10, 30, 70, 130]


def test_a_hold_keeps_its_reason_and_start_until_a_probe_succeeds() -> None:
    held_breaker = after_refusal(OPEN, "key rejected", now=T0, probe=False)
    later = after_refusal(held_breaker, "no credits", now=at(10), probe=True)
    free = after_job_answer(later, now=at(30), probe=True)

    assert (held_breaker.reason, held_breaker.since, held_breaker.until) == ("key rejected", T0, None)
    assert (later.reason, later.since) == ("no credits", T0)
    assert (free.reason, free.since, free.allows(at(30))) == (None, None, "all")
    assert free.last_hold_end(at(99)) == at(30)


def test_the_probe_schedule_restarts_after_a_release() -> None:
    held_breaker = after_refusal(OPEN, "key rejected", now=T0, probe=False)
    for second in (10, 30, 70):
        held_breaker = after_refusal(held_breaker, "key rejected", now=at(second), probe=True)
    again = after_refusal(
        after_job_answer(held_breaker, now=at(130), probe=True), "key rejected", now=at(200), probe=False
    )

    assert again.probe_at == at(210)


def test_answers_to_requests_before_the_hold_do_not_change_it() -> None:
    """Late refusals must not extend the schedule, and late answers must not end the hold."""
    held_breaker = after_refusal(OPEN, "key rejected", now=T0, probe=False)

    assert after_refusal(held_breaker, "no credits", now=at(3), probe=False) == held_breaker
    assert after_job_answer(held_breaker, now=at(3), probe=False) == held_breaker


def test_a_process_start_probes_a_held_key_at_once() -> None:
    held_breaker = after_refusal(OPEN, "key rejected", now=T0, probe=False)
    started = with_unproven_key(held_breaker, now=at(2))

    assert started.allows(at(2)) == "probe"
    assert with_probe_started(started, now=at(2), lease=LEASE).allows(at(3)) == "none"
    assert after_refusal(started, "key rejected", now=at(3), probe=True).probe_at == at(23)  # the schedule goes on


def test_a_process_start_probes_a_proven_key() -> None:
    started = with_unproven_key(OPEN, now=at(5))

    assert started.allows(at(5)) == "probe"
    assert started.last_hold_end(at(5)) is None
    assert after_job_answer(started, now=at(6), probe=True).allows(at(6)) == "all"


def test_a_probe_without_a_result_is_repeated() -> None:
    trying = with_probe_started(NEW, now=T0, lease=LEASE)
    held_breaker = with_probe_started(after_refusal(OPEN, "key rejected", now=T0, probe=False), now=at(10), lease=LEASE)

    assert with_probe_postponed(trying, now=at(3), wait=0.0).allows(at(3)) == "probe"
    assert [with_probe_postponed(trying, now=at(3), wait=1.0).allows(at(s)) for s in (3, 3.9, 4)] == [
        "none",
        "none",
        "probe",
    ]
    assert with_probe_postponed(held_breaker, now=at(12), wait=0.0).allows(at(12)) == "none"
    assert with_probe_postponed(held_breaker, now=at(12), wait=0.0).allows(at(10) + LEASE) == "probe"


def test_a_rate_limit_holds_the_account_exactly_for_its_time() -> None:
    limited = after_rate_limit(OPEN, 30.0, now=T0)

    assert [limited.allows(at(s)) for s in (0, 29.9, 30)] == ["none", "none", "all"]
    assert (limited.reason, limited.until) == ("rate limited", at(30))
    assert after_job_answer(limited, now=at(1), probe=False).allows(at(2)) == "none"


def test_the_longest_of_several_rate_limits_counts() -> None:
    limited = after_rate_limit(after_rate_limit(after_rate_limit(OPEN, 30.0, now=T0), 5.0, now=at(1)), 40.0, now=at(2))

    assert limited.until == at(42)
    assert limited.since == T0


def test_the_end_of_a_rate_limit_is_the_end_of_the_hold() -> None:
    limited = after_rate_limit(OPEN, 30.0, now=T0)

    assert limited.last_hold_end(at(10)) == at(10)
    assert limited.last_hold_end(at(99)) == at(30)
    assert after_rate_limit(limited, 5.0, now=at(50)).last_hold_end(at(99)) == at(55)
    assert after_job_answer(limited, now=at(99), probe=False).last_hold_end(at(99)) == at(30)


def test_a_refusal_during_a_rate_limit_is_not_probed_before_its_end() -> None:
    held_breaker = after_refusal(after_rate_limit(OPEN, 300.0, now=T0), "key rejected", now=at(5), probe=False)

    assert [held_breaker.allows(at(s)) for s in (15, 299, 300)] == ["none", "none", "probe"]


def test_a_rate_limited_probe_delays_the_next_probe() -> None:
    held_breaker = after_refusal(OPEN, "key rejected", now=T0, probe=False)
    limited = after_rate_limit(held_breaker, 300.0, now=at(10))

    assert limited.reason == "key rejected"
    assert [limited.allows(at(s)) for s in (70, 309, 310)] == ["none", "none", "probe"]


def test_an_unproven_key_stays_unproven_after_a_rate_limit() -> None:
    limited = after_rate_limit(NEW, 30.0, now=T0)

    assert [limited.allows(at(s)) for s in (29, 30)] == ["none", "probe"]
    assert with_unproven_key(after_rate_limit(OPEN, 30.0, now=T0), now=at(1)).allows(at(31)) == "probe"


# ── hosts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_failures(breaker: CircuitBreaker, times: int, *, start: float = 0.0) -> CircuitBreaker:
    for turn in range(times):
        breaker = after_failures(breaker, "time-out", 1, now=at(start + turn), probe=False)
    return breaker


def test_a_host_is_held_after_five_failures_in_a_row() -> None:
    assert with_failures(HOST, 4).allows(at(4)) == "all"
    assert with_failures(HOST, 5).allows(at(4)) == "none"
    assert after_failures(HOST, "time-out", 5, now=T0, probe=False).held(T0)


def test_an_answer_resets_the_failure_count() -> None:
    counted = with_failures(after_job_answer(with_failures(HOST, 4), now=at(4), probe=False), 4, start=5)

    assert counted.allows(at(9)) == "all"
    assert with_failures(counted, 1, start=9).held(at(9))


def test_a_held_host_is_probed_on_schedule_and_released_by_the_first_answer() -> None:
    breaker = after_failures(HOST, "time-out", 5, now=T0, probe=False)
    probes = []
    for second in range(140):
        if breaker.allows(at(second)) == "probe":
            probes.append(second)
            breaker = after_failures(
                with_probe_started(breaker, now=at(second), lease=LEASE), "time-out", 1, now=at(second), probe=True
            )
    free = after_job_answer(breaker, now=at(190), probe=True)

    assert probes == [10, 30, 70, 130]
    assert free.allows(at(190)) == "all"
    assert (free.troubles, free.last_hold_end(at(500))) == (0, at(190))


def after_missing_own_path(breaker: CircuitBreaker, *, now: datetime, probe: bool) -> CircuitBreaker:
    """Return the breaker after an answer about a missing path that only one job has."""
    reply = ApiDown(f"HTTP 404: {NO_SUCH_PATH}", answered=True, no_such_path=True)
    return after_replies(breaker, [BreakerInput(reply, now, probe)], RateMeasurement(10.0, 0.0), now=now)


def test_a_missing_path_of_one_job_ends_a_hold_for_missing_answers() -> None:
    """The host answers again. Otherwise the hold would last as long as such jobs are used as probes."""
    held_breaker = with_failures(HOST, 5)

    free = after_missing_own_path(with_probe_started(held_breaker, now=at(14), lease=LEASE), now=at(15), probe=True)

    assert (free.held(at(15)), free.last_hold_end(at(99))) == (False, at(15))
    assert after_missing_own_path(held_breaker, now=at(6), probe=False) == held_breaker
    assert after_missing_own_path(with_failures(HOST, 4), now=at(6), probe=False) == with_failures(HOST, 4)


def test_a_missing_path_of_one_job_does_not_end_a_hold_for_a_wrong_api_url() -> None:
    held_breaker = after_replies(
        HOST,
        [BreakerInput(ApiDown(f"HTTP 404: {NO_SUCH_PATH}", no_such_path=True), T0, False)] * 5,
        RateMeasurement(10.0, 0.0),
        now=T0,
    )
    probed = after_missing_own_path(with_probe_started(held_breaker, now=at(10), lease=LEASE), now=at(11), probe=True)

    assert (probed.reason, probed.since, probed.released_at) == (held_breaker.reason, T0, None)
    assert [probed.allows(at(s)) for s in (30, 31)] == ["none", "probe"]


def test_failures_of_earlier_requests_do_not_extend_the_hold_of_a_host() -> None:
    held_breaker = with_failures(HOST, 5)

    assert with_failures(held_breaker, 20, start=5) == held_breaker


def test_a_breaker_that_was_never_held_has_no_last_hold() -> None:
    assert NEW.last_hold_end(T0) is None
    assert OPEN.last_hold_end(T0) is None
    assert with_failures(HOST, 4).last_hold_end(T0) is None


# ── properties ────────────────────────────────────────────────────────────────────────────────────────────────────────

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["answered", "refused", "limited", "troubled", "unproven", "undecided", "probing"]),
        st.floats(0, 200),
        st.booleans(),
        st.floats(1, 900),
    ),
    max_size=25,
)


@pytest.mark.parametrize("scope", ["account", "host"])
@given(events=EVENTS)
def test_every_hold_can_end_within_fifteen_minutes(scope: str, events: list[tuple[str, float, bool, float]]) -> None:
    breaker, now = replace(NEW if scope == "account" else HOST), T0
    for name, pause, probe, seconds in events:
        now += timedelta(seconds=pause)
        match name:
            case "answered":
                breaker = after_job_answer(breaker, now=now, probe=probe)
            case "refused" if scope == "account":
                breaker = after_refusal(breaker, "key rejected", now=now, probe=probe)
            case "limited" if scope == "account":
                breaker = after_rate_limit(breaker, seconds, now=now)
            case "troubled" if scope == "host":
                breaker = after_failures(breaker, "time-out", 1, now=now, probe=probe)
            case "unproven" if scope == "account":
                breaker = with_unproven_key(breaker, now=now)
            case "undecided":
                breaker = with_probe_postponed(breaker, now=now, wait=0.5)
            case "probing" if breaker.allows(now) == "probe":
                breaker = with_probe_started(breaker, now=now, lease=LEASE)

        assert breaker.allows(now + timedelta(seconds=960)) != "none"
        assert not breaker.held(now) or breaker.allows(now) != "all"
        assert not breaker.held(now) or breaker.since is not None
        ended = breaker.last_hold_end(now)
        assert ended is None or ended <= now


# ── the rate of an account ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rate_limit_halves_the_rate_only_once() -> None:
    limited = after_rate_limit(OPEN, 30.0, now=T0)
    first = with_learned_rate(limited, configured=100.0, measured=20.0, sent_at=at(-0.1))
    second = with_learned_rate(first, configured=100.0, measured=5.0, sent_at=at(0.2))

    assert (first.ceiling, first.cut_at) == (20.0, at(30))
    assert second == first
    assert OPEN.rate(100.0, T0) == 100.0
    assert [round(first.rate(100.0, at(s)), 1) for s in (0, 30, 90)] == [9.5, 9.5, 19.0]


def test_a_second_rate_limit_after_the_pause_changes_the_ceiling() -> None:
    first = with_learned_rate(after_rate_limit(OPEN, 30.0, now=T0), configured=100.0, measured=20.0, sent_at=T0)
    again = with_learned_rate(after_rate_limit(first, 30.0, now=at(40)), configured=100.0, measured=8.0, sent_at=at(40))

    assert again.ceiling == 8.0
    assert again.cut_at == at(70)


def test_the_learned_ceiling_survives_holds_and_answers() -> None:
    learned = with_learned_rate(after_rate_limit(OPEN, 30.0, now=T0), configured=100.0, measured=20.0, sent_at=T0)
    later = after_job_answer(after_refusal(learned, "key rejected", now=at(40), probe=False), now=at(60), probe=True)

    assert (later.ceiling, later.cut_at) == (20.0, at(30))
    assert after_job_answer(with_unproven_key(learned, now=at(50)), now=at(51), probe=True).ceiling == 20.0


def test_an_operator_hold_allows_no_requests_until_it_is_resumed() -> None:
    """No probe is allowed, also after late answers and a process start. After the resume a single probe is made."""
    held_breaker = held_by_operator(CircuitBreaker("account", "default", proven=True), now=T0)
    later = with_unproven_key(after_job_answer(held_breaker, now=at(5), probe=False), now=at(9))
    open_again = resumed_by_operator(later, now=at(10))

    assert [breaker.allows(at(9_999)) for breaker in (held_breaker, later)] == ["none", "none"]
    assert (later.held(T0), later.why) == (True, "held by an operator")
    assert open_again.allows(at(10)) == "probe"
    assert open_again.last_hold_end(at(11)) == at(10)
    assert after_job_answer(open_again, now=at(11), probe=True).allows(at(11)) == "all"


def test_resuming_tries_a_hold_of_the_api_at_once() -> None:
    """A rejected key is probed and may be rejected again. A rate limit ends."""
    refused_key = after_refusal(
        CircuitBreaker("account", "default", proven=True), "key rejected: no", now=T0, probe=False
    )
    limit = after_rate_limit(CircuitBreaker("account", "default", proven=True), 900.0, now=T0)
    down = after_failures(CircuitBreaker("host", "api.test"), "unreachable: refused", 5, now=T0, probe=False)

    assert [breaker.allows(at(1)) for breaker in (refused_key, limit, down)] == ["none"] * 3
    resumed_at_once = [resumed_by_operator(breaker, now=at(1)).allows(at(1)) for breaker in (refused_key, limit, down)]
    assert resumed_at_once == ["probe", "all", "probe"]
    still = after_refusal(resumed_by_operator(refused_key, now=at(1)), "key rejected: no", now=at(2), probe=True)
    assert still.allows(at(3)) == "none"
