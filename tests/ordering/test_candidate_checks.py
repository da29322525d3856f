"""Uncertain orders whose job a call of the API has named: the API is asked, and only an answer that fits attaches."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, Row, update

from tests.ordering.sending import ENDPOINT, KEY
from tests.web import Web, page, web_server
from worker.client.ordering import planned_order
from worker.coordination.rate_limiter import RateLimiter
from worker.core.circuit_breaker import CircuitBreaker
from worker.core.pacing.policy import Pace
from worker.ordering.candidate_checks import MAX_TRIES, CandidateChecks
from worker.polling.api_client import ApiClient
from worker.polling.options import PollOptions
from worker.settings import Settings
from worker.store.breakers import locked_breaker, save_breaker
from worker.store.candidates import CANDIDATES_MOST, add_candidate, candidates_of, settle_candidates
from worker.store.engine import database_now
from worker.store.jobs import job_row, retry
from worker.store.orders import insert_order
from worker.store.schema import candidates, jobs, orders
from worker.system.redaction import Scrubber
from worker.vendor.fetch_url import AllowedApi

REFERENCE = "order-7"
PAYLOAD = {"prompt": "a lake", "width": 512, "samples": 1}
LINK = "https://cdn.test/a.png"
MOMENT = datetime(2126, 1, 1, tzinfo=UTC)


def success(remote_id: int, **meta: object) -> dict[str, Any]:
    """Return an answer about a job that is ready. `meta` repeats its order."""
    answer: dict[str, Any] = {"status": "success", "id": remote_id, "output": [LINK]}
    return {**answer, "meta": meta} if meta else answer


class Checks:
    """The candidate checks of one process, on a database and an API that answers as a test says."""

    def __init__(self, engine: Engine, redis_url: str, web: Web) -> None:
        self.engine, self.web = engine, web
        self.attached: list[bool] = []
        self.settings = Settings(sd_api_url=f"{web.url}/api/v6/images")
        self.rps = 1_000.0
        host = f"127.0.0.1:{web.port}"
        self.checks = CandidateChecks(
            engine=engine,
            api=ApiClient(
                AllowedApi(f"{web.url}/api/v6/images", frozenset({host})), Scrubber([KEY]), timeout=5.0, connections=2
            ),
            budget=RateLimiter(redis_url),
            options=PollOptions(
                keys={"default": SecretStr(KEY)},
                rps=lambda _: self.rps,
                pace=Pace("learned", 0.5, 0.0),
                api_timeout=5.0,
            ),
            attached=lambda: self.attached.append(True),
        )
        with engine.begin() as connection:
            locked_breaker(connection, "account", "default")
            save_breaker(connection, CircuitBreaker("account", "default", proven=True))

    def lose_order(
        self, payload: dict[str, Any] | None = None, *, reference: str | None = REFERENCE, status: str = "uncertain"
    ) -> int:
        """Insert an order that was sent and whose answer is lost."""
        with self.engine.begin() as connection:
            now = database_now(connection)
            key = f"key {now.timestamp()}"
            new = planned_order(self.settings, key, ENDPOINT, payload or PAYLOAD, {"reference": reference})
            job_id = insert_order(connection, new, now=now)
            state = {"status": status, "completed_at": now if status == "cancelled" else None}
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(state))
            sent = {"attempted_at": now, "due_at": None, "takes_slot": True, "attempt_token": "token"}
            connection.execute(update(orders).where(orders.c.id == job_id).values(sent))
            return job_id

    def name(self, remote_id: str, reference: str = REFERENCE) -> int:
        """Name a job, as a call of the API does. Return for how many orders."""
        with self.engine.begin() as connection:
            return add_candidate(connection, reference, remote_id, now=database_now(connection))

    def answer(self, remote_id: str, content: object, status: int = 200) -> None:
        """Set the answer of the API about a job."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.web.answers[f"/api/v6/images/fetch/{remote_id}"] = page(status, body)

    def job(self, job_id: int) -> Row[Any]:
        """Return the row of a job."""
        with self.engine.connect() as connection:
            row = job_row(connection, job_id)
        assert row is not None
        return row

    def notes(self, job_id: int) -> dict[str, str | None]:
        """Return what is known about each candidate of a job."""
        with self.engine.connect() as connection:
            return {row.remote_id: row.note for row in candidates_of(connection, job_id)}

    def is_decided(self, job_id: int) -> bool:
        """Return whether the API is asked no more about the candidates of a job."""
        with self.engine.connect() as connection:
            return all(row.due_at is None for row in candidates_of(connection, job_id))

    def make_due(self) -> None:
        """Let the waiting candidates be due."""
        with self.engine.begin() as connection:
            due = {"due_at": database_now(connection) - timedelta(seconds=1)}
            connection.execute(update(candidates).where(candidates.c.due_at.is_not(None)).values(due))


