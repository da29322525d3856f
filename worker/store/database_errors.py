"""The meaning of database errors: one table of error codes per database, and the messages for users.

Each error code has one of four kinds:

- `away`: the server can't do the work now. Keep the work and try again. The connection may have to be replaced.
- `locked`: this statement failed because of another transaction. Try the statement again later.
- `deployment`: the server answers, but a permission, a table or a setting is missing. Keep the work; an operator must
  act.
- `row`: the values of this statement can't be written. Another attempt would fail in the same way.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from sqlalchemy.engine import URL
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    InterfaceError,
    InternalError,
    NotSupportedError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
    SQLAlchemyError,
    TimeoutError,
)

from worker.errors import DatabaseRefused, DeploymentError, SchemaOutdated, Unavailable, WorkerError

Kind = Literal["away", "locked", "deployment", "row"]

MESSAGE_MOST = 200  # characters of the server's message that are shown


@dataclass(frozen=True, slots=True)
class ErrorMeaning:
    """The meaning of an error code.

    The message for users is "the database … {text}; {advice}". With `reconnect`, the pool closes this connection and
    all other connections that are older than the error.
    """

    kind: Kind
    text: str
    advice: str
    reconnect: bool = False


AWAY = ErrorMeaning("away", "does not answer", "check DATABASE_URL and the server", reconnect=True)
TROUBLED = ErrorMeaning("away", "is in trouble", "look at the server's log")
READ_ONLY = ErrorMeaning(
    "away",
    "is read-only",
    "it is a standby, or was set to read-only; work continues when it accepts writes",
    reconnect=True,
)
FULL = ErrorMeaning("away", "has no free connection", "raise its limit of connections, or start fewer processes")
NO_SPACE = ErrorMeaning("away", "has no space left", "make room on the server's disk")
LOCKED_FILE = ErrorMeaning(
    "away", "is locked by another program", "end that program's transaction, or try again"
)  # SQLite
BUSY = ErrorMeaning("locked", "is busy", "try again")
CONFLICT = ErrorMeaning(
    "locked",
    "stopped the transaction because of a concurrent transaction",
    "roll back and run the whole transaction again",
)
FAILED_BEFORE = ErrorMeaning(
    "locked", "accepts no more statements in this transaction, because one failed", "roll back first"
)
DAMAGED = ErrorMeaning("locked", "has damaged data", "look at the server's log and restore a backup")
LOGIN = ErrorMeaning("deployment", "refused the login", "check the user and the password in DATABASE_URL")
NO_DATABASE = ErrorMeaning("deployment", "does not exist", "create it, or correct the name in DATABASE_URL")
RIGHTS = ErrorMeaning("deployment", "refused access", "")  # the advice is a GRANT: see `_grant`
NO_SCHEMA = ErrorMeaning(
    "deployment",
    "has no schema for the tables",
    "create the schema, or set another one: ALTER ROLE … SET search_path = …",
)
NO_TABLES = ErrorMeaning("deployment", "lacks tables", "run `fetch-worker migrate`")
TLS = ErrorMeaning("deployment", "and this process can't agree on TLS", "check the TLS options in DATABASE_URL")
POOLER = ErrorMeaning("deployment", "is behind a pooler that refused the connection", "correct the pooler's settings")
NOT_A_DATABASE = ErrorMeaning(
    "deployment", "is not an SQLite database, or is damaged", "check DATABASE_URL, or restore a copy"
)
MISFIT = ErrorMeaning(
    "deployment",
    "refused a statement of fetch-worker",
    "check that the server's version is supported and run `fetch-worker doctor`",
)
BAD_VALUE = ErrorMeaning("row", "refused a value", "nothing was written; correct the value")
TOO_LARGE = ErrorMeaning("row", "accepts no statement of this size", "raise max_allowed_packet on the server")

# PostgreSQL: an SQLSTATE, or its first two characters for a class of codes.
# https://www.postgresql.org/docs/current/errcodes-appendix.html
POSTGRES: Mapping[str, ErrorMeaning] = {
    "08": AWAY,  # connection exception; pgbouncer reports most of its own errors as 08P01
    "0A": AWAY,  # feature not supported: by a pooler, or BEGIN READ WRITE on a standby
    "21": BAD_VALUE,
    "22": BAD_VALUE,
    "23": BAD_VALUE,
    "25": BUSY,
    "25006": READ_ONLY,
    "25P02": FAILED_BEFORE,
    "25P03": AWAY,  # idle_in_transaction_session_timeout: the connection is closed
    "25P04": AWAY,  # transaction_timeout: the connection is closed
    "26": AWAY,  # a prepared statement that a pooler sent to another connection
    "28": LOGIN,
    "34": AWAY,  # a cursor that a pooler sent to another connection
    "38": BAD_VALUE,  # from an app's trigger on these tables
    "39": BAD_VALUE,
    "3D": NO_DATABASE,
    "3F": NO_SCHEMA,
    "40": CONFLICT,
    "40003": AWAY,  # unknown whether the statement was completed
    "42": MISFIT,
    "42501": RIGHTS,
    "42703": NO_TABLES,  # undefined column
    "42P01": NO_TABLES,  # undefined table
    "42P05": AWAY,  # a prepared statement that a pooler sent to another connection
    "44": BAD_VALUE,
    "53": TROUBLED,
    "53100": NO_SPACE,
    "53300": FULL,
    "54": BAD_VALUE,
    "55": BUSY,
    "55000": AWAY,  # the database accepts no connections
    "57": AWAY,  # an administrator's shutdown, a crash, a start, a dropped database, idle_session_timeout
    "57014": BUSY,  # cancelled by statement_timeout or by an operator
    "58": TROUBLED,  # system error, such as an I/O error
    "F0": TROUBLED,  # configuration file error
    "HV": TROUBLED,  # foreign data wrapper
    "P0": BAD_VALUE,  # RAISE in an app's trigger on these tables
    "XX": BUSY,  # internal error
    "XX001": DAMAGED,
    "XX002": DAMAGED,
}

# MariaDB and MySQL: the error number. https://mariadb.com/kb/en/mariadb-error-code-reference/
MYSQL: Mapping[int, ErrorMeaning] = {
    1020: CONFLICT,  # record has changed since last read (innodb_snapshot_isolation)
    1021: NO_SPACE,
    1030: TROUBLED,  # error from the storage engine
    1037: TROUBLED,  # out of memory
    1038: TROUBLED,  # out of sort memory
    1040: FULL,
    1041: TROUBLED,  # out of memory
    1044: RIGHTS,
    1045: LOGIN,
    1046: NO_DATABASE,
    1047: AWAY,  # Galera: this node is not ready
    1048: BAD_VALUE,
    1049: NO_DATABASE,
    1053: AWAY,  # shutdown in progress
    1054: NO_TABLES,  # unknown column
    1062: BAD_VALUE,
    1077: AWAY,  # shutdown
    1079: AWAY,  # shutdown
    1114: NO_SPACE,  # the table is full
    1118: BAD_VALUE,  # the row does not fit on a page
    1129: LOGIN,  # the host is blocked
    1130: LOGIN,  # the host is not allowed
    1142: RIGHTS,
    1143: RIGHTS,
    1146: NO_TABLES,
    1152: AWAY,
    1153: TOO_LARGE,
    1158: AWAY,  # 1158 to 1161: network errors
    1159: AWAY,
    1160: AWAY,
    1161: AWAY,
    1180: TROUBLED,  # error during COMMIT
    1184: AWAY,
    1203: FULL,
    1205: BUSY,  # lock wait timeout
    1206: BUSY,  # the lock table is full
    1213: CONFLICT,  # deadlock
    1226: FULL,  # a limit of this user
    1227: RIGHTS,
    1251: LOGIN,
    1264: BAD_VALUE,
    1265: BAD_VALUE,
    1267: BAD_VALUE,
    1290: READ_ONLY,
    1292: BAD_VALUE,
    1300: BAD_VALUE,
    1317: BUSY,  # interrupted by an operator
    1364: BAD_VALUE,
    1366: BAD_VALUE,
    1370: RIGHTS,
    1406: BAD_VALUE,
    1451: BAD_VALUE,
    1452: BAD_VALUE,
    1524: LOGIN,  # an authentication plugin is missing
    1644: BAD_VALUE,  # SIGNAL in an app's trigger on these tables
    1690: BAD_VALUE,
    1698: LOGIN,
    1792: READ_ONLY,
    1836: READ_ONLY,
    1927: AWAY,  # killed
    1932: DAMAGED,  # the table is missing in the engine
    1969: BUSY,  # max_statement_time
    2026: TLS,
    2020: TOO_LARGE,
    2049: LOGIN,
    2059: LOGIN,
    3024: BUSY,  # max_execution_time
    3819: BAD_VALUE,  # CHECK constraint on MySQL
    4025: BAD_VALUE,  # CHECK constraint on MariaDB
    4031: AWAY,  # closed after wait_timeout
}
MYSQL_CLIENT = range(2_000, 3_000)  # numbers of the driver: the connection failed or was lost

# SQLite: the name of the primary result code. https://www.sqlite.org/rescode.html
SQLITE: Mapping[str, ErrorMeaning] = {
    "SQLITE_AUTH": RIGHTS,
    "SQLITE_BUSY": LOCKED_FILE,  # the whole file is locked
    "SQLITE_CANTOPEN": ErrorMeaning(
        "away", "can't be opened", "check the path in DATABASE_URL and the rights of its directory"
    ),
    "SQLITE_CONSTRAINT": BAD_VALUE,
    "SQLITE_CORRUPT": NOT_A_DATABASE,
    "SQLITE_ERROR": MISFIT,
    "SQLITE_FULL": NO_SPACE,
    "SQLITE_INTERRUPT": BUSY,
    "SQLITE_IOERR": TROUBLED,
    "SQLITE_LOCKED": LOCKED_FILE,
    "SQLITE_MISMATCH": BAD_VALUE,
    "SQLITE_NOMEM": TROUBLED,
    "SQLITE_NOTADB": NOT_A_DATABASE,
    "SQLITE_PERM": RIGHTS,
    "SQLITE_PROTOCOL": LOCKED_FILE,
    "SQLITE_RANGE": BAD_VALUE,
    "SQLITE_READONLY": READ_ONLY,
    "SQLITE_SCHEMA": BUSY,
    "SQLITE_TOOBIG": BAD_VALUE,
}

# Errors without a code: from libpq while it connects, and from poolers. A message must contain all of the fragments.
TEXTS: tuple[tuple[tuple[str, ...], ErrorMeaning], ...] = (
    (("too many clients",), FULL),
    (("too many connections",), FULL),
    (("remaining connection slots",), FULL),
    (("no more connections allowed",), FULL),  # pgbouncer
    (("max clients",), FULL),  # Supavisor
    (("session is read-only",), READ_ONLY),  # target_session_attrs=read-write
    (("hot standby mode",), READ_ONLY),
    (("authentication failed",), LOGIN),
    (("no password supplied",), LOGIN),
    (("no pg_hba.conf entry",), LOGIN),
    (("not permitted to log in",), LOGIN),
    (("role ", " does not exist"), LOGIN),
    (("no such user",), LOGIN),  # pgbouncer
    (("tenant or user not found",), LOGIN),  # Supavisor
    (("database ", " does not exist"), NO_DATABASE),
    (("no such database",), NO_DATABASE),  # pgbouncer
    (("permission denied for database",), RIGHTS),
    (("does not support ssl",), TLS),
    (("certificate",), TLS),
    (("unsupported startup parameter",), POOLER),  # pgbouncer
    (("no such table",), NO_TABLES),  # SQLite uses SQLITE_ERROR for this and the next two
    (("no such column",), NO_TABLES),
    (("has no column named",), NO_TABLES),
    (("invalid memory alloc request size",), BAD_VALUE),  # PostgreSQL: a value of more than 1 GB, as XX000
)
UNSURE = ("SQLITE_ERROR", "XX000")  # generic codes: the message has the cause
CONFLICTS = ("40P01", "40001", 1213, 1020)  # the transaction was stopped; a second run may succeed at once


def error_kind(error: Exception) -> Kind:
    """Return the kind of a failed statement."""
    return meaning(error).kind


def is_server_error(error: Exception) -> bool:
    """Return whether the server caused the failure, so that the same statement may succeed later."""
    return error_kind(error) in ("away", "deployment")


def meaning(error: BaseException) -> ErrorMeaning:
    """Return the table's entry for an error that SQLAlchemy or this project raised."""
    if isinstance(error, Unavailable):
        return AWAY
    if isinstance(error, TimeoutError):  # from SQLAlchemy's pool
        return FULL
    if isinstance(error, DisconnectionError):
        return AWAY
    if isinstance(error, PendingRollbackError):
        return FAILED_BEFORE
    if not isinstance(error, DBAPIError):
        return BAD_VALUE
    return driver_meaning(error.orig) or _likely(error)


