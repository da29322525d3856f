"""Report the received bytes of long downloads: one statement per process, every two seconds."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from sqlalchemy import Engine

from worker.storage.partial_files import Incoming
from worker.store.claims import Claim, ClaimedOutput, record_progress
from worker.store.engine import LOCK_WAIT, RELAXED, database_now

log = logging.getLogger(__name__)

REPORT_SECONDS = 2.0  # shorter attempts are not reported
LOCKED_SECONDS = 1.0  # how long a report waits for a lock; the next report has newer numbers anyway


class ReceivedBytes:
    """The running downloads of one process. The reporting thread runs only while there are downloads."""

    def __init__(self, engine: Engine, holder: str) -> None:
        self._engine = engine.execution_options(**{RELAXED: True, LOCK_WAIT: LOCKED_SECONDS})
        self._holder = holder
        self._running: dict[Claim, tuple[Incoming, float]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextmanager
    def counted(self, output: ClaimedOutput, incoming: Incoming) -> Iterator[None]:
        """Report the size of `incoming` during an attempt."""
        claim = (output.id, output.token)
        with self._lock:
            self._running[claim] = (incoming, time.monotonic())
            if self._thread is None:
                self._start()
        try:
            yield
        finally:
            with self._lock:
                del self._running[claim]

    def lasting(self, now: float) -> dict[Claim, int]:
        """Return the received bytes of the attempts that have been running for at least REPORT_SECONDS."""
        running = list(self._running.items())
        return {claim: incoming.size for claim, (incoming, since) in running if since <= now - REPORT_SECONDS}

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="received-bytes", daemon=True)
        with suppress(RuntimeError):  # no thread could be started, or the process is ending: the download continues
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        reported: Mapping[Claim, int] = {}
        while True:
            time.sleep(REPORT_SECONDS)
            with self._lock:
                if not self._running:
                    self._thread = None  # under the lock, so that the next download starts another thread
                    return
                sizes = self.lasting(time.monotonic())
            self._write({claim: size for claim, size in sizes.items() if reported.get(claim) != size})
            reported = sizes

    def _write(self, received: Mapping[Claim, int]) -> None:
        if not received:
            return
        try:
            with self._engine.begin() as connection:
                record_progress(connection, self._holder, received, now=database_now(connection))
        except Exception as error:  # nothing depends on it, and the thread must continue
            log.info("could not record the received bytes reason=%s", type(error).__name__)
