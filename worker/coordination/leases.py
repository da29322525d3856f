"""Keeps this process's leases alive: one statement per third of a lease, for whatever the process has claimed.

A process that was stopped (SIGSTOP, a suspended host) does not notice that its leases are over: others have taken its
work. So before each request it asks whether the claim is sure to last (`check`). The ends of leases are kept by a clock
of this host that goes on while it is suspended.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from sqlalchemy import Engine

from worker.coordination.sent_requests import TOKEN_BYTES, SentRequests
from worker.store.claims import Claim, renew_leases
from worker.store.engine import database_now, error_name
from worker.system.process_identity import holder_name

log = logging.getLogger(__name__)

TOKENS_KEPT = 256  # claims whose lease is over are forgotten when there are more, and at each renewal

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # Linux; elsewhere CLOCK_MONOTONIC counts sleep, too


def boot_seconds() -> float:
    """Return the seconds since the host started, counting the time that it was suspended."""
    return time.clock_gettime(_CLOCK)


class LeaseLost(Exception):
    """The claim is not sure to last: nothing may be sent for it any more, and it is to be given back."""


class LeaseKeeper:
    """The holder of this process's claims. Its thread runs while there is something to hold.

    With `sent`, each request that `check` permits is noted there.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        lease: timedelta,
        holder: str | None = None,
        sent: SentRequests | None = None,
        clock: Callable[[], float] = boot_seconds,
    ) -> None:
        self.holder = holder or holder_name()
        self.lease = lease
        self._engine = engine
        self._sent = sent
        self._clock = clock
        self._seconds = lease.total_seconds()
        # A lease is renewed every third of its length, so more than a third is left while renewals work. With less
        # left a request could still be on its way when the next process asks.
        self._margin = self._seconds / 3
        self._ends: dict[str, float] = {}  # by token: when the lease ends that the claim began with
        self._renewed: tuple[frozenset[Claim], float] = (frozenset(), 0.0)  # what the last renewal kept, until when
        self._held = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "LeaseKeeper":
        """Some work is claimed, or about to be."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)
                thread.start()  # where no thread is left nothing is held, and the next one tries again
                self._thread = thread
            self._held += 1
        self._wake.set()
        return self

    def __exit__(self, *_: object) -> None:
        """That work is done."""
        with self._lock:
            self._held -= 1

    def new_token(self) -> str:
        """Return a token for a claim whose transaction is about to begin: its lease lasts at least from now on."""
        if len(self._ends) > TOKENS_KEPT:
            self._forget_ended()
        token = secrets.token_hex(TOKEN_BYTES)
        self._ends[token] = self._clock() + self._seconds
        return token

    def check(self, row_id: int, token: str) -> None:
        """Permit one request for a claim, right before it is sent. Raises LeaseLost where the lease may be over."""
        now = self._clock() + self._margin
        if now >= self._ends.get(token, 0.0):
            kept, until = self._renewed
            if now >= until or (row_id, token) not in kept:
                raise LeaseLost
        if self._sent is not None:
            self._sent.note(row_id, token)

    def renew(self) -> None:
        """Renew the leases of this process that are not over. Raises what the database raises."""
        ends = self._clock() + self._seconds  # read before the database reads its own clock: never later than the row
        with self._engine.begin() as connection:
            kept = renew_leases(connection, self.holder, lease=self.lease, now=database_now(connection))
        self._renewed = (frozenset(kept), ends)
        self._forget_ended()

    def _forget_ended(self) -> None:
        now = self._clock()
        for token, ends in list(self._ends.items()):
            if now >= ends:
                self._ends.pop(token, None)

    def _run(self) -> None:
        rest = threading.Event()
        while True:
            rest.wait(self._seconds / 3)
            with self._lock:
                idle = self._held == 0
                if idle:
                    self._wake.clear()  # under the lock: whoever begins to hold something wakes after it
            if idle:
                self._wake.wait()
                continue
            try:
                self.renew()
            except Exception as error:  # a thread that dies here would let every lease run out
                log.warning("leases could not be renewed reason=%s", error_name(error))
