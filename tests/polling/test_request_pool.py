"""Calls in threads: nothing waits for the slowest, nothing is asked too early, nothing is lost."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from tests.rows import BASE, NOW
from worker.core.identity import FetchAddress
from worker.core.lifecycle import JobFacts
from worker.core.reply import ApiDown, ApiReply, Processing
from worker.polling.request_pool import PollAnswer, RequestPool
from worker.store.claims import ClaimedJob

pytestmark = pytest.mark.every_python


def job(number: int, host: str = "api.test") -> ClaimedJob:
    """A claimed job."""
    name = str(number)
    address = FetchAddress(f"{BASE}/{name}", BASE, host)
    facts = JobFacts("pending", NOW, NOW + timedelta(hours=1))
    return ClaimedJob(number, "token", "default", name, "image", address, None, 1, NOW, facts)


def collected(calls: RequestPool, count: int, seconds: float = 5.0) -> list[PollAnswer]:
    """So many answers, however they come."""
    found: list[PollAnswer] = []
    until = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < until:
        found += calls.answers(0.1, gather=0.0)
    return found


@pytest.fixture
def opened() -> Iterator[threading.Event]:
    """Lets calls end that wait for it; opened in the end in any case."""
    event = threading.Event()
    yield event
    event.set()


def waits_for(event: threading.Event, slow: set[int]) -> Callable[[ClaimedJob], ApiReply]:
    """Asks, and for some jobs only once the event is set."""

    def ask(one: ClaimedJob) -> ApiReply:
        if one.id in slow:
            event.wait(10)
        return ApiReply(Processing())

    return ask


def test_given_a_slow_call_when_others_are_done_then_their_answers_come_and_their_places_are_free(
    opened: threading.Event,
) -> None:
    calls = RequestPool(waits_for(opened, {1}), threads=2)
    for number in range(1, 8):
        calls.start(job(number), 0.0)

    assert sorted(one.job.id for one in collected(calls, 6)) == [2, 3, 4, 5, 6, 7]
    assert calls.outstanding == 1

    opened.set()
    assert [one.job.id for one in collected(calls, 1)] == [1]
    assert calls.outstanding == 0


def test_given_more_jobs_than_threads_when_asked_then_never_more_at_once_than_threads() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def ask(_: ClaimedJob) -> ApiReply:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1
        return ApiReply(Processing())

    calls = RequestPool(ask, threads=4)
    for number in range(40):
        calls.start(job(number), 0.0)

    assert len(collected(calls, 40)) == 40
    assert most == 4


def test_given_a_host_that_says_nothing_when_others_are_asked_then_they_do_not_wait_for_it(
    opened: threading.Event,
) -> None:
    calls = RequestPool(waits_for(opened, set(range(10))), threads=2)
    for number in range(10):
        calls.start(job(number, "silent.test"), 0.0)
    for number in range(10, 14):
        calls.start(job(number), 0.0)

    assert sorted(one.job.id for one in collected(calls, 4)) == [10, 11, 12, 13]
    assert (calls.outstanding_at("silent.test"), calls.outstanding_at("api.test"), calls.outstanding) == (10, 0, 10)
    assert [one.id for one in calls.take_back()] == list(range(2, 10))
    assert calls.outstanding_at("silent.test") == 2


def test_given_few_jobs_when_asked_then_no_more_threads_are_started_than_are_needed(opened: threading.Event) -> None:
    before = threading.active_count()
    calls = RequestPool(waits_for(opened, {1, 2}), threads=128)
    calls.start(job(1), 0.0)
    calls.start(job(2), 0.0)

    assert threading.active_count() == before + 2


def test_given_a_moment_to_come_when_a_job_is_started_then_it_is_not_asked_before() -> None:
    calls = RequestPool(lambda _: ApiReply(Processing()), threads=1)
    moment = time.monotonic() + 0.15
    calls.start(job(1), moment)

    (one,) = collected(calls, 1)

    assert moment <= one.sent < moment + 0.5


def test_given_a_call_that_raises_when_asked_then_it_is_the_apis_trouble_and_the_thread_lives_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def ask(one: ClaimedJob) -> ApiReply:
        if one.id == 1:
            raise RuntimeError("an adapter of somebody's own")
        return ApiReply(Processing())

    calls = RequestPool(ask, threads=1)
    calls.start(job(1), 0.0)
    calls.start(job(2), 0.0)

    replies = {one.job.id: one.reply for one in collected(calls, 2)}

    assert isinstance(replies[1], ApiDown)
    assert replies[2] == Processing()
    assert "a request failed job=1" in caplog.text


def test_given_a_stop_when_jobs_wait_for_a_thread_then_they_come_back_and_the_rest_is_finished(
    opened: threading.Event,
) -> None:
    calls = RequestPool(waits_for(opened, {1}), threads=1)
    for number in range(1, 5):
        calls.start(job(number), 0.0)
    until = time.monotonic() + 5
    while calls._lanes["api.test"].queue.qsize() > 3 and time.monotonic() < until:
        time.sleep(0.001)  # the first one has begun

    assert [one.id for one in calls.take_back()] == [2, 3, 4]
    assert calls.outstanding == 1
    opened.set()
    assert [one.job.id for one in collected(calls, 1)] == [1]


def test_given_nothing_to_come_when_answers_are_waited_for_then_it_ends_in_time_or_when_woken() -> None:
    calls = RequestPool(lambda _: ApiReply(Processing()), threads=1)
    began = time.monotonic()
    assert calls.answers(0.05, gather=0.0) == []
    assert 0.04 < time.monotonic() - began < 1.0

    threading.Timer(0.05, calls.wake).start()
    began = time.monotonic()
    assert calls.answers(10.0, gather=0.0) == []
    assert time.monotonic() - began < 5.0


def test_given_a_probe_when_it_is_answered_then_the_answer_says_so() -> None:
    calls = RequestPool(lambda _: ApiReply(Processing()), threads=1)
    calls.start(job(1), 0.0, probe=True)

    assert [one.probe for one in collected(calls, 1)] == [True]


def test_closed_calls_leave_no_thread() -> None:
    calls = RequestPool(lambda job: ApiReply(Processing()), threads=2)
    before = set(threading.enumerate())
    for number in range(4):
        calls.start(job(number), time.monotonic())
    collected(calls, 4)
    started = set(threading.enumerate()) - before

    calls.close()

    assert started
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)


def threads_of(calls: RequestPool) -> int:
    """How many threads ask at the one host of these tests."""
    return calls._lanes["api.test"].threads


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of threads changes only where a test says so."""
    monkeypatch.setattr("worker.polling.request_pool.ADAPT_SECONDS", math.inf)


