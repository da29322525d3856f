"""Holding by hand: what is held is never asked, nor expires, nor moves, until it is let go; then it goes on at once."""

import logging
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, select, update

import worker
from tests.rows import NOW, add_downloading, add_job, add_output, claim_due_jobs, read_job, read_output, seconds
from worker.client import actions, holds, tracking
from worker.core.circuit_breaker import CircuitBreaker, Scope, after_rate_limit, after_refusal
from worker.core.lifecycle import AskAgain, EndJob, JobFacts, Strikes, after_answer
from worker.core.reply import Processing
from worker.errors import JobNotFound
from worker.operations import overview
from worker.operations.overview import overview as read_overview
from worker.operations.overview import why
from worker.settings import load
from worker.store import holds as store
from worker.store.breakers import all_breakers, locked_breaker, save_breaker
from worker.store.claims import due_groups, release_jobs, renew_leases
from worker.store.counters import Tally
from worker.store.due import next_request
from worker.store.engine import database_now
from worker.store.holds import WorkLimits
from worker.store.jobs import cancel, nudge, retry
from worker.store.reports.search import JobFilter
from worker.store.results import Outcome, record_answers
from worker.store.schema import HELD_UNTIL, jobs

LEAST = timedelta(seconds=3)
PATIENCE = WorkLimits(LEAST, timedelta(seconds=80), timedelta(seconds=360))
YEARS = NOW + timedelta(days=3_650)


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The database that a web app's process uses."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return engine


def _held(engine: Engine, **changes: Any) -> int:
    with engine.begin() as connection:
        job_id = add_job(connection, **changes)
        assert store.hold(connection, [job_id], now=NOW) == {job_id}
    return job_id


def _breaker(engine: Engine, scope: Scope = "account", name: str = "default") -> CircuitBreaker:
    with engine.connect() as connection:
        return all_breakers(connection)[scope, name]


# ── one job ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_held_job_is_never_claimed_and_no_hint_moves_it(engine: Engine) -> None:
    job_id = _held(engine)
    with engine.begin() as connection:
        assert claim_due_jobs(connection, now=YEARS) == []
        assert nudge(connection, "1", None, now=YEARS, least=LEAST) == 0
        assert [level.due_at for level in due_groups(connection, ["default"])] == [HELD_UNTIL]

    held = read_job(engine, job_id)
    assert (held.status, held.held_at, held.due_at) == ("pending", NOW, HELD_UNTIL)


def test_only_what_is_pending_and_not_held_yet_can_be_held(engine: Engine) -> None:
    with engine.begin() as connection:
        pending = add_job(connection, "1")
        ended = add_job(connection, "2", status="cancelled", due_at=None, completed_at=NOW)
        loading = add_downloading(connection, "3", due_at=NOW)  # asked about for a fresh link
        assert store.hold(connection, [pending, ended, loading], now=NOW) == {pending}
        assert store.hold(connection, [pending, ended, loading], now=YEARS) == set()
        assert store.resume(connection, [ended, loading], PATIENCE, now=NOW) == set()

    assert read_job(engine, pending).held_at == NOW


def test_an_answer_that_was_under_way_is_lost_and_so_is_the_lease(engine: Engine) -> None:
    """Whatever the process that asked does next."""
    with engine.begin() as connection:
        job_id = add_job(connection)
        [claimed] = claim_due_jobs(connection)
        store.hold(connection, [job_id], now=NOW + seconds(1))
        ended = Outcome(claimed, EndJob("failed", "api_failed", "no"), "failed")
        assert record_answers(connection, [ended], Tally(), now=NOW + seconds(2)).lost == 1
        assert not renew_leases(connection, "holder", lease=LEAST, now=NOW + seconds(2))
        release_jobs(connection, [job_id], claimed.token, due_at=NOW + seconds(2))

    held = read_job(engine, job_id)
    assert (held.status, held.due_at, held.claim_token) == ("pending", HELD_UNTIL, None)


def test_a_resumed_job_is_due_at_once_and_does_not_expire_within_its_grace(engine: Engine) -> None:
    """The first answer is not too late, however long it was held; one after the minute is."""
    job_id = _held(engine, deadline_at=NOW + seconds(5), pace_scale=4.0, pace_growth=1.0)
    with engine.begin() as connection:
        assert store.resume(connection, [job_id], PATIENCE, now=YEARS) == {job_id}
        assert store.resume(connection, [job_id], PATIENCE, now=YEARS) == set()
        [claimed] = claim_due_jobs(connection, now=YEARS)

    resumed = read_job(engine, job_id)
    assert (resumed.held_at, resumed.deadline_at) == (None, YEARS + seconds(60))
    assert (resumed.pace_scale, resumed.pace_growth) == (None, None)
    facts = JobFacts("pending", NOW, claimed.facts.deadline_at, Strikes())
    steps = [after_answer(facts, Processing(), now=YEARS + seconds(at), min_interval=LEAST) for at in (59, 60)]
    assert [type(step) for step in steps] == [AskAgain, EndJob]


