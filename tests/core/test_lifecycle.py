"""Decisions after answers and attempts: every threshold, and complete sequences with a controlled clock."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import chain, cycle, islice, pairwise, repeat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.core.lifecycle import (
    AskAgain,
    Attempt,
    BadBody,
    DeadLink,
    EndJob,
    GiveUp,
    JobDecision,
    JobFacts,
    KeepLinks,
    OutputFacts,
    RenewLinks,
    StartDownloads,
    StoredFile,
    Strikes,
    TransferTrouble,
    TryAgain,
    Unfit,
    address_index,
    after_answer,
    after_attempt,
    note_of,
)
from worker.core.media.signatures import Media
from worker.core.reply import (
    AccountRefused,
    AnotherJob,
    ApiDown,
    ApiError,
    Empty,
    Failed,
    Link,
    Processing,
    RateLimited,
    Ready,
    Reply,
    UnknownId,
    Unread,
)

T0 = datetime(2026, 1, 1, tzinfo=UTC)
LEAST = timedelta(seconds=3)
DAY = timedelta(days=1)
HOUR = 3_600.0

OUTPUTS = (Link("https://h/a.png"),)
READY, PROCESSING, EMPTY = Ready(OUTPUTS), Processing(), Empty()
FAILED, UNKNOWN, ERROR = Failed("Failed, Try Again"), UnknownId("Request not found"), ApiError("Error message")
ODD, OTHER = Unread("unknown status 'ok'"), AnotherJob("7")
LIMITED, REFUSED, DOWN = RateLimited(30.0, "slow"), AccountRefused("key", "Invalid Api Key"), ApiDown("HTTP 502")
NOT_THE_JOBS: tuple[Reply, ...] = (LIMITED, REFUSED, DOWN)
NOT_READY: tuple[Reply, ...] = (PROCESSING, EMPTY, FAILED, UNKNOWN, ERROR, ODD, OTHER)


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


JOB = JobFacts("pending", T0, at(HOUR))


def answers(
    replies: Iterator[Reply] | list[Reply], *, every: float = 5.0, job: JobFacts = JOB
) -> list[tuple[float, JobDecision]]:
    """Poll a job at a constant interval until it ends. Return (second, decision) for each answer."""
    walk: list[tuple[float, JobDecision]] = []
    for turn, reply in enumerate(islice(replies, 2_000)):
        step = after_answer(job, reply, now=at(turn * every), min_interval=LEAST)
        walk.append((turn * every, step))
        if not isinstance(step, AskAgain):
            break
        job = job._replace(strikes=step.strikes)
    return walk


def ending(replies: Iterator[Reply] | list[Reply], *, every: float = 5.0, job: JobFacts = JOB) -> tuple[int, str]:
    """Return the number of answers until the job ended, and its final state."""
    walk = answers(replies, every=every, job=job)
    match walk[-1][1]:
        case EndJob(_, code, _):
            return len(walk), code
        case StartDownloads():
            return len(walk), "delivered"
    return len(walk), "pending"


# ── jobs: thresholds ──────────────────────────────────────────────────────────────────────────────────────────────────

# one line per case: the answers, the seconds between them, and (number of answers, final state)
THRESHOLDS: list[tuple[list[Reply], float, tuple[int, str]]] = [
    ([READY], 5, (1, "delivered")),
    ([PROCESSING, READY], 5, (2, "delivered")),
    ([FAILED, READY], 5, (2, "delivered")),
    # failed: twice
    ([FAILED], 5, (1, "pending")),
    ([FAILED, FAILED], 5, (2, "api_failed")),
    ([FAILED, FAILED], 3, (2, "api_failed")),
    ([FAILED, FAILED], 2.9, (2, "pending")),
    ([FAILED, FAILED, FAILED], 2, (3, "api_failed")),  # 0 counts, 2 is too close, 4 counts
    ([FAILED, PROCESSING, FAILED, PROCESSING], 5, (4, "pending")),
    ([FAILED, PROCESSING, FAILED, FAILED], 5, (4, "api_failed")),
    ([FAILED, ODD, OTHER, FAILED], 5, (4, "api_failed")),  # only processing resets the strikes
    ([FAILED, *NOT_THE_JOBS, FAILED], 5, (5, "api_failed")),
    # unknown id: three times, and a minute after tracking
    ([UNKNOWN] * 3, 30, (3, "not_found")),  # 0, 30, 60
    ([UNKNOWN] * 3, 29.9, (3, "pending")),  # the third is at 59.8
    ([UNKNOWN] * 4, 29.9, (4, "not_found")),
    ([UNKNOWN] * 2, 100, (2, "pending")),
    ([UNKNOWN] * 13, 5, (13, "not_found")),  # three at once, then one minute after tracking
    ([UNKNOWN, UNKNOWN, PROCESSING, UNKNOWN, UNKNOWN], 30, (5, "pending")),
    # error: three times in a row
    ([ERROR] * 3, 5, (3, "api_error")),
    ([ERROR] * 2, 5, (2, "pending")),
    ([ERROR] * 3, 2.9, (3, "pending")),
    ([ERROR, ERROR, FAILED, ERROR, ERROR], 5, (5, "pending")),
    ([ERROR, ERROR, ODD, ERROR, ERROR], 5, (5, "pending")),
    ([ERROR, ERROR, OTHER, ERROR, ERROR], 5, (5, "pending")),
    ([ERROR, ERROR, EMPTY, ERROR, ERROR], 5, (5, "pending")),
    ([ERROR, ERROR, UNKNOWN, ERROR, ERROR], 5, (5, "pending")),
    ([ERROR, ERROR, PROCESSING, ERROR, ERROR], 5, (5, "pending")),
    (
        [ERROR, LIMITED, ERROR, DOWN, ERROR],
        5,
        (5, "api_error"),
    ),  # problems of the account are not answers about the job
    # success without output: five times
    ([EMPTY] * 5, 5, (5, "no_output")),
    ([EMPTY] * 4, 5, (4, "pending")),
    ([EMPTY] * 5, 1, (5, "pending")),
    ([EMPTY, EMPTY, EMPTY, PROCESSING, EMPTY, EMPTY], 5, (6, "pending")),
    ([EMPTY, EMPTY, EMPTY, EMPTY, READY], 5, (5, "delivered")),
    # unread answers are polled again
    ([ODD] * 100, 5, (100, "pending")),
    ([OTHER] * 100, 5, (100, "pending")),
]


@pytest.mark.parametrize(("replies", "every", "end"), THRESHOLDS)
def test_a_job_ends_exactly_at_its_threshold(replies: list[Reply], every: float, end: tuple[int, str]) -> None:
    assert ending(replies, every=every) == end


@pytest.mark.parametrize(("reply", "count"), [(FAILED, 2), (ERROR, 3), (EMPTY, 5)])
def test_every_answer_counts_without_a_minimum_interval(reply: Reply, count: int) -> None:
    job = JOB
    for _ in range(count - 1):
        step = after_answer(job, reply, now=T0, min_interval=timedelta(0))
        assert isinstance(step, AskAgain)
        job = job._replace(strikes=step.strikes)

    assert isinstance(after_answer(job, reply, now=T0, min_interval=timedelta(0)), EndJob)


def test_answers_that_do_not_count_do_not_delay_the_end() -> None:
    """If polls are twice as frequent as strikes can count, the job ends after the same time."""
    walk = answers(repeat(ERROR), every=1.5)

    assert [second for second, _ in walk] == [0, 1.5, 3, 4.5, 6]


@pytest.mark.parametrize("status", ["pending", "downloading"])
@pytest.mark.parametrize("reply", NOT_THE_JOBS)
def test_problems_of_the_account_or_host_never_change_the_job(status: str, reply: Reply) -> None:
    strikes = Strikes(1, 2, 2, 4, T0)
    job = JobFacts("pending" if status == "pending" else "downloading", T0, at(10), strikes)

    step = after_answer(job, reply, now=at(10 * HOUR), min_interval=LEAST)

    assert step == AskAgain(strikes, note_of(reply))


def test_failed_answers_need_not_be_in_a_row() -> None:
    """failed, unread, empty, error, failed: the second `failed` ends the job, although they are not in a row."""
    assert ending(cycle([FAILED, ODD, EMPTY, ERROR])) == (5, "api_failed")


def test_a_job_that_alternates_between_processing_and_failed_expires() -> None:
    walk = answers(cycle([FAILED, PROCESSING]))

    assert walk[-1][0] == HOUR
    assert isinstance(walk[-1][1], EndJob)
    assert walk[-1][1].code == "expired"


# ── jobs: expiry ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reply", NOT_READY)
def test_a_job_expires_on_the_first_not_ready_answer_after_its_deadline(reply: Reply) -> None:
    before = after_answer(JOB, reply, now=at(HOUR) - timedelta(microseconds=1), min_interval=LEAST)
    after = after_answer(JOB, reply, now=at(HOUR), min_interval=LEAST)

    assert isinstance(before, AskAgain)
    assert isinstance(after, EndJob)
    assert (after.status, after.code) == ("expired", "expired")
    assert note_of(reply) in after.message


@pytest.mark.parametrize("late", [1.0, 86_400.0])
def test_a_job_that_is_ready_after_its_deadline_is_downloaded(late: float) -> None:
    assert after_answer(JOB, READY, now=at(HOUR + late), min_interval=LEAST) == StartDownloads(OUTPUTS)


@pytest.mark.parametrize(
    ("hold_end", "second", "expired"),
    [
        (10.0, HOUR - 1, False),
        (10.0, HOUR, True),  # an old hold changes nothing
        (HOUR - 30, HOUR + 29, False),
        (HOUR - 30, HOUR + 30, True),
        (HOUR - 60, HOUR, True),
        (2 * HOUR, 2 * HOUR, False),
        (2 * HOUR, 2 * HOUR + 59, False),
        (2 * HOUR, 2 * HOUR + 60, True),
    ],
)
def test_a_job_can_expire_one_minute_after_a_hold_at_the_earliest(
    hold_end: float, second: float, expired: bool
) -> None:
    job = JOB._replace(last_hold_end=at(hold_end))

    step = after_answer(job, PROCESSING, now=at(second), min_interval=LEAST)

    assert isinstance(step, EndJob) is expired


def test_a_final_answer_has_priority_over_the_deadline() -> None:
    job = JOB._replace(strikes=Strikes(failed=1, last=T0))

    step = after_answer(job, FAILED, now=at(2 * HOUR), min_interval=LEAST)

    assert step == EndJob("failed", "api_failed", "Failed, Try Again")


# ── jobs: links renewed ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reply", NOT_READY)
def test_a_downloading_job_keeps_its_links_without_fresh_ones(reply: Reply) -> None:
    job = JOB._replace(status="downloading", strikes=Strikes(1, 2, 2, 4, T0))

    assert after_answer(job, reply, now=at(9 * HOUR), min_interval=LEAST) == KeepLinks(note_of(reply))


def test_a_downloading_job_gets_fresh_links() -> None:
    job = JOB._replace(status="downloading")

    assert after_answer(job, READY, now=at(9 * HOUR), min_interval=LEAST) == RenewLinks(OUTPUTS)


def test_a_trained_model_completes_without_outputs() -> None:
    assert after_answer(JOB, Ready(()), now=T0, min_interval=LEAST) == StartDownloads(())


# ── outputs: single attempts ──────────────────────────────────────────────────────────────────────────────────────────

STORED = StoredFile("file:///x/1.png", 9, "0" * 64, Media("image/png", "png"))
DEAD, HTTP, AWAY, DISK = (
    DeadLink("HTTP 404"),
    TransferTrouble("http_error", "HTTP 503"),
    TransferTrouble("unreachable", "no answer"),
    TransferTrouble("storage", "disk full"),
)
HTML, SHORT = BadBody("not_media", "HTML"), BadBody("truncated", "9 of 10 bytes")
PRIVATE, LARGE = Unfit("refused_address", "10.0.0.1"), Unfit("too_large", "9 GB")
FIRST = OutputFacts(attempts=1, proxies=0, ready_at=T0)


def attempt(output: OutputFacts, result: Attempt, second: float = 0.0) -> StoredFile | TryAgain | GiveUp:
    return after_attempt(output, result, now=at(second), deadline=DAY)


def test_a_late_file_is_stored() -> None:
    assert attempt(FIRST, STORED, 10 * 86_400) == STORED


@pytest.mark.parametrize("failure", [PRIVATE, LARGE])
def test_permanent_errors_end_an_output_at_once(failure: Unfit) -> None:
    assert attempt(FIRST, failure) == GiveUp(failure.code, failure.message)


@pytest.mark.parametrize("body", [HTML, SHORT])
@pytest.mark.parametrize(("before", "second", "over"), [(0, 1, False), (1, 9, False), (2, 9, True), (0, 86_400, True)])
def test_a_bad_body_is_tried_three_times(body: BadBody, before: int, second: float, over: bool) -> None:
    result = attempt(replace(FIRST, attempts=before + 1, bad_bodies=before), body, second)

    assert isinstance(result, GiveUp) is over
    assert not isinstance(result, StoredFile)
    assert result.code == body.code


@pytest.mark.parametrize("failure", [HTTP, AWAY])
def test_temporary_failures_are_retried_until_the_deadline(failure: TransferTrouble) -> None:
    just_before = attempt(replace(FIRST, attempts=500), failure, 86_399.9)

    assert just_before == TryAgain(300.0, failure.code, failure.message)
    assert attempt(replace(FIRST, attempts=500), failure, 86_400) == GiveUp(failure.code, failure.message)


@pytest.mark.parametrize(("attempts", "wait"), [(1, 5.0), (2, 10.0), (3, 20.0), (6, 160.0), (7, 300.0), (10**9, 300.0)])
def test_retry_waits_double_up_to_five_minutes(attempts: int, wait: float) -> None:
    result = attempt(replace(FIRST, attempts=attempts), HTTP)

    assert isinstance(result, TryAgain)
    assert result.wait == wait


@pytest.mark.parametrize("second", [0.0, 86_400.0, 900 * 86_400.0])
def test_storage_failures_never_end_an_output(second: float) -> None:
    assert attempt(replace(FIRST, attempts=999), DISK, second) == TryAgain(15.0, "storage", "disk full")


@pytest.mark.parametrize(("seconds", "renew"), [(0, False), (19, False), (59.9, False), (60, True), (9_999, True)])
def test_a_dead_link_is_renewed_after_one_minute(seconds: float, renew: bool) -> None:
    output = replace(FIRST, attempts=2, dead_since=T0, last_code="gone")

    result = attempt(output, DEAD, seconds)

    assert isinstance(result, TryAgain)
    assert (result.code, result.renew) == ("gone", renew)


def test_a_dead_link_after_the_deadline_is_gone() -> None:
    result = attempt(FIRST, DEAD, 86_400)

    assert isinstance(result, GiveUp)
    assert result.code == "gone"


# ── outputs: sequences ────────────────────────────────────────────────────────────────────────────────────────────────

Server = Callable[[int, float, bool], Attempt]
"""What address `n` (0 is the link) answers at a second, before or after the link was renewed."""


def run_attempts(server: Server, *, proxies: int = 0, renewable: bool = True, max_attempts: int = 3_000) -> list[str]:
    """Download an output until it ends, and apply decisions as the store does. Return one text per event."""
    output = replace(FIRST, proxies=proxies, renewable=renewable)
    second = 0.0
    events: list[str] = []
    for _ in range(max_attempts):
        place = address_index(output)
        result = attempt(output, server(place, second, output.renewed), second)
        match result:
            case StoredFile():
                return [*events, f"{second:.0f} stored from {place}"]
            case GiveUp(code, _):
                return [*events, f"{second:.0f} {place} {code} failed"]
        events.append(f"{second:.0f} {place} {result.code}" + (" renew" if result.renew else ""))
        now = at(second)
        output = replace(output, attempts=output.attempts + 1, last_code=result.code)
        if result.code in ("not_media", "truncated"):
            output = replace(output, bad_bodies=output.bad_bodies + 1)
        elif result.code == "gone":
            counted = 0 if result.renew or output.link_may_recover(now) else 1
            output = replace(
                output,
                dead_since=output.dead_since or now,
                renewed=output.renewed or result.renew,
                dead_attempts=output.dead_attempts + counted,
            )
        second += result.wait
    return events


PATIENCE = ["0 0 gone", "5 0 gone", "10 0 gone", "15 0 gone", "20 0 gone", "30 0 gone", "40 0 gone", "50 0 gone"]


def test_a_dead_link_is_renewed_once_and_gone_after_three_more_attempts() -> None:
    assert run_attempts(lambda place, second, renewed: DEAD) == [
        *PATIENCE,
        "60 0 gone renew",
        "60 0 gone",
        "65 0 gone",
        "70 0 gone",
        "75 0 gone failed",
    ]


def test_proxies_are_tried_in_order_after_the_renewal() -> None:
    assert run_attempts(lambda place, second, renewed: DEAD, proxies=2)[len(PATIENCE) :] == [
        "60 0 gone renew",
        "60 0 gone",
        "60 1 gone",
        "60 2 gone",
        "65 0 gone",
        "70 1 gone",
        "75 2 gone failed",
    ]


def test_a_link_that_recovers_within_a_minute_is_not_renewed() -> None:
    events = run_attempts(lambda place, second, renewed: STORED if second >= 40 else DEAD, proxies=1)

    assert events[-1] == "40 stored from 0"
    assert not [event for event in events if "renew" in event]


def test_a_renewed_link_is_tried_before_the_proxies() -> None:
    assert run_attempts(lambda place, second, renewed: STORED if renewed else DEAD, proxies=3)[-1] == "60 stored from 0"


def test_a_proxy_can_replace_a_dead_link() -> None:
    assert (
        run_attempts(lambda place, second, renewed: STORED if place == 2 else DEAD, proxies=2)[-1] == "60 stored from 2"
    )


def test_an_output_without_renewal_gets_one_minute_its_proxies_and_three_attempts() -> None:
    """The id was made from the outputs, so the API can't return fresh links."""
    assert run_attempts(lambda place, second, renewed: DEAD, renewable=False, proxies=1)[len(PATIENCE) :] == [
        "60 0 gone",
        "60 1 gone",
        "65 0 gone",
        "70 1 gone",
        "75 0 gone failed",
    ]


