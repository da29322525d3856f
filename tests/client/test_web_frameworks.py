"""`track` in the transactions of real web frameworks, and next to a running event loop."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from fastapi import FastAPI
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine, String, create_engine, func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import worker
from tests.apps import asgi
from tests.rows import add_downloading, add_output
from tests.servers import celery_worker
from worker import track, wait
from worker.client.connection import loaded_settings
from worker.errors import WaitTimeout, WorkerError
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.schema import jobs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that the Python API uses."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return engine


def remote_ids(engine: Engine) -> list[str]:
    """Return the remote ids of all committed jobs."""
    with engine.connect() as connection:
        return sorted(connection.execute(select(jobs.c.remote_id)).scalars())


@pytest.fixture
def flask_db(database: Engine) -> Iterator[tuple[SQLAlchemy, Any]]:
    """Flask-SQLAlchemy on the same database, with a table of the app."""

    class Base(DeclarativeBase):
        pass

    db = SQLAlchemy(model_class=Base)

    class Order(db.Model):  # type: ignore[name-defined, misc]  # as Flask-SQLAlchemy requires
        __tablename__ = "shop_orders"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(String(64))

    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = database.url
    db.init_app(app)
    with app.app_context():
        db.create_all()
        yield db, Order
        db.session.remove()
        db.drop_all()
        db.engine.dispose()


def test_a_job_tracked_in_a_flask_session_is_committed_with_the_rows_of_the_app(
    database: Engine, flask_db: tuple[SQLAlchemy, Any]
) -> None:
    db, order = flask_db

    db.session.add(order(name="a"))
    track({"status": "processing", "id": 1}, session=db.session)
    db.session.rollback()
    assert remote_ids(database) == []
    db.session.add(order(name="b"))
    track({"status": "processing", "id": 2}, session=db.session)
    assert db.session.scalar(select(func.count()).select_from(jobs)) == 1, "the transaction of the app sees the job"
    db.session.commit()

    assert remote_ids(database) == ["2"]
    assert db.session.scalars(select(order.name)).all() == ["b"]


DJANGO = """
import json, os, sys
from django.conf import settings

settings.configure(DATABASES={"default": json.loads(sys.argv[1])}, USE_TZ=True)
import django

django.setup()
from django.db import connection, transaction
from worker import get, track

orders = []
with connection.cursor() as cursor:
    cursor.execute("CREATE TABLE shop_orders (name varchar(64))")


def order(answer, *, fails):
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("INSERT INTO shop_orders VALUES (%s)", [answer["id"]])
            transaction.on_commit(lambda: orders.append(track(answer)))
            if fails:
                raise LookupError("sold out")
    except LookupError:
        pass


order(json.loads(sys.argv[2]), fails=True)
order(json.loads(sys.argv[3]), fails=False)
with connection.cursor() as cursor:
    cursor.execute("SELECT name FROM shop_orders")
    names = [row[0] for row in cursor.fetchall()]
    cursor.execute("SELECT remote_id, status FROM fetch_jobs")  # in the same database as the tables of the app
    print(json.dumps({"names": names, "jobs": cursor.fetchall(), "ids": orders}))
