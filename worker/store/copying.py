"""Copy the rows of all tables into another database: read, release claims, insert, continue the ids."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Column, Connection, Table, delete, func, insert, select, text, update

from worker.store.schema import HELD_UNTIL, bodies, copies, events, metadata, orders, processes, promises, unread
from worker.store.transitions import NO_CLAIM

# All tables in the order of their foreign keys, without those that describe the database itself.
COPIED_TABLES: Sequence[Table] = [table for table in metadata.sorted_tables if table not in (processes, copies)]
BATCH_ROWS = 1_000
SMALL_BATCHES: Mapping[Table, int] = {
    bodies: 1,
    events: 100,
    orders: 10,
    promises: 100,
    unread: 100,
}  # tables with large values

Values = dict[str, Any]


def id_column(table: Table) -> Column[Any] | None:
    """Return the column that orders the rows of a table as they were inserted, or None.

    The other tables are small and are always copied as a whole.
    """
    keys = list(table.primary_key.columns)
    return keys[0] if len(keys) == 1 and keys[0].type.python_type is int else None


def row_batches(connection: Connection, table: Table, *, after: int | None) -> Iterator[list[Values]]:
    """Yield the rows of a table in batches, and in order if it has ids. With `after`, only rows with higher ids.

    The rows are streamed: only one batch is in memory. No other statement may run on the connection meanwhile.
    """
    query = select(*(column.label(column.key) for column in table.c))  # the names that `insert_rows` takes
    column = id_column(table)
    if column is not None:
        query = query.order_by(column)
        if after is not None:
            query = query.where(column > after)
    size = SMALL_BATCHES.get(table, BATCH_ROWS)
    with connection.execute(query.execution_options(yield_per=size)) as result:
        for batch in result.mappings().partitions(size):
            yield [dict(row) for row in batch]


def release_claims(table: Table, rows: Sequence[Values], *, now: datetime) -> None:
    """Release the claims in rows: processes of another database hold them. Claimed rows are due now.

    Of a claimed order only the lease ends. The first sweep releases it, and knows whether it was sent.
    """
    if "claim_holder" not in table.c:
        return
    for row in rows:
        if row["claim_holder"] is None and row["claim_token"] is None:
            continue
        if table is orders:
            row["due_at"] = min(row["due_at"], now)
            continue
        row.update(NO_CLAIM)
        if row["due_at"] is not None and row["due_at"] < HELD_UNTIL:
            row["due_at"] = now


def insert_rows(connection: Connection, table: Table, rows: Sequence[Values]) -> None:
    """Insert rows with their ids."""
    connection.execute(insert(table), rows)


def delete_rows(connection: Connection, table: Table) -> None:
    """Delete all rows of a table."""
    connection.execute(delete(table))


def last_id(connection: Connection, table: Table) -> int | None:
    """Return the highest id in a table that has ids, or None."""
    highest: int | None = connection.execute(select(func.max(id_column(table)))).scalar_one()
    return highest


def count_rows(connection: Connection, table: Table, *, up_to: int | None = None) -> int:
    """Count the rows of a table. With `up_to`, only rows with ids up to this one."""
    query = select(func.count()).select_from(table)
    column = id_column(table)
    if up_to is not None and column is not None:
        query = query.where(column <= up_to)
    return int(connection.execute(query).scalar_one())


def count_all(connection: Connection) -> dict[str, int]:
    """Return the number of rows of each table, by its name."""
    return {table.name: count_rows(connection, table) for table in COPIED_TABLES}


# ── generated ids ─────────────────────────────────────────────────────────────────────────────────────────────────────


def next_id(connection: Connection, table: Table) -> int:
    """Return the next id that the database generates. It may be far above the highest id, because rows are deleted."""
    match connection.dialect.name:
        case "postgresql":
            query = "SELECT pg_sequence_last_value(CAST(pg_get_serial_sequence(:name, 'id') AS regclass))"
        case "sqlite":
            query = "SELECT seq FROM sqlite_sequence WHERE name = :name"
        case _:
            query = (
                "SELECT auto_increment - 1 FROM information_schema.tables"
                " WHERE table_schema = DATABASE() AND table_name = :name"
            )
    last_value = connection.execute(text(query), {"name": table.name}).scalar()
    return int(last_value or 0) + 1


def set_next_id(connection: Connection, table: Table, value: int) -> None:
    """Make the database continue with this id. On MariaDB, this commits the transaction."""
    values = {"name": table.name, "value": value}
    match connection.dialect.name:
        case "postgresql":
            connection.execute(text("SELECT setval(pg_get_serial_sequence(:name, 'id'), :value, false)"), values)
        case "sqlite":
            connection.execute(text("DELETE FROM sqlite_sequence WHERE name = :name"), values)
            connection.execute(text("INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :value - 1)"), values)
        case _:
            connection.exec_driver_sql(f"ALTER TABLE {table.name} AUTO_INCREMENT = {value:d}")


# ── the record of the copy ────────────────────────────────────────────────────────────────────────────────────────────

Position = Mapping[str, int]  # the last copied id of each table with ids, by the table's name


@dataclass(frozen=True, slots=True)
class RecordedCopy:
    """The copy into a database: an identifier of its source, how far it came, and when it was finished."""

    source: str
    position: Position
    finished_at: datetime | None


def recorded_copy(connection: Connection) -> RecordedCopy | None:
    """Return the copy into this database, or None if it is no copy."""
    row = connection.execute(select(copies)).first()
    return None if row is None else RecordedCopy(row.source, json.loads(row.position), row.finished_at)


def record_start(connection: Connection, source: str, *, now: datetime) -> None:
    """Record that a database is copied into this one."""
    connection.execute(insert(copies).values(source=source, position=_encode({}), started_at=now))


def record_position(connection: Connection, before: Position, after: Position) -> bool:
    """Record how far the copy is, in the transaction of the rows. Return False if another run went on from `before`."""
    advance = update(copies).where(copies.c.position == _encode(before)).values(position=_encode(after))
    return bool(connection.execute(advance).rowcount)


def record_end(connection: Connection, *, now: datetime) -> None:
    """Record that the copy is complete."""
    connection.execute(update(copies).values(finished_at=now))


def _encode(position: Position) -> str:
    return json.dumps(position, sort_keys=True)