def test_the_link_and_its_proxies_take_turns_after_failures() -> None:
    places = [event.split()[1] for event in run_attempts(lambda place, second, renewed: AWAY, proxies=2)]

    assert "".join(places[:7]) == "0120120"


def test_an_unreachable_link_ends_at_the_deadline_with_its_last_code() -> None:
    events = run_attempts(lambda place, second, renewed: AWAY)

    second, _, code, *_ = events[-1].split()
    assert 86_400 <= float(second) <= 86_400 + 300
    assert code == "unreachable"


def test_proxies_are_tried_if_a_dead_link_becomes_unreachable() -> None:
    events = run_attempts(
        lambda place, second, renewed: STORED if place else (DEAD if second == 0 else AWAY), proxies=1
    )

    assert events[-1].endswith("stored from 1")


def test_an_unreachable_proxy_does_not_block_the_others() -> None:
    """The renewed link is dead, the first proxy does not answer, the second has the file."""
    servers: dict[int, Attempt] = {0: DEAD, 1: AWAY, 2: STORED}

    assert run_attempts(lambda place, second, renewed: servers[place], proxies=2)[-1].endswith("stored from 2")


def test_a_slow_proxy_is_retried_before_a_dead_link_fails() -> None:
    events = run_attempts(
        lambda place, second, renewed: DEAD if place == 0 else (STORED if second > 600 else AWAY), proxies=1
    )

    assert events[-1].endswith("stored from 1")


