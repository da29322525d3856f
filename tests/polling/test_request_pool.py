"""The request pool: no job waits for a slow one, none is sent too early, and none is lost."""

import math
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.polling.answers import claimed_job
from worker.core.reply import ApiDown, ApiReply, Processing
from worker.polling.request_pool import PollAnswer, RequestPool
from worker.store.claims import ClaimedJob

pytestmark = pytest.mark.every_python


def collect(pool: RequestPool, count: int, seconds: float = 5.0) -> list[PollAnswer]:
    """Collect this many answers."""
    answers: list[PollAnswer] = []
    until = time.monotonic() + seconds
    while len(answers) < count and time.monotonic() < until:
        answers += pool.answers(0.1, gather=0.0)
    return answers


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """An event that lets waiting requests end. It is set at the end of the test in any case."""
    event = threading.Event()
    yield event
    event.set()


def answer_after(event: threading.Event, slow: set[int]) -> Callable[[ClaimedJob], ApiReply]:
    """Return an `ask` function that answers for `slow` jobs only once the event is set."""

    def ask(job: ClaimedJob) -> ApiReply:
        if job.id in slow:
            event.wait(10)
        return ApiReply(Processing())

    return ask


def test_given_a_slow_request_when_others_are_done_then_their_answers_come_and_their_threads_are_free(
    release: threading.Event,
) -> None:
    pool = RequestPool(answer_after(release, {1}), threads=2)
    for number in range(1, 8):
        pool.start(claimed_job(number), 0.0)

    assert sorted(answer.job.id for answer in collect(pool, 6)) == [2, 3, 4, 5, 6, 7]
    assert pool.outstanding == 1

    release.set()
    assert [answer.job.id for answer in collect(pool, 1)] == [1]
    assert pool.outstanding == 0


def test_given_more_jobs_than_threads_then_there_are_never_more_requests_than_threads() -> None:
    lock, now, maximum = threading.Lock(), 0, 0

    def ask(_: ClaimedJob) -> ApiReply:
        nonlocal now, maximum
        with lock:
            now += 1
            maximum = max(maximum, now)
        time.sleep(0.01)
        with lock:
            now -= 1
        return ApiReply(Processing())

    pool = RequestPool(ask, threads=4)
    for number in range(40):
        pool.start(claimed_job(number), 0.0)

    assert len(collect(pool, 40)) == 40
    assert maximum == 4


def test_given_a_silent_host_when_others_are_polled_then_they_do_not_wait_for_it(
    release: threading.Event,
) -> None:
    pool = RequestPool(answer_after(release, set(range(10))), threads=2)
    for number in range(10):
        pool.start(claimed_job(number, "silent.test"), 0.0)
    for number in range(10, 14):
        pool.start(claimed_job(number), 0.0)

    assert sorted(item.job.id for item in collect(pool, 4)) == [10, 11, 12, 13]
    assert (pool.outstanding_at("silent.test"), pool.outstanding_at("api.test"), pool.outstanding) == (10, 0, 10)
    assert [item.id for item in pool.take_back()] == list(range(2, 10))
    assert pool.outstanding_at("silent.test") == 2


def test_given_few_jobs_then_only_the_needed_threads_are_started(release: threading.Event) -> None:
    before = threading.active_count()
    pool = RequestPool(answer_after(release, {1, 2}), threads=128)
    pool.start(claimed_job(1), 0.0)
    pool.start(claimed_job(2), 0.0)

    assert threading.active_count() == before + 2


def test_given_a_future_send_time_when_a_job_is_started_then_it_is_not_sent_before() -> None:
    pool = RequestPool(lambda _: ApiReply(Processing()), threads=1)
    moment = time.monotonic() + 0.15
    pool.start(claimed_job(1), moment)

    (answer,) = collect(pool, 1)

    assert moment <= answer.sent < moment + 0.5


def test_given_a_request_that_raises_then_the_api_counts_as_down_and_the_thread_continues(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def ask(item: ClaimedJob) -> ApiReply:
        if item.id == 1:
            raise RuntimeError("a custom adapter")
        return ApiReply(Processing())

    pool = RequestPool(ask, threads=1)
    pool.start(claimed_job(1), 0.0)
    pool.start(claimed_job(2), 0.0)

    replies = {item.job.id: item.reply for item in collect(pool, 2)}

    assert isinstance(replies[1], ApiDown)
    assert replies[2] == Processing()
    assert "a request failed job=1" in caplog.text


def test_given_a_stop_when_jobs_wait_for_a_thread_then_they_are_returned_and_the_others_finish(
    release: threading.Event,
) -> None:
    pool = RequestPool(answer_after(release, {1}), threads=1)
    for number in range(1, 5):
        pool.start(claimed_job(number), 0.0)
    until = time.monotonic() + 5
    while pool._lanes["api.test"].queue.qsize() > 3 and time.monotonic() < until:
        time.sleep(0.001)  # the first request has started

    assert [item.id for item in pool.take_back()] == [2, 3, 4]
    assert pool.outstanding == 1
    release.set()
    assert [item.job.id for item in collect(pool, 1)] == [1]


def test_given_no_answers_when_waiting_then_the_wait_ends_in_time_or_when_woken() -> None:
    pool = RequestPool(lambda _: ApiReply(Processing()), threads=1)
    began = time.monotonic()
    assert pool.answers(0.05, gather=0.0) == []
    assert 0.04 < time.monotonic() - began < 1.0

    threading.Timer(0.05, pool.wake).start()
    began = time.monotonic()
    assert pool.answers(10.0, gather=0.0) == []
    assert time.monotonic() - began < 5.0


def test_given_a_probe_when_it_is_answered_then_the_answer_says_so() -> None:
    pool = RequestPool(lambda _: ApiReply(Processing()), threads=1)
    pool.start(claimed_job(1), 0.0, probe=True)

    assert [answer.probe for answer in collect(pool, 1)] == [True]


def test_a_closed_pool_leaves_no_thread() -> None:
    pool = RequestPool(lambda job: ApiReply(Processing()), threads=2)
    before = set(threading.enumerate())
    for number in range(4):
        pool.start(claimed_job(number), time.monotonic())
    collect(pool, 4)
    started = set(threading.enumerate()) - before

    pool.close()

    assert started
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)


