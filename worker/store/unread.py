"""Kept answers: the last ones that no rule reads, and the last answer of each job that ended without an output."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from worker.store.schema import jobs, unread

OF_JOB = 3  # unread answers that are kept of one job
MOST = 1_000  # answers that are kept in all
JOBS_AT_ONCE = 50  # whose answers are compared with those that are there: some may have 64 KiB


class KeptAnswer(NamedTuple):
    """An answer that is to be kept. `recognised`: a rule read it, and its job ended by it."""

    job_id: int
    http_status: int
    shape: str
    body: str
    recognised: bool


@dataclass(frozen=True, slots=True)
class ShapeCount:
    """Kept answers of one shape: how many, of how many jobs, the first and the last one, and one of the jobs."""

    shape: str
    count: int
    jobs: int
    first_at: datetime
    last_at: datetime
    job_id: int


def keep_answers(connection: Connection, answers: Sequence[KeptAnswer], *, now: datetime) -> None:
    """Keep answers of jobs that are there: of each job the last 3 unread and the last recognised one, 1,000 in all.

    An answer that is the same as the last of its kind is not written again, only its time.
    """
    chunks = [answers[start : start + JOBS_AT_ONCE] for start in range(0, len(answers), JOBS_AT_ONCE)]
    grown = [_keep(connection, chunk, now) for chunk in chunks]
    if any(grown):
        # Last of all: it locks rows of other jobs, and two batches must not wait for each other's.
        _drop_oldest(connection)


def _keep(connection: Connection, answers: Sequence[KeptAnswer], now: datetime) -> bool:
    """Keep answers, and return whether there are more than before."""
    # A job whose row somebody else has locked is passed over: two batches that wait for each other's rows never end.
    locked = select(jobs.c.id).where(jobs.c.id.in_({answer.job_id for answer in answers}))
    there = set(connection.execute(locked.with_for_update(skip_locked=True)).scalars())
    fresh: dict[tuple[int, bool], KeptAnswer] = {}
    for answer in answers:
        if answer.job_id in there:
            fresh[answer.job_id, answer.recognised] = answer
    if not fresh:
        return False
    known = _kept_before(connection, there)
    same = [
        known[key][0].id
        for key, answer in fresh.items()
        if key in known and (answer.http_status, answer.body) == (known[key][0].http_status, known[key][0].body)
    ]
    if same:
        connection.execute(update(unread).where(unread.c.id.in_(same)).values(at=now))
    new = [answer for key, answer in fresh.items() if key not in known or known[key][0].id not in same]
    if not new:
        return False
    surplus = [
        row.id for answer in new for row in known.get((answer.job_id, answer.recognised), ())[_room(answer) - 1 :]
    ]
    if surplus:
        connection.execute(delete(unread).where(unread.c.id.in_(surplus)))
    connection.execute(insert(unread), [answer._asdict() | {"at": now} for answer in new])
    return True


def _room(answer: KeptAnswer) -> int:
    return 1 if answer.recognised else OF_JOB


def _kept_before(connection: Connection, job_ids: Collection[int]) -> dict[tuple[int, bool], list[Row[Any]]]:
    """Return the kept answers of jobs by job and kind, the newest first."""
    rows = connection.execute(
        select(unread).where(unread.c.job_id.in_(job_ids)).order_by(unread.c.at.desc(), unread.c.id.desc())
    )
    known: dict[tuple[int, bool], list[Row[Any]]] = {}
    for row in rows:
        known.setdefault((row.job_id, bool(row.recognised)), []).append(row)
    return known


def _drop_oldest(connection: Connection) -> None:
    surplus = connection.execute(select(func.count()).select_from(unread)).scalar_one() - MOST
    if surplus > 0:
        oldest = select(unread.c.id).order_by(unread.c.at, unread.c.id).limit(surplus).with_for_update(skip_locked=True)
        connection.execute(delete(unread).where(unread.c.id.in_(list(connection.execute(oldest).scalars()))))


def answer_shapes(connection: Connection) -> list[ShapeCount]:
    """Return the shapes of what is kept, those seen last first."""
    query = select(
        unread.c.shape,
        func.count().label("answers"),
        func.count(unread.c.job_id.distinct()).label("jobs"),
        func.min(unread.c.at).label("first_at"),
        func.max(unread.c.at).label("last_at"),
        func.max(unread.c.job_id).label("job_id"),
    ).group_by(unread.c.shape)
    rows = connection.execute(query).all()
    counted = [ShapeCount(row.shape, row.answers, row.jobs, row.first_at, row.last_at, row.job_id) for row in rows]
    return sorted(counted, key=lambda shape: (shape.last_at, shape.shape), reverse=True)


def answers_of(
    connection: Connection, *, shape: str | None = None, job_ids: Iterable[int] | None = None
) -> Sequence[Row[Any]]:
    """Return kept answers, the newest first: of a shape, of some jobs, or all."""
    query = select(unread).order_by(unread.c.at.desc(), unread.c.id.desc())
    if shape is not None:
        query = query.where(unread.c.shape == shape)
    if job_ids is not None:
        query = query.where(unread.c.job_id.in_(list(job_ids)))
    return connection.execute(query).all()


def jobs_with_answers(connection: Connection, *, shape: str | None = None) -> list[int]:
    """Return the ids of the jobs that are not completed or cancelled, and that have a kept answer, in order."""
    query = (
        select(jobs.c.id)
        .where(jobs.c.status.in_(("pending", "failed", "expired")), jobs.c.id.in_(_with_answers(shape)))
        .order_by(jobs.c.id)
    )
    return list(connection.execute(query).scalars())


def _with_answers(shape: str | None) -> Any:
    query = select(unread.c.job_id)
    return query if shape is None else query.where(unread.c.shape == shape)
