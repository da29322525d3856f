"""`kill -9` of whatever runs, again and again: each job ends in its one right state, each output is one whole file."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests.faults.servers import HurtRedis, assert_nothing_lost, children, up, wait_completed
from tests.waiting import wait_until
from worker import track_many
from worker.sandbox import Sandbox

JOBS, SECONDS = 2_000, 60.0


def _submitted(sandbox: Sandbox, count: int) -> list[object]:
    return [sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(count)]


@pytest.mark.long
@pytest.mark.server
def test_nothing_is_lost_by_a_minute_of_random_kills(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of workers, beat and Flower, under load, with Redis emptied in the middle."""
    monkeypatch.setenv("SD_API_RPS", "200")
    draw, killed = random.Random(1), 0
    with up(tmp_path) as process:
        track_many(_submitted(sandbox, JOBS))
        over = time.monotonic() + SECONDS
        emptied = False
        while time.monotonic() < over:
            time.sleep(draw.uniform(0.5, 2.0))
            if not emptied and time.monotonic() > over - SECONDS / 2:
                broker.notify("FLUSHALL")
                emptied = True
            pids = children(process.pid)
            if pids:
                os.kill(draw.choice(pids), signal.SIGKILL)
                killed += 1
        took = wait_completed(database, JOBS, tmp_path)
    print(f"{killed} kills, all done {took:.1f} s after the last one")
    assert_nothing_lost(database, sandbox, tmp_path, JOBS, asked_again=killed * 128)


def _wait_for_another(supervisor: int, stopped: int, count: int) -> None:
    """Wait until a process has ended, and the supervisor has as many as before."""

    def replaced() -> bool:
        pids = children(supervisor)
        return stopped not in pids and len(pids) >= count

    wait_until(replaced, f"another process stands for {stopped}", seen=lambda: children(supervisor))


@pytest.mark.long
@pytest.mark.server
def test_rolling_restarts_lose_nothing_and_leave_no_partial_file(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis
) -> None:
    """Sixteen polite ones, one process after the other, under load."""
    with up(tmp_path) as process:
        for round_ in range(16):
            track_many(_submitted(sandbox, 20))
            pids = children(process.pid)
            stopped = pids[round_ % len(pids)]
            os.kill(stopped, signal.SIGTERM)
            _wait_for_another(process.pid, stopped, len(pids))
            time.sleep(1)
        log = tmp_path / "up.log"
        wait_completed(database, 320, tmp_path)
    assert_nothing_lost(database, sandbox, tmp_path, 320)
    # Flower has one of its own where a signal finds it on its way out
    assert not [line for line in log.read_text().splitlines() if "Traceback" in line and not line.startswith("flower")]


@pytest.mark.long
@pytest.mark.server
def test_a_supervisor_that_is_killed_leaves_nothing_that_stands_in_the_way(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis
) -> None:
    """Started again it does the work."""
    track_many(_submitted(sandbox, 40))
    with up(tmp_path, outlives=False) as process:
        time.sleep(2)
        process.kill()
        process.wait()
    with up(tmp_path):
        wait_completed(database, 40, tmp_path)
    assert_nothing_lost(database, sandbox, tmp_path, 40)