def driver_meaning(cause: BaseException | None) -> ErrorMeaning | None:
    """Return the table's entry for a driver's error, or None."""
    code = server_code(cause)
    entry = _entry(code)
    if entry is None or code in UNSURE:
        message = str(cause).lower()
        entry = next((match for parts, match in TEXTS if all(part in message for part in parts)), entry)
    return entry


def server_code(cause: BaseException | None) -> str | int | None:
    """Return a driver's code for an error: an SQLSTATE, MariaDB's number, SQLite's name, or None."""
    if cause is not None and cause.args and isinstance(cause.args[0], int):
        return cause.args[0]  # PyMySQL, whose SQLSTATE is nearly always HY000
    return getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None)


def _entry(code: str | int | None) -> ErrorMeaning | None:
    if isinstance(code, int):
        return MYSQL.get(code, AWAY if code in MYSQL_CLIENT else None)
    if code is None:
        return None
    if code.startswith("SQLITE_"):  # an extended code is a primary code with a suffix: SQLITE_READONLY_DBMOVED
        return SQLITE.get("_".join(code.split("_")[:2]))
    custom = BAD_VALUE if code[0] in "6789IJKLMNOQRSTUVWYZ" and code[:2] != "72" else None  # from an app's trigger
    return POSTGRES.get(code, POSTGRES.get(code[:2], custom))


