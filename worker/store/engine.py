"""Engines, one per process and URL: connections, transactions, replaced connections, and the database's clock.

A server has defaults for the isolation level, the time zone, timeouts and the format of values. An app, an operator or
a hosting provider may have changed them. Therefore each connection and each transaction sets the options that this
package's statements need. Two options are left to the server on purpose:

- `search_path`, because some apps keep the tables in a schema of their own.
- The read-only default. Operators and providers use it to stop writes before a failover, or if a disk is full.
"""

import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import ExceptionContext
from sqlalchemy.exc import DataError, DBAPIError, DisconnectionError, InvalidatePoolError
from sqlalchemy.pool import QueuePool
from sqlalchemy.util.queue import Empty

from worker.errors import DeploymentError, SchemaOutdated, SettingsError
from worker.store.database_errors import FULL, TOO_LARGE, driver_meaning, is_conflict
from worker.store.database_errors import describe_error as describe_error
from worker.store.database_errors import error_kind as error_kind
from worker.store.database_errors import error_name as error_name
from worker.store.database_errors import is_missing_table as is_missing_table
from worker.store.database_errors import is_server_error as is_server_error
from worker.store.database_errors import shown_url as shown_url
from worker.store.database_errors import translate_errors as translate_errors
from worker.store.schema import MYSQL_FAMILY, VERSION_TABLE, metadata

SCHEMA_VERSION = "0014"
LOCK_TIMEOUT_SECONDS = 15
MYSQL_LOCK_SECONDS = 5
STATEMENT_TIMEOUT_SECONDS = 60
IDLE_IN_TRANSACTION_SECONDS = 60  # a process that hangs in a transaction keeps its locks no longer than this
IDLE_SECONDS = 2.0
UNUSED_SECONDS = 5.0  # after which an idle process closes a connection
POOL_KEEPS, POOL_ADDS = 4, 4  # no transaction waits for the API, so a few connections are enough for many threads
FULL_SECONDS = 10.0  # how long to retry if the server has no free connection
ENCODING = "UTF8"
MYSQL_BATCH_BYTES = 1_024_000  # PyMySQL joins the rows of one INSERT up to this size

# Execution options:
RELAXED = "fetch_worker_relaxed"  # the commit may be lost in a crash of the server
LOCK_WAIT = "fetch_worker_lock_wait"  # seconds to wait for a locked row
SNAPSHOT = "fetch_worker_snapshot"  # a read-only transaction on one snapshot, which blocks no writer
UNLIMITED = "fetch_worker_unlimited"  # statements have no timeout

DEADLOCK_PAUSES = (0.02, 0.1, 0.5)  # longest pauses in seconds before a transaction is retried after a deadlock

# libpq options that are used unless the URL sets them. A vanished server is noticed within half a minute.
POSTGRES_OPTIONS: Mapping[str, Any] = {
    "connect_timeout": 5,
    "application_name": "fetch-worker",
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,  # milliseconds
}
# Settings of each transaction. `DateStyle`: psycopg can only read times in ISO format. `extra_float_digits`: floats are
# returned exactly as they were stored. `synchronous_commit`: a commit is written to disk; a stronger setting of the
# server is kept. Each setting costs about 4 microseconds, so settings that no statement depends on are left out:
# psycopg reads both forms of `bytea_output`, no interval is read, and no SQL text has a backslash for
# `standard_conforming_strings`.
POSTGRES_SETTINGS: Mapping[str, str] = {
    "timezone": "'UTC'",
    "datestyle": "'ISO'",
    "extra_float_digits": "'3'",
    "idle_in_transaction_session_timeout": f"'{IDLE_IN_TRANSACTION_SECONDS}s'",
    "synchronous_commit": "replace(current_setting('synchronous_commit'), 'off', 'on')",
}
# Settings of each session. They are set before SQLAlchemy reads `sql_mode` to find out how names are quoted. The first
# comment is executed by MariaDB only, the second by MySQL only.
MYSQL_SETTINGS = (
    "SET SESSION time_zone = '+00:00', sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION',"
    " sql_safe_updates = 0, sql_auto_is_null = 0, sql_select_limit = 18446744073709551615, sql_big_selects = 1,"
    " completion_type = 0, foreign_key_checks = 1, unique_checks = 1, default_storage_engine = InnoDB,"
    f" innodb_lock_wait_timeout = {MYSQL_LOCK_SECONDS}, lock_wait_timeout = {LOCK_TIMEOUT_SECONDS}"
    f" /*M!100100 , max_statement_time = {STATEMENT_TIMEOUT_SECONDS}, check_constraint_checks = 1 */"
    f" /*!50708 , max_execution_time = {STATEMENT_TIMEOUT_SECONDS * 1000} */"
)
SQLITE_SETTINGS = (
    "journal_mode=WAL",
    "synchronous=NORMAL",
    "foreign_keys=ON",
    "ignore_check_constraints=OFF",
    "query_only=OFF",
)
# Queries that return whether a server is read-only: a standby, or set to read-only. Such a server answers SELECT 1 too.
READ_ONLY_QUERIES: Mapping[str, str] = {
    "postgresql": "SHOW transaction_read_only",
    "mysql": "SELECT @@GLOBAL.read_only",
    "mariadb": "SELECT @@GLOBAL.read_only",
    "sqlite": "SELECT 0",
}
WRITABLE = ("off", "0", "false", "none")

