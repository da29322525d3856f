"""The orders that can be sent now, and the transactions that claim and release them."""

import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import NamedTuple

from sqlalchemy import Connection, Engine

from worker.coordination.leases import LeaseKeeper
from worker.core import circuit_breaker
from worker.core.circuit_breaker import CircuitBreaker, Scope
from worker.core.pacing.backlog import OrderBacklog
from worker.core.slots import SlotLimit
from worker.ordering.options import OrderOptions
from worker.polling.breaker_updates import Breakers
from worker.polling.job_claims import PROBE_MARGIN
from worker.store.breakers import all_breakers, locked_breaker, save_breaker
from worker.store.engine import database_now
from worker.store.orders import (
    ClaimedOrder,
    claim_orders,
    grow_slots,
    has_orders,
    leave_queue,
    release_unsent,
    taken_by_account,
    waiting_orders,
)
from worker.store.slots import all_slots

log = logging.getLogger(__name__)

TIDY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class OrderView:
    """The waiting orders and the free slots of each account, and the circuit breakers, as they were read at `read_at`.

    `read_at` is by the monotonic clock, `now` is the database's time at that moment. Orders on held hosts don't count.
    """

    read_at: float
    now: datetime
    breakers: Breakers
    waiting: Mapping[str, int]
    free: Mapping[str, int]

    def time(self) -> datetime:
        """Return the database's current time."""
        return self.now + timedelta(seconds=time.monotonic() - self.read_at)

    def breaker(self, scope: Scope, name: str) -> CircuitBreaker:
        """Return the circuit breaker of an account or host. Without a row it is closed."""
        return self.breakers.get((scope, name)) or CircuitBreaker(scope, name)

    @property
    def sendable(self) -> list[str]:
        """The accounts whose orders may be sent: their circuit breaker allows it, and a slot is free."""
        return [
            account
            for account in self.waiting
            if self.free[account] and self.breaker("account", account).allows(self.time()) != "none"
        ]

    def rate(self, account: str, configured: float) -> float:
        """Return the requests per second that an account may make now."""
        return self.breaker("account", account).rate(configured, self.time())

    def hosts(self, allowed: str) -> list[str]:
        """Return the hosts whose circuit breakers allow this: `probe` or `none`."""
        return hosts_that_allow(self.breakers, allowed, self.time())


def hosts_that_allow(breakers: Breakers, allowed: str, now: datetime) -> list[str]:
    """Return the hosts whose circuit breakers allow this: `probe` or `none`."""
    hosts = {name: breaker for (scope, name), breaker in breakers.items() if scope == "host"}
    return [name for name, breaker in hosts.items() if breaker.allows(now) == allowed]


class Claimed(NamedTuple):
    """The claimed orders of an account, and whether they are a probe of circuit breakers."""

    orders: Sequence[ClaimedOrder] = ()
    probe: bool = False


class OrderClaims:
    """Claims and releases orders of one process. Not thread-safe, apart from `view`."""

    def __init__(
        self, engine: Engine, leases: LeaseKeeper, options: OrderOptions, backlog: OrderBacklog, rng: random.Random
    ) -> None:
        self._engine = engine
        self._leases = leases
        self._options = options
        self._backlog = backlog
        self._rng = rng
        self._probe_lease = timedelta(seconds=options.timeout) + PROBE_MARGIN
        self._tidied_at: dict[str, float] = {}  # by account
        self._unreleased: list[ClaimedOrder] = []
        self.breakers: Breakers = {}

    def view(self) -> OrderView:
        """Read what waits. Without orders this is a single short query."""
        with self._engine.connect() as connection:
            if not has_orders(connection):
                self._note_backlog({}, {})
                return OrderView(time.monotonic(), datetime.now(UTC), {}, {}, {})
            now = database_now(connection)
            self.breakers = all_breakers(connection)
            held = hosts_that_allow(self.breakers, "none", now)
            waiting = waiting_orders(connection, self._options.keys, held_hosts=held, now=now)
            taken = taken_by_account(connection, now=now) if waiting else {}
            limits = all_slots(connection) if waiting else {}
        totals = {name: limits.get(name, SlotLimit(name)) for name in waiting}
        free = {name: limit.free(self._options.slots(name), taken.get(name, 0), now) for name, limit in totals.items()}
        self._note_backlog(waiting, {name: limit.total(self._options.slots(name)) for name, limit in totals.items()})
        accounts = self._rng.sample(sorted(waiting), len(waiting))  # not always the same account first
        in_turn = {account: waiting[account] for account in accounts}
        return OrderView(time.monotonic(), now, self.breakers, in_turn, free)

    def _note_backlog(self, waiting: Mapping[str, int], slots: Mapping[str, int]) -> None:
        for account in self._backlog.accounts - waiting.keys():
            self._backlog.set(account, 0, 1)
        for account, count in waiting.items():
            self._backlog.set(account, count, slots[account])

    def tidy(self, view: OrderView) -> None:
        """From time to time, shorten the queues of these accounts, and let slots grow that are all taken for long."""
        due = [name for name in view.waiting if time.monotonic() > self._tidied_at.get(name, -math.inf) + TIDY_SECONDS]
        if not due:
            return
        self._tidied_at.update(dict.fromkeys(due, time.monotonic()))
        with self._engine.begin() as connection:
            now = database_now(connection)
            leave_queue(connection, due, now=now)
            for account in due:
                if not view.free[account]:
                    grow_slots(connection, account, self._options.slots(account), now=now)

    def claim(self, account: str, view: OrderView, *, limit: int) -> Claimed:
        """Claim up to `limit` orders of an account, or one as a probe of the circuit breakers that ask for one."""
        if limit < 1:
            return Claimed()
        token = self._leases.new_token()
        breaker = view.breaker("account", account)
        probes_account = breaker.allows(view.time()) == "probe"
        probed_hosts = view.hosts("probe")
        with self._engine.begin() as connection:
            now = database_now(connection)
            if probes_account and locked_breaker(connection, "account", account).allows(now) != "probe":
                return Claimed()
            claim = partial(
                claim_orders,
                connection,
                account,
                configured_slots=self._options.slots(account),
                token=token,
                holder=self._leases.holder,
                lease=self._leases.lease,
                now=now,
            )
            orders = claim(limit=1 if probes_account else limit, held_hosts=[*view.hosts("none"), *probed_hosts])
            if not orders and probed_hosts:
                host = self._rng.choice(probed_hosts)
                if locked_breaker(connection, "host", host).allows(now) == "probe":
                    orders = claim(limit=1, only_hosts=[host])
                    if orders:
                        self._start_probe(connection, "host", host, now)
            if orders and probes_account:
                self._start_probe(connection, "account", account, now)
        probe = probes_account or any(order.host in probed_hosts for order in orders)
        return Claimed(orders, probe)

    def _start_probe(self, connection: Connection, scope: Scope, name: str, now: datetime) -> None:
        breaker = locked_breaker(connection, scope, name)
        save_breaker(connection, circuit_breaker.with_probe_started(breaker, now=now, lease=self._probe_lease))

    def release_later(self, orders: Sequence[ClaimedOrder]) -> None:
        """Note that these claimed orders were not sent."""
        self._unreleased += orders

    def release_now(self) -> None:
        """Release the orders that were not sent. If the database is away, raise its error; the next call continues."""
        if self._unreleased:
            with self._engine.begin() as connection:
                release_unsent(connection, self._unreleased, now=database_now(connection))
            self._unreleased.clear()
