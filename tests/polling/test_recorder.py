"""Answers while the database is away, refuses a value or has locked rows: none is lost, and no job is polled twice."""

import threading
import time
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.exc import OperationalError

from tests.polling.polls import Polls, submitted
from tests.waiting import wait_until
from worker.polling import answer_writer
from worker.sandbox import Sandbox
from worker.store.results import record_answers
from worker.store.schema import jobs


def test_given_answers_while_the_database_is_away_then_the_next_run_writes_them_and_no_job_is_polled_twice(
    polls: Polls, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = polls.track(submitted(polls.sandbox, 1))
    record, failures = record_answers, 3

    def away(*arguments: Any, **options: Any) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OperationalError("UPDATE", {}, RuntimeError("the server closed the connection"))
        return record(*arguments, **options)

    monkeypatch.setattr(answer_writer, "record_answers", away)
    for _ in range(3):
        with pytest.raises(OperationalError):
            polls.run(1.0)
        assert polls.row(ids[0]).status == "pending"
    polls.run()

    assert polls.row(ids[0]).status == "downloading"
    assert set(polls.sandbox.calls.fetches.values()) == {1}
    assert len(polls.queued) == 2


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)  # SQLite accepts any value
def test_given_an_unwritable_answer_in_a_batch_then_only_its_job_ends(
    engine: Engine, redis_url: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls = Polls(engine, redis_url, sandbox)
    polls.track(submitted(sandbox, 1))
    polls.run()
    remote_ids = submitted(sandbox, 20, samples=1)
    ids = polls.track(remote_ids)
    outcome = polls.poller._recorder._outcomes.outcome

    def spoilt(answer: Any, *arguments: Any, **options: Any) -> Any:
        result = outcome(answer, *arguments, **options)
        return result._replace(note="no text\x00") if answer.job.remote_id == remote_ids[7] else result

    monkeypatch.setattr(polls.poller._recorder._outcomes, "outcome", spoilt)
    polls.until(lambda: all(polls.row(job).status != "pending" for job in ids))

    rows = {row.remote_id: row for row in map(polls.row, ids)}
    bad = rows.pop(remote_ids[7])
    assert (bad.status, bad.error_code) == ("failed", "unwritable")
    assert {row.status for row in rows.values()} == {"downloading"}
    assert bad.id in polls.notified
    assert set(sandbox.calls.fetches.values()) == {1}


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)  # SQLite locks no single row
def test_given_a_locked_row_when_answers_are_written_then_only_its_own_answer_waits(
    engine: Engine, redis_url: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls = Polls(engine, redis_url, sandbox, options={"batch_patience": 0.2, "locked_seconds": 0.1})
    polls.track(submitted(sandbox, 1))
    polls.run()
    names = submitted(sandbox, 20, samples=1)
    ids = polls.track(names)
    ask, breaker = polls.client.ask, threading.Event()

    def held(*arguments: Any) -> Any:
        breaker.wait(10)
        return ask(*arguments)

    monkeypatch.setattr(polls.client, "ask", held)
    run = threading.Thread(target=polls.run, args=(3.0,))
    run.start()
    wait_until(lambda: all(polls.row(job).claim_token for job in ids), "all jobs are claimed")
    with engine.begin() as connection:
        connection.execute(select(jobs.c.id).where(jobs.c.id == ids[7]).with_for_update())
        breaker.set()
        wait_until(lambda: sum(polls.row(job).status == "downloading" for job in ids) == 19, "the others go on")
        assert polls.row(ids[7]).status == "pending"
    run.join(10)
    polls.until(lambda: polls.row(ids[7]).status == "downloading")

    assert set(sandbox.calls.fetches.values()) == {1}
    assert all(polls.row(job).error_code is None for job in ids)


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)  # SQLite locks no single row
def test_given_200_locked_rows_when_other_jobs_are_due_then_they_are_polled_all_the_same(
    engine: Engine, redis_url: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls = Polls(engine, redis_url, sandbox)
    polls.track(submitted(sandbox, 1))
    polls.run()
    ids = polls.track(submitted(sandbox, 200, samples=1))
    ask, breaker = polls.client.ask, threading.Event()

    def held(*arguments: Any) -> Any:
        breaker.wait(30)
        return ask(*arguments)

    monkeypatch.setattr(polls.client, "ask", held)
    run = threading.Thread(target=polls.run, args=(60.0,))
    run.start()
    wait_until(lambda: all(polls.row(job).claim_token for job in ids[:100]), "a hundred jobs are claimed")
    with engine.begin() as connection:
        connection.execute(select(jobs.c.id).where(jobs.c.id.in_(ids)).with_for_update())
        breaker.set()
        wait_until(lambda: polls.poller.unwritten >= 100, "their answers wait")
        began = time.monotonic()
        (job,) = polls.track(submitted(sandbox, 1, samples=1))
        polls.until(lambda: polls.row(job).status == "downloading")
        seconds = time.monotonic() - began
    run.join(60)

    assert seconds < 10  # the first batch waits two seconds for the locks


def test_given_an_internal_error_when_answers_are_written_then_no_job_fails_by_it(
    engine: Engine, redis_url: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls = Polls(engine, redis_url, sandbox, options={"locked_seconds": 0.1})
    polls.track(submitted(polls.sandbox, 1))
    polls.run()
    names = submitted(polls.sandbox, 5, samples=1)
    ids = polls.track(names)
    outcome, broken = polls.poller._recorder._outcomes.outcome, [True]

    def faulty(answer: Any, *arguments: Any, **options: Any) -> Any:
        if broken and answer.job.remote_id == names[2]:
            raise KeyError("a slip")
        return outcome(answer, *arguments, **options)

    monkeypatch.setattr(polls.poller._recorder._outcomes, "outcome", faulty)
    polls.until(lambda: sum(polls.row(job).status == "downloading" for job in ids) == 4)
    assert polls.row(ids[2]).status == "pending"
    broken.clear()
    polls.until(lambda: polls.row(ids[2]).status == "downloading")

    assert set(polls.sandbox.calls.fetches.values()) == {1}
