"""Jobs in Flower: correct rows after restarts and errors, and a limited number of them."""

import ast
import json
import logging
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from celery import Celery
from celery.events.state import State
from flower.events import EventsState
from sqlalchemy import Engine, insert
from sqlalchemy.engine import make_url
from tornado.ioloop import IOLoop

from tests.flowers import flower
from tests.rows import STORED, add_downloading, add_job, add_output, job_values, read_job
from tests.servers import celery_worker, free_port
from worker import cancel, retry, track
from worker.core.flower_rows import FlowerJob
from worker.flower import job_rows
from worker.flower.job_rows import Feeder, JobRows, is_supported
from worker.sandbox import Answer, Sandbox, SandboxOptions
from worker.store.audit import actions_of
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs

KEY = "canary-key-3141592653"
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def flower_job(job_id: int, **changes: Any) -> FlowerJob:
    """Return a job as it is read from the database."""
    values: dict[str, Any] = {
        **{"id": job_id, "account": "default", "remote_id": str(job_id), "kind": "image", "reference": None},
        **{"status": "pending", "polls": 0, "last_answer": None, "submitted_at": NOW + timedelta(seconds=job_id)},
        **dict.fromkeys(("asked_at", "ready_at", "completed_at", "held_at", "error_code", "error_message")),
    }
    return FlowerJob(**(values | changes))


def final_job(job_id: int, status: str = "completed") -> FlowerJob:
    """Return a final job."""
    ended = NOW + timedelta(seconds=job_id + 60)
    return flower_job(job_id, status=status, polls=1, asked_at=ended, completed_at=ended, error_code="api_failed")


def show(rows: JobRows, *flower_jobs: FlowerJob) -> None:
    """Show only these jobs."""
    rows.put(rows.keep({job.id: job for job in flower_jobs}))


def add_finished_task(state: EventsState, uuid: str, worker: str = "celery@host") -> None:
    """Send Flower the events of a task that ran."""
    for clock, kind in enumerate(("received", "started", "succeeded"), 1):
        fields = {"uuid": uuid, "hostname": worker, "clock": clock, "name": "worker.download", "runtime": 0.1}
        state.event({"type": f"task-{kind}", "timestamp": 1.0, "local_received": 1.0, **fields})


# ── the rows in Flower's own state ────────────────────────────────────────────────────────────────────────────────────


def test_given_thousands_of_jobs_when_they_are_replaced_then_flower_keeps_only_the_shown_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_rows, "MAX_REMOVED", 500)
    state = EventsState(max_tasks_in_memory=10_000)
    rows, limit = JobRows(state), 200
    add_finished_task(state, "a")

    for newest in range(0, 5_000, limit):
        show(rows, *(final_job(job_id) for job_id in range(newest, newest + limit)))
        assert len(list(state.tasks_by_time())) == limit + 1

    assert len(state.tasks) == limit + 1
    assert len(state.search_engine.documents) == limit + 1
    assert len(state._taskheap) <= limit + 500 + limit + 3
    assert len(state.tasks_by_type["fetch-worker.job"]) == limit
    assert sum(map(len, state.tasks_by_worker.values())) == limit + 1
    assert len(state._tasks_to_resolve) == 0

    rows.clear()
    assert list(state.tasks) == list(state.search_engine.documents) == ["a"]


def test_given_a_job_in_any_state_when_its_state_changes_then_its_row_changes() -> None:
    """Celery ignores events that lead back to an earlier state, so rows are not updated by events."""
    state = EventsState()
    rows = JobRows(state)
    changes = [
        flower_job(1),
        final_job(1),
        flower_job(1, status="downloading"),
        final_job(1, "cancelled"),
        flower_job(1, polls=1),
        final_job(1, "failed"),
    ]
    changes += [flower_job(1, status="downloading"), final_job(1), flower_job(1, polls=2)]

    for job in changes:
        show(rows, job)
        task = state.tasks["job-1"]
        expected = {"pending": "STARTED" if job.polls else "RECEIVED", "downloading": "DOWNLOADING"} | {
            "completed": "SUCCESS",
            "cancelled": "REVOKED",
            "failed": "FAILURE",
        }
        assert task.state == expected[job.status]
        assert (task.runtime is None) == (job.completed_at is None)
        result = state.search_engine.search(state.tasks, f"state:{task.state} name:fetch-worker.job")
        assert result.task_ids == ["job-1"]


