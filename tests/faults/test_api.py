"""The API is away, storms, drips or talks nonsense: no job pays for it, it is hardly asked, and all goes on again."""

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
    HurtRedis,
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
BUSIEST = 1.5 * RPS + RPS // 10  # the rate and a burst, and what a busy machine held back for half a second
IN_THE_AIR = 4 * RPS  # more can't have gone out before the first answers were written
JSON = {"Content-Type": "application/json"}
BAD_GATEWAY = Answer(502, {"Content-Type": "text/html"}, b"<html><h1>502 Bad Gateway</h1></html>")

pytestmark = [pytest.mark.long, pytest.mark.server]


@pytest.fixture(autouse=True)
def budget(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few requests per second, and few seconds for each of them; set after the stand-in has set its own."""
    monkeypatch.setenv("SD_API_RPS", str(RPS))
    monkeypatch.setenv("SD_API_TIMEOUT", str(API_TIMEOUT))
    monkeypatch.setenv("POLL_MIN", "1")


def _tracked(sandbox: Sandbox, count: int = JOBS) -> list[str]:
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


def _pending(engine: Engine) -> None:
    found = states(engine)
    assert not found.keys() & {"failed", "expired", "cancelled"}, found


def test_given_an_api_that_is_away_for_two_minutes_when_it_is_back_then_all_is_done_within_a_probe_and_a_minute(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis
) -> None:
    """What is asked meanwhile are the calls that find out, and probes after 10, 20 and 40 seconds."""
    with up(tmp_path):
        first = _tracked(sandbox, 5)
        wait_completed(database, len(first), tmp_path)
        before = _polls(database)
        with sandbox.away():
            went = time.monotonic()
            _tracked(sandbox, JOBS)
            wait_until(lambda: _held(database, "host"), "the host is held", seen=lambda: states(database))
            wait_unclaimed(database)
            finding_out = _polls(database) - before
            time.sleep(max(0.0, went + 120 - time.monotonic()))
            probes = _polls(database) - before - finding_out
            _pending(database)
        count = len(first) + JOBS
        took = wait_completed(database, count, tmp_path)
    print(f"away for 120 s: {finding_out} calls to find out, {probes} probes; all done {took:.1f} s after it")
    assert 5 <= finding_out <= IN_THE_AIR
    assert probes == 3
    assert busiest(sandbox) <= BUSIEST
    assert_nothing_lost(database, sandbox, tmp_path, count)
    assert_polls_are_the_calls(database, sandbox, unheard=finding_out + probes)


def test_given_a_storm_of_bad_gateways_when_it_is_over_then_the_next_probe_ends_the_hold(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis
) -> None:
    """One call in ten seconds and one in twenty is all that it gets meanwhile."""
    with up(tmp_path):
        sandbox.storm([BAD_GATEWAY])
        _tracked(sandbox)
        wait_until(lambda: _held(database, "host"), "the host is held", seen=lambda: states(database))
        wait_unclaimed(database)
        finding_out = _polls(database)
        time.sleep(20)
        probes = _polls(database) - finding_out
        _pending(database)
        sandbox.storm([])
        took = wait_completed(database, JOBS, tmp_path)
    print(f"502 for 20 s: {finding_out} calls to find out, {probes} probes; all done {took:.1f} s after it")
    assert 5 <= finding_out <= IN_THE_AIR
    assert probes == 1
    assert busiest(sandbox) <= BUSIEST
    assert_nothing_lost(database, sandbox, tmp_path, JOBS)
    assert_polls_are_the_calls(database, sandbox)


def _limit(header: str) -> Answer:
    return Answer(429, JSON | {"Retry-After": header}, b'{"status": "error", "message": "Rate limit exceeded"}')


HOSTILE = {  # what the answer says, and the least and the most seconds that it may be heeded
    "negative": (_limit("-5"), 1, 1),
    "a date": (_limit(formatdate(time.time() + 86_400 * 365, usegmt=True)), 900, 900),
    "garbage": (_limit("soon, I promise"), 30, 30),
    "a day": (_limit("86400"), 900, 900),
}


def test_given_a_storm_of_rate_limits_when_they_name_absurd_times_then_the_account_pauses_for_sane_ones(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis
) -> None:
    """The whole account, without a single call. The pauses are ended here by moving them, as hours would.

    Each of them has cut the rate, so the few jobs take their time afterwards.
    """
    with up(tmp_path):
        first = _tracked(sandbox, 1)  # the key is proven
        wait_completed(database, len(first), tmp_path)
        said = []
        _tracked(sandbox, FEW)
        for name, (answer, least, most) in HOSTILE.items():
            sandbox.storm([answer])
            breaker = _paused(database, least)
            pause = (breaker.until - breaker.since).total_seconds()
            assert least - 0.1 <= pause <= most + 5, f"{name}: {pause}"  # more of them may come within the hold
            sandbox.storm([])
            before, looked = _polls(database), 0.0
            if least > 1:
                time.sleep(2)
                looked = 2.0
                assert _polls(database) == before, f"{name}: asked during the pause"
            said.append(f"{name} {pause:.0f} s")
            with database.begin() as connection:
                now = database_now(connection)
                over = {"until": now, "cut_at": now, "since": now - timedelta(seconds=looked)}
                connection.execute(update(breakers).where(breakers.c.scope == "account").values(over))
            _pending(database)
        count = len(first) + FEW
        took = wait_completed(database, count, tmp_path)
    refused = sandbox.calls.fetch_answers["error"]
    print(f"429: {', '.join(said)}; {refused} calls refused; all done {took:.1f} s after it")
    assert refused <= len(HOSTILE) * IN_THE_AIR
    assert busiest(sandbox) <= BUSIEST
    assert_nothing_lost(database, sandbox, tmp_path, count)
    assert_polls_are_the_calls(database, sandbox)


def _paused(engine: Engine, least: float) -> Any:
    """The account's gate once it is shut, and what was in the air has come back."""

    def shut() -> bool:
        breaker = _breaker(engine, "account")
        return (
            breaker is not None
            and breaker.reason == "rate limited"
            and breaker.until >= breaker.since + timedelta(least / 1e5)
        )

    wait_until(shut, "the account pauses", seen=lambda: _breaker(engine, "account"))
    if least > 1:
        wait_unclaimed(engine)
    return _breaker(engine, "account")


def _about(job: str, **content: object) -> bytes:
    return json.dumps({"status": "success", "id": int(job), **content}).encode()


NONSENSE: dict[str, Callable[[str], Answer]] = {
    "a page": lambda job: Answer(200, {"Content-Type": "text/html"}, b"<!doctype html><h1>Just a moment</h1>"),
    "nothing": lambda job: Answer(200, JSON, b""),
    "half of it": lambda job: Answer(200, JSON, _about(job, output=["https://cdn.test/a.png"])[:40]),
    "half of what was announced": lambda job: Answer(200, JSON | {"Content-Length": "900"}, b'{"status": "succ'),
    "another job": lambda job: Answer(200, JSON, _about("7", output=["https://cdn.test/wrong.png"])),
    "no number": lambda job: Answer(200, JSON, b'{"status": "processing", "eta": NaN, "id": NaN}'),
    "a deep one": lambda job: Answer(200, JSON, b'{"a": ' * 50_000),
    "no status": lambda job: Answer(200, JSON, b'{"id": 1, "output": ["https://cdn.test/early.png"]}'),
    "a list": lambda job: Answer(200, JSON, b'["success"]'),
    "a drip": lambda job: Answer(200, JSON, _about(job, output=["https://cdn.test/late.png"]), 0.5),
    "dripping headers": lambda job: Answer(200, JSON, b"{}", 0.5, drip_headers=True),
}


def test_given_nonsense_of_every_kind_when_sense_comes_again_then_each_job_has_its_own_pictures(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis
) -> None:
    """Each job hears one kind of it, twice; answers that drip are given up, and keep nobody else waiting."""
    sandbox.options_now(min_seconds=0.1, max_seconds=0.2)
    with up(tmp_path):
        first = _tracked(sandbox, 1)
        wait_completed(database, len(first), tmp_path)
        submitted = [sandbox.submit(f"a harbour, {name}", samples=1) for name in NONSENSE]
        for answer, (name, made) in zip(submitted, NONSENSE.items(), strict=True):
            sandbox.script(answer["id"], [made(str(answer["id"]))] * (1 if "drip" in name else 2))
        plain = sandbox.submit("a harbour, its output a text", samples=1)
        link = plain["future_links"][0]
        sandbox.script(plain["id"], [Answer(200, JSON, _about(str(plain["id"]), output=link))])
        time.sleep(0.2)
        track_many([*submitted, plain])
        count = len(first) + len(submitted) + 1
        took = wait_completed(database, count, tmp_path)
    with database.connect() as connection:
        polls = {row.remote_id: row.polls for row in connection.execute(select(jobs))}
    kinds = {name: str(answer["id"]) for answer, name in zip(submitted, NONSENSE, strict=True)}
    began: dict[str, float] = {}
    for at, job in sandbox.calls.fetch_moments:
        began.setdefault(job, at)
    others = [began[job] for name, job in kinds.items() if "drip" not in name]
    print(f"nonsense: all done in {took:.1f} s; polls {sorted(polls.values())}")
    assert {name: polls[job] for name, job in kinds.items()} == {name: 2 if "drip" in name else 3 for name in kinds}
    assert polls[str(plain["id"])] == 1
    dripped = [began[job] for name, job in kinds.items() if "drip" in name]
    assert max(others) < min(dripped) + API_TIMEOUT, "they waited for those that drip"
    assert least_gap(sandbox) >= 0.5  # POLL_MIN, less half a second of a busy machine
    assert_nothing_lost(database, sandbox, tmp_path, count, asked_again=len(NONSENSE))
    assert_polls_are_the_calls(database, sandbox)
    assert "Traceback" not in (tmp_path / "up.log").read_text()
