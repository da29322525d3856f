"""Pruning: delete old finished jobs, in the order of their ids, without waiting for locked rows.

Before a file is removed, its output is marked as failed with the code `PRUNED`. The output keeps its location, and its
job can't be retried any more. So no output is marked as stored while its file is being removed.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, exists, func, or_, select, update

from worker.core.lifecycle import FINAL_STATES, PRUNED
from worker.store.jobs import OUT_OF_ORDER, first_tracked
from worker.store.schema import crashes, events, jobs, outputs

MESSAGE = "its job is pruned, its file is being removed"


def next_window(
    connection: Connection, status: str, *, after: int, cutoff: datetime, limit: int
) -> tuple[list[int], int | None]:
    """Return the next ids of jobs in this state that may be old enough, and the id to continue after, or None.

    Jobs are tracked approximately in the order of their ids. After one that was tracked too late, all are too young.
    """
    rows = connection.execute(
        select(jobs.c.id, jobs.c.tracked_at)
        .where(jobs.c.status == status, jobs.c.id > after)
        .order_by(jobs.c.id)
        .limit(limit)
    ).all()
    old_ids = [row.id for row in rows if row.tracked_at < cutoff]
    is_last = len(rows) < limit or rows[-1].tracked_at >= cutoff
    return old_ids, None if is_last else rows[-1].id


class Prunable(NamedTuple):
    """The numbers of jobs that can be pruned, of their outputs and their files, and the size of the files in bytes."""

    jobs: int
    outputs: int
    files: int
    bytes: int


def id_windows(connection: Connection, *, cutoff: datetime, width: int) -> list[tuple[int, int]]:
    """Return the first and last ids of windows of `width` ids that contain all jobs tracked before `cutoff`."""
    lowest = connection.execute(select(func.min(jobs.c.id))).scalar()
    end = first_tracked(connection, cutoff + OUT_OF_ORDER)
    return [] if lowest is None else [(first, first + width - 1) for first in range(lowest, end, width)]


def count_prunable(
    connection: Connection, status: str, *, first: int, last: int, cutoff: datetime, limit: int | None
) -> Prunable:
    """Count the jobs in this state with ids from `first` to `last` that ended before `cutoff` and can be pruned.

    At most `limit` jobs are counted, the lowest ids first.
    """
    undelivered = exists().where(events.c.job_id == jobs.c.id, events.c.due_at.is_not(None))
    old_jobs = _finished(jobs.c.id.between(first, last), status, cutoff).where(~undelivered).limit(limit).subquery()
    of_old_jobs = and_(outputs.c.job_id == old_jobs.c.id, outputs.c.job_id.between(first, last))
    query = select(
        func.count(old_jobs.c.id.distinct()),
        func.count(outputs.c.id),
        func.count(outputs.c.location),
        func.coalesce(func.sum(outputs.c.size_bytes), 0),
    ).select_from(old_jobs.outerjoin(outputs, of_old_jobs))
    return Prunable(*map(int, connection.execute(query).one()))


def lock_prunable(connection: Connection, ids: Sequence[int], status: str, *, cutoff: datetime) -> list[int]:
    """Lock the jobs that can be pruned, and return their ids. Jobs that are locked already are skipped."""
    finished = _finished(jobs.c.id.in_(ids), status, cutoff).with_for_update(skip_locked=True)
    locked = list(connection.execute(finished).scalars())
    return _delivered(connection, locked)  # after the lock: no process can create events for these jobs any more


def _finished(condition: ColumnElement[bool], status: str, cutoff: datetime) -> Any:
    return (
        select(jobs.c.id)
        .where(
            condition,
            jobs.c.status == status,
            jobs.c.completed_at < cutoff,
            or_(jobs.c.on_done.is_(None), jobs.c.told_at.is_not(None)),
            or_(jobs.c.webhook_url.is_(None), jobs.c.announced_at.is_not(None)),
        )
        .order_by(jobs.c.id)
    )


def _delivered(connection: Connection, ids: Sequence[int]) -> list[int]:
    waiting = select(events.c.job_id).where(events.c.job_id.in_(ids), events.c.due_at.is_not(None))
    undelivered = set(connection.execute(waiting).scalars()) if ids else set()
    return [job_id for job_id in ids if job_id not in undelivered]


def outputs_to_prune(connection: Connection, job_ids: Sequence[int]) -> list[Row[Any]]:
    """Return id, job, location and size of the outputs of these jobs."""
    query = select(outputs.c.id, outputs.c.job_id, outputs.c.location, outputs.c.size_bytes)
    return list(connection.execute(query.where(outputs.c.job_id.in_(job_ids)).order_by(outputs.c.id)))


def mark_pruned(connection: Connection, job_ids: Sequence[int]) -> None:
    """Mark the stored outputs of locked jobs as pruned, before their files are removed."""
    connection.execute(
        update(outputs)
        .where(outputs.c.job_id.in_(job_ids), outputs.c.status == "stored")
        .values(status="failed", error_code=PRUNED, error_message=MESSAGE)
    )


def unmark_pruned(connection: Connection, output_ids: Sequence[int]) -> None:
    """Mark outputs as stored again whose files could not be removed."""
    connection.execute(
        update(outputs)
        .where(outputs.c.id.in_(output_ids), outputs.c.status == "failed", outputs.c.error_code == PRUNED)
        .values(status="stored", error_code=None, error_message=None)
    )


def delete_jobs(connection: Connection, job_ids: Sequence[int]) -> int:
    """Delete final jobs with their outputs, bodies and events; return the number of jobs."""
    result = connection.execute(delete(jobs).where(jobs.c.id.in_(job_ids), jobs.c.status.in_(FINAL_STATES)))
    return int(result.rowcount)


def delete_stale_crashes(connection: Connection) -> None:
    """Delete the crash counts of jobs and outputs that no longer exist. The table is small."""
    for scope, table in (("job", jobs), ("output", outputs)):
        exists_still = exists().where(table.c.id == crashes.c.row_id)
        connection.execute(delete(crashes).where(crashes.c.scope == scope, ~exists_still))
