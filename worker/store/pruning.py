"""Pruning: taking finished jobs out of the tables, in the order of their ids, without waiting for a locked row.

A row whose file is about to be removed says so first (`PRUNED`): it is not stored any more, still has its location, and
its job can't be taken up again. So a file never goes while its row says that it is there.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, delete, exists, func, or_, select, update

from worker.core.lifecycle import FINAL_STATES, PRUNED
from worker.tables import crashes, events, jobs, outputs

MESSAGE = "its job is pruned, its file is being removed"


def window(
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


def prunable(connection: Connection, ids: Sequence[int], status: str, *, cutoff: datetime) -> list[int]:
    """Those of the jobs that are finished for so long, and of which everybody was told who is to be told."""
    found = list(connection.execute(_finished(ids, status, cutoff)).scalars())
    return _delivered(connection, found)


def lock_prunable(connection: Connection, ids: Sequence[int], status: str, *, cutoff: datetime) -> list[int]:
    """The same, locked. A job that somebody else has locked is left out."""
    found = list(connection.execute(_finished(ids, status, cutoff).with_for_update(skip_locked=True)).scalars())
    return _delivered(connection, found)  # after they are locked: from now on nobody makes an event of theirs


def _finished(ids: Sequence[int], status: str, cutoff: datetime) -> Any:
    return (
        select(jobs.c.id)
        .where(
            jobs.c.id.in_(ids),
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


def count_files(connection: Connection, job_ids: Sequence[int]) -> tuple[int, int, int]:
    """How many outputs these jobs have, how many of them have a file, and the bytes of those."""
    counted = select(func.count(), func.count(outputs.c.location), func.coalesce(func.sum(outputs.c.size_bytes), 0))
    found = connection.execute(counted.where(outputs.c.job_id.in_(job_ids))).one()
    return int(found[0]), int(found[1]), int(found[2])


def mark(connection: Connection, job_ids: Sequence[int]) -> None:
    """Says of the stored outputs of locked jobs that their files go."""
    connection.execute(
        update(outputs)
        .where(outputs.c.job_id.in_(job_ids), outputs.c.status == "stored")
        .values(status="failed", error_code=PRUNED, error_message=MESSAGE)
    )


def unmark(connection: Connection, output_ids: Sequence[int]) -> None:
    """Takes that back, of outputs whose files could not be removed."""
    connection.execute(
        update(outputs)
        .where(outputs.c.id.in_(output_ids), outputs.c.status == "failed", outputs.c.error_code == PRUNED)
        .values(status="stored", error_code=None, error_message=None)
    )


def remove(connection: Connection, job_ids: Sequence[int]) -> int:
    """Removes final jobs, and with them their outputs, bodies and events; how many jobs there were."""
    done = connection.execute(delete(jobs).where(jobs.c.id.in_(job_ids), jobs.c.status.in_(FINAL_STATES)))
    return int(done.rowcount)


def forget_crashes(connection: Connection) -> None:
    """Removes the counts of crashes of jobs and outputs that are gone. There are few of any."""
    for scope, table in (("job", jobs), ("output", outputs)):
        there = exists().where(table.c.id == crashes.c.row_id)
        connection.execute(delete(crashes).where(crashes.c.scope == scope, ~there))
