"""The API is down, returns errors, answers slowly or sends garbage: few requests are sent, and no job is lost."""

import json
import time
from collections.abc import Callable
from datetime import timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, select, update

from tests.faults.servers import (
    RedisServer,
    assert_nothing_lost,
    assert_polls_are_the_calls,
    busiest,
    least_gap,
    states,
    up,
    wait_completed,
    wait_unclaimed,
)
from tests.waiting import wait_until
from worker import track_many
from worker.sandbox import Answer, Sandbox
from worker.store.engine import database_now
from worker.store.schema import breakers, jobs

JOBS, FEW, RPS, API_TIMEOUT = 40, 8, 20, 4
BUSIEST = 1.5 * RPS + RPS // 10  # the rate, a burst, and requests that a busy machine delayed by half a second
IN_FLIGHT = 4 * RPS  # the most requests that can be sent before the first answers are recorded
JSON = {"Content-Type": "application/json"}
BAD_GATEWAY = Answer(502, {"Content-Type": "text/html"}, b"<html><h1>502 Bad Gateway</h1></html>")

pytestmark = [pytest.mark.long, pytest.mark.server]


@pytest.fixture(autouse=True)
def rate_limit(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a low rate limit and a short time-out. Depends on `sandbox`, which sets the rate limit too."""
    monkeypatch.setenv("SD_API_RPS", str(RPS))
    monkeypatch.setenv("SD_API_TIMEOUT", str(API_TIMEOUT))
    monkeypatch.setenv("POLL_MIN", "1")


def _track(sandbox: Sandbox, count: int = JOBS) -> list[str]:
    submitted = [sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(count)]
    track_many(submitted)
    return [str(answer["id"]) for answer in submitted]


def _polls(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(select(func.coalesce(func.sum(jobs.c.polls), 0))).scalar_one())


def _breaker(engine: Engine, scope: str) -> Any:
    with engine.connect() as connection:
        return connection.execute(select(breakers).where(breakers.c.scope == scope)).one_or_none()


def _held(engine: Engine, scope: str) -> bool:
    breaker = _breaker(engine, scope)
    return breaker is not None and breaker.reason is not None


def _assert_none_ended(engine: Engine) -> None:
    counts = states(engine)
    assert not counts.keys() & {"failed", "expired", "cancelled"}, counts


def test_given_an_api_outage_of_two_minutes_when_it_ends_then_all_jobs_complete_after_the_next_probe(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """During the outage only the requests that open the breaker are sent, and probes after 10, 20 and 40 seconds."""
    with up(tmp_path):
        first = _track(sandbox, 5)
        wait_completed(database, len(first), tmp_path)
        before = _polls(database)
        with sandbox.away():
            outage_start = time.monotonic()
            _track(sandbox, JOBS)
            wait_until(lambda: _held(database, "host"), "the host is held", seen=lambda: states(database))
            wait_unclaimed(database)
            finding_out = _polls(database) - before
            time.sleep(max(0.0, outage_start + 120 - time.monotonic()))
            probes = _polls(database) - before - finding_out
            _assert_none_ended(database)
        count = len(first) + JOBS
        seconds = wait_completed(database, count, tmp_path)
    print(f"outage of 120 s: {finding_out} polls until the hold, {probes} probes; completed {seconds:.1f} s after it")
    assert 5 <= finding_out <= IN_FLIGHT
    assert probes == 3
    assert busiest(sandbox) <= BUSIEST
    assert_nothing_lost(database, sandbox, tmp_path, count)
    assert_polls_are_the_calls(database, sandbox, unheard=finding_out + probes)


def test_given_bad_gateway_answers_when_they_end_then_the_next_probe_ends_the_hold(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """In 20 seconds one probe is sent: the first after 10 seconds, the next 20 seconds later."""
    with up(tmp_path):
        sandbox.storm([BAD_GATEWAY])
        _track(sandbox)
        wait_until(lambda: _held(database, "host"), "the host is held", seen=lambda: states(database))
        wait_unclaimed(database)
        finding_out = _polls(database)
        time.sleep(20)
        probes = _polls(database) - finding_out
        _assert_none_ended(database)
        sandbox.storm([])
        seconds = wait_completed(database, JOBS, tmp_path)
    print(
        f"502 for 20 s: {finding_out} polls until the hold, {probes} probes; completed {seconds:.1f} s after the errors"
    )
    assert 5 <= finding_out <= IN_FLIGHT
    assert probes == 1
    assert busiest(sandbox) <= BUSIEST
    assert_nothing_lost(database, sandbox, tmp_path, JOBS)
    assert_polls_are_the_calls(database, sandbox)


def _limit(header: str) -> Answer:
    return Answer(429, JSON | {"Retry-After": header}, b'{"status": "error", "message": "Rate limit exceeded"}')


HOSTILE = {  # the answer, and the shortest and longest pause that it may cause, in seconds
    "negative": (_limit("-5"), 1, 1),
    "a date": (_limit(formatdate(time.time() + 86_400 * 365, usegmt=True)), 900, 900),
    "garbage": (_limit("soon, I promise"), 30, 30),
    "a day": (_limit("86400"), 900, 900),
}


def test_given_rate_limit_answers_with_an_absurd_retry_after_then_the_account_pauses_for_a_bounded_time(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """No request is sent for the account during a pause. The test ends each pause by changing its times.

    Each pause reduces the rate, so the jobs complete slowly afterwards.
    """
    with up(tmp_path):
        first = _track(sandbox, 1)  # so that the API key has been accepted once
        wait_completed(database, len(first), tmp_path)
        pauses = []
        _track(sandbox, FEW)
        for name, (answer, shortest, longest) in HOSTILE.items():
            sandbox.storm([answer])
            breaker = _wait_for_pause(database, shortest)
            pause = (breaker.until - breaker.since).total_seconds()
            assert shortest - 0.1 <= pause <= longest + 5, f"{name}: {pause}"  # later answers may extend it
            sandbox.storm([])
            before, watched = _polls(database), 0.0
            if shortest > 1:
                time.sleep(2)
                watched = 2.0
                assert _polls(database) == before, f"{name}: polled during the pause"
            pauses.append(f"{name} {pause:.0f} s")
            with database.begin() as connection:
                now = database_now(connection)
                ended = {"until": now, "cut_at": now, "since": now - timedelta(seconds=watched)}
                connection.execute(update(breakers).where(breakers.c.scope == "account").values(ended))
            _assert_none_ended(database)
        count = len(first) + FEW
        seconds = wait_completed(database, count, tmp_path)
    refused = sandbox.calls.fetch_answers["error"]
    print(f"429: {', '.join(pauses)}; {refused} requests refused; completed {seconds:.1f} s after the last pause")
    assert refused <= len(HOSTILE) * IN_FLIGHT
    assert busiest(sandbox) <= BUSIEST
    assert_nothing_lost(database, sandbox, tmp_path, count)
    assert_polls_are_the_calls(database, sandbox)


def _wait_for_pause(engine: Engine, shortest: float) -> Any:
    """Wait until the account's breaker is open and no request is in flight. Return the breaker's row."""

    def is_open() -> bool:
        breaker = _breaker(engine, "account")
        return (
            breaker is not None
            and breaker.reason == "rate limited"
            and breaker.until >= breaker.since + timedelta(shortest / 1e5)
        )

    wait_until(is_open, "the account pauses", seen=lambda: _breaker(engine, "account"))
    if shortest > 1:
        wait_unclaimed(engine)
    return _breaker(engine, "account")


def _success(job: str, **content: object) -> bytes:
    return json.dumps({"status": "success", "id": int(job), **content}).encode()


GARBAGE: dict[str, Callable[[str], Answer]] = {
    "a page": lambda job: Answer(200, {"Content-Type": "text/html"}, b"<!doctype html><h1>Just a moment</h1>"),
    "nothing": lambda job: Answer(200, JSON, b""),
    "half of it": lambda job: Answer(200, JSON, _success(job, output=["https://cdn.test/a.png"])[:40]),
    "half of what was announced": lambda job: Answer(200, JSON | {"Content-Length": "900"}, b'{"status": "succ'),
    "another job": lambda job: Answer(200, JSON, _success("7", output=["https://cdn.test/wrong.png"])),
    "no number": lambda job: Answer(200, JSON, b'{"status": "processing", "eta": NaN, "id": NaN}'),
    "a deep one": lambda job: Answer(200, JSON, b'{"a": ' * 50_000),
    "no status": lambda job: Answer(200, JSON, b'{"id": 1, "output": ["https://cdn.test/early.png"]}'),
    "a list": lambda job: Answer(200, JSON, b'["success"]'),
    "a drip": lambda job: Answer(200, JSON, _success(job, output=["https://cdn.test/late.png"]), 0.5),
    "dripping headers": lambda job: Answer(200, JSON, b"{}", 0.5, drip_headers=True),
}


def test_given_garbage_answers_of_every_kind_when_valid_answers_follow_then_each_job_has_its_own_outputs(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """Each job gets one kind twice. Slow-drip answers time out and do not delay the polls of other jobs."""
    sandbox.options_now(min_seconds=0.1, max_seconds=0.2)
    with up(tmp_path):
        first = _track(sandbox, 1)
        wait_completed(database, len(first), tmp_path)
        submitted = [sandbox.submit(f"a harbour, {name}", samples=1) for name in GARBAGE]
        for answer, (name, make_answer) in zip(submitted, GARBAGE.items(), strict=True):
            sandbox.script(answer["id"], [make_answer(str(answer["id"]))] * (1 if "drip" in name else 2))
        plain = sandbox.submit("a harbour, its output a string", samples=1)
        link = plain["future_links"][0]
        sandbox.script(plain["id"], [Answer(200, JSON, _success(str(plain["id"]), output=link))])
        time.sleep(0.2)
        track_many([*submitted, plain])
        count = len(first) + len(submitted) + 1
        seconds = wait_completed(database, count, tmp_path)
    with database.connect() as connection:
        polls = {row.remote_id: row.polls for row in connection.execute(select(jobs))}
    kinds = {name: str(answer["id"]) for answer, name in zip(submitted, GARBAGE, strict=True)}
    first_polls: dict[str, float] = {}
    for at, job in sandbox.calls.fetch_moments:
        first_polls.setdefault(job, at)
    prompt = [first_polls[job] for name, job in kinds.items() if "drip" not in name]
    print(f"garbage answers: completed in {seconds:.1f} s; polls {sorted(polls.values())}")
    assert {name: polls[job] for name, job in kinds.items()} == {name: 2 if "drip" in name else 3 for name in kinds}
    assert polls[str(plain["id"])] == 1
    dripped = [first_polls[job] for name, job in kinds.items() if "drip" in name]
    assert max(prompt) < min(dripped) + API_TIMEOUT, "other jobs waited for the slow-drip answers"
    assert least_gap(sandbox) >= 0.5  # POLL_MIN, minus half a second for a busy machine
    assert_nothing_lost(database, sandbox, tmp_path, count, asked_again=len(GARBAGE))
    assert_polls_are_the_calls(database, sandbox)
    assert "Traceback" not in (tmp_path / "up.log").read_text()
