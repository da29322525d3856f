"""Copy all rows into another database, for example from SQLite to PostgreSQL.

Rows are read on one snapshot and inserted in the order of their ids. The transaction of a batch also records its last
id, so an interrupted copy continues after it. Small tables without ids are replaced as a whole.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import Connection, Engine, Table
from sqlalchemy.exc import DBAPIError

from worker.errors import CopyRefused, WorkerError
from worker.store import copying
from worker.store.audit import record_action
from worker.store.copying import COPIED_TABLES, Position, RecordedCopy, Values
from worker.store.database_identity import database_id
from worker.store.engine import (
    SCHEMA_VERSION,
    SNAPSHOT,
    UNLIMITED,
    check_schema,
    database_now,
    error_kind,
    error_name,
    limit_statements,
    schema_version,
    shown_url,
    translate_errors,
)
from worker.store.migrate import migrate
from worker.store.processes import ALIVE_SECONDS, read_processes
from worker.store.schema import jobs
from worker.system.process_identity import dead_holders

SHOWN_PROCESSES = 5
SOURCE, TARGET = "DATABASE_URL", "TARGET_URL"


@dataclass(frozen=True, slots=True)
class TableCopy:
    """The result for one table: rows copied by this run, and all rows in the source and in the target."""

    table: str
    copied: int
    source: int
    target: int


@dataclass(slots=True)
class CopyReport:
    """The result of a run. `finished_before` is set if an earlier run had copied everything; then nothing was done."""

    tables: list[TableCopy] = field(default_factory=list)
    finished_before: datetime | None = None

    @property
    def different(self) -> list[TableCopy]:
        """The tables with different numbers of rows."""
        return [table for table in self.tables if table.source != table.target]


def count_rows(source: Engine) -> int:
    """Return the number of rows to copy. Raises CopyRefused, SchemaOutdated."""
    check_schema(source)
    with _reading(source) as connection:
        version = schema_version(connection)
        if version != SCHEMA_VERSION:
            raise CopyRefused(f"the database schema is {version}, newer than this version: use a newer fetch-worker")
        copy = copying.recorded_copy(connection)
        if copy is not None and copy.finished_at is None:
            raise CopyRefused(f"the database of {SOURCE} is itself an unfinished copy: finish that one first")
        return sum(copying.count_all(connection).values())


def copy_database(
    source: Engine,
    target: Engine,
    *,
    force: bool = False,
    show_progress: Callable[[int], None] = lambda _: None,
) -> CopyReport:
    """Migrate the target, and copy the rows of all tables into it. Continue an interrupted copy of the same source.

    Claims are released in the copy, and its audit trail gets a row at the end. With `force`, worker processes may be
    alive. `show_progress` is called with the number of rows copied so far. Raises CopyRefused if the source or the
    target can't be used, and the translated errors of both databases.
    """
    with _writing_errors(target):
        migrate(target)
        _check_pair(source, target, force=force)
        copy = _start(source, target)
        if copy.finished_at is not None:
            return CopyReport(finished_before=copy.finished_at)
        copied = _copy_tables(source, target, copy.position, show_progress)
        _continue_ids(source, target)
        report = CopyReport(_compare(source, target, copied))
        if not report.different:
            with target.begin() as connection:
                now = database_now(connection)
                copying.record_end(connection, now=now)
                copied_jobs = next(table.target for table in report.tables if table.table == jobs.name)
                record_action(
                    connection, "copy-database", f"{SOURCE}={shown_url(source.url)}", jobs=copied_jobs, now=now
                )
    return report


# ── before the copy ───────────────────────────────────────────────────────────────────────────────────────────────────


def _check_pair(source: Engine, target: Engine, *, force: bool) -> None:
    """Raise CopyRefused if both are the same database, or if worker processes use one of them."""
    with _reading(source) as connection:
        source_id = database_id(connection)
        source_workers = [] if force else _workers(connection)
    with target.connect() as connection:
        target_id = database_id(connection)
        target_workers = [] if force else _workers(connection)
    if source_id == target_id:
        raise CopyRefused(f"{TARGET} is the database of {SOURCE}")
    for name, workers in ((SOURCE, source_workers), (TARGET, target_workers)):
        if workers:
            names = ", ".join(workers[:SHOWN_PROCESSES]) + (", …" if len(workers) > SHOWN_PROCESSES else "")
            raise CopyRefused(
                f"worker processes use the database of {name}: {names}. Stop them first; one that was killed on another"
                f" host counts as alive for {ALIVE_SECONDS:.0f} seconds. --force copies without waiting for them"
            )


def _workers(connection: Connection) -> list[str]:
    """Return the names of the worker processes that are alive."""
    now, rows = database_now(connection), read_processes(connection)
    dead = dead_holders(process.holder for process in rows)
    return [process.name for process in rows if process.alive(now, dead)]


def _start(source: Engine, target: Engine) -> RecordedCopy:
    """Record the start of the copy, or check that it can continue. Return its record."""
    with _reading(source) as connection:
        source_id = database_id(connection)
    with target.begin() as connection:
        copy = copying.recorded_copy(connection)
        if copy is None:
            _check_empty(connection)
            copying.record_start(connection, source_id, now=database_now(connection))
            return RecordedCopy(source_id, {}, None)
    if copy.source != source_id:
        raise CopyRefused(f"{TARGET} has a copy of another database: give an empty database")
    if copy.finished_at is None:
        _check_continuation(source, target, copy.position)
    return copy


def _check_empty(connection: Connection) -> None:
    counts = ", ".join(f"{name}: {count:,}" for name, count in copying.count_all(connection).items() if count)
    if counts:
        raise CopyRefused(f"{TARGET} has rows already ({counts}): give an empty database")


def _check_continuation(source: Engine, target: Engine, position: Position) -> None:
    """Raise CopyRefused if the target has other rows than the copied ones, or if copied rows are gone in the source."""
    for table in COPIED_TABLES:
        if copying.id_column(table) is None:
            continue
        with target.connect() as connection:
            last_id, present = copying.last_id(connection, table), copying.count_rows(connection, table)
        with _reading(source) as connection:
            expected = copying.count_rows(connection, table, up_to=position.get(table.name, 0))
        if (last_id, present) != (position.get(table.name), expected):
            raise CopyRefused(
                f"{TARGET} has an unfinished copy, but since then rows of {table.name} were added or removed, there or"
                f" in the database of {SOURCE}: give an empty database"
            )


# ── the copy ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _copy_tables(
    source: Engine, target: Engine, position: Position, show_progress: Callable[[int], None]
) -> dict[str, int]:
    """Copy the rows after a position. Return the number of copied rows by table."""
    with target.connect() as connection:
        now = database_now(connection)
        before = sum(copying.count_all(connection).values())
    copied = dict.fromkeys((table.name for table in COPIED_TABLES), 0)
    with source.execution_options(**{SNAPSHOT: True, UNLIMITED: True}).connect() as connection:
        connection.detach()  # its statements have no timeout, so it does not go back to the pool
        limit_statements(connection, 0)
        connection.commit()  # the snapshot begins with the next statement
        for table in COPIED_TABLES:
            if copying.id_column(table) is None:
                copied[table.name] = _replace_table(connection, target, table)
                continue
            for rows in _batches(connection, table, after=position.get(table.name, 0)):
                copying.release_claims(table, rows, now=now)
                position = _copy_batch(target, table, rows, position)
                copied[table.name] += len(rows)
                show_progress(before + sum(copied.values()))
    return copied


def _replace_table(reading: Connection, target: Engine, table: Table) -> int:
    """Copy a small table as a whole. Return the number of rows."""
    with target.begin() as connection:
        copying.delete_rows(connection, table)
        return sum(_insert(connection, table, rows) for rows in _batches(reading, table))


def _copy_batch(target: Engine, table: Table, rows: Sequence[Values], position: Position) -> Position:
    """Insert rows and record the new position, in one transaction. Return the new position."""
    (key,) = table.primary_key.columns
    new_position = {**position, table.name: rows[-1][key.key]}
    with target.begin() as connection:
        if not copying.record_position(connection, position, new_position):
            raise CopyRefused(f"another run copies into {TARGET} at the same time")
        _insert(connection, table, rows)
    return new_position


def _batches(reading: Connection, table: Table, *, after: int | None = None) -> Iterator[list[Values]]:
    with translate_errors(reading.engine.url):
        yield from copying.row_batches(reading, table, after=after)


def _insert(connection: Connection, table: Table, rows: Sequence[Values]) -> int:
    """Insert rows, and return their number. Raises CopyRefused with the key of a row that the target refuses."""
    try:
        with connection.begin_nested():
            copying.insert_rows(connection, table, rows)
    except DBAPIError as error:
        if error_kind(error) != "row" or connection.invalidated:
            raise
        if len(rows) == 1:
            key = ", ".join(f"{column.name} {rows[0][column.key]}" for column in table.primary_key.columns)
            raise CopyRefused(f"{TARGET} refuses the row of {table.name} with {key}: {error_name(error)}") from None
        middle = len(rows) // 2
        _insert(connection, table, rows[:middle])
        _insert(connection, table, rows[middle:])
    return len(rows)


def _continue_ids(source: Engine, target: Engine) -> None:
    """Make the target generate only ids that the source never generated: files are named after ids."""
    for table in COPIED_TABLES:
        if table.autoincrement_column is None:
            continue
        with _reading(source) as connection:
            next_id = copying.next_id(connection, table)
        with target.begin() as connection:
            highest_id = copying.last_id(connection, table) or 0
            copying.set_next_id(connection, table, max(next_id, highest_id + 1))


def _compare(source: Engine, target: Engine, copied: dict[str, int]) -> list[TableCopy]:
    """Count the rows of both databases as they are now."""
    with _reading(source) as connection:
        in_source = copying.count_all(connection)
    with target.connect() as connection:
        in_target = copying.count_all(connection)
    return [TableCopy(name, count, in_source[name], in_target[name]) for name, count in copied.items()]


# ── connections and errors ────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _reading(source: Engine) -> Iterator[Connection]:
    """Connect to the source, and translate the errors of the block. The outer translation is for the target."""
    with translate_errors(source.url), source.connect() as connection:
        yield connection


@contextmanager
def _writing_errors(target: Engine) -> Iterator[None]:
    """Translate the errors of the target. Their advice names TARGET_URL instead of DATABASE_URL."""
    try:
        with translate_errors(target.url):
            yield
    except WorkerError as error:
        if shown_url(target.url) not in str(error):
            raise
        raise type(error)(str(error).replace(SOURCE, TARGET)) from None