@pytest.fixture
def web() -> Iterator[Web]:
    """A server whose answers a test chooses."""
    with web_server() as server:
        yield server


@pytest.fixture
def checks(engine: Engine, redis_url: str, web: Web) -> Checks:
    """The candidate checks of one process on a fresh database."""
    return Checks(engine, redis_url, web)


# ── what a call names ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_call_names_a_job_for_each_order_of_the_reference_whose_answer_is_not_known(checks: Checks) -> None:
    """Also for one that is still being sent: its answer may get lost later."""
    uncertain, sending = checks.lose_order(), checks.lose_order(status="ordered")
    others = [
        checks.lose_order(reference="order-8"),
        checks.lose_order(reference=None),
        checks.lose_order(status="cancelled"),
    ]

    assert checks.name("41") == 2
    assert checks.name("41") == 0, "it is named already"

    assert [list(checks.notes(job_id)) for job_id in (uncertain, sending, *others)] == [["41"], ["41"], [], [], []]


def test_an_order_that_was_never_sent_gets_no_candidate(checks: Checks, engine: Engine) -> None:
    job_id = checks.lose_order(status="ordered")
    with engine.begin() as connection:
        connection.execute(update(orders).where(orders.c.id == job_id).values(attempted_at=None))

    assert checks.name("41") == 0


def test_an_id_that_another_job_of_the_account_has_is_no_candidate(checks: Checks, engine: Engine) -> None:
    """Ids that differ in their letters only are different ones."""
    known = checks.lose_order(reference="order-8")
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == known).values(remote_id="aB"))
    checks.lose_order()

    assert [checks.name(remote_id) for remote_id in ("aB", "ab")] == [0, 1]


def test_an_order_gets_a_limited_number_of_candidates(checks: Checks) -> None:
    job_id = checks.lose_order()

    for number in range(CANDIDATES_MOST + 5):
        checks.name(str(number))

    assert len(checks.notes(job_id)) == CANDIDATES_MOST


# ── answers that fit ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "answer",
    [
        success(41),
        success(41, prompt="a lake", W=512),
        success(41, prompt="A  lake, hyperrealistic, 8k", W=512, n_samples=1),
    ],
)
def test_given_an_answer_that_fits_then_the_order_gets_the_job_and_is_polled(
    checks: Checks, answer: dict[str, Any]
) -> None:
    job_id = checks.lose_order()
    checks.name("41")
    checks.answer("41", answer)

    assert checks.checks.run() == 1

    job = checks.job(job_id)
    assert (job.status, job.remote_id, checks.attached) == ("pending", "41", [True])
    assert job.fetch_url == f"{checks.web.url}/api/v6/images/fetch/41"
    assert job.due_at is not None
    assert checks.notes(job_id) == {"41": "the answer of the API fits, so it was attached"}
    assert checks.checks.run() == 0


def test_the_key_is_in_the_body_of_the_request_and_nowhere_else(checks: Checks) -> None:
    job_id = checks.lose_order()
    checks.name("41")
    checks.answer("41", {"status": "error", "message": f"Invalid id for {KEY}"})

    checks.checks.run()

    assert KEY not in str(checks.notes(job_id))
    assert checks.job(job_id).status == "uncertain"


# ── answers that do not fit ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        (success(41, prompt="a harbour"), "its prompt differs from the order's"),
        (success(41, prompt="a lake", W=1024), "its width differs"),
        (success(41, prompt="a lake", n_samples=4), "its samples differs"),
        (success(42), "the API answered about another job: 42"),
    ],
)
def test_given_an_answer_about_another_job_then_the_order_stays_uncertain(
    checks: Checks, answer: dict[str, Any], note: str
) -> None:
    job_id = checks.lose_order()
    checks.name("41")
    checks.answer("41", answer)

    checks.checks.run()

    assert checks.job(job_id).status == "uncertain"
    assert note in str(checks.notes(job_id)["41"])
    assert checks.is_decided(job_id)
    assert checks.attached == []


