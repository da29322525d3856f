"""Claims and releases of jobs: none is claimed twice, and none stays claimed without a poll."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.exc import OperationalError

from tests.polling.polls import KEY, Polls, submitted
from tests.rows import add_job, read_job
from worker.coordination.leases import LeaseKeeper, LeaseLost
from worker.core.circuit_breaker import Scope
from worker.polling import job_claims
from worker.polling.api_client import ApiClient
from worker.polling.job_claims import JobClaims
from worker.sandbox import Sandbox
from worker.store.claims import claim_jobs, release_jobs
from worker.store.due_groups import DueGroup, due_groups
from worker.store.engine import database_now
from worker.store.jobs import insert_jobs
from worker.store.schema import jobs
from worker.system.redaction import Scrubber
from worker.vendor.fetch_url import AllowedApi, fetch_address


def test_given_two_pollers_when_they_share_the_table_then_no_job_is_polled_twice(
    engine: Engine, redis_url: str, sandbox: Sandbox
) -> None:
    pollers = [Polls(engine, redis_url, sandbox), Polls(engine, redis_url, sandbox)]
    pollers[0].track(submitted(sandbox, 1))
    pollers[0].run()  # the key is accepted
    ids = pollers[0].track(submitted(sandbox, 100, samples=1))
    threads = [threading.Thread(target=poller.run, args=(3.0,)) for poller in pollers]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {pollers[0].row(job).status for job in ids} == {"downloading"}
    assert set(sandbox.calls.fetches.values()) == {1}


def test_given_a_job_whose_address_is_no_longer_allowed_when_polled_then_it_waits_and_others_continue(
    polls: Polls,
) -> None:
    elsewhere = AllowedApi("https://modelslab.com/api/v3", frozenset({"modelslab.com"}))
    with polls.engine.begin() as connection:
        now = database_now(connection)
        foreign = replace(polls.new_job("77", now), address=fetch_address(None, "77", elsewhere), priority=9)
        ((strange, _),) = insert_jobs(connection, [foreign], now=now)
    (job,) = polls.track(submitted(polls.sandbox, 1))

    polls.until(lambda: bool(polls.row(job).status == "downloading"))

    row = polls.row(strange)
    assert (row.status, row.polls, row.claim_token) == ("pending", 0, None)


# ── database errors ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_a_claim_whose_commit_was_interrupted_when_the_next_run_starts_then_its_jobs_are_polled(
    polls: Polls, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls.track(submitted(polls.sandbox, 1))
    polls.run()
    ids = polls.track(submitted(polls.sandbox, 5, samples=1))
    claims, cut = polls.poller._claims._relaxed, [True]

    class Cut:
        """Commits, but loses the reply."""

        @contextmanager
        def begin(self) -> Iterator[Any]:
            with claims.begin() as connection:
                yield connection
            if cut:
                cut.clear()
                raise OperationalError("COMMIT", {}, RuntimeError("the server closed the connection"))

    monkeypatch.setattr(polls.poller._claims, "_relaxed", Cut())
    with pytest.raises(OperationalError):
        polls.run(2.0)
    assert all(polls.row(job).claim_token for job in ids)
    polls.until(lambda: all(polls.row(job).status == "downloading" for job in ids))

    assert [polls.row(job).polls for job in ids] == [1] * 5


def test_given_a_database_that_is_away_when_unpolled_jobs_are_released_then_they_are_released_later(
    polls: Polls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise this process would renew their leases as long as it has other work."""

    def refuse(*_: object) -> None:
        raise LeaseLost

    [job_id] = polls.track(submitted(polls.sandbox, 1))
    monkeypatch.setattr(polls.leases, "check", refuse)
    fail_once(monkeypatch)
    with pytest.raises(OperationalError):
        polls.run(seconds=2)
    assert polls.row(job_id).claim_token is not None
    polls.keys.clear()  # no new job is claimed
    polls.run()
    assert (polls.row(job_id).claim_token, polls.row(job_id).polls) == (None, 0)


