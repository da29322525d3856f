"""The Celery tasks: thin doors with stable names. Each may run twice, late or never, and does no harm."""

import time
from typing import Any

from celery.exceptions import Reject
from celery.utils.log import get_task_logger

from worker.app import HINT_EXPIRES_SECONDS, app, settings
from worker.client import tracking
from worker.errors import NotTrackable, SchemaOutdated, Unavailable, WorkerError
from worker.process.publishing import log_broker_errors
from worker.process.redelivery import DELIVERIES_MOST, TooManyDeliveries, remote_id_of
from worker.process.resources import process_resources
from worker.process.runs import DATABASE_AWAY_SECONDS, DATABASE_ERRORS, ProgressEvents, run_polls, run_prune, run_sweep
from worker.process.transport_guard import quote_for_log
from worker.store.engine import describe_error
from worker.vendor.submissions import planned_job

log = get_task_logger(__name__)


@app.task(name="worker.track", bind=True, ignore_result=False, acks_late=True, throws=(WorkerError,))
def track(self: Any, remote: Any, **options: Any) -> int:
    """Inserts the job once; its result is the job's id."""
    own = process_resources()
    redelivered = bool((self.request.delivery_info or {}).get("redelivered"))
    try:
        with own.deliveries.counted(self.request.id, redelivered=redelivered):
            job_id, created = tracking.track_with_created([remote], **options)[0]
        own.outage.over()
    except (Unavailable, SchemaOutdated):
        own.outage.wait(own.stopping)
        raise Reject("the database is away", requeue=True) from None
    except TooManyDeliveries:
        log.error(
            "message set aside, its process died at each delivery remote=%s size=%s deliveries=%s",
            *(quote_for_log(own.scrubber.text(remote_id_of(remote))), len(str(remote)), DELIVERIES_MOST),
        )
        raise Reject("its process died at each delivery", requeue=False) from None
    except TypeError as wrong:
        raise NotTrackable(process_resources().scrubber.text(f"worker.track was called wrongly: {wrong}")) from None
    except WorkerError as wrong:
        raise type(wrong)(process_resources().scrubber.text(str(wrong))) from None
    where = {name: options.get(name) for name in ("fetch_url", "endpoint")}
    if created and planned_job(remote, settings.api, **where, status_words=settings.status_words).submission.outputs:
        # Ready at once: nothing but a sweep would find its outputs.
        log_broker_errors("sweep", lambda: sweep.apply_async(expires=HINT_EXPIRES_SECONDS))
    return job_id


@app.task(name="worker.nudge", acks_late=True, throws=(WorkerError,))
def nudge(remote_id: str | int, account: str | None = None) -> str:
    """A hint that a job may be ready: it is asked about as soon as its last request is long enough ago."""
    return f"{tracking.nudge(remote_id, account)} brought forward"


@app.task(name="worker.cancel", throws=(WorkerError,))
def cancel(job_id: int) -> str:
    """Cancels a job that is not final."""
    return "cancelled" if tracking.cancel(job_id) else "unchanged"


@app.task(name="worker.retry", throws=(WorkerError,))
def retry(job_id: int) -> str:
    """Takes a failed or expired job up again."""
    return "taken up again" if tracking.retry(job_id) else "unchanged"


@app.task(name="worker.poll", bind=True)
def poll(self: Any) -> str:
    """Claims and asks until nothing is due for a second, then publishes its successor."""
    said = run_polls(progress=ProgressEvents(self.request))
    if said != "a run is on already" and not process_resources().stopping.is_set():
        log_broker_errors("poll", lambda: poll.apply_async(expires=HINT_EXPIRES_SECONDS))
    return said


@app.task(name="worker.download")
def download(output_id: int) -> str:
    """Stores one output."""
    if isinstance(output_id, bool) or not isinstance(output_id, int):
        return "nothing to do: no output id"
    own = process_resources()
    try:
        own.release_dead_claims()
        return own.downloader.run(output_id)
    except DATABASE_ERRORS as error:
        said = describe_error(error, settings.database)
        log.error("a download waits for the database output=%s reason=%s", output_id, said)
        time.sleep(DATABASE_AWAY_SECONDS)
        return "the database is away"


@app.task(name="worker.sweep")
def sweep() -> str:
    """Puts back what a lost message or a dead process left."""
    return run_sweep()


@app.task(name="worker.prune")
def prune() -> str:
    """Removes finished jobs that are old enough, where PRUNE_AFTER says how old that is."""
    return run_prune()
