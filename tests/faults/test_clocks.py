"""Workers whose clocks are wrong, or in another zone, beside one that is right: the database's clock decides."""

import json
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from tests.faults.servers import (
    HurtRedis,
    assert_nothing_lost,
    assert_polls_are_the_calls,
    celery,
    least_gap,
    wait_completed,
)
from worker import track_many
from worker.sandbox import Answer, Sandbox
from worker.store.schema import jobs

JOBS = 60

# What reads the wall clock in a process that this is planted in is `off` seconds wrong. The monotonic clock is right.
WRONG_CLOCK = """
import datetime, time

right, of_clock = datetime.datetime, time.time
time.time = lambda: of_clock() + {off}

class Kind(type):
    def __instancecheck__(cls, it):
        return isinstance(it, right)

    def __subclasscheck__(cls, it):
        return issubclass(it, right)

    def __call__(cls, *arguments, **named):
        return right(*arguments, **named)

class Wrong(right, metaclass=Kind):
    @classmethod
    def now(cls, tz=None):
        return right.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls):
        return right.fromtimestamp(time.time(), datetime.timezone.utc).replace(tzinfo=None)

datetime.datetime = Wrong
"""
SAYS_ITS_TIME = "print('by its clock it is', datetime.datetime.now(datetime.timezone.utc).isoformat(), flush=True)"
HOURS = {"right": 0, "ahead": 2, "behind": -2, "auckland": 0}


@pytest.mark.long
@pytest.mark.server
def test_given_workers_whose_clocks_are_wrong_when_they_work_beside_a_right_one_then_nothing_is_early_late_or_double(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hours ahead, two behind, and one in Auckland. Calls last longer than half a lease, so one could be stolen."""
    monkeypatch.setenv("POLL_MIN", "1")
    monkeypatch.setenv("JOB_DEADLINE", "3600")
    submitted = [sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(JOBS)]
    slow = json.dumps({"status": "processing", "message": "try again later.", "output": ""}).encode()
    for answer in submitted:
        sandbox.script(answer["id"], [Answer(200, {"Content-Type": "application/json"}, slow, 4 / len(slow))])

    with ExitStack() as workers:
        for name, hours in HOURS.items():
            plant = WRONG_CLOCK.format(off=hours * 3_600) + SAYS_ITS_TIME
            zone = "Pacific/Auckland" if name == "auckland" else "UTC"
            workers.enter_context(celery(tmp_path, name, plant=plant, TZ=zone))
        track_many(submitted)
        took = wait_completed(database, JOBS, tmp_path)

    logs = {name: (tmp_path / f"{name}.log").read_text() for name in HOURS}
    with database.connect() as connection:
        rows = connection.execute(select(jobs)).all()
    said = {name: _its_time(text) for name, text in logs.items()}
    print(f"all done in {took:.1f} s; {sum(row.polls for row in rows)} polls of {JOBS} jobs")
    for name, hours in HOURS.items():
        assert abs(said[name] - said["right"] - timedelta(hours=hours)) < timedelta(minutes=2), (
            "its clock is as planned"
        )
        assert "asked" in logs[name] or "stored" in logs[name], f"{name} did nothing"
    assert least_gap(sandbox) >= 0.5, "a job was asked about by two"  # POLL_MIN, less half a second of a busy machine
    for row in rows:
        assert timedelta(0) <= row.completed_at - row.submitted_at < timedelta(seconds=took + 30)
    assert_nothing_lost(database, sandbox, tmp_path, JOBS)
    assert_polls_are_the_calls(database, sandbox)
    assert sorted(sandbox.calls.pictures.values()) == [1] * JOBS


def _its_time(log: str) -> datetime:
    return datetime.fromisoformat(log.partition("by its clock it is ")[2].split()[0]).astimezone(UTC)
