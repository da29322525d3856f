"""Holds by hand: jobs that nobody asks about until an operator lets them go, and accounts and hosts as a whole.

A held job is pending and due in the year 9999 (`HELD_UNTIL`): whatever takes due work passes it by. Nothing else moves
it: it can't expire, since that takes an answer, and a hint that it may be ready leaves it alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, case, select, update

from worker.core.circuit_breaker import Scope, held_by_operator, resumed_by_operator
from worker.core.lifecycle import AFTER_HOLD_GRACE
from worker.settings import Settings
from worker.store.breakers import all_breakers, locked_breaker, save_breaker
from worker.store.schema import HELD_UNTIL, jobs, outputs

WRITING_SECONDS = 30.0  # in which the end of any work is written


@dataclass(frozen=True, slots=True)
class WorkLimits:
    """The least time between two requests about a job, and the longest that a request, or a download, can take."""

    least: timedelta
    call: timedelta
    download: timedelta


def work_limits(settings: Settings) -> WorkLimits:
    """How long work can take, with the time in which its end is written."""
    lease = settings.recovery_seconds + WRITING_SECONDS
    return WorkLimits(
        least=timedelta(seconds=settings.poll_min),
        call=timedelta(seconds=settings.sd_api_timeout + lease),
        download=timedelta(seconds=settings.output_timeout + lease),
    )


_SEEN = (jobs.c.id, jobs.c.status, jobs.c.due_at, jobs.c.asked_at, jobs.c.held_at, jobs.c.claim_token)


def hold(connection: Connection, job_ids: Iterable[int], *, now: datetime) -> set[int]:
    """Holds those of these jobs that are pending; the ids of those it changed. What is being asked just now is lost."""
    free = (jobs.c.status == "pending", jobs.c.due_at < HELD_UNTIL)
    locked = select(jobs.c.id).where(jobs.c.id.in_(list(job_ids)), *free).order_by(jobs.c.id).with_for_update()
    ids = set(connection.execute(locked).scalars())
    if ids:
        held = {"held_at": now, "due_at": HELD_UNTIL, "claim_token": None, "claim_holder": None}
        connection.execute(update(jobs).where(jobs.c.id.in_(ids)).values(held))
    return ids


def resume(connection: Connection, job_ids: Iterable[int], patience: WorkLimits, *, now: datetime) -> set[int]:
    """Has these jobs go on at once, whatever keeps them; the ids of those it changed.

    Who is held is let go, and expires no sooner than the grace that follows any hold. Who waits for a request is due
    now, or the least wait after the last one; an output that waits for another attempt is due now. A claim is given
    back once it is older than any work can be: its process is gone, or will find that it lost the fence.
    """
    going = jobs.c.status.in_(("pending", "downloading"))
    locked = select(*_SEEN).where(jobs.c.id.in_(list(job_ids)), going).order_by(jobs.c.id).with_for_update()
    rows = connection.execute(locked).all()
    changed = {row.id for row in rows if row.held_at is not None}
    if changed:
        grace = now + AFTER_HOLD_GRACE
        later = case((jobs.c.deadline_at < grace, grace), else_=jobs.c.deadline_at)
        connection.execute(update(jobs).where(jobs.c.id.in_(changed)).values(held_at=None, deadline_at=later))
    for row in rows:
        due = now if row.asked_at is None else max(now, row.asked_at + patience.least)
        lost = row.claim_token is not None and _older(row.asked_at, patience.call, now)
        waits = row.claim_token is None and row.due_at is not None and row.due_at > due
        if lost or waits or (row.held_at is not None and row.due_at is not None):
            free = {"claim_token": None, "claim_holder": None, "pace_scale": None, "pace_growth": None}
            connection.execute(update(jobs).where(jobs.c.id == row.id).values(due_at=due, **free))
            changed.add(row.id)
    return changed | _resume_outputs(connection, [row.id for row in rows if row.status == "downloading"], patience, now)


def _resume_outputs(connection: Connection, job_ids: list[int], patience: WorkLimits, now: datetime) -> set[int]:
    """The same for the outputs of jobs that are locked already; those that wait for a fresh link go on waiting."""
    if not job_ids:
        return set()
    unstored = (outputs.c.job_id.in_(job_ids), outputs.c.status == "pending")
    asks = select(jobs.c.id).where(jobs.c.id == outputs.c.job_id, jobs.c.due_at.is_not(None))
    found = select(outputs, asks.exists().label("asks")).where(*unstored).order_by(outputs.c.id).with_for_update()
    moved = [
        row
        for row in connection.execute(found).all()
        if (row.claim_token is not None and _older(row.claimed_at, patience.download, now))
        or (row.claim_token is None and row.due_at > now and not (row.renewed and row.asks))
    ]
    if moved:
        free = {"due_at": now, "queued_at": None, "claim_token": None, "claim_holder": None, "received_bytes": None}
        connection.execute(update(outputs).where(outputs.c.id.in_([row.id for row in moved])).values(free))
    return {row.job_id for row in moved}


def _older(began: datetime | None, most: timedelta, now: datetime) -> bool:
    return began is None or now - began > most


def hold_account_or_host(connection: Connection, scope: Scope, name: str, *, now: datetime) -> bool:
    """Holds an account or a host as a whole; False where an operator does already."""
    breaker = locked_breaker(connection, scope, name)
    if breaker.paused_at is not None:
        return False
    save_breaker(connection, held_by_operator(breaker, now=now))
    return True


def resume_account_or_host(connection: Connection, scope: Scope, name: str, *, now: datetime) -> bool:
    """Lets an account or a host go, whoever held it; False where nothing held it."""
    if (scope, name) not in all_breakers(connection):
        return False
    breaker = locked_breaker(connection, scope, name)
    if breaker.allows(now) != "none":
        return False
    save_breaker(connection, resumed_by_operator(breaker, now=now))
    return True
