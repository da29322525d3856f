"""Record what became of claimed orders, and what operators and crashes do to orders.

A result is written while the token of its attempt is in the row. That is also so after the lease has ended: an answer
that comes late says what became of an order that counts as uncertain.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, bindparam, select, update
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
from worker.store.transitions import AT_API, NO_CLAIM, ORDER_DONE, ORDER_DUE, job_downloading, job_ended

UNCERTAIN_SLOT = timedelta(seconds=60)  # how long an order may still be at the API whose answer was lost


class Taken(NamedTuple):
    """The outputs of a taken order that can be downloaded at once, and whether its job ended."""

    outputs: Sequence[int] = ()
    ended: bool = False


Locked = Mapping[int, Any]  # the rows of jobs with their orders, by id


def lock_attempts(connection: Connection, claimed: Collection[ClaimedOrder]) -> Locked:
    """Lock the jobs of these orders and the orders. Leave out those of which this is not the last attempt.

    An answer to an earlier attempt changes nothing. So does an answer to an attempt whose result is recorded.
    """
    query = _ATTEMPTS.where(jobs.c.id.in_(sorted(order.id for order in claimed))).order_by(jobs.c.id).with_for_update()
    rows = {row.id: row for row in connection.execute(query)}
    return {
        order.id: rows[order.id]
        for order in claimed
        if order.id in rows and order.token in (rows[order.id].attempt_token, rows[order.id].claim_token)
    }


_ATTEMPTS = select(
    *(jobs.c.id, jobs.c.status, jobs.c.account, jobs.c.kind, jobs.c.deadline_seconds),
    *(orders.c.attempted_at, orders.c.attempt_token, orders.c.claim_token),
).join(orders, orders.c.id == jobs.c.id)


class TakenOrder(NamedTuple):
    """An order that the API took, its answer, and the plan of its first poll."""

    order: ClaimedOrder
    reply: OrderTaken
    plan: PollPlan


def record_taken(
    connection: Connection, taken: TakenOrder, locked: Locked, tally: Tally, *, now: datetime
) -> Taken | None:
    """Record that the API took an order. Return None if the attempt is not the last one, or the job was cancelled.

    If another job has the remote id, the job ends.
    """
    order, reply, _ = taken
    job = _ordered_job(connection, order, locked, f"the API calls it {reply.remote_id}")
    if job is None:
        return None
    try:
        with connection.begin_nested():
            connection.execute(update(jobs).where(jobs.c.id == order.id).values(_taken_values(taken, job, now)))
    except IntegrityError:
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
    connection.execute(update(orders).where(orders.c.id == order.id).values(AT_API))
    return Taken()


def record_all_taken(connection: Connection, taken: Sequence[TakenOrder], locked: Locked, *, now: datetime) -> None:
    """Record that the API took these orders, none of which is ready or has promised links. Cheaper than one by one.

    Raises IntegrityError if another job has one of the remote ids.
    """
    rows = []
    for item in taken:
        job = _ordered_job(connection, item.order, locked, f"the API calls it {item.reply.remote_id}")
        if job is not None:
            rows.append({"of_job": item.order.id, **_taken_values(item, job, now)})
    if rows:
        names = [name for name in rows[0] if name != "of_job"]
        of_job = jobs.c.id == bindparam("of_job")
        connection.execute(update(jobs).where(of_job).values({name: bindparam(name) for name in names}), rows)
        ids = [row["of_job"] for row in rows]
        connection.execute(update(orders).where(orders.c.id.in_(ids)).values(AT_API))


def _taken_values(taken: TakenOrder, job: Any, now: datetime) -> dict[str, Any]:
    order, reply, plan = taken
    sent_at = min(job.attempted_at or now, now)
    values = _address_values(reply.remote_id, reply.address, default=reply.default_address) | {
        "submitted_at": sent_at,
        "deadline_at": sent_at + timedelta(seconds=job.deadline_seconds),
        "eta": _eta(order, reply),
        "error_message": left_out_note(len(reply.outputs), reply.left_out) if reply.left_out else None,
    }
    if reply.outputs:
        return values | job_downloading(now)
    due_at = now + timedelta(seconds=plan.wait)
    return values | {"status": "pending", "due_at": due_at, "pace_scale": plan.scale, "pace_growth": plan.growth}


def record_refused(
    connection: Connection,
    order: ClaimedOrder,
    locked: Locked,
    code: str,
    message: str,
    tally: Tally,
    *,
    now: datetime,
    payload: str | None = None,
) -> bool:
    """Record that an order was refused for good. Return whether its job ended. `payload` replaces the stored one."""
    job = _ordered_job(connection, order, locked, message)
    if payload is not None:
        connection.execute(update(orders).where(orders.c.id == order.id).values(payload=payload))
    if job is None:
        return False
    _fail(connection, job, code, message, tally, now)
    return True


def record_waiting(
    connection: Connection,
    order: ClaimedOrder,
    locked: Locked,
    message: str,
    *,
    due_at: datetime,
    counts: bool = False,
) -> bool:
    """Record that the API did not take an order. It is sent again at `due_at`. Return whether it waits now.

    `counts`: the attempt counts towards those after which an order is given up.
    """
    job = _ordered_job(connection, order, locked, message)
    if job is None:
        return False
    connection.execute(update(jobs).where(jobs.c.id == order.id).values(status="ordered"))
    attempts = order.attempts if counts else order.attempts - 1
    waiting = {**ORDER_DUE, "due_at": due_at, "queue": order.account, "last_error": message, "attempts": attempts}
    connection.execute(update(orders).where(orders.c.id == order.id).values(waiting))
    return True


def record_lost(connection: Connection, order: ClaimedOrder, locked: Locked, message: str, *, now: datetime) -> bool:
    """Record that an order was sent and its answer is lost. Return whether its job became uncertain."""
    job = locked.get(order.id)
    return job is not None and order.id in _make_uncertain(connection, [job], message, now)


def _ordered_job(connection: Connection, order: ClaimedOrder, locked: Locked, note: str) -> Any | None:
    """Return the row of a job that the answer can change. If it was cancelled, close its order with a note."""
    job = locked.get(order.id)
    if job is not None and job.status not in ORDER_STATES:
        _close(connection, order.id, f"it was {job.status} while it was sent; {note}")
        return None
    return job


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
