"""One run at a time polls, and a preemptible run ends in favour of the next."""

import threading
import time

import pytest

from tests.polling.polls import Polls
from worker.polling import run_lock
from worker.polling.run_lock import RunLock


def test_given_an_active_run_when_another_starts_then_the_other_ends_at_once(polls: Polls) -> None:
    first = threading.Thread(target=polls.run, args=(1.0,))
    first.start()
    time.sleep(0.1)

    assert polls.poller.run() is None

    first.join()


# ── the lock alone ────────────────────────────────────────────────────────────────────────────────────────────────────


def no_wake() -> None:
    """Fail. Nothing may be woken."""
    raise AssertionError("a run was woken that does not end early")


def test_given_a_run_then_its_thread_and_last_pass_are_reported_until_it_ends() -> None:
    lock = RunLock()
    before = lock.progress
    began = time.monotonic()

    assert lock.acquire(preemptible=False, wake=no_wake)
    during = lock.progress
    lock.release()

    assert during is not None
    assert during[1] == threading.get_ident()
    assert began <= during[0] <= lock.last_pass <= time.monotonic()
    assert (before, lock.progress) == (None, None)


def test_given_a_run_that_is_not_preemptible_when_another_starts_then_it_gives_up_at_once() -> None:
    lock = RunLock()
    lock.acquire(preemptible=False, wake=no_wake)

    assert not lock.acquire(preemptible=False, wake=no_wake)
    assert not lock.preempted

    lock.release()
    assert lock.acquire(preemptible=False, wake=no_wake), "the lock is free again"


def test_given_a_preemptible_run_when_another_starts_then_it_is_woken_and_sees_that_it_should_end() -> None:
    lock, preempted = RunLock(), list[bool]()
    lock.acquire(preemptible=True, wake=no_wake)
    preempted.append(lock.preempted)

    def end_run() -> None:
        preempted.append(lock.preempted)
        lock.release()

    assert lock.acquire(preemptible=True, wake=end_run)
    preempted.append(lock.preempted)

    assert preempted == [False, True, False], "the next run need not end"


def test_given_a_preemptible_run_that_does_not_end_then_the_other_gives_up_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_lock, "TAKE_OVER_SECONDS", 0.01)
    lock, wakes = RunLock(), list[bool]()
    lock.acquire(preemptible=True, wake=no_wake)

    assert not lock.acquire(preemptible=False, wake=lambda: wakes.append(lock.preempted))

    assert wakes == [True]
    assert not lock.preempted
