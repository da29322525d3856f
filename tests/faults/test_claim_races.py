"""Processes that race for the same rows: one lease, one holder, and what an old holder brings changes nothing."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import Engine, insert, select

from tests.faults.claimers import PROCESSES, ROUNDS
from tests.rows import add_downloading, job_values, output_values
from worker.store.schema import jobs, outputs

MANY = 150


@pytest.mark.long
@pytest.mark.server
def test_given_processes_that_race_when_leases_run_out_then_each_row_has_one_holder_a_lease_and_old_ones_write_nothing(
    engine: Engine,
) -> None:
    """Jobs and outputs; the longest due and the most urgent ones; outputs by the messages of all of them at once."""
    with engine.begin() as connection:
        connection.execute(insert(jobs), [job_values(str(number)) for number in range(MANY)])
        ready = add_downloading(connection, "ready")
        connection.execute(insert(outputs), [output_values(ready, number) for number in range(MANY)])

    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.claimers", engine.url.render_as_string(hide_password=False)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    processes = json.loads(done.stdout)
    for number in range(ROUNDS):
        for kind in ("jobs", "outputs"):
            claimed = Counter(one for process in processes for one in process[number][kind])
            assert (len(claimed), set(claimed.values())) == (MANY, {1}), f"{kind} in round {number}"
    assert [one["stale"] for process in processes for one in process] == [0] * PROCESSES * ROUNDS
    assert sum(process[-1]["live"] for process in processes) == 2 * MANY
    with engine.connect() as connection:
        polls = connection.execute(select(jobs.c.polls).where(jobs.c.status == "pending")).scalars()
        assert set(polls) == {ROUNDS}
        assert set(connection.execute(select(outputs.c.attempts)).scalars()) == {ROUNDS}
