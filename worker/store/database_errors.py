"""What a database error means: one table of codes for all databases, and the messages that people see.

Each code has one of four kinds, which says what to do:

- `away`: the server can't do the work now. Keep the work and try again; the connection may have to be replaced.
- `locked`: this one statement failed because of another transaction. Try this statement again later.
- `deployment`: the server answers, but a right, a table or a setting is missing. Keep the work; people must act.
- `row`: the values of this statement can't be written. Trying again fails again.
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

MESSAGE_MOST = 200  # characters of the server's own message that are shown


@dataclass(frozen=True, slots=True)
class ErrorMeaning:
    """The meaning of an error code.

    `text` and `advice` are shown to people: "the database … {text}; {advice}". With `reconnect` this connection and all
    others of the pool that are older than the error are closed.
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
    "it is a standby, or was set to read-only; work goes on as soon as it can be written to",
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
    "stopped the transaction because of another one at the same time",
    "roll back and run the whole transaction again",
)
FAILED_BEFORE = ErrorMeaning(
    "locked", "takes nothing more in this transaction, since a statement failed", "roll back first"
)
DAMAGED = ErrorMeaning("locked", "has damaged data", "look at the server's log and restore a backup")
LOGIN = ErrorMeaning("deployment", "refused the login", "check the user and the password in DATABASE_URL")
NO_DATABASE = ErrorMeaning("deployment", "is not there", "create it, or correct the name in DATABASE_URL")
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
TOO_LARGE = ErrorMeaning("row", "takes no statement of this size", "raise max_allowed_packet on the server")

# PostgreSQL: SQLSTATE, or its first two characters for a whole class.
# https://www.postgresql.org/docs/current/errcodes-appendix.html
POSTGRES: Mapping[str, ErrorMeaning] = {
    "08": AWAY,  # connection exception; pgbouncer reports most of its own errors as 08P01
    "0A": AWAY,  # feature not supported: of a pooler, and BEGIN READ WRITE on a standby
    "21": BAD_VALUE,
    "22": BAD_VALUE,
    "23": BAD_VALUE,
    "25": BUSY,
    "25006": READ_ONLY,
    "25P02": FAILED_BEFORE,
    "25P03": AWAY,  # idle_in_transaction_session_timeout: the connection is closed
    "25P04": AWAY,  # transaction_timeout: the connection is closed
    "26": AWAY,  # a prepared statement that a pooler mixed up
    "28": LOGIN,
    "34": AWAY,  # a cursor that a pooler mixed up
    "38": BAD_VALUE,  # an app's own trigger on our tables
    "39": BAD_VALUE,
    "3D": NO_DATABASE,
    "3F": NO_SCHEMA,
    "40": CONFLICT,
    "40003": AWAY,  # it is not known whether the statement was completed
    "42": MISFIT,
    "42501": RIGHTS,
    "42703": NO_TABLES,  # undefined column
    "42P01": NO_TABLES,  # undefined table
    "42P05": AWAY,  # a prepared statement that a pooler mixed up
    "44": BAD_VALUE,
    "53": TROUBLED,
    "53100": NO_SPACE,
    "53300": FULL,
    "54": BAD_VALUE,
    "55": BUSY,
    "55000": AWAY,  # the database takes no connections
    "57": AWAY,  # an administrator's shutdown, a crash, a start, a dropped database, idle_session_timeout
    "57014": BUSY,  # cancelled: statement_timeout, or by an operator
    "58": TROUBLED,  # system error, such as an I/O error
    "F0": TROUBLED,  # configuration file error
    "HV": TROUBLED,  # foreign data wrapper
    "P0": BAD_VALUE,  # RAISE in an app's own trigger on our tables
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
    1118: BAD_VALUE,  # the row is larger than a page takes
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
    1206: BUSY,  # more locks than the lock table takes
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
    1644: BAD_VALUE,  # SIGNAL in an app's own trigger on our tables
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
    3819: BAD_VALUE,  # a CHECK of MySQL
    4025: BAD_VALUE,  # a CHECK of MariaDB
    4031: AWAY,  # closed after wait_timeout
}
MYSQL_CLIENT = range(2_000, 3_000)  # numbers of the driver itself: the connection was not made, or is lost

# SQLite: the name of the primary result code. https://www.sqlite.org/rescode.html
SQLITE: Mapping[str, ErrorMeaning] = {
    "SQLITE_AUTH": RIGHTS,
    "SQLITE_BUSY": LOCKED_FILE,  # the whole file is locked, not one row
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

# Errors that carry no code: libpq's while it connects, and those of poolers. A message that has all of the fragments.
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
    (("no such table",), NO_TABLES),  # SQLite has one code for all of these
    (("no such column",), NO_TABLES),
    (("has no column named",), NO_TABLES),
    (("invalid memory alloc request size",), BAD_VALUE),  # PostgreSQL: a value of more than 1 GB, as XX000
)
UNSURE = ("SQLITE_ERROR", "XX000")  # codes for anything at all: the message says more
CONFLICTS = ("40P01", "40001", 1213, 1020)  # the transaction was stopped, and may succeed at once when it is run again


def error_kind(error: Exception) -> Kind:
    """Return the kind of a failed statement."""
    return meaning(error).kind


def is_server_error(error: Exception) -> bool:
    """Return whether a failure is the server's, so that the same statement may succeed later, unchanged."""
    return error_kind(error) in ("away", "deployment")