@pytest.mark.parametrize("proxy", [DEAD, PRIVATE])
def test_a_dead_or_refused_proxy_does_not_end_an_output_with_a_failing_link(proxy: Attempt) -> None:
    """The API has returned internal hosts as proxies, and a mirror may not have every file."""
    events = run_attempts(
        lambda place, second, renewed: proxy if place else (STORED if second > 7_200 else AWAY), proxies=1
    )

    assert events[-1].endswith("stored from 0")
    assert {event.split()[2] for event in events[:-1]} == {"unreachable"}


def test_a_refused_proxy_counts_as_dead_if_the_link_is_dead() -> None:
    events = run_attempts(lambda place, second, renewed: PRIVATE if place else DEAD, proxies=1)

    assert events[-1].endswith("gone failed")
    assert len(events) == len(run_attempts(lambda place, second, renewed: DEAD, proxies=1))


def test_a_refused_link_ends_the_output_even_with_proxies() -> None:
    assert run_attempts(lambda place, second, renewed: PRIVATE, proxies=2) == ["0 0 refused_address failed"]


def test_an_html_page_instead_of_a_picture_is_fetched_three_times() -> None:
    assert run_attempts(lambda place, second, renewed: HTML) == [
        "0 0 not_media",
        "2 0 not_media",
        "6 0 not_media failed",
    ]


