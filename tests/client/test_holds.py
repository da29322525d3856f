"""Hold and resume: a held job is not polled and does not expire; a resumed job continues at once."""

import logging
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, select, update

import worker
from tests.rows import NOW, add_downloading, add_job, add_output, claim_due_jobs, read_job, read_output, seconds
from worker.client import holds, matching
from worker.client import workers as client_workers
from worker.core.circuit_breaker import CircuitBreaker, Scope, after_rate_limit, after_refusal
from worker.core.lifecycle import AskAgain, EndJob, JobFacts, Strikes, after_answer
from worker.core.reply import Processing
from worker.errors import JobNotFound
from worker.operations import job_context
from worker.operations.explain import why
from worker.operations.overview import overview as read_overview
from worker.settings import load
from worker.store import holds as store
from worker.store.breakers import all_breakers, locked_breaker, save_breaker
from worker.store.claims import release_jobs, renew_leases
from worker.store.counters import Tally
from worker.store.due_groups import due_groups
from worker.store.due_work import next_request
from worker.store.engine import database_now
from worker.store.holds import WorkLimits
from worker.store.jobs import cancel, nudge, retry
from worker.store.reports import work_state
from worker.store.reports.search import JobFilter
from worker.store.results import Outcome, record_answers
from worker.store.schema import HELD_UNTIL, jobs

