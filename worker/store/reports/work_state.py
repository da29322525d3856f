"""The state of all work: accounts, hosts, worker processes and due jobs. Every page, command and metric shows this one.

It comes from the database alone. The settings and keys of the process that shows it do not matter.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property

from sqlalchemy import Connection

from worker.core.circuit_breaker import CircuitBreaker, Scope, hold_class
from worker.core.queues import DOWNLOADS, POLLS
from worker.store.breakers import all_breakers, last_asked
from worker.store.due_groups import DueGroup, due_groups
from worker.store.engine import database_now
from worker.store.jobs import waiting_accounts
from worker.store.processes import WorkerProcess, read_processes
from worker.store.reports.order_state import OrderState, WaitingOrders, read_order_state
from worker.store.schema import HELD_UNTIL
from worker.system.process_identity import dead_holders

NO_KEY = "no key"  # the class of this hold
HEALTHY_SECONDS = 30.0  # healthy: no work is due for longer, or a request was made within it


@dataclass(frozen=True, slots=True)
class AccountState:
    """An account: the reason, start and end of its hold, if it is held, and the requests per second it may make.

    `reason_class` is the reason without the message of the API. `configured` is the limit in the workers' settings, and
    `ceiling` the rate that the API accepted when it last refused a request, if it ever did.
    """

    account: str
    reason: str | None
    since: datetime | None
    until: datetime | None
    rps: float
    reason_class: str | None = None
    configured: float = 0.0
    ceiling: float | None = None


@dataclass(frozen=True, slots=True)
class HeldHost:
    """A held host of the API: the reason, start and end of the hold. `until` is `None` if an operator must end it."""

    host: str
    reason: str
    since: datetime | None
    until: datetime | None


@dataclass(frozen=True)
class WorkState:
    """The state of all work at `now`, by the database's clock. What follows from it is computed once."""

    now: datetime
    breakers: Mapping[tuple[Scope, str], CircuitBreaker]
    groups: Sequence[DueGroup]
    processes: Sequence[WorkerProcess]
    dead_holders: Collection[str]
    last_requests: Mapping[str, datetime]  # by account
    accounts: Sequence[AccountState]
    orders: OrderState = OrderState()  # noqa: RUF009  # immutable

    @cached_property
    def hosts(self) -> list[HeldHost]:
        """The held hosts, sorted by name."""
        return [
            HeldHost(breaker.name, breaker.why or "", breaker.held_since, breaker.tried_at)
            for (scope, _), breaker in sorted(self.breakers.items())
            if scope == "host" and breaker.held(self.now)
        ]

    @cached_property
    def shown_accounts(self) -> list[AccountState]:
        """The accounts as people see them: an account whose waiting jobs are all on held hosts counts as held, too."""
        return [self._with_host_hold(account) for account in self.accounts]

    def _with_host_hold(self, account: AccountState) -> AccountState:
        hosts = {host.host: host for host in self.hosts}
        waiting_at = {group.host for group in self.waiting if group.account == account.account}
        if account.reason is not None or not waiting_at or not waiting_at <= hosts.keys():
            return account
        host = hosts[min(waiting_at)]
        return replace(account, reason=f"{host.host} {host.reason}", since=host.since, until=host.until)

    @property
    def waiting(self) -> list[DueGroup | WaitingOrders]:
        """The jobs that wait for a poll, and the orders that wait to be sent."""
        return [*self.groups, *self.orders.waiting]

    @property
    def due_work(self) -> list[DueGroup | WaitingOrders]:
        """The jobs that may be polled now, and the orders that may be sent now."""
        return [*self.due, *self.due_orders]

    @cached_property
    def due(self) -> list[DueGroup]:
        """The groups with due jobs whose account and host are not held: these jobs may be polled now."""
        return [group for group in self.groups if self._may_be_asked(group)]

    @cached_property
    def due_orders(self) -> list[WaitingOrders]:
        """The due orders that may be sent now: account and host are not held, and a slot is free.

        `due_at` is when they could be sent at first: orders that waited for a slot are due since it became free.
        """
        free_since = {name: orders.free_since for name, orders in self.orders.accounts.items()}
        return [
            replace(group, due_at=max(group.due_at, since))
            for group in self.orders.waiting
            if self._may_be_asked(group) and (since := free_since[group.account]) is not None
        ]

    def _may_be_asked(self, group: DueGroup | WaitingOrders) -> bool:
        return (
            group.due_at <= self.now and group.account not in self._held_accounts and group.host not in self._held_hosts
        )

    @cached_property
    def _held_accounts(self) -> set[str]:
        return {account.account for account in self.accounts if account.reason is not None}

    @cached_property
    def _held_hosts(self) -> set[str]:
        return {host.host for host in self.hosts}

    @property
    def oldest_due_seconds(self) -> float:
        """The seconds since the oldest job became due that may be polled, or sent as an order, now; 0 without any."""
        return max(((self.now - group.due_at).total_seconds() for group in self.due_work), default=0.0)

    @property
    def last_request_at(self) -> datetime | None:
        """When any job was last polled, or `None`."""
        return max(self.last_requests.values(), default=None)

    @property
    def workers_poll(self) -> bool:
        """Whether any worker made a request lately."""
        return self._is_recent(self.last_request_at)

    def polled_lately(self, account: str) -> bool:
        """Return whether any worker made a request for this account lately."""
        return self._is_recent(self.last_requests.get(account))

    def _is_recent(self, moment: datetime | None) -> bool:
        return moment is not None and self.now - moment <= timedelta(seconds=HEALTHY_SECONDS)

    @property
    def healthy(self) -> bool:
        """Whether due work is being done."""
        return self.oldest_due_seconds <= HEALTHY_SECONDS or self.workers_poll

    def running(self, queue: str | None = None) -> list[WorkerProcess]:
        """Return the processes that are alive, or only those that consume this queue."""
        return [
            process
            for process in self.processes
            if process.alive(self.now, self.dead_holders) and (queue is None or queue in process.queues)
        ]

    @cached_property
    def pollers(self) -> list[WorkerProcess]:
        """The processes that are alive and poll."""
        return self.running(POLLS)

    @property
    def downloaders(self) -> list[WorkerProcess]:
        """The processes that are alive and download."""
        return self.running(DOWNLOADS)


