"""Processes are killed during work: every metric counts each recorded event exactly once."""

import os
import random
import signal
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select

from tests.faults.servers import RedisServer, children, up, wait_completed
from tests.metrics.exposition import Exposition, scrape
from tests.rows import read_history
from worker import track_many
from worker.sandbox import Sandbox
from worker.store.schema import jobs, outputs

JOBS, SECONDS = 300, 15.0


@pytest.mark.long
@pytest.mark.server
def test_metrics_match_the_rows_after_workers_were_killed(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are killed under load. No counter decreases, and in the end each one matches the rows and the API."""
    monkeypatch.setenv("SD_API_RPS", "100")
    rng = random.Random(1)
    scrapes: list[Exposition] = []
    with up(tmp_path) as process:
        track_many([sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(JOBS)])
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            time.sleep(rng.uniform(0.3, 1.5))
            if pids := children(process.pid):
                os.kill(rng.choice(pids), signal.SIGKILL)
            scrapes.append(scrape(database))
        wait_completed(database, JOBS, tmp_path)
    scrapes.append(scrape(database))

    final = scrapes[-1]
    with database.connect() as connection:
        polls = connection.execute(select(func.sum(jobs.c.polls))).scalar_one()
        attempts, size = connection.execute(select(func.sum(outputs.c.attempts), func.sum(outputs.c.size_bytes))).one()
        began = connection.execute(select(func.min(jobs.c.tracked_at))).scalar_one()
        first = read_history(connection, began - timedelta(minutes=1))[0]
    answers = final.all("api_answers_total")
    served = sum(sandbox.calls.fetches.values())
    unrecorded = served - sum(answers.values())
    print(f"{len(scrapes)} kills, {served} requests, {unrecorded:.0f} of them not recorded, {polls} polls")
    assert final.all("jobs") == {("completed",): JOBS}
    assert sum(final.all("jobs_finished_total").values()) == JOBS
    assert sum(final.all("detection_delay_seconds_count").values()) == JOBS
    assert sum(final.all("job_polls_count").values()) == JOBS
    assert answers["default", "ready"] == JOBS  # one per job: an answer lost with its process is not counted
    assert sandbox.calls.fetch_answers["success"] == JOBS + sum(sandbox.calls.fetches_after_success.values())
    assert 0 <= unrecorded <= polls - sum(answers.values())
    assert unrecorded >= sum(sandbox.calls.fetches_after_success.values())
    assert final.value("download_attempts_total", "stored") == JOBS
    assert sum(final.all("download_attempts_total").values()) <= attempts
    assert final.value("stored_bytes_total") == size
    assert (
        final.all("claims") == final.all("claims_stuck") == final.all("outputs_unstored") == final.all("jobs_due") == {}
    )
    assert first.body["jobs"]["completed"] <= JOBS
    for before, after in pairwise(scrapes):
        assert _decreased(before, after) == []


def _decreased(before: Exposition, after: Exposition) -> list[str]:
    """Return the names of the counters that decreased."""
    return [
        name
        for name, samples in before.samples.items()
        if name.endswith(("_total", "_bucket", "_count", "_sum"))
        and any(after.samples[name][key] < value for key, value in samples.items())
    ]
