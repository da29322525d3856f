"""Kept answers read again: by the present rules and status words, as if they had just come, and with no call made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row

from worker.client import tracking
from worker.core.lifecycle import (
    ERROR_ANSWERS,
    FAILED_ANSWERS,
    PROMISE_CODES,
    EndJob,
    JobFacts,
    Strikes,
    after_answer,
    note_of,
)
from worker.core.reply import CLASSES, ApiError, Ready, Reply
from worker.settings import Settings
from worker.store.counters import Tally
from worker.store.engine import database_now, engine_for, transact, translate_errors
from worker.store.revival import end_pending, locked_jobs, revive
from worker.store.unread import answers_of, jobs_with_answers
from worker.vendor.families import is_training
from worker.vendor.fetch_url import path_of
from worker.vendor.replies import Question, parse

BATCH = 100  # jobs of one transaction


@dataclass(frozen=True, slots=True)
class Reread:
    """One job whose kept answers were read again: whether that changed it, its state now, and what was read."""

    id: int
    changed: bool
    status: str
    read_as: str
    note: str


class _Read(NamedTuple):
    row: Row[Any]
    reply: Reply


def apply(settings: Settings, *, shape: str | None = None) -> Iterator[list[Reread]]:
    """Read the kept answers of jobs that are not completed again, and act on them; yield what was committed.

    Of each job the newest answer that lists its outputs counts, or else the newest. With `shape`, of jobs that have an
    answer of that shape. Raises Unavailable; what was yielded is done.
    """
    engine = engine_for(settings.database)
    with translate_errors(settings.database), engine.connect() as connection:
        ids = jobs_with_answers(connection, shape=shape)
    for start in range(0, len(ids), BATCH):
        with translate_errors(settings.database):
            done = transact(engine, partial(_apply, ids=ids[start : start + BATCH], settings=settings))
        if any(one.changed for one in done):
            tracking.wake(settings)
        yield done


def _apply(connection: Connection, *, ids: Sequence[int], settings: Settings) -> list[Reread]:
    now = database_now(connection)
    tally = Tally()
    jobs = locked_jobs(connection, ids)
    kept: dict[int, list[Row[Any]]] = {}
    for row in answers_of(connection, job_ids=[job.id for job in jobs]):
        kept.setdefault(row.job_id, []).append(row)
    read = {job.id: _read(job, kept[job.id], settings, now) for job in jobs if job.id in kept}
    ready = {job_id: newest.reply for job_id, newest in read.items() if isinstance(newest.reply, Ready)}
    states = dict(revive(connection, ready, tally, now=now, why="a kept answer, read again", queued=False).jobs)
    for job in jobs:
        end = _end(job, read[job.id], now) if job.id in read else None
        if end is not None and end_pending(connection, job, end, tally, now=now):
            states[job.id] = end.status
    tally.write(connection)
    return [_reread(job, read[job.id].reply, states.get(job.id)) for job in jobs if job.id in read]


def _read(job: Row[Any], rows: Sequence[Row[Any]], settings: Settings, now: datetime) -> _Read:
    """Return the newest of a job's answers that lists its outputs, or else the newest. `rows` are newest first."""
    question = Question(job.remote_id, now.timestamp(), is_training(path_of(job.fetch_base)), settings.status_words)
    answers = [_Read(row, parse(row.http_status, {}, row.body.encode(), question)) for row in rows]
    return next((answer for answer in answers if isinstance(answer.reply, Ready)), answers[0])


def _end(job: Row[Any], read: _Read, now: datetime) -> EndJob | None:
    """Return how a pending job ends by an answer that no rule read when it came, or None.

    One such answer is enough, where several are needed else: the job was asked again and again since. An answer from
    before a `retry` ends nothing.
    """
    since = job.deadline_at - timedelta(seconds=job.deadline_seconds)
    if job.status != "pending" or read.row.recognised or read.row.at < since or isinstance(read.reply, Ready):
        return None
    vague = isinstance(read.reply, ApiError) and read.reply.vague
    strikes = Strikes(failed=FAILED_ANSWERS - 1, error=0 if vague else ERROR_ANSWERS - 1)
    facts = JobFacts("pending", job.tracked_at, job.deadline_at, strikes, eta=job.eta)
    step = after_answer(facts, read.reply, now=now, min_interval=timedelta(0))
    # Ends before which promised links are tried are left to the next answer: the API is asked about the job anyway.
    return step if isinstance(step, EndJob) and step.code not in PROMISE_CODES else None


def _reread(job: Row[Any], reply: Reply, status: str | None) -> Reread:
    note = note_of(reply)
    if status is None and isinstance(reply, Ready):
        note += ", and the job has outputs already"
    return Reread(job.id, status is not None, status or job.status, CLASSES[type(reply)], note)
