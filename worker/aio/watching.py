"""Wait for jobs, and watch them change, without a thread for each waiting page."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress

from worker.aio.threads import in_thread
from worker.client import watching
from worker.client.jobs import Job
from worker.client.watching import Changes, Watched, checked_job_ids, watcher
from worker.client.workers import current_workers


async def wait(job_id: int, timeout: float | None = None) -> Job:  # the argument of `worker.wait`
    """Wait until a job is final and return it, like `worker.wait`."""
    async for job in changes([job_id], timeout=timeout):
        if job.final:
            return job
    raise AssertionError("unreachable: the changes end with a final job")


def changes(job_ids: int | Iterable[int], *, timeout: float | None = None) -> AsyncIterator[Job]:
    """Yield each of these jobs as it is now, and again whenever it changes, until all are final.

    Like `worker.changes`: all callers of a process share two looks per second at the database.

        async for job in aio.changes(job_id):
            await send(job.status)
    """
    ids = checked_job_ids(job_ids)
    return _changes_in_steps(ids, timeout) if current_workers().in_steps else _changes(ids, timeout)


async def _changes(job_ids: list[int], timeout: float | None) -> AsyncIterator[Job]:
    watched = Watched(job_ids, timeout)
    inbox: asyncio.Queue[Changes] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver(changed: Changes) -> None:
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(inbox.put_nowait, changed)

    with watcher.watching(watched.open, deliver):
        while watched.open:
            changed: Changes | None = None
            with suppress(TimeoutError):
                changed = await asyncio.wait_for(inbox.get(), watched.seconds_left())
            for job in watched.take(changed):
                yield job


async def _changes_in_steps(job_ids: list[int], timeout: float | None) -> AsyncIterator[Job]:
    changed_jobs = watching.changes(job_ids, timeout=timeout)
    while (job := await in_thread(next, changed_jobs, None)) is not None:
        yield job
