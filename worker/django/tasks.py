"""The Celery task that turns a final job into a Django signal. Celery finds it by `autodiscover_tasks`.

worker.track(response, on_done=send_job_final)

@receiver(job_final)
def picture_ready(sender, job, **kwargs): ...
"""

from celery import shared_task

from worker.client.jobs import Job, get
from worker.django.signals import job_final


@shared_task(name="fetch_worker.job_final", acks_late=True)  # type: ignore[untyped-decorator]  # celery has no types
def send_job_final(job_id: int) -> None:
    """Send the signal `job_final`, at least once for each final state. An error of a receiver fails the task."""
    job = get(job_id)
    if job is not None:
        job_final.send(sender=Job, job=job)
