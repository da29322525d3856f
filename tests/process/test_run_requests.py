"""Requests of runs: at most one message for the same work, and no run is missed."""

import pytest
from celery import Celery

from worker.coordination.publisher import Publisher
from worker.coordination.rate_limiter import redis_client
from worker.core.queues import POLLS
from worker.process.run_requests import RunRequests

TASK = "worker.poll"


class Requests:
    """The requests of one process, and the messages that they leave on the queue."""

    def __init__(self, redis_url: str, state_url: str | None = None) -> None:
        self.redis = redis_client(redis_url, seconds=5.0)
        self.redis.flushall()  # other tests use the same server
        self._publisher = Publisher()
        self.requests = RunRequests(Celery(broker=redis_url), state_url or redis_url, self._publisher)

    @property
    def messages(self) -> int:
        """How many messages were sent."""
        assert self._publisher.finish(10)
        return self.redis.llen(POLLS)


@pytest.fixture
def process(redis_url: str) -> Requests:
    return Requests(redis_url)


def test_given_two_requests_for_the_same_work_then_one_message_is_sent(process: Requests) -> None:
    process.requests.request(TASK)
    process.requests.request(TASK)

    assert process.messages == 1


def test_given_an_active_run_when_a_run_is_requested_then_no_message_is_sent(process: Requests) -> None:
    process.requests.active(TASK)
    process.requests.request(TASK)

    assert process.messages == 0


def test_given_a_run_that_has_just_ended_when_a_run_is_requested_then_the_message_is_sent_at_once(
    process: Requests,
) -> None:
    process.requests.active(TASK)
    process.requests.ended(TASK)
    process.requests.request(TASK)

    assert process.messages == 1


def test_given_that_redis_is_away_when_a_run_ends_and_is_requested_then_the_message_is_sent(redis_url: str) -> None:
    """The broker is another server."""
    process = Requests(redis_url, state_url="redis://127.0.0.1:1/0")

    process.requests.ended(TASK)
    process.requests.request(TASK)

    assert process.messages == 1
