"""Look up jobs and outputs, and act on jobs. Each call runs in a thread."""

from collections.abc import Iterable
from typing import BinaryIO
from uuid import UUID

from worker.aio.threads import in_thread
from worker.client import actions, jobs
from worker.client.jobs import Job, Output


async def get(
    job_id: int | None = None,
    *,
    remote_id: str | int | None = None,
    reference: str | int | UUID | None = None,
    account: str | None = None,
) -> Job | None:
    """Return a job with its outputs, or `None`, like `worker.get`."""
    return await in_thread(jobs.get, job_id, remote_id=remote_id, reference=reference, account=account)


async def find(
    *,
    reference: str | int | UUID | None = None,
    status: str | Iterable[str] | None = None,
    account: str | None = None,
    limit: int = 50,
) -> list[Job]:
    """Return up to `limit` jobs with their outputs, newest first, like `worker.find`."""
    return await in_thread(jobs.find, reference=reference, status=status, account=account, limit=limit)


async def get_output(output_id: int) -> Output | None:
    """Return an output, or `None`, like `worker.get_output`."""
    return await in_thread(jobs.get_output, output_id)


async def open_output(output_id: int) -> BinaryIO:
    """Open a stored output as a binary file, like `worker.open_output`. Reading it blocks: read it in a thread, too."""
    return await in_thread(jobs.open_output, output_id)


async def cancel(job_id: int) -> bool:
    """Cancel a job, like `worker.cancel`."""
    return await in_thread(actions.cancel, job_id)


async def retry(job_id: int) -> bool:
    """Retry a failed or expired job, like `worker.retry`."""
    return await in_thread(actions.retry, job_id)
