"""A repair of kombu's Redis transport, for releases in which a worker ends when Redis does.

Celery 5.7 closes the connection it has lost, while a task that acknowledges late is under way; kombu then looks for the
server's address on a transport that is gone already, and the AttributeError is nobody's connection error: the worker
ends. Said as the connection error that it is, the worker connects anew, as it does for all other tasks.
"""

from typing import Any

import kombu
import redis
from kombu.transport import redis as transport

BROKEN_SINCE = (5, 7)


def repair() -> bool:
    """Puts the repair in, once, where it is needed; whether it is."""
    version = tuple(int(part) for part in kombu.__version__.split(".")[:2])
    if version < BROKEN_SINCE:
        return False
    original: Any = transport.Channel._connparams
    if getattr(original, "repaired", False):
        return True

    def connparams(self: Any, asynchronous: bool = False) -> Any:
        if getattr(self.connection, "client", None) is None:
            raise redis.ConnectionError("the connection of this channel is gone")
        return original(self, asynchronous)

    connparams.repaired = True  # type: ignore[attr-defined]  # marks it, for the next call
    transport.Channel._connparams = connparams  # type: ignore[method-assign]  # that is the repair
    return True
