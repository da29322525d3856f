"""The state of orders: those that wait to be sent, the slots at the API, and uncertain orders, by account.

Of each account at most `COUNTED_MOST` + 1 orders are counted, in the order of an index, so the cost is limited.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, func, select

from worker.core.slots import SlotLimit
from worker.store.orders import accounts_with_orders, busy_slots
from worker.store.schema import breakers, jobs, orders
from worker.store.slots import all_slots

COUNTED_MOST = 10_000
EVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class WaitingOrders:
    """The orders of an account for one host that wait to be sent. `due_at` is the earliest of their due times."""

    account: str
    host: str
    count: int
    due_at: datetime


@dataclass(frozen=True, slots=True)
class AccountOrders:
    """The orders of an account, and its slots.

    `waiting` orders are not sent yet, `sending` orders have a running request, and `at_api` orders have a job that the
    API works on. The last two take a slot each, `taken` together; `slots` is how many there are. If a slot is free,
    `free_since` is the last time at which it may have become free; otherwise it is None.
    """

    account: str
    waiting: int
    sending: int
    at_api: int
    uncertain: int
    slots: int
    free_since: datetime | None

    @property
    def taken(self) -> int:
        """The number of slots that are taken."""
        return self.sending + self.at_api

    @property
    def ordered(self) -> int:
        """The number of jobs that the API has not taken yet."""
        return self.waiting + self.sending


class OrderState(NamedTuple):
    """All orders that need attention: those that wait by account and host, and the orders of each account."""

    waiting: Sequence[WaitingOrders] = ()
    accounts: Mapping[str, AccountOrders] = MappingProxyType({})

    def of(self, account: str, configured: int | None) -> AccountOrders:
        """Return the orders of an account, also if it never had any. `configured` is its number in SD_API_SLOTS."""
        none = AccountOrders(account, 0, 0, 0, 0, SlotLimit(account).total(configured), EVER)
        return self.accounts.get(account, none)


def read_order_state(
    connection: Connection,
    full_slots: Callable[[str], int | None],
    *,
    accounts: Collection[str] | None = None,
    now: datetime,
) -> OrderState:
    """Read the state of all orders, or only of the orders of some accounts.

    `full_slots` returns the configured number of slots of an account, or None if it is learned.
    """
    limits = all_slots(connection)
    with_orders = accounts_with_orders(connection)
    if accounts is not None:
        limits = {name: limit for name, limit in limits.items() if name in accounts}
        with_orders = [name for name in with_orders if name in accounts]
    waiting = [group for name in with_orders for group in _waiting(connection, name)]
    busy: dict[str, list[Row[Any]]] = {}
    for row in busy_slots(connection, accounts, now=now):
        busy.setdefault(row.queue, []).append(row)
    uncertain = _count_uncertain(connection, accounts)
    counts: Counter[str] = Counter()
    for group in waiting:
        counts[group.account] += group.count
    names = sorted({*limits, *counts, *busy, *uncertain})
    asked = _last_asked(connection) if names else {}
    states = {}
    for name in names:
        limit, slots = limits.get(name) or SlotLimit(name), busy.get(name, [])
        configured = full_slots(name)
        sending = sum(row.claim_holder is not None for row in slots)
        free = limit.free(configured, len(slots), now)
        moments = [row.attempted_at for row in slots] + [limit.paused_until, asked.get(name)]
        states[name] = AccountOrders(
            account=name,
            waiting=counts[name],
            sending=sending,
            at_api=len(slots) - sending,
            uncertain=uncertain[name],
            slots=limit.total(configured),
            free_since=max((moment for moment in moments if moment is not None), default=EVER) if free else None,
        )
    return OrderState(waiting, states)


def _last_asked(connection: Connection) -> dict[str, datetime]:
    """Return when jobs of each account were last polled: a poll can find that a job is ready and its slot is free."""
    query = select(breakers.c.name, breakers.c.asked_at)
    rows = connection.execute(query.where(breakers.c.scope == "account", breakers.c.asked_at.is_not(None)))
    return {row.name: row.asked_at for row in rows}


def _waiting(connection: Connection, account: str) -> list[WaitingOrders]:
    first = (
        select(orders.c.host, orders.c.due_at)
        .where(orders.c.queue == account, orders.c.takes_slot.is_(False), orders.c.due_at.is_not(None))
        .order_by(orders.c.order_rank, orders.c.id)
        .limit(COUNTED_MOST + 1)
        .subquery()
    )
    by_host = select(first.c.host, func.count().label("number"), func.min(first.c.due_at).label("due_at"))
    rows = connection.execute(by_host.group_by(first.c.host).order_by(first.c.host))
    return [WaitingOrders(account, row.host, row.number, row.due_at) for row in rows]


def _count_uncertain(connection: Connection, accounts: Collection[str] | None) -> Counter[str]:
    query = select(jobs.c.account).where(jobs.c.status == "uncertain")
    if accounts is not None:
        query = query.where(jobs.c.account.in_(sorted(accounts)))
    first = query.limit(COUNTED_MOST + 1).subquery()
    rows = connection.execute(select(first.c.account, func.count()).group_by(first.c.account))
    return Counter({row[0]: int(row[1]) for row in rows})


@dataclass(frozen=True, slots=True)
class UncertainOrders:
    """The uncertain orders: how many, at most `COUNTED_MOST` + 1, and when the first of these was sent."""

    count: int
    since: datetime | None


def uncertain_orders(connection: Connection) -> UncertainOrders:
    """Return the uncertain orders, whose answer is lost."""
    first = (
        select(orders.c.attempted_at)
        .join(jobs, jobs.c.id == orders.c.id)
        .where(jobs.c.status == "uncertain")
        .limit(COUNTED_MOST + 1)
        .subquery()
    )
    row = connection.execute(select(func.count(), func.min(first.c.attempted_at)).select_from(first)).one()
    return UncertainOrders(int(row[0]), row[1])
