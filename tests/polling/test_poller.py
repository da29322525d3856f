"""Poll runs with a real HTTP stand-in, a real Redis, and real databases."""

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, select

from tests.polling.polls import KEY, Polls, scripted, submitted
from tests.waiting import wait_until
from worker.coordination.leases import LeaseLost
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.engine import database_now
from worker.store.jobs import nudge
from worker.store.schema import outputs


def test_given_answers_of_several_classes_when_polled_then_the_report_counts_them_in_plain_words(polls: Polls) -> None:
    waiting, refused = submitted(polls.sandbox, 2)
    polls.sandbox.script(waiting, scripted(b'{"status": "processing", "output": []}'))
    polls.sandbox.script(refused, scripted(b'{"status": "error", "message": "Invalid API Key"}'))
    polls.track(submitted(polls.sandbox, 1))
    first = polls.poller.poll_once()  # alone, because the key was never used before
    polls.track([waiting, refused, "424242", *submitted(polls.sandbox, 2)])

    assert str(first) == "asked 1: 1 ready"
    assert str(polls.poller.poll_once()) == "asked 5: 2 ready, 1 not ready, 1 unknown, 1 account refused"


def test_given_ready_jobs_when_polled_then_each_is_polled_once_and_its_outputs_are_queued(polls: Polls) -> None:
    ids = polls.track(submitted(polls.sandbox, 30))

    polls.until(lambda: all(polls.row(job).status == "downloading" for job in ids))

    assert all(polls.row(job).polls == 1 for job in ids)
    assert all(count == 1 for count in polls.sandbox.calls.fetches.values())
    with polls.engine.connect() as connection:
        rows = connection.execute(select(outputs.c.id, outputs.c.job_id).order_by(outputs.c.id)).all()
    assert sorted(polls.queued) == [row.id for row in rows]
    assert len(rows) == 60


def test_given_jobs_in_progress_when_polled_then_the_intervals_grow_and_nothing_is_lost(
    engine: Engine, redis_url: str
) -> None:
    with Sandbox(SandboxOptions(key=KEY, min_seconds=1.5, max_seconds=2.5, size=32)) as sandbox:
        polls = Polls(engine, redis_url, sandbox)
        names = submitted(sandbox, 5, samples=1)
        ids = polls.track(names)

        polls.until(lambda: all(polls.row(job).status == "downloading" for job in ids))

        assert [polls.row(job).polls for job in ids] == [sandbox.calls.fetches[name] for name in names]
        assert all(2 <= polls.row(job).polls <= 4 for job in ids)


def test_given_a_long_run_with_a_progress_callback_then_it_reports_its_progress(
    engine: Engine, redis_url: str, sandbox: Sandbox
) -> None:
    polls = Polls(engine, redis_url, sandbox, options={"progress_seconds": 0.0})
    progress: list[tuple[str, int]] = []
    polls.track(submitted(polls.sandbox, 3))

    def note(report: object, in_flight: int) -> None:
        progress.append((str(report), in_flight))
        if progress[-1] == ("asked 3: 3 ready", 0):
            polls.poller.stop()

    polls.poller.run(seconds=30, progress=note)

    assert progress[-1] == ("asked 3: 3 ready", 0)


def test_given_a_waiting_run_when_a_job_is_due_and_it_is_woken_then_the_job_is_polled_at_once(
    polls: Polls,
) -> None:
    polls.track(submitted(polls.sandbox, 1))
    polls.run()
    run = threading.Thread(target=polls.run, args=(5.0,))
    run.start()
    time.sleep(0.3)
    (remote_id,) = submitted(polls.sandbox, 1)
    polls.track([remote_id])
    polls.poller.wake()
    began = time.monotonic()
    while remote_id not in polls.sandbox.calls.fetches:
        assert time.monotonic() - began < 4
        time.sleep(0.002)
    seconds = time.monotonic() - began
    polls.poller.stop()
    run.join()

    assert seconds < 0.6, "without a wake-up it would look a second later"