PACKET_TOO_LARGE = 1153  # MariaDB's number

T = TypeVar("T")

_USED = "fetch-worker: when the connection was last returned to the pool"
_LARGEST = "fetch-worker: the server's max_allowed_packet"
_CLOCK = "fetch-worker: the database's time, and the monotonic time when it was read"

_engines: dict[tuple[int, str], Engine] = {}
_engines_lock = threading.Lock()
_clock: Callable[[], datetime] | None = None


def _new_engines_lock() -> None:
    """Replace the lock in a forked child. A thread of the parent may have held it, and that thread is not copied."""
    global _engines_lock
    _engines_lock = threading.Lock()


os.register_at_fork(after_in_child=_new_engines_lock)


def engine_for(url: URL) -> Engine:
    """Return this process's engine for `url`. A forked child gets its own, because it must not share connections."""
    key = (os.getpid(), url.render_as_string(hide_password=False))
    with _engines_lock:
        if key not in _engines:
            _engines[key] = make_engine(url)
        return _engines[key]


def close_engines() -> None:
    """Close the idle connections of this process's engines, and forget the engines."""
    with _engines_lock:
        engines = [_engines.pop(key) for key in list(_engines) if key[0] == os.getpid()]
    for engine in engines:
        engine.dispose()


@contextmanager
def use_engine(url: URL, engine: Engine) -> Iterator[None]:
    """Make this process use the given engine for `url`, for example one with a database in memory."""
    key = (os.getpid(), url.render_as_string(hide_password=False))
    with _engines_lock:
        previous = _engines.get(key)
        _engines[key] = engine
    try:
        yield
    finally:
        with _engines_lock:
            if previous is None:
                _engines.pop(key, None)
            else:
                _engines[key] = previous


def make_engine(url: URL, *, any_encoding: bool = False, **arguments: Any) -> Engine:
    """Return a new engine. `arguments` are passed to SQLAlchemy. Raises SettingsError if the driver is not installed.

    Connections to a database whose encoding is not UTF-8 raise DeploymentError, unless `any_encoding` is true.
    """
    backend = url.get_backend_name()
    arguments |= {"connect_args": _connect_options(url)}
    if backend == "sqlite" and url.database and not url.database.startswith((":memory:", "file:")):
        _make_private_file(Path(url.database))
    try:
        # The connection that was used last is used first, so that the others stay unused and can be closed.
        pool: dict[str, Any] = {
            "pool_size": POOL_KEEPS,
            "max_overflow": POOL_ADDS,
            "poolclass": FrugalPool,
            "pool_use_lifo": True,
        }
        engine = create_engine(url, hide_parameters=True, **(pool | arguments))
    except ImportError as missing:
        extra = {"postgresql": "postgres"}.get(backend, "mysql")
        raise SettingsError(f"DATABASE_URL needs {missing.name}: pip install 'fetch-worker[{extra}]'") from None
    event.listen(engine, "do_connect", _connect_with_retry)
    event.listen(engine, "checkout", _Ping(READ_ONLY_QUERIES[backend]))
    event.listen(engine, "checkin", _record_return)
    event.listen(engine, "handle_error", _replace_connections)
    if backend == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    elif backend == "postgresql":
        if not any_encoding:
            event.listen(engine, "connect", _check_encoding)
        event.listen(engine, "begin", _begin_postgres)
    else:
        event.listen(engine, "connect", _prepare_mysql)
        event.listen(engine, "begin", _begin_mysql)
    return engine


