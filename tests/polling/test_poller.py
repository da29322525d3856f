"""Poll runs with a real HTTP stand-in, a real Redis, and both databases."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, Row, select, update
from sqlalchemy.exc import OperationalError

from tests.waiting import wait_until
from worker.coordination.leases import LeaseKeeper, LeaseLost
from worker.coordination.rate_limiter import RateLimiter
from worker.core.circuit_breaker import after_refusal
from worker.core.pacing.policy import Pace, PaceModel
from worker.polling import answer_writer, duration_learner, job_claims
from worker.polling.api_client import ApiClient
from worker.polling.options import MAX_IN_FLIGHT, AfterCommit, PollOptions
from worker.polling.poller import Poller
from worker.sandbox import Answer, Sandbox, SandboxOptions
from worker.store.breakers import locked_breaker, save_breaker
from worker.store.claims import claim_jobs, release_jobs
from worker.store.counters import Tally
from worker.store.engine import database_now
from worker.store.jobs import NewJob, cancel, insert_jobs, nudge
from worker.store.results import record_answers
from worker.store.schema import breakers, jobs, outputs
from worker.system.redaction import Scrubber
from worker.vendor.fetch_url import AllowedApi, fetch_address

KEY = "sandbox-key"


all_polls: list["Polls"] = []  # of the current test


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """End the threads and connections of all pollers that a test made."""
    yield
    for polls in all_polls:
        polls.poller.close()
        polls.client.session.close()
    all_polls.clear()


class Polls:
    """The polling of one process: a poller, the outputs that it queued, and the stand-in that it polls."""

    def __init__(
        self,
        engine: Engine,
        redis_url: str,
        sandbox: Sandbox,
        other_host: str = "",
        options: Mapping[str, Any] | None = None,
        **keys: str,
    ) -> None:
        self.engine = engine
        self.sandbox = sandbox
        self.queued: list[int] = []
        self.told: list[int] = []
        self.api = AllowedApi(sandbox.url, frozenset({sandbox.url.split("/")[2], other_host}))
        all_polls.append(self)
        self.keys = {name: SecretStr(key) for name, key in (keys or {"default": KEY}).items()}
        self.rps = 2_000.0
        self.client = ApiClient(self.api, Scrubber([KEY]), timeout=5.0, connections=16)
        self.budget = RateLimiter(redis_url)
        self.leases = LeaseKeeper(engine, lease=timedelta(seconds=30))
        defaults = PollOptions(keys=self.keys, rps=lambda _: self.rps, pace=Pace("learned", 0.5, 0.0), api_timeout=5.0)
        self.poller = Poller(
            engine=engine,
            api=self.client,
            budget=self.budget,
            leases=self.leases,
            options=replace(defaults, **(options or {})),
            after_commit=AfterCommit(queue_downloads=self.queued.extend, notify=self.told.extend),
        )

    def track(self, remote_ids: Sequence[Any], **changes: Any) -> list[int]:
        """Insert jobs that are due now."""
        with self.engine.begin() as connection:
            now = database_now(connection)
            new = [self._job(str(remote_id), now, **changes) for remote_id in remote_ids]
            return [job_id for job_id, _ in insert_jobs(connection, new, now=now)]

    def _job(self, remote_id: str, now: Any, *, host: str | None = None, **changes: Any) -> NewJob:
        elsewhere = f"http://{host}/api/v3/fetch/{remote_id}" if host else None
        values: dict[str, Any] = {
            "account": "default",
            "kind": "image",
            "priority": 0,
            "reference": None,
            "on_done": None,
            "eta": None,
            "submitted_at": now,
            "deadline_at": now + timedelta(hours=1),
            "due_at": now,
        }
        values |= {"address": fetch_address(elsewhere, remote_id, self.api)} | changes
        return NewJob(remote_id=remote_id, **values)

    def run(self, seconds: float = 0.3) -> str:
        """Do a short poll run."""
        return str(self.poller.run(seconds=seconds))

    def until(self, reached: Callable[[], bool]) -> None:
        """Poll until a condition holds."""
        wait_until(lambda: reached() or (self.run() and reached()), "polls reach the expected state", seen=self._states)

    def _states(self) -> object:
        with self.engine.connect() as connection:
            return connection.execute(select(jobs.c.id, jobs.c.status, jobs.c.polls)).all()

    def row(self, job_id: int) -> Row[Any]:
        """Return the row of a job."""
        with self.engine.connect() as connection:
            return connection.execute(select(jobs).where(jobs.c.id == job_id)).one()

    def breaker(self, name: str) -> Row[Any]:
        """Return the row of a circuit breaker."""
        with self.engine.connect() as connection:
            return connection.execute(select(breakers).where(breakers.c.name == name)).one()


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A stand-in whose jobs are ready at once."""
    with Sandbox(SandboxOptions(key=KEY, min_seconds=0.0, max_seconds=0.0, size=32)) as server:
        yield server


