"""Record what became of claimed orders, and what operators and crashes do to orders.

A result is written while the token of its attempt is in the row. That is also so after the lease has ended: an answer
that comes late says what became of an order that counts as uncertain.
"""

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, select, update
from sqlalchemy.exc import IntegrityError

from worker.core.identity import FetchAddress
from worker.core.lifecycle import ORDER_STATES, left_out_note
from worker.core.order_reply import OrderTaken
from worker.core.pacing.policy import PollPlan
from worker.store.counters import Tally
from worker.store.events import create_uncertain_events
from worker.store.new_outputs import insert_outputs
from worker.store.orders import ClaimedOrder
from worker.store.promises import add_promises
from worker.store.schema import jobs, orders
from worker.store.transitions import NO_CLAIM, ORDER_DONE, ORDER_DUE, job_downloading, job_ended

UNCERTAIN_SLOT = timedelta(seconds=60)  # how long an order may still be at the API whose answer was lost


class Taken(NamedTuple):
    """The outputs of a taken order that can be downloaded at once, and whether its job ended."""

    outputs: Sequence[int] = ()
    ended: bool = False


def record_taken(
    connection: Connection,
    order: ClaimedOrder,
    reply: OrderTaken,
    plan: PollPlan,
    tally: Tally,
    *,
    now: datetime,
    alone: bool = True,
) -> Taken | None:
    """Record that the API took an order. Return None if the attempt is not the last one, or the job was cancelled.

    If another job has the remote id, the job ends. Without `alone`, IntegrityError is raised instead, and the caller
    records each answer of its transaction again, alone.
    """
    job = _lock_attempt(connection, order)
    if job is None:
        return None
    if job.status not in ORDER_STATES:
        _close(connection, order.id, f"it was {job.status} while it was sent; the API calls it {reply.remote_id}")
        return None
    sent_at = min(job.attempted_at or now, now)
    values = _address_values(reply.remote_id, reply.address, default=reply.default_address) | {
        "submitted_at": sent_at,
        "deadline_at": sent_at + timedelta(seconds=job.deadline_seconds),
        "eta": _eta(order, reply),
        "held_at": None,
        "error_code": None,
        "error_message": left_out_note(len(reply.outputs), reply.left_out) if reply.left_out else None,
    }
    if reply.outputs:
        values |= job_downloading(now)
    else:
        due_at = now + timedelta(seconds=plan.wait)
        values |= {"status": "pending", "due_at": due_at, "pace_scale": plan.scale, "pace_growth": plan.growth}
    try:
        with connection.begin_nested() if alone else nullcontext():
            connection.execute(update(jobs).where(jobs.c.id == order.id).values(values))
    except IntegrityError:
        if not alone:
            raise
        message = f"the API answered with the id {reply.remote_id}, which another job of this account has"
        _fail(connection, job, "duplicate_id", message, tally, now)
        return Taken(ended=True)
    if reply.outputs:
        _close(connection, order.id, None)
        if reply.left_out:
            tally.left_out(order.account, reply.left_out)
        return Taken(insert_outputs(connection, [(order.id, reply.outputs)], now=now, queued=True))
    if reply.promised:
        add_promises(connection, {order.id: reply.promised})
    at_api = {"attempt_token": None, "due_at": None, "last_error": None, **NO_CLAIM}
    connection.execute(update(orders).where(orders.c.id == order.id).values(at_api))
    return Taken()


def record_refused(
    connection: Connection, order: ClaimedOrder, code: str, message: str, tally: Tally, *, now: datetime
) -> bool:
    """Record that the API refused an order for good. Return whether its job ended."""
    job = _lock_attempt(connection, order)
    if job is None:
        return False
    if job.status not in ORDER_STATES:
        _close(connection, order.id, message)
        return False
    _fail(connection, job, code, message, tally, now)
    return True


def record_waiting(
    connection: Connection, order: ClaimedOrder, message: str, *, due_at: datetime, counts: bool = False
) -> bool:
    """Record that the API did not take an order. It is sent again at `due_at`. Return whether it waits now.

    `counts`: the attempt counts towards those after which an order is given up.
    """
    job = _lock_attempt(connection, order)
    if job is None:
        return False
    if job.status not in ORDER_STATES:
        _close(connection, order.id, message)
        return False
    connection.execute(update(jobs).where(jobs.c.id == order.id).values(status="ordered"))
    attempts = order.attempts if counts else order.attempts - 1
    waiting = {**ORDER_DUE, "due_at": due_at, "last_error": message, "attempts": attempts}
    connection.execute(update(orders).where(orders.c.id == order.id).values(waiting))
    return True


def record_lost(connection: Connection, order: ClaimedOrder, message: str, *, now: datetime) -> bool:
    """Record that an order was sent and its answer is lost. Return whether its job became uncertain."""
    job = _lock_attempt(connection, order)
    return job is not None and order.id in _make_uncertain(connection, [job], message, now)


