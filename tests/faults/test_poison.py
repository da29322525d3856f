"""Work that kills its process each time: it is set aside with a reason, and all other work is done."""

import os
import time
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from tests.faults.servers import PATIENCE, HurtRedis, assert_nothing_lost, states, up, wait_completed
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

ask, attempt, poison = ApiClient.ask, Downloader._attempt, Path({poison!r})

def deadly(name):
    return poison.exists() and name in poison.read_text().split()

def asked(self, address, remote_id, *more):
    reply = ask(self, address, remote_id, *more)
    if deadly(remote_id):
        os.kill(os.getpid(), signal.SIGKILL)
    return reply

def attempted(self, output):
    if deadly(output.urls[0].rpartition("/")[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return attempt(self, output)

ApiClient.ask, Downloader._attempt = asked, attempted
"""


@pytest.mark.long
@pytest.mark.server
def test_given_a_job_and_an_output_that_kill_their_process_when_they_did_so_again_and_again_then_they_are_set_aside(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others are completed meanwhile, and `retry` brings them back once they are harmless."""
    planted, poison = tmp_path / "planted", tmp_path / "poison"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(POISON.format(poison=str(poison)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(planted), *filter(None, [os.environ.get("PYTHONPATH")])]))
    submitted = [sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(JOBS)]
    job, other = submitted[JOBS // 2], submitted[JOBS // 2 + 1]
    poison.write_text(f"{job['id']} {other['future_links'][0].rpartition('/')[2]}")

    with up(tmp_path):
        began = time.monotonic()
        ids = track_many(submitted)
        log = tmp_path / "up.log"

        def seen() -> str:
            return f"{states(database)} {_counts(database)}"

        others = wait_until(
            lambda: states(database).get("completed") == JOBS - 2, "all others are completed", 2 * PATIENCE, seen=seen
        )
        wait_until(lambda: states(database).get("failed") == 2, "both are set aside", 2 * PATIENCE, seen=seen)
        aside = time.monotonic() - began
        with database.connect() as connection:
            ended = {row.remote_id: row for row in connection.execute(select(jobs).where(jobs.c.status == "failed"))}
            output = connection.execute(select(outputs).where(outputs.c.status == "failed")).one()
        deaths = log.read_text().count("was killed by SIGKILL")

        poison.unlink()
        assert all(retry(ids[submitted.index(one)]) for one in (job, other))
        wait_completed(database, JOBS, tmp_path)
    print(f"{deaths} deaths; the others done after {others:.0f} s, both set aside after {aside:.0f} s")
    assert ended[str(job["id"])].error_code == "worker_crash"
    assert "died, 8 times in a row" in ended[str(job["id"])].error_message
    assert ended[str(other["id"])].error_code == "output_failed"
    assert output.error_code == "worker_crash"
    assert "died, 8 times in a row" in output.error_message
    assert deaths >= 16
    assert_nothing_lost(database, sandbox, tmp_path, JOBS, asked_again=8 * JOBS)


def _counts(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return [str(row) for row in connection.execute(select(crashes))]
