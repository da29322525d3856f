"""Orders: insert them, claim them for sending, and note that a request begins.

An order is a row before it is a request. Its `queue` has the account while the order waits, takes a slot at the API or
is uncertain, and is NULL afterwards. All claims of an account lock its row in `fetch_slots`, so that no two processes
use the same slot.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Row,
    Select,
    bindparam,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
    update,
)

from worker.core.identity import FetchAddress
from worker.core.lifecycle import ORDER_STATES
from worker.core.pacing.backlog import COUNTED_MOST
from worker.core.slots import after_full_use
from worker.store.schema import MYSQL_FAMILY, jobs, orders, slots
from worker.store.slots import locked_slots, save_slots
from worker.store.transitions import ORDER_DONE, ORDER_DUE, SLOT_FREE, clear_end

FREED_MOST = 1_000  # orders of an account that leave its queue at once
UNNAMED = "order:"  # the start of the fetch address of a job that the API has not named yet


@dataclass(frozen=True, slots=True)
class NewOrder:
    """An order to insert. `payload` is a JSON object without the key. `key` is equal for two deliveries of a message.

    `deadline` is in seconds from the moment at which the API takes the order.
    """

    key: str
    account: str
    endpoint: str
    host: str
    payload: str
    kind: str
    eta: float | None
    priority: int
    reference: str | None
    on_done: str | None
    webhook_url: str | None
    deadline: float


class ClaimedOrder(NamedTuple):
    """An order that this process may send while the lease lasts."""

    id: int
    token: str
    account: str
    host: str
    endpoint: str
    payload: str
    kind: str
    eta: float | None
    deadline_seconds: float
    attempts: int  # including this one; only attempts that the API answered count
    payload_sha256: str  # of the payload as the app passed it

    @property
    def is_unchanged(self) -> bool:
        """Whether the payload is the one that the app passed. A payload from which a key was removed is not."""
        return hashlib.sha256(self.payload.encode()).hexdigest() == self.payload_sha256

    @property
    def address(self) -> FetchAddress:
        """The host of the order, in the form in which the answers of polls have it."""
        return FetchAddress("", "", self.host)


def insert_order(connection: Connection, order: NewOrder, *, now: datetime) -> int:
    """Insert an order and its job, and return the job's id. Raises IntegrityError if there is an order with its key."""
    job_values = {
        "account": order.account,
        "remote_id": "",
        "kind": order.kind,
        "fetch_url": "",
        "fetch_base": f"{UNNAMED}{order.key}",
        "fetch_host": order.host,
        "status": "ordered",
        "priority": order.priority,
        "reference": order.reference,
        "on_done": order.on_done,
        "webhook_url": order.webhook_url,
        "eta": order.eta,
        "submitted_at": now,
        "tracked_at": now,
        "deadline_at": now + timedelta(seconds=order.deadline),
        "deadline_seconds": order.deadline,
    }
    order_values = {
        "order_key": order.key,
        "queue": order.account,
        "order_rank": -order.priority,
        "host": order.host,
        "endpoint": order.endpoint,
        "payload": order.payload,
        "payload_sha256": hashlib.sha256(order.payload.encode()).hexdigest(),
        "ordered_at": now,
        "due_at": now,
    }
    if connection.dialect.name == "postgresql":
        values = {f"new_{name}": value for name, value in job_values.items()}
        values |= {f"sent_{name}": value for name, value in order_values.items()}
        return int(connection.execute(_insert_both(), values).scalar_one())
    inserted = connection.execute(insert(jobs), job_values).inserted_primary_key
    job_id = int(inserted[0]) if inserted is not None else 0
    connection.execute(insert(orders), {"id": job_id, **order_values})
    return job_id


_JOB_NAMES = (
    *("account", "remote_id", "kind", "fetch_url", "fetch_base", "fetch_host", "status", "priority", "reference"),
    *("on_done", "webhook_url", "eta", "submitted_at", "tracked_at", "deadline_at", "deadline_seconds"),
)
_ORDER_NAMES = (
    *("order_key", "queue", "order_rank", "host", "endpoint", "payload", "payload_sha256", "ordered_at", "due_at"),
)


