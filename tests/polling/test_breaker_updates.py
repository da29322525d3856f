"""Circuit breakers with real polls: what answers hold an account or a host, and what lets it continue."""

from datetime import timedelta

from sqlalchemy import Engine, update

from tests.polling.polls import Polls, scripted, submitted
from worker.sandbox import Sandbox
from worker.store.engine import database_now
from worker.store.schema import breakers


def test_given_a_wrong_key_when_polled_then_one_request_is_sent_and_the_jobs_stay_pending(
    engine: Engine, redis_url: str, sandbox: Sandbox
) -> None:
    polls = Polls(engine, redis_url, sandbox, default="wrong-key")
    ids = polls.track(submitted(sandbox, 20))

    polls.run(1.5)

    assert sum(sandbox.calls.fetches.values()) == 1
    assert {polls.row(job).status for job in ids} == {"pending"}
    breaker = polls.breaker("default")
    assert breaker.reason == "key rejected: Invalid Api Key"
    assert timedelta(seconds=9) < breaker.probe_at - breaker.since < timedelta(seconds=11)


def test_given_a_held_account_when_the_probe_is_accepted_then_all_its_jobs_continue(
    engine: Engine, redis_url: str, sandbox: Sandbox
) -> None:
    polls = Polls(engine, redis_url, sandbox, default="later-key")
    ids = polls.track(submitted(sandbox, 20))
    polls.run()
    sandbox.options_now(key="later-key")
    with engine.begin() as connection:
        connection.execute(update(breakers).values(probe_at=database_now(connection)))

    polls.until(lambda: all(polls.row(job).status == "downloading" for job in ids))

    breaker = polls.breaker("default")
    assert breaker.reason is None
    assert breaker.released_at is not None


def test_given_a_rate_limit_answer_then_the_whole_account_pauses(polls: Polls) -> None:
    ids = submitted(polls.sandbox, 3)
    jobs_in = polls.track(ids[:1])
    polls.sandbox.script(ids[0], scripted(b'{"status":"error","message":"Rate limit exceeded","retry_after":30}'))
    polls.run()
    polls.track(ids[1:])

    polls.run(0.6)

    assert sum(polls.sandbox.calls.fetches.values()) == 1
    breaker = polls.breaker("default")
    assert breaker.reason == "rate limited"
    assert timedelta(seconds=29) < breaker.until - breaker.since <= timedelta(seconds=31)
    assert breaker.ceiling is not None, "the accepted rate is learned"
    assert polls.row(jobs_in[0]).status == "pending"


def test_given_api_errors_when_five_requests_failed_then_the_host_is_held_and_no_job_fails(polls: Polls) -> None:
    ids = submitted(polls.sandbox, 12)
    for remote_id in ids:
        polls.sandbox.script(remote_id, scripted(b"<html>502</html>", status=502))
    job_ids = polls.track(ids)

    polls.run(1.0)
    requests = sum(polls.sandbox.calls.fetches.values())
    polls.run(1.0)

    assert sum(polls.sandbox.calls.fetches.values()) == requests
    assert {polls.row(job).status for job in job_ids} == {"pending"}
    assert "HTTP 502" in polls.breaker(polls.row(job_ids[0]).fetch_host).reason