def test_a_deadline_that_is_far_off_stays(engine: Engine) -> None:
    job_id = _held(engine)
    with engine.begin() as connection:
        store.resume(connection, [job_id], PATIENCE, now=NOW + seconds(10))

    assert read_job(engine, job_id).deadline_at == NOW + seconds(3_600)


def test_holding_and_resuming_asks_no_sooner_than_poll_min(engine: Engine) -> None:
    with engine.begin() as connection:
        recent, long_ago = add_job(connection, "1"), add_job(connection, "2", asked_at=NOW - seconds(60))
        claim_due_jobs(connection, limit=1, now=NOW)
        connection.execute(update(jobs).where(jobs.c.id == recent).values(asked_at=NOW))
        store.hold(connection, [recent, long_ago], now=NOW + seconds(1))
        store.resume(connection, [recent, long_ago], PATIENCE, now=NOW + seconds(1))

    assert read_job(engine, recent).due_at == NOW + LEAST
    assert read_job(engine, long_ago).due_at == NOW + seconds(1)


def test_a_held_job_can_be_cancelled_and_is_held_no_more(engine: Engine) -> None:
    job_id = _held(engine)
    with engine.begin() as connection:
        assert not retry(connection, job_id, now=NOW)
        assert cancel(connection, job_id, Tally(), now=NOW)

    assert (read_job(engine, job_id).status, read_job(engine, job_id).held_at) == ("cancelled", None)