def test_given_a_stop_while_the_database_is_away_then_the_next_run_releases_the_unpolled_jobs(
    polls: Polls, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls.track(submitted(polls.sandbox, 1))
    polls.until(lambda: len(polls.sandbox.calls.fetches) == 1)  # the account's key is proven from here on
    polls.run()
    polls.poller.close()  # its threads end, and no others start: no request is sent
    monkeypatch.setattr(polls.poller._pool, "_start_threads", lambda *_: None)
    job_ids = polls.track(submitted(polls.sandbox, 20))
    polls.until(lambda: all(polls.row(job_id).claim_token for job_id in job_ids))
    fail_once(monkeypatch)
    polls.poller.stop()
    with pytest.raises(OperationalError):
        polls.run()
    polls.run()

    rows = [polls.row(job_id) for job_id in job_ids]
    assert {(row.status, row.polls, row.claim_token) for row in rows} == {("pending", 0, None)}


def test_given_two_accounts_and_a_slow_claim_when_the_surplus_cannot_be_released_then_no_job_is_polled_twice(
    engine: Engine, redis_url: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jobs that started stay claimed. The others are released by the next run."""
    polls = Polls(engine, redis_url, sandbox, first=KEY, second=KEY)
    for account in ("first", "second"):
        polls.track(submitted(sandbox, 1), account=account)
    polls.until(lambda: len(sandbox.calls.fetches) == 2)
    polls.run()
    polls.rps = 20.0
    claim = claim_jobs

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.3)
        polls.budget.take("second", 100, rate=polls.rps)  # as another process does
        return claim(*arguments, **options)

    for account in ("first", "second"):
        polls.track(submitted(sandbox, 40, samples=1), account=account)
    monkeypatch.setattr(job_claims, "claim_jobs", slow)
    fail_once(monkeypatch)
    with pytest.raises(OperationalError):
        polls.run(5.0)
    monkeypatch.setattr(job_claims, "claim_jobs", claim)
    polls.rps = 2_000.0

    def all_ready() -> bool:
        with engine.connect() as connection:
            return set(connection.execute(select(jobs.c.status)).scalars()) == {"downloading"}

    polls.until(all_ready)
    with engine.connect() as connection:
        assert set(connection.execute(select(jobs.c.polls)).scalars()) == {1}
    assert set(sandbox.calls.fetches.values()) == {1}


def fail_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next release of claimed jobs fail, as if the database were away."""

    def away(*_: object, **__: object) -> None:
        monkeypatch.setattr(job_claims, "release_jobs", release_jobs)
        raise OperationalError("", {}, Exception("away"))

    monkeypatch.setattr(job_claims, "release_jobs", away)


# ── claims without a poller ───────────────────────────────────────────────────────────────────────────────────────────

TWO_HOSTS = AllowedApi("https://api.test/api/v3", frozenset({"api.test", "other.test"}))
ACCOUNT: list[tuple[Scope, str]] = [("account", "default")]


def make_claims(engine: Engine) -> JobClaims:
    """Return the claims of one process."""
    client = ApiClient(TWO_HOSTS, Scrubber([]), timeout=5.0, connections=1)
    leases = LeaseKeeper(engine, lease=timedelta(seconds=30))
    return JobClaims(engine, client, leases, api_timeout=5.0, rng=random.Random(0))


def add_due(engine: Engine, remote_ids: Sequence[str], *, host: str = "api.test", **changes: Any) -> list[int]:
    """Insert jobs of a host that are due now."""
    base = f"https://{host}/api/v3/fetch"
    with engine.begin() as connection:
        now = database_now(connection)
        times = {"submitted_at": now, "tracked_at": now, "due_at": now, "deadline_at": now + timedelta(hours=1)}
        return [
            add_job(connection, name, fetch_url=f"{base}/{name}", fetch_base=base, fetch_host=host, **(times | changes))
            for name in remote_ids
        ]


def groups_of(engine: Engine, account: str = "default") -> list[DueGroup]:
    """Return the due groups of an account."""
    with engine.connect() as connection:
        return due_groups(connection, [account])


def seconds_until_due(engine: Engine, job_id: int) -> float:
    """Return the seconds until a job is due."""
    with engine.connect() as connection:
        now = database_now(connection)
    return float((read_job(engine, job_id).due_at - now).total_seconds())


def test_given_fewer_granted_requests_than_due_jobs_then_only_so_many_are_claimed(engine: Engine) -> None:
    add_due(engine, ["1", "2", "3"])
    room = {"api.test": 9}

    claimed = make_claims(engine).claim({"default": groups_of(engine)}, {"default": 2}, room, ())

    assert len(claimed["default"]) == 2
    assert room == {"api.test": 7}
    rows = [read_job(engine, job.id) for job in claimed["default"]]
    assert [(row.polls, row.claim_token) for row in rows] == [(1, job.token) for job in claimed["default"]]


def test_given_a_host_without_free_places_then_only_jobs_of_another_host_are_claimed(engine: Engine) -> None:
    add_due(engine, ["1", "2"])
    elsewhere = add_due(engine, ["3"], host="other.test")

    claimed = make_claims(engine).claim(
        {"default": groups_of(engine)}, {"default": 5}, {"api.test": 0, "other.test": 5}, ()
    )

    assert [job.id for job in claimed["default"]] == elsewhere


def test_given_two_accounts_of_one_host_then_they_share_its_free_places(engine: Engine) -> None:
    add_due(engine, ["1", "2"])
    add_due(engine, ["3", "4"], account="other")
    due = {account: groups_of(engine, account) for account in ("default", "other")}

    claimed = make_claims(engine).claim(due, {"default": 2, "other": 2}, {"api.test": 3}, ())

    assert [len(account_jobs) for account_jobs in claimed.values()] == [2, 1]


def test_given_an_account_without_granted_requests_then_none_of_its_jobs_is_claimed(engine: Engine) -> None:
    [job_id] = add_due(engine, ["1"])

    assert make_claims(engine).claim({"default": groups_of(engine)}, {"default": 0}, {"api.test": 9}, ()) == {}

    assert read_job(engine, job_id).claim_token is None


def test_given_a_probe_in_flight_when_another_process_wants_to_probe_then_it_claims_nothing(engine: Engine) -> None:
    add_due(engine, ["1", "2"])
    groups = groups_of(engine)

    [job] = make_claims(engine).claim_probe(groups, ACCOUNT)
    second_probe = make_claims(engine).claim_probe(groups, ACCOUNT)

    assert second_probe == []
    assert read_job(engine, job.id).claim_token == job.token


def test_given_no_job_that_may_be_polled_then_another_process_may_probe_at_once(engine: Engine) -> None:
    add_due(engine, ["1"], host="unlisted.test")
    assert make_claims(engine).claim_probe(groups_of(engine), ACCOUNT) == []
    allowed = add_due(engine, ["2"])

    assert [job.id for job in make_claims(engine).claim_probe(groups_of(engine), ACCOUNT)] == allowed


def test_given_a_breaker_that_is_not_to_be_probed_when_another_is_then_no_job_is_claimed(engine: Engine) -> None:
    """Another process has ended the hold of the host, or has begun one."""
    add_due(engine, ["1"])

    assert make_claims(engine).claim_probe(groups_of(engine), [*ACCOUNT, ("host", "api.test")]) == []


def test_given_claimed_jobs_when_they_are_released_then_they_are_due_again_and_their_polls_do_not_count(
    engine: Engine,
) -> None:
    ids = add_due(engine, ["1", "2"])
    claims = make_claims(engine)
    claimed = claims.claim({"default": groups_of(engine)}, {"default": 2}, {"api.test": 2}, ())

    claims.release(claimed["default"])

    rows = [read_job(engine, job_id) for job_id in ids]
    assert [(row.polls, row.claim_token, row.claim_holder) for row in rows] == [(0, None, None)] * 2
    assert all(seconds_until_due(engine, job_id) <= 0 for job_id in ids)


def test_given_a_job_whose_address_may_not_get_the_key_when_claimed_then_it_is_not_tried_again_for_a_minute(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    [job_id] = add_due(engine, ["1"], host="unlisted.test")

    claimed = make_claims(engine).claim({"default": groups_of(engine)}, {"default": 1}, {"unlisted.test": 1}, ())

    row = read_job(engine, job_id)
    assert claimed == {"default": []}
    assert (row.polls, row.claim_token) == (0, None)
    assert 50 < seconds_until_due(engine, job_id) <= 60
    assert f"a job's fetch address is refused job={job_id}" in caplog.text