@pytest.fixture
def polls(engine: Engine, redis_url: str, sandbox: Sandbox) -> Polls:
    """A poller on a fresh database."""
    return Polls(engine, redis_url, sandbox)


def submitted(sandbox: Sandbox, count: int, samples: int = 2) -> list[str]:
    """Submit jobs to the stand-in. Return their remote ids."""
    return [str(sandbox.submit(f"a lake, {number}", samples=samples)["id"]) for number in range(count)]


def scripted(message: bytes, status: int = 200, times: int = 50) -> list[Answer]:
    """Return the same answer many times."""
    return [Answer(status, {"Content-Type": "application/json"}, message)] * times


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


def test_given_an_account_without_a_key_when_polled_then_its_jobs_are_not_polled(polls: Polls) -> None:
    (job,) = polls.track(submitted(polls.sandbox, 1), account="other")

    polls.run()

    assert polls.row(job).polls == 0
    assert polls.row(job).status == "pending"


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


def test_given_a_job_that_failed_twice_when_polled_then_it_ends_and_its_app_is_notified(polls: Polls) -> None:
    remote_id = submitted(polls.sandbox, 1)[0]
    polls.sandbox.script(
        remote_id,
        scripted(b'{"status":"failed","id":"","message":"Processing failed: Invalid input dimensions","output":""}'),
    )
    (job,) = polls.track([remote_id])

    polls.until(lambda: bool(polls.row(job).status == "failed"))

    row = polls.row(job)
    assert (row.error_code, row.error_message, row.polls) == (
        "api_failed",
        "Processing failed: Invalid input dimensions",
        2,
    )
    assert polls.told == [job]


def test_given_a_job_past_its_deadline_when_it_is_still_processing_then_it_expires_only_after_a_poll(
    engine: Engine, redis_url: str
) -> None:
    with Sandbox(SandboxOptions(key=KEY, min_seconds=900, max_seconds=900)) as sandbox:
        polls = Polls(engine, redis_url, sandbox)
        with engine.connect() as connection:
            past = database_now(connection) - timedelta(hours=2)
        (job,) = polls.track(submitted(sandbox, 1), submitted_at=past, deadline_at=past + timedelta(hours=1))

        polls.until(lambda: bool(polls.row(job).status == "expired"))

        assert polls.row(job).polls == 1
        assert polls.row(job).error_code == "expired"


