"""Holds by an operator, on single jobs or on whole accounts and hosts. A held job is not polled.

A held job is pending and due in the year 9999 (`HELD_UNTIL`), so no process claims it. It can't expire, because only an
answer expires a job. A nudge does not change it. `IS_HELD` is the condition for such jobs.

The due time is not NULL, although that would say the same. To allow it, the check `pending_is_due` must be replaced,
for which MariaDB and SQLite copy the table. Held jobs are counted from the index of due times, which has no NULLs, so
they would need an index of their own. And `resume` of the previous release can't release a job without a due time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, case, select, update

from worker.core.circuit_breaker import Scope, held_by_operator, resumed_by_operator
from worker.core.lifecycle import AFTER_HOLD_GRACE
from worker.settings import Settings
from worker.store.breakers import all_breakers, locked_breaker, save_breaker
from worker.store.schema import HELD_UNTIL, IS_HELD, jobs, outputs
from worker.store.transitions import NO_CLAIM

WRITING_SECONDS = 30.0  # the longest time to write the result of any work


@dataclass(frozen=True, slots=True)
class WorkLimits:
    """The minimum time between two polls of a job, and the maximum times of a poll and of a download."""

    poll_min: timedelta
    poll_max: timedelta
    download_max: timedelta


def work_limits(settings: Settings) -> WorkLimits:
    """Return the limits from the settings. The maximum times include recovery and writing the result."""
    recovery_seconds = settings.recovery_seconds + WRITING_SECONDS
    return WorkLimits(
        poll_min=timedelta(seconds=settings.poll_min),
        poll_max=timedelta(seconds=settings.sd_api_timeout + recovery_seconds),
        download_max=timedelta(seconds=settings.output_timeout + recovery_seconds),
    )


_COLUMNS = (jobs.c.id, jobs.c.status, jobs.c.due_at, jobs.c.asked_at, jobs.c.held_at, jobs.c.claim_token)


def hold(connection: Connection, job_ids: Iterable[int], *, now: datetime) -> set[int]:
    """Hold the pending jobs among these, and return the ids of the changed jobs.

    The result of a poll in progress is discarded, because its claim is removed.
    """
    is_pending = (jobs.c.status == "pending", ~IS_HELD)
    locked = select(jobs.c.id).where(jobs.c.id.in_(list(job_ids)), *is_pending).order_by(jobs.c.id).with_for_update()
    ids = set(connection.execute(locked).scalars())
    if ids:
        hold_values = {"held_at": now, "due_at": HELD_UNTIL, **NO_CLAIM}
        connection.execute(update(jobs).where(jobs.c.id.in_(ids)).values(hold_values))
    return ids


def resume(connection: Connection, job_ids: Iterable[int], limits: WorkLimits, *, now: datetime) -> set[int]:
    """Let these jobs continue at once, and return the ids of the changed jobs.

    - A held job is released. It expires no earlier than the grace period after the hold.
    - A job that waits for a poll is due now, or `limits.poll_min` after the last poll.
    - An output that waits for another attempt is due now.
    - A claim that is older than any work can take is released. Its process is dead, or will find its claim lost.
    """
    unfinished = jobs.c.status.in_(("pending", "downloading"))
    locked = select(*_COLUMNS).where(jobs.c.id.in_(list(job_ids)), unfinished).order_by(jobs.c.id).with_for_update()
    rows = connection.execute(locked).all()
    changed = {row.id for row in rows if row.held_at is not None}
    if changed:
        grace = now + AFTER_HOLD_GRACE
        new_deadline = case((jobs.c.deadline_at < grace, grace), else_=jobs.c.deadline_at)
        connection.execute(update(jobs).where(jobs.c.id.in_(changed)).values(held_at=None, deadline_at=new_deadline))
    for row in rows:
        due = now if row.asked_at is None else max(now, row.asked_at + limits.poll_min)
        claim_lost = row.claim_token is not None and _is_older(row.asked_at, limits.poll_max, now)
        waiting = row.claim_token is None and row.due_at is not None and row.due_at > due
        if claim_lost or waiting or (row.held_at is not None and row.due_at is not None):
            release = {**NO_CLAIM, "pace_scale": None, "pace_growth": None}
            connection.execute(update(jobs).where(jobs.c.id == row.id).values(due_at=due, **release))
            changed.add(row.id)
    return changed | _resume_outputs(connection, [row.id for row in rows if row.status == "downloading"], limits, now)


def _resume_outputs(connection: Connection, job_ids: list[int], limits: WorkLimits, now: datetime) -> set[int]:
    """Do the same for the outputs of jobs that are locked already. Outputs that wait for a fresh link still wait."""
    if not job_ids:
        return set()
    unstored = (outputs.c.job_id.in_(job_ids), outputs.c.status == "pending")
    renewal = select(jobs.c.id).where(jobs.c.id == outputs.c.job_id, jobs.c.due_at.is_not(None))
    waiting_outputs = (
        select(outputs, renewal.exists().label("renewal_due")).where(*unstored).order_by(outputs.c.id).with_for_update()
    )
    changed = [
        row
        for row in connection.execute(waiting_outputs).all()
        if (row.claim_token is not None and _is_older(row.claimed_at, limits.download_max, now))
        or (row.claim_token is None and row.due_at > now and not (row.renewed and row.renewal_due))
    ]
    if changed:
        release = {"due_at": now, "queued_at": None, **NO_CLAIM, "received_bytes": None}
        connection.execute(update(outputs).where(outputs.c.id.in_([row.id for row in changed])).values(release))
    return {row.job_id for row in changed}


def _is_older(began: datetime | None, limit: timedelta, now: datetime) -> bool:
    return began is None or now - began > limit


def hold_account_or_host(connection: Connection, scope: Scope, name: str, *, now: datetime) -> bool:
    """Hold a whole account or host. Return False if an operator holds it already."""
    breaker = locked_breaker(connection, scope, name)
    if breaker.paused_at is not None:
        return False
    save_breaker(connection, held_by_operator(breaker, now=now))
    return True


def resume_account_or_host(connection: Connection, scope: Scope, name: str, *, now: datetime) -> bool:
    """Release an account or a host from any hold. Return False if there was no hold."""
    if (scope, name) not in all_breakers(connection):
        return False
    breaker = locked_breaker(connection, scope, name)
    if breaker.allows(now) != "none":
        return False
    save_breaker(connection, resumed_by_operator(breaker, now=now))
    return True
