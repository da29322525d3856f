"""The orders that can be sent now, and the transactions that claim and release them."""

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Connection, Engine

from worker.coordination.leases import LeaseKeeper
from worker.core import circuit_breaker
from worker.core.circuit_breaker import CircuitBreaker, Scope
from worker.core.pacing.backlog import OrderBacklog
from worker.ordering.options import OrderOptions
from worker.polling.breaker_updates import Breakers
from worker.store.breakers import all_breakers, locked_breaker, save_breaker
from worker.store.engine import database_now
from worker.store.orders import ClaimedOrder, claim_orders, has_orders, release_unsent, waiting_orders

log = logging.getLogger(__name__)

PROBE_MARGIN = timedelta(seconds=5)  # beyond the request's time-out: to write the answer before another process probes
FULL_SECONDS = 1.0  # until the next look at the slots of an account that were all taken, unless one may be free


@dataclass(frozen=True, slots=True)
class OrderView:
    """The waiting orders of each account, and the circuit breakers, as they were read at `read_at`.

    `read_at` is by the monotonic clock, `now` is the database's time at that moment. `full` has the accounts whose
    slots are all taken.
    """

    read_at: float
    now: datetime
    waiting: Mapping[str, int]
    breakers: Breakers
    full: frozenset[str]

    def time(self) -> datetime:
        """Return the database's current time."""
        return self.now + timedelta(seconds=time.monotonic() - self.read_at)

    def breaker(self, scope: Scope, name: str) -> CircuitBreaker:
        """Return the circuit breaker of an account or host. Without a row it is closed."""
        return self.breakers.get((scope, name)) or CircuitBreaker(scope, name)

    @property
    def sendable(self) -> list[str]:
        """The accounts whose orders may be sent, as far as slots and circuit breakers of accounts are known."""
        return [
            account
            for account in self.waiting
            if account not in self.full and self.breaker("account", account).allows(self.time()) != "none"
        ]

    def rate(self, account: str, configured: float) -> float:
        """Return the requests per second that an account may make now."""
        return self.breaker("account", account).rate(configured, self.time())

    def hosts(self, allowed: str) -> list[str]:
        """Return the hosts whose circuit breakers allow this: `probe` or `none`."""
        now = self.time()
        return [
            name
            for (scope, name), breaker in self.breakers.items()
            if scope == "host" and breaker.allows(now) == allowed
        ]


class Claimed(NamedTuple):
    """The claimed orders of an account, and whether they are a probe of circuit breakers."""

    orders: Sequence[ClaimedOrder] = ()
    probe: bool = False


class OrderClaims:
    """Claims and releases orders of one process. Not thread-safe, apart from `slots_may_be_free`."""

    def __init__(
        self, engine: Engine, leases: LeaseKeeper, options: OrderOptions, backlog: OrderBacklog, rng: random.Random
    ) -> None:
        self._engine = engine
        self._leases = leases
        self._options = options
        self._backlog = backlog
        self._rng = rng
        self._probe_lease = timedelta(seconds=options.timeout) + PROBE_MARGIN
        self._full: dict[str, float] = {}  # until when the slots of an account count as taken, by the monotonic clock
        self._unreleased: list[ClaimedOrder] = []
        self.breakers: Breakers = {}

    def slots_may_be_free(self) -> None:
        """Look at the slots of all accounts again. May be called from any thread."""
        self._full = {}

    def view(self) -> OrderView:
        """Read what waits. Without orders this is a single short query."""
        with self._engine.connect() as connection:
            waiting: dict[str, int] = {}
            now = datetime.now(UTC)
            if has_orders(connection):
                now = database_now(connection)
                waiting = waiting_orders(connection, self._options.keys, now=now)
            self.breakers = all_breakers(connection) if waiting else {}
        for account in self._backlog.accounts - waiting.keys():
            self._backlog.set(account, 0, 1)
        accounts = self._rng.sample(sorted(waiting), len(waiting))  # not always the same account first
        full = frozenset(account for account, until in self._full.items() if time.monotonic() < until)
        return OrderView(
            time.monotonic(), now, {account: waiting[account] for account in accounts}, self.breakers, full
        )

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
            claim = claim_orders(
                connection,
                account,
                configured_slots=self._options.slots(account),
                limit=1 if probes_account else limit,
                token=token,
                holder=self._leases.holder,
                lease=self._leases.lease,
                now=now,
                held_hosts=[*view.hosts("none"), *probed_hosts],
            )
            if not claim.orders and probed_hosts:
                host = self._rng.choice(probed_hosts)
                if locked_breaker(connection, "host", host).allows(now) == "probe":
                    claim = claim_orders(
                        connection,
                        account,
                        configured_slots=self._options.slots(account),
                        limit=1,
                        token=token,
                        holder=self._leases.holder,
                        lease=self._leases.lease,
                        now=now,
                        only_hosts=[host],
                    )
                    if claim.orders:
                        self._start_probe(connection, "host", host, now)
            if claim.orders and probes_account:
                self._start_probe(connection, "account", account, now)
        if claim.taken >= claim.total or not claim.orders:
            self._full[account] = time.monotonic() + FULL_SECONDS
        self._backlog.set(account, view.waiting[account] - len(claim.orders), claim.total)
        probe = probes_account or any(order.host in probed_hosts for order in claim.orders)
        return Claimed(claim.orders, probe)

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
