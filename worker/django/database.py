"""Use Django's own database connection from SQLAlchemy, so that both work in one transaction.

SQLAlchemy gets a borrowed connection: it can run statements, but not commit, roll back or close. That is left to
Django. The borrowed connection also has value conversions of its own, because Django changes those of its connection.
"""

import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.conf import settings as django_settings
from django.core import mail
from django.db import connections, transaction
from sqlalchemy import URL, Connection, Engine, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from worker.configuration.environment import read_environment
from worker.configuration.server_urls import database_url, same_database
from worker.errors import SettingsError
from worker.settings import dotenv_file
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import metadata
from worker.system.locked_cache import locked_cache, locked_property

BACKENDS = {"postgresql": "postgresql", "mysql": "mysql", "sqlite": "sqlite"}  # Django's vendor -> SQLAlchemy's name
T = TypeVar("T")

DRIVERS = {"MySQLdb": "mysqldb", "pymysql": "pymysql", "psycopg": "psycopg", "sqlite3": "pysqlite"}  # module -> name


def database_alias() -> str:
    """Return the alias of the database with the jobs."""
    return str(getattr(django_settings, "FETCH_WORKER_DATABASE", "default"))


def django_database() -> "DjangoDatabase | None":
    """Return Django's database, if the jobs are in it: DATABASE_URL names the same one, or is not set.

    `FETCH_WORKER_DATABASE` in Django's settings is its alias; the default is `default`.
    """
    database = DjangoDatabase(database_alias())
    url = read_environment(os.environ, dotenv_file()).get("DATABASE_URL")
    return database if not url or same_database(database_url(url), database.url) else None


class DjangoDatabase:
    """The database of one of Django's aliases. Also a test run's, since Django renames it there."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self._name = connections[alias].settings_dict["NAME"]

    @property
    def url(self) -> URL:
        """The URL of the database, for messages and for connections of our own."""
        values = connections[self.alias].settings_dict
        vendor = connections[self.alias].vendor
        if vendor not in BACKENDS:
            raise SettingsError(
                f"fetch-worker can't use the database {self.alias!r} of Django: {vendor} is not supported"
            )
        host, unix_socket = str(values.get("HOST") or ""), {}
        if host.startswith("/"):
            host, unix_socket = "", {"host" if vendor == "postgresql" else "unix_socket": host}
        url = URL.create(
            BACKENDS[vendor],
            username=values.get("USER") or None,
            password=values.get("PASSWORD") or None,
            host=host or None,
            port=int(values["PORT"]) if values.get("PORT") else None,
            database=str(values["NAME"]),
            query=unix_socket,
        )
        return url if vendor == "sqlite" else database_url(url.render_as_string(hide_password=False))

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Yield a connection in Django's transaction. Outside of one, it has a transaction of its own."""
        with transaction.atomic(using=self.alias):
            try:
                with self.engine.connect() as connection:
                    yield connection
            except DBAPIError:
                connections[self.alias].errors_occurred = True  # Django checks the connection after the request
                raise

    def after_commit(self, call: Callable[[], object]) -> None:
        """Call a function after the commit of Django's transaction, or at once outside of one."""
        transaction.on_commit(call, using=self.alias)

    def release(self) -> None:
        """Close the connection of this thread."""
        connections[self.alias].close()

    def in_thread(self, call: Callable[[], T]) -> Awaitable[T]:
        """Call a function in the thread that Django chooses for its own database calls."""
        result: Awaitable[T] = sync_to_async(call, thread_sensitive=True)()
        return result

    @property
    def in_test(self) -> bool:
        """Whether Django's test runner has put a database of its own in place."""
        renamed = connections[self.alias].settings_dict["NAME"] != self._name
        return bool(renamed and hasattr(mail, "outbox"))  # Django adds the outbox for the time of a test run

    def empty(self) -> None:
        """Delete all rows of fetch-worker."""
        with self.transaction() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())

    def migrate(self) -> tuple[str | None, str | None]:
        """Create or update the tables. Return the versions before and after."""
        if self._in_memory:
            return migrate(self.engine)  # no other connection can see this database
        own_engine = make_engine(self.url)
        try:
            return migrate(own_engine)
        finally:
            own_engine.dispose()

    @property
    def _in_memory(self) -> bool:
        connection = connections[self.alias]
        return bool(connection.vendor == "sqlite" and connection.is_in_memory_db())

    @property
    def engine(self) -> Engine:
        """An engine whose connections are borrowed from Django, each in the thread that asks for it."""
        return self._engine(self.url, _driver(self._django_connection()))

    @locked_property
    def _engine(self) -> "locked_cache[Engine]":
        return locked_cache(self._make_engine)

    def _make_engine(self, url: URL, driver: str) -> Engine:
        options: dict[str, Any] = {"use_native_hstore": False} if driver == "psycopg" else {}
        url = url.set(drivername=f"{url.get_backend_name()}+{driver}")
        return create_engine(
            url,
            creator=lambda: _Borrowed(self._django_connection()),
            poolclass=NullPool,
            hide_parameters=True,
            **options,
        )

    def _django_connection(self) -> Any:
        """Return the driver's connection that Django uses in this thread."""
        connections[self.alias].ensure_connection()
        return connections[self.alias].connection


