"""The meaning of database errors: codes of three databases, messages of poolers, and the messages for users."""

import pymysql
import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    InternalError,
    NotSupportedError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
    StatementError,
    TimeoutError,
)

from worker.errors import DatabaseRefused, DeploymentError, SchemaOutdated, Unavailable
from worker.store.database_errors import (
    MYSQL,
    POSTGRES,
    SQLITE,
    ErrorMeaning,
    driver_meaning,
    error_kind,
    is_missing_table,
    to_worker_error,
)

URL = make_url("postgresql+psycopg://app:s3cret@db.example/shop?sslpassword=hidden")


class _Postgres(Exception):
    """An error like psycopg's."""

    def __init__(self, text: str, sqlstate: str | None = None) -> None:
        super().__init__(text)
        self.sqlstate = sqlstate


class _Sqlite(Exception):
    """An error like that of the sqlite3 module."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.sqlite_errorname = name


def _postgres(state: str, text: str = "") -> DBAPIError:
    return InternalError("", {}, _Postgres(text, state))


def _mysql(number: int, text: str = "") -> DBAPIError:
    return OperationalError("", {}, pymysql.err.OperationalError(number, text))


def _sqlite(name: str, text: str = "") -> DBAPIError:
    return OperationalError("", {}, _Sqlite(text, name))


def _text(text: str) -> DBAPIError:
    return OperationalError("", {}, _Postgres(text))


AWAY = [
    *map(
        _postgres, ("25006", "25P03", "25P04", "57P01", "57P02", "57P03", "57P04", "57P05", "53000", "53100", "53200")
    ),
    *map(
        _postgres, ("53300", "53400", "08000", "08003", "08006", "08P01", "0A000", "55000", "58000", "58030", "F0000")
    ),
    *map(_postgres, ("26000", "42P05", "40003")),
    *map(_mysql, (1290, 1836, 1792, 1040, 1203, 1226, 1053, 1077, 1927, 1114, 1021, 1030, 1047)),
    *map(_mysql, (2002, 2003, 2006, 2013, 2055, 2014)),
    *map(
        _sqlite, ("SQLITE_READONLY", "SQLITE_READONLY_DBMOVED", "SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_CANTOPEN")
    ),
    *map(_sqlite, ("SQLITE_BUSY", "SQLITE_BUSY_SNAPSHOT", "SQLITE_LOCKED")),  # the whole file is locked, not one row
    _text("the connection is closed"),
    _text("server closed the connection unexpectedly"),
    _text("consuming input failed: SSL SYSCALL error: EOF detected"),
    _text("the connection is lost"),
    _text("query_wait_timeout"),
    _text("no more connections allowed (max_client_conn)"),
    _text("connection to server failed: session is read-only"),
    InterfaceError("", {}, _Postgres("connection already closed")),
    DataError("", {}, _Postgres("broken off"), connection_invalidated=True),
    TimeoutError("QueuePool limit of size 4 overflow 4 reached"),
    Unavailable("another migration is under way"),
]
LOCKED = [
    *map(_postgres, ("40001", "40P01", "55P03", "57014", "25P02", "XX000")),
    *map(_mysql, (1205, 1213, 1317, 1969, 3024, 1020)),
    _sqlite("SQLITE_INTERRUPT"),
    _mysql(1815, "an error that no entry is about"),
    PendingRollbackError("Can't reconnect until invalid transaction is rolled back."),
]
DEPLOYMENT = [
    *map(_postgres, ("28000", "28P01", "3D000", "3F000", "42501", "42P01", "42703", "42883", "42601")),
    *map(_mysql, (1044, 1045, 1142, 1143, 1227, 1049, 1146, 1054, 1698, 2026)),
    *map(_sqlite, ("SQLITE_NOTADB", "SQLITE_CORRUPT", "SQLITE_CORRUPT_INDEX", "SQLITE_PERM", "SQLITE_AUTH")),
    _sqlite("SQLITE_ERROR", "no such table: fetch_jobs"),
    _text('FATAL:  password authentication failed for user "app"'),
    _text('FATAL:  database "shop" does not exist'),
    _text('FATAL:  role "app" does not exist'),
    _text("server login has been failing, cached error: password authentication failed (server_login_retry)"),
]
ROW = [
    *map(_postgres, ("22001", "22003", "22021", "22P05", "23502", "23505", "23514", "54000")),
    *map(_mysql, (1153, 1406, 1366, 1264, 1062, 1452, 4025, 3819)),
    *map(_sqlite, ("SQLITE_CONSTRAINT_CHECK", "SQLITE_TOOBIG", "SQLITE_MISMATCH")),
    IntegrityError("", {}, _Postgres("a driver's own")),
    NotSupportedError("", {}, _Postgres("a driver's own")),
    ProgrammingError("", {}, _Postgres("cannot adapt type 'set'")),
    _postgres("XX000", "invalid memory alloc request size 1073741824"),
    StatementError("a time without a zone", "", {}, ValueError("a time without a zone")),
    ValueError("a time without a zone"),
    KeyError(1205),
]


def _error_id(error: Exception) -> str:
    return f"{type(error).__name__}-{getattr(error, 'orig', error)!r}"[:60]


@pytest.mark.parametrize("error", AWAY, ids=_error_id)
def test_errors_of_a_server_that_is_away(error: Exception) -> None:
    assert error_kind(error) == "away"


@pytest.mark.parametrize("error", LOCKED, ids=_error_id)
def test_errors_because_of_another_transaction(error: Exception) -> None:
    assert error_kind(error) == "locked"


@pytest.mark.parametrize("error", DEPLOYMENT, ids=_error_id)
def test_errors_that_an_operator_must_fix(error: Exception) -> None:
    assert error_kind(error) == "deployment"


@pytest.mark.parametrize("error", ROW, ids=_error_id)
def test_errors_of_values_that_can_not_be_written(error: Exception) -> None:
    assert error_kind(error) == "row"


@pytest.mark.parametrize("error", [*AWAY, *LOCKED, *DEPLOYMENT, *ROW], ids=_error_id)
def test_messages_have_one_line_without_sql_and_passwords(error: Exception) -> None:
    translated = to_worker_error(error, URL)
    assert "\n" not in str(translated)
    assert "s3cret" not in str(translated)
    assert "hidden" not in str(translated)
    kinds = {"away": Unavailable, "locked": Unavailable, "row": DatabaseRefused}
    assert isinstance(translated, kinds.get(error_kind(error), (DeploymentError, SchemaOutdated)))


def test_a_password_in_a_servers_message_is_not_shown() -> None:
    assert "s3cret" not in str(to_worker_error(_text('could not connect with "s3cret"'), URL))


def test_connections_are_replaced_only_if_a_new_one_may_lead_to_a_working_server() -> None:
    entries: list[ErrorMeaning] = [*POSTGRES.values(), *MYSQL.values(), *SQLITE.values()]
    assert {entry.kind for entry in entries if entry.reconnect} == {"away"}
    read_only = [driver_meaning(error.orig) for error in (_postgres("25006"), _mysql(1290), _sqlite("SQLITE_READONLY"))]
    assert all(entry is not None and entry.reconnect for entry in read_only)


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("permission denied for schema public", 'GRANT USAGE, CREATE ON SCHEMA "public" TO "app"'),
        ("permission denied for table fetch_jobs", "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES"),
        ("permission denied for sequence fetch_jobs_id_seq", "GRANT USAGE ON ALL SEQUENCES"),
        ("must be owner of table fetch_jobs", "as the role that owns the tables"),
        ('permission denied for database "shop"', 'GRANT CONNECT ON DATABASE "shop" TO "app"'),
    ],
)
def test_the_message_about_a_missing_permission_has_the_grant_statement(message: str, advice: str) -> None:
    assert advice in str(to_worker_error(_postgres("42501", message), URL))


def test_is_missing_table_is_true_only_for_missing_tables_and_columns() -> None:
    assert is_missing_table(_postgres("42P01"))
    assert is_missing_table(_sqlite("SQLITE_ERROR", "no such column: due_at"))
    assert not is_missing_table(_postgres("3D000", 'database "shop" does not exist'))