"""


def django_orders(engine: Engine, folder: Path, refused: dict[str, Any], committed: dict[str, Any]) -> dict[str, Any]:
    """Run a Django process that rolls back one order and commits another. Return the rows in its database."""
    url = engine.url
    names = {"NAME": url.database, "USER": url.username, "HOST": url.host, "PORT": url.port}
    database = {"ENGINE": f"django.db.backends.{'sqlite3' if url.get_backend_name() == 'sqlite' else 'postgresql'}"}
    database |= {name: str(value) for name, value in names.items() if value}
    process = subprocess.run(
        [sys.executable, "-c", DJANGO, json.dumps(database), json.dumps(refused), json.dumps(committed)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    rows: dict[str, Any] = json.loads(process.stdout)
    return rows


@pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)
def test_a_job_tracked_in_on_commit_exists_only_after_a_commit(database: Engine, tmp_path: Path) -> None:
    try:
        rows = django_orders(
            database, tmp_path, {"status": "processing", "id": "1"}, {"status": "processing", "id": "2"}
        )
    finally:
        with database.begin() as connection:
            connection.execute(text("DROP TABLE IF EXISTS shop_orders"))

    assert rows["names"] == ["2"]
    assert rows["jobs"] == [["2", "pending"]]
    assert len(rows["ids"]) == 1
    assert remote_ids(database) == ["2"]


@pytest.mark.server
@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_rolled_back_jobs_are_never_polled_and_committed_jobs_within_a_second(
    database: Engine, flask_db: tuple[SQLAlchemy, Any], tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    db, _ = flask_db
    plain = create_engine(database.url)  # an engine of the app, without the settings of the worker
    with Sandbox(SandboxOptions(key="k", min_seconds=60, max_seconds=60, size=16)) as api:
        settings = {"REDIS_URL": redis_url, "SD_API_URL": api.url, "SD_API_KEY": "k", "POLL_MIN": "30"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        loaded_settings.cache_clear()
        refused, committed = (
            [api.submit(f"{word} {number}") for number in range(3)] for word in ("refused", "committed")
        )
        with celery_worker(tmp_path, "--queues", "fetch-worker,fetch-worker.polls"), due_times(database) as due:
            with Session(plain) as session:
                track(refused[0], session=session)
                session.rollback()
                track(committed[0], session=session)
                session.commit()
            track(refused[1], session=db.session)
            db.session.rollback()
            track(committed[1], session=db.session)
            db.session.commit()
            db.session.execute(text("DROP TABLE shop_orders"))
            db.session.commit()
            django_orders(database, tmp_path, refused[2], committed[2])
            polled = polled_at(database, 3)
    plain.dispose()

    assert sorted(due) == sorted(str(job["id"]) for job in committed)
    late = {remote_id: (polled[remote_id] - due[remote_id]).total_seconds() for remote_id in due}
    print("polled after due, in seconds:", late)
    assert all(seconds <= 1.0 for seconds in late.values()), late
    assert not [job["id"] for job in refused if api.calls.fetches[str(job["id"])]]


@contextmanager
def due_times(engine: Engine) -> Iterator[dict[str, datetime]]:
    """Collect the due time of each job before its first poll, in a thread, since a poll replaces it."""
    times: dict[str, datetime] = {}
    stop = threading.Event()
    not_polled = select(jobs.c.remote_id, jobs.c.due_at).where(jobs.c.claim_token.is_(None), jobs.c.polls == 0)

    def collect() -> None:
        while not stop.wait(0.02):
            with engine.connect() as connection:
                times.update({row.remote_id: row.due_at for row in connection.execute(not_polled)})

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        yield times
    finally:
        stop.set()
        thread.join()


def polled_at(engine: Engine, count: int) -> dict[str, datetime]:
    """Wait until `count` jobs were polled. Return the times."""
    deadline = time.monotonic() + 30
    while True:
        with engine.connect() as connection:
            rows = connection.execute(
                select(jobs.c.remote_id, jobs.c.asked_at).where(jobs.c.asked_at.is_not(None))
            ).all()
        if len(rows) >= count:
            return {row.remote_id: row.asked_at for row in rows}
        assert time.monotonic() < deadline, rows
        time.sleep(0.05)


# ── ASGI ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def table_locked(engine: Engine) -> Iterator[Callable[[], None]]:
    """Lock the table against writes. Yields a function that releases the lock."""
    with engine.connect() as connection:
        connection.execute(text("LOCK TABLE fetch_jobs IN EXCLUSIVE MODE"))
        yield connection.rollback


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_an_event_loop_runs_while_track_is_blocked_and_wait_waits(database: Engine) -> None:
    pending = track("1")

    async def app() -> tuple[float, bool, int]:
        with table_locked(database) as release:
            tracking = asyncio.create_task(asyncio.to_thread(track, "2"))
            waiting = asyncio.create_task(asyncio.to_thread(wait, pending, 1.5))
            longest, last, until = 0.0, time.monotonic(), time.monotonic() + 1.7
            while last < until:
                await asyncio.sleep(0.01)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            was_blocked = not tracking.done()
            with pytest.raises(WaitTimeout):
                await waiting
            release()
            return longest, was_blocked, await tracking

    longest, was_blocked, job_id = asyncio.run(app())

    assert was_blocked, "the lock must block it"
    assert longest < 1.0, "the event loop was blocked"
    job = worker.get(job_id)
    assert job is not None
    assert job.remote_id == "2"


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_a_fastapi_endpoint_that_tracks_does_not_block_others(database: Engine) -> None:
    app = FastAPI()

    @app.post("/orders/{remote_id}")
    def order(remote_id: str) -> int:  # a plain `def`: FastAPI runs it in a thread
        return track(remote_id)

    @app.get("/ping")
    async def ping() -> str:
        return "pong"

    answers: list[int] = []
    with asgi(app) as address:
        requests.get(f"{address}/ping", timeout=10)
        with table_locked(database) as release:
            thread = threading.Thread(
                target=lambda: answers.append(requests.post(f"{address}/orders/7", timeout=30).status_code)
            )
            thread.start()
            started = time.monotonic()
            while not is_blocked_by_lock(database):
                assert time.monotonic() < started + 20
                time.sleep(0.02)
            pings = [requests.get(f"{address}/ping", timeout=10).text for _ in range(10)]
            assert answers == []
            release()
        thread.join(30)

    assert pings == ['"pong"'] * 10
    assert answers == [200]
    assert remote_ids(database) == ["7"]


def is_blocked_by_lock(engine: Engine) -> bool:
    """Return whether a connection waits for a lock in this database."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with engine.connect() as connection:
        return bool(connection.execute(text(query)).scalar_one())


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_error_of_the_python_api_says_what_to_do(database: Engine, tmp_path: Path) -> None:
    """The message is understandable without knowledge of the code."""
    with database.begin() as connection:
        job_id = add_downloading(connection)
        waiting = add_output(connection, job_id, 0)
        failed = add_output(connection, job_id, 1, status="failed", due_at=None, error_code="gone")
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: worker.cancel(77), "`fetch-worker list`"),
        (lambda: worker.retry(77), "`fetch-worker list`"),
        (lambda: wait(77), "`fetch-worker list`"),
        (lambda: wait(job_id, 0), "it continues, so you can wait again"),
        (lambda: worker.open_output(77), "get(job_id).outputs"),
        (lambda: worker.output_url(waiting), "wait for its job"),
        (lambda: worker.output_url(failed), "call retry(job_id) to try again"),
        (lambda: track("1", submitted_at="noon"), "such as 2026-03-01T12:00:00Z"),
        (lambda: track("1", submitted_at=datetime(2026, 1, 1)), "for example datetime.now(UTC)"),
        (lambda: track("1", reference="a\x00"), "remove them"),
        (lambda: track("1", account="a b"), "letters, digits"),
        (lambda: track("1", fetch_url="https://evil.test/api/v3/fetch/1"), "SD_API_HOSTS"),
    ]
    for call, advice in calls:
        with pytest.raises(WorkerError) as raised:
            call()
        assert advice in str(raised.value)