def test_a_full_disk_only_delays_the_output() -> None:
    assert run_attempts(lambda place, second, renewed: STORED if second > 3 * 86_400 else DISK, max_attempts=20_000)[
        -1
    ].startswith("259215 stored")


# ── properties ────────────────────────────────────────────────────────────────────────────────────────────────────────

REPLIES = st.sampled_from([READY, *NOT_READY, *NOT_THE_JOBS])


@settings(max_examples=100, deadline=None)
@given(st.lists(REPLIES, max_size=30), st.floats(0, 600), st.integers(1, 20_000))
def test_any_sequence_of_answers_has_at_most_one_end(replies: list[Reply], every: float, deadline: int) -> None:
    walk = answers(replies, every=every, job=JOB._replace(deadline_at=at(deadline)))

    for turn, (second, step) in enumerate(walk):
        assert isinstance(step, AskAgain) or turn == len(walk) - 1
        assert not isinstance(step, (RenewLinks, KeepLinks))
        assert isinstance(step, StartDownloads) == (replies[turn] == READY)
        if isinstance(step, EndJob):
            assert step.status == ("expired" if step.code == "expired" else "failed")
            assert second >= deadline or step.code != "expired"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(NOT_READY), max_size=5), st.floats(3, 60))
def test_every_polled_job_ends(replies: list[Reply], every: float) -> None:
    job = JOB._replace(deadline_at=at(600))

    walk = answers(chain(replies, repeat(PROCESSING)), every=every, job=job)

    assert isinstance(walk[-1][1], EndJob)
    assert walk[-1][0] <= 600 + every


