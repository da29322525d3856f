"""Kept answers: the last answers that no rule reads, and the last answer of each job that ended without an output."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from worker.store.schema import jobs, unread

OF_JOB = 3  # unread answers kept per job
MOST = 1_000  # answers kept in total
JOBS_AT_ONCE = 50  # answers per query: each may have 64 KiB


class KeptAnswer(NamedTuple):
    """An answer to keep. `recognised` is true if a rule read it and the job ended because of it."""

    job_id: int
    http_status: int
    shape: str
    body: str
    recognised: bool


@dataclass(frozen=True, slots=True)
class ShapeCount:
    """The kept answers of one shape: number of answers and jobs, first and last time, and one of the jobs."""

    shape: str
    count: int
    jobs: int
    first_at: datetime
    last_at: datetime
    job_id: int


def keep_answers(connection: Connection, answers: Sequence[KeptAnswer], *, now: datetime) -> None:
    """Keep answers of existing jobs: the last 3 unread and the last recognised one per job, and 1,000 in total.

    If an answer equals the last one of its job and kind, only the time is updated.
    """
    chunks = [answers[start : start + JOBS_AT_ONCE] for start in range(0, len(answers), JOBS_AT_ONCE)]
    added = [_keep(connection, chunk, now) for chunk in chunks]
    if any(added):
        # This must be the last step. It locks rows of other jobs, which could deadlock with another batch.
        _drop_oldest(connection)


def _keep(connection: Connection, answers: Sequence[KeptAnswer], now: datetime) -> bool:
    """Keep answers. Return whether a row was inserted."""
    # Jobs that are locked already are skipped, so that two batches can't deadlock.
    query = select(jobs.c.id).where(jobs.c.id.in_({answer.job_id for answer in answers}))
    locked_ids = set(connection.execute(query.with_for_update(skip_locked=True)).scalars())
    last_answers: dict[tuple[int, bool], KeptAnswer] = {}
    for answer in answers:
        if answer.job_id in locked_ids:
            last_answers[answer.job_id, answer.recognised] = answer
    if not last_answers:
        return False
    kept = _kept_by_job(connection, locked_ids)
    unchanged_ids = [
        kept[key][0].id
        for key, answer in last_answers.items()
        if key in kept and (answer.http_status, answer.body) == (kept[key][0].http_status, kept[key][0].body)
    ]
    if unchanged_ids:
        connection.execute(update(unread).where(unread.c.id.in_(unchanged_ids)).values(at=now))
    new = [answer for key, answer in last_answers.items() if key not in kept or kept[key][0].id not in unchanged_ids]
    if not new:
        return False
    surplus = [
        row.id
        for answer in new
        for row in kept.get((answer.job_id, answer.recognised), ())[_kept_per_job(answer) - 1 :]
    ]
    if surplus:
        connection.execute(delete(unread).where(unread.c.id.in_(surplus)))
    connection.execute(insert(unread), [answer._asdict() | {"at": now} for answer in new])
    return True


def _kept_per_job(answer: KeptAnswer) -> int:
    return 1 if answer.recognised else OF_JOB


def _kept_by_job(connection: Connection, job_ids: Collection[int]) -> dict[tuple[int, bool], list[Row[Any]]]:
    """Return the kept answers of these jobs by job id and `recognised`, newest first."""
    rows = connection.execute(
        select(unread).where(unread.c.job_id.in_(job_ids)).order_by(unread.c.at.desc(), unread.c.id.desc())
    )
    kept: dict[tuple[int, bool], list[Row[Any]]] = {}
    for row in rows:
        kept.setdefault((row.job_id, bool(row.recognised)), []).append(row)
    return kept


def _drop_oldest(connection: Connection) -> None:
    surplus = connection.execute(select(func.count()).select_from(unread)).scalar_one() - MOST
    if surplus > 0:
        oldest = select(unread.c.id).order_by(unread.c.at, unread.c.id).limit(surplus).with_for_update(skip_locked=True)
        connection.execute(delete(unread).where(unread.c.id.in_(list(connection.execute(oldest).scalars()))))


def answer_shapes(connection: Connection) -> list[ShapeCount]:
    """Return the shapes of the kept answers, most recent first."""
    query = select(
        unread.c.shape,
        func.count().label("answers"),
        func.count(unread.c.job_id.distinct()).label("jobs"),
        func.min(unread.c.at).label("first_at"),
        func.max(unread.c.at).label("last_at"),
        func.max(unread.c.job_id).label("job_id"),
    ).group_by(unread.c.shape)
    rows = connection.execute(query).all()
    counts = [ShapeCount(row.shape, row.answers, row.jobs, row.first_at, row.last_at, row.job_id) for row in rows]
    return sorted(counts, key=lambda shape: (shape.last_at, shape.shape), reverse=True)


def answers_of(
    connection: Connection, *, shape: str | None = None, job_ids: Iterable[int] | None = None
) -> Sequence[Row[Any]]:
    """Return kept answers, newest first: all, or only those of a shape or of some jobs."""
    query = select(unread).order_by(unread.c.at.desc(), unread.c.id.desc())
    if shape is not None:
        query = query.where(unread.c.shape == shape)
    if job_ids is not None:
        query = query.where(unread.c.job_id.in_(list(job_ids)))
    return connection.execute(query).all()


def jobs_with_answers(connection: Connection, *, shape: str | None = None) -> list[int]:
    """Return the ids of the pending, failed and expired jobs that have a kept answer, in order."""
    query = (
        select(jobs.c.id)
        .where(jobs.c.status.in_(("pending", "failed", "expired")), jobs.c.id.in_(_with_answers(shape)))
        .order_by(jobs.c.id)
    )
    return list(connection.execute(query).scalars())


def _with_answers(shape: str | None) -> Any:
    query = select(unread.c.job_id)
    return query if shape is None else query.where(unread.c.shape == shape)
