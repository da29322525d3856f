"""Jobs as those see them who look every second: few columns, by primary key, a bounded number."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sqlalchemy import Connection, case, func, select

from worker.core.task_row import MESSAGE_MOST, Outputs, SeenJob, window
from worker.database import database_now
from worker.tables import jobs, outputs

AT_ONCE = 1_000  # ids in one statement
ANSWER_MOST = 200  # characters: the last answer is the first line
_PLAIN = (
    *("id", "account", "remote_id", "kind", "reference", "status", "polls", "submitted_at"),
    *("asked_at", "ready_at", "completed_at", "held_at", "error_code"),
)
_SEEN = (
    *(jobs.c[name] for name in _PLAIN),
    func.substr(jobs.c.last_answer, 1, ANSWER_MOST).label("last_answer"),
    func.substr(jobs.c.error_message, 1, MESSAGE_MOST).label("error_message"),
)
_STORED = outputs.c.status == "stored"
_COUNTED = (
    outputs.c.job_id,
    func.count(),
    func.sum(case((_STORED, 1), else_=0)),
    func.sum(case((_STORED, outputs.c.size_bytes), else_=0)),
)


def look(connection: Connection, before: Mapping[int, SeenJob], most: int) -> dict[int, SeenJob]:
    """The newest jobs, and those seen before that are not over yet: `most` at most, by id, newest first."""
    newest = connection.execute(select(jobs.c.id).order_by(jobs.c.id.desc()).limit(most)).scalars().all()
    ids = window(newest, before.values(), most, now=database_now(connection))
    rows = [row for some in _parts(ids) for row in connection.execute(select(*_SEEN).where(jobs.c.id.in_(some)))]
    seen = sorted((SeenJob(**row._mapping) for row in rows), key=lambda job: job.id, reverse=True)
    known = {job.id: before[job.id].outputs for job in seen if _counted_before(job, before)}
    wanted = [job.id for job in seen if job.status != "pending" and job.id not in known]
    counted = known | _count_outputs(connection, wanted)
    return {job.id: replace(job, outputs=counted.get(job.id, Outputs())) for job in seen}


def _counted_before(job: SeenJob, before: Mapping[int, SeenJob]) -> bool:
    """Whether its outputs were counted after it had ended as it has."""
    known = before.get(job.id)
    return known is not None and job.final and known.completed_at == job.completed_at


def _count_outputs(connection: Connection, job_ids: Sequence[int]) -> dict[int, Outputs]:
    counted = {}
    for ids in _parts(job_ids):
        query = select(*_COUNTED).where(outputs.c.job_id.in_(ids)).group_by(outputs.c.job_id)
        for job_id, count, stored, size in connection.execute(query):
            counted[int(job_id)] = Outputs(int(count), int(stored), int(size))
    return counted


def _parts(ids: Sequence[int]) -> list[Sequence[int]]:
    return [ids[start : start + AT_ONCE] for start in range(0, len(ids), AT_ONCE)]