def test_given_calls_that_keep_the_processor_busy_when_adapted_then_few_threads_are_left_and_no_job_is_lost(
    opened: threading.Event, by_hand: None
) -> None:
    before = set(threading.enumerate())
    calls = RequestPool(waits_for(opened, set(range(100))), threads=64)
    for number in range(100):
        calls.start(job(number), 0.0)
    assert threads_of(calls) == 64

    for _ in range(5):
        calls._set_threads(0.9)

    assert threads_of(calls) == 8
    opened.set()
    assert len(collected(calls, 100)) == 100
    until = time.monotonic() + 5
    while len(set(threading.enumerate()) - before) > 8 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(set(threading.enumerate()) - before) == 8


def test_given_few_threads_when_jobs_wait_and_the_processor_has_time_then_all_threads_are_back_at_once(
    opened: threading.Event, by_hand: None
) -> None:
    calls = RequestPool(waits_for(opened, set(range(100))), threads=64)
    for number in range(100):
        calls.start(job(number), 0.0)
    for _ in range(5):
        calls._set_threads(0.9)

    for _ in range(3):
        calls._set_threads(0.1)
        calls.answers(0.0, gather=0.0)

    assert threads_of(calls) == 64
    opened.set()
    assert len(collected(calls, 100)) == 100


def test_given_few_threads_when_jobs_come_after_a_rest_then_there_may_be_all_of_them(
    opened: threading.Event, by_hand: None
) -> None:
    calls = RequestPool(waits_for(opened, set(range(1_000, 1_064))), threads=64)
    for number in range(64):
        calls.start(job(number), 0.0)
    for _ in range(5):
        calls._set_threads(0.9)
    collected(calls, 64)
    assert threads_of(calls) == 8

    for number in range(1_000, 1_064):
        calls.start(job(number), 0.0)

    assert threads_of(calls) == 64


def test_an_answer_says_how_much_processor_time_its_call_took() -> None:
    def ask(_: ClaimedJob) -> ApiReply:
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        return ApiReply(Processing())

    calls = RequestPool(ask, threads=1)
    calls.start(job(1), 0.0)

    (answer,) = collected(calls, 1)

    assert 0.05 <= answer.cpu_seconds < 0.5


def test_given_threads_that_are_to_end_when_jobs_are_taken_back_then_the_threads_end_and_no_job_is_lost(
    opened: threading.Event,
) -> None:
    before = set(threading.enumerate())
    calls = RequestPool(waits_for(opened, {1, 2}), threads=2)
    calls.start(job(1), 0.0)
    calls.start(job(2), 0.0)
    lane = calls._lanes["api.test"]
    while lane.queue.qsize():
        time.sleep(0.001)  # both have begun
    lane.limit_threads(1)
    calls.start(job(3), 0.0)

    assert [taken.id for taken in calls.take_back()] == [3]
    opened.set()
    collected(calls, 2)
    until = time.monotonic() + 5
    while len(set(threading.enumerate()) - before) > threads_of(calls) and time.monotonic() < until:
        time.sleep(0.01)
    assert len(set(threading.enumerate()) - before) == threads_of(calls)


def test_given_calls_of_one_host_that_only_wait_when_another_keeps_the_processor_busy_then_they_keep_their_threads(
    opened: threading.Event, by_hand: None
) -> None:
    """Its threads take nothing from the others; without them a slow host would be asked ever less often."""
    calls = RequestPool(waits_for(opened, set(range(200))), threads=64)
    for number in range(200):
        calls.start(job(number, host="slow.test" if number % 2 else "fast.test"), 0.0)
    slow, fast = calls._lanes["slow.test"], calls._lanes["fast.test"]

    for _ in range(5):
        calls._set_threads(0.9, light=[slow])

    assert (slow.max_threads, fast.max_threads) == (64, 8)
    opened.set()
    assert len(collected(calls, 200)) == 200
