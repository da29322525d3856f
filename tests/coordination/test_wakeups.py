"""Wake-ups on a real Redis: heard at once, sent seldom, and missed without harm."""

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


class BreakerInput:
    """Counts wake-ups."""

    def __init__(self) -> None:
        self.count = 0
        self._came = threading.Event()

    def __call__(self) -> None:
        self.count += 1
        self._came.set()

    def wait(self, seconds: float = 30.0) -> bool:
        """Waits for the next one."""
        came = self._came.wait(seconds)
        self._came.clear()
        return came


def client(url: str) -> "redis.Redis":
    """A client of the tests' own."""
    return redis.Redis(unix_socket_path=url.removeprefix("redis+socket://"))


def listening(url: str, count: int = 1) -> None:
    """Waits until so many listen."""
    with client(url) as own:
        wait_until(lambda: dict(own.pubsub_numsub(CHANNEL))[CHANNEL.encode()] >= count, f"{count} listen")


def test_given_processes_that_listen_when_one_word_is_sent_then_all_hear_it(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url:
        everyone = [BreakerInput(), BreakerInput()]
        for heard in everyone:
            listen(url, heard)
        listening(url, 2)

        WakeUps(url).send()

        assert all(heard.wait() for heard in everyone)


def test_given_a_word_just_sent_when_more_is_due_then_no_second_one_is_sent_until_a_while_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with redis_server(tmp_path) as url:
        heard = BreakerInput()
        listen(url, heard)
        listening(url)
        sender = WakeUps(url)

        for _ in range(500):
            sender.send()
        assert heard.wait()
        monkeypatch.setattr(sender, "_quiet_until", 0.0)  # as after a while
        sender.send()
        assert heard.wait()

        with client(url) as own:
            own.ping()  # whatever was published before has been sent by now
        assert heard.count == 2


def test_given_no_redis_when_a_word_is_to_be_sent_then_nothing_is_raised_and_it_is_not_tried_each_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sender = WakeUps(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        began = time.monotonic()

        for _ in range(200):
            sender.send()

        assert time.monotonic() - began < 10.0
    WakeUps("redis://127.0.0.1:1/0").send()


def test_given_a_redis_that_goes_away_when_it_is_back_then_words_are_heard_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeups, "RETRY_SECONDS", 0.05)
    heard = BreakerInput()
    with redis_server(tmp_path) as url:
        listen(url, heard)
        listening(url)
    (tmp_path / "redis.sock").unlink(missing_ok=True)
    with redis_server(tmp_path) as url:
        listening(url)
        WakeUps(url).send()

        assert heard.wait()
