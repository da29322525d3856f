"""Processes are killed again and again: each job is completed once, and each output is one complete file."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests.faults.servers import RedisServer, assert_nothing_lost, children, up, wait_completed
from tests.waiting import wait_until
from worker import track_many
from worker.sandbox import Sandbox

JOBS, SECONDS = 2_000, 60.0


def _submit(sandbox: Sandbox, count: int) -> list[object]:
    return [sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(count)]


@pytest.mark.long
@pytest.mark.server
def test_nothing_is_lost_by_a_minute_of_random_kills(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers, beat and Flower are killed under load. Redis is emptied after half of the time."""
    monkeypatch.setenv("SD_API_RPS", "200")
    rng, killed = random.Random(1), 0
    with up(tmp_path) as process:
        track_many(_submit(sandbox, JOBS))
        end = time.monotonic() + SECONDS
        emptied = False
        while time.monotonic() < end:
            time.sleep(rng.uniform(0.5, 2.0))
            if not emptied and time.monotonic() > end - SECONDS / 2:
                broker.execute("FLUSHALL")
                emptied = True
            pids = children(process.pid)
            if pids:
                os.kill(rng.choice(pids), signal.SIGKILL)
                killed += 1
        seconds = wait_completed(database, JOBS, tmp_path)
    print(f"{killed} kills, all jobs completed {seconds:.1f} s after the last one")
    assert_nothing_lost(database, sandbox, tmp_path, JOBS, asked_again=killed * 128)


def _wait_for_replacement(supervisor: int, stopped: int, count: int) -> None:
    """Wait until the process `stopped` has exited and the supervisor has `count` processes again."""

    def replaced() -> bool:
        pids = children(supervisor)
        return stopped not in pids and len(pids) >= count

    wait_until(replaced, f"another process replaces {stopped}", seen=lambda: children(supervisor))


@pytest.mark.long
@pytest.mark.server
def test_rolling_restarts_lose_nothing_and_leave_no_partial_file(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """Processes are stopped with SIGTERM under load, one after the other, 16 times."""
    with up(tmp_path) as process:
        for round_ in range(16):
            track_many(_submit(sandbox, 20))
            pids = children(process.pid)
            stopped = pids[round_ % len(pids)]
            os.kill(stopped, signal.SIGTERM)
            _wait_for_replacement(process.pid, stopped, len(pids))
            time.sleep(1)
        log = tmp_path / "up.log"
        wait_completed(database, 320, tmp_path)
    assert_nothing_lost(database, sandbox, tmp_path, 320)
    # Flower itself prints a traceback if a signal arrives while it exits
    assert not [line for line in log.read_text().splitlines() if "Traceback" in line and not line.startswith("flower")]


@pytest.mark.long
@pytest.mark.server
def test_after_a_supervisor_was_killed_a_new_one_completes_the_jobs(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """The second `up` is not blocked by what the killed one left behind."""
    track_many(_submit(sandbox, 40))
    with up(tmp_path, outlives=False) as process:
        time.sleep(2)
        process.kill()
        process.wait()
    with up(tmp_path):
        wait_completed(database, 40, tmp_path)
    assert_nothing_lost(database, sandbox, tmp_path, 40)
