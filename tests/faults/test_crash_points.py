"""Processes that end at the worst moments there are: another one finishes, with one file and one completion."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine, select, update

from tests.faults.servers import HurtRedis, assert_nothing_lost, assert_polls_are_the_calls, celery, wait_completed
from worker import track
from worker.sandbox import Sandbox
from worker.store.engine import database_now
from worker.store.schema import crashes, jobs, outputs

EXIT_CODE = 70

ENDS_BEFORE = f"""
import os
from {{module}} import {{owner}} as owner

owner.{{name}} = lambda *arguments, **named: os._exit({EXIT_CODE})
"""
ENDS_AFTER = f"""
import os
from {{module}} import {{owner}} as owner

real = owner.{{name}}
owner.{{name}} = lambda *arguments, **named: (real(*arguments, **named), os._exit({EXIT_CODE}))
"""


@dataclass(frozen=True, slots=True)
class Point:
    """A moment: what is planted for it, how job and output stand after it, what it costs in calls."""

    plant: str
    stands: tuple[str, ...]
    calls: int = 1


POINTS = {
    "between claim and call": Point(
        ENDS_BEFORE.format(module="worker.polling.api_client", owner="ApiClient", name="ask"), ("pending",)
    ),
    "before the commit of an answer": Point(
        ENDS_AFTER.format(module="worker", owner="recorder", name="record_answers"), ("pending",), calls=2
    ),
    "between the commit of an answer and its messages": Point(
        ENDS_BEFORE.format(module="worker.polling.recorder", owner="Recorder", name="_finish"),
        ("downloading", "pending"),
    ),
    "between the rename of a file and its row": Point(
        ENDS_AFTER.format(module="worker.storage.local", owner="FileStorage", name="keep"), ("downloading", "pending")
    ),
}


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize("name", POINTS)
def test_given_a_process_that_ends_at_the_worst_moment_when_another_one_runs_then_the_job_is_completed_once(
    name: str, tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis
) -> None:
    """No message waits that was sent about it; the other process needs no more than its start and a lease."""
    point = POINTS[name]
    sandbox.options_now(min_seconds=0, max_seconds=0.1)
    answer = sandbox.submit("a lighthouse", samples=1)
    time.sleep(0.1)
    with celery(tmp_path, "doomed", plant=point.plant) as doomed:
        track(answer)
        assert doomed.wait(120) == EXIT_CODE, (tmp_path / "doomed.log").read_text()[-2_000:]
    with database.connect() as connection:
        stands = [row.status for table in (jobs, outputs) for row in connection.execute(select(table.c.status))]
    assert tuple(stands) == point.stands
    with broker.client as client:
        assert client.llen("fetch-worker.downloads") == 0

    with celery(tmp_path, "healthy"):
        took = wait_completed(database, 1, tmp_path)

    print(f"{name}: done {took:.1f} s after another process was there")
    assert sandbox.calls.fetches[str(answer["id"])] == point.calls
    assert_nothing_lost(database, sandbox, tmp_path, 1, asked_again=point.calls - 1)
    assert_polls_are_the_calls(database, sandbox)


LATE_SWEEP = """
import threading, time
from worker.system import process_identity

dead = process_identity.dead

def late(holders):
    if threading.current_thread().name == "ticker_sweep":
        time.sleep(5)
    return dead(holders)

process_identity.dead = late
"""


@pytest.mark.long
@pytest.mark.server
def test_given_processes_that_die_of_a_job_when_the_next_begins_after_the_lease_then_each_death_is_counted(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis
) -> None:
    """A process looks for the dead before it claims anything, though what they held is due and no sweep came."""
    sandbox.options_now(min_seconds=0, max_seconds=0.1)
    job = track(sandbox.submit("a lighthouse", samples=1)["id"])
    deaths, plant = 3, LATE_SWEEP + POINTS["between claim and call"].plant
    for number in range(deaths):
        with celery(tmp_path, f"doomed-{number}", plant=plant) as doomed:
            assert doomed.wait(120) == EXIT_CODE
        with database.begin() as connection:  # as the lease runs out by itself
            over = database_now(connection)
            connection.execute(update(jobs).where(jobs.c.id == job).values(due_at=over))

    with celery(tmp_path, "healthy"):
        wait_completed(database, 1, tmp_path)

    with database.connect() as connection:
        counted = connection.execute(select(crashes.c.times)).scalars().all()
    assert counted == [deaths]
    assert_nothing_lost(database, sandbox, tmp_path, 1)
    assert_polls_are_the_calls(database, sandbox)  # none of the dead had sent anything
