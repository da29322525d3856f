"""Renews the leases of this process: one statement per third of a lease, for all its claims.

A process that was stopped (SIGSTOP, a suspended host) does not notice that its leases have ended: other processes may
have its work. So it checks before each request that the claim still lasts (`check`). The ends of leases are measured
by a clock of this host that continues while it is suspended.
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

TOKENS_KEPT = 256  # above this number, tokens of ended leases are dropped; each renewal drops them, too

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # Linux; on other systems CLOCK_MONOTONIC includes sleep


def boot_seconds() -> float:
    """Return the seconds since the host started, including the time it was suspended."""
    return time.clock_gettime(_CLOCK)


class LeaseLost(Exception):
    """The lease may have ended. No request may be sent for the claim; release it."""


class LeaseKeeper:
    """Renews the leases of this process's claims. Its thread runs while anything is claimed.

    With `sent`, each request that `check` permits is recorded there.
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
        # A lease is renewed every third of its length, so more than a third is left while renewals work. With less
        # left, a request could still be on its way when the next process claims the job and polls it.
        self._renewal_seconds = lease.total_seconds() / 3
        self._lease_ends: dict[str, float] = {}  # by token: when the claim's first lease ends
        # The claims of the last renewal, and the end of their leases.
        self._renewed: tuple[frozenset[Claim], float] = (frozenset(), 0.0)
        self._holds = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "LeaseKeeper":
        """Have the leases renewed within the `with` block."""
        self.hold()
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def hold(self) -> None:
        """Note that work is claimed, or about to be. Leases are renewed until `drop` was called as often as `hold`."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)
                thread.start()  # if no thread can be started, nothing is counted; the next call tries again
                self._thread = thread
            self._holds += 1
        self._wake.set()

    def drop(self) -> None:
        """Note that this work is done."""
        with self._lock:
            self._holds -= 1

    def new_token(self) -> str:
        """Return a token for a claim whose transaction is about to begin. Its lease is counted from now."""
        if len(self._lease_ends) > TOKENS_KEPT:
            self._forget_ended()
        token = secrets.token_hex(TOKEN_BYTES)
        self._lease_ends[token] = self._clock() + self.lease.total_seconds()
        return token

    def check(self, row_id: int, token: str) -> None:
        """Permit one request for a claim, right before it is sent. Raises LeaseLost if the lease may have ended."""
        now = self._clock() + self._renewal_seconds
        if now >= self._lease_ends.get(token, 0.0):
            renewed_claims, until = self._renewed
            if now >= until or (row_id, token) not in renewed_claims:
                raise LeaseLost
        if self._sent is not None:
            self._sent.note(row_id, token)

    def renew(self) -> None:
        """Renew the active leases of this process. Raises the errors of the database."""
        # Read before the database's clock, so that the end is never later than the one in the row.
        ends = self._clock() + self.lease.total_seconds()
        with self._engine.begin() as connection:
            claims = renew_leases(connection, self.holder, lease=self.lease, now=database_now(connection))
        self._renewed = (frozenset(claims), ends)
        self._forget_ended()

    def _forget_ended(self) -> None:
        now = self._clock()
        for token, ends in list(self._lease_ends.items()):
            if now >= ends:
                self._lease_ends.pop(token, None)

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(self._renewal_seconds)
            with self._lock:
                idle = self._holds == 0
                if idle:
                    self._wake.clear()  # under the lock, so that a later `hold` wakes this thread
            if idle:
                self._wake.wait()
                continue
            try:
                self.renew()
            except Exception as error:  # if this thread died, every lease would run out
                log.warning("leases could not be renewed reason=%s", error_name(error))
