"""The timers of the consumer's event loop: often while there are tasks, seldom without."""

import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker.state import reserved_requests
from kombu.asynchronous import Hub

from worker.process import bootsteps
from worker.process.bootsteps import EventLoopTimers


class Request:
    """A task request that the worker has received."""


class Flushes:
    """A consumer that counts how often its task events are sent."""

    def __init__(self) -> None:
        self.hub = Hub()
        self.pool = SimpleNamespace()
        self.event_dispatcher = SimpleNamespace(on_send_buffered=lambda: None, buffer_limit=1)
        self.count = 0

    def _flush_events(self) -> None:
        self.count += 1


def passes(consumer: Flushes, seconds: float) -> int:
    """Run the event loop for some seconds. Return how many passes it made."""
    loop = consumer.hub.create_loop()
    until, count = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        next(loop)
        count += 1
    return count


@pytest.fixture
def consumer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A consumer with its timers. Its loop waits for a connection on which nothing arrives."""
    monkeypatch.setattr(bootsteps, "QUIET_SECONDS", 0.3)
    consumer = Flushes()
    here, there = socket.socketpair()
    consumer.hub.add_reader(here, lambda: None)
    timers = EventLoopTimers(consumer)
    timers.start(consumer)
    yield consumer
    timers.stop(consumer)
    consumer.hub.close()
    here.close()
    there.close()


def test_given_tasks_then_the_loop_wakes_many_times_a_second_and_sends_events(consumer: Flushes) -> None:
    request = Request()
    reserved_requests.add(request)
    try:
        assert passes(consumer, 1.0) >= 10
    finally:
        reserved_requests.discard(request)
    assert 3 <= consumer.count <= 5


def test_given_no_task_for_a_while_then_the_loop_wakes_about_once_a_second(consumer: Flushes) -> None:
    passes(consumer, 0.5)

    assert passes(consumer, 2.0) <= 8
    assert consumer.count >= 1


def test_given_a_task_after_a_quiet_time_then_the_loop_wakes_often_again_at_once(consumer: Flushes) -> None:
    passes(consumer, 1.5)
    request = Request()
    reserved_requests.add(request)
    try:
        passes(consumer, 1.1)  # the pass that received the message
        assert passes(consumer, 0.5) >= 5
    finally:
        reserved_requests.discard(request)


def test_given_stopped_timers_then_nothing_is_called(consumer: Flushes) -> None:
    timers = EventLoopTimers(consumer)
    timers.start(consumer)
    timers.stop(consumer)

    assert timers._timers == []
    assert timers._adapt not in consumer.hub.on_tick
