"""`worker.aio.changes`, `wait` and the other coroutines, on a real database."""

import asyncio
import threading
import time
from itertools import pairwise

import pytest
from sqlalchemy import Engine, event

import worker
from worker import JobNotFound, NotTrackable, WaitTimeout, aio
from worker.client.connection import cached_settings
from worker.store.engine import engine_for


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that the Python API uses."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return engine


def test_each_change_is_yielded_until_the_job_is_final(database: Engine) -> None:
    async def run() -> list[str]:
        job_id = await aio.track("1")
        states = []
        async for job in aio.changes(job_id, timeout=30):
            states.append(job.status)
            if not job.final:
                assert await aio.cancel(job_id)
        return states

    assert asyncio.run(run()) == ["pending", "cancelled"]


def test_two_hundred_pages_share_two_looks_a_second_and_need_no_thread_each(database: Engine) -> None:
    ids = worker.track_many([str(number) for number in range(1, 201)])
    begins: list[float] = []
    event.listen(engine_for(cached_settings().database), "begin", lambda _: begins.append(time.monotonic()))

    async def page(job_id: int) -> str:
        return [job.status async for job in aio.changes(job_id, timeout=60)][-1]

    async def run() -> tuple[list[float], int, list[str]]:
        pages = [asyncio.create_task(page(job_id)) for job_id in ids]
        while len(begins) < 3:
            await asyncio.sleep(0.05)
        looks, threads = list(begins), threading.active_count()
        for job_id in ids[:3]:
            worker.cancel(job_id)
        done = await asyncio.gather(*pages[:3])
        for task in pages[3:]:
            task.cancel()
        await asyncio.gather(*pages[3:], return_exceptions=True)
        return looks, threads, done

    threads_before = threading.active_count()
    looks, threads, done = asyncio.run(run())

    assert done == ["cancelled"] * 3
    assert min(later - earlier for earlier, later in pairwise(looks)) > 0.45
    assert threads <= threads_before + 2


def test_errors_are_those_of_the_functions(database: Engine) -> None:
    async def run() -> None:
        job_id = await aio.track("1")
        with pytest.raises(WaitTimeout, match=f"job {job_id} is still pending"):
            await aio.wait(job_id, timeout=0.1)
        with pytest.raises(JobNotFound):
            await aio.wait(4_711)
        with pytest.raises(NotTrackable):
            aio.changes("7")  # type: ignore[arg-type]  # what the test is about
        with pytest.raises(NotTrackable):
            await aio.get("7")  # type: ignore[arg-type]  # the same

    asyncio.run(run())


def test_jobs_are_found_and_changed(database: Engine) -> None:
    async def run() -> None:
        ready = {"status": "success", "id": 9, "output": ["https://cdn/1.png"]}
        job_id = await aio.track(ready, reference="order")
        job = await aio.get(reference="order")
        assert job is not None
        assert (job.id, [found.id for found in await aio.find(status="downloading")]) == (job_id, [job_id])
        output = await aio.get_output(job.outputs[0].id)
        assert output == job.outputs[0]
        with pytest.raises(worker.OutputMissing):
            await aio.open_output(job.outputs[0].id)
        assert await aio.cancel(job_id)
        assert not await aio.retry(job_id)
        assert (await aio.wait(job_id)).status == "cancelled"

    asyncio.run(run())
