"""One engine per process: how the database is connected to, and what time it says it is."""

import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError, DBAPIError, DisconnectionError, InterfaceError, OperationalError

from worker.errors import SchemaOutdated, SettingsError, Unavailable
from worker.tables import VERSION_TABLE

SCHEMA_VERSION = "0008"
LOCK_TIMEOUT_SECONDS = 15
MYSQL_LOCK_SECONDS = 5
STATEMENT_TIMEOUT_SECONDS = 60
IDLE_SECONDS = 2.0
POOL_KEEPS, POOL_ADDS = 4, 4  # no transaction waits for the network, so a few connections serve many threads
FULL_SECONDS = 10.0  # how long a server without a free connection is asked again
FULL = ("too many clients", "too many connections", "remaining connection slots")
MISSING_STATES = ("42P01", "42703")  # PostgreSQL's codes for an undefined table and an undefined column

# Execution options: no harm is done if a crash of the server undoes the commit; seconds to wait for a locked row; only
# reading is done, all of it as of one moment, and nobody waits for it.
RELAXED = "fetch_worker_relaxed"
PATIENCE = "fetch_worker_patience"
SNAPSHOT = "fetch_worker_snapshot"

# PostgreSQL: lock not available, deadlock, cancelled, serialization.
LOCKED_STATES = ("55P03", "40P01", "57014", "40001")
LOCKED_NUMBERS = (1205, 1213)  # MariaDB: lock wait time-out, deadlock
DEADLOCKS = ("40P01", "40001", 1213)
DEADLOCK_PAUSES = (0.02, 0.1, 0.5)  # seconds at most, before a transaction that had to yield is tried again
ROW_NUMBERS = (1153, 4025)  # MariaDB calls them operational: a packet too large, a CHECK that does not hold

T = TypeVar("T")

_USED = "fetch-worker: when the connection was last given back"
_CLOCK = "fetch-worker: the database's time, and the monotonic time at which it was read"

_engines: dict[tuple[int, str], Engine] = {}
_engines_lock = threading.Lock()
_clock: Callable[[], datetime] | None = None


def _new_engines_lock() -> None:
    """In a forked child: a thread that held the lock in the parent is not there to release it."""
    global _engines_lock
    _engines_lock = threading.Lock()


os.register_at_fork(after_in_child=_new_engines_lock)


def engine_for(url: URL) -> Engine:
    """This process's engine for `url`. A forked child gets one of its own: sharing a connection would mix up rows."""
    key = (os.getpid(), url.render_as_string(hide_password=False))
    with _engines_lock:
        if key not in _engines:
            _engines[key] = make_engine(url)
        return _engines[key]


@contextmanager
def engine_in_place(url: URL, engine: Engine) -> Iterator[None]:
    """Has this process use an engine that somebody else made: a database in memory has no other."""
    key = (os.getpid(), url.render_as_string(hide_password=False))
    with _engines_lock:
        before = _engines.get(key)
        _engines[key] = engine
    try:
        yield
    finally:
        with _engines_lock:
            if before is None:
                _engines.pop(key, None)
            else:
                _engines[key] = before


def make_engine(url: URL, **arguments: Any) -> Engine:
    """A new engine; `arguments` are SQLAlchemy's. Raises SettingsError where the driver is not installed."""
    backend = url.get_backend_name()
    if backend == "postgresql":
        # No server-side prepared statements: a pooler in transaction mode would mix them up.
        arguments |= {
            "connect_args": {
                "prepare_threshold": None,
                "connect_timeout": 5,
                "application_name": "fetch-worker",
                "autocommit": True,  # transactions are begun by `_bound_postgres`
            }
        }
    elif backend == "sqlite":
        if url.database and url.database != ":memory:":
            _make_folder(Path(url.database).absolute().parent)
        arguments |= {"connect_args": {"timeout": LOCK_TIMEOUT_SECONDS}}
    try:
        engine = create_engine(url, pool_size=POOL_KEEPS, max_overflow=POOL_ADDS, hide_parameters=True, **arguments)
    except ImportError as missing:
        extra = {"postgresql": "postgres"}.get(backend, "mysql")
        raise SettingsError(f"DATABASE_URL needs {missing.name}: pip install 'fetch-worker[{extra}]'") from None
    event.listen(engine, "do_connect", _wait_for_a_place)
    event.listen(engine, "checkout", _ping_idle)
    event.listen(engine, "checkin", _note_use)
    if backend == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_immediate)
    elif backend == "postgresql":
        event.listen(engine, "begin", _bound_postgres)
    else:
        event.listen(engine, "connect", _prepare_mysql)
        event.listen(engine, "begin", _begin_mysql)
    return engine


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"can't make the folder {folder} ({error.strerror}); check DATABASE_URL") from None


