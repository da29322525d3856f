"""Runs the tasks that insert a job, `worker.track` and `worker.order`. Their messages must not be lost."""

from collections.abc import Callable
from typing import Any

from celery.exceptions import Reject
from celery.utils.log import get_task_logger

from worker.client.tracking import TrackedJob
from worker.errors import NotTrackable, SchemaOutdated, Unavailable, WorkerError
from worker.process.redelivery import DELIVERIES_MOST, TooManyDeliveries, remote_id_of
from worker.process.resources import process_resources
from worker.process.transport_guard import quote_for_log

log = get_task_logger(__name__)


def insert_once(task: Any, insert: Callable[[], TrackedJob], *, remote: object) -> TrackedJob:
    """Insert the job of a message. If the database is away, the message goes back to its queue.

    A message whose process died at each delivery is rejected and logged. `remote` is what its log line quotes. Raises
    the errors of `insert`, without keys.
    """
    resources = process_resources()
    redelivered = bool((task.request.delivery_info or {}).get("redelivered"))
    try:
        with resources.deliveries.counted(task.request.id, redelivered=redelivered):
            tracked = insert()
        resources.outage.over()
    except (Unavailable, SchemaOutdated):
        resources.outage.wait(resources.stopping)
        raise Reject("the database is away", requeue=True) from None
    except TooManyDeliveries:
        log.error(
            "message rejected, its process died at each delivery remote=%s size=%s deliveries=%s",
            *(quote_for_log(resources.scrubber.text(remote_id_of(remote))), len(str(remote)), DELIVERIES_MOST),
        )
        raise Reject("its process died at each delivery", requeue=False) from None
    except TypeError as error:
        raise NotTrackable(resources.scrubber.text(f"{task.name} was called wrongly: {error}")) from None
    except WorkerError as error:
        raise type(error)(resources.scrubber.text(str(error))) from None
    return tracked
