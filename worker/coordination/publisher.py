"""Publishes Celery messages from a background thread, so that the poll loop never blocks on the broker.

A message that can't be sent, or finds the queue full, is dropped: it is a hint, and the sweep sends it again.
"""

import logging
import threading
import time
from collections.abc import Callable
from queue import Full, Queue

log = logging.getLogger(__name__)

MAX_QUEUED = 1_000  # batches waiting to be sent


class Publisher:
    """One thread that runs the submitted work in order. It starts with the first work."""

    def __init__(self) -> None:
        self._queue: Queue[tuple[str, Callable[[], object]]] = Queue(MAX_QUEUED)
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()

    def send(self, messages: str, work: Callable[[], object]) -> None:
        """Queue `work`, which sends messages, for the publisher's thread. May be called from any thread."""
        with self._start_lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="publisher", daemon=True)
                thread.start()  # raises if no thread can be started: the next call tries again
                self._thread = thread
        try:
            self._queue.put_nowait((messages, work))
        except Full:
            log.warning("the publisher's queue is full, the sweep will send it what=%s", messages)

    def finish(self, seconds: float) -> bool:
        """Wait until everything is sent, at most `seconds`. Return whether it was sent."""
        if self._thread is None:
            return True
        until = time.monotonic() + seconds
        finished = threading.Event()
        try:
            self._queue.put(("nothing", finished.set), timeout=seconds)  # waits for room if the queue is full
        except Full:
            return False
        return finished.wait(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        while True:
            messages, work = self._queue.get()
            try:
                work()
            except Exception:  # one message must not end the thread
                log.exception("not sent, the sweep will send it what=%s", messages)
