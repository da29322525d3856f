"""Read kept answers again with the current rules and status words, and act on them. No request is made."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row

from worker.client.workers import wake
from worker.core.answer_names import ANSWER_NAMES
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
from worker.core.reply import ApiError, Ready, Reply
from worker.settings import Settings
from worker.store.audit import CountedAction
from worker.store.counters import Tally
from worker.store.engine import database_now, engine_for, transact, translate_errors
from worker.store.kept_answers import answers_of, jobs_with_answers
from worker.store.revival import end_pending, lock_revivable_jobs, revive
from worker.vendor.families import is_training
from worker.vendor.fetch_url import path_of
from worker.vendor.replies import Question, parse

BATCH = 100  # jobs per transaction


@dataclass(frozen=True, slots=True)
class Reread:
    """A job whose kept answers were read again: whether that changed it, its state now, and how the answer was read."""

    id: int
    changed: bool
    status: str
    read_as: str
    note: str


class _ParsedAnswer(NamedTuple):
    row: Row[Any]
    reply: Reply


def apply(settings: Settings, *, shape: str | None = None) -> Iterator[list[Reread]]:
    """Read the kept answers of jobs that are not completed again, and act on them. Yield each committed batch.

    The newest answer of a job that lists its outputs is used, or else its newest answer. `shape` limits this to jobs
    with an answer of that shape. Raises Unavailable; the batches yielded before that are committed.
    """
    engine = engine_for(settings.database)
    audit = CountedAction("unread", shlex.join(["--apply", *(() if shape is None else ("--shape", shape))]))
    with translate_errors(settings.database), engine.connect() as connection:
        ids = jobs_with_answers(connection, shape=shape)
    for start in range(0, len(ids), BATCH):
        with translate_errors(settings.database):
            work = partial(_apply, ids=ids[start : start + BATCH], audit=audit, settings=settings)
            batch = transact(engine, work)
        if any(job.changed for job in batch):
            wake(settings)
        yield batch


def _apply(connection: Connection, *, ids: Sequence[int], audit: CountedAction, settings: Settings) -> list[Reread]:
    now = database_now(connection)
    tally = Tally()
    jobs = lock_revivable_jobs(connection, ids)
    kept_answers: dict[int, list[Row[Any]]] = {}
    for row in answers_of(connection, job_ids=[job.id for job in jobs]):
        kept_answers.setdefault(row.job_id, []).append(row)
    best_answers = {
        job.id: _best_answer(job, kept_answers[job.id], settings, now) for job in jobs if job.id in kept_answers
    }
    ready = {job_id: newest.reply for job_id, newest in best_answers.items() if isinstance(newest.reply, Ready)}
    states = dict(revive(connection, ready, tally, now=now, why="a kept answer, read again", queued=False).jobs)
    for job in jobs:
        end = _end(job, best_answers[job.id], now) if job.id in best_answers else None
        if end is not None and end_pending(connection, job, end, tally, now=now):
            states[job.id] = end.status
    audit.add(connection, len(states), now=now)
    tally.write(connection)
    return [_reread(job, best_answers[job.id].reply, states.get(job.id)) for job in jobs if job.id in best_answers]


def _best_answer(job: Row[Any], rows: Sequence[Row[Any]], settings: Settings, now: datetime) -> _ParsedAnswer:
    """Return the newest answer that lists the outputs, or else the newest answer. `rows` are sorted newest first."""
    question = Question(job.remote_id, now.timestamp(), is_training(path_of(job.fetch_base)), settings.status_words)
    answers = [_ParsedAnswer(row, parse(row.http_status, {}, row.body.encode(), question)) for row in rows]
    return next((answer for answer in answers if isinstance(answer.reply, Ready)), answers[0])


def _end(job: Row[Any], answer: _ParsedAnswer, now: datetime) -> EndJob | None:
    """Return how a pending job ends by an answer that no rule recognised when it arrived, or `None`.

    One such answer is enough, although an answer from a poll would need several in a row: the job was polled many times
    since. An answer from before a `retry` ends nothing.
    """
    since = job.deadline_at - timedelta(seconds=job.deadline_seconds)
    if job.status != "pending" or answer.row.recognised or answer.row.at < since or isinstance(answer.reply, Ready):
        return None
    vague = isinstance(answer.reply, ApiError) and answer.reply.vague
    strikes = Strikes(failed=FAILED_ANSWERS - 1, error=0 if vague else ERROR_ANSWERS - 1)
    facts = JobFacts("pending", job.tracked_at, job.deadline_at, strikes, eta=job.eta)
    step = after_answer(facts, answer.reply, now=now, min_interval=timedelta(0))
    # An end that must first try the promised links is left to the next poll, which is made anyway.
    return step if isinstance(step, EndJob) and step.code not in PROMISE_CODES else None


def _reread(job: Row[Any], reply: Reply, status: str | None) -> Reread:
    note = note_of(reply)
    if status is None and isinstance(reply, Ready):
        note += ", but the job already has outputs"
    return Reread(job.id, status is not None, status or job.status, ANSWER_NAMES[type(reply)].code, note)
