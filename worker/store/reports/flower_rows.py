"""Job rows for Flower, read every second: few columns, by primary key, a limited number of rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Connection, Row, Select, bindparam, case, func, select

from worker.core.flower_rows import MAX_MESSAGE_LENGTH, FlowerJob, Outputs, job_ids_to_show
from worker.core.lifecycle import ORDER_STATES
from worker.store.engine import database_now
from worker.store.schema import jobs, outputs

NO_OUTPUTS = Outputs()
AT_ONCE = 1_000  # ids per statement
ANSWER_MOST = 200  # characters; the first line has the last answer
_JOB_COLUMNS = (  # in the order of the fields of `FlowerJob`
    *(jobs.c[name] for name in ("id", "account", "remote_id", "kind", "reference", "status", "polls")),
    func.substr(jobs.c.last_answer, 1, ANSWER_MOST),
    *(jobs.c[name] for name in ("submitted_at", "asked_at", "ready_at", "completed_at", "held_at", "error_code")),
    func.substr(jobs.c.error_message, 1, MAX_MESSAGE_LENGTH),
)
_IS_STORED = outputs.c.status == "stored"
_OUTPUT_COUNTS = (
    outputs.c.job_id,
    func.count(),
    func.sum(case((_IS_STORED, 1), else_=0)),
    func.sum(case((_IS_STORED, outputs.c.size_bytes), else_=0)),
)


def read_flower_jobs(connection: Connection, previous: Mapping[int, FlowerJob], limit: int) -> dict[int, FlowerJob]:
    """Return the newest jobs and the unfinished jobs of the previous result, at most `limit`, newest first.

    It reads `limit` rows, plus the rows of the unfinished jobs, which are at most half as many.
    """
    query = select(*_JOB_COLUMNS).order_by(jobs.c.id.desc()).limit(limit)
    newest: dict[int, Any] = {row.id: row for row in connection.execute(query).all()}
    ids = sorted(job_ids_to_show(list(newest), previous.values(), limit, now=database_now(connection)), reverse=True)
    older = [job_id for job_id in ids if job_id not in newest]
    rows = newest | {row.id: row for row in _by_ids(connection, select(*_JOB_COLUMNS), jobs.c.id, older)}
    ordered_rows = [rows[job_id] for job_id in ids if job_id in rows]
    known_outputs = {row.id: _known_outputs(row, previous.get(row.id)) for row in ordered_rows}
    counted_outputs = _count_outputs(
        connection, [job_id for job_id, job_outputs in known_outputs.items() if job_outputs is None]
    )
    return {
        row.id: _flower_job(row, known_outputs[row.id] or counted_outputs.get(row.id, NO_OUTPUTS))
        for row in ordered_rows
    }


def _flower_job(row: Row[Any], job_outputs: Outputs) -> FlowerJob:
    fields: Any = (*row, job_outputs)
    return FlowerJob(*fields)


def _known_outputs(row: Row[Any], previous: FlowerJob | None) -> Outputs | None:
    """Return a job's outputs if no query is needed: it has none yet, or it had already ended before. Else None."""
    if row.status in ("pending", *ORDER_STATES):
        return NO_OUTPUTS
    unchanged = previous is not None and previous.final and previous.completed_at == row.completed_at
    return previous.outputs if previous is not None and unchanged else None


def _count_outputs(connection: Connection, job_ids: Sequence[int]) -> dict[int, Outputs]:
    query = select(*_OUTPUT_COUNTS).group_by(outputs.c.job_id)
    rows = _by_ids(connection, query, outputs.c.job_id, job_ids)
    return {row[0]: Outputs(row[1], int(row[2]), int(row[3])) for row in rows}


def _by_ids(connection: Connection, query: Select[Any], column: ColumnElement[int], ids: Sequence[int]) -> list[Any]:
    """Return the rows with these ids. The ids are literals in the SQL text, because many parameters are slow."""
    rows: list[Any] = []
    for start in range(0, len(ids), AT_ONCE):
        batch = list(ids[start : start + AT_ONCE])
        parameter: BindParameter[Any] = bindparam("ids", batch, expanding=True, literal_execute=True)
        rows += connection.execute(query.where(column.in_(parameter))).all()
    return rows
