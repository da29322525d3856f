"""Redelivered messages: counted if they end their process, and requeued while the database is away."""

import threading
from contextlib import suppress
from uuid import uuid4

import pytest

from worker.coordination.rate_limiter import redis_client
from worker.process.redelivery import DatabaseOutage, DeliveryCounter, TooManyDeliveries, remote_id_of


def _leave_unfinished(deliveries: DeliveryCounter, message_id: str) -> None:
    """Start a delivery that never ends, as a killed process leaves it."""
    deliveries._begin(f"fetch-worker.deliveries.{message_id}")


def test_a_message_that_ended_its_process_too_often_is_rejected_and_its_count_removed(redis_url: str) -> None:
    deliveries, message_id = DeliveryCounter(redis_client(redis_url, seconds=5), max_deliveries=3), str(uuid4())
    for _ in range(3):
        _leave_unfinished(deliveries, message_id)
    with pytest.raises(TooManyDeliveries), deliveries.counted(message_id, redelivered=True):
        raise AssertionError("it must not run again")
    ran = False
    with deliveries.counted(message_id, redelivered=True):
        ran = True
    assert ran


def test_deliveries_that_end_are_not_counted_whatever_their_result(redis_url: str) -> None:
    deliveries, message_id = DeliveryCounter(redis_client(redis_url, seconds=5), max_deliveries=1), str(uuid4())
    for _ in range(5):
        with suppress(ValueError), deliveries.counted(message_id, redelivered=True):
            raise ValueError
    with deliveries.counted(message_id, redelivered=True):
        pass


def test_without_redis_every_message_runs() -> None:
    deliveries = DeliveryCounter(redis_client("redis://127.0.0.1:1/0", seconds=1), max_deliveries=0)
    ran = []
    with deliveries.counted("a", redelivered=True):
        ran.append(1)
    assert ran == [1]


class Clock:
    """A clock, and an event whose wait moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return False


def _waited(outage: DatabaseOutage, clock: Clock) -> float:
    began = clock.now
    outage.wait(clock)  # type: ignore[arg-type]  # it has what is needed of an event
    return clock.now - began


def test_the_wait_of_a_message_grows_with_the_outage() -> None:
    clock = Clock()
    outage = DatabaseOutage(lambda: False, clock)
    waits = [_waited(outage, clock) for _ in range(30)]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (1.0, 30.0)


def test_the_wait_ends_once_the_database_answers() -> None:
    clock = Clock()
    outage = DatabaseOutage(lambda: clock.now > 100, clock)
    while clock.now < 80:
        _waited(outage, clock)
    _waited(outage, clock)
    assert clock.now == 101.0, "as soon as it answers"
    assert _waited(outage, clock) > 20, "it answered and failed again, so the check is not trusted"


def test_after_the_outage_the_first_wait_is_short_again() -> None:
    clock = Clock()
    outage = DatabaseOutage(lambda: False, clock)
    for _ in range(20):
        _waited(outage, clock)
    outage.over()
    assert _waited(outage, clock) == 1.0


def test_a_wait_ends_as_the_process_stops() -> None:
    stopping = threading.Event()
    stopping.set()
    DatabaseOutage(lambda: False).wait(stopping)


@pytest.mark.parametrize(
    ("remote", "name"),
    [("12", "12"), (12, "12"), ({"id": "a" * 500}, "a" * 128), ({"id": []}, "unknown"), ([], "unknown")],
)
def test_the_remote_id_of_a_track_message_is_named_in_short(remote: object, name: str) -> None:
    assert remote_id_of(remote) == name