@cache
def _insert_both() -> Any:
    """Return the statement for PostgreSQL that inserts a job and its order."""
    job_values = {name: bindparam(f"new_{name}", type_=jobs.c[name].type) for name in _JOB_NAMES}
    job = insert(jobs).values(job_values).returning(jobs.c.id).cte("job")
    order_values = [bindparam(f"sent_{name}", type_=orders.c[name].type).label(name) for name in _ORDER_NAMES]
    columns = [orders.c.id, *(orders.c[name] for name in _ORDER_NAMES)]
    return insert(orders).from_select(columns, select(job.c.id, *order_values)).returning(orders.c.id)


def job_of_order(connection: Connection, key: str) -> int | None:
    """Return the job of the order with this key, or None."""
    job_id: int | None = connection.execute(select(orders.c.id).where(orders.c.order_key == key)).scalar()
    return job_id


# ── looking ───────────────────────────────────────────────────────────────────────────────────────────────────────────


_IN_QUEUE = (orders.c.queue.is_not(None), orders.c.takes_slot.is_(False))  # it waits to be sent


def has_orders(connection: Connection) -> bool:
    """Return whether any order waits to be sent."""
    query = select(orders.c.id).where(*_IN_QUEUE).limit(1)
    return connection.execute(query).scalar() is not None


def waiting_orders(
    connection: Connection, accounts: Collection[str], *, held_hosts: Collection[str], now: datetime
) -> dict[str, int]:
    """Return how many orders of each account are due, up to `COUNTED_MOST`. Accounts without any are left out.

    Orders on `held_hosts` don't count.
    """
    if not accounts:
        return {}
    counts = connection.execute(_waiting_query(tuple(sorted(accounts)), held_hosts, now))
    return {row.account: row.waiting for row in counts if row.waiting}


def _waiting_query(accounts: Sequence[str], held_hosts: Collection[str], now: datetime) -> Any:
    conditions = (orders.c.due_at <= now, *([orders.c.host.not_in(sorted(held_hosts))] if held_hosts else []))

    def waiting(account: str) -> Select[Any]:
        due = select(orders.c.id).where(*_waits(account), *conditions).limit(COUNTED_MOST).subquery()
        count = select(func.count()).select_from(due).scalar_subquery()
        return select(literal(account).label("account"), count.label("waiting"))

    return union_all(*map(waiting, accounts))


def _waits(account: object) -> tuple[ColumnElement[bool], ...]:
    return orders.c.queue == account, orders.c.takes_slot.is_(False), orders.c.due_at.is_not(None)


def accounts_with_orders(connection: Connection) -> list[str]:
    """Return the accounts of which orders wait to be sent."""
    waiting = select(orders.c.queue).where(*_IN_QUEUE).distinct()
    return sorted(connection.execute(waiting).scalars())


def next_order(connection: Connection, *, after: datetime) -> datetime | None:
    """Return when the next postponed order is due, or the pause of an account ends. None if no order waits."""
    due = select(func.min(orders.c.due_at)).where(*_IN_QUEUE, orders.c.due_at > after)
    paused = select(func.min(slots.c.paused_until)).where(
        slots.c.paused_until > after, slots.c.account.in_(select(orders.c.queue).where(*_IN_QUEUE))
    )
    moments = [moment for query in (due, paused) if (moment := connection.execute(query).scalar()) is not None]
    return min(moments, default=None)


def order_row(connection: Connection, job_id: int) -> Row[Any] | None:
    """Return the order of a job, or None."""
    return connection.execute(select(orders).where(orders.c.id == job_id)).one_or_none()


class QueuePlace(NamedTuple):
    """The place of an order among those of its account that wait: how many are sent before it."""

    before: int
    taken: int


def queue_place(connection: Connection, order: Row[Any], *, now: datetime) -> QueuePlace:
    """Return the place of a waiting order, and how many slots of its account are taken."""
    earlier = or_(
        orders.c.order_rank < order.order_rank, (orders.c.order_rank == order.order_rank) & (orders.c.id < order.id)
    )
    before = select(func.count()).where(orders.c.queue == order.queue, orders.c.takes_slot.is_(False), earlier)
    values = {"of_account": order.queue, "now": now}
    return QueuePlace(connection.execute(before).scalar_one(), connection.execute(_TAKEN, values).scalar_one())


