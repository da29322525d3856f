"""Run the migrations, from a checkout or from an installed wheel."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, Table, func, inspect, select, text
from sqlalchemy.exc import DBAPIError

from worker.errors import SchemaOutdated, Unavailable
from worker.store.engine import (
    LOCK_TIMEOUT_SECONDS,
    SCHEMA_VERSION,
    STATEMENT_TIMEOUT_SECONDS,
    UNLIMITED,
    check_schema,
    limit_statements,
    missing_tables,
    schema_version,
    translate_errors,
)
from worker.store.schema import VERSION_TABLE, metadata

_PACKAGE = Path(__file__).parents[1]
_LOCK = 0x6665746368  # the number of the advisory lock that keeps two migrations apart ("fetch" in ASCII)
_LOCK_SECONDS = 300
EXPAND_ATTEMPTS = 3  # of a starting worker; each waits for locks, and continues where the last one ended
MYSQL_LOCK = "CONCAT('fetch-worker ', MD5(DATABASE()))"  # lock names are shared by all databases of a server


def scripts() -> Path:
    """Return the folder of the migration scripts: inside an installed package, or next to it in a checkout."""
    installed = _PACKAGE / "migrations"
    return installed if installed.is_dir() else _PACKAGE.parent / "migrations"


def migrate(engine: Engine) -> tuple[str | None, str | None]:
    """Run the missing migrations, and put back tables that were dropped. Return the versions before and after.

    Raises Unavailable if the database does not answer, and SchemaOutdated if its tables are newer than this version.
    """
    config = Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    unlimited = engine.execution_options(**{UNLIMITED: True})
    with translate_errors(engine.url), unlimited.connect() as connection, _migration_lock(connection):
        before = schema_version(connection)
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
            _put_back_tables(connection, config)
        except CommandError:
            raise SchemaOutdated(
                f"the database schema is {before}, which this version ({SCHEMA_VERSION}) does not know:"
                " install the version that made it, or a newer one"
            ) from None
        connection.commit()
        return before, schema_version(connection)


def _put_back_tables(connection: Connection, config: Config) -> None:
    """Create the tables that were dropped although the version says that they are there."""
    missing = missing_tables(connection)
    if missing and connection.dialect.name == "sqlite":
        metadata.create_all(connection, [metadata.tables[name] for name in missing])
    elif missing:  # run all migrations again: each of them leaves alone what is there
        connection.execute(text(f"DELETE FROM {VERSION_TABLE}"))  # noqa: S608  # a constant
        command.upgrade(config, "head")
    for name in missing:
        _continue_ids(connection, metadata.tables[name])
        if connection.dialect.name == "postgresql":
            _put_back_references(connection, name)


def _continue_ids(connection: Connection, table: Table) -> None:
    """Let the ids of a new table begin above those that rows of other tables refer to. No row gets a foreign child."""
    columns = [
        key.parent for other in metadata.sorted_tables for key in other.foreign_keys if key.column.table is table
    ]
    used = [connection.execute(select(func.max(column))).scalar() or 0 for column in columns]
    highest = max(used, default=0)
    if not highest:
        return
    match connection.dialect.name:
        case "postgresql":
            sequence = func.pg_get_serial_sequence(table.name, "id")
            connection.execute(select(func.setval(sequence, highest)))
        case "sqlite":
            connection.execute(
                text("INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :seq)"),
                {"name": table.name, "seq": highest},
            )
        case _:
            connection.execute(text(f"ALTER TABLE {table.name} AUTO_INCREMENT = {highest + 1:d}"))


def _put_back_references(connection: Connection, name: str) -> None:
    """Add the foreign keys that PostgreSQL dropped with a table. Rows whose job or output is gone stay."""
    for table in metadata.sorted_tables:
        there = {key["name"] for key in inspect(connection).get_foreign_keys(table.name)}
        for key in table.foreign_key_constraints:
            if key.referred_table.name == name and key.name not in there:
                columns = ", ".join(column.name for column in key.columns)
                connection.execute(
                    text(
                        f"ALTER TABLE {table.name} ADD CONSTRAINT {key.name} FOREIGN KEY ({columns})"
                        f" REFERENCES {name} (id) ON DELETE {key.ondelete or 'NO ACTION'} NOT VALID"
                    )
                )


def expand(engine: Engine) -> None:
    """Migrate the tables of an older version. Each worker process calls this when it starts.

    Migrations only add tables and columns, so workers of the previous version can continue. No tables are created if
    there are none. Raises SchemaOutdated if an operator has to run `fetch-worker migrate`, and Unavailable if the
    database does not answer.
    """
    try:
        check_schema(engine)
    except SchemaOutdated:
        with translate_errors(engine.url), engine.connect() as connection:
            has_tables = schema_version(connection) is not None
        if not has_tables:
            raise
        for _ in range(EXPAND_ATTEMPTS):
            with suppress(DBAPIError, Unavailable):  # the permission is missing, or a transaction has locked a table
                migrate(engine)
                return
        check_schema(engine)


@contextmanager
def _migration_lock(connection: Connection) -> Iterator[None]:
    """Lock out other migrations. SQLite locks its file anyway. Statements have no timeout here."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'")
    elif connection.dialect.name != "sqlite":
        limit_statements(connection, 0)
        locked = connection.exec_driver_sql(f"SELECT GET_LOCK({MYSQL_LOCK}, {_LOCK_SECONDS})").scalar()
        if not locked:
            raise Unavailable(f"another migration is under way for more than {_LOCK_SECONDS} s: try again after it")
    try:
        yield
    finally:
        if connection.dialect.name not in ("postgresql", "sqlite") and not connection.invalidated:
            connection.exec_driver_sql(f"SELECT RELEASE_LOCK({MYSQL_LOCK})")
            limit_statements(connection, STATEMENT_TIMEOUT_SECONDS)
