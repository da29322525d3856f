"""`get(…).progress()` on real databases: an estimate from the learned pace, with at most one query."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event, update

import worker
from tests.rows import add_downloading
from worker import Job
from worker.client import pace_models
from worker.client.connection import cached_settings
from worker.core.pacing.policy import PacedJob
from worker.polling.duration_learner import DurationLearner
from worker.store.engine import engine_for
from worker.store.schema import jobs, orders

HOUR = timedelta(hours=1)


@pytest.fixture(autouse=True)
def empty_model_cache() -> None:
    pace_models.clear_cache()


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that the Python API uses."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return engine


def teach(engine: Engine, *, kind: str, seconds: float, jobs_seen: int = 60) -> None:
    """Store the learned pace of a kind: its jobs take `seconds`."""
    learner = DurationLearner(engine)
    learner.prepare([("default", kind)])
    for _ in range(jobs_seen):
        learner.observe("default", kind, PacedJob(seconds, seconds * 0.97), ready=True, planned=seconds)
    learner.share()


def existing_job(job_id: int) -> Job:
    """Return a job that must exist."""
    job = worker.get(job_id)
    assert job is not None
    return job


@contextmanager
def statements(job: Job) -> Iterator[list[str]]:
    """Collect the SQL statements of the Python API, except BEGIN."""
    queries: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        queries.append(statement)

    engine = engine_for(cached_settings().database)
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield queries
    finally:
        event.remove(engine, "before_cursor_execute", note)


def test_progress_uses_the_durations_of_the_kind_and_the_age_of_the_job(database: Engine) -> None:
    teach(database, kind="slow", seconds=100.0)
    now = datetime.now(UTC)
    new = worker.track("1", kind="slow")
    older = worker.track("2", kind="slow", submitted_at=now - timedelta(seconds=70))
    late = worker.track("3", kind="slow", submitted_at=now - timedelta(seconds=600))
    with database.begin() as connection:
        asked_at = now - timedelta(seconds=1)
        connection.execute(update(jobs).where(jobs.c.id.in_([older, late])).values(not_ready_at=asked_at))

    progress = {job_id: existing_job(job_id).progress() for job_id in (new, older, late)}

    assert all(estimate.phase == "waiting" for estimate in progress.values())
    assert progress[new].median_seconds == pytest.approx(97.0, abs=15.0)
    assert progress[older].median_seconds == pytest.approx(28.0, abs=15.0)
    assert progress[new].fraction < progress[older].fraction < progress[late].fraction < 0.9
    assert (progress[late].p90_seconds or 3_600.0) > 60.0


def test_progress_of_an_unknown_kind_is_uncertain_and_json_compatible(database: Engine) -> None:
    progress = existing_job(worker.track("1")).progress()

    assert asdict(progress).keys() == {"chance", "median_seconds", "p90_seconds", "phase", "fraction", "before"}
    assert progress.before is None
    assert progress.median_seconds is not None
    assert progress.p90_seconds is not None
    assert progress.p90_seconds > 5 * progress.median_seconds
    assert progress.chance < 0.5


def test_progress_of_ready_and_final_jobs(database: Engine) -> None:
    with database.begin() as connection:
        ready = add_downloading(connection, "9")
    cancelled = worker.track("8")
    worker.cancel(cancelled)

    with statements(existing_job(ready)) as queries:
        estimates = [existing_job(ready).progress(), existing_job(cancelled).progress()]

    assert [estimate.phase for estimate in estimates] == ["downloading", "final"]
    assert all(
        (estimate.chance, estimate.median_seconds, estimate.p90_seconds) == (1.0, 0.0, 0.0) for estimate in estimates
    )
    assert not any("fetch_paces" in query for query in queries), "no pace is needed"


def test_progress_makes_one_query_and_then_uses_the_cache(database: Engine) -> None:
    job = existing_job(worker.track("1", kind="image"))
    pace_models.clear_cache()

    with statements(job) as first:
        job.progress()
    with statements(job) as later:
        for _ in range(20):
            job.progress()

    assert sum("fetch_paces" in query for query in first) == 1
    assert later == []


def test_progress_is_computed_for_the_time_of_reading_by_the_database_clock(database: Engine) -> None:
    job = existing_job(worker.track("1", kind="image"))

    assert abs((job.read_at - job.submitted_at).total_seconds()) < 5.0
    assert job.progress() == job.progress()


# ── orders ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def ordered(number: int, **options: Any) -> int:
    """Order a job whose kind is `picture`."""
    return worker.order("v6/images/text2img", {"prompt": str(number)}, kind="picture", **options)


def test_progress_of_an_order_is_its_place_in_the_queue_and_the_time_of_its_kind(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_API_SLOTS", '{"shop": 2}')
    teach(database, kind="picture", seconds=10.0)
    ids = [ordered(number) for number in range(12)]
    urgent = ordered(12, priority=5)
    in_shop = [ordered(number, account="shop") for number in range(3)]

    first, last, best = (existing_job(job_id).progress() for job_id in (ids[0], ids[-1], urgent))

    assert [(estimate.phase, estimate.fraction, estimate.chance) for estimate in (first, last, best)] == [
        ("ordered", 0.0, 0.0)
    ] * 3
    assert (first.before, last.before, best.before) == (1, 12, 0)
    assert first.median_seconds == best.median_seconds == pytest.approx(10.0, abs=2.0)
    assert last.median_seconds == pytest.approx(8 * 10.0 / 5 + 10.0, abs=4.0)  # 5 slots are free: 8 must end first
    assert (last.p90_seconds or 0.0) > (last.median_seconds or 0.0)
    assert [existing_job(job_id).progress().before for job_id in in_shop] == [0, 1, 2]


def test_progress_of_an_order_counts_the_slots_that_are_taken(database: Engine) -> None:
    teach(database, kind="picture", seconds=10.0)
    ids = [ordered(number) for number in range(6)]
    with database.begin() as connection:
        connection.execute(update(orders).where(orders.c.id.in_(ids[:5])).values(takes_slot=True, due_at=None))

    waiting, being_sent = existing_job(ids[5]).progress(), existing_job(ids[0]).progress()

    assert waiting.before == 0
    assert waiting.median_seconds == pytest.approx(10.0 / 5 + 10.0, abs=3.0)
    assert being_sent.before == 0


def test_progress_of_an_order_does_not_shrink_while_it_waits(database: Engine) -> None:
    """The time of its kind begins when it is sent, not when it was ordered."""
    teach(database, kind="picture", seconds=10.0)
    job_id = ordered(1)
    before = existing_job(job_id).progress()
    with database.begin() as connection:
        long_ago = datetime.now(UTC) - timedelta(days=2)
        connection.execute(
            update(jobs).where(jobs.c.id == job_id).values(submitted_at=long_ago, deadline_at=long_ago + HOUR)
        )

    assert existing_job(job_id).progress() == before


def test_progress_of_an_uncertain_order_is_unknown(database: Engine) -> None:
    job_id = ordered(1)
    with database.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(status="uncertain"))

    progress = existing_job(job_id).progress()

    assert asdict(progress) == {
        "chance": 0.0,
        "median_seconds": None,
        "p90_seconds": None,
        "phase": "uncertain",
        "fraction": 0.0,
        "before": None,
    }
