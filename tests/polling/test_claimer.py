"""The order and the number of claimed jobs: budget, priority, shares of accounts and hosts, probes."""

import socket
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from tests.polling.polls import KEY, Polls, submitted
from tests.waiting import wait_until
from worker.core.circuit_breaker import after_refusal
from worker.polling import job_claims
from worker.polling.options import MAX_IN_FLIGHT
from worker.sandbox import Sandbox
from worker.store.breakers import locked_breaker, save_breaker
from worker.store.claims import claim_jobs
from worker.store.engine import database_now


def test_given_an_account_without_a_key_when_polled_then_its_jobs_are_not_polled(polls: Polls) -> None:
    (job,) = polls.track(submitted(polls.sandbox, 1), account="other")

    polls.run()

    assert polls.row(job).polls == 0
    assert polls.row(job).status == "pending"


def test_given_more_jobs_than_the_budget_when_polled_then_no_second_has_more_than_rate_and_burst(
    engine: Engine, redis_url: str, sandbox: Sandbox
) -> None:
    polls = Polls(engine, redis_url, sandbox, budgeted=KEY)
    polls.rps = 20
    ids = polls.track(submitted(sandbox, 60, samples=1), account="budgeted")
    started = time.monotonic()

    polls.until(lambda: all(polls.row(job).status == "downloading" for job in ids))

    assert time.monotonic() - started >= (60 - 2) / 20 * 0.9


def test_given_a_held_host_when_its_probe_is_due_then_only_an_account_that_is_not_held_makes_it(
    engine: Engine, redis_url: str, sandbox: Sandbox
) -> None:
    polls = Polls(engine, redis_url, sandbox, default=KEY, rejected="wrong-key")
    good, bad = submitted(sandbox, 2, samples=1)
    (rejected_job,) = polls.track([bad], account="rejected")
    polls.run()
    (job,) = polls.track([good])
    name = polls.row(job).fetch_host
    with engine.begin() as connection:
        now = database_now(connection)
        host = locked_breaker(connection, "host", name)
        save_breaker(connection, after_refusal(host, "unreachable", now=now - timedelta(seconds=30), probe=True))

    polls.until(lambda: bool(polls.row(job).status == "downloading"))

    assert polls.row(rejected_job).polls == 1
    assert polls.breaker(name).reason is None


# ── order of polls ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_many_jobs_of_one_account_when_another_has_a_few_then_the_few_do_not_wait(
    engine: Engine, redis_url: str, sandbox: Sandbox
) -> None:
    polls = Polls(engine, redis_url, sandbox, crowd=KEY, few=KEY)
    polls.track(submitted(sandbox, 1), account="crowd")
    polls.track(submitted(sandbox, 1), account="few")
    polls.until(lambda: len(sandbox.calls.fetches) == 2)
    polls.run()  # both keys are accepted
    polled_before = len(sandbox.calls.fetches)
    polls.track(submitted(sandbox, 1_500, samples=1), account="crowd")
    few = submitted(sandbox, 5, samples=1)
    polls.track(few, account="few")

    polls.until(lambda: set(few) <= set(sandbox.calls.fetches))

    order = list(sandbox.calls.fetches)[polled_before:]
    assert max(order.index(remote_id) for remote_id in few) < 400, "the few jobs waited for the many"


def test_given_a_short_budget_when_jobs_are_due_then_priority_and_then_due_time_decide_the_order(
    engine: Engine, redis_url: str, sandbox: Sandbox
) -> None:
    polls = Polls(engine, redis_url, sandbox, short=KEY)
    with engine.connect() as connection:
        now = database_now(connection)
    polls.track(submitted(sandbox, 1), account="short")
    polls.run()
    polled_before = len(sandbox.calls.fetches)
    polls.rps = 20
    late, early, important = (submitted(sandbox, 6, samples=1) for _ in range(3))
    polls.track(late, account="short", due_at=now - timedelta(seconds=10))
    polls.track(early, account="short", due_at=now - timedelta(seconds=60))
    polls.track(important, account="short", priority=5)

    polls.until(lambda: len(sandbox.calls.fetches) == polled_before + 18)

    order = list(sandbox.calls.fetches)[polled_before:]
    places = [sum(order.index(remote_id) for remote_id in group) / 6 for group in (important, early, late)]
    assert places == sorted(places)
    assert places[0] + 3 < places[1]
    assert places[1] + 3 < places[2]


def test_given_a_silent_host_with_many_due_jobs_then_those_of_another_host_are_polled_meanwhile(
    engine: Engine, redis_url: str, sandbox: Sandbox
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as silent:
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        polls = Polls(engine, redis_url, sandbox, other_host=host)
        polls.track(submitted(sandbox, 1))
        polls.run()
        polls.track(range(400), host=host)
        run = threading.Thread(target=polls.run, args=(3.0,))
        run.start()
        wait_until(
            lambda: polls.poller._pool.outstanding_at(host) >= MAX_IN_FLIGHT, "the silent host's places are taken"
        )
        good = submitted(sandbox, 20, samples=1)
        polls.track(good)
        polls.poller.wake()
        began = time.monotonic()
        while not set(good) <= set(sandbox.calls.fetches):
            assert time.monotonic() - began < 2.5, "they waited for another host"
            time.sleep(0.01)
        polls.poller.stop()
    run.join()


# ── shares ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_many_accounts_and_few_places_when_all_have_many_due_jobs_then_each_is_polled(
    engine: Engine, redis_url: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"account-{number:02}" for number in range(20)]
    options = {"max_in_flight": 4, "min_room": 1}
    polls = Polls(engine, redis_url, sandbox, options=options, **dict.fromkeys(names, KEY))
    with engine.begin() as connection:
        for name in names:
            save_breaker(connection, replace(locked_breaker(connection, "account", name), proven=True))
    for name in names:
        polls.track([f"{name}-{number}" for number in range(100)], account=name)
    polled: Counter[str] = Counter()
    ask = polls.client.ask

    def counted(address: Any, remote_id: str, *options: Any) -> Any:
        polled[remote_id[:10]] += 1
        time.sleep(0.005)
        return ask(address, remote_id, *options)

    monkeypatch.setattr(polls.client, "ask", counted)
    polls.until(lambda: polled.total() >= 300)

    assert set(polled) == set(names)
    assert max(polled.values()) < polled.total() / 5


def test_given_a_claim_delayed_by_the_database_then_its_requests_are_not_sent_all_at_once(
    engine: Engine, redis_url: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls = Polls(engine, redis_url, sandbox)
    polls.track(submitted(sandbox, 1))
    polls.run()
    polls.rps = 100.0
    claim, sent = claim_jobs, list[float]()

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return claim(*arguments, **options)

    ask = polls.client.ask

    def noted(*arguments: Any) -> Any:
        sent.append(time.monotonic())
        return ask(*arguments)

    monkeypatch.setattr(job_claims, "claim_jobs", slow)
    monkeypatch.setattr(polls.client, "ask", noted)
    polls.track([f"late{number}" for number in range(400)])
    polls.run(2.0)

    busiest = max(sum(at <= later < at + 0.1 for later in sent) for at in sent)
    assert len(sent) >= 20
    assert busiest <= 10 + 10 + 4, "a tenth of a second's requests, the burst, and some tolerance"