def read_work_state(
    connection: Connection,
    full_rps: Callable[[str], float],
    full_slots: Callable[[str], int | None],
    *,
    accounts: Iterable[str] | None = None,
    now: datetime | None = None,
) -> WorkState:
    """Read the state of all work, or only of the work of some accounts, `now` or at the database's time.

    `full_rps` returns the requests per second that the settings allow an account. It is used for accounts that no
    running worker has recorded. `full_slots` returns the configured number of slots for orders.
    """
    now = now or database_now(connection)
    breakers = all_breakers(connection)
    only = None if accounts is None else list(accounts)
    groups = due_groups(connection, waiting_accounts(connection) if only is None else only)
    order_state = read_order_state(connection, full_slots, accounts=only, now=now)
    processes = read_processes(connection)
    dead = dead_holders(process.holder for process in processes)
    state = WorkState(now, breakers, groups, processes, dead, last_asked(connection), (), order_state)
    return replace(state, accounts=account_states(state, full_rps))


def account_states(state: WorkState, full_rps: Callable[[str], float]) -> list[AccountState]:
    """Return the state of each account that has a circuit breaker, waiting jobs, or a worker with its key, by name."""
    recorded = {name: rps for process in state.pollers for name, rps in (process.accounts or {}).items()}
    with_breaker = (name for scope, name in state.breakers if scope == "account")
    waiting = (group.account for group in state.waiting)
    names = sorted({*waiting, *recorded, *with_breaker, *state.orders.accounts})
    return [_account(name, state, recorded.get(name), full_rps(name)) for name in names]


def _account(name: str, state: WorkState, recorded_rps: float | None, default_rps: float) -> AccountState:
    breaker = state.breakers.get(("account", name), CircuitBreaker("account", name))
    configured = default_rps if recorded_rps is None else recorded_rps
    reason, reason_class, since = None, None, None
    if breaker.held(state.now):
        reason, since = breaker.why, breaker.held_since
        reason_class = hold_class(breaker.why or "")
    elif recorded_rps is None and _has_no_key(name, state):
        waiting = (group.due_at for group in state.waiting if group.account == name)
        since = min(waiting, default=None)
        if since is not None and since < HELD_UNTIL:
            reason, reason_class = no_key(name), NO_KEY
    return AccountState(
        account=name,
        reason=reason,
        since=since if reason is not None else None,
        until=breaker.tried_at if breaker.held(state.now) else None,
        rps=round(breaker.rate(configured, state.now), 2),
        reason_class=reason_class,
        configured=configured,
        ceiling=breaker.ceiling,
    )


def _has_no_key(account: str, state: WorkState) -> bool:
    """Return whether no running worker has the key of an account that no record names.

    During a rolling deployment, processes of another release may run. Their records may not say which keys they have,
    or there are none. Then requests show that one of them has the key.
    """
    says_accounts = [process.accounts is not None for process in state.pollers]
    return bool(says_accounts) and all(says_accounts) and not state.polled_lately(account)


def no_key(account: str) -> str:
    """Return the reason for holding the jobs of an account for which no running worker has a key."""
    return f"no key for account {account}"
