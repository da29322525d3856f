"""`worker.aio.order`: in the transaction of an asynchronous session on each database."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

import worker
from tests.aio.engines import app_engine
from tests.rows import update_job
from worker import NotTrackable, aio

ENDPOINT = "v6/images/text2img"
PAYLOAD = {"prompt": "a lake at dawn"}


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that the Python API uses."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return engine


def _references() -> list[str | None]:
    return [job.reference for job in worker.find()]


def test_without_a_session_the_order_is_committed_at_once(database: Engine) -> None:
    ordered = asyncio.run(aio.order(ENDPOINT, PAYLOAD, reference=5, priority=3))

    job = worker.get(ordered)
    assert job is not None
    assert (job.status, job.reference, job.priority) == ("ordered", "5", 3)


def test_the_order_is_committed_or_rolled_back_with_an_async_session(database: Engine) -> None:
    """Also in a savepoint of it."""

    async def run() -> None:
        async with app_engine(database) as engine:
            async with AsyncSession(engine) as session:
                await aio.order(ENDPOINT, PAYLOAD, session=session, reference="undone")
                await session.rollback()
            async with AsyncSession(engine) as session, session.begin():
                await aio.order(ENDPOINT, PAYLOAD, session=session, reference="kept")
                savepoint = await session.begin_nested()
                await aio.order(ENDPOINT, PAYLOAD, session=session, reference="undone, too")
                await savepoint.rollback()

    asyncio.run(run())
    assert _references() == ["kept"]


def test_the_order_is_committed_or_rolled_back_with_a_connection_and_a_scoped_session(database: Engine) -> None:
    async def run() -> None:
        async with app_engine(database) as engine:
            async with engine.connect() as connection:
                await aio.order(ENDPOINT, PAYLOAD, session=connection, reference="undone")
                await connection.rollback()
                await aio.order(ENDPOINT, PAYLOAD, session=connection, reference="connection")
                await connection.commit()
            scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
            await aio.order(ENDPOINT, PAYLOAD, session=scoped, reference="scoped")
            await scoped.commit()
            await scoped.remove()

    asyncio.run(run())
    assert _references() == ["scoped", "connection"]


@pytest.mark.parametrize(
    ("payload", "options", "reason"),
    [
        ([], {}, "payload must be a mapping"),
        (PAYLOAD, {"account": "a b"}, "is not a valid account name"),
        (PAYLOAD, {"session": "session"}, "write `await aio.order(…, session=async_session)`, or call `worker.order"),
    ],
)
def test_a_wrong_argument_is_refused(
    configured_sqlite: Engine, payload: Any, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(NotTrackable) as refused:
        asyncio.run(aio.order(ENDPOINT, payload, **options))
    assert reason in str(refused.value)
    assert _references() == []


def test_order_refuses_an_asynchronous_session_and_names_aio(configured_sqlite: Engine) -> None:
    async def run() -> None:
        async with app_engine(configured_sqlite) as engine, AsyncSession(engine) as session:
            worker.order(ENDPOINT, PAYLOAD, session=session)  # type: ignore[arg-type]  # what the test is about

    with pytest.raises(NotTrackable, match=r"write `await worker\.aio\.order"):
        asyncio.run(run())


def test_an_uncertain_order_is_attached(database: Engine) -> None:
    job_id = worker.order(ENDPOINT, PAYLOAD)
    update_job(database, job_id, status="uncertain")

    assert asyncio.run(aio.attach(job_id, 12)) is True
    assert asyncio.run(aio.attach(job_id, 12)) is False

    job = worker.get(job_id)
    assert job is not None
    assert (job.status, job.remote_id) == ("pending", "12")
