"""Publishes messages: downloads and `on_done` calls. Each message is a hint; the sweep sends it again."""

from collections.abc import Callable, Sequence

from celery.utils.log import get_task_logger
from kombu.exceptions import OperationalError as BrokerError

from worker.app import app
from worker.core.queues import DOWNLOADS
from worker.notify.on_done import refusal

log = get_task_logger(__name__)


def queue_downloads(output_ids: Sequence[int]) -> None:
    """Publish download tasks. If the broker is away, the sweep publishes them later."""

    def publish() -> None:
        with app.producer_pool.acquire(block=True, timeout=5) as producer:
            for output_id in output_ids:
                app.send_task("worker.download", (output_id,), producer=producer, queue=DOWNLOADS, ignore_result=True)

    if output_ids:
        log_broker_errors("downloads", publish)


def send_on_done(task: str, queue: str, job_id: int) -> None:
    """Send an `on_done` call. Retry once if a pooled connection was lost; Celery's own retries would take too long."""
    try:
        _send_once(task, queue, job_id)
    except Exception as error:
        if refusal(error) is not None:
            raise
        _send_once(task, queue, job_id)


def _send_once(task: str, queue: str, job_id: int) -> None:
    with app.producer_pool.acquire(block=True, timeout=5) as producer:
        try:
            app.send_task(task, (job_id,), queue=queue, producer=producer, retry=False, ignore_result=True)
        except Exception:
            producer.__connection__.collect()  # RabbitMQ closes the channel when it refuses a message
            raise


def log_broker_errors(messages: str, publish: Callable[[], object]) -> None:
    try:
        publish()
    except (BrokerError, OSError) as error:
        log.warning("the broker is away, the sweep will send it what=%s reason=%s", messages, type(error).__name__)
