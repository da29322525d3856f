"""Lets one run at a time poll."""

import threading
import time
from collections.abc import Callable

TAKE_OVER_SECONDS = 0.5  # a run ends within one pass of its loop; if the database is slow, the next message tries again


class RunLock:
    """Holds `lock` during a run. A preemptible run should end when another one waits for the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._next_waits = threading.Event()
        self._preemptible = False
        self._thread: int | None = None
        self.last_pass = time.monotonic()  # of a run's loop

    def acquire(self, *, preemptible: bool, wake: Callable[[], None]) -> bool:
        """Start a run. Return False if another one is active and does not end. `wake` ends its wait for answers."""
        if not self.lock.acquire(blocking=False) and not self._take_over(wake):
            return False
        self._preemptible = preemptible
        self.last_pass, self._thread = time.monotonic(), threading.get_ident()
        return True

    def _take_over(self, wake: Callable[[], None]) -> bool:
        """Return whether the active run ended in favour of this one."""
        if not self._preemptible:
            return False
        self._next_waits.set()
        wake()
        try:
            return self.lock.acquire(timeout=TAKE_OVER_SECONDS)
        finally:
            self._next_waits.clear()

    def release(self) -> None:
        """End the run."""
        self._preemptible = False
        self.last_pass, self._thread = time.monotonic(), None
        self.lock.release()

    @property
    def preempted(self) -> bool:
        """Whether the current run should end in favour of another one."""
        return self._preemptible and self._next_waits.is_set()

    @property
    def progress(self) -> tuple[float, int] | None:
        """The time of the run's last pass, by the monotonic clock, and its thread; None outside of a run."""
        thread = self._thread
        return None if thread is None else (self.last_pass, thread)
