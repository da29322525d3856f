"""Puts the kit together: environment, database, stand-in and worker for one test, and takes all of it away again."""

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

from worker.client.tracking import workers_in_place
from worker.errors import SchemaOutdated
from worker.settings import DOTENV_SWITCH, Settings, load
from worker.store.engine import check_schema, make_engine, use_clock, use_engine
from worker.store.migrate import migrate
from worker.testing.clock import Clock
from worker.testing.inline import FetchWorker, KitError
from worker.testing.stand_in import KEY, FetchApi

BUSY_MS = 2_000  # how long a test's own open transaction is waited for
SECRET = "whsec_" + "dGVzdCBraXQg" * 4  # where the app's tests have none of their own: nothing is sent
ELSEWHERE = ("SD_API_KEYS", "SD_API_HOSTS", "SD_API_PROXY", "SD_API_CA_BUNDLE")  # settings that lead to the real API


@dataclass(frozen=True, slots=True)
class Kit:
    """What one test has."""

    api: FetchApi
    worker: FetchWorker


@contextmanager
def kit(folder: Path, *, database: object = None, tables: Path | None = None) -> Iterator[Kit]:
    """The kit for one test; all it writes is below `folder`.

    `database` is the app's own, with our tables: a URL, an engine (the only way to one in memory), or a connection in
    a transaction that the test rolls back. Without it there is a new SQLite file, a copy of `tables` (see
    `migrated_file`) where they are given. The environment leads to all of it meanwhile. Raises KitError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    with ExitStack() as stack:
        api = stack.enter_context(FetchApi(clock))
        own = _own_file(folder, tables) if database is None else None
        shown = own or _url_of(database)
        settings = stack.enter_context(_environment(folder, shown, api))
        engine = stack.enter_context(_engine(settings, None if own is not None else database))
        _check(engine)
        stack.enter_context(use_engine(settings.database, engine))
        stack.enter_context(use_clock(clock.now))
        worker = FetchWorker(engine, settings, api, clock)
        stack.callback(worker.close)
        stack.enter_context(workers_in_place(worker))
        yield Kit(api, worker)


def migrated_file(path: Path) -> Path:
    """Makes an SQLite file with our tables, to be copied for each test."""
    engine = make_engine(URL.create("sqlite", database=str(path)))
    migrate(engine)
    engine.dispose()
    return path


def _own_file(folder: Path, tables: Path | None) -> URL:
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
    kind = type(database).__name__
    hint = "hand in its URL" if hasattr(database, "sync_engine") else "a URL, an Engine or a Connection is"
    raise KitError(f"fetch_database gave {kind}, which the kit can't use: {hint}")


@contextmanager
def _environment(folder: Path, database: URL, api: FetchApi) -> Iterator[Settings]:
    """The settings that lead to the stand-in, and nowhere else; afterwards the environment is as it was."""
    wanted: dict[str, str | None] = {
        "DATABASE_URL": database.render_as_string(hide_password=False),
        "SD_API_URL": api.url,
        "SD_API_KEY": KEY,
        "WEBHOOK_ALLOWED_NETWORKS": "0.0.0.0/0,::/0",  # any address will do: nothing is sent
        "WEBHOOK_SECRET": os.environ.get("WEBHOOK_SECRET") or SECRET,
        "STORAGE_URL": f"file:{folder.absolute() / 'outputs'}",
        "OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8",
        "REDIS_URL": f"redis+socket://{quote(str(folder.absolute() / 'no-redis.sock'))}",
        "BROKER_URL": "memory://",
        DOTENV_SWITCH: "off",
        **dict.fromkeys(ELSEWHERE),
    }
    before = {name: os.environ.get(name) for name in wanted}
    _set(wanted)
    try:
        yield load()
    finally:
        _set(before)


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
        yield cast("Engine", _Joined(database))
        return
    made = _files.engine(settings.database) if database is None else make_engine(settings.database)
    try:
        yield made
    finally:
        made.dispose()


class _Files:
    """Engines on one SQLite file after the other, which share what SQLAlchemy has compiled: most of a job's time."""

    def __init__(self) -> None:
        self._shared: Engine | None = None
        self._path = ""

    def engine(self, url: URL) -> Engine:
        """The engine of the next file. Dispose it before the next one is made."""
        self._path = url.database or ""
        if self._shared is None:
            self._shared = make_engine(url, creator=self._connect)
            event.listen(self._shared, "connect", _hurry)
        made = self._shared.execution_options()
        made.url = url
        return made

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, check_same_thread=False)


_files = _Files()


def _hurry(connection: Any, _: object) -> None:
    connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")
    connection.execute("PRAGMA synchronous=OFF")  # a test's file need not survive a power cut


def _check(engine: Engine) -> None:
    try:
        check_schema(engine)
    except SchemaOutdated as missing:
        shown = engine.url.render_as_string(hide_password=True)
        raise KitError(
            f"{missing}, or in a fixture `worker.testing.migrate(engine)`, on {shown}; without a `fetch_database` of"
            " yours each test gets a database that has them"
        ) from None


class _Joined:
    """An engine that has one connection, somebody else's: each transaction is a savepoint in the one that is open."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.url = connection.engine.url
        self.dialect = connection.dialect

    def execution_options(self, **_: object) -> "_Joined":
        return self

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        with self._connection.begin_nested():
            yield self._connection

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        yield self._connection