def _lock_attempt(connection: Connection, order: ClaimedOrder) -> Any | None:
    """Lock a job and its order. Return the job if `order` is its last attempt, and no answer is recorded yet."""
    query = (
        select(
            *(jobs.c.id, jobs.c.status, jobs.c.account, jobs.c.kind, jobs.c.deadline_seconds),
            *(orders.c.attempted_at, orders.c.attempt_token, orders.c.claim_token),
        )
        .join(orders, orders.c.id == jobs.c.id)
        .where(jobs.c.id == order.id)
        .with_for_update()
    )
    job = connection.execute(query).one_or_none()
    return job if job is not None and order.token in (job.attempt_token, job.claim_token) else None


def _eta(order: ClaimedOrder, reply: OrderTaken) -> float | None:
    """Return the expected duration, as the app or else the API said. One beyond the deadline is ignored."""
    eta = reply.eta if order.eta is None else order.eta
    return None if eta is None or eta > order.deadline_seconds else eta


def _close(connection: Connection, job_id: int, message: str | None) -> None:
    connection.execute(update(orders).where(orders.c.id == job_id).values(**ORDER_DONE, last_error=message))


def _fail(connection: Connection, job: Any, code: str, message: str, tally: Tally, now: datetime) -> None:
    values = job_ended("failed", now) | {"error_code": code, "error_message": message}
    connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))
    _close(connection, job.id, message)
    tally.finished(job.account, job.kind, "failed")


def _address_values(remote_id: str, address: FetchAddress, *, default: bool) -> dict[str, Any]:
    return {
        "remote_id": remote_id,
        "fetch_url": address.url,
        "fetch_base": address.base,
        "fetch_host": address.host,
        "default_address": default,
    }


# ── uncertain orders ──────────────────────────────────────────────────────────────────────────────────────────────────


def _make_uncertain(connection: Connection, rows: Sequence[Any], message: str, now: datetime) -> set[int]:
    """Make the ordered jobs among these uncertain. The rows are locked. Return their ids."""
    ids = {row.id for row in rows if row.status == "ordered"}
    over = [row.id for row in rows if row.status not in ORDER_STATES]
    if over:
        connection.execute(update(orders).where(orders.c.id.in_(over)).values(ORDER_DONE))
    if ids:
        connection.execute(update(jobs).where(jobs.c.id.in_(ids)).values(status="uncertain"))
        values = {"due_at": None, "takes_slot": True, "slot_until": now + UNCERTAIN_SLOT, "last_error": message}
        connection.execute(update(orders).where(orders.c.id.in_(ids)).values(**values, **NO_CLAIM))
        create_uncertain_events(connection, sorted(ids), now=now)
    return ids


class ReleasedOrders(NamedTuple):
    """The orders of lost senders: those that are due again, and those that are uncertain now."""

    due: tuple[int, ...] = ()
    uncertain: tuple[int, ...] = ()


def release_orders_of(connection: Connection, dead: Collection[str], *, now: datetime) -> ReleasedOrders:
    """Release the orders that these dead processes had claimed."""
    return _release(connection, orders.c.claim_holder.in_(dead), now) if dead else ReleasedOrders()


def release_lapsed_orders(connection: Connection, *, now: datetime) -> ReleasedOrders:
    """Release the orders whose lease has ended. Their process is dead, or it will find its claim lost."""
    return _release(connection, orders.c.claim_holder.is_not(None) & (orders.c.due_at <= now), now)


def has_lapsed_orders(connection: Connection, *, now: datetime) -> bool:
    """Return whether `release_lapsed_orders` would find an order."""
    lapsed = (orders.c.claim_holder.is_not(None), orders.c.due_at <= now)
    return connection.execute(select(orders.c.id).where(*lapsed).limit(1)).scalar() is not None


def _release(connection: Connection, which: ColumnElement[bool], now: datetime) -> ReleasedOrders:
    query = select(jobs.c.id, jobs.c.status, orders.c.attempt_token).join(orders, orders.c.id == jobs.c.id)
    rows = connection.execute(query.where(which).order_by(jobs.c.id).with_for_update(skip_locked=True)).all()
    unsent = [row.id for row in rows if row.attempt_token is None]
    if unsent:
        connection.execute(update(orders).where(orders.c.id.in_(unsent)).values(**ORDER_DUE, due_at=now))
    message = "the process that sent it died, or could not reach the database, before an answer was recorded"
    sent = [row for row in rows if row.attempt_token is not None]
    return ReleasedOrders(tuple(unsent), tuple(sorted(_make_uncertain(connection, sent, message, now))))


# ── actions ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def attach(
    connection: Connection, job_id: int, remote_id: str, address: FetchAddress, *, default: bool, now: datetime
) -> bool:
    """Name the remote job of an uncertain order. From now on it is polled. Return False in another state.

    Raises IntegrityError if another job of the account has this remote id.
    """
    locked = select(jobs.c.status, jobs.c.deadline_seconds).where(jobs.c.id == job_id).with_for_update()
    job = connection.execute(locked).one()
    if job.status != "uncertain":
        return False
    values = _address_values(remote_id, address, default=default) | {
        "status": "pending",
        "due_at": now,
        "deadline_at": now + timedelta(seconds=job.deadline_seconds),
    }
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))
    named = {"attempt_token": None, "slot_until": None, "last_error": None}
    connection.execute(update(orders).where(orders.c.id == job_id).values(named))
    return True
