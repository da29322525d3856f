"""Jobs as those see them who look every second: few columns, by primary key, a bounded number."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Connection, Row, Select, bindparam, case, func, select

from worker.core.flower_rows import MESSAGE_MOST, FlowerJob, Outputs, job_ids_to_show
from worker.store.engine import database_now
from worker.store.schema import jobs, outputs

NO_OUTPUTS = Outputs()
AT_ONCE = 1_000  # ids in one statement
ANSWER_MOST = 200  # characters: the last answer is the first line
_SEEN = (  # as the fields of `SeenJob`
    *(jobs.c[name] for name in ("id", "account", "remote_id", "kind", "reference", "status", "polls")),
    func.substr(jobs.c.last_answer, 1, ANSWER_MOST),
    *(jobs.c[name] for name in ("submitted_at", "asked_at", "ready_at", "completed_at", "held_at", "error_code")),
    func.substr(jobs.c.error_message, 1, MESSAGE_MOST),
)
_STORED = outputs.c.status == "stored"
_COUNTED = (
    outputs.c.job_id,
    func.count(),
    func.sum(case((_STORED, 1), else_=0)),
    func.sum(case((_STORED, outputs.c.size_bytes), else_=0)),
)


def read_flower_jobs(connection: Connection, before: Mapping[int, FlowerJob], most: int) -> dict[int, FlowerJob]:
    """The newest jobs, and those seen before that are not over yet: `most` at most, by id, newest first.

    It reads so many rows and those of the second kind, which are half as many at most.
    """
    query = select(*_SEEN).order_by(jobs.c.id.desc()).limit(most)
    newest: dict[int, Any] = {row.id: row for row in connection.execute(query).all()}
    ids = sorted(job_ids_to_show(list(newest), before.values(), most, now=database_now(connection)), reverse=True)
    older = [job_id for job_id in ids if job_id not in newest]
    rows = newest | {row.id: row for row in _by_ids(connection, select(*_SEEN), jobs.c.id, older)}
    there = [rows[job_id] for job_id in ids if job_id in rows]
    known = {row.id: _known_outputs(row, before.get(row.id)) for row in there}
    counted = _count_outputs(connection, [job_id for job_id, found in known.items() if found is None])
    return {row.id: _seen(row, known[row.id] or counted.get(row.id, NO_OUTPUTS)) for row in there}


def _seen(row: Row[Any], found: Outputs) -> FlowerJob:
    fields: Any = (*row, found)
    return FlowerJob(*fields)


def _known_outputs(row: Row[Any], before: FlowerJob | None) -> Outputs | None:
    """What is known of a job's outputs without counting: it has none yet, or it has ended as it was seen before."""
    if row.status == "pending":
        return NO_OUTPUTS
    ended = before is not None and before.final and before.completed_at == row.completed_at
    return before.outputs if before is not None and ended else None


def _count_outputs(connection: Connection, job_ids: Sequence[int]) -> dict[int, Outputs]:
    query = select(*_COUNTED).group_by(outputs.c.job_id)
    rows = _by_ids(connection, query, outputs.c.job_id, job_ids)
    return {row[0]: Outputs(row[1], int(row[2]), int(row[3])) for row in rows}


def _by_ids(connection: Connection, query: Select[Any], column: ColumnElement[int], ids: Sequence[int]) -> list[Any]:
    """The rows with these ids. They stand in the statement itself: drivers are slow with so many parameters."""
    found: list[Any] = []
    for start in range(0, len(ids), AT_ONCE):
        some = list(ids[start : start + AT_ONCE])
        written: BindParameter[Any] = bindparam("ids", some, expanding=True, literal_execute=True)
        found += connection.execute(query.where(column.in_(written))).all()
    return found
