"""Jobs of the Python API on real databases: look up, cancel, retry, nudge and wait."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, insert

import worker
from tests.rows import add_downloading, add_output, read_job, update_job
from worker.client.actions import notify
from worker.errors import JobNotFound, NotTrackable, OutputMissing, WaitTimeout, WorkerError
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


def test_wait_returns_a_final_job_or_raises_wait_timeout(database: Engine) -> None:
    """WaitTimeout is a WorkerError and a TimeoutError."""
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


# ── look up ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_several_jobs_with_a_reference_then_get_returns_the_newest(database: Engine) -> None:
    """A reference may be text, a number or a UUID, as for `track`."""
    order = UUID("12345678-1234-5678-1234-567812345678")
    first, second = worker.track("1", reference=order), worker.track("2", reference=order, account="shop")
    third = worker.track("3", reference=77)

    jobs = [
        worker.get(reference=order),
        worker.get(reference=str(order)),
        worker.get(reference=order, account="default"),
    ]

    assert [job and job.id for job in jobs] == [second, second, first]
    assert [job.id for job in worker.find(reference=77)] == [third]
    assert worker.get(reference="unknown") is None


def test_find_returns_the_newest_jobs_that_match_with_their_outputs(database: Engine) -> None:
    ids = [worker.track(str(number), reference="order", account=account) for number, account in enumerate("aabb", 1)]
    worker.cancel(ids[0])
    ready = worker.track({"status": "success", "id": 9, "output": ["https://cdn/1.png"]}, account="a")

    assert [job.id for job in worker.find()] == [ready, *reversed(ids)]
    assert [job.id for job in worker.find(limit=2)] == [ready, ids[3]]
    assert [job.id for job in worker.find(reference="order", account="a")] == [ids[1], ids[0]]
    assert [job.id for job in worker.find(status="cancelled")] == [ids[0]]
    assert [job.id for job in worker.find(status=["cancelled", "downloading"])] == [ready, ids[0]]
    assert [len(job.outputs) for job in worker.find(account="a")] == [1, 0, 0]
    assert worker.find(account="unknown") == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"limit": 0}, "limit must be a whole number from 1 to 10,000, not 0"),
        ({"limit": "5"}, "limit must be a whole number"),
        ({"limit": True}, "limit must be a whole number"),
        ({"status": "done"}, "'done' is not a state of a job: use ordered, "),
        ({"status": [5]}, "is not a state of a job"),
        ({"account": "a b"}, "is not a valid account name"),
        ({"reference": ["a"]}, "reference must be text"),
    ],
)
def test_given_an_argument_that_cannot_be_right_then_find_says_what_to_write(
    database: Engine, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(NotTrackable, match=re.escape(reason)):
        worker.find(**arguments)


JOB_CALLS = [worker.get, worker.wait, worker.cancel, worker.retry, worker.hold, worker.resume, worker.changes, notify]


@pytest.mark.parametrize("call", JOB_CALLS)
@pytest.mark.parametrize(
    ("job_id", "message"),
    [
        ("7", "a job id must be a whole number, not '7': write int('7')"),
        ("seven", "a job id must be a whole number, not 'seven'"),
        (7.0, "a job id must be a whole number, not 7.0"),
        (True, "a job id must be a whole number, not True"),
        (object(), "a job id must be a whole number, not a value of type object"),
        (b"7", "a job id must be a whole number, not a value of type bytes"),
    ],
)
def test_given_a_job_id_that_is_no_number_then_each_call_says_what_to_write(
    database: Engine, call: Callable[[Any], object], job_id: object, message: str
) -> None:
    with pytest.raises(NotTrackable) as refused:
        call(job_id)
    assert str(refused.value) == message


def test_given_none_or_two_names_of_a_job_then_get_asks_for_one(database: Engine) -> None:
    """An empty column of the app is None."""
    lookups: list[dict[str, Any]] = [{}, {"job_id": None}, {"remote_id": None}, {"reference": None}]
    for lookup in lookups:
        with pytest.raises(NotTrackable, match="get needs the id of a job, or remote_id= or reference=: it got None"):
            worker.get(**lookup)
    with pytest.raises(NotTrackable, match="give only one of job_id, reference"):
        worker.get(1, reference="order")
    with pytest.raises(NotTrackable, match="give only one of remote_id, reference"):
        worker.get(remote_id=1, reference="order")


def test_get_output_returns_what_is_known_of_an_output_or_none(database: Engine) -> None:
    with database.begin() as connection:
        job_id = add_downloading(connection)
        output_id = add_output(connection, job_id, 0)

    output = worker.get_output(output_id)

    assert output is not None
    assert (output.id, output.job_id, output.position, output.status) == (output_id, job_id, 0, "pending")
    for unknown in (0, -1, output_id + 1, 2**63, 10**30):
        assert worker.get_output(unknown) is None
        with pytest.raises(OutputMissing, match=f"there is no output {unknown}"):
            worker.open_output(unknown)
    calls = ((worker.get_output, NotTrackable), (worker.open_output, OutputMissing), (worker.output_url, OutputMissing))
    for call, error in calls:
        with pytest.raises(error, match=r"an output id must be a whole number, not '7': write int\('7'\)"):
            call("7")  # type: ignore[arg-type]  # what the test is about


def test_a_job_is_json_with_its_outputs(database: Engine) -> None:
    job_id = worker.track({"status": "success", "id": 9, "output": ["https://cdn/1.png"]}, reference="order")
    job = worker.get(job_id)
    assert job is not None

    document = json.loads(json.dumps(job.as_json()))

    assert (document["id"], document["reference"], document["status"]) == (job_id, "order", "downloading")
    assert document["submitted_at"].endswith("Z")
    assert datetime.fromisoformat(document["submitted_at"]) == job.submitted_at
    assert [output["url"] for output in document["outputs"]] == ["https://cdn/1.png"]


def test_two_reads_of_an_unchanged_job_are_equal(database: Engine) -> None:
    job_id = worker.track("1")
    first, second = worker.get(job_id), worker.get(job_id)
    worker.cancel(job_id)
    assert first == second
    assert first != worker.get(job_id)