def test_jobs_belong_to_no_worker_and_are_not_in_the_counts_of_flower() -> None:
    state = EventsState()
    add_finished_task(state, "a")
    counted = {name: dict(kinds) for name, kinds in state.counter.items()}
    measured = [sample for metric in state.metrics.events.collect() for sample in metric.samples]

    show(JobRows(state), flower_job(1), final_job(2), flower_job(3, status="downloading"))

    assert list(state.workers) == ["celery@host"]
    assert [state.tasks[uuid].worker for uuid in ("job-1", "job-2", "job-3")] == [None, None, None]
    assert {name: dict(kinds) for name, kinds in state.counter.items()} == counted
    assert [sample for metric in state.metrics.events.collect() for sample in metric.samples] == measured


def test_given_a_full_flower_when_jobs_are_added_then_the_oldest_tasks_are_removed_and_jobs_return() -> None:
    state = EventsState(max_tasks_in_memory=5)
    rows = JobRows(state)
    show(rows, flower_job(1))
    for uuid in "abcde":
        add_finished_task(state, uuid)
    assert set(state.tasks) == set("abcde")

    show(rows, flower_job(1), flower_job(2))

    assert set(state.tasks) == {"c", "d", "e", "job-1", "job-2"}
    assert set(state.search_engine.documents) == set(state.tasks)


def test_an_unsupported_release_of_flower_is_not_changed(caplog: pytest.LogCaptureFixture) -> None:
    class Other:
        io_loop = None
        state = State()

    assert not is_supported(Other())
    assert "jobs are not shown in Flower: this release is not supported, it lacks io_loop.add_callback" in caplog.text


@pytest.fixture
def loop() -> Iterator[IOLoop]:
    """An event loop as Flower uses it, in a thread."""
    loops: list[IOLoop] = []
    running = threading.Event()

    def run() -> None:
        loops.append(IOLoop(make_current=False))
        loops[0].add_callback(running.set)
        loops[0].start()
        loops[0].close()

    thread = threading.Thread(target=run)
    thread.start()
    assert running.wait(10)
    yield loops[0]
    loops[0].add_callback(loops[0].stop)
    thread.join(10)


def test_given_any_database_when_refreshed_then_its_jobs_are_shown(engine: Engine, loop: IOLoop) -> None:
    state = EventsState()
    feeder = Feeder(lambda: engine, JobRows(state), loop, 2)
    with engine.begin() as connection:
        ids = [add_job(connection, str(number)) for number in range(3)]

    feeder.refresh()

    assert set(state.tasks) == {f"job-{job_id}" for job_id in ids[1:]}


