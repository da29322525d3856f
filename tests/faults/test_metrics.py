"""`kill -9` in the middle of the work: no figure is doubled, none is lost, and what was never recorded is in none."""

import os
import random
import signal
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select

from tests.faults.servers import HurtRedis, children, up, wait_completed
from tests.metrics.exposed import Exposed, scraped
from worker import track_many
from worker.sandbox import Sandbox
from worker.store.reports.history import read_history
from worker.store.schema import jobs, outputs

JOBS, SECONDS = 300, 15.0


@pytest.mark.long
@pytest.mark.server
def test_figures_are_true_after_workers_were_killed_in_the_middle(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under load, again and again; meanwhile no counter goes down, and afterwards each is what rows and API say."""
    monkeypatch.setenv("SD_API_RPS", "100")
    draw = random.Random(1)
    seen: list[Exposed] = []
    with up(tmp_path) as process:
        track_many([sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(JOBS)])
        over = time.monotonic() + SECONDS
        while time.monotonic() < over:
            time.sleep(draw.uniform(0.3, 1.5))
            if pids := children(process.pid):
                os.kill(draw.choice(pids), signal.SIGKILL)
            seen.append(scraped(database))
        wait_completed(database, JOBS, tmp_path)
    seen.append(scraped(database))

    said = seen[-1]
    with database.connect() as connection:
        polls = connection.execute(select(func.sum(jobs.c.polls))).scalar_one()
        attempts, size = connection.execute(select(func.sum(outputs.c.attempts), func.sum(outputs.c.size_bytes))).one()
        began = connection.execute(select(func.min(jobs.c.tracked_at))).scalar_one()
        first = read_history(connection, began - timedelta(minutes=1))[0]
    answers = said.all("api_answers_total")
    served = sum(sandbox.calls.fetches.values())
    unrecorded = served - sum(answers.values())
    print(f"{len(seen)} kills, {served} calls, {unrecorded:.0f} of them never recorded, {polls} polls")
    assert said.all("jobs") == {("completed",): JOBS}
    assert sum(said.all("jobs_finished_total").values()) == JOBS
    assert sum(said.all("detection_delay_seconds_count").values()) == JOBS
    assert sum(said.all("job_polls_count").values()) == JOBS
    assert answers["default", "ready"] == JOBS  # one each: who was told and died was not counted
    assert sandbox.calls.fetch_answers["success"] == JOBS + sum(sandbox.calls.fetches_after_success.values())
    assert 0 <= unrecorded <= polls - sum(answers.values())
    assert unrecorded >= sum(sandbox.calls.fetches_after_success.values())
    assert said.value("download_attempts_total", "stored") == JOBS
    assert sum(said.all("download_attempts_total").values()) <= attempts
    assert said.value("stored_bytes_total") == size
    assert said.all("claims") == said.all("claims_stuck") == said.all("outputs_unstored") == said.all("jobs_due") == {}
    assert first.body["jobs"]["completed"] <= JOBS
    for before, after in pairwise(seen):
        assert _went_down(before, after) == []


def _went_down(before: Exposed, after: Exposed) -> list[str]:
    """The counters that did."""
    return [
        name
        for name, samples in before.samples.items()
        if name.endswith(("_total", "_bucket", "_count", "_sum"))
        and any(after.samples[name][key] < value for key, value in samples.items())
    ]