def _likely(error: DBAPIError) -> ErrorMeaning:
    """Return the most likely meaning of an error without an entry, by its class."""
    if error.connection_invalidated:
        return AWAY
    if isinstance(error, (DataError, IntegrityError, NotSupportedError)):
        return BAD_VALUE
    has_code = server_code(error.orig) is not None
    if isinstance(error, ProgrammingError):
        return MISFIT if has_code else BAD_VALUE
    if has_code:  # the server works, but this statement failed
        return BUSY
    return AWAY if isinstance(error, (OperationalError, InterfaceError, InternalError)) else NOT_A_DATABASE


def is_conflict(error: Exception) -> bool:
    """Return whether the server stopped a transaction because of a concurrent one. It may be run again at once."""
    return server_code(getattr(error, "orig", None)) in CONFLICTS


def error_name(error: Exception) -> str:
    """Return an error's class and the server's code, such as SQLITE_FULL. The error's text may contain a row."""
    code = server_code(getattr(error, "orig", None))
    return type(error).__name__ + ("" if code is None else f" ({code})")


def describe_error(error: Exception, url: URL) -> str:
    """Return an error's description for a log: its code, and for server errors also the advice."""
    if isinstance(error, WorkerError):
        return str(error)
    return f"{error_name(error)}: {to_worker_error(error, url)}" if is_server_error(error) else error_name(error)