POLL_MIN = timedelta(seconds=3)
LIMITS = WorkLimits(POLL_MIN, timedelta(seconds=80), timedelta(seconds=360))
YEARS = NOW + timedelta(days=3_650)


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that the Python API uses."""
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


def test_a_held_job_is_never_claimed_nor_nudged(engine: Engine) -> None:
    job_id = _held(engine)
    with engine.begin() as connection:
        assert claim_due_jobs(connection, now=YEARS) == []
        assert nudge(connection, "1", None, now=YEARS, poll_min=POLL_MIN) == 0
        assert [group.due_at for group in due_groups(connection, ["default"])] == [HELD_UNTIL]

    held = read_job(engine, job_id)
    assert (held.status, held.held_at, held.due_at) == ("pending", NOW, HELD_UNTIL)


def test_only_pending_jobs_that_are_not_held_can_be_held(engine: Engine) -> None:
    with engine.begin() as connection:
        pending = add_job(connection, "1")
        ended = add_job(connection, "2", status="cancelled", due_at=None, completed_at=NOW)
        loading = add_downloading(connection, "3", due_at=NOW)  # polled for a fresh link
        assert store.hold(connection, [pending, ended, loading], now=NOW) == {pending}
        assert store.hold(connection, [pending, ended, loading], now=YEARS) == set()
        assert store.resume(connection, [ended, loading], LIMITS, now=NOW) == set()

    assert read_job(engine, pending).held_at == NOW


def test_a_hold_ends_the_claim_and_discards_the_answer_in_flight(engine: Engine) -> None:
    """The process that polled can no longer change the job."""
    with engine.begin() as connection:
        job_id = add_job(connection)
        [claimed] = claim_due_jobs(connection)
        store.hold(connection, [job_id], now=NOW + seconds(1))
        ended = Outcome(claimed, EndJob("failed", "api_failed", "no"), "failed")
        assert record_answers(connection, [ended], Tally(), now=NOW + seconds(2)).lost == 1
        assert not renew_leases(connection, "holder", lease=POLL_MIN, now=NOW + seconds(2))
        release_jobs(connection, [job_id], claimed.token, due_at=NOW + seconds(2))

    held = read_job(engine, job_id)
    assert (held.status, held.due_at, held.claim_token) == ("pending", HELD_UNTIL, None)


def test_a_resumed_job_is_due_at_once_and_does_not_expire_within_its_grace(engine: Engine) -> None:
    """After a long hold, an answer within the minute does not expire the job; a later one does."""
    job_id = _held(engine, deadline_at=NOW + seconds(5), pace_scale=4.0, pace_growth=1.0)
    with engine.begin() as connection:
        assert store.resume(connection, [job_id], LIMITS, now=YEARS) == {job_id}
        assert store.resume(connection, [job_id], LIMITS, now=YEARS) == set()
        [claimed] = claim_due_jobs(connection, now=YEARS)

    resumed = read_job(engine, job_id)
    assert (resumed.held_at, resumed.deadline_at) == (None, YEARS + seconds(60))
    assert (resumed.pace_scale, resumed.pace_growth) == (None, None)
    facts = JobFacts("pending", NOW, claimed.facts.deadline_at, Strikes())
    steps = [after_answer(facts, Processing(), now=YEARS + seconds(at), min_interval=POLL_MIN) for at in (59, 60)]
    assert [type(step) for step in steps] == [AskAgain, EndJob]


def test_a_later_deadline_does_not_change(engine: Engine) -> None:
    job_id = _held(engine)
    with engine.begin() as connection:
        store.resume(connection, [job_id], LIMITS, now=NOW + seconds(10))

    assert read_job(engine, job_id).deadline_at == NOW + seconds(3_600)


def test_hold_and_resume_keep_poll_min(engine: Engine) -> None:
    with engine.begin() as connection:
        recent, long_ago = add_job(connection, "1"), add_job(connection, "2", asked_at=NOW - seconds(60))
        claim_due_jobs(connection, limit=1, now=NOW)
        connection.execute(update(jobs).where(jobs.c.id == recent).values(asked_at=NOW))
        store.hold(connection, [recent, long_ago], now=NOW + seconds(1))
        store.resume(connection, [recent, long_ago], LIMITS, now=NOW + seconds(1))

    assert read_job(engine, recent).due_at == NOW + POLL_MIN
    assert read_job(engine, long_ago).due_at == NOW + seconds(1)


def test_a_held_job_can_be_cancelled_and_is_then_not_held(engine: Engine) -> None:
    job_id = _held(engine)
    with engine.begin() as connection:
        assert not retry(connection, job_id, now=NOW)
        assert cancel(connection, job_id, Tally(), now=NOW)

    assert (read_job(engine, job_id).status, read_job(engine, job_id).held_at) == ("cancelled", None)


def test_the_python_api_holds_and_resumes_and_wakes_the_workers(
    database: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    woken: list[str] = []
    monkeypatch.setattr(client_workers._workers, "wake", lambda settings: woken.append("woken"))
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
    for action in (worker.hold, worker.resume):
        with pytest.raises(JobNotFound):
            action(999_999)


# ── what operators see ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_held_job_is_explained_and_is_not_late(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its due time in the year 9999 is shown nowhere."""
    monkeypatch.setattr(work_state, "database_now", lambda _: YEARS)
    job_id = _held(database)
    with database.connect() as connection:
        row = read_job(database, job_id)
        context = job_context.read_context(connection, row, [], [], load())
        state = read_overview(connection, load())

    assert why(context).startswith("held by an operator since 2026-03-01 12:00:00 UTC")
    assert (state.work.oldest_due_seconds, state.work.healthy) == (0.0, True)
    assert [(account.account, account.reason, account.since) for account in state.work.accounts] == [
        ("default", None, None)
    ]
    assert context.estimate is None


def test_the_next_request_ignores_held_jobs(engine: Engine) -> None:
    """The clock of the test kit moves to the next request, and must not move to the year 9999."""
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
    """Also an account or host without any jobs."""
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


def test_resume_probes_what_the_api_holds_and_does_not_change_the_rest(database: Engine) -> None:
    """A refused key gets a single request, and a pause after a rate limit ends."""
    with database.begin() as connection:
        now = database_now(connection)
        key = locked_breaker(connection, "account", "key")
        save_breaker(connection, after_refusal(key, "key rejected: no", now=now, probe=False))
        limit = locked_breaker(connection, "account", "limit")
        save_breaker(connection, after_rate_limit(limit, 900.0, now=now))
        locked_breaker(connection, "account", "open")
        save_breaker(connection, CircuitBreaker("account", "open", proven=True))

    changed = {name: holds.resume_account_or_host("account", name) for name in ("key", "limit", "open", "unknown")}

    assert changed == {"key": True, "limit": True, "open": False, "unknown": False}
    with database.connect() as connection:
        now = database_now(connection)
        assert {name: breaker.allows(now) for (_, name), breaker in all_breakers(connection).items()} == {
            "key": "probe",
            "limit": "probe",
            "open": "all",
        }
        assert connection.execute(select(jobs)).all() == []