def threads_of(pool: RequestPool) -> int:
    """Return the number of threads for the only host of these tests."""
    return pool._lanes["api.test"].threads


@pytest.fixture
def fixed_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of threads changes only when a test changes it."""
    monkeypatch.setattr("worker.polling.request_pool.ADAPT_SECONDS", math.inf)


def test_given_a_busy_processor_when_adapted_then_few_threads_are_left_and_no_job_is_lost(
    release: threading.Event, fixed_threads: None
) -> None:
    before = set(threading.enumerate())
    pool = RequestPool(answer_after(release, set(range(100))), threads=64)
    for number in range(100):
        pool.start(claimed_job(number), 0.0)
    assert threads_of(pool) == 64

    for _ in range(5):
        pool._set_threads(0.9)

    assert threads_of(pool) == 8
    release.set()
    assert len(collect(pool, 100)) == 100
    until = time.monotonic() + 5
    while len(set(threading.enumerate()) - before) > 8 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(set(threading.enumerate()) - before) == 8


def test_given_few_threads_when_jobs_wait_and_the_processor_is_idle_then_all_threads_return_at_once(
    release: threading.Event, fixed_threads: None
) -> None:
    pool = RequestPool(answer_after(release, set(range(100))), threads=64)
    for number in range(100):
        pool.start(claimed_job(number), 0.0)
    for _ in range(5):
        pool._set_threads(0.9)

    for _ in range(3):
        pool._set_threads(0.1)
        pool.answers(0.0, gather=0.0)

    assert threads_of(pool) == 64
    release.set()
    assert len(collect(pool, 100)) == 100


def test_given_few_threads_when_jobs_come_after_a_pause_then_all_threads_are_allowed(
    release: threading.Event, fixed_threads: None
) -> None:
    pool = RequestPool(answer_after(release, set(range(1_000, 1_064))), threads=64)
    for number in range(64):
        pool.start(claimed_job(number), 0.0)
    for _ in range(5):
        pool._set_threads(0.9)
    collect(pool, 64)
    assert threads_of(pool) == 8

    for number in range(1_000, 1_064):
        pool.start(claimed_job(number), 0.0)

    assert threads_of(pool) == 64


def test_an_answer_has_the_processor_time_of_its_request() -> None:
    def ask(_: ClaimedJob) -> ApiReply:
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        return ApiReply(Processing())

    pool = RequestPool(ask, threads=1)
    pool.start(claimed_job(1), 0.0)

    (answer,) = collect(pool, 1)

    assert 0.05 <= answer.cpu_seconds < 0.5


def test_given_stopping_threads_when_jobs_are_taken_back_then_the_threads_end_and_no_job_is_lost(
    release: threading.Event,
) -> None:
    before = set(threading.enumerate())
    pool = RequestPool(answer_after(release, {1, 2}), threads=2)
    pool.start(claimed_job(1), 0.0)
    pool.start(claimed_job(2), 0.0)
    lane = pool._lanes["api.test"]
    while lane.queue.qsize():
        time.sleep(0.001)  # both requests have started
    lane.limit_threads(1)
    pool.start(claimed_job(3), 0.0)

    assert [job_.id for job_ in pool.take_back()] == [3]
    release.set()
    collect(pool, 2)
    until = time.monotonic() + 5
    while len(set(threading.enumerate()) - before) > threads_of(pool) and time.monotonic() < until:
        time.sleep(0.01)
    assert len(set(threading.enumerate()) - before) == threads_of(pool)


def test_given_requests_of_one_host_that_only_wait_when_another_host_is_busy_then_they_keep_their_threads(
    release: threading.Event, fixed_threads: None
) -> None:
    """Its threads slow down no other host. With fewer threads a slow host would be polled less and less often."""
    pool = RequestPool(answer_after(release, set(range(200))), threads=64)
    for number in range(200):
        pool.start(claimed_job(number, host="slow.test" if number % 2 else "fast.test"), 0.0)
    slow, fast = pool._lanes["slow.test"], pool._lanes["fast.test"]

    for _ in range(5):
        pool._set_threads(0.9, light=[slow])

    assert (slow.max_threads, fast.max_threads) == (64, 8)
    release.set()
    assert len(collect(pool, 200)) == 200