class FrugalPool(QueuePool):
    """A pool that can close the connections it has not needed lately. A server has few, and other processes wait."""

    def close_unused(self, seconds: float) -> int:
        """Close the idle connections that were not used for some seconds. Return how many."""
        records = []
        with suppress(Empty):
            while True:
                records.append(self._pool.get(block=False))
        before, closed = time.monotonic() - seconds, 0
        for record in reversed(records):  # the one that was used last is returned last
            if record.info.get(_USED, before) < before:
                record.close()
                self._dec_overflow()
                closed += 1
            else:
                self._do_return_conn(record)
        return closed


def close_unused_connections(engine: Engine) -> int:
    """Close the connections of the pool that were not used for `UNUSED_SECONDS`. Return how many."""
    return engine.pool.close_unused(UNUSED_SECONDS) if isinstance(engine.pool, FrugalPool) else 0


def _connect_options(url: URL) -> dict[str, Any]:
    match url.get_backend_name():
        case "sqlite":
            return {"timeout": LOCK_TIMEOUT_SECONDS}
        case "postgresql":
            # No server-side prepared statements, because a pooler in transaction mode would send them to other
            # connections. `_begin_postgres` begins the transactions.
            options = {"prepare_threshold": None, "autocommit": True, "client_encoding": "utf8"}
            return options | {name: value for name, value in POSTGRES_OPTIONS.items() if name not in url.query}
        case _:
            return {"charset": "utf8mb4", "init_command": MYSQL_SETTINGS, "autocommit": False}


def _make_private_file(path: Path) -> None:
    """Create an SQLite file that other users can't read; SQLite would create a readable file. Keep an existing file."""
    with suppress(OSError):  # SQLite reports the error when it connects
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o660))