def test_given_a_database_error_when_it_ends_then_jobs_are_shown_and_each_change_is_logged(
    engine: Engine, loop: IOLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(job_rows, "RETRY_SECONDS", 0.01)
    away = make_engine(make_url(f"postgresql+psycopg://postgres@127.0.0.1:{free_port()}/none"))
    engines = iter([away, away, away])
    shown = threading.Event()
    state = EventsState()
    rows = JobRows(state)

    def put_and_notify(flower_jobs: Sequence[FlowerJob]) -> None:
        JobRows.put(rows, flower_jobs)
        shown.set()

    monkeypatch.setattr(rows, "put", put_and_notify)
    feeder = Feeder(lambda: next(engines, engine), rows, loop, 2)
    with engine.begin() as connection:
        add_job(connection)

    with caplog.at_level(logging.WARNING):
        feeder.start()
        assert shown.wait(10)
        feeder.stop()

    assert len(state.tasks) == 1
    assert [record.message.split(":")[0] for record in caplog.records if record.name == "worker.flower.job_rows"] == [
        "jobs are not shown in Flower",
        "the database works again",
    ]


def test_given_an_unsupported_flower_when_refreshed_then_the_thread_ends_and_says_so(
    engine: Engine, loop: IOLoop, caplog: pytest.LogCaptureFixture
) -> None:
    with engine.begin() as connection:
        add_job(connection)
    state = EventsState()
    feeder = Feeder(lambda: engine, JobRows(state), loop, 2)
    state.search_engine.upsert = None

    with caplog.at_level(logging.ERROR):
        feeder._run()

    assert "jobs are no longer shown in Flower" in caplog.text


# ── a real Flower ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> Iterator[Engine]:
    """An empty SQLite database that DATABASE_URL names, and a broker."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    yield engine
    engine.dispose()


@pytest.fixture
def migrated(database: Engine) -> Engine:
    """A migrated database."""
    migrate(database)
    return database


def is_saved(folder: Path, text: bytes) -> bool:
    """Return whether Flower's file contains a text."""
    return any(text in path.read_bytes() for path in _files(folder))


def _files(folder: Path) -> list[Path]:
    return [path for path in (folder / "var").glob("flower*") if ".tmp" not in path.name]


def insert_job(engine: Engine, **changes: Any) -> int:
    """Insert a job."""
    with engine.begin() as connection:
        return add_job(connection, secrets.token_hex(4), **changes)


LONG_REFERENCE = f"order 5 für Ann, {'x' * 230}"
ENDED: dict[str, Any] = {"due_at": None, "completed_at": NOW + timedelta(seconds=30)}


def test_given_jobs_in_every_state_when_flower_runs_then_it_shows_each_job(migrated: Engine, tmp_path: Path) -> None:
    with migrated.begin() as connection:
        add_job(connection, "12202888", reference=LONG_REFERENCE)
        add_job(connection, "sha256:7777", polls=3, asked_at=NOW, last_answer="4.0 s: processing")
        add_job(connection, "r3", held_at=NOW)
        job = add_downloading(connection, "r4")
        add_output(connection, job, 0, size_bytes=1_500, **STORED)
        add_output(connection, job, 1)
        job = add_downloading(connection, "r5", status="completed", completed_at=NOW + timedelta(seconds=30))
        add_output(connection, job, 0, size_bytes=391_002, **STORED)
        add_job(connection, "r6", status="failed", error_code="api_failed", error_message="no such model", **ENDED)
        add_job(connection, "r7", status="expired", error_code="expired", error_message="late", **ENDED)
        add_job(connection, "r8", status="cancelled", **ENDED)

    with flower(tmp_path) as shown:
        shown.until(lambda: len(shown.tasks()) == 8)
        tasks = shown.tasks()
        searched = shown.tasks("search=state:DOWNLOADING")
        searches: tuple[str, ...] = ("kwargs:id=6", "kwargs:remote_id=r8", f'kwargs:"reference={LONG_REFERENCE}"')
        searches += ("12202888", '"für Ann"', "sha256:77")
        search_results = [set(shown.tasks(f"search={quote(search)}")) for search in searches]
        pages = [shown.page(f"/task/{uuid}") for uuid in tasks]
        types = shown.page("/api/task/types")
        measured = shown.page("/metrics")
        retry(6)
        shown.until(lambda: shown.states()["job-6"] == "RECEIVED")
        retried = shown.tasks()["job-6"]
        cancel(4)
        shown.until(lambda: shown.states()["job-4"] == "REVOKED")

    assert {uuid: (task["state"], task["result"]) for uuid, task in tasks.items()} == {
        "job-1": ("RECEIVED", None),
        "job-2": ("STARTED", "polled 3 times: processing"),
        "job-3": ("RECEIVED", "held by an operator since 2026-03-01 12:00 UTC"),
        "job-4": ("DOWNLOADING", "1 of 2 outputs stored, 1,500 bytes"),
        "job-5": ("SUCCESS", "1 output stored, 391,002 bytes"),
        "job-6": ("FAILURE", "api_failed"),
        "job-7": ("FAILURE", "expired"),
        "job-8": ("REVOKED", None),
    }
    first = tasks["job-1"]
    assert (first["args"], first["received"]) == (f"('12202888', '{LONG_REFERENCE[:39]}…')", NOW.timestamp())
    assert ast.literal_eval(first["kwargs"]) == {
        **{"id": 1, "remote_id": "12202888", "account": "default", "kind": "image", "reference": LONG_REFERENCE}
    }
    assert (tasks["job-5"]["runtime"], tasks["job-6"]["exception"]) == (30.0, "api_failed: no such model")
    assert set(searched) == {"job-4"}
    assert search_results == [{"job-6"}, {"job-8"}, {"job-1"}, {"job-1"}, {"job-1"}, {"job-2"}]
    assert all("fetch-worker.job" in page for page in pages)
    assert "fetch-worker.job" in types
    assert "fetch-worker.job" not in measured
    assert (retried["exception"], retried["failed"], retried["runtime"]) == (None, None, None)
    assert "Traceback" not in shown.log.read_text()


def test_given_flower_was_killed_when_it_runs_again_then_it_shows_the_current_state_of_the_jobs(
    migrated: Engine, tmp_path: Path
) -> None:
    for status in ("failed", "failed", "expired"):
        insert_job(migrated, status=status, error_code="api_failed", **ENDED)
    with flower(tmp_path, FLOWER_STATE_SAVE_INTERVAL="200") as shown:
        shown.until(lambda: len(shown.tasks()) == 3)
        shown.until(lambda: is_saved(tmp_path, b"job-2"))
        shown.kill()
    retry(1)
    with migrated.begin() as connection:
        connection.execute(jobs.delete().where(jobs.c.id == 2))
    new = insert_job(migrated)
    expected = {"job-1": "RECEIVED", "job-3": "FAILURE", f"job-{new}": "RECEIVED"}

    with flower(tmp_path) as stale:
        stale.until(lambda: stale.states() == expected)
        stale.kill()
    for path in _files(tmp_path):
        path.unlink()
    with flower(tmp_path) as empty:
        empty.until(lambda: empty.states() == expected)


def test_given_saved_jobs_when_flower_jobs_is_0_then_none_is_shown(migrated: Engine, tmp_path: Path) -> None:
    insert_job(migrated)
    with flower(tmp_path, FLOWER_STATE_SAVE_INTERVAL="200") as shown:
        shown.until(lambda: len(shown.tasks()) == 1)
        shown.until(lambda: is_saved(tmp_path, b"job-1"))
        shown.kill()

    with flower(tmp_path, FLOWER_JOBS="0") as off:
        assert off.states() == {}


def test_given_no_tables_when_flower_runs_then_it_logs_it_once_and_later_shows_up_to_the_limit(
    database: Engine, tmp_path: Path
) -> None:
    with flower(tmp_path, FLOWER_JOBS="50") as shown:
        shown.until(lambda: "jobs are not shown in Flower" in shown.log.read_text())
        assert shown.tasks() == {}
        migrate(database)
        with database.begin() as connection:
            connection.execute(insert(jobs), [job_values(f"r{number}") for number in range(3_000)])
        shown.until(lambda: len(shown.tasks()) > 0)
        first = set(shown.tasks())
        insert_job(database)
        shown.until(lambda: "job-3001" in shown.tasks())
        second = set(shown.tasks())

    assert first == {f"job-{number}" for number in range(2_951, 3_001)}
    assert len(second) == 50
    log = shown.log.read_text()
    assert log.count("jobs are not shown in Flower") == 1
    assert "run `fetch-worker migrate`" in log
    assert "jobs are shown in Flower again" in log


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch, migrated: Engine) -> Callable[[float], Sandbox]:
    """Return a function that makes a stand-in whose jobs take `seconds`, and sets the settings for it."""

    def make(seconds: float) -> Sandbox:
        server = Sandbox(SandboxOptions(key=KEY, min_seconds=seconds, max_seconds=seconds, size=32))
        monkeypatch.setenv("SD_API_URL", server.url)
        monkeypatch.setenv("SD_API_KEY", KEY)
        monkeypatch.setenv("OUTPUT_ALLOWED_NETWORKS", "127.0.0.0/8")
        monkeypatch.setenv("POLL_MIN", "0.2")
        return server

    return make


