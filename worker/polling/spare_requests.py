"""Requests that an account sends when it has some to spare, such as late looks: one at a time, in their own thread."""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from worker.coordination.rate_limiter import RateLimiter, Reservation
from worker.core import circuit_breaker
from worker.core.circuit_breaker import CircuitBreaker
from worker.polling.api_client import ApiClient
from worker.polling.breaker_updates import Breakers
from worker.polling.options import PollOptions
from worker.store.breakers import all_breakers, locked_breaker, save_breaker
from worker.store.due_groups import due_groups

log = logging.getLogger(__name__)

AT_ONCE = 100  # due rows per run
LEASE_MARGIN = timedelta(seconds=30)  # beyond the request's time-out; then another process may send the request
BUSY_WAIT = timedelta(seconds=60)  # until the next try of a request that got no answer, or had to wait
HELD_WAIT = timedelta(minutes=10)  # until the next try if the account or host is held, or has no free requests
REFUSED_WAIT = timedelta(hours=1)  # until the next try if the settings do not let the key be sent to the address
OVERDUE_SECONDS = 2.0  # a job that is overdue by more shows that the account's requests are short
SOON_SECONDS = 0.05  # a request that may be sent within this time needs no wait


class DueRow(Protocol):
    """A row whose request is due, with its account and its API host."""

    @property
    def account(self) -> str:
        """The account whose key is sent."""
        ...

    @property
    def host(self) -> str:
        """The host to which it is sent."""
        ...


Due = TypeVar("Due", bound=DueRow)


class SpareRequests(ABC):
    """Sends requests of one kind that no job waits for. `run` may be called from any thread; one run at a time.

    A request waits while its account or host is held, while the account's request budget is short, and while jobs of
    the account are overdue.
    """

    name: str  # of the thread, and in the log

    def __init__(self, *, engine: Engine, api: ApiClient, budget: RateLimiter, options: PollOptions) -> None:
        self._engine = engine
        self._api = api
        self._budget = budget
        self._keys = options.keys  # can change at any time
        self._rps = options.rps
        self._lease = timedelta(seconds=options.api_timeout) + LEASE_MARGIN
        self._running = threading.Lock()
        self._stopping = threading.Event()

    @abstractmethod
    def _is_due(self) -> bool:
        """Return whether a run would find something."""

    @abstractmethod
    def _run(self) -> int:
        """Send the requests that are due now. Return how many were sent."""

    def stop(self) -> None:
        """Begin no further request. The current one is finished."""
        self._stopping.set()

    def start(self) -> None:
        """Send the due requests in a thread, unless such a thread is running or nothing is due."""
        if self._stopping.is_set() or self._running.locked() or not self._is_due():
            return
        threading.Thread(target=self._run_in_thread, name=self.name.replace(" ", "-"), daemon=True).start()

    def run(self) -> int:
        """Send the requests that are due now. Return how many were sent. Raises the errors of the database."""
        if not self._running.acquire(blocking=False):
            return 0
        try:
            return self._run()
        finally:
            self._running.release()

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except SQLAlchemyError as error:
            log.warning("%s wait for the database reason=%s", self.name, type(error).__name__)
        except Exception:
            log.exception("%s failed, the next sweep continues", self.name)

    def _split(self, connection: Connection, due: Sequence[Due], now: datetime) -> tuple[list[Due], list[Due]]:
        """Return the due rows of accounts and hosts that may be polled, and the others, which have to wait."""
        breakers = all_breakers(connection) if due else {}
        free = {account: self._is_free(connection, account, breakers, now) for account in {row.account for row in due}}
        allowed, held = list[Due](), list[Due]()
        for row in due:
            is_allowed = free[row.account] and host_may_be_polled(breakers, row.host, now)
            (allowed if is_allowed else held).append(row)
        return allowed, held

    def _is_free(self, connection: Connection, account: str, breakers: Breakers, now: datetime) -> bool:
        """Return whether an account has a key, is not held, and has no overdue job."""
        breaker = breakers.get(("account", account))
        if account not in self._keys or (breaker is not None and breaker.held(now)):
            return False
        late = now - timedelta(seconds=OVERDUE_SECONDS)
        return not any(
            group.due_at < late and host_may_be_polled(breakers, group.host, now)
            for group in due_groups(connection, [account])
        )

    def _usable_breaker(self, connection: Connection, account: str, host: str, now: datetime) -> CircuitBreaker | None:
        """Lock and return the circuit breaker of an account. Return None if no request may be sent now."""
        breaker = locked_breaker(connection, "account", account)
        is_blocked = breaker.held(now) or breaker.allows(now) == "none"
        return None if is_blocked or not host_may_be_polled(all_breakers(connection), host, now) else breaker

    def _start_probe(self, connection: Connection, breaker: CircuitBreaker, now: datetime) -> bool:
        """Note the coming request as a probe if the key is unproven. Return whether it is one."""
        is_probe = breaker.allows(now) == "probe"
        if is_probe:
            save_breaker(connection, circuit_breaker.with_probe_started(breaker, now=now, lease=self._lease))
        return is_probe

    def _reserve_request(self, account: str, breakers: Breakers, now: datetime) -> Reservation | None:
        """Reserve a request of the account's budget if it may be sent at once."""
        full_rate = self._rps(account)
        breaker = breakers.get(("account", account))
        reservation = self._budget.take(account, 1, rate=full_rate if breaker is None else breaker.rate(full_rate, now))
        if reservation.send_times and reservation.send_times[0] - time.monotonic() <= SOON_SECONDS:
            return reservation
        self._budget.give_back(reservation, len(reservation.send_times))
        return None


def host_may_be_polled(breakers: Breakers, host: str, now: datetime) -> bool:
    """Return whether no circuit breaker holds a host or limits it to a probe."""
    breaker = breakers.get(("host", host))
    return breaker is None or breaker.allows(now) == "all"
