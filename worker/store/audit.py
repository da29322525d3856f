"""The audit trail: what operators and apps changed by hand, where from, and who."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from worker.store.schema import actions
from worker.system.who import current_actor

KEEP = timedelta(days=365)  # after which an action is removed
FORGET_BATCH = 1_000  # actions per transaction
MAX_SELECTION = 10_000  # characters; a command line may be longer than a column of MariaDB
SOURCE_HEADER, WHO_HEADER = "fetch_worker_source", "fetch_worker_who"  # of Celery messages that Flower sends


def record_action(
    connection: Connection, action: str, selection: str, *, jobs: int, now: datetime, job_id: int | None = None
) -> int:
    """Write one action of the current actor, in the transaction that it changes. Return its id.

    `selection` says which jobs, as options of the command line. `jobs` is the number of jobs that changed. `job_id` is
    set if the action named one job.
    """
    actor = current_actor()
    values = {
        "at": now,
        "source": actor.source,
        "who": actor.who[:255],
        "action": action,
        "filter": selection[:MAX_SELECTION],
        "jobs": jobs,
        "job_id": job_id,
    }
    key = connection.execute(insert(actions).values(values)).inserted_primary_key
    return int(key[0]) if key is not None else 0


def record_job_action(connection: Connection, action: str, job_id: int, *, now: datetime) -> None:
    """Write an action that changed one job, which it named."""
    record_action(connection, action, str(job_id), jobs=1, now=now, job_id=job_id)


class CountedAction:
    """An action that takes several transactions: one row, which is written with the first change and counts all jobs.

    After a crash the row has the number of jobs that the committed transactions changed.
    """

    def __init__(self, action: str, selection: str, *, job_id: int | None = None) -> None:
        self._action = action
        self._selection = selection
        self._job_id = job_id
        self._row: tuple[int, datetime] | None = None

    def add(self, connection: Connection, jobs: int, *, now: datetime) -> None:
        """Count jobs that this transaction changes."""
        if not jobs or self._add_to_row(connection, jobs):
            return
        row_id = record_action(connection, self._action, self._selection, jobs=jobs, now=now, job_id=self._job_id)
        self._row = row_id, now

    def _add_to_row(self, connection: Connection, jobs: int) -> bool:
        """Add to the row. Return False if there is none, also because its transaction was rolled back."""
        if self._row is None:
            return False
        row_id, at = self._row
        # SQLite gives the id of a row that was rolled back to the next one, which is another action.
        own_row = update(actions).where(actions.c.id == row_id, actions.c.at == at)
        return connection.execute(own_row.values(jobs=actions.c.jobs + jobs)).rowcount > 0


def actions_of(connection: Connection, job_id: int, *, limit: int = 50) -> Sequence[Row[Any]]:
    """Return the actions that named this job, oldest first."""
    newest = select(actions).where(actions.c.job_id == job_id).order_by(actions.c.id.desc()).limit(limit)
    return list(reversed(connection.execute(newest).all()))


def latest_actions(connection: Connection, *, limit: int = 100, before: int | None = None) -> Sequence[Row[Any]]:
    """Return the latest actions, newest first. `before` is the id of the last action of the previous page."""
    query = select(actions).order_by(actions.c.id.desc()).limit(limit)
    return connection.execute(query if before is None else query.where(actions.c.id < before)).all()


def forget_old_actions(connection: Connection, *, now: datetime) -> bool:
    """Remove actions that are older than `KEEP`, at most a batch. Return whether there may be more.

    Actions are in the order of their ids, so only the first ones are read.
    """
    first = select(actions.c.id, actions.c.at).order_by(actions.c.id).limit(FORGET_BATCH)
    old_ids = [row.id for row in connection.execute(first) if row.at < now - KEEP]
    if old_ids:
        connection.execute(delete(actions).where(actions.c.id.in_(old_ids)))
    return len(old_ids) == FORGET_BATCH
