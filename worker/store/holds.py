"""Holds by hand: jobs that nobody asks about until an operator lets them go, and accounts and hosts as a whole.

A held job is pending and due in the year 9999 (`HELD_UNTIL`): whatever takes due work passes it by. Nothing else moves
it: it can't expire, since that takes an answer, and a hint that it may be ready leaves it alone.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta

from sqlalchemy import Connection, case, select, update

from worker.core.gate import Scope, paused, resumed
from worker.core.lifecycle import AFTER_HOLD_GRACE
from worker.store.gates import all_gates, locked_gate, save_gate
from worker.tables import HELD_UNTIL, jobs


def hold(connection: Connection, job_ids: Iterable[int], *, now: datetime) -> set[int]:
    """Holds those of these jobs that are pending; the ids of those it changed. What is being asked just now is lost."""
    free = (jobs.c.status == "pending", jobs.c.due_at < HELD_UNTIL)
    locked = select(jobs.c.id).where(jobs.c.id.in_(list(job_ids)), *free).order_by(jobs.c.id).with_for_update()
    ids = set(connection.execute(locked).scalars())
    if ids:
        held = {"held_at": now, "due_at": HELD_UNTIL, "claim_token": None, "claim_holder": None}
        connection.execute(update(jobs).where(jobs.c.id.in_(ids)).values(held))
    return ids


def resume(connection: Connection, job_ids: Iterable[int], *, now: datetime, least: timedelta) -> set[int]:
    """Lets those of these jobs go that are held; the ids of those it changed.

    They are due now, or `least` after the last request; none expires sooner than the grace that follows any hold.
    """
    held = (jobs.c.status == "pending", jobs.c.held_at.is_not(None))
    locked = select(jobs.c.id, jobs.c.asked_at).where(jobs.c.id.in_(list(job_ids)), *held)
    rows = connection.execute(locked.order_by(jobs.c.id).with_for_update()).all()
    if not rows:
        return set()
    grace = now + AFTER_HOLD_GRACE
    connection.execute(
        update(jobs)
        .where(jobs.c.id.in_([row.id for row in rows]))
        .values(
            held_at=None,
            due_at=now,
            pace_scale=None,
            pace_growth=None,
            deadline_at=case((jobs.c.deadline_at < grace, grace), else_=jobs.c.deadline_at),
        )
    )
    for row in rows:
        if row.asked_at is not None and row.asked_at + least > now:
            connection.execute(update(jobs).where(jobs.c.id == row.id).values(due_at=row.asked_at + least))
    return {row.id for row in rows}


def hold_gate(connection: Connection, scope: Scope, name: str, *, now: datetime) -> bool:
    """Holds an account or a host as a whole; False where an operator does already."""
    gate = locked_gate(connection, scope, name)
    if gate.paused_at is not None:
        return False
    save_gate(connection, paused(gate, now=now))
    return True


def resume_gate(connection: Connection, scope: Scope, name: str, *, now: datetime) -> bool:
    """Lets an account or a host go, whoever held it; False where nothing held it."""
    if (scope, name) not in all_gates(connection):
        return False
    gate = locked_gate(connection, scope, name)
    if gate.allows(now) != "none":
        return False
    save_gate(connection, resumed(gate, now=now))
    return True
