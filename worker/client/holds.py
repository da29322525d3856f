"""Hold and resume jobs, accounts and API hosts. For operators and their pages."""

import logging

from worker.client.connection import cached_settings, existing_job, transaction
from worker.client.selection import breaker_option
from worker.client.workers import wake
from worker.core.circuit_breaker import Scope
from worker.store import holds as store
from worker.store.audit import record_action, record_job_action
from worker.store.engine import database_now
from worker.store.holds import work_limits

log = logging.getLogger(__name__)


def hold(job_id: int) -> bool:
    """Stop polling a pending job until it is resumed. A held job does not expire.

    Return False if it is already held or not pending. Raises JobNotFound.
    """
    with transaction(cached_settings()) as connection:
        job_id = existing_job(connection, job_id)
        now = database_now(connection)
        changed = bool(store.hold(connection, [job_id], now=now))
        if changed:
            record_job_action(connection, "hold", job_id, now=now)
    if changed:
        log.info("held by an operator job=%s", job_id)
    return changed


def resume(job_id: int) -> bool:
    """Continue a job at once.

    This ends a hold, a wait for the next poll or download attempt, and a claim that is older than any work takes. A job
    that was held does not expire within the next minute. Return False if nothing had to change. Raises JobNotFound.
    """
    settings = cached_settings()
    with transaction(settings) as connection:
        job_id = existing_job(connection, job_id)
        now = database_now(connection)
        changed = bool(store.resume(connection, [job_id], work_limits(settings), now=now))
        if changed:
            record_job_action(connection, "resume", job_id, now=now)
    if changed:
        log.info("resumed by an operator job=%s", job_id)
        wake(settings)
    return changed


def hold_account_or_host(scope: Scope, name: str) -> bool:
    """Stop all requests of an account or to a host of the API, also for future jobs.

    Answers to requests in flight are still processed. Return False if it was already held by an operator.
    """
    with transaction(cached_settings()) as connection:
        now = database_now(connection)
        changed = store.hold_account_or_host(connection, scope, name, now=now)
        if changed:
            record_action(connection, "hold", breaker_option(scope, name), jobs=0, now=now)
    if changed:
        log.warning("held by an operator scope=%s name=%s", scope, name)
    return changed


def resume_account_or_host(scope: Scope, name: str) -> bool:
    """End the hold of an account or a host. If the API had refused it, a single request tries it first.

    This also ends a pause after a rate limit. Return False if nothing held it.
    """
    settings = cached_settings()
    with transaction(settings) as connection:
        now = database_now(connection)
        changed = store.resume_account_or_host(connection, scope, name, now=now)
        if changed:
            record_action(connection, "resume", breaker_option(scope, name), jobs=0, now=now)
    if changed:
        log.warning("resumed by an operator scope=%s name=%s", scope, name)
        wake(settings)
    return changed
