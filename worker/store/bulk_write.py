"""Write many rows with one statement: updates of claimed jobs, and inserts.

On PostgreSQL a batch is one JSON parameter that the server expands into rows. This costs client and server far less
than one parameter per value. The other databases get one statement and a list of rows.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from operator import itemgetter
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Connection,
    Double,
    String,
    Table,
    Text,
    bindparam,
    cast,
    column,
    func,
    select,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.types import TypeEngine

from worker.core.answer_history import MAX_NOTE, NOTE_SEPARATOR
from worker.store.schema import UtcDateTime, jobs
from worker.store.transitions import NO_CLAIM

KEYS = ("id", "claim_token")
INSERT_ROWS = 500  # rows per INSERT: every database accepts that many parameters
JSON_BATCH_ROWS = 5_000  # rows per INSERT if all rows are one JSON parameter


def update_claimed_jobs(
    connection: Connection, rows: Sequence[Mapping[str, Any]], *, now: datetime, **same: Any
) -> set[int]:
    """Update claimed jobs, release their claims, and return the ids of the updated jobs.

    A job whose claim was lost is not updated. Each row has `id`, `claim_token`, and the same other columns as all other
    rows. `same` has the values that are equal for all jobs. A time in a row may be a number of seconds since 1970,
    because PostgreSQL receives times in this form.
    """
    if not rows:
        return set()
    by_id = sorted(rows, key=itemgetter("id"))  # all transactions lock in this order, which avoids deadlocks
    same_values = {**NO_CLAIM, **same}
    changed = [name for name in by_id[0] if name not in KEYS]
    if connection.dialect.name == "postgresql":
        statement = _update_statement(tuple(changed), tuple(same_values))
        values = {f"same_{name}": value for name, value in same_values.items()}
        written = connection.execute(statement, batch_parameter([*KEYS, *changed], by_id) | values | {"now": now})
        return set(written.scalars().all())
    claims = select(jobs.c.id, jobs.c.claim_token).where(
        jobs.c.id.in_([row["id"] for row in by_id]), jobs.c.due_at > now
    )
    valid_claims = {(job_id, token) for job_id, token in connection.execute(claims.with_for_update()).all()}
    claimed_rows = [row for row in by_id if (row["id"], row["claim_token"]) in valid_claims]
    if claimed_rows:
        new_values: dict[str, Any] = {name: bindparam(f"new_{name}") for name in changed}
        if "last_answer" in new_values:
            new_values["last_answer"] = _with_previous_answers(
                bindparam("new_last_answer", type_=jobs.c.last_answer.type)
            )
        job_update = update(jobs).where(jobs.c.id == bindparam("job")).values(new_values | same_values)
        connection.execute(
            job_update,
            [
                {"job": row["id"]} | {f"new_{name}": _to_datetime(name, row[name]) for name in changed}
                for row in claimed_rows
            ],
        )
    return {row["id"] for row in claimed_rows}


def _with_previous_answers(line: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return the expression for a job's last answers: this one, then the previous ones as far as they fit."""
    return func.substr(line + func.coalesce(NOTE_SEPARATOR + jobs.c.last_answer, ""), 1, MAX_NOTE)


def _to_datetime(name: str, value: Any) -> Any:
    if isinstance(value, float) and isinstance(jobs.c[name].type, UtcDateTime):
        return datetime.fromtimestamp(value, UTC)
    return value


@cache
def _update_statement(changed: tuple[str, ...], same: tuple[str, ...]) -> Any:
    batch = batch_columns(jobs, (*KEYS, *changed))
    written = {name: _with_previous_answers(batch[name]) if name == "last_answer" else batch[name] for name in changed}
    now = bindparam("now", type_=jobs.c.due_at.type)
    return (
        update(jobs)
        .where(
            jobs.c.id == batch["id"],
            jobs.c.claim_token == batch["claim_token"],
            # Written so that no index matches. Otherwise the server may start from all jobs that are not due.
            func.coalesce(jobs.c.due_at, now) > now,
        )
        .values(written | {name: bindparam(f"same_{name}", type_=jobs.c[name].type) for name in same})
        .returning(jobs.c.id)
    )


def batch_columns(table: Table, names: Sequence[str]) -> dict[str, ColumnElement[Any]]:
    """Return the columns of a JSON batch for a PostgreSQL statement. `batch_parameter` returns the parameter."""
    columns = [column(name, _json_type(table.c[name])) for name in names]
    batch = (
        func.json_to_recordset(cast(bindparam("batch", type_=Text), JSON))
        .table_valued(*columns, name="fresh")
        .render_derived(with_types=True)
    )
    return {
        name: func.to_timestamp(batch.c[name]) if isinstance(table.c[name].type, UtcDateTime) else batch.c[name]
        for name in names
    }


def batch_parameter(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return all rows as one JSON parameter.

    Client and server both process JSON in C. An array parameter would be escaped item by item.
    """
    if set(names) != set(rows[0]):
        rows = [{name: row[name] for name in names} for row in rows]
    return {"batch": _encode_json(rows)}


def insert_missing(connection: Connection, table: Table, row: Mapping[str, Any]) -> bool:
    """Insert a row unless a row with its key exists. Return whether it was inserted."""
    match connection.dialect.name:
        case "postgresql":
            statement: Any = postgresql.insert(table).values(row).on_conflict_do_nothing()
        case "sqlite":
            statement = sqlite.insert(table).values(row).on_conflict_do_nothing()
        case _:
            statement = mysql.insert(table).prefix_with("IGNORE").values(row)
    # Without the option, the number of inserted rows is not known on PostgreSQL: it is -1, which counts as true.
    return connection.execute(statement, execution_options={"preserve_rowcount": True}).rowcount > 0


def _seconds(value: object) -> float:
    # Far cheaper than text, and exact: two neighbouring floats of this size differ by a quarter of a microsecond.
    if isinstance(value, datetime):
        return value.timestamp()
    raise TypeError(f"{type(value).__name__} can't be part of a batch")


_encode_json = json.JSONEncoder(separators=(",", ":"), check_circular=False, default=_seconds).encode


def _json_type(table_column: Column[Any]) -> TypeEngine[Any]:
    """Return the type of a column inside a JSON batch. It has no bind processing; times are seconds since 1970."""
    if isinstance(table_column.type, UtcDateTime):
        return Double()
    return Text() if isinstance(table_column.type, String) else table_column.type
