"""The settings and the database transactions of this package's calls."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

from sqlalchemy import URL, Connection

from worker.client.ids import checked_job_id, no_job
from worker.settings import Settings, load
from worker.store.engine import engine_for, translate_errors
from worker.store.jobs import job_row
from worker.system.locked_cache import locked_cache

T = TypeVar("T")


class AppDatabase(Protocol):
    """A database connection that the app's framework manages, such as Django's."""

    @property
    def url(self) -> URL:
        """The URL of the database."""
        ...

    def transaction(self) -> AbstractContextManager[Connection]:
        """Return a connection in the app's transaction. Outside of one, it has a transaction of its own."""
        ...

    def after_commit(self, call: Callable[[], object]) -> None:
        """Call a function after the commit of the app's transaction, or at once outside of one."""
        ...

    def release(self) -> None:
        """Close the connection of this thread. The framework does that only for its own threads."""
        ...

    def in_thread(self, call: Callable[[], T]) -> Awaitable[T]:
        """Call a function in the thread in which the framework uses its connection."""
        ...


_app_database: AppDatabase | None = None


def app_database() -> AppDatabase | None:
    """Return the database of the app's framework that the calls of this package use, if there is one."""
    return _app_database


def use_app_database(database: AppDatabase | None) -> None:
    """Make the calls of this package use the database of the app's framework, or DATABASE_URL again."""
    global _app_database
    _app_database = database


def cached_settings() -> Settings:
    """Return the settings. They are loaded once per process, or once per database of the app's framework."""
    if _app_database is None:
        return loaded_settings()
    return loaded_settings(_app_database.url.render_as_string(hide_password=False))


@locked_cache
def loaded_settings(database_url: str | None = None) -> Settings:
    """Return the settings, with a database URL other than DATABASE_URL if it is given."""
    return load() if database_url is None else load(database_url=database_url)


@contextmanager
def transaction(settings: Settings) -> Iterator[Connection]:
    """Yield a connection in a transaction. Raises the errors of `worker.store.engine.translate_errors`."""
    with translate_errors(settings.database):
        if _app_database is not None:
            with _app_database.transaction() as connection:
                yield connection
        else:
            with engine_for(settings.database).begin() as connection:
                yield connection


def after_commit(call: Callable[[], object]) -> None:
    """Call a function after the commit of the app's transaction, or at once if the app's framework has none."""
    if _app_database is None:
        call()
    else:
        _app_database.after_commit(call)


def release_connection() -> None:
    """Close what the calls of this thread left open in the app's framework. For threads of this package."""
    if _app_database is not None:
        _app_database.release()


def existing_job(connection: Connection, job_id: object) -> int:
    """Return a job id as a plain number. Raises NotTrackable if it is none, and JobNotFound if there is no such job."""
    checked = checked_job_id(job_id)
    if job_row(connection, checked) is None:
        raise no_job(checked)
    return checked
