"""A job and an output kill their process on each attempt: both are quarantined, and all other work is done."""

import os
import time
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from tests.faults.servers import PATIENCE, RedisServer, assert_nothing_lost, states, up, wait_completed
from tests.waiting import wait_until
from worker import retry, track_many
from worker.sandbox import Sandbox
from worker.store.schema import crashes, jobs, outputs

JOBS = 20

POISON = """
import os, signal
from pathlib import Path
from worker.downloads.downloader import Downloader
from worker.polling.api_client import ApiClient

real_ask, real_attempt, poison = ApiClient.ask, Downloader._attempt, Path({poison!r})

def is_deadly(name):
    return poison.exists() and name in poison.read_text().split()

def ask(self, address, remote_id, *args):
    reply = real_ask(self, address, remote_id, *args)
    if is_deadly(remote_id):
        os.kill(os.getpid(), signal.SIGKILL)
    return reply

def attempt(self, output):
    if is_deadly(output.urls[0].rpartition("/")[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real_attempt(self, output)

ApiClient.ask, Downloader._attempt = ask, attempt
"""


@pytest.mark.long
@pytest.mark.server
def test_given_a_job_and_an_output_that_kill_their_process_repeatedly_then_they_are_quarantined(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other jobs are completed meanwhile. After the cause is removed, `retry` completes the two as well."""
    planted, poison = tmp_path / "planted", tmp_path / "poison"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(POISON.format(poison=str(poison)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(planted), *filter(None, [os.environ.get("PYTHONPATH")])]))
    submitted = [sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(JOBS)]
    job, job_with_output = submitted[JOBS // 2], submitted[JOBS // 2 + 1]
    poison.write_text(f"{job['id']} {job_with_output['future_links'][0].rpartition('/')[2]}")

    with up(tmp_path):
        began = time.monotonic()
        ids = track_many(submitted)
        log = tmp_path / "up.log"

        def describe() -> str:
            return f"{states(database)} {_crashes(database)}"

        others_seconds = wait_until(
            lambda: states(database).get("completed") == JOBS - 2,
            "other jobs are completed",
            2 * PATIENCE,
            seen=describe,
        )
        wait_until(lambda: states(database).get("failed") == 2, "both are quarantined", 2 * PATIENCE, seen=describe)
        quarantined_seconds = time.monotonic() - began
        with database.connect() as connection:
            ended = {row.remote_id: row for row in connection.execute(select(jobs).where(jobs.c.status == "failed"))}
            output = connection.execute(select(outputs).where(outputs.c.status == "failed")).one()
        deaths = log.read_text().count("was killed by SIGKILL")

        poison.unlink()
        assert all(retry(ids[submitted.index(submission)]) for submission in (job, job_with_output))
        wait_completed(database, JOBS, tmp_path)
    print(
        f"{deaths} deaths; others completed after {others_seconds:.0f} s, quarantined after {quarantined_seconds:.0f} s"
    )
    assert ended[str(job["id"])].error_code == "worker_crash"
    assert "died, 8 times in a row" in ended[str(job["id"])].error_message
    assert ended[str(job_with_output["id"])].error_code == "output_failed"
    assert output.error_code == "worker_crash"
    assert "died, 8 times in a row" in output.error_message
    assert deaths >= 16
    assert_nothing_lost(database, sandbox, tmp_path, JOBS, asked_again=8 * JOBS)


def _crashes(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return [str(row) for row in connection.execute(select(crashes))]