def meaning(error: BaseException) -> ErrorMeaning:
    """Return the table's entry for an error that SQLAlchemy or our own code raised."""
    if isinstance(error, Unavailable):
        return AWAY
    if isinstance(error, TimeoutError):  # of SQLAlchemy's pool
        return FULL
    if isinstance(error, DisconnectionError):
        return AWAY
    if isinstance(error, PendingRollbackError):
        return FAILED_BEFORE
    if not isinstance(error, DBAPIError):
        return BAD_VALUE
    return driver_meaning(error.orig) or _likely(error)


def driver_meaning(cause: BaseException | None) -> ErrorMeaning | None:
    """Return the table's entry for a driver's own error, or None where there is none."""
    code = server_code(cause)
    entry = _entry(code)
    if entry is None or code in UNSURE:
        message = str(cause).lower()
        entry = next((match for parts, match in TEXTS if all(part in message for part in parts)), entry)
    return entry


def server_code(cause: BaseException | None) -> str | int | None:
    """Return a driver's code for an error: SQLSTATE, MariaDB's number or SQLite's name, or None."""
    if cause is not None and cause.args and isinstance(cause.args[0], int):
        return cause.args[0]  # PyMySQL: its SQLSTATE is HY000 for nearly everything
    return getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None)


def _entry(code: str | int | None) -> ErrorMeaning | None:
    if isinstance(code, int):
        return MYSQL.get(code, AWAY if code in MYSQL_CLIENT else None)
    if code is None:
        return None
    if code.startswith("SQLITE_"):  # extended codes are the primary one with a suffix: SQLITE_READONLY_DBMOVED
        return SQLITE.get("_".join(code.split("_")[:2]))
    own = BAD_VALUE if code[0] in "6789IJKLMNOQRSTUVWYZ" and code[:2] != "72" else None  # of an app's own trigger
    return POSTGRES.get(code, POSTGRES.get(code[:2], own))


def _likely(error: DBAPIError) -> ErrorMeaning:
    """Return what is most likely for an error that no entry is about, by its class."""
    if error.connection_invalidated:
        return AWAY
    if isinstance(error, (DataError, IntegrityError, NotSupportedError)):
        return BAD_VALUE
    has_code = server_code(error.orig) is not None
    if isinstance(error, ProgrammingError):
        return MISFIT if has_code else BAD_VALUE
    if has_code:  # the server works, and this statement failed
        return BUSY
    return AWAY if isinstance(error, (OperationalError, InterfaceError, InternalError)) else NOT_A_DATABASE


def is_conflict(error: Exception) -> bool:
    """Return whether the server stopped a transaction because of another one, so that it may be run again at once."""
    return server_code(getattr(error, "orig", None)) in CONFLICTS


def error_name(error: Exception) -> str:
    """Return an error's class and the server's code for it, such as SQLITE_FULL: its text may quote a row."""
    code = server_code(getattr(error, "orig", None))
    return type(error).__name__ + ("" if code is None else f" ({code})")


def describe_error(error: Exception, url: URL) -> str:
    """Return what a log says of an error: its code; where the server is the cause also what to do about it."""
    if isinstance(error, WorkerError):
        return str(error)
    return f"{error_name(error)}: {to_worker_error(error, url)}" if is_server_error(error) else error_name(error)


def is_missing_table(error: Exception) -> bool:
    """Return whether a driver's error says that a table or column of ours is not there."""
    return meaning(error) is NO_TABLES


# ── messages ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def translate_errors(url: URL) -> Iterator[None]:
    """Turn what SQLAlchemy and the drivers raise into errors of ours, each with one line that says what to do.

    Raises Unavailable, DeploymentError, SchemaOutdated or DatabaseRefused.
    """
    try:
        yield
    except (SQLAlchemyError, UnicodeError) as error:
        raise to_worker_error(error, url) from None


def to_worker_error(error: Exception, url: URL) -> WorkerError:
    """Return the error of ours that says the same, without SQL, values or passwords."""
    shown = shown_url(url)
    code = meaning(error)
    if code is NO_TABLES:
        return SchemaOutdated(f"the tables are missing in {shown}: run `fetch-worker migrate`")
    if code.kind == "row":
        return DatabaseRefused(f"the database {shown} {code.text} ({error_name(error)}); {code.advice}")
    message = server_message(error, url)
    advice = _grant(url, message) if code is RIGHTS else code.advice
    line = f"the database {shown} {code.text} ({message}); {advice}"
    return DeploymentError(line) if code.kind == "deployment" else Unavailable(line)


def shown_url(url: URL) -> str:
    """Return a database URL for people: without its password, and without options, which may hold one."""
    return url.set(query={}).render_as_string(hide_password=True)


def server_message(error: Exception, url: URL) -> str:
    """Return the first line of what the server or the driver said, cut, and without the URL's password."""
    cause = getattr(error, "orig", None)
    text = str(cause.args[1]) if cause is not None and len(cause.args) == 2 else str(cause or type(error).__name__)
    line = next(iter(text.strip().splitlines()), "") or error_name(error)
    if url.password:
        line = line.replace(str(url.password), "***")
    return line[:MESSAGE_MOST]


def _grant(url: URL, message: str) -> str:
    """Return the statement that gives the missing right."""
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
