"""Tells web apps that a job is final: their `on_done` task, sent after the commit, at least once."""

import logging
from collections.abc import Callable, Sequence

from sqlalchemy import Engine, select, update

from worker.core.lifecycle import FINAL_STATES
from worker.database import database_now
from worker.tables import jobs

log = logging.getLogger(__name__)

DEFAULT_QUEUE = "celery"
BATCH = 200


def tell(engine: Engine, send: Callable[[str, str, int], None], job_ids: Sequence[int] | None = None) -> int:
    """Sends the `on_done` task of every final job that was not told of yet; how many.

    `send` takes task name, queue and job id. With `job_ids` only those are looked at. A job is marked only after its
    message is out, so a crash in between tells it twice and never not at all.
    """
    query = (
        select(jobs.c.id, jobs.c.on_done)
        .where(jobs.c.completed_at.is_not(None), jobs.c.on_done.is_not(None), jobs.c.told_at.is_(None))
        .order_by(jobs.c.completed_at)
        .limit(BATCH)
    )
    with engine.connect() as connection:
        found = connection.execute(query if job_ids is None else query.where(jobs.c.id.in_(job_ids))).all()
    told = []
    for row in found:
        queue, _, task = row.on_done.rpartition("/")
        send(task, queue or DEFAULT_QUEUE, row.id)
        told.append(row.id)
    if told:
        with engine.begin() as connection:
            connection.execute(
                update(jobs)
                .where(jobs.c.id.in_(told), jobs.c.status.in_(FINAL_STATES))
                .values(told_at=database_now(connection))
            )
    return len(told)
