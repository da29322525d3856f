"""From the commit of a job to its first request, for each kind of session, with a real worker process."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import worker
from tests import servers
from tests.django.test_django import REPOSITORY, django_settings
from tests.rows import read_job
from tests.waiting import wait_until
from worker import aio
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.engine import make_engine
from worker.store.migrate import migrate

KEY = "a-key-of-the-sandbox"
DRIVERS = {"postgresql": "postgresql+asyncpg", "sqlite": "sqlite+aiosqlite", "mariadb": "mysql+aiomysql"}
DUE_NOW: dict[str, Any] = {"submitted_at": datetime.now(UTC) - timedelta(hours=1), "deadline": 86_400}
HOLD_SECONDS = 1.2  # of each transaction: a worker looks for due jobs each second, also without a wake-up
MOST_SECONDS = 1.0  # from the commit, or from the due time if that is later, to the first request
ROUNDS = 3  # the best counts: on a busy machine a single one says little

Ended = Callable[[Engine, str, bool], float]


class Deployment(NamedTuple):
    """A database, the stand-in, and the environment of the worker that polls them."""

    engine: Engine
    sandbox: Sandbox
    environment: dict[str, str]

    def order(self) -> str:
        """Order a picture, and return its remote id."""
        return str(self.sandbox.submit("a lake at dawn", samples=1)["id"])

    def requests(self, remote_id: str) -> list[float]:
        """Return the moments of the requests about a job."""
        return [moment for moment, job in list(self.sandbox.calls.fetch_moments) if job == remote_id]

    def first_request(self, remote_id: str) -> float:
        """Wait for the first request about a job, and return its moment."""
        wait_until(lambda: self.requests(remote_id), f"a request about {remote_id}")
        return self.requests(remote_id)[0]


@pytest.fixture(
    scope="module",
    params=["postgresql", *(pytest.param(name, marks=pytest.mark.long) for name in ("sqlite", "mariadb"))],
)
def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, redis_url: str
) -> Iterator[Deployment]:
    """A worker process that polls, for all tests on one kind of database."""
    folder = tmp_path_factory.mktemp("worker")
    if request.param == "sqlite":
        engine = make_engine(make_url(f"sqlite:///{folder}/app.db"))
        migrate(engine)
    else:
        engine = request.getfixturevalue("migrated_postgres" if request.param == "postgresql" else "migrated_mariadb")
    with Sandbox(SandboxOptions(key=KEY, min_seconds=0.0, max_seconds=0.1, size=32)) as sandbox:
        environment = {
            "DATABASE_URL": engine.url.render_as_string(hide_password=False),
            "REDIS_URL": redis_url,
            "SD_API_URL": sandbox.url,
            "SD_API_KEY": KEY,
            "LOG_FORMAT": "text",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            with servers.celery_worker(folder, "--queues", "fetch-worker,fetch-worker.polls", "--pool", "threads"):
                yield Deployment(engine, sandbox, environment)


@pytest.fixture
def deployment(started: Deployment, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """The deployment, with its settings in the environment of the test."""
    for name, value in started.environment.items():
        monkeypatch.setenv(name, value)
    return started


# ── each kind of session: track, keep the transaction open, end it, and return when it was ended ──────────────────────


def _hold_and(end: Callable[[], object]) -> float:
    time.sleep(HOLD_SECONDS)
    moment = time.time()
    end()
    return moment


def session(engine: Engine, remote_id: str, commits: bool) -> float:
    with Session(engine) as own:
        worker.track(remote_id, session=own, **DUE_NOW)
        return _hold_and(own.commit if commits else own.rollback)


def scoped(engine: Engine, remote_id: str, commits: bool) -> float:
    own = scoped_session(sessionmaker(engine))
    worker.track(remote_id, session=own, **DUE_NOW)
    moment = _hold_and(own.commit if commits else own.rollback)
    own.remove()
    return moment


def connection(engine: Engine, remote_id: str, commits: bool) -> float:
    with engine.connect() as own:
        worker.track(remote_id, session=own, **DUE_NOW)
        return _hold_and(own.commit if commits else own.rollback)


@asynccontextmanager
async def _async_engine(engine: Engine) -> AsyncIterator[AsyncEngine]:
    own = create_async_engine(engine.url.set(drivername=DRIVERS[engine.url.get_backend_name()]))
    try:
        yield own
    finally:
        await own.dispose()


async def _hold_and_await(end: Callable[[], Awaitable[object]]) -> float:
    await asyncio.sleep(HOLD_SECONDS)
    moment = time.time()
    await end()
    await asyncio.sleep(MOST_SECONDS)  # the loop of an app goes on: the wake-up is sent beside it
    return moment


def async_session(engine: Engine, remote_id: str, commits: bool) -> float:
    async def run() -> float:
        async with _async_engine(engine) as app_engine, AsyncSession(app_engine) as own:
            await aio.track(remote_id, session=own, **DUE_NOW)
            return await _hold_and_await(own.commit if commits else own.rollback)

    return asyncio.run(run())


def async_connection(engine: Engine, remote_id: str, commits: bool) -> float:
    async def run() -> float:
        async with _async_engine(engine) as app_engine, app_engine.connect() as own:
            await aio.track(remote_id, session=own, **DUE_NOW)
            return await _hold_and_await(own.commit if commits else own.rollback)

    return asyncio.run(run())


# ── tests ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ended", [session, scoped, connection, async_session, async_connection])
def test_the_first_request_follows_the_commit_of_each_kind_of_session(deployment: Deployment, ended: Ended) -> None:
    """No request comes before the commit, and none after a rollback."""
    engine = create_engine(deployment.engine.url)  # the app's own
    rolled_back = deployment.order()
    ended(engine, rolled_back, False)

    seconds = []
    for _ in range(ROUNDS):
        remote_id = deployment.order()
        committed_at = ended(engine, remote_id, True)
        seconds.append(deployment.first_request(remote_id) - committed_at)
    engine.dispose()

    _check(deployment, ended.__name__, seconds, rolled_back)


def test_the_first_request_follows_the_commit_of_an_atomic_block(deployment: Deployment) -> None:
    committed, rolled_back = [deployment.order() for _ in range(ROUNDS)], deployment.order()
    process = subprocess.run(
        [sys.executable, "-m", "tests.django.project", "first_requests"],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "PROJECT_DATABASES": json.dumps({"default": django_settings(deployment.engine.url)}),
            "PROJECT_REMOTE_IDS": json.dumps([rolled_back, *committed]),
            "PROJECT_HOLD_SECONDS": str(HOLD_SECONDS),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    moments = json.loads(process.stdout.splitlines()[-1])

    seconds = [deployment.first_request(name) - moments[name] for name in committed]

    _check(deployment, "atomic", seconds, rolled_back)


def test_the_first_request_follows_the_due_time_of_a_new_job(deployment: Deployment) -> None:
    """Without a session, and not due at once: no wake-up is sent."""
    seconds = []
    for _ in range(ROUNDS):
        remote_id = deployment.order()
        due_at = read_job(deployment.engine, worker.track(remote_id)).due_at
        seconds.append(deployment.first_request(remote_id) - due_at.timestamp())

    _check(deployment, "due later", seconds, deployment.order())


def _check(deployment: Deployment, name: str, seconds: list[float], never_tracked: str) -> None:
    print(f"{deployment.engine.dialect.name} {name}: {', '.join(f'{value * 1e3:.0f} ms' for value in seconds)}")
    assert min(seconds) > 0, seconds
    assert min(seconds) < MOST_SECONDS, seconds
    assert deployment.requests(never_tracked) == []