@pytest.mark.parametrize(
    "answer",
    [
        {"status": "failed", "id": "", "message": "Request not found", "output": ""},
        {"status": "failed", "id": 41, "message": "Processing failed"},
        {"status": "error", "message": "Something went wrong"},
        {"status": "no such word"},
        b"\x00\xff",
    ],
)
def test_given_answers_that_do_not_decide_then_the_api_is_asked_a_few_times(checks: Checks, answer: object) -> None:
    """A job may be unknown for some seconds. The operator sees the last answer."""
    job_id = checks.lose_order()
    checks.name("41")
    checks.answer("41", answer)

    asked = 0
    for _ in range(MAX_TRIES + 3):
        asked += checks.checks.run()
        checks.make_due()

    assert asked == MAX_TRIES
    assert checks.job(job_id).status == "uncertain"
    assert str(checks.notes(job_id)["41"]).startswith("the API answered")


def test_given_an_api_that_is_down_then_the_check_waits_and_does_not_count(checks: Checks) -> None:
    job_id = checks.lose_order()
    checks.name("41")
    checks.web.answers["/api/v6/images/fetch/41"] = page(503, b"Service Unavailable")

    for _ in range(MAX_TRIES + 3):
        checks.checks.run()
        checks.make_due()

    assert checks.job(job_id).status == "uncertain"
    assert not checks.is_decided(job_id)


def test_given_two_different_orders_of_a_reference_then_only_an_answer_that_tells_them_apart_attaches(
    checks: Checks,
) -> None:
    lake, harbour = checks.lose_order(), checks.lose_order({"prompt": "a harbour"})
    checks.name("41")
    checks.name("42")
    checks.answer("41", success(41))
    checks.answer("42", success(42, prompt="a harbour at night"))

    while checks.checks.run():
        pass

    assert checks.job(lake).status == "uncertain"
    assert "does not tell which order" in str(checks.notes(lake)["41"])
    assert (checks.job(harbour).status, checks.job(harbour).remote_id) == ("pending", "42")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"prompt": "a lake"}, {"prompt": "a lake", "model_id": "flux"}),
        ({"prompt": "a lake"}, {"prompt": "a lake at night"}),
        ({"prompt": "a lake", "seed": 7}, {"prompt": "a harbour", "seed": 7}),
    ],
)
def test_given_an_answer_that_fits_two_different_orders_then_none_of_them_gets_the_job(
    checks: Checks, first: dict[str, Any], second: dict[str, Any]
) -> None:
    """The API adds words to prompts, and does not repeat every field."""
    ids = [checks.lose_order(first), checks.lose_order(second)]
    checks.name("41")
    checks.answer("41", success(41, prompt="a lake at night", seed=7) if "seed" not in first else success(41, seed=7))

    while checks.checks.run():
        pass

    assert {checks.job(job_id).status for job_id in ids} == {"uncertain"}
    assert all(checks.is_decided(job_id) for job_id in ids)


def test_given_a_job_that_another_order_got_at_another_address_then_it_is_not_attached(
    checks: Checks, engine: Engine
) -> None:
    """Its answer was recorded after the call had named the job for both."""
    first, second = checks.lose_order(), checks.lose_order()
    checks.name("41")
    checks.answer("41", success(41))
    with engine.begin() as connection:
        taken = {
            "status": "pending",
            "remote_id": "41",
            "fetch_base": "https://other.test/api/v3/fetch",
            "due_at": MOMENT,
        }
        connection.execute(update(jobs).where(jobs.c.id == first).values(taken))

    checks.checks.run()

    assert checks.job(second).status == "uncertain"
    assert checks.notes(second) == {"41": "another job of the account has this id"}


def test_given_an_equal_order_that_is_still_being_sent_then_the_check_waits_for_its_answer(
    checks: Checks, engine: Engine
) -> None:
    """The job may be that of the other order."""
    lost, sending = checks.lose_order(), checks.lose_order(status="ordered")
    with engine.begin() as connection:
        claim = {
            "claim_token": "token",
            "claim_holder": "holder",
            "due_at": database_now(connection) + timedelta(minutes=1),
        }
        connection.execute(update(orders).where(orders.c.id == sending).values(claim))
    checks.name("41")
    checks.answer("41", success(41))

    checks.checks.run()
    before = checks.job(lost).status
    with engine.begin() as connection:
        connection.execute(
            update(jobs).where(jobs.c.id == sending).values(status="pending", remote_id="40", due_at=MOMENT)
        )
    checks.make_due()
    checks.checks.run()

    assert (before, checks.job(lost).status) == ("uncertain", "pending")


