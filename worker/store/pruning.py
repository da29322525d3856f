"""Pruning: taking finished jobs out of the tables, in the order of their ids, without waiting for a locked row.

A row whose file is about to be removed says so first (`PRUNED`): it is not stored any more, still has its location, and
its job can't be taken up again. So a file never goes while its row says that it is there.
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
    """The next ids of jobs in this state that may be old enough, and where to go on; None where there are no more.

    Jobs are tracked in the order of their ids, near enough: behind one that was tracked too late all are too young.
    """
    found = connection.execute(
        select(jobs.c.id, jobs.c.tracked_at)
        .where(jobs.c.status == status, jobs.c.id > after)
        .order_by(jobs.c.id)
        .limit(limit)
    ).all()
    old = [row.id for row in found if row.tracked_at < cutoff]
    over = len(found) < limit or found[-1].tracked_at >= cutoff
    return old, None if over else found[-1].id


class Prunable(NamedTuple):
    """How many jobs can be pruned, their outputs, how many of these have a file, and the bytes of the files."""

    jobs: int
    outputs: int
    files: int
    bytes: int


def id_windows(connection: Connection, *, cutoff: datetime, width: int) -> list[tuple[int, int]]:
    """Return first and last ids of windows that hold every job tracked before `cutoff`, `width` ids in each."""
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
    old = _finished(jobs.c.id.between(first, last), status, cutoff).where(~undelivered).limit(limit).subquery()
    theirs = and_(outputs.c.job_id == old.c.id, outputs.c.job_id.between(first, last))
    counted = select(
        func.count(old.c.id.distinct()),
        func.count(outputs.c.id),
        func.count(outputs.c.location),
        func.coalesce(func.sum(outputs.c.size_bytes), 0),
    ).select_from(old.outerjoin(outputs, theirs))
    return Prunable(*map(int, connection.execute(counted).one()))


def lock_prunable(connection: Connection, ids: Sequence[int], status: str, *, cutoff: datetime) -> list[int]:
    """Lock those of the jobs that can be pruned, and return their ids. A job that is locked already is left out."""
    finished = _finished(jobs.c.id.in_(ids), status, cutoff).with_for_update(skip_locked=True)
    locked = list(connection.execute(finished).scalars())
    return _delivered(connection, locked)  # after they are locked: from now on nobody makes an event of theirs


def _finished(which: ColumnElement[bool], status: str, cutoff: datetime) -> Any:
    return (
        select(jobs.c.id)
        .where(
            which,
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
    """The outputs of these jobs: what is known of their files."""
    query = select(outputs.c.id, outputs.c.job_id, outputs.c.location, outputs.c.size_bytes)
    return list(connection.execute(query.where(outputs.c.job_id.in_(job_ids)).order_by(outputs.c.id)))


def mark_pruned(connection: Connection, job_ids: Sequence[int]) -> None:
    """Says of the stored outputs of locked jobs that their files go."""
    connection.execute(
        update(outputs)
        .where(outputs.c.job_id.in_(job_ids), outputs.c.status == "stored")
        .values(status="failed", error_code=PRUNED, error_message=MESSAGE)
    )


def unmark_pruned(connection: Connection, output_ids: Sequence[int]) -> None:
    """Takes that back, of outputs whose files could not be removed."""
    connection.execute(
        update(outputs)
        .where(outputs.c.id.in_(output_ids), outputs.c.status == "failed", outputs.c.error_code == PRUNED)
        .values(status="stored", error_code=None, error_message=None)
    )


def delete_jobs(connection: Connection, job_ids: Sequence[int]) -> int:
    """Removes final jobs, and with them their outputs, bodies and events; how many jobs there were."""
    done = connection.execute(delete(jobs).where(jobs.c.id.in_(job_ids), jobs.c.status.in_(FINAL_STATES)))
    return int(done.rowcount)


def delete_stale_crashes(connection: Connection) -> None:
    """Removes the counts of crashes of jobs and outputs that are gone. There are few of any."""
    for scope, table in (("job", jobs), ("output", outputs)):
        there = exists().where(table.c.id == crashes.c.row_id)
        connection.execute(delete(crashes).where(crashes.c.scope == scope, ~there))
