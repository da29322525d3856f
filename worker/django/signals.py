"""The signal that a job is final. It is sent by the task `fetch_worker.job_final`; see `worker.django.tasks`."""

from django.dispatch import Signal

job_final = Signal()  # with `job`, a `worker.Job`; the sender is `worker.Job`
