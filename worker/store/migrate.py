"""Brings the tables up to this version, in a checkout as well as from an installed wheel."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from worker.errors import SchemaOutdated, Unavailable
from worker.store.engine import (
    LOCK_TIMEOUT_SECONDS,
    SCHEMA_VERSION,
    STATEMENT_TIMEOUT_SECONDS,
    UNLIMITED,
    check_schema,
    limit_statements,
    schema_version,
    translate_errors,
)

_PACKAGE = Path(__file__).parents[1]
_LOCK = 0x6665746368  # names the lock that two migrations at once queue on; any number of our own will do
_LOCK_SECONDS = 300
MYSQL_LOCK = "CONCAT('fetch-worker ', MD5(DATABASE()))"  # locks belong to the server there, not to a database


def scripts() -> Path:
    """The folder of the migration scripts: inside the package where it was installed, beside it in a checkout."""
    inside = _PACKAGE / "migrations"
    return inside if inside.is_dir() else _PACKAGE.parent / "migrations"


def migrate(engine: Engine) -> tuple[str | None, str | None]:
    """Runs what is missing; the version before and after.

    Raises Unavailable where the database does not answer, SchemaOutdated where its tables are ahead of this version.
    """
    config = Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    unlimited = engine.execution_options(**{UNLIMITED: True})
    with translate_errors(engine.url), unlimited.connect() as connection, _alone(connection):
        before = schema_version(connection)
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError:
            raise SchemaOutdated(
                f"the database schema is {before}, which this version ({SCHEMA_VERSION}) does not know:"
                " install the version that made it, or a newer one"
            ) from None
        connection.commit()
        return before, schema_version(connection)


def expand(engine: Engine) -> None:
    """Makes sure that tables of an older version have what this one needs, as a worker process does at its start.

    A migration only adds, so that the workers of the version before go on beside it. Where there are no tables none are
    made. Raises SchemaOutdated where somebody has to run `fetch-worker migrate`, Unavailable where no database answers.
    """
    try:
        check_schema(engine)
    except SchemaOutdated:
        with translate_errors(engine.url), engine.connect() as connection:
            there = schema_version(connection) is not None
        if not there:
            raise
        try:
            migrate(engine)
        except (DBAPIError, Unavailable):  # no right to, or somebody else holds the tables
            check_schema(engine)


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Keeps two migrations apart; SQLite does it by itself. An index of a large table may take its time."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'")
    elif connection.dialect.name != "sqlite":
        limit_statements(connection, 0)
        taken = connection.exec_driver_sql(f"SELECT GET_LOCK({MYSQL_LOCK}, {_LOCK_SECONDS})").scalar()
        if not taken:
            raise Unavailable(f"another migration is under way for more than {_LOCK_SECONDS} s: try again after it")
    try:
        yield
    finally:
        if connection.dialect.name not in ("postgresql", "sqlite") and not connection.invalidated:
            connection.exec_driver_sql(f"SELECT RELEASE_LOCK({MYSQL_LOCK})")
            limit_statements(connection, STATEMENT_TIMEOUT_SECONDS)
