"""Wake-ups: a Redis pub/sub message that something is due now. Lost or duplicate wake-ups do no harm."""

import logging
import threading
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from worker.coordination.rate_limiter import redis_client

log = logging.getLogger(__name__)

CHANNEL = "fetch-worker:wake-up"
SEND_SECONDS = 0.5
QUIET_SECONDS = 0.2  # a process sends at most one per this time: a woken poller keeps looking for longer
RETRY_SECONDS = 5.0
LISTEN_SECONDS = 10.0


class WakeUps:
    """Sends the wake-ups of one process. It never raises, and never blocks for long."""

    def __init__(self, redis_url: str) -> None:
        self._client = redis_client(redis_url, seconds=SEND_SECONDS)
        self._quiet_until = 0.0

    def send(self) -> None:
        """Wake the waiting poll runs, unless this was just done."""
        now = time.monotonic()
        if now < self._quiet_until:
            return
        self._quiet_until = now + QUIET_SECONDS
        try:
            self._client.publish(CHANNEL, b"")
        except (RedisError, OSError):
            self._quiet_until = now + RETRY_SECONDS


def listen(redis_url: str, wake: Callable[[], None]) -> None:
    """Call `wake` for each wake-up, from a background thread that runs as long as the process."""
    threading.Thread(target=_listen, args=(redis_url, wake), name="wake-ups", daemon=True).start()


def _listen(redis_url: str, wake: Callable[[], None]) -> None:
    client = redis_client(redis_url, seconds=LISTEN_SECONDS)
    while True:
        try:
            with client.pubsub(ignore_subscribe_messages=True) as subscription:  # type: ignore[no-untyped-call]  # redis-py
                subscription.subscribe(CHANNEL)
                while True:
                    if subscription.get_message(timeout=LISTEN_SECONDS) is not None:
                        wake()
        except (RedisError, OSError) as error:
            log.debug("wake-ups can't be received reason=%s", type(error).__name__)
            time.sleep(RETRY_SECONDS)