def test_given_a_real_worker_when_jobs_run_then_their_rows_follow_and_no_page_has_the_key(
    migrated: Engine, sandbox: Callable[[float], Sandbox], tmp_path: Path
) -> None:
    with sandbox(0.5) as server, celery_worker(tmp_path), flower(tmp_path) as shown:
        good = track(server.submit("a forest at dawn", samples=2), eta=0.2, reference=f"order 5 {KEY}")
        submitted = server.submit("a lake", samples=1)
        body = json.dumps({"status": "failed", "message": f"no lake for {KEY}"}).encode()
        server.script(submitted["id"], [Answer(200, {"Content-Type": "application/json"}, body)] * 9)
        bad = track(submitted, eta=0.2)
        unwanted = track("424242", eta=3_000, submitted_at=datetime.now(UTC))
        shown.until(lambda: f"job-{unwanted}" in shown.tasks())
        shown.page(f"/api/task/revoke/job-{unwanted}?terminate=true", post=True)
        expected = {f"job-{good}": "SUCCESS", f"job-{bad}": "FAILURE", f"job-{unwanted}": "REVOKED"}
        shown.until(lambda: shown.states() == expected)
        tasks = shown.tasks("")
        polls = read_job(migrated, bad).polls
        shown.page("/api/task/async-apply/worker.retry", post=True, body=json.dumps({"args": [bad]}))
        shown.until(lambda: read_job(migrated, bad).polls > polls)
        paths = ["/", "/tasks", "/broker", "/api/tasks", "/metrics", *(f"/task/{uuid}" for uuid in tasks)]
        pages = {path: shown.page(path) for path in paths}
        shown.until(lambda: "celery@" in shown.page("/workers?json=1"))
        workers = json.loads(shown.page("/workers?json=1"))["data"]
    with migrated.connect() as connection:
        actions = [(action.source, action.who, action.action) for action in actions_of(connection, unwanted)]

    assert actions == [("flower", "viewer", "cancel")]
    assert tasks[f"job-{good}"]["result"].startswith("2 outputs stored, ")
    assert tasks[f"job-{bad}"]["exception"] == "api_failed: no lake for [key]"
    assert [path for path, page in pages.items() if KEY in page] == []
    assert len(workers) == 1
    assert "Traceback" not in shown.log.read_text()


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_given_a_long_poll_run_when_it_continues_then_flower_shows_its_progress(
    pool: str,
    sandbox: Callable[[float], Sandbox],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    redis_url: str,
) -> None:
    monkeypatch.setenv("SD_API_RPS", "5")
    with (
        sandbox(60.0) as server,
        flower(tmp_path, FLOWER_JOBS="0") as shown,
        celery_worker(tmp_path, "--pool", pool, "--concurrency", "2", "--hostname", f"{pool}@%h") as worker,
        Celery("web-app", broker=redis_url, set_as_current=False) as client,
    ):
        for number in range(40):
            track(server.submit(f"a city, {number}"), eta=0.1)
        client.send_task("worker.poll", queue="fetch-worker.polls")
        shown.until(lambda: shown.tasks("search=state:PROGRESS") != {})
        (task,) = shown.tasks("search=state:PROGRESS").values()
        page = shown.page(f"/task/{task['uuid']}")
        worker.send_signal(signal.SIGQUIT)  # ends at once: a run may take ten seconds

    assert re.fullmatch(r"asked \d+: \d+ not ready; \d+ in flight", task["result"]), task["result"]
    assert task["name"] == "worker.poll"
    assert task["worker"].startswith(f"{pool}@")
    assert "in flight" in page


def test_given_no_broker_when_a_run_reports_progress_then_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    script = """
from celery.app.task import Context
from worker.polling.poller import PollReport
from worker.app import app
from worker.process.resources import process_resources
from worker.process.runs import ProgressEvents
app.conf.broker_transport_options |= {"max_retries": 1, "interval_start": 0}
tell = ProgressEvents(Context(id="some", hostname="host"))
tell(PollReport(), 0)
tell(PollReport(), 0)
print(process_resources().publisher.finish(10), tell._sending)
"""

    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)

    assert (process.stdout, process.stderr) == ("True False\n", "")