def test_given_a_job_that_is_not_ready_then_the_api_is_asked_again_until_it_is(checks: Checks) -> None:
    """An answer about a job that is not ready may have the id of another one, so it decides nothing."""
    job_id = checks.lose_order()
    checks.name("41")
    checks.answer("41", {"status": "processing", "id": 42, "eta": 9})

    for _ in range(MAX_TRIES + 3):
        checks.checks.run()
        checks.make_due()
    before = checks.job(job_id).status
    checks.answer("41", success(41))
    checks.checks.run()

    assert (before, checks.job(job_id).status) == ("uncertain", "pending")


def test_given_no_answer_for_a_day_then_the_api_is_asked_no_more(checks: Checks, engine: Engine) -> None:
    job_id = checks.lose_order()
    checks.name("41")
    with engine.begin() as connection:
        old = {"named_at": database_now(connection) - timedelta(hours=25)}
        connection.execute(update(candidates).values(old))

    assert checks.checks.run() == 0
    assert checks.is_decided(job_id)
    assert checks.web.requests == []


def test_candidates_of_orders_that_were_taken_are_settled(checks: Checks, engine: Engine) -> None:
    taken, lost = checks.lose_order(status="ordered"), checks.lose_order()
    checks.name("41")
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == taken).values(status="pending", due_at=MOMENT))
        now = database_now(connection)
        settled = [settle_candidates(connection, now=now) for _ in range(2)]

    assert settled == [1, 0]
    assert (checks.is_decided(taken), checks.is_decided(lost)) == (True, False)


def test_given_two_equal_orders_of_a_reference_then_each_job_is_attached_once(checks: Checks) -> None:
    ids = [checks.lose_order(), checks.lose_order()]
    checks.name("41")
    checks.name("42")
    checks.answer("41", success(41))
    checks.answer("42", success(42))

    while checks.checks.run():
        pass

    assert sorted(checks.job(job_id).remote_id for job_id in ids) == ["41", "42"]
    assert {checks.job(job_id).status for job_id in ids} == {"pending"}


# ── when it waits ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_order_that_is_still_being_sent_is_checked_when_it_is_uncertain(checks: Checks, engine: Engine) -> None:
    job_id = checks.lose_order(status="ordered")
    checks.name("41")
    checks.answer("41", success(41))

    assert checks.checks.run() == 0
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(status="uncertain"))

    assert checks.checks.run() == 1
    assert checks.job(job_id).status == "pending"


def test_a_retried_order_is_not_checked(checks: Checks, engine: Engine) -> None:
    job_id = checks.lose_order()
    checks.name("41")
    with engine.begin() as connection:
        assert retry(connection, job_id, now=database_now(connection))

    assert checks.checks.run() == 0
    assert checks.job(job_id).status == "ordered"


def test_given_a_held_account_then_no_request_is_sent(checks: Checks, engine: Engine) -> None:
    job_id = checks.lose_order()
    checks.name("41")
    checks.answer("41", success(41))
    with engine.begin() as connection:
        now = database_now(connection)
        held = CircuitBreaker(
            "account", "default", proven=True, reason="key", since=now, probe_at=now + timedelta(hours=1)
        )
        save_breaker(connection, held)

    assert checks.checks.run() == 0
    assert (checks.job(job_id).status, checks.web.requests) == ("uncertain", [])


def test_given_checks_of_two_processes_then_the_api_is_asked_once(
    checks: Checks, engine: Engine, redis_url: str, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process looked before the first one had claimed the candidate."""
    checks.lose_order()
    checks.name("41")
    checks.answer("41", success(41))
    other = Checks(engine, redis_url, web)
    due = other.checks._checkable()

    asked = checks.checks.run()
    monkeypatch.setattr(other.checks, "_checkable", lambda: due)

    assert (asked, other.checks.run()) == (1, 0)


def test_given_an_answer_that_comes_while_an_operator_retries_then_it_changes_nothing(
    checks: Checks, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = checks.lose_order()
    checks.name("41")
    checks.answer("41", success(41))
    ask: Callable[..., Any] = checks.checks._api.ask_whole

    def ask_and_retry(*arguments: Any) -> Any:
        answer = ask(*arguments)
        with engine.begin() as connection:
            assert retry(connection, job_id, now=database_now(connection))
        return answer

    monkeypatch.setattr(checks.checks._api, "ask_whole", ask_and_retry)

    assert checks.checks.run() == 1
    assert (checks.job(job_id).status, checks.attached) == ("ordered", [])
