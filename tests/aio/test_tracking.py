"""`worker.aio.track`: in the transaction of an asynchronous session on each database, and without blocking the loop."""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session

import worker
from tests.aio.engines import app_engine
from tests.waiting import wait_until
from worker import NotTrackable, aio
from worker.coordination.wakeups import WakeUps
from worker.store.schema import jobs

SLOW_SECONDS = 0.5  # of a wake-up in these tests
DUE_NOW: dict[str, Any] = {"submitted_at": datetime.now(UTC) - timedelta(hours=1), "deadline": 86_400}


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that the Python API uses."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return engine


def _count(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(jobs)).scalar_one()


def test_without_a_session_the_job_is_committed_at_once(database: Engine) -> None:
    tracked = asyncio.run(aio.track("1", reference=5))
    again = asyncio.run(aio.track("1"))
    assert (tracked.created, again.created, tracked == again) == (True, False, True)
    job = worker.get(tracked)
    assert job is not None
    assert job.reference == "5"


def test_the_job_is_committed_or_rolled_back_with_an_async_session(database: Engine) -> None:
    """Also in a savepoint of it."""

    async def run() -> list[int]:
        async with app_engine(database) as engine:
            async with AsyncSession(engine) as session:
                await aio.track("1", session=session)
                await session.rollback()
            counts = [_count(database)]
            async with AsyncSession(engine) as session, session.begin():
                await aio.track("1", session=session)
                savepoint = await session.begin_nested()
                await aio.track("2", session=session)
                await savepoint.rollback()
                async with session.begin_nested():
                    await aio.track_many(["3", "1"], session=session)
            return [*counts, _count(database)]

    assert asyncio.run(run()) == [0, 2]
    assert [job.remote_id for job in worker.find()] == ["3", "1"]


def test_the_job_is_committed_or_rolled_back_with_an_async_connection_and_a_scoped_session(database: Engine) -> None:
    async def run() -> None:
        async with app_engine(database) as engine:
            async with engine.connect() as connection:
                await aio.track("1", session=connection)
                await connection.rollback()
                await aio.track("2", session=connection)
                await connection.commit()
            scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
            await aio.track("3", session=scoped)
            await scoped.commit()
            await scoped.remove()

    asyncio.run(run())
    assert [job.remote_id for job in worker.find()] == ["3", "2"]


def test_psycopg_works_asynchronously_too(migrated_postgres: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", migrated_postgres.url.render_as_string(hide_password=False))

    async def run() -> int:
        async with app_engine(migrated_postgres, "postgresql+psycopg") as engine, AsyncSession(engine) as session:
            job_id = await aio.track("psycopg", session=session)
            await session.commit()
            return job_id

    job = worker.get(asyncio.run(run()))
    assert job is not None
    assert job.remote_id == "psycopg"


def test_ids_come_back_in_order_also_for_duplicates_in_different_parts(database: Engine) -> None:
    remotes = [str(number) for number in range(600, 0, -1)] + ["600", "1"]

    async def run() -> list[Any]:
        async with app_engine(database) as engine, AsyncSession(engine) as session, session.begin():
            return list(await aio.track_many(remotes, session=session))

    tracked = asyncio.run(run())

    assert [job.created for job in tracked] == [True] * 600 + [False] * 2
    assert tracked[600:] == [tracked[0], tracked[599]]
    assert {job.id: job.remote_id for job in worker.find(limit=1_000)} == dict(zip(tracked, remotes, strict=True))


def test_if_one_job_is_refused_none_is_tracked(database: Engine) -> None:
    async def run() -> None:
        async with app_engine(database) as engine, AsyncSession(engine) as session, session.begin():
            with pytest.raises(NotTrackable, match="'no good'"):
                await aio.track_many(["1", "no good"], session=session)

    asyncio.run(run())
    assert _count(database) == 0


def test_workers_are_woken_after_the_commit_and_not_on_the_event_loop(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis may be slow to answer."""
    counts: list[int] = []

    def send(_: WakeUps) -> None:
        time.sleep(SLOW_SECONDS)
        counts.append(_count(database))

    monkeypatch.setattr(WakeUps, "send", send)

    async def run() -> float:
        async with app_engine(database) as engine:
            for make in (AsyncSession, AsyncEngine.connect):
                async with make(engine) as session:
                    await aio.track("1", session=session, **DUE_NOW)
                    await session.rollback()
                    await asyncio.sleep(SLOW_SECONDS + 0.1)
                    assert counts == []
            gaps = asyncio.create_task(_longest_gap(2.5 * SLOW_SECONDS))
            async with AsyncSession(engine) as session, session.begin():
                await aio.track("1", session=session, **DUE_NOW)
            async with engine.begin() as connection:
                await aio.track("2", session=connection, **DUE_NOW)
            return await gaps

    longest = asyncio.run(run())
    wait_until(lambda: len(counts) >= 2, "both wake-ups")

    assert counts == [1, 2] or counts == [2, 2]
    assert longest < SLOW_SECONDS


async def _longest_gap(seconds: float) -> float:
    """Return the longest time in which the event loop did not run this."""
    longest, before = 0.0, time.monotonic()
    until = before + seconds
    while before < until:
        await asyncio.sleep(0.001)
        now = time.monotonic()
        longest, before = max(longest, now - before), now
    return longest


@pytest.mark.parametrize(
    ("session", "message"),
    [
        (Session, "session must be an AsyncSession or AsyncConnection, not of type type"),
        (Session(), "not of type Session: write `await aio.track(…, session=async_session)`, or call `worker.track"),
        (async_sessionmaker(), "not of type async_sessionmaker"),
        ("session", "not of type str"),
    ],
)
def test_another_kind_of_session_is_refused_with_the_line_to_write(
    sqlite_engine: Engine, session: Any, message: str
) -> None:
    with pytest.raises(NotTrackable) as refused:
        asyncio.run(aio.track("1", session=session))
    assert message in str(refused.value)


async def _as_session(engine: AsyncEngine, use: Callable[[Any], None]) -> None:
    async with AsyncSession(engine) as session, engine.connect() as connection:
        use(session)
        use(connection)


def test_track_refuses_an_asynchronous_session_and_names_aio(database: Engine) -> None:
    refusals: list[str] = []

    def use(session: AsyncSession | AsyncConnection) -> None:
        with pytest.raises(NotTrackable) as refused:
            worker.track("1", session=session)  # type: ignore[arg-type]  # what the test is about
        refusals.append(str(refused.value))

    async def run() -> None:
        async with app_engine(database) as engine:
            await _as_session(engine, use)

    asyncio.run(run())
    assert refusals == [
        "session is of type AsyncSession: write `await worker.aio.track(…, session=session)`",
        "session is of type AsyncConnection: write `await worker.aio.track(…, session=session)`",
    ]
    assert create_engine is not None