ATTEMPTS = st.lists(st.sampled_from([DEAD, HTTP, AWAY, DISK, HTML, SHORT, PRIVATE]), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(ATTEMPTS, st.integers(0, 4), st.booleans())
def test_any_sequence_of_attempts_has_at_most_one_renewal_and_bounded_waits(
    attempts: list[Attempt], proxies: int, renewable: bool
) -> None:
    results = chain(attempts, repeat(DEAD))
    events = run_attempts(lambda place, second, renewed: next(results), proxies=proxies, renewable=renewable)

    seconds = [float(event.split()[0]) for event in events]
    assert events[-1].endswith("failed")
    assert sum("renew" in event for event in events) <= (1 if renewable else 0)
    assert all(0 <= later - earlier <= 300 for earlier, later in pairwise(seconds))
    assert all(0 <= int(event.split()[1]) <= proxies for event in events)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([DEAD, HTTP, AWAY, STORED]), min_size=1, max_size=5), st.integers(0, 3))
def test_constant_links_lead_to_the_file_or_to_a_failure(servers: list[Attempt], proxies: int) -> None:
    """The file is found at any URL: waiting for one URL must not prevent attempts at another."""
    events = run_attempts(lambda place, second, renewed: servers[place % len(servers)], proxies=proxies)

    has_it = any(servers[place % len(servers)] is STORED for place in range(proxies + 1))
    assert ("stored" in events[-1]) is has_it
    assert has_it or events[-1].endswith("failed")


