"""Processes race for the same rows: each lease has one holder, and results of old holders are discarded."""

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

ROWS = 150


@pytest.mark.long
@pytest.mark.server
def test_given_processes_that_race_when_leases_expire_then_each_lease_has_one_holder_and_old_holders_write_nothing(
    engine: Engine,
) -> None:
    """Jobs are claimed by due time or by urgency, outputs in random order."""
    with engine.begin() as connection:
        connection.execute(insert(jobs), [job_values(str(number)) for number in range(ROWS)])
        ready = add_downloading(connection, "ready")
        connection.execute(insert(outputs), [output_values(ready, number) for number in range(ROWS)])

    result = subprocess.run(
        [sys.executable, "-m", "tests.faults.claimers", engine.url.render_as_string(hide_password=False)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    processes = json.loads(result.stdout)
    for number in range(ROUNDS):
        for kind in ("jobs", "outputs"):
            claimed = Counter(row_id for process in processes for row_id in process[number][kind])
            assert (len(claimed), set(claimed.values())) == (ROWS, {1}), f"{kind} in round {number}"
    assert [round_["stale"] for process in processes for round_ in process] == [0] * PROCESSES * ROUNDS
    assert sum(process[-1]["live"] for process in processes) == 2 * ROWS
    with engine.connect() as connection:
        polls = connection.execute(select(jobs.c.polls).where(jobs.c.status == "pending")).scalars()
        assert set(polls) == {ROUNDS}
        assert set(connection.execute(select(outputs.c.attempts)).scalars()) == {ROUNDS}
