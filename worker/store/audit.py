"""The audit trail: what operators and apps changed by hand, where from, and who."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, Row, insert, select

from worker.store.schema import actions

Source = Literal["cli", "page", "flower", "python", "task"]


@dataclass(frozen=True, slots=True)
class Actor:
    """Where an action comes from, and who caused it: a user of the page, or of the operating system."""

    source: Source
    who: str


_PYTHON = Actor("python", "")
_actor: ContextVar[Actor] = ContextVar("actor", default=_PYTHON)


@contextmanager
def acting(source: Source, who: str) -> Iterator[None]:
    """Name the actor of the actions in this `with` block."""
    token = _actor.set(Actor(source, who))
    try:
        yield
    finally:
        _actor.reset(token)


def record_action(
    connection: Connection, action: str, selection: str, *, jobs: int, now: datetime, job_id: int | None = None
) -> None:
    """Write one action of the current actor, in the transaction that it changes.

    `selection` says which jobs, as options of the command line. `jobs` is the number of jobs that changed. `job_id` is
    set if the action named one job.
    """
    actor = _actor.get()
    values = {
        "at": now,
        "source": actor.source,
        "who": actor.who[:255],
        "action": action,
        "filter": selection,
        "jobs": jobs,
        "job_id": job_id,
    }
    connection.execute(insert(actions).values(values))


def actions_of(connection: Connection, job_id: int, *, limit: int = 50) -> Sequence[Row[Any]]:
    """Return the actions that named this job, oldest first."""
    newest = select(actions).where(actions.c.job_id == job_id).order_by(actions.c.id.desc()).limit(limit)
    return list(reversed(connection.execute(newest).all()))


def latest_actions(connection: Connection, *, limit: int = 100, before: int | None = None) -> Sequence[Row[Any]]:
    """Return the latest actions, newest first. `before` is the id of the last action of the previous page."""
    query = select(actions).order_by(actions.c.id.desc()).limit(limit)
    return connection.execute(query if before is None else query.where(actions.c.id < before)).all()
