"""Actions on many jobs while workers process the same jobs: no deadlock, and correct counters."""

import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Connection, Engine, select

from tests.rows import LEASE, add_job
from worker.client import matching
from worker.client.job_actions import Action
from worker.client.matching import change_matching
from worker.core.lifecycle import AskAgain, EndJob, Strikes
from worker.settings import Settings, load
from worker.store.claims import claim_jobs
from worker.store.counters import FINISHED, Tally, read_counters
from worker.store.due_groups import due_groups
from worker.store.engine import database_now, transact
from worker.store.reports.search import JobFilter
from worker.store.results import Outcome, record_answers
from worker.store.schema import HELD_UNTIL, jobs

JOBS = 240


@pytest.fixture
def settings(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings for the test database, with small batches."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setattr(matching, "BATCH", 20)
    monkeypatch.setattr(matching, "FEW", 60)
    return load()


def test_operators_and_workers_can_change_the_same_jobs_concurrently(engine: Engine, settings: Settings) -> None:
    """Workers claim and end jobs while operators hold, resume, cancel and retry all jobs, twice each."""
    with engine.begin() as connection:
        for number in range(JOBS):
            add_job(connection, str(number), deadline_at=HELD_UNTIL)
    stop = threading.Event()

    def work(name: str) -> int:
        ended = 0
        while not stop.is_set():
            ended += transact(engine, lambda connection: _poll(connection, name))
        return ended

    def operate(action: Action) -> None:
        for _ in range(2):
            for _ in change_matching(action, JobFilter(), settings):
                pass

    with ThreadPoolExecutor(8) as threads:
        workers = [threads.submit(work, name) for name in ("ada", "bob")]
        actions: tuple[Action, ...] = ("hold", "resume", "cancel", "retry")
        operators = [threads.submit(operate, action) for action in actions]
        for operator in operators:
            operator.result(timeout=60)
        stop.set()
        ended = sum(polling.result(timeout=60) for polling in workers)

    with engine.connect() as connection:
        rows = connection.execute(select(jobs)).all()
        counted = {total.key.label: total.times for total in read_counters(connection, [FINISHED])}
    states = Counter(row.status for row in rows)
    assert len(rows) == JOBS
    assert counted.get("failed", 0) == ended
    assert counted.get("cancelled", 0) == states["cancelled"]
    for row in rows:
        assert (row.held_at is not None) == (row.due_at == HELD_UNTIL)


def _poll(connection: Connection, name: str) -> int:
    """Claim jobs and record answers that end every second job. Return how many ended."""
    now = database_now(connection)
    claimed = [
        job
        for group in due_groups(connection, ["default"])
        for job in claim_jobs(connection, group, limit=10, token=name, holder=name, lease=LEASE, now=now)
    ]
    outcomes = [
        Outcome(job, EndJob("failed", "api_failed", "no") if job.id % 2 else AskAgain(Strikes(), "odd"), "note")
        for job in claimed
    ]
    tally = Tally()
    recorded = record_answers(connection, outcomes, tally, now=database_now(connection))
    tally.write(connection)
    return len(recorded.finished)


def test_an_action_by_filter_logs_one_line(
    engine: Engine, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """The line has the number of jobs."""
    caplog.set_level(logging.INFO, "worker.client.matching")
    with engine.begin() as connection:
        for number in range(50):
            add_job(connection, str(number))

    for _ in range(2):
        list(change_matching("hold", JobFilter(), settings))

    assert [line.getMessage() for line in caplog.records] == ["an operator changed jobs by filter action=hold jobs=50"]
