"""`get(…).progress()` on real databases: told from what the workers learned, at the price of one query at most."""

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
from worker.client import tracking
from worker.core.pacing.policy import PacedJob
from worker.polling.pace_learner import PaceLearner
from worker.store.engine import engine_for
from worker.store.schema import jobs


@pytest.fixture(autouse=True)
def nothing_looked_up_yet() -> None:
    tracking._models.clear()


@pytest.fixture
def door(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The database that the front door uses, with our tables in it."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return engine


def taught(engine: Engine, *, kind: str, seconds: float, jobs_seen: int = 60) -> None:
    """The workers saw so many jobs of a kind that took so long, and shared it."""
    learner = PaceLearner(engine)
    learner.prepare([("default", kind)])
    for _ in range(jobs_seen):
        learner.observe("default", kind, PacedJob(seconds, seconds * 0.97), ready=True, planned=seconds)
    learner.share()


def found(job_id: int) -> Job:
    """The job, which is there."""
    job = worker.get(job_id)
    assert job is not None
    return job


@contextmanager
def statements(job: Job) -> Iterator[list[str]]:
    """What the front door asks the database meanwhile, beside BEGIN."""
    asked: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    engine = engine_for(tracking._settings().database)
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield asked
    finally:
        event.remove(engine, "before_cursor_execute", note)


def test_a_job_is_told_what_its_kind_took_and_no_more_than_is_left(door: Engine) -> None:
    taught(door, kind="slow", seconds=100.0)
    now = datetime.now(UTC)
    new = worker.track("1", kind="slow")
    older = worker.track("2", kind="slow", submitted_at=now - timedelta(seconds=70))
    late = worker.track("3", kind="slow", submitted_at=now - timedelta(seconds=600))
    with door.begin() as connection:
        asked_at = now - timedelta(seconds=1)
        connection.execute(update(jobs).where(jobs.c.id.in_([older, late])).values(not_ready_at=asked_at))

    said = {job_id: found(job_id).progress() for job_id in (new, older, late)}

    assert all(one.phase == "waiting" for one in said.values())
    assert said[new].median_seconds == pytest.approx(97.0, abs=15.0)
    assert said[older].median_seconds == pytest.approx(28.0, abs=15.0)
    assert said[new].fraction < said[older].fraction < said[late].fraction < 0.9
    assert (said[late].p90_seconds or 3_600.0) > 60.0


def test_a_kind_that_nobody_has_seen_is_told_little_and_a_page_can_read_it(door: Engine) -> None:
    said = found(worker.track("1")).progress()

    assert asdict(said).keys() == {"chance", "median_seconds", "p90_seconds", "phase", "fraction"}
    assert said.median_seconds is not None
    assert said.p90_seconds is not None
    assert said.p90_seconds > 5 * said.median_seconds
    assert said.chance < 0.5


def test_what_is_ready_is_downloading_and_what_is_over_is_whole(door: Engine) -> None:
    with door.begin() as connection:
        ready = add_downloading(connection, "9")
    over = worker.track("8")
    worker.cancel(over)

    with statements(found(ready)) as asked:
        said = [found(ready).progress(), found(over).progress()]

    assert [one.phase for one in said] == ["downloading", "final"]
    assert all((one.chance, one.median_seconds, one.p90_seconds) == (1.0, 0.0, 0.0) for one in said)
    assert not any("fetch_paces" in one for one in asked), "there is nothing to look up"


def test_progress_asks_the_database_once_and_then_not_for_a_while(door: Engine) -> None:
    job = found(worker.track("1", kind="image"))
    tracking._models.clear()

    with statements(job) as first:
        job.progress()
    with statements(job) as later:
        for _ in range(20):
            job.progress()

    assert sum("fetch_paces" in one for one in first) == 1
    assert later == []


def test_progress_is_as_of_when_the_job_was_read_by_the_databases_clock(door: Engine) -> None:
    job = found(worker.track("1", kind="image"))

    assert abs((job.read_at - job.submitted_at).total_seconds()) < 5.0
    assert job.progress() == job.progress()
