"""The Celery tasks: thin functions with stable names. Each may run twice, late or never without harm."""

import secrets
import time
from contextlib import AbstractContextManager
from typing import Any

from celery.utils.log import get_task_logger

from worker.app import HINT_EXPIRES_SECONDS, app, settings
from worker.client import actions, jobs, ordering, tracking
from worker.core.humanize import format_count
from worker.errors import WorkerError
from worker.process.insertion import insert_once
from worker.process.publishing import log_broker_errors
from worker.process.resources import process_resources
from worker.process.runs import (
    DATABASE_AWAY_SECONDS,
    DATABASE_ERRORS,
    ProgressEvents,
    run_orders,
    run_polls,
    run_prune,
    run_sweep,
)
from worker.store.audit import SOURCE_HEADER, WHO_HEADER
from worker.store.engine import describe_error
from worker.system.who import acting
from worker.vendor.submissions import planned_job

log = get_task_logger(__name__)


@app.task(name="worker.track", bind=True, ignore_result=False, acks_late=True, throws=(WorkerError,))
def track(self: Any, remote: Any, **options: Any) -> int:
    """Insert the job once. The result is the job's id."""
    tracked = insert_once(self, lambda: tracking.track(remote, **options), remote=remote)
    if tracked.created:
        address = {name: options.get(name) for name in ("fetch_url", "endpoint")}
        planned = planned_job(remote, settings.api, **address, status_words=settings.status_words)
        if planned.submission.outputs:  # the job is ready at once: only a sweep finds its outputs
            log_broker_errors("sweep", lambda: sweep.apply_async(expires=HINT_EXPIRES_SECONDS))
    return int(tracked)


@app.task(name="worker.order", bind=True, ignore_result=False, acks_late=True, throws=(WorkerError,))
def order(self: Any, endpoint: Any, payload: Any, **options: Any) -> int:
    """Insert the order once, however often the message is delivered. The result is the job's id."""
    key = f"task:{self.request.id or secrets.token_hex(16)}"[:64]
    return int(insert_once(self, lambda: ordering.order_once(key, endpoint, payload, options), remote=endpoint))


@app.task(name="worker.get", ignore_result=False, throws=(WorkerError,))
def get(
    job_id: int | None = None,
    *,
    remote_id: str | int | None = None,
    reference: str | int | None = None,
    account: str | None = None,
) -> dict[str, Any] | None:
    """Return a job and its outputs as JSON values, or `None`. Times are ISO 8601 in UTC."""
    job = jobs.get(job_id, remote_id=remote_id, reference=reference, account=account)
    return None if job is None else job.as_json()


@app.task(name="worker.nudge", acks_late=True, throws=(WorkerError,))
def nudge(remote_id: str | int, account: str | None = None) -> str:
    """Take a hint that a job may be ready: poll it as soon as `POLL_MIN` has passed since its last poll."""
    return f"{format_count(actions.nudge(remote_id, account), 'job')} brought forward"


@app.task(name="worker.cancel", bind=True, throws=(WorkerError,))
def cancel(self: Any, job_id: int) -> str:
    """Cancel a job that is not final."""
    with _acting(self.request):
        return "cancelled" if actions.cancel(job_id) else "unchanged"


@app.task(name="worker.retry", bind=True, throws=(WorkerError,))
def retry(self: Any, job_id: int) -> str:
    """Retry a failed or expired job."""
    with _acting(self.request):
        return "retried" if actions.retry(job_id) else "unchanged"


def _acting(request: Any) -> AbstractContextManager[None]:
    """Name the actor of a task: Flower and its user, or else the process that sent the message."""
    if request.get(SOURCE_HEADER) == "flower":
        return acting("flower", str(request.get(WHO_HEADER) or ""))
    return acting("task", str(request.origin or ""))


@app.task(name="worker.poll", bind=True)
def poll(self: Any) -> str:
    """Poll until nothing is due for a second. If more is due after ten seconds, publish the next poll task."""
    summary, more = run_polls(ProgressEvents(self.request))
    if more and not process_resources().stopping.is_set():
        log_broker_errors("poll", lambda: poll.apply_async(expires=HINT_EXPIRES_SECONDS))
    return summary


@app.task(name="worker.submit")
def submit() -> str:
    """Send orders until none can be sent for a second. If more can be sent after ten seconds, publish the next task."""
    summary, more = run_orders()
    if more and not process_resources().stopping.is_set():
        log_broker_errors("submit", lambda: submit.apply_async(expires=HINT_EXPIRES_SECONDS))
    return summary


@app.task(name="worker.download")
def download(output_id: int) -> str:
    """Download and store one output."""
    if isinstance(output_id, bool) or not isinstance(output_id, int):
        return "nothing to do: no output id"
    resources = process_resources()
    try:
        resources.release_dead_claims()
        return resources.downloader.run(output_id)
    except DATABASE_ERRORS as error:
        reason = describe_error(error, settings.database)
        log.error("a download waits for the database output=%s reason=%s", output_id, reason)
        time.sleep(DATABASE_AWAY_SECONDS)
        return "the database is away"


@app.task(name="worker.sweep")
def sweep() -> str:
    """Requeue the work of lost messages and dead processes."""
    return run_sweep()


@app.task(name="worker.prune")
def prune() -> str:
    """Remove finished jobs that are older than PRUNE_AFTER."""
    return run_prune()
