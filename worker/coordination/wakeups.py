"""Wake-ups: a word over Redis that something is due right now. Lost or double ones do no harm; none is needed."""

import logging
import threading
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from worker.coordination.rate_limiter import redis_client

log = logging.getLogger(__name__)

CHANNEL = "fetch-worker:wake-up"
SEND_SECONDS = 0.5
QUIET_SECONDS = 0.2  # a process that just sent one need not send another: whoever woke keeps looking for longer
RETRY_SECONDS = 5.0
LISTEN_SECONDS = 10.0


class WakeUps:
    """Sends wake-ups, for one process. It never raises, and never waits long."""

    def __init__(self, redis_url: str) -> None:
        self._client = redis_client(redis_url, seconds=SEND_SECONDS)
        self._quiet_until = 0.0

    def send(self) -> None:
        """Wakes the waiting poll runs, unless that was just done."""
        now = time.monotonic()
        if now < self._quiet_until:
            return
        self._quiet_until = now + QUIET_SECONDS
        try:
            self._client.publish(CHANNEL, b"")
        except (RedisError, OSError):
            self._quiet_until = now + RETRY_SECONDS


def listen(redis_url: str, wake: Callable[[], None]) -> None:
    """Calls `wake` for each wake-up, from a thread of its own, for as long as the process lives."""
    threading.Thread(target=_listen, args=(redis_url, wake), name="wake-ups", daemon=True).start()


def _listen(redis_url: str, wake: Callable[[], None]) -> None:
    client = redis_client(redis_url, seconds=LISTEN_SECONDS)
    while True:
        try:
            with client.pubsub(ignore_subscribe_messages=True) as heard:  # type: ignore[no-untyped-call]  # redis-py
                heard.subscribe(CHANNEL)
                while True:
                    if heard.get_message(timeout=LISTEN_SECONDS) is not None:
                        wake()
        except (RedisError, OSError) as error:
            log.debug("wake-ups can't be heard reason=%s", type(error).__name__)
            time.sleep(RETRY_SECONDS)
