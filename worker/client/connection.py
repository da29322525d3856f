"""The settings and the database transactions of this package's calls."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection

from worker.errors import JobNotFound
from worker.settings import Settings, load
from worker.store.engine import engine_for, translate_errors
from worker.store.jobs import job_row
from worker.system.locked_cache import locked_cache


@locked_cache
def cached_settings() -> Settings:
    """Return the settings. They are loaded once per process."""
    return load()


@contextmanager
def transaction(settings: Settings) -> Iterator[Connection]:
    """Yield a connection in a transaction. Raises the errors of `worker.store.engine.translate_errors`."""
    with translate_errors(settings.database), engine_for(settings.database).begin() as connection:
        yield connection


def check_exists(connection: Connection, job_id: int) -> None:
    """Check that there is a job with this id. Raises JobNotFound."""
    if job_row(connection, job_id) is None:
        raise JobNotFound(f"there is no job {job_id}: `fetch-worker list` shows the jobs")