def busy_slots(connection: Connection, accounts: Collection[str] | None, *, now: datetime) -> list[Row[Any]]:
    """Return the orders that take a slot at the API: queue, status, claim_holder, attempted_at, slot_until.

    With `accounts`, only orders of these. A slot whose order is not at the API any more is left out.
    """
    columns = (orders.c.queue, jobs.c.status, orders.c.claim_holder, orders.c.attempted_at, orders.c.slot_until)
    query = select(*columns).join(jobs, jobs.c.id == orders.c.id).where(orders.c.takes_slot.is_(True))
    query = query.where(orders.c.queue.is_not(None) if accounts is None else orders.c.queue.in_(sorted(accounts)))
    rows: Sequence[Any] = connection.execute(query.where(*_AT_API), {"now": now}).all()
    return list(rows)


def place_of_job(connection: Connection, job_id: int, *, now: datetime) -> QueuePlace | None:
    """Return the place of a job's order, without reading its payload. None if the order does not wait to be sent."""
    columns = (orders.c.id, orders.c.queue, orders.c.order_rank, orders.c.takes_slot)
    order: Any = connection.execute(select(*columns).where(orders.c.id == job_id)).one_or_none()
    waits = order is not None and order.queue is not None and not order.takes_slot
    return queue_place(connection, order, now=now) if waits else None


def taken_by_account(connection: Connection, *, now: datetime) -> dict[str, int]:
    """Return how many slots of each account are taken."""
    taken = select(orders.c.queue, func.count().label("taken")).join(jobs, jobs.c.id == orders.c.id)
    taken = taken.where(orders.c.queue.is_not(None), orders.c.takes_slot.is_(True), *_AT_API).group_by(orders.c.queue)
    return {row.queue: row.taken for row in connection.execute(taken, {"now": now})}


# ── claiming ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_NOW = bindparam("now", type_=orders.c.due_at.type)
_IS_OVER = or_(jobs.c.status.not_in((*ORDER_STATES, "pending")), orders.c.slot_until <= _NOW)
_IN_SLOTS = (orders.c.queue == bindparam("of_account"), orders.c.takes_slot.is_(True))
_AT_API = (
    or_(orders.c.slot_until.is_(None), orders.c.slot_until > _NOW),
    jobs.c.status.in_((*ORDER_STATES, "pending")),
)
_TAKEN = select(func.count()).select_from(orders).join(jobs, jobs.c.id == orders.c.id).where(*_IN_SLOTS, *_AT_API)
_OVER = (
    select(orders.c.id)
    .join(jobs, jobs.c.id == orders.c.id)
    .where(*_IN_SLOTS, _IS_OVER, orders.c.claim_token.is_(None))
    .limit(FREED_MOST)
)
_NEXT = (
    select(orders.c.id)
    .where(
        orders.c.queue == bindparam("of_account"),
        orders.c.takes_slot.is_(False),
        orders.c.due_at <= bindparam("now"),
        orders.c.attempt_token.is_(None),
        or_(orders.c.host.in_(bindparam("hosts", expanding=True)), bindparam("any_host")),
        orders.c.host.not_in(bindparam("held_hosts", expanding=True)),
    )
    .order_by(orders.c.order_rank, orders.c.id)
    .limit(bindparam("most", type_=Integer))
    .with_for_update(skip_locked=True)
)
_CLAIMED = select(
    orders.c.id,
    orders.c.host,
    orders.c.endpoint,
    orders.c.payload,
    orders.c.payload_sha256,
    orders.c.attempts,
    jobs.c.kind,
    jobs.c.eta,
    jobs.c.deadline_seconds,
).join(jobs, jobs.c.id == orders.c.id)


def claim_orders(
    connection: Connection,
    account: str,
    *,
    configured_slots: int | None,
    limit: int,
    token: str,
    holder: str,
    lease: timedelta,
    now: datetime,
    held_hosts: Collection[str] = (),
    only_hosts: Collection[str] | None = None,
) -> list[ClaimedOrder]:
    """Claim up to `limit` due orders of an account, as far as it has free slots: highest priority first, then oldest.

    Orders on `held_hosts` are skipped. With `only_hosts`, only orders on these hosts are claimed.
    """
    slot_limit = locked_slots(connection, account)
    taken = int(connection.execute(_TAKEN, {"of_account": account, "now": now}).scalar_one())
    most = min(limit, slot_limit.free(configured_slots, taken, now))
    if most < 1:
        return []
    values = {
        "of_account": account,
        "now": now,
        "most": most,
        "hosts": list(only_hosts or ()) or [""],
        "any_host": only_hosts is None,
        "held_hosts": list(held_hosts) or [""],
    }
    ids = list(connection.execute(_NEXT, values).scalars())
    if not ids:
        return []
    claim_values = {
        "due_at": now + lease,
        "claim_token": token,
        "claim_holder": holder,
        "takes_slot": True,
        "slot_until": None,
        "attempts": orders.c.attempts + 1,
    }
    connection.execute(update(orders).where(orders.c.id.in_(ids)).values(claim_values))
    rows = {row.id: row for row in connection.execute(_CLAIMED.where(orders.c.id.in_(ids)))}
    return [_claimed_order(rows[job_id], account, token) for job_id in ids if job_id in rows]


