"""Tells how many bytes of each long download are there: every two seconds, one statement for all of a process's."""

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

REPORT_SECONDS = 2.0  # an attempt that is over sooner is never told of
LOCKED_SECONDS = 1.0  # how long a report waits for anything that is locked: the next one says it anyway


class ReceivedBytes:
    """The downloads of one process that are under way. Its thread is there only while something is received."""

    def __init__(self, engine: Engine, holder: str) -> None:
        self._engine = engine.execution_options(**{RELAXED: True, LOCK_WAIT: LOCKED_SECONDS})
        self._holder = holder
        self._running: dict[Claim, tuple[Incoming, float]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextmanager
    def counted(self, output: ClaimedOutput, incoming: Incoming) -> Iterator[None]:
        """An attempt that fills `incoming` is under way."""
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
        """The attempts that are under way for REPORT_SECONDS and longer at `now`, and how many bytes are there."""
        running = list(self._running.items())
        return {claim: incoming.size for claim, (incoming, since) in running if since <= now - REPORT_SECONDS}

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="received-bytes", daemon=True)
        with suppress(RuntimeError):  # no room for a thread, or the process is ending: the download itself goes on
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        told: Mapping[Claim, int] = {}
        while True:
            time.sleep(REPORT_SECONDS)
            with self._lock:
                if not self._running:
                    self._thread = None  # under the lock: whoever begins to receive something starts another one
                    return
                sizes = self.lasting(time.monotonic())
            self._tell({claim: size for claim, size in sizes.items() if told.get(claim) != size})
            told = sizes

    def _tell(self, received: Mapping[Claim, int]) -> None:
        if not received:
            return
        try:
            with self._engine.begin() as connection:
                record_progress(connection, self._holder, received, now=database_now(connection))
        except Exception as error:  # nothing depends on it, and the thread has to go on
            log.info("the bytes received so far could not be written reason=%s", type(error).__name__)
