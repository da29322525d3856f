"""Wake-ups with a real Redis: received at once, sent rarely, and harmless if lost."""

import socket
import threading
import time
from pathlib import Path

import pytest
import redis

from tests.servers import redis_server
from tests.waiting import wait_until
from worker.coordination import wakeups
from worker.coordination.wakeups import CHANNEL, WakeUps, listen

pytestmark = pytest.mark.every_python


class WakeCounter:
    """Counts wake-ups."""

    def __init__(self) -> None:
        self.count = 0
        self._woken = threading.Event()

    def __call__(self) -> None:
        self.count += 1
        self._woken.set()

    def wait(self, seconds: float = 30.0) -> bool:
        """Wait for the next wake-up."""
        woken = self._woken.wait(seconds)
        self._woken.clear()
        return woken


def client(url: str) -> "redis.Redis":
    """A separate Redis client of the tests."""
    return redis.Redis(unix_socket_path=url.removeprefix("redis+socket://"))


def listening(url: str, count: int = 1) -> None:
    """Wait until this many clients listen."""
    with client(url) as redis_:
        wait_until(lambda: dict(redis_.pubsub_numsub(CHANNEL))[CHANNEL.encode()] >= count, f"{count} listen")


def test_given_listening_processes_when_a_wake_up_is_sent_then_all_receive_it(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url:
        counters = [WakeCounter(), WakeCounter()]
        for counter in counters:
            listen(url, counter)
        listening(url, 2)

        WakeUps(url).send()

        assert all(counter.wait() for counter in counters)


def test_given_a_recent_wake_up_when_more_is_due_then_no_second_one_is_sent_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with redis_server(tmp_path) as url:
        counter = WakeCounter()
        listen(url, counter)
        listening(url)
        sender = WakeUps(url)

        for _ in range(500):
            sender.send()
        assert counter.wait()
        monkeypatch.setattr(sender, "_quiet_until", 0.0)  # as after some time
        sender.send()
        assert counter.wait()

        with client(url) as redis_:
            redis_.ping()  # earlier messages have been sent by now
        assert counter.count == 2


def test_given_no_redis_when_a_wake_up_is_sent_then_nothing_is_raised_and_it_is_not_retried_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sender = WakeUps(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        began = time.monotonic()

        for _ in range(200):
            sender.send()

        assert time.monotonic() - began < 10.0
    WakeUps("redis://127.0.0.1:1/0").send()


def test_given_a_lost_redis_when_it_is_back_then_wake_ups_are_received_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeups, "RETRY_SECONDS", 0.05)
    counter = WakeCounter()
    with redis_server(tmp_path) as url:
        listen(url, counter)
        listening(url)
    (tmp_path / "redis.sock").unlink(missing_ok=True)
    with redis_server(tmp_path) as url:
        listening(url)
        WakeUps(url).send()

        assert counter.wait()