def _driver(raw: Any) -> str:
    modules = [base.__module__.partition(".")[0] for base in type(raw).__mro__]
    driver = next((DRIVERS[module] for module in modules if module in DRIVERS), None)
    if driver is None:
        raise SettingsError(
            f"fetch-worker can't use Django's connection of the driver {modules[0]}: install"
            " psycopg 3 for PostgreSQL, mysqlclient or PyMySQL for MySQL"
        )
    return driver


class _Borrowed:
    """A driver's connection that SQLAlchemy may use, but not end."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._make_cursor: Callable[..., Any] = CURSORS.get(_driver(raw), _plain_cursor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def cursor(self, *arguments: Any, **options: Any) -> Any:
        """Return a cursor whose values are converted as SQLAlchemy expects."""
        return self._make_cursor(self._raw, *arguments, **options)

    def commit(self) -> None:
        """Do nothing: Django commits."""

    def rollback(self) -> None:
        """Do nothing: Django rolls back."""

    def close(self) -> None:
        """Do nothing: the connection is Django's."""

    def add_notice_handler(self, _: object) -> None:
        """Do nothing: SQLAlchemy would add one each time it borrows the connection."""

    def create_function(self, *_: object, **__: object) -> None:
        """Do nothing: SQLAlchemy would replace a function of Django's."""


def _plain_cursor(raw: Any, *arguments: Any, **options: Any) -> Any:
    return raw.cursor(*arguments, **options)


def _postgres_cursor(raw: Any, *arguments: Any, **options: Any) -> Any:
    """Return a cursor that reads JSON and times: Django's leaves JSON as text, and its times may be without a zone."""
    from psycopg import Cursor
    from psycopg.types.datetime import TimestamptzLoader
    from psycopg.types.json import JsonbLoader

    class UtcLoader(TimestamptzLoader):
        def load(self, data: Any) -> datetime:
            return super().load(data).astimezone(UTC)

    cursor: Any = Cursor(raw)
    cursor.adapters.register_loader("jsonb", JsonbLoader)
    cursor.adapters.register_loader("timestamptz", UtcLoader)
    return cursor


def _sqlite_cursor(raw: Any, *arguments: Any, **options: Any) -> Any:
    """Return a cursor with times as text: Django makes them datetimes, and SQLAlchemy reads the text itself."""
    cursor = raw.cursor(*arguments, **options)
    cursor.row_factory = _with_text_times
    return cursor


def _with_text_times(_: sqlite3.Cursor, row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(str(value) if isinstance(value, datetime) else value for value in row)


CURSORS: dict[str, Callable[..., Any]] = {"psycopg": _postgres_cursor, "pysqlite": _sqlite_cursor}
