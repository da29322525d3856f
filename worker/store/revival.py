"""Revive jobs whose outputs became known later: pending, failed and expired jobs go to downloading."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, select, update

from worker.core.answer_history import MAX_NOTE, NOTE_SEPARATOR, format_note
from worker.core.lifecycle import EndJob, left_out_note, note_of
from worker.core.reply import Ready
from worker.store.counters import Tally
from worker.store.events import create_events
from worker.store.late_looks import delete_looks
from worker.store.new_outputs import insert_outputs
from worker.store.promises import reset_promises
from worker.store.schema import jobs, outputs
from worker.store.transitions import clear_end, job_downloading, job_ended

REVIVABLE = ("pending", "failed", "expired")


@dataclass(frozen=True, slots=True)
class Revived:
    """The changed jobs with their new states, and the outputs to download."""

    jobs: Mapping[int, str]
    outputs: tuple[int, ...]

    @property
    def completed(self) -> tuple[int, ...]:
        """The jobs that are completed at once, because they have no outputs to download."""
        return tuple(job_id for job_id, status in self.jobs.items() if status == "completed")


def lock_revivable_jobs(connection: Connection, job_ids: Collection[int]) -> Sequence[Row[Any]]:
    """Lock the jobs that can be revived, and return their rows."""
    locked = select(jobs).where(jobs.c.id.in_(job_ids), jobs.c.status.in_(REVIVABLE))
    return connection.execute(locked.order_by(jobs.c.id).with_for_update()).all()


def revive(
    connection: Connection, answers: Mapping[int, Ready], tally: Tally, *, now: datetime, why: str, queued: bool
) -> Revived:
    """Set jobs to downloading and insert their outputs, as an answer does for a pending job.

    Before a job leaves its final state, the webhook event of that state is created. A job that already has outputs or
    is in another state is not changed. Pass `queued=True` if the caller sends the download messages after the commit.
    The caller writes the tally.
    """
    rows = lock_revivable_jobs(connection, list(answers))
    create_events(connection, now=now, of=[row.id for row in rows])  # includes the outputs that the next line removes
    reset_promises(connection, [row.id for row in rows])
    output_jobs = select(outputs.c.job_id).where(outputs.c.job_id.in_([row.id for row in rows]))
    with_outputs = set(connection.execute(output_jobs).scalars()) if rows else set()
    rows = [row for row in rows if row.id not in with_outputs]
    if not rows:
        return Revived({}, ())
    ids = [row.id for row in rows]
    delete_looks(connection, ids)
    for row in rows:
        reply = answers[row.id]
        connection.execute(update(jobs).where(jobs.c.id == row.id).values(_values(row, reply, now, why)))
        if row.status == "pending":
            tally.polled(row.account, row.kind, row.polls)
        if not reply.outputs:
            tally.finished(row.account, row.kind, "completed")
        if reply.left_out:
            tally.left_out(row.account, reply.left_out)
    links_by_job = [(job_id, answers[job_id].outputs) for job_id in ids if answers[job_id].outputs]
    output_ids = insert_outputs(connection, links_by_job, now=now, queued=queued)
    states = {job_id: "downloading" if answers[job_id].outputs else "completed" for job_id in ids}
    return Revived(states, tuple(output_ids))


def end_pending(connection: Connection, job: Row[Any], end: EndJob, tally: Tally, *, now: datetime) -> bool:
    """End a pending job that is not claimed. Return whether it ended. The caller writes the tally."""
    ended = connection.execute(
        update(jobs)
        .where(jobs.c.id == job.id, jobs.c.status == "pending", jobs.c.claim_token.is_(None))
        .values(
            **job_ended(end.status, now),
            error_code=end.code,
            error_message=end.message,
            last_answer=_last_answer(job, f"{end.code}: {end.message} (a kept answer, read again)", now),
        )
    )
    if ended.rowcount:
        tally.polled(job.account, job.kind, job.polls)
        tally.finished(job.account, job.kind, end.status)
    return bool(ended.rowcount)


def _last_answer(job: Row[Any], note: str, now: datetime) -> str:
    line = format_note((now - job.submitted_at).total_seconds(), note)
    return f"{line}{NOTE_SEPARATOR}{job.last_answer}"[:MAX_NOTE] if job.last_answer else line


def _values(row: Row[Any], reply: Ready, now: datetime, why: str) -> dict[str, Any]:
    deadline = {} if row.status == "pending" else {"deadline_at": now + timedelta(seconds=row.deadline_seconds)}
    return {
        **clear_end(),
        **deadline,
        **(job_downloading(now) if reply.outputs else job_ended("completed", now)),
        "ready_at": now,
        "error_message": left_out_note(len(reply.outputs), reply.left_out) if reply.left_out else None,
        "held_at": None,
        "last_answer": _last_answer(row, f"{note_of(reply)} ({why})", now),
    }