def test_the_front_door_holds_and_resumes_and_wakes_the_workers(
    database: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    woken: list[str] = []
    monkeypatch.setattr(tracking._workers, "wake", lambda settings: woken.append("woken"))
    caplog.set_level(logging.INFO, "worker.client.holds")
    job_id = worker.track("7", submitted_at=datetime.now().astimezone() - timedelta(hours=2))
    woken.clear()

    assert [worker.hold(job_id), worker.hold(job_id)] == [True, False]
    held = worker.get(job_id)
    assert held is not None
    assert held.held_at is not None
    assert held.progress().phase == "waiting"
    assert woken == []
    assert [worker.resume(job_id), worker.resume(job_id)] == [True, False]

    assert woken == ["woken"]
    assert [line.getMessage() for line in caplog.records] == [
        f"held by an operator job={job_id}",
        f"resumed by an operator job={job_id}",
    ]
    for act in (worker.hold, worker.resume):
        with pytest.raises(JobNotFound):
            act(999_999)


# ── what operators see ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_held_job_says_so_and_is_no_late_work(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The year in which it is due is nobody's business: of an account without a key neither."""
    monkeypatch.setattr(overview, "database_now", lambda _: YEARS)
    job_id = _held(database)
    with database.connect() as connection:
        row = read_job(database, job_id)
        said = why(connection, row, [], load())
        state = read_overview(connection, load())

    assert said.startswith("held by an operator since 2026-03-01 12:00:00 UTC")
    assert (state.oldest_due_seconds, state.healthy) == (0.0, True)
    assert [(one.account, one.reason, one.since) for one in state.accounts] == [("default", None, None)]
    assert overview.ready_estimate(connection, row) is None


def test_the_next_moment_is_none_of_a_held_job(engine: Engine) -> None:
    """Clocks that leap to it, as that of the test kit does, would be in the year 9999."""
    _held(engine)
    with engine.begin() as connection:
        assert next_request(connection, after=NOW) is None
        add_job(connection, "2", due_at=NOW + seconds(60))
        assert next_request(connection, after=NOW) == NOW + seconds(60)


# ── accounts and hosts ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("scope", "name"), [("account", "shop"), ("host", "api.test")])
def test_an_account_or_a_host_is_held_as_a_whole_until_it_is_resumed(
    database: Engine, scope: Scope, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one of which nothing is known yet."""
    assert [holds.hold_account_or_host(scope, name), holds.hold_account_or_host(scope, name)] == [True, False]
    held = _breaker(database, scope, name)
    assert held.allows(YEARS) == "none"
    assert held.why == "held by an operator"

    assert [holds.resume_account_or_host(scope, name), holds.resume_account_or_host(scope, name)] == [True, False]

    with database.connect() as connection:
        assert _breaker(database, scope, name).allows(database_now(connection)) != "none"
    assert [line.getMessage() for line in caplog.records] == [
        f"held by an operator scope={scope} name={name}",
        f"resumed by an operator scope={scope} name={name}",
    ]


def test_resuming_tries_at_once_what_the_api_holds_and_leaves_what_is_open(database: Engine) -> None:
    """A refused key gets one call alone, a rate limit is over; nothing is asked to prove itself without need."""
    with database.begin() as connection:
        now = database_now(connection)
        key = locked_breaker(connection, "account", "key")
        save_breaker(connection, after_refusal(key, "key rejected: no", now=now, probe=False))
        limit = locked_breaker(connection, "account", "limit")
        save_breaker(connection, after_rate_limit(limit, 900.0, now=now))
        locked_breaker(connection, "account", "open")
        save_breaker(connection, CircuitBreaker("account", "open", proven=True))

    changed = {name: holds.resume_account_or_host("account", name) for name in ("key", "limit", "open", "nobody")}

    assert changed == {"key": True, "limit": True, "open": False, "nobody": False}
    with database.connect() as connection:
        now = database_now(connection)
        assert {name: breaker.allows(now) for (_, name), breaker in all_breakers(connection).items()} == {
            "key": "one",
            "limit": "one",
            "open": "all",
        }
        assert connection.execute(select(jobs)).all() == []


# ── what else keeps a job ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_that_waits_is_asked_at_once_but_no_sooner_than_poll_min(engine: Engine) -> None:
    """Its deadline stays: who asks for an answer after it may get the end."""
    with engine.begin() as connection:
        due = NOW + seconds(9_000)
        waits = add_job(connection, "1", due_at=due, asked_at=NOW - seconds(60), deadline_at=NOW - seconds(5))
        recent = add_job(connection, "2", due_at=due, asked_at=NOW - seconds(1), pace_scale=2.0)
        already = add_job(connection, "3", due_at=NOW - seconds(1))
        assert store.resume(connection, [waits, recent, already], PATIENCE, now=NOW) == {waits, recent}

    assert [read_job(engine, one).due_at for one in (waits, recent)] == [NOW, NOW + seconds(2)]
    assert read_job(engine, waits).deadline_at == NOW - seconds(5)
    assert read_job(engine, recent).pace_scale is None


def test_a_claim_is_given_back_only_once_it_is_older_than_any_call(engine: Engine) -> None:
    """Its lease may go on for hours: a process of another host renews what it has lost sight of."""
    with engine.begin() as connection:
        for remote_id in ("fresh", "stuck"):
            add_job(connection, remote_id)
        claimed = {job.remote_id: job.id for job in claim_due_jobs(connection)}
        hours = {"due_at": NOW + timedelta(hours=6)}
        connection.execute(update(jobs).values(hours))
        connection.execute(update(jobs).where(jobs.c.id == claimed["stuck"]).values(asked_at=NOW - seconds(81)))
        assert store.resume(connection, list(claimed.values()), PATIENCE, now=NOW) == {claimed["stuck"]}

    assert (read_job(engine, claimed["stuck"]).due_at, read_job(engine, claimed["stuck"]).claim_token) == (NOW, None)
    assert read_job(engine, claimed["fresh"]).claim_token is not None


def test_downloads_in_trouble_are_tried_at_once(engine: Engine) -> None:
    """Not one that is under way, nor one that waits for the fresh link that the API is asked for."""
    with engine.begin() as connection:
        later: dict[str, Any] = {
            "due_at": NOW + timedelta(hours=1),
            "error_code": "unreachable",
            "error_message": "no answer",
        }
        job_id, renewing = add_downloading(connection, "1"), add_downloading(connection, "2", due_at=NOW)
        waits = add_output(connection, job_id, 0, queued_at=NOW, **later)
        claimed = {"claim_token": "t", "claim_holder": "h"}
        under_way = add_output(connection, job_id, 1, claimed_at=NOW - seconds(300), **claimed, **later)
        stuck = add_output(connection, job_id, 2, claimed_at=NOW - seconds(361), **claimed, **later)
        link = add_output(connection, renewing, 0, renewed=True, **later)
        assert store.resume(connection, [job_id, renewing], PATIENCE, now=NOW) == {job_id}

    rows = {one: read_output(engine, one) for one in (waits, under_way, stuck, link)}
    assert {one: row.due_at == NOW for one, row in rows.items()} == {
        waits: True, under_way: False, stuck: True, link: False,
    }  # fmt: skip
    assert (rows[waits].queued_at, rows[stuck].claim_token, rows[under_way].claim_token) == (None, None, "t")


def test_a_filter_of_output_codes_resumes_downloads(database: Engine) -> None:
    """`resume --output-code unreachable`, once the host is back."""
    with database.begin() as connection:
        trouble: dict[str, Any] = {"due_at": database_now(connection) + timedelta(hours=1), "error_code": "unreachable"}
        mine, other = add_downloading(connection, "1"), add_downloading(connection, "2")
        add_output(connection, mine, **trouble)
        add_output(connection, other, **(trouble | {"error_code": "http_error"}))
    wanted = JobFilter(output_codes=("unreachable",))

    assert [one.id for batch in actions.act("resume", wanted, load()) for one in batch if one.changed] == [mine]