def test_a_crashed_attempt_does_not_count_against_the_link() -> None:
    """The next attempt uses the main link again, not a proxy."""
    assert address_index(OutputFacts(attempts=2, proxies=2, ready_at=T0)) == 0
    assert address_index(OutputFacts(attempts=2, proxies=2, ready_at=T0, last_code="unreachable")) == 1


# ── promised links ────────────────────────────────────────────────────────────────────────────────────────────────────

PROMISED = OutputFacts(attempts=1, proxies=0, ready_at=T0, renewable=True, promised=True)
NO_FILE: list[Attempt] = [
    DeadLink("HTTP 404"), BadBody("not_media", "a page"), BadBody("truncated", "a part", early=True),
    TransferTrouble("http_error", "HTTP 500"), TransferTrouble("unreachable", "no answer"),
]  # fmt: skip


@pytest.mark.parametrize("attempt", NO_FILE, ids=lambda attempt: type(attempt).__name__)
def test_a_promised_link_is_tried_for_ten_minutes_with_growing_waits(
    attempt: Attempt,
) -> None:
    waits, moment, attempts = [], 0.0, 0
    while True:
        attempts += 1
        output = replace(PROMISED, attempts=attempts, dead_since=T0, last_code="gone", bad_bodies=attempts)
        result = after_attempt(output, attempt, now=at(moment), deadline=timedelta(days=1))
        if isinstance(result, GiveUp):
            break
        assert isinstance(result, TryAgain)
        assert (result.renew, result.counts) == (False, False)
        waits.append(result.wait)
        moment += result.wait

    assert waits[:5] == [5, 10, 20, 40, 60]
    assert set(waits[5:-1]) == {60}
    assert moment == 600
    assert result.message.endswith("a promised link, tried for 600 s")


