"""Builds the test kit for one test: environment, database, stand-in and worker. Undoes everything afterwards."""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL, make_url

from worker.client.connection import AppDatabase, app_database, use_app_database
from worker.client.workers import workers_in_place
from worker.errors import SchemaOutdated
from worker.settings import DOTENV_SWITCH, Settings, load
from worker.store.engine import check_schema, make_engine, use_clock, use_engine
from worker.store.migrate import migrate
from worker.testing.clock import Clock
from worker.testing.inline import FetchWorker
from worker.testing.stand_in import KEY, FetchApi
from worker.testing.works import KitError

LOCK_TIMEOUT_MS = 2_000  # how long to wait for an open transaction of the test
SECRET = "whsec_" + "dGVzdCBraXQg" * 4  # used if the app's tests set no secret; nothing is posted
# These lead to the real API, so they are unset.
REAL_API_SETTINGS = ("SD_API_KEYS", "SD_API_HOSTS", "SD_API_PROXY", "SD_API_CA_BUNDLE")


@dataclass(frozen=True, slots=True)
class Kit:
    """The stand-in and the worker of one test.

    `api` is the stand-in, the fixture `fetch_api`: it decides what each job answers, and counts requests.
    `worker` is the worker, the fixture `fetch_worker`: it runs jobs to a final state, and moves the clock.
    """

    api: FetchApi
    worker: FetchWorker


@contextmanager
def kit(folder: Path, *, database: object = None, tables: Path | None = None) -> Iterator[Kit]:
    """Provide the kit for one test. All files are written below `folder`.

    `database` is the app's database with the tables of fetch-worker: a URL, an engine (required for an in-memory
    database), or a connection with a transaction that the test rolls back. Without it, the kit uses the connection of
    Django if `worker.django` is installed, and else a new SQLite file, copied from `tables` (see `migrated_file`) if
    given. Environment variables point to these parts inside the `with` block. Raises KitError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    with ExitStack() as stack:
        api = stack.enter_context(FetchApi(clock))
        if database is None:
            database = app_database()
        else:
            stack.enter_context(_without_app_database())
        new_file = _new_file(folder, tables) if database is None else None
        url = new_file or _url_of(database)
        settings = stack.enter_context(_environment(folder, url, api))
        engine = stack.enter_context(_engine(settings, database))
        _check(engine)
        stack.enter_context(use_engine(settings.database, engine))
        stack.enter_context(use_clock(clock.now))
        worker = FetchWorker(engine, settings, api, clock)
        stack.callback(worker.close)
        stack.enter_context(workers_in_place(worker))
        yield Kit(api, worker)


def migrated_file(path: Path) -> Path:
    """Make an SQLite file with the tables of fetch-worker, to be copied for each test."""
    engine = make_engine(URL.create("sqlite", database=str(path)))
    migrate(engine)
    engine.dispose()
    return path


def _new_file(folder: Path, tables: Path | None) -> URL:
    path = folder / "worker.db"
    if tables is None:
        migrated_file(path)
    else:
        shutil.copyfile(tables, path)
    return URL.create("sqlite", database=str(path))


def _url_of(database: object) -> URL:
    if isinstance(database, str | URL):
        return make_url(database)
    if isinstance(database, Engine):
        return database.url
    if isinstance(database, Connection):
        return database.engine.url
    if database is app_database():
        return cast("AppDatabase", database).url
    kind = type(database).__name__
    hint = "pass its URL" if hasattr(database, "sync_engine") else "pass a URL, an Engine or a Connection"
    raise KitError(f"fetch_database returned {kind}, which the kit cannot use: {hint}")


@contextmanager
def _environment(folder: Path, database: URL, api: FetchApi) -> Iterator[Settings]:
    """Provide settings that lead only to the stand-in. The previous environment is restored afterwards."""
    variables: dict[str, str | None] = {
        "DATABASE_URL": database.render_as_string(hide_password=False),
        "SD_API_URL": api.url,
        "SD_API_KEY": KEY,
        "WEBHOOK_ALLOWED_NETWORKS": "0.0.0.0/0,::/0",  # any address is fine: nothing is posted
        "WEBHOOK_SECRET": os.environ.get("WEBHOOK_SECRET") or SECRET,
        "STORAGE_URL": f"file:{folder.absolute() / 'outputs'}",
        "OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8",
        "REDIS_URL": f"redis+socket://{quote(str(folder.absolute() / 'no-redis.sock'))}",
        "BROKER_URL": "memory://",
        DOTENV_SWITCH: "off",
        **dict.fromkeys(REAL_API_SETTINGS),
    }
    previous = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield load()
    finally:
        _set(previous)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _engine(settings: Settings, database: object) -> Iterator[Engine]:
    if isinstance(database, Engine):
        yield database
        return
    if isinstance(database, Connection):
        yield cast("Engine", _SingleConnectionEngine(database))
        return
    if database is not None and database is app_database():
        yield cast("Engine", _AppEngine(cast("AppDatabase", database)))
        return
    engine = _sqlite_engines.engine(settings.database) if database is None else make_engine(settings.database)
    try:
        yield engine
    finally:
        engine.dispose()


class _SqliteEngines:
    """Engines for one SQLite file after another. They share SQLAlchemy's compiled statements, which saves most time."""

    def __init__(self) -> None:
        self._shared: Engine | None = None
        self._path = ""

    def engine(self, url: URL) -> Engine:
        """Return the engine of the next file. Dispose of it before asking for another one."""
        self._path = url.database or ""
        if self._shared is None:
            self._shared = make_engine(url, creator=self._connect)
            event.listen(self._shared, "connect", _speed_up)
        engine = self._shared.execution_options()
        engine.url = url
        return engine

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, check_same_thread=False)


_sqlite_engines = _SqliteEngines()


def _speed_up(connection: Any, _: object) -> None:
    connection.execute(f"PRAGMA busy_timeout={LOCK_TIMEOUT_MS}")
    connection.execute("PRAGMA synchronous=OFF")  # test files need not survive a power cut


def _check(engine: Engine) -> None:
    try:
        check_schema(engine)
    except SchemaOutdated as missing:
        url = engine.url.render_as_string(hide_password=True)
        raise KitError(
            f"{missing}, or call `worker.testing.migrate(engine)` in a fixture, on {url}; without a `fetch_database`"
            " fixture each test gets a database with the tables"
        ) from None


@contextmanager
def _without_app_database() -> Iterator[None]:
    """Let the app's calls use the kit's database instead of the connection of the app's framework."""
    replaced = app_database()
    use_app_database(None)
    try:
        yield
    finally:
        use_app_database(replaced)


class _AppEngine:
    """Engine over the connection of the app's framework. Each transaction is one of the framework."""

    def __init__(self, database: AppDatabase) -> None:
        self.url = database.url
        with database.transaction() as connection:
            self.dialect = connection.dialect
            self.real_engine = connection.engine
        self.begin = self.connect = database.transaction

    def execution_options(self, **_: object) -> "_AppEngine":
        return self


class _SingleConnectionEngine:
    """Engine over a test's own connection. Each transaction is a savepoint in the transaction that the test opened."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.real_engine = connection.engine
        self.url = connection.engine.url
        self.dialect = connection.dialect

    def execution_options(self, **_: object) -> "_SingleConnectionEngine":
        return self

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        with self._connection.begin_nested():
            yield self._connection

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        yield self._connection