def _claimed_order(row: Any, account: str, token: str) -> ClaimedOrder:
    return ClaimedOrder(
        row.id,
        token,
        account,
        row.host,
        row.endpoint,
        row.payload,
        row.kind,
        row.eta,
        row.deadline_seconds,
        row.attempts,
        row.payload_sha256,
    )


def leave_queue(connection: Connection, accounts: Collection[str], *, now: datetime) -> None:
    """Take orders out of the queues of these accounts whose jobs the API does not work on any more.

    They take no slot since then. It is done from time to time, so that the queues stay short.
    """
    for account in sorted(accounts):
        over = list(connection.execute(_OVER, {"of_account": account, "now": now}).scalars())
        if over:
            connection.execute(update(orders).where(orders.c.id.in_(over)).values(SLOT_FREE))


def grow_slots(connection: Connection, account: str, configured: int | None, *, now: datetime) -> None:
    """Let the learned number of slots grow, if all were used for long. The caller saw that all are taken now."""
    limit = locked_slots(connection, account)
    grown = after_full_use(limit, configured, now)
    if grown != limit:
        save_slots(connection, grown)


def taken_slots(connection: Connection, account: str, *, now: datetime, without: int) -> int:
    """Return how many slots of an account are taken by other orders than `without`. The caller has locked its slots."""
    query = _TAKEN.where(orders.c.id != without)
    return int(connection.execute(query, {"of_account": account, "now": now}).scalar_one())


def mark_attempted(connection: Connection, claimed: Collection[ClaimedOrder], *, now: datetime) -> set[int]:
    """Note that the requests of claimed orders begin now. Return the ids of those whose claim still stands.

    From this commit on, they count as sent until an answer or an error says otherwise.
    """
    ids, tokens = [order.id for order in claimed], sorted({order.token for order in claimed})
    standing = (orders.c.id.in_(ids), orders.c.claim_token.in_(tokens))
    mark = update(orders).where(*standing, orders.c.due_at > now)
    mark = mark.values(attempted_at=now, attempt_token=orders.c.claim_token)
    if connection.dialect.name not in MYSQL_FAMILY:
        return set(connection.execute(mark.returning(orders.c.id)).scalars())
    connection.execute(mark)
    return set(connection.execute(select(orders.c.id).where(*standing, orders.c.attempt_token.in_(tokens))).scalars())


def release_unsent(connection: Connection, claimed: Iterable[ClaimedOrder], *, now: datetime) -> None:
    """Release claimed orders of which no byte was sent. They are due at once."""
    for order in claimed:
        own = (orders.c.id == order.id, orders.c.claim_token == order.token)
        connection.execute(update(orders).where(*own).values(**ORDER_DUE, due_at=now, attempts=orders.c.attempts - 1))


# ── actions ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def order_again(connection: Connection, job_ids: Collection[int], *, now: datetime) -> None:
    """Let failed and uncertain orders wait to be sent again. The caller has locked the jobs' rows."""
    connection.execute(update(jobs).where(jobs.c.id.in_(job_ids)).values(status="ordered", due_at=None, **clear_end()))
    again = {**ORDER_DUE, "queue": select(jobs.c.account).where(jobs.c.id == orders.c.id).scalar_subquery()}
    connection.execute(update(orders).where(orders.c.id.in_(job_ids)).values(**again, due_at=now, last_error=None))


def close_cancelled(connection: Connection, job_ids: Collection[int]) -> None:
    """Close the orders of cancelled jobs. An order that is being sent is closed by its answer."""
    if not job_ids:
        return
    not_being_sent = orders.c.claim_token.is_(None) | orders.c.attempt_token.is_(None)
    connection.execute(update(orders).where(orders.c.id.in_(job_ids), not_being_sent).values(ORDER_DONE))