def test_given_a_stop_when_polling_then_no_more_jobs_are_claimed(polls: Polls) -> None:
    ids = polls.track(submitted(polls.sandbox, 5))
    polls.poller.stop()

    polls.run()

    assert {polls.row(job).polls for job in ids} == {0}


def test_given_a_stop_when_jobs_are_claimed_and_not_polled_then_they_are_due_again_and_uncounted(
    engine: Engine, redis_url: str, sandbox: Sandbox
) -> None:
    polls = Polls(engine, redis_url, sandbox, slow=KEY)
    polls.track(submitted(sandbox, 1), account="slow")
    polls.run()
    polls.rps = 100
    ids = polls.track(submitted(sandbox, 60, samples=1), account="slow")
    breaker = threading.Event()
    ask = polls.client.ask
    polls.poller._pool._ask = lambda job: (breaker.wait(60), ask(job.address, job.remote_id, SecretStr(KEY)))[1]
    polls.poller._pool._max_threads = 2
    run = threading.Thread(target=polls.run, args=(20.0,))
    run.start()
    wait_until(lambda: sum(polls.row(job).polls for job in ids) >= 4, "four jobs are polled")

    polls.poller.stop()
    wait_until(lambda: sum(polls.row(job).claim_token is not None for job in ids) <= 4, "the other jobs are released")
    breaker.set()
    run.join(60)

    rows = [polls.row(job) for job in ids]
    assert not run.is_alive()
    assert all(row.claim_token is None for row in rows)
    assert sum(row.polls for row in rows) == sum(sandbox.calls.fetches[row.remote_id] for row in rows)
    assert sum(row.polls for row in rows) <= 4
    with engine.connect() as connection:
        now = database_now(connection)
    assert all(row.due_at <= now for row in rows if row.status == "pending")


def test_given_a_lease_that_may_have_ended_when_a_job_is_to_be_polled_then_it_is_released_unpolled(
    polls: Polls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process was stopped for longer than its lease. Other processes may poll the job by now."""
    polls.track(submitted(polls.sandbox, 1))
    polls.until(lambda: len(polls.sandbox.calls.fetches) == 1)  # the account's key is proven from here on
    leases, slept = polls.leases, threading.Event()
    check = leases.check

    def check_after_sleep(row_id: int, token: str) -> None:
        if not slept.is_set():
            raise LeaseLost
        check(row_id, token)

    monkeypatch.setattr(leases, "check", check_after_sleep)
    job_ids = polls.track(submitted(polls.sandbox, 20))
    polls.run()
    assert len(polls.sandbox.calls.fetches) == 1
    rows = [polls.row(job_id) for job_id in job_ids]
    assert {(row.status, row.polls, row.claim_token) for row in rows} == {("pending", 0, None)}
    assert not polls.poller.busy

    slept.set()
    polls.until(lambda: all(polls.row(job_id).status == "downloading" for job_id in job_ids))
    assert {polls.row(job_id).polls for job_id in job_ids} == {1}


def test_given_a_waiting_job_when_it_is_nudged_then_it_is_the_most_urgent(polls: Polls) -> None:
    (name,) = submitted(polls.sandbox, 1)
    polls.sandbox.script(name, scripted(b'{"status": "processing", "output": ""}', times=1))
    (job,) = polls.track([name], submitted_at=database_time(polls.engine) - timedelta(minutes=5))
    polls.until(lambda: polls.row(job).not_ready_at is not None)
    before = polls.row(job)

    with polls.engine.begin() as connection:
        assert nudge(connection, name, None, now=database_now(connection), poll_min=timedelta(seconds=0)) == 1

    assert before.pace_scale > 0
    assert before.pace_growth > 0
    assert (polls.row(job).pace_scale, polls.row(job).pace_growth) == (None, None)
    assert polls.row(job).due_at < before.due_at


def database_time(engine: Engine) -> Any:
    """Return the database's time."""
    with engine.connect() as connection:
        return database_now(connection)
