"""Cancel, retry, nudge or notify about a job."""

import logging
from datetime import timedelta

from worker.client.connection import cached_settings, existing_job, transaction
from worker.client.jobs import lookup_id
from worker.client.workers import wake
from worker.store import jobs as job_store
from worker.store.audit import record_job_action
from worker.store.candidates import add_candidate
from worker.store.counters import Tally
from worker.store.engine import database_now
from worker.store.events import create_events, send_again

log = logging.getLogger(__name__)


def cancel(job_id: int) -> bool:
    """Cancel a job; stored files stay. Return False if the job was already final. Raises JobNotFound."""
    with transaction(cached_settings()) as connection:
        job_id = existing_job(connection, job_id)
        tally, now = Tally(), database_now(connection)
        cancelled = job_store.cancel(connection, job_id, tally, now=now)
        if cancelled:
            record_job_action(connection, "cancel", job_id, now=now)
        tally.write(connection)
        return cancelled


def retry(job_id: int) -> bool:
    """Retry a failed or expired job at once, or send an uncertain order again. Return False in another state.

    An uncertain order may then be paid for twice. Raises JobNotFound.
    """
    settings = cached_settings()
    with transaction(settings) as connection:
        job_id = existing_job(connection, job_id)
        now = database_now(connection)
        create_events(connection, now=now, of=[job_id])  # the event of the final state, before leaving it
        changed = job_store.retry(connection, job_id, now=now)
        if changed:
            record_job_action(connection, "retry", job_id, now=now)
    if changed:
        wake(settings)
    return changed


def notify(job_id: int) -> bool:
    """Send the webhooks of a job again, with the same ids and bodies. Return False if none had to change.

    If its final state has no webhook yet, create it. Raises JobNotFound.
    """
    with transaction(cached_settings()) as connection:
        job_id = existing_job(connection, job_id)
        now = database_now(connection)
        changed = send_again(connection, job_id, now=now) > 0
        if changed:
            record_job_action(connection, "notify", job_id, now=now)
    return changed


def nudge(remote_id: str | int, account: str | None = None) -> int:
    """Poll the jobs with this remote id earlier, because they may be ready. Return how many; 0 for an unknown id."""
    settings = cached_settings()
    with transaction(settings) as connection:
        interval = timedelta(seconds=settings.poll_min)
        count = job_store.nudge(
            connection, lookup_id(remote_id), account, now=database_now(connection), poll_min=interval
        )
    if count:
        wake(settings)
    return count


def nudge_reference(reference: str, remote_id: str | None = None) -> int:
    """Poll the jobs with this reference earlier, because they may be ready. Return how many.

    The workers ask the API whether the job with this `remote_id` belongs to an order whose answer is not known.
    """
    settings = cached_settings()
    with transaction(settings) as connection:
        interval = timedelta(seconds=settings.poll_min)
        now = database_now(connection)
        if remote_id is not None:
            add_candidate(connection, reference, remote_id, now=now)
        count = job_store.nudge_reference(connection, reference, now=now, poll_min=interval)
    if count:
        wake(settings)
    return count
