"""A run that watches: it requests another run when jobs are due, and polls itself only if none starts."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine

from tests.polling.polls import Polls, submitted
from tests.waiting import wait_until
from worker.polling.poller import PollReport
from worker.sandbox import Sandbox
from worker.store.engine import database_now
from worker.store.holds import hold_account_or_host


class Watch:
    """A watching run in a thread of its own. `requests` has the times at which it requested a run."""

    def __init__(self, polls: Polls) -> None:
        self.requests: list[float] = []
        self.report: PollReport | None = None
        self._polls = polls
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.report = self._polls.poller.run(seconds=10, request_run=lambda: self.requests.append(time.monotonic()))

    @contextmanager
    def running(self) -> Iterator["Watch"]:
        """Let the run watch during the `with` block."""
        self._thread.start()
        try:
            yield self
        finally:
            self._polls.poller.stop()
            self._thread.join(20)
            assert not self._thread.is_alive()


def test_given_no_due_job_when_a_run_watches_then_it_requests_nothing_and_asks_nothing(polls: Polls) -> None:
    with Watch(polls).running() as watch:
        time.sleep(1.5)

    assert watch.requests == []
    assert not polls.sandbox.calls.fetches


def test_given_due_jobs_when_a_run_watches_then_it_requests_a_run_at_once_and_leaves_the_jobs_to_it(
    polls: Polls,
) -> None:
    with Watch(polls).running() as watch:
        (remote_id,) = submitted(polls.sandbox, 1)
        (job_id,) = polls.track([remote_id])
        polls.poller.wake()
        wait_until(lambda: watch.requests, "a run is requested")

        assert polls.row(job_id).claim_token is None
        assert polls.poller.run(seconds=0.3) is not None, "the requested run takes over at once"

    assert polls.row(job_id).status == "downloading"
    assert watch.report is not None
    assert watch.report.asked == 0


def test_given_that_no_requested_run_starts_when_a_run_watches_then_it_polls_itself(
    engine: Engine, redis_url: str, sandbox: Sandbox
) -> None:
    """There is no broker."""
    polls = Polls(engine, redis_url, sandbox, options={"hand_over_seconds": 0.3})
    (remote_id,) = submitted(polls.sandbox, 1)
    (job_id,) = polls.track([remote_id])

    with Watch(polls).running() as watch:
        wait_until(lambda: polls.row(job_id).status == "downloading", "the watching run polls the job")

    assert len(watch.requests) == 1


def test_given_jobs_behind_a_held_account_when_a_run_watches_then_it_requests_nothing(polls: Polls) -> None:
    polls.track(submitted(polls.sandbox, 1))
    with polls.engine.begin() as connection:
        hold_account_or_host(connection, "account", "default", now=database_now(connection))

    with Watch(polls).running() as watch:
        time.sleep(1.2)

    assert watch.requests == []


def test_given_fewer_requests_than_due_jobs_when_polled_then_one_run_waits_for_the_rate(polls: Polls) -> None:
    """It does not end after an idle second: monitors would show a row for each request."""
    polls.rps = 0.8
    polls.track(submitted(polls.sandbox, 3))

    report = polls.poller.run(seconds=8)

    assert report is not None
    assert report.asked == 3