def test_a_promised_link_respects_retry_after_within_its_time() -> None:
    soon, late = TransferTrouble("http_error", "HTTP 429", 90.0), TransferTrouble("http_error", "HTTP 429", 3_600.0)

    assert after_attempt(PROMISED, soon, now=at(0), deadline=timedelta(days=1)) == TryAgain(
        90.0, "http_error", "HTTP 429", counts=False
    )
    assert after_attempt(PROMISED, late, now=at(500), deadline=timedelta(days=1)) == TryAgain(
        100.0, "http_error", "HTTP 429", counts=False
    )


def test_a_promised_link_gets_five_attempts_even_after_an_outage() -> None:
    """Otherwise the job would fail although the file is there a minute later."""
    dead, moment, waits = DeadLink("HTTP 404"), 3_600.0, list[float]()
    for attempts in range(1, 5):
        result = after_attempt(replace(PROMISED, attempts=attempts), dead, now=at(moment), deadline=timedelta(days=1))
        assert isinstance(result, TryAgain)
        waits.append(result.wait)
        moment += result.wait

    assert waits == [5, 10, 20, 40]
    last = after_attempt(replace(PROMISED, attempts=5), dead, now=at(moment), deadline=timedelta(days=1))
    assert last == GiveUp("gone", "HTTP 404; a promised link, tried for 3675 s")
    slow = after_attempt(
        PROMISED, TransferTrouble("http_error", "429", 3_600.0), now=at(700), deadline=timedelta(days=1)
    )
    assert isinstance(slow, TryAgain)
    assert slow.wait == 60


def test_a_promised_link_ends_at_the_output_deadline_but_not_by_storage_failures() -> None:
    dead, full = DeadLink("HTTP 404"), TransferTrouble("storage", "disk full")

    assert isinstance(after_attempt(PROMISED, dead, now=at(60), deadline=timedelta(seconds=60)), GiveUp)
    assert isinstance(after_attempt(PROMISED, full, now=at(900), deadline=timedelta(seconds=60)), TryAgain)


def test_a_promised_link_with_a_permanent_error_ends_at_once() -> None:
    for unfit in (Unfit("refused_address", "not public"), Unfit("too_large", "9 GB")):
        assert after_attempt(PROMISED, unfit, now=at(0), deadline=timedelta(days=1)) == GiveUp(
            unfit.code, unfit.message
        )
