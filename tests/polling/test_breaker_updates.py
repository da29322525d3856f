"""Circuit breakers with real polls: what answers hold an account or a host, and what lets it continue."""

from datetime import timedelta

import pytest
from sqlalchemy import Engine, update

from tests.polling.answers import answer_about, claimed_job
from tests.polling.polls import Polls, scripted, submitted
from tests.rows import BASE, NOW
from worker.coordination.rate_limiter import RateLimiter, redis_client
from worker.core.circuit_breaker import FAILURES_TO_TRIP, CircuitBreaker, after_refusal
from worker.core.identity import FetchAddress
from worker.core.reply import ApiDown, Empty, Processing, RateLimited, Reply
from worker.polling.breaker_updates import Breakers, count_accepted, mark_own_path_error, update_breakers
from worker.sandbox import Sandbox
from worker.store.breakers import all_breakers, locked_breaker, save_breaker
from worker.store.claims import ClaimedJob
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


# ── updates alone ─────────────────────────────────────────────────────────────────────────────────────────────────────

NO_SUCH_PATH = ApiDown("HTTP 404: no such path", no_such_path=True)
OWN_PATH = FetchAddress("https://api.test/api/v6/fetch/1", "https://api.test/api/v6/fetch", "api.test")
PROVEN: Breakers = {
    ("account", "default"): CircuitBreaker("account", "default", proven=True),
    ("host", "api.test"): CircuitBreaker("host", "api.test", proven=True),
}


def default_address(remote_id: str) -> FetchAddress:
    """Return the address of a job without an address of its own."""
    return FetchAddress(f"{BASE}/{remote_id}", BASE, "api.test")


@pytest.mark.parametrize(
    ("job", "reply", "answered"),
    [
        (claimed_job(address=OWN_PATH), NO_SUCH_PATH, True),
        (claimed_job(), NO_SUCH_PATH, False),
        (claimed_job(address=OWN_PATH, not_ready_at=NOW), NO_SUCH_PATH, False),
        (claimed_job(address=OWN_PATH), ApiDown("HTTP 502"), False),
    ],
    ids=["own path", "default path", "a path that worked", "another error"],
)
def test_given_a_missing_path_then_the_answer_is_about_the_job_only_if_the_path_is_its_own_and_never_worked(
    job: ClaimedJob, reply: ApiDown, answered: bool
) -> None:
    marked = mark_own_path_error(answer_about(job, reply), default_address).reply

    assert isinstance(marked, ApiDown)
    assert marked.answered is answered


def test_given_answers_that_change_no_breaker_then_no_row_is_locked_or_written(engine: Engine) -> None:
    answers = [answer_about(claimed_job(number), Processing()) for number in range(3)]

    with engine.begin() as connection:
        changed = update_breakers(connection, answers, PROVEN, lambda _: 10.0, {}, now=database_now(connection))
        assert all_breakers(connection) == {}

    assert changed == {}


def test_given_an_answer_that_changes_the_breaker_of_its_host_then_only_this_one_is_written(engine: Engine) -> None:
    answers = [answer_about(claimed_job(number), ApiDown("HTTP 502")) for number in range(FAILURES_TO_TRIP - 1)]

    with engine.begin() as connection:
        changed = update_breakers(connection, answers, PROVEN, lambda _: 10.0, {}, now=database_now(connection))
        rows = all_breakers(connection)

    assert rows == changed
    assert {key: breaker.troubles for key, breaker in rows.items()} == {("host", "api.test"): FAILURES_TO_TRIP - 1}


def test_given_equal_answers_in_a_row_when_a_probe_is_among_them_then_it_still_ends_the_hold(engine: Engine) -> None:
    with engine.begin() as connection:
        now = database_now(connection)
        held = after_refusal(locked_breaker(connection, "account", "default"), "no credits", now=now, probe=True)
        save_breaker(connection, held)
        answers = [
            answer_about(claimed_job(1), Processing()),
            answer_about(claimed_job(2), Processing(), probe=True),
            answer_about(claimed_job(3), Processing()),
        ]
        changed = update_breakers(
            connection, answers, PROVEN | {("account", "default"): held}, lambda _: 10.0, {}, now=now
        )

    assert [(key, breaker.reason) for key, breaker in changed.items()] == [(("account", "default"), None)]


def test_given_answers_then_those_that_the_api_accepted_are_counted_by_account(redis_url: str) -> None:
    """Failures of the host and rate limits are not accepted requests."""
    redis_client(redis_url, seconds=5).flushdb()
    replies: list[Reply] = [Processing(), Empty(), RateLimited(9.0, "slow down"), ApiDown("HTTP 502")]
    answers = [answer_about(claimed_job(account=account), reply) for account in ("a", "b") for reply in replies]
    answers.append(answer_about(claimed_job(account="b"), Processing()))

    assert count_accepted(RateLimiter(redis_url), answers) == {"a": 2.0, "b": 3.0}
