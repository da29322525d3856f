"""Keeps this process's leases alive: one statement per third of a lease, for whatever the process has claimed."""

import logging
import threading
from datetime import timedelta

from sqlalchemy import Engine

from worker.database import database_now
from worker.process_id import holder_name
from worker.store.claims import renew_leases

log = logging.getLogger(__name__)


class LeaseKeeper:
    """The holder of this process's claims. Its thread runs while there is something to hold."""

    def __init__(self, engine: Engine, *, lease: timedelta) -> None:
        self.holder = holder_name()
        self.lease = lease
        self._engine = engine
        self._held = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "LeaseKeeper":
        """Some work is claimed, or about to be."""
        with self._lock:
            self._held += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)
                self._thread.start()
        self._wake.set()
        return self

    def __exit__(self, *_: object) -> None:
        """That work is done."""
        with self._lock:
            self._held -= 1

    def _run(self) -> None:
        rest = threading.Event()
        while True:
            rest.wait(self.lease.total_seconds() / 3)
            with self._lock:
                idle = self._held == 0
                if idle:
                    self._wake.clear()  # under the lock: whoever begins to hold something wakes after it
            if idle:
                self._wake.wait()
                continue
            try:
                with self._engine.begin() as connection:
                    renew_leases(connection, self.holder, lease=self.lease, now=database_now(connection))
            except Exception as error:  # a thread that dies here would let every lease run out
                log.warning("leases could not be renewed reason=%s", type(error).__name__)
