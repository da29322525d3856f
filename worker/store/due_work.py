"""Due work: jobs and outputs that are due now, and the time at which the next one is due."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, func, select, union_all

from worker.store.schema import HELD_UNTIL, breakers, jobs, outputs

_NOW = bindparam("now", type_=jobs.c.due_at.type)
_WAITING_JOBS = (
    select(jobs.c.account, jobs.c.remote_id, jobs.c.submitted_at, jobs.c.due_at)
    .where(jobs.c.due_at.is_not(None))
    .order_by(jobs.c.id)
)
_DUE_OUTPUTS = (
    select(outputs.c.id)
    .where(outputs.c.due_at.is_not(None), outputs.c.due_at <= _NOW)
    .order_by(outputs.c.listed_at, outputs.c.id)
)
_NEXT_REQUEST = union_all(
    *(
        select(func.min(column).label("moment")).where(column > _NOW, column < HELD_UNTIL)  # held jobs are not due
        for column in (jobs.c.due_at, breakers.c.until, breakers.c.probe_at)
    )
)
_NEXT_DOWNLOAD = select(func.min(outputs.c.due_at)).where(outputs.c.due_at > _NOW)
_UNFINISHED_JOBS = (
    select(jobs.c.id).where(jobs.c.completed_at.is_(None), jobs.c.status != "uncertain").order_by(jobs.c.id)
)


def waiting_jobs(connection: Connection) -> Sequence[Any]:
    """Return the account, remote id, submission time and due time of every job with a due time."""
    return connection.execute(_WAITING_JOBS).all()


def due_outputs(connection: Connection, *, now: datetime) -> list[int]:
    """Return the ids of the outputs that are due, oldest link first."""
    return list(connection.execute(_DUE_OUTPUTS, {"now": now}).scalars())


def next_request(connection: Connection, *, after: datetime) -> datetime | None:
    """Return when the next job is due or a circuit breaker changes its state, or None."""
    moments = connection.execute(_NEXT_REQUEST, {"now": after}).scalars()
    return min((moment for moment in moments if moment is not None), default=None)


def next_download(connection: Connection, *, after: datetime) -> datetime | None:
    """Return when the next output is due, or None."""
    moment: datetime | None = connection.execute(_NEXT_DOWNLOAD, {"now": after}).scalar()
    return moment


def unfinished_jobs(connection: Connection) -> list[int]:
    """Return the ids of the jobs that are not final and that workers can continue, oldest first."""
    return list(connection.execute(_UNFINISHED_JOBS).scalars())
