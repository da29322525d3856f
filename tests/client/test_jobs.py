"""Jobs of the Python API on real databases: look up, cancel, retry, nudge and wait."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, insert

import worker
from tests.rows import add_downloading, add_output, read_job, update_job
from worker.client import jobs as client_jobs
from worker.errors import JobNotFound, NotTrackable, WaitTimeout, WorkerError
from worker.store.schema import bodies


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that the Python API uses."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return engine


def test_get_returns_none_and_actions_raise_job_not_found_for_unknown_jobs(database: Engine) -> None:
    """Also for very large numbers."""
    for job_id in (4_711, 0, -1, 2**63, 10**30):
        assert worker.get(job_id) is None
        for action in (worker.cancel, worker.retry, worker.wait):
            with pytest.raises(JobNotFound, match=f"no job {job_id}"):
                action(job_id)
    assert worker.get(remote_id="4711") is None
    assert worker.nudge("4711") == 0
    assert worker.nudge("sha256:" + "0" * 32) == 0


@pytest.mark.parametrize("remote_id", ["", "a/b", "sha256:\x00", "sha256:short", "x" * 200, None, "\ud800"])
def test_an_invalid_remote_id_is_refused(database: Engine, remote_id: Any) -> None:
    """By `get` and `nudge`, without a query."""
    with pytest.raises(NotTrackable):
        worker.get(remote_id=remote_id)
    with pytest.raises(NotTrackable):
        worker.nudge(remote_id)


def test_cancel_and_retry_return_whether_they_changed_the_job(database: Engine) -> None:
    """Cancel changes jobs that are not final; retry changes failed and expired jobs."""
    job_id = worker.track("1")
    assert worker.retry(job_id) is False
    assert worker.cancel(job_id) is True
    assert worker.cancel(job_id) is False
    assert worker.retry(job_id) is False
    expired_id = worker.track("2", deadline=60)
    update_job(
        database, expired_id, status="expired", due_at=None, completed_at=datetime.now(UTC), error_code="expired"
    )
    assert worker.retry(expired_id) is True
    job = worker.get(expired_id)
    assert job is not None
    assert (job.status, job.error_code, job.completed_at) == ("pending", None, None)
    assert job.deadline_at > datetime.now(UTC) + timedelta(seconds=50)


def test_a_nudge_makes_all_jobs_with_that_id_due_earlier_but_not_before_poll_min(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Due now or POLL_MIN after the last request, and never later than before."""
    monkeypatch.setenv("POLL_MIN", "40")
    now = datetime.now(UTC)
    ids = [worker.track("7"), worker.track("7", account="shop"), worker.track("8"), worker.track("7", account="done")]
    in_an_hour = now + timedelta(hours=1)
    update_job(database, ids[0], due_at=in_an_hour)
    update_job(database, ids[1], due_at=in_an_hour, asked_at=now - timedelta(seconds=10))
    update_job(database, ids[2], due_at=in_an_hour)
    worker.cancel(ids[3])

    assert worker.nudge(7) == 2
    assert worker.nudge("7") == 0 or read_job(database, ids[0]).due_at <= datetime.now(UTC)
    assert abs((read_job(database, ids[0]).due_at - now).total_seconds()) < 10
    assert abs((read_job(database, ids[1]).due_at - now).total_seconds() - 30) < 1
    assert read_job(database, ids[2]).due_at == in_an_hour
    assert worker.nudge("8", account="unknown") == 0
    assert worker.nudge("8", account="default") == 1


def test_a_nudge_does_not_change_a_claimed_job(database: Engine) -> None:
    """The due time of a claimed job is its lease: an earlier time would release the claim."""
    job_id = worker.track("1")
    lease = datetime.now(UTC) + timedelta(seconds=30)
    update_job(database, job_id, due_at=lease, claim_token="t", claim_holder="h")
    assert worker.nudge("1") == 0
    assert read_job(database, job_id).due_at == lease


def test_wait_returns_a_final_job_or_raises_wait_timeout(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """WaitTimeout is a WorkerError and a TimeoutError."""
    monkeypatch.setattr(client_jobs, "WAIT_POLL_SECONDS", 0.02)
    job_id = worker.track("1")
    with pytest.raises(WaitTimeout, match=f"job {job_id} is still pending") as late:
        worker.wait(job_id, timeout=0.05)
    assert isinstance(late.value, (WorkerError, TimeoutError))
    with pytest.raises(WaitTimeout):
        worker.wait(job_id, timeout=0)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(worker.wait, job_id, 10)
        worker.cancel(job_id)
        assert waiting.result(10).status == "cancelled"


def test_get_returns_a_job_with_its_outputs(database: Engine) -> None:
    """The outputs are in order."""
    with database.begin() as connection:
        job_id = add_downloading(connection)
        second, first = add_output(connection, job_id, 1), add_output(connection, job_id, 0)
        connection.execute(insert(bodies).values(output_id=first, body=b"x"))
    job = worker.get(job_id)
    assert job is not None
    assert [output.id for output in job.outputs] == [first, second]
    assert (job.outputs[0].status, job.outputs[0].location, job.outputs[0].attempts) == ("pending", None, 0)