def is_missing_table(error: Exception) -> bool:
    """Return whether an error says that a table or column is missing."""
    return meaning(error) is NO_TABLES


# ── messages ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def translate_errors(url: URL) -> Iterator[None]:
    """Translate the errors of SQLAlchemy and the drivers into WorkerErrors with a one-line message and advice.

    Raises Unavailable, DeploymentError, SchemaOutdated or DatabaseRefused.
    """
    try:
        yield
    except (SQLAlchemyError, UnicodeError) as error:
        raise to_worker_error(error, url) from None


def to_worker_error(error: Exception, url: URL) -> WorkerError:
    """Return the matching WorkerError. Its message has no SQL, values or passwords."""
    shown = shown_url(url)
    meant = meaning(error)
    if meant is NO_TABLES:
        return SchemaOutdated(f"the tables are missing in {shown}: run `fetch-worker migrate`")
    if meant.kind == "row":
        return DatabaseRefused(f"the database {shown} {meant.text} ({error_name(error)}); {meant.advice}")
    message = server_message(error, url)
    advice = _grant(url, message) if meant is RIGHTS else meant.advice
    line = f"the database {shown} {meant.text} ({message}); {advice}"
    return DeploymentError(line) if meant.kind == "deployment" else Unavailable(line)


def shown_url(url: URL) -> str:
    """Return a database URL without its password, and without options, which may contain a password."""
    return url.set(query={}).render_as_string(hide_password=True)


def server_message(error: Exception, url: URL) -> str:
    """Return the first line of the server's or the driver's message, shortened, without the URL's password."""
    cause = getattr(error, "orig", None)
    text = str(cause.args[1]) if cause is not None and len(cause.args) == 2 else str(cause or type(error).__name__)
    line = next(iter(text.strip().splitlines()), "") or error_name(error)
    if url.password:
        line = line.replace(str(url.password), "***")
    return line[:MESSAGE_MOST]


def _grant(url: URL, message: str) -> str:
    """Return the advice with the GRANT statement for the missing permission."""
    if url.get_backend_name() == "sqlite":
        return "check the rights of the file and of its directory"
    role = url.username or "the user"
    if url.get_backend_name() != "postgresql":
        rights = "SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, INDEX, DROP, REFERENCES"
        return f"as an administrator: GRANT {rights} ON `{url.database}`.* TO '{role}'@'…'"
    if "must be owner" in message:
        return "run `fetch-worker migrate` as the role that owns the tables"
    if "for database" in message:
        return f'as its owner: GRANT CONNECT ON DATABASE "{url.database}" TO "{role}"'
    if "for schema" in message:
        schema = message.rpartition("schema ")[2].strip('"')
        return f'as its owner: GRANT USAGE, CREATE ON SCHEMA "{schema}" TO "{role}"'
    return (
        f'as their owner: GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO "{role}";'
        f' GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO "{role}"'
    )
