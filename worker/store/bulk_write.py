"""Many rows in one statement: claimed jobs that are written together, and rows that are put in together.

On PostgreSQL a batch travels as one JSON text, which the server unfolds: by far the cheapest way for both. The other
databases get one prepared statement and many rows.
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

KEYS = ("id", "claim_token")
INSERT_ROWS = 500  # one statement's worth; every database takes that many parameters
JSON_BATCH_ROWS = 5_000  # the same where all rows are one parameter


def update_claimed_jobs(
    connection: Connection, rows: Sequence[Mapping[str, Any]], *, now: datetime, **same: Any
) -> set[int]:
    """Writes claimed jobs whose claim still stands, and ends the claim; the ids of those that were written.

    Each row has `id`, `claim_token` and the same columns as the others; `same` is what all of them get. A time in a
    row may be given as seconds since 1970, which is how it travels to PostgreSQL anyway.
    """
    if not rows:
        return set()
    by_id = sorted(rows, key=itemgetter("id"))  # locked in this order everywhere: no batch blocks another
    ended = {"claim_token": None, "claim_holder": None, **same}
    changed = [name for name in by_id[0] if name not in KEYS]
    if connection.dialect.name == "postgresql":
        statement = _write_all(tuple(changed), tuple(ended))
        values = {f"same_{name}": value for name, value in ended.items()}
        written = connection.execute(statement, batch_parameter([*KEYS, *changed], by_id) | values | {"now": now})
        return set(written.scalars().all())
    claims = select(jobs.c.id, jobs.c.claim_token).where(
        jobs.c.id.in_([row["id"] for row in by_id]), jobs.c.due_at > now
    )
    held = {(job_id, token) for job_id, token in connection.execute(claims.with_for_update()).all()}
    mine = [row for row in by_id if (row["id"], row["claim_token"]) in held]
    if mine:
        fresh: dict[str, Any] = {name: bindparam(f"new_{name}") for name in changed}
        if "last_answer" in fresh:
            fresh["last_answer"] = _with_those_before(bindparam("new_last_answer", type_=jobs.c.last_answer.type))
        singly = update(jobs).where(jobs.c.id == bindparam("job")).values(fresh | ended)
        connection.execute(
            singly, [{"job": row["id"]} | {f"new_{name}": _moment(name, row[name]) for name in changed} for row in mine]
        )
    return {row["id"] for row in mine}


def _with_those_before(line: ColumnElement[Any]) -> ColumnElement[Any]:
    """A job's last answers: this one, and under it those before, as far as there is room."""
    return func.substr(line + func.coalesce(NOTE_SEPARATOR + jobs.c.last_answer, ""), 1, MAX_NOTE)


def _moment(name: str, value: Any) -> Any:
    if isinstance(value, float) and isinstance(jobs.c[name].type, UtcDateTime):
        return datetime.fromtimestamp(value, UTC)
    return value


@cache
def _write_all(changed: tuple[str, ...], same: tuple[str, ...]) -> Any:
    fresh = batch_columns(jobs, (*KEYS, *changed))
    written = {name: _with_those_before(fresh[name]) if name == "last_answer" else fresh[name] for name in changed}
    now = bindparam("now", type_=jobs.c.due_at.type)
    return (
        update(jobs)
        .where(
            jobs.c.id == fresh["id"],
            jobs.c.claim_token == fresh["claim_token"],
            # Written so that no index serves it: the server would start from all jobs that are not due, not from ours.
            func.coalesce(jobs.c.due_at, now) > now,
        )
        .values(written | {name: bindparam(f"same_{name}", type_=jobs.c[name].type) for name in same})
        .returning(jobs.c.id)
    )


def batch_columns(table: Table, names: Sequence[str]) -> dict[str, ColumnElement[Any]]:
    """The columns of a batch as PostgreSQL sees them; `folded` gives the parameter."""
    columns = [column(name, _plain(table.c[name])) for name in names]
    fresh = (
        func.json_to_recordset(cast(bindparam("batch", type_=Text), JSON))
        .table_valued(*columns, name="fresh")
        .render_derived(with_types=True)
    )
    return {
        name: func.to_timestamp(fresh.c[name]) if isinstance(table.c[name].type, UtcDateTime) else fresh.c[name]
        for name in names
    }


def batch_parameter(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """All rows in one parameter: JSON is written and read in C on both sides, arrays are escaped item by item."""
    if set(names) != set(rows[0]):
        rows = [{name: row[name] for name in names} for row in rows]
    return {"batch": _write(rows)}


def insert_missing(connection: Connection, table: Table, row: Mapping[str, Any]) -> bool:
    """Puts a row in, unless one with its key is there; whether it did."""
    match connection.dialect.name:
        case "postgresql":
            statement: Any = postgresql.insert(table).values(row).on_conflict_do_nothing()
        case "sqlite":
            statement = sqlite.insert(table).values(row).on_conflict_do_nothing()
        case _:
            statement = mysql.insert(table).prefix_with("IGNORE").values(row)
    return bool(connection.execute(statement).rowcount)


def _seconds(value: object) -> float:
    # By far cheaper than text, and exact: a microsecond is four times the distance between two such numbers.
    if isinstance(value, datetime):
        return value.timestamp()
    raise TypeError(f"{type(value).__name__} can't be part of a batch")


_write = json.JSONEncoder(separators=(",", ":"), check_circular=False, default=_seconds).encode


def _plain(of: Column[Any]) -> TypeEngine[Any]:
    """The type that travels, without what SQLAlchemy would do to each value. Times travel as seconds since 1970."""
    if isinstance(of.type, UtcDateTime):
        return Double()
    return Text() if isinstance(of.type, String) else of.type
