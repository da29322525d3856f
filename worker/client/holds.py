"""Holding by hand: single jobs, accounts and API hosts, until they are resumed. For operators and their pages."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection

from worker.client import tracking
from worker.core.circuit_breaker import Scope
from worker.errors import JobNotFound
from worker.settings import Settings, load
from worker.store import holds as store
from worker.store.engine import database_now, engine_for, translate_errors
from worker.store.holds import work_limits
from worker.store.jobs import job_row

log = logging.getLogger(__name__)


def hold(job_id: int) -> bool:
    """Keeps a pending job from being asked about until it is resumed: it waits, and can't expire.

    False where it is held already or not pending. Raises JobNotFound.
    """
    with _transaction(load()) as connection:
        _existing(connection, job_id)
        changed = bool(store.hold(connection, [job_id], now=database_now(connection)))
    if changed:
        log.info("held by an operator job=%s", job_id)
    return changed


def resume(job_id: int) -> bool:
    """Has a job go on at once, whatever keeps it: a hold by hand, a wait for a poll or for another download attempt,
    or a claim of a process that must be gone by now.

    Who was held does not expire within the next minute. False where nothing keeps it. Raises JobNotFound.
    """
    settings = load()
    with _transaction(settings) as connection:
        _existing(connection, job_id)
        changed = bool(store.resume(connection, [job_id], work_limits(settings), now=database_now(connection)))
    if changed:
        log.info("resumed by an operator job=%s", job_id)
        tracking.wake(settings)
    return changed


def hold_account_or_host(scope: Scope, name: str) -> bool:
    """Keeps a whole account, or a host of the API, from being asked, jobs to come included. False where it is held so.

    Requests that are under way are still answered.
    """
    with _transaction(load()) as connection:
        changed = store.hold_account_or_host(connection, scope, name, now=database_now(connection))
    if changed:
        log.warning("held by an operator scope=%s name=%s", scope, name)
    return changed


def resume_account_or_host(scope: Scope, name: str) -> bool:
    """Has an account or a host asked again, whoever held it: one call alone tries what the API refused.

    A rate limit is over. False where nothing held it.
    """
    settings = load()
    with _transaction(settings) as connection:
        changed = store.resume_account_or_host(connection, scope, name, now=database_now(connection))
    if changed:
        log.warning("resumed by an operator scope=%s name=%s", scope, name)
        tracking.wake(settings)
    return changed


@contextmanager
def _transaction(settings: Settings) -> Iterator[Connection]:
    with translate_errors(settings.database), engine_for(settings.database).begin() as connection:
        yield connection


def _existing(connection: Connection, job_id: int) -> None:
    if job_row(connection, job_id) is None:
        raise JobNotFound(f"there is no job {job_id}: `fetch-worker list` shows those that there are")
