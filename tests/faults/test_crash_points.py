"""A process exits between two steps of its work. Another process finishes the job, with one file and one completion."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine, select, update

from tests.faults.servers import RedisServer, assert_nothing_lost, assert_polls_are_the_calls, celery, wait_completed
from worker import track
from worker.sandbox import Sandbox
from worker.store.engine import database_now
from worker.store.schema import crashes, jobs, outputs

EXIT_CODE = 70

EXIT_BEFORE = f"""
import os
from {{module}} import {{owner}} as owner

owner.{{name}} = lambda *args, **kwargs: os._exit({EXIT_CODE})
"""
EXIT_AFTER = f"""
import os
from {{module}} import {{owner}} as owner

real = owner.{{name}}
owner.{{name}} = lambda *args, **kwargs: (real(*args, **kwargs), os._exit({EXIT_CODE}))
"""


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """Where a process exits: the planted code, the status of job and output afterwards, and the polls needed in all."""

    plant: str
    statuses: tuple[str, ...]
    calls: int = 1


CRASH_POINTS = {
    "between claim and call": CrashPoint(
        EXIT_BEFORE.format(module="worker.polling.api_client", owner="ApiClient", name="ask"), ("pending",)
    ),
    "before the commit of an answer": CrashPoint(
        EXIT_AFTER.format(module="worker.polling", owner="answer_writer", name="record_answers"), ("pending",), calls=2
    ),
    "between the commit of an answer and its messages": CrashPoint(
        EXIT_BEFORE.format(module="worker.polling.recorder", owner="Recorder", name="_finish"),
        ("downloading", "pending"),
    ),
    "between the rename of a file and its row": CrashPoint(
        EXIT_AFTER.format(module="worker.storage.local", owner="FileStorage", name="keep"), ("downloading", "pending")
    ),
}


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize("name", CRASH_POINTS)
def test_given_a_process_that_exits_between_two_steps_when_another_one_starts_then_the_job_is_completed_once(
    name: str, tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """No message about the job is in the queue: the second process finds the work in the database."""
    point = CRASH_POINTS[name]
    sandbox.options_now(min_seconds=0, max_seconds=0.1)
    answer = sandbox.submit("a lighthouse", samples=1)
    time.sleep(0.1)
    with celery(tmp_path, "doomed", plant=point.plant) as doomed:
        track(answer)
        assert doomed.wait(120) == EXIT_CODE, (tmp_path / "doomed.log").read_text()[-2_000:]
    with database.connect() as connection:
        statuses = [row.status for table in (jobs, outputs) for row in connection.execute(select(table.c.status))]
    assert tuple(statuses) == point.statuses
    with broker.client as client:
        assert client.llen("fetch-worker.downloads") == 0

    with celery(tmp_path, "healthy"):
        seconds = wait_completed(database, 1, tmp_path)

    print(f"{name}: completed {seconds:.1f} s after another process was ready")
    assert sandbox.calls.fetches[str(answer["id"])] == point.calls
    assert_nothing_lost(database, sandbox, tmp_path, 1, asked_again=point.calls - 1)
    assert_polls_are_the_calls(database, sandbox)


DELAYED_SWEEP = """
import threading, time
from worker.system import process_identity

dead_holders = process_identity.dead_holders

def delayed_dead(holders):
    if threading.current_thread().name == "ticker_sweep":
        time.sleep(5)
    return dead_holders(holders)

process_identity.dead_holders = delayed_dead
"""


@pytest.mark.long
@pytest.mark.server
def test_given_a_job_that_kills_its_process_when_the_next_one_starts_after_the_lease_then_each_death_is_counted(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """A process checks for dead claim holders before its first claim, even if the job is due and no sweep has run."""
    sandbox.options_now(min_seconds=0, max_seconds=0.1)
    job = track(sandbox.submit("a lighthouse", samples=1)["id"])
    deaths, plant = 3, DELAYED_SWEEP + CRASH_POINTS["between claim and call"].plant
    for number in range(deaths):
        with celery(tmp_path, f"doomed-{number}", plant=plant) as doomed:
            assert doomed.wait(120) == EXIT_CODE
        with database.begin() as connection:  # as if the lease had expired
            now = database_now(connection)
            connection.execute(update(jobs).where(jobs.c.id == job).values(due_at=now))

    with celery(tmp_path, "healthy"):
        wait_completed(database, 1, tmp_path)

    with database.connect() as connection:
        counted = connection.execute(select(crashes.c.times)).scalars().all()
    assert counted == [deaths]
    assert_nothing_lost(database, sandbox, tmp_path, 1)
    assert_polls_are_the_calls(database, sandbox)  # the killed processes had not sent a request