def _wait_for_a_place(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
    """Connects; where the server has no connection left it waits a while for one, since that passes by itself."""
    until = time.monotonic() + FULL_SECONDS
    while True:
        try:
            return dialect.connect(*arguments, **options)
        except dialect.loaded_dbapi.OperationalError as error:
            if time.monotonic() >= until or not any(words in str(error).lower() for words in FULL):
                raise
            time.sleep(random.uniform(0.05, 0.3))


def _note_use(connection: Any, record: Any) -> None:
    record.info[_USED] = time.monotonic()


def _ping_idle(connection: Any, record: Any, fairy: Any) -> None:
    """Makes sure that a connection still stands that nobody used for a while; one in use says so itself."""
    if time.monotonic() - record.info.get(_USED, time.monotonic()) < IDLE_SECONDS:
        return
    try:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cursor.close()
        connection.rollback()
    except Exception as error:  # whatever the driver says: the pool opens another one
        raise DisconnectionError(str(error)) from None


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # we begin transactions ourselves
    connection.create_function("ln", 1, _logarithm, deterministic=True)  # not in every build
    for pragma in (
        "journal_mode=WAL",
        "synchronous=NORMAL",
        "foreign_keys=ON",
        f"busy_timeout={LOCK_TIMEOUT_SECONDS * 1000}",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _logarithm(value: float | None) -> float | None:
    return None if value is None or value <= 0 else math.log(value)


def _prepare_mysql(connection: Any, record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET SESSION time_zone = '+00:00', innodb_lock_wait_timeout = {MYSQL_LOCK_SECONDS}")
        cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")  # no locks on gaps between rows


def _begin_mysql(connection: Connection) -> None:
    if connection.get_execution_options().get(SNAPSHOT, False):
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")  # the next one only


def _begin_immediate(connection: Connection) -> None:
    # A transaction that reads first and writes later would fail at once when another wrote in between.
    snapshot = connection.get_execution_options().get(SNAPSHOT, False)
    connection.exec_driver_sql("BEGIN" if snapshot else "BEGIN IMMEDIATE")


def _bound_postgres(connection: Connection) -> None:
    """Begins, sets the transaction's zone and time-outs and reads the clock, all at once. Nothing outlives it."""
    dialect = connection.dialect
    options = connection.get_execution_options()
    begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY" if options.get(SNAPSHOT, False) else "BEGIN"
    words = _bound(begin, options.get(RELAXED, False), options.get(PATIENCE, LOCK_TIMEOUT_SECONDS))
    try:
        cursor: Any = connection.connection.cursor()
        with cursor:
            cursor.execute(words)
            cursor.nextset()
            connection.info[_CLOCK] = (cursor.fetchone()[0].astimezone(UTC), time.monotonic())
    except dialect.loaded_dbapi.Error as error:
        lost = dialect.is_disconnect(error, connection.connection, None)
        if lost:
            connection.invalidate(error)
        base = dialect.loaded_dbapi.Error
        raise DBAPIError.instance(words, None, error, base, connection_invalidated=lost, dialect=dialect) from error


@cache
def _bound(begin: str, relaxed: bool, patience: float) -> str:
    names = {
        "timezone": "UTC",
        "lock_timeout": f"{patience * 1000:.0f}ms",
        "statement_timeout": f"{STATEMENT_TIMEOUT_SECONDS}s",
    } | ({"synchronous_commit": "off"} if relaxed else {})
    settings = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in names.items())
    return f"{begin}; SELECT clock_timestamp(), {settings}"


def database_now(connection: Connection) -> datetime:
    """The database's clock, aware, UTC: the one clock that decides what is due and which lease is over."""
    if _clock is not None:
        return _clock()
    backend = connection.dialect.name
    if backend == "postgresql":
        if connection.in_transaction() and _CLOCK in connection.info:
            began: tuple[datetime, float] = connection.info[_CLOCK]
            return began[0] + timedelta(seconds=time.monotonic() - began[1])
        value: datetime = connection.exec_driver_sql("SELECT clock_timestamp()").scalar_one()
        return value.astimezone(UTC)
    if backend == "sqlite":
        return datetime.now(UTC)  # SQLite has no clock but the machine's
    moment: datetime = connection.exec_driver_sql("SELECT UTC_TIMESTAMP(6)").scalar_one()
    return moment.replace(tzinfo=UTC)


@contextmanager
def clock_in_place(clock: Callable[[], datetime]) -> Iterator[None]:
    """Has all of this process believe another clock than the database's: one that a test moves, and nobody waits."""
    global _clock
    before, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = before


@contextmanager
def connected(url: URL) -> Iterator[None]:
    """Turns what a driver raises when the server is away, or the tables are missing, into our own errors."""
    try:
        yield
    except (DatabaseError, InterfaceError) as error:
        shown = url.render_as_string(hide_password=True)
        if missing_table(error):
            raise SchemaOutdated(f"the tables are missing in {shown}: run `fetch-worker migrate`") from None
        if type(error) not in (OperationalError, InterfaceError, DatabaseError):
            raise  # a fault of ours, or of what was handed in; a bare DatabaseError is a file that is no database
        reason = str(error.orig).strip().splitlines()[0] if error.orig else str(error)
        raise Unavailable(
            f"the database {shown} does not answer ({reason[:200]}); check DATABASE_URL and the server"
        ) from None


def trouble(error: Exception) -> Literal["away", "locked", "row"]:
    """What a failed statement says: the server is away, somebody has locked a row, or a row can't be written."""
    if not isinstance(error, DBAPIError):
        return "row"
    cause = error.orig
    number = cause.args[0] if cause is not None and cause.args else None
    if getattr(cause, "sqlstate", None) in LOCKED_STATES or number in LOCKED_NUMBERS:
        return "locked"
    if error.connection_invalidated:
        return "away"
    away = isinstance(error, (OperationalError, InterfaceError)) and number not in ROW_NUMBERS
    return "away" if away else "row"


def transact(engine: Engine, work: Callable[[Connection], T]) -> T:
    """Does work in a transaction; again, a few times, where the server chose it to yield in a deadlock."""
    for pause in DEADLOCK_PAUSES:
        try:
            with engine.begin() as connection:
                return work(connection)
        except DBAPIError as error:
            if not _deadlock(error):
                raise
            time.sleep(random.uniform(0, pause))
    with engine.begin() as connection:
        return work(connection)


def _deadlock(error: DBAPIError) -> bool:
    cause = error.orig
    number = cause.args[0] if cause is not None and cause.args else None
    return getattr(cause, "sqlstate", None) in DEADLOCKS or number in DEADLOCKS


def reason(error: Exception) -> str:
    """An error's class and the server's code for it, such as SQLITE_FULL: never its text, which may quote a row."""
    cause = getattr(error, "orig", None)
    code = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None)
    if code is None and isinstance(cause, Exception) and cause.args and isinstance(cause.args[0], int):
        code = cause.args[0]
    return type(error).__name__ + ("" if code is None else f" ({code})")


def missing_table(error: Exception) -> bool:
    """Whether a driver's error says that a table or column of ours is not there."""
    cause = getattr(error, "orig", error)
    state = getattr(cause, "sqlstate", None)
    if state is not None:  # PostgreSQL says "does not exist" of databases and roles too
        return state in MISSING_STATES
    said = str(cause).lower()
    return any(words in said for words in ("no such table", "no such column", "doesn't exist"))


def schema_version(connection: Connection) -> str | None:
    """The version of our tables, or None where there are none."""
    if not connection.dialect.has_table(connection, VERSION_TABLE):
        return None
    version: str | None = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608  # a constant
    return version


def check_schema(engine: Engine) -> None:
    """Raises SchemaOutdated where the tables are not of this version, Unavailable where no database answers."""
    with connected(engine.url), engine.connect() as connection:
        version = schema_version(connection)
    if version is None:
        raise SchemaOutdated("the database has no tables of fetch-worker yet: run `fetch-worker migrate`")
    if version < SCHEMA_VERSION:
        raise SchemaOutdated(
            f"the database schema is {version}, this version needs {SCHEMA_VERSION}: run `fetch-worker migrate`"
        )