# ── resuming other waits ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_waiting_job_is_polled_at_once_but_not_before_poll_min(engine: Engine) -> None:
    """Its deadline does not change: an answer after it may expire the job."""
    with engine.begin() as connection:
        due = NOW + seconds(9_000)
        waits = add_job(connection, "1", due_at=due, asked_at=NOW - seconds(60), deadline_at=NOW - seconds(5))
        recent = add_job(connection, "2", due_at=due, asked_at=NOW - seconds(1), pace_scale=2.0)
        already = add_job(connection, "3", due_at=NOW - seconds(1))
        assert store.resume(connection, [waits, recent, already], LIMITS, now=NOW) == {waits, recent}

    assert [read_job(engine, job_id).due_at for job_id in (waits, recent)] == [NOW, NOW + seconds(2)]
    assert read_job(engine, waits).deadline_at == NOW - seconds(5)
    assert read_job(engine, recent).pace_scale is None


def test_a_claim_is_released_only_if_it_is_older_than_any_request(engine: Engine) -> None:
    """Its lease may be renewed for hours: a process on another host may renew claims that it no longer works on."""
    with engine.begin() as connection:
        for remote_id in ("fresh", "stuck"):
            add_job(connection, remote_id)
        claimed = {job.remote_id: job.id for job in claim_due_jobs(connection)}
        hours = {"due_at": NOW + timedelta(hours=6)}
        connection.execute(update(jobs).values(hours))
        connection.execute(update(jobs).where(jobs.c.id == claimed["stuck"]).values(asked_at=NOW - seconds(81)))
        assert store.resume(connection, list(claimed.values()), LIMITS, now=NOW) == {claimed["stuck"]}

    assert (read_job(engine, claimed["stuck"]).due_at, read_job(engine, claimed["stuck"]).claim_token) == (NOW, None)
    assert read_job(engine, claimed["fresh"]).claim_token is not None


def test_failed_downloads_are_tried_at_once(engine: Engine) -> None:
    """Except a running download and one that waits for a fresh link."""
    with engine.begin() as connection:
        later: dict[str, Any] = {
            "due_at": NOW + timedelta(hours=1),
            "error_code": "unreachable",
            "error_message": "no answer",
        }
        job_id, renewing = add_downloading(connection, "1"), add_downloading(connection, "2", due_at=NOW)
        waits = add_output(connection, job_id, 0, queued_at=NOW, **later)
        claimed = {"claim_token": "t", "claim_holder": "h"}
        running = add_output(connection, job_id, 1, claimed_at=NOW - seconds(300), **claimed, **later)
        stuck = add_output(connection, job_id, 2, claimed_at=NOW - seconds(361), **claimed, **later)
        link = add_output(connection, renewing, 0, renewed=True, **later)
        assert store.resume(connection, [job_id, renewing], LIMITS, now=NOW) == {job_id}

    rows = {output_id: read_output(engine, output_id) for output_id in (waits, running, stuck, link)}
    assert {output_id: row.due_at == NOW for output_id, row in rows.items()} == {
        waits: True, running: False, stuck: True, link: False,
    }  # fmt: skip
    assert (rows[waits].queued_at, rows[stuck].claim_token, rows[running].claim_token) == (None, None, "t")


def test_resume_by_output_code_resumes_downloads(database: Engine) -> None:
    """For example after the host works again."""
    with database.begin() as connection:
        trouble: dict[str, Any] = {"due_at": database_now(connection) + timedelta(hours=1), "error_code": "unreachable"}
        unreachable, other = add_downloading(connection, "1"), add_downloading(connection, "2")
        add_output(connection, unreachable, **trouble)
        add_output(connection, other, **(trouble | {"error_code": "http_error"}))
    job_filter = JobFilter(output_codes=("unreachable",))

    assert [
        result.id
        for batch in matching.change_matching("resume", job_filter, load())
        for result in batch
        if result.changed
    ] == [unreachable]
