"""Many rows in one statement: claimed jobs that are written together, and rows that are put in together.

On PostgreSQL a batch travels as one array per column, which the server unfolds: by far the cheapest way there is.
The other databases get one prepared statement and many rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    Column,
    Connection,
    DateTime,
    String,
    Table,
    Text,
    bindparam,
    column,
    func,
    select,
    update,
)
from sqlalchemy.types import TypeEngine

from worker.tables import UtcDateTime, jobs

KEYS = ("id", "claim_token")


def write_claimed(connection: Connection, rows: Sequence[Mapping[str, Any]], *, now: datetime, **same: Any) -> set[int]:
    """Writes claimed jobs whose claim still stands, and ends the claim; the ids of those that were written.

    Each row has `id`, `claim_token` and the same columns as the others; `same` is what all of them get.
    """
    if not rows:
        return set()
    by_id = sorted(rows, key=lambda row: int(row["id"]))  # locked in this order everywhere: no batch blocks another
    ended = {"claim_token": None, "claim_holder": None, **same}
    changed = [name for name in by_id[0] if name not in KEYS]
    standing = (jobs.c.due_at > now,)
    if connection.dialect.name == "postgresql":
        fresh = unfolded(jobs, [*KEYS, *changed])
        statement = (
            update(jobs)
            .where(jobs.c.id == fresh.c.id, jobs.c.claim_token == fresh.c.claim_token, *standing)
            .values({name: fresh.c[name] for name in changed} | ended)
            .returning(jobs.c.id)
        )
        return set(connection.execute(statement, folded([*KEYS, *changed], by_id)).scalars())
    claims = select(jobs.c.id, jobs.c.claim_token).where(jobs.c.id.in_([row["id"] for row in by_id]), *standing)
    held = {(job_id, token) for job_id, token in connection.execute(claims.with_for_update())}
    mine = [row for row in by_id if (row["id"], row["claim_token"]) in held]
    if mine:
        values: dict[str, Any] = {name: bindparam(f"new_{name}") for name in changed}
        singly = update(jobs).where(jobs.c.id == bindparam("job")).values(values | ended)
        connection.execute(
            singly, [{"job": row["id"]} | {f"new_{name}": row[name] for name in changed} for row in mine]
        )
    return {row["id"] for row in mine}


def unfolded(table: Table, names: Sequence[str]) -> Any:
    """The rows of a batch as PostgreSQL sees them: `folded` gives the parameters."""
    arrays = [bindparam(f"all_{name}", type_=ARRAY(_plain(table.c[name]))) for name in names]
    columns = [column(name, _plain(table.c[name])) for name in names]
    return func.unnest(*arrays).table_valued(*columns).render_derived(name="fresh")


def folded(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """One array per column."""
    batch = list(rows)
    return {f"all_{name}": [row[name] for row in batch] for name in names}


def _plain(of: Column[Any]) -> TypeEngine[Any]:
    """The type without what SQLAlchemy would do to each value: they are right already, and there are many."""
    if isinstance(of.type, UtcDateTime):
        return DateTime(timezone=True)
    return Text() if isinstance(of.type, String) else of.type