def test_given_a_cancelled_job_when_its_answer_comes_late_then_nothing_changes(
    polls: Polls, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = polls.track(submitted(polls.sandbox, 1))
    sent, cancelled = threading.Event(), threading.Event()
    ask = polls.client.ask

    def held(*arguments: Any) -> Any:
        reply = ask(*arguments)
        sent.set()
        cancelled.wait(10)
        return reply

    monkeypatch.setattr(polls.client, "ask", held)
    run = threading.Thread(target=polls.run)
    run.start()
    assert sent.wait(10)
    with polls.engine.begin() as connection:
        assert cancel(connection, job, Tally(), now=database_now(connection))
    cancelled.set()
    run.join()

    assert polls.row(job).status == "cancelled"
    assert polls.queued == []


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


def test_given_a_stop_when_polling_then_no_more_jobs_are_claimed(polls: Polls) -> None:
    ids = polls.track(submitted(polls.sandbox, 5))
    polls.poller.stop()

    polls.run()

    assert {polls.row(job).polls for job in ids} == {0}


def test_given_more_jobs_than_the_budget_when_polled_then_no_second_has_more_than_rate_and_burst(
    engine: Engine, redis_url: str, sandbox: Sandbox
) -> None:
    polls = Polls(engine, redis_url, sandbox, budgeted=KEY)
    polls.rps = 20
    ids = polls.track(submitted(sandbox, 60, samples=1), account="budgeted")
    started = time.monotonic()

    polls.until(lambda: all(polls.row(job).status == "downloading" for job in ids))

    assert time.monotonic() - started >= (60 - 2) / 20 * 0.9


def test_given_a_job_whose_address_is_no_longer_allowed_when_polled_then_it_waits_and_others_continue(
    polls: Polls,
) -> None:
    elsewhere = AllowedApi("https://modelslab.com/api/v3", frozenset({"modelslab.com"}))
    with polls.engine.begin() as connection:
        now = database_now(connection)
        foreign = replace(polls._job("77", now), address=fetch_address(None, "77", elsewhere), priority=9)
        ((strange, _),) = insert_jobs(connection, [foreign], now=now)
    (job,) = polls.track(submitted(polls.sandbox, 1))

    polls.until(lambda: bool(polls.row(job).status == "downloading"))

    row = polls.row(strange)
    assert (row.status, row.polls, row.claim_token) == ("pending", 0, None)


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


# ── consecutive runs ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_an_active_run_when_another_starts_then_the_other_ends_at_once(polls: Polls) -> None:
    first = threading.Thread(target=polls.run, args=(1.0,))
    first.start()
    time.sleep(0.1)

    assert polls.poller.run() is None

    first.join()


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


# ── database errors ───────────────────────────────────────────────────────────────────────────────────────────────────


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
    assert bad.id in polls.told
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


# ── pace ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_answers_when_they_are_written_then_all_processes_learn_from_them(
    polls: Polls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration_learner, "SHARE_SECONDS", 0.0)
    names = submitted(polls.sandbox, 12, samples=1)
    for name in names[:6]:
        polls.sandbox.script(name, scripted(b'{"status": "processing", "output": ""}', times=1))
    ids = polls.track(names)

    polls.until(lambda: all(polls.row(job).status == "downloading" for job in ids))
    polls.until(lambda: model_of(polls.engine).by_age.moments.count == 12)

    late = [polls.row(job) for job in ids if polls.row(job).polls > 1]
    assert len(late) == 6
    assert all(row.not_ready_at is not None and row.submitted_at < row.not_ready_at < row.ready_at for row in late)
    assert all(polls.row(job).not_ready_at is None for job in ids if polls.row(job).polls == 1)
    assert model_of(polls.engine).polls == pytest.approx(18, abs=2)


def model_of(engine: Engine) -> PaceModel:
    """Return the shared model of images."""
    with engine.connect() as connection:
        return duration_learner.read_models(connection, [("default", "image")])["default", "image"][0]


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


def test_given_a_new_eta_in_an_answer_then_its_clock_starts_and_the_same_eta_again_changes_nothing(
    polls: Polls,
) -> None:
    (name,) = submitted(polls.sandbox, 1)
    body = b'{"status": "processing", "output": "", "eta": 0.4}'
    polls.sandbox.script(name, scripted(body, times=3))
    (job,) = polls.track([name])

    polls.until(lambda: polls.row(job).polls >= 1 and polls.row(job).eta is not None)
    first = polls.row(job)
    polls.until(lambda: polls.row(job).polls > first.polls)

    assert first.eta == 0.4
    assert first.eta_at is not None
    assert polls.row(job).eta_at == first.eta_at


def test_given_answers_that_are_not_about_the_job_when_they_are_written_then_nothing_is_learned(
    polls: Polls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration_learner, "SHARE_SECONDS", 0.0)
    polls.track(submitted(polls.sandbox, 1))
    polls.run()
    polls.until(lambda: model_of(polls.engine).polls == 1)
    names = submitted(polls.sandbox, 3)
    for name, body in zip(
        names, (b"<html>", b'{"status": "what"}', b'{"status": "failed", "message": "no"}'), strict=True
    ):
        polls.sandbox.script(name, scripted(body, times=1))
    ids = polls.track(names)
    polls.until(lambda: all(polls.row(job).polls >= 1 and not polls.row(job).claim_token for job in ids))

    assert all(row.not_ready_at is None for row in map(polls.row, ids) if row.polls == 1)
    assert model_of(polls.engine).polls <= 1 + sum(polls.row(job).polls > 1 for job in ids)


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


def fail_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next release of claimed jobs fail, as if the database were away."""

    def away(*_: object, **__: object) -> None:
        monkeypatch.setattr(job_claims, "release_jobs", release_jobs)
        raise OperationalError("", {}, Exception("away"))

    monkeypatch.setattr(job_claims, "release_jobs", away)


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