def _connect_with_retry(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
    """Connect. If the server has no free connection, try again for a while."""
    until = time.monotonic() + FULL_SECONDS
    while True:
        try:
            return dialect.connect(*arguments, **options)
        except dialect.loaded_dbapi.OperationalError as error:
            if time.monotonic() >= until or driver_meaning(error) is not FULL:
                raise
            time.sleep(random.uniform(0.05, 0.3))


def _record_return(connection: Any, record: Any) -> None:
    record.info[_USED] = time.monotonic()


class _Ping:
    """Check a connection before it is used after an idle time: it still works, and the server accepts writes.

    A server that became a standby still answers. A new connection may lead to the primary.
    """

    def __init__(self, query: str) -> None:
        self._query = query

    def __call__(self, connection: Any, record: Any, fairy: Any) -> None:
        if time.monotonic() - record.info.get(_USED, time.monotonic()) < IDLE_SECONDS:
            return
        try:
            cursor = connection.cursor()
            cursor.execute(self._query)
            read_only = str(cursor.fetchone()[0]).lower() not in WRITABLE
            cursor.close()
            connection.rollback()
        except Exception as error:  # any error of the driver: the pool opens another connection
            raise DisconnectionError(str(error)) from None
        if read_only:
            raise InvalidatePoolError("the server accepts no writes")


def _replace_connections(context: ExceptionContext) -> None:
    """Close the pool's connections after errors which mean that their server can't be used.

    SQLAlchemy does this for closed connections, but not for a server that became read-only.
    """
    meant = driver_meaning(context.original_exception)
    if meant is None or context.connection is None:
        return
    limit = context.connection.info.get(_LARGEST)
    if meant is TOO_LARGE:  # the server closes this connection afterwards, but not the others
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False
    elif limit is not None and context.is_disconnect and (size := _statement_bytes(context)) > limit:
        # Some versions only close the connection. Without this error, the statement would be tried again forever.
        context.invalidate_pool_on_disconnect = False
        message = f"a statement of {size} bytes is larger than max_allowed_packet ({limit})"
        cause = context.dialect.loaded_dbapi.DataError(PACKET_TOO_LARGE, message)
        raise DataError(None, None, cause, hide_parameters=True, connection_invalidated=True)
    elif meant.reconnect:
        context.is_disconnect = True


def _statement_bytes(context: ExceptionContext) -> int:
    """Return the size in bytes of the largest statement that PyMySQL sent for an execution."""
    if context.statement is None or context.execution_context is None:
        return 0
    mogrify: Any = context.execution_context.cursor.mogrify  # PyMySQL's
    rows = context.parameters if isinstance(context.parameters, list) else [context.parameters]
    sizes = [len(mogrify(context.statement, row).encode(errors="surrogateescape")) for row in rows]
    return max(*sizes, min(sum(sizes), MYSQL_BATCH_BYTES)) if len(sizes) > 1 else sum(sizes)


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # `_begin_sqlite` begins the transactions
    connection.create_function("ln", 1, _logarithm, deterministic=True)  # some builds have no ln()
    for pragma in (*SQLITE_SETTINGS, f"busy_timeout={LOCK_TIMEOUT_SECONDS * 1000}"):
        connection.execute(f"PRAGMA {pragma}")


def _logarithm(value: float | None) -> float | None:
    return None if value is None or value <= 0 else math.log(value)


def _check_encoding(connection: Any, record: Any) -> None:
    encoding = connection.info.parameter_status("server_encoding")  # sent by the server on connect: no round trip
    if encoding not in (ENCODING, None):
        connection.close()
        raise DeploymentError(encoding_message(encoding))


def unsupported_encoding(engine: Engine) -> str | None:
    """Return the database's encoding if it is not UTF-8, else None. Raises the driver's errors."""
    if engine.dialect.name != "postgresql":
        return None
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        encoding: str | None = driver.info.parameter_status("server_encoding")
    return None if encoding == ENCODING else encoding


def encoding_message(encoding: str) -> str:
    """Return the error message for a database whose encoding is not UTF-8, which can't store all texts."""
    return (
        f"the database's encoding is {encoding}, but it must be {ENCODING}: dump it, CREATE DATABASE … ENCODING"
        f" '{ENCODING}' TEMPLATE template0, restore the dump there and correct DATABASE_URL"
    )


def _prepare_mysql(connection: Any, record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")  # no locks on gaps between rows
        cursor.execute("SELECT @@max_allowed_packet")
        record.info[_LARGEST] = int(cursor.fetchone()[0])
    connection.rollback()


def limit_statements(connection: Connection, seconds: int) -> None:
    """Set the statement timeout of a MariaDB or MySQL session; 0 means no timeout. PostgreSQL uses `UNLIMITED`."""
    if connection.dialect.name in MYSQL_FAMILY:
        mariadb, mysql = f"max_statement_time = {seconds}", f"max_execution_time = {seconds * 1000}"
        connection.exec_driver_sql(f"SET SESSION sql_auto_is_null = 0 /*M!100100 , {mariadb} */ /*!50708 , {mysql} */")


def _begin_mysql(connection: Connection) -> None:
    if connection.get_execution_options().get(SNAPSHOT, False):
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")  # the next one only


def _begin_sqlite(connection: Connection) -> None:
    # With a plain BEGIN, a transaction that reads first and writes later fails if another one wrote in between.
    snapshot = connection.get_execution_options().get(SNAPSHOT, False)
    connection.exec_driver_sql("BEGIN" if snapshot else "BEGIN IMMEDIATE")


def _begin_postgres(connection: Connection) -> None:
    """Begin a transaction, set its options and read the clock, in one round trip. The options end with it."""
    dialect = connection.dialect
    options = connection.get_execution_options()
    statement = _begin_statement(
        options.get(SNAPSHOT, False),
        options.get(RELAXED, False),
        options.get(LOCK_WAIT, LOCK_TIMEOUT_SECONDS),
        0 if options.get(UNLIMITED, False) else STATEMENT_TIMEOUT_SECONDS,
        (dialect.server_version_info or (0,)) >= (17,),
    )
    try:
        cursor: Any = connection.connection.cursor()
        with cursor:
            cursor.execute(statement)
            cursor.nextset()
            connection.info[_CLOCK] = (cursor.fetchone()[0].astimezone(UTC), time.monotonic())
    except dialect.loaded_dbapi.Error as error:
        # A private function of SQLAlchemy: it translates the driver's error and closes a broken connection. There is
        # no public function for statements with two results.
        connection._handle_dbapi_exception(error, statement, None, None, None)


@cache
def _begin_statement(
    snapshot: bool, relaxed: bool, lock_seconds: float, statement_seconds: int, has_transaction_timeout: bool
) -> str:
    isolation = "REPEATABLE READ READ ONLY" if snapshot else "READ COMMITTED"
    values = dict(POSTGRES_SETTINGS) | {
        "lock_timeout": f"'{lock_seconds * 1000:.0f}ms'",
        "statement_timeout": f"'{statement_seconds}s'",
    }
    if relaxed:
        values |= {"synchronous_commit": "'off'"}
    if has_transaction_timeout:
        values |= {"transaction_timeout": "'0'"}  # statements and idle times in a transaction have their own limits
    settings = ", ".join(f"set_config('{name}', {value}, true)" for name, value in values.items())
    return f"BEGIN ISOLATION LEVEL {isolation} NOT DEFERRABLE; SELECT clock_timestamp(), {settings}"


def database_now(connection: Connection) -> datetime:
    """Return the database's time, aware and in UTC. Only this clock decides what is due and which lease has expired."""
    if _clock is not None:
        return _clock()
    backend = connection.dialect.name
    if backend == "postgresql":
        if connection.in_transaction() and _CLOCK in connection.info:
            clock_reading: tuple[datetime, float] = connection.info[_CLOCK]
            return clock_reading[0] + timedelta(seconds=time.monotonic() - clock_reading[1])
        # In an app's own transaction: psycopg may not be able to read times in its DateStyle.
        seconds = connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())::double precision")
        return datetime.fromtimestamp(seconds.scalar_one(), UTC)
    if backend == "sqlite":
        return datetime.now(UTC)  # SQLite uses the machine's clock
    moment: datetime = connection.exec_driver_sql("SELECT UTC_TIMESTAMP(6)").scalar_one()
    return moment.replace(tzinfo=UTC)


@contextmanager
def use_clock(clock: Callable[[], datetime]) -> Iterator[None]:
    """Replace the database's clock in this process, so that a test can move the time without waiting."""
    global _clock
    previous, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = previous


def is_writable(connection: Connection) -> bool:
    """Return whether the server accepts writes in this transaction. A standby or a read-only server does not."""
    query = READ_ONLY_QUERIES[connection.dialect.name]
    return str(connection.exec_driver_sql(query).scalar_one()).lower() in WRITABLE


def transact(engine: Engine, work: Callable[[Connection], T]) -> T:
    """Run `work` in a transaction. After a deadlock or another conflict, run it again, up to three times."""
    for pause in DEADLOCK_PAUSES:
        try:
            with engine.begin() as connection:
                return work(connection)
        except DBAPIError as error:
            if not is_conflict(error):
                raise
            time.sleep(random.uniform(0, pause))
    with engine.begin() as connection:
        return work(connection)


def schema_version(connection: Connection) -> str | None:
    """Return the version of the tables, or None if there are no tables."""
    if not connection.dialect.has_table(connection, VERSION_TABLE):
        return None
    version: str | None = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608  # a constant
    return version


def missing_tables(connection: Connection) -> list[str]:
    """Return our tables that are not in the database, sorted. Somebody may have dropped them."""
    return sorted(metadata.tables.keys() - set(inspect(connection).get_table_names()))


def check_schema(engine: Engine) -> None:
    """Check the version of the tables. Raises SchemaOutdated if it is too old, Unavailable without a database."""
    with translate_errors(engine.url), engine.connect() as connection:
        version = schema_version(connection)
    if version is None:
        raise SchemaOutdated("the database has no tables of fetch-worker yet: run `fetch-worker migrate`")
    if version < SCHEMA_VERSION:
        raise SchemaOutdated(
            f"the database schema is {version}, this version needs {SCHEMA_VERSION}: run `fetch-worker migrate`"
        )
