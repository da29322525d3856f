"""Workers with wrong clocks or another time zone run beside a correct one: only the database's clock is used."""

import json
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from tests.faults.servers import (
    RedisServer,
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

# Shifts the wall clock of a process by `off` seconds. The monotonic clock stays correct.
WRONG_CLOCK = """
import datetime, time

real_datetime, real_time = datetime.datetime, time.time
time.time = lambda: real_time() + {off}

class RealDatetimeType(type):
    def __instancecheck__(cls, instance):
        return isinstance(instance, real_datetime)

    def __subclasscheck__(cls, subclass):
        return issubclass(subclass, real_datetime)

    def __call__(cls, *args, **kwargs):
        return real_datetime(*args, **kwargs)

class ShiftedDatetime(real_datetime, metaclass=RealDatetimeType):
    @classmethod
    def now(cls, tz=None):
        return real_datetime.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls):
        return real_datetime.fromtimestamp(time.time(), datetime.timezone.utc).replace(tzinfo=None)

datetime.datetime = ShiftedDatetime
"""
PRINT_TIME = "print('clock of this process', datetime.datetime.now(datetime.timezone.utc).isoformat(), flush=True)"
HOURS = {"right": 0, "ahead": 2, "behind": -2, "auckland": 0}


@pytest.mark.long
@pytest.mark.server
def test_given_workers_with_wrong_clocks_beside_a_correct_one_then_no_poll_is_early_and_no_work_is_done_twice(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clock is two hours ahead, one two hours behind, one in Auckland.

    A poll takes longer than half a lease, so that a worker with a wrong clock could take over a claim.
    """
    monkeypatch.setenv("POLL_MIN", "1")
    monkeypatch.setenv("JOB_DEADLINE", "3600")
    submitted = [sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(JOBS)]
    slow = json.dumps({"status": "processing", "message": "try again later.", "output": ""}).encode()
    for answer in submitted:
        sandbox.script(answer["id"], [Answer(200, {"Content-Type": "application/json"}, slow, 4 / len(slow))])

    with ExitStack() as workers:
        for name, hours in HOURS.items():
            plant = WRONG_CLOCK.format(off=hours * 3_600) + PRINT_TIME
            zone = "Pacific/Auckland" if name == "auckland" else "UTC"
            workers.enter_context(celery(tmp_path, name, plant=plant, TZ=zone))
        track_many(submitted)
        seconds = wait_completed(database, JOBS, tmp_path)

    logs = {name: (tmp_path / f"{name}.log").read_text() for name in HOURS}
    with database.connect() as connection:
        rows = connection.execute(select(jobs)).all()
    clocks = {name: _logged_time(text) for name, text in logs.items()}
    print(f"completed in {seconds:.1f} s; {sum(row.polls for row in rows)} polls of {JOBS} jobs")
    for name, hours in HOURS.items():
        assert abs(clocks[name] - clocks["right"] - timedelta(hours=hours)) < timedelta(minutes=2), (
            "the clock of the process is not shifted as intended"
        )
        assert "asked" in logs[name] or "stored" in logs[name], f"{name} did nothing"
    assert least_gap(sandbox) >= 0.5, "two workers polled a job"  # POLL_MIN, minus half a second for a busy machine
    for row in rows:
        assert timedelta(0) <= row.completed_at - row.submitted_at < timedelta(seconds=seconds + 30)
    assert_nothing_lost(database, sandbox, tmp_path, JOBS)
    assert_polls_are_the_calls(database, sandbox)
    assert sorted(sandbox.calls.pictures.values()) == [1] * JOBS


def _logged_time(log: str) -> datetime:
    return datetime.fromisoformat(log.partition("clock of this process ")[2].split()[0]).astimezone(UTC)
