"""Patch for kombu's Redis transport: without it, a worker exits when it loses the connection to Redis.

Since Celery 5.7, a lost connection is closed while a task that is acknowledged late is running. kombu then looks for
the server's address on a transport that no longer exists and raises AttributeError. Celery does not treat that as a
lost connection, so the worker exits. The patch raises ConnectionError instead, and the worker reconnects.
"""

from typing import Any

import kombu
import redis
from kombu.transport import redis as transport

AFFECTED_SINCE = (5, 7)


def apply_patch() -> bool:
    """Apply the patch once, if this version of kombu needs it. Return whether it is needed."""
    version = tuple(int(part) for part in kombu.__version__.split(".")[:2])
    if version < AFFECTED_SINCE:
        return False
    original: Any = transport.Channel._connparams
    if getattr(original, "repaired", False):
        return True

    def connparams(self: Any, asynchronous: bool = False) -> Any:
        if getattr(self.connection, "client", None) is None:
            raise redis.ConnectionError("the connection of this channel is closed")
        return original(self, asynchronous)

    connparams.repaired = True  # type: ignore[attr-defined]  # a later call sees that the patch is applied
    transport.Channel._connparams = connparams  # type: ignore[method-assign]  # the patch
    return True
