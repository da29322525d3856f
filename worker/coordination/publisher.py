"""Sends messages from a thread of its own: who has something to send never waits for the broker.

What it can't send, or has no room for, is dropped: a message is a hint, and the sweep sends it again.
"""

import logging
import threading
import time
from collections.abc import Callable
from queue import Full, Queue

log = logging.getLogger(__name__)

MOST = 1_000  # batches that wait to be sent


class Publisher:
    """One thread that does what it is handed, one after the other. It starts with the first."""

    def __init__(self) -> None:
        self._queue: Queue[tuple[str, Callable[[], object]]] = Queue(MOST)
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def send(self, what: str, work: Callable[[], object]) -> None:
        """Send something soon, from the courier's thread. May be called from any thread."""
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="courier", daemon=True)
                thread.start()  # raises where no thread is left: then the next call tries again
                self._thread = thread
        try:
            self._queue.put_nowait((what, work))
        except Full:
            log.warning("too much waits to be sent, the sweep will send it what=%s", what)

    def finish(self, seconds: float) -> bool:
        """Wait until all is sent, at most so many seconds; return whether it was."""
        if self._thread is None:
            return True
        until = time.monotonic() + seconds
        done = threading.Event()
        try:
            self._queue.put(("nothing", done.set), timeout=seconds)  # where the queue is full, once there is room
        except Full:
            return False
        return done.wait(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        while True:
            what, work = self._queue.get()
            try:
                work()
            except Exception:  # the thread must not die of one message
                log.exception("not sent, the sweep will send it what=%s", what)
