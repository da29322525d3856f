"""What follows from an answer: the next state of its job, or its next poll, and what is learned."""

import random
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests.polling.answers import answer_about, claimed_job
from tests.polling.polls import KEY, Polls, scripted, submitted
from tests.rows import NOW, seconds
from worker.core.circuit_breaker import CircuitBreaker
from worker.core.lifecycle import EMPTY_ANSWERS, AskAgain, EndJob, Strikes
from worker.core.pacing.backlog import OrderBacklog
from worker.core.pacing.policy import Pace, PaceModel
from worker.core.reply import ApiDown, ApiError, Empty, Link, Processing, Ready, Reply
from worker.polling import duration_learner
from worker.polling.duration_learner import DurationLearner
from worker.polling.outcomes import MOVED, Outcomes, expires
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.engine import database_now, make_engine
from worker.store.results import Outcome


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
    assert polls.notified == [job]


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


# ── learning ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def model_of(engine: Engine) -> PaceModel:
    """Return the shared model of images."""
    with engine.connect() as connection:
        return duration_learner.read_models(connection, [("default", "image")])["default", "image"][0]


# ── decisions alone ───────────────────────────────────────────────────────────────────────────────────────────────────

IMAGE = ("default", "image")
LATE = NOW + timedelta(hours=1, seconds=10)  # after the deadline of a job


@pytest.fixture
def learner(tmp_path: Path, migrated_sqlite: Path) -> Iterator[DurationLearner]:
    """A learner that has learned nothing yet, on SQLite. Other tests cover what it shares on each database."""
    shutil.copy(migrated_sqlite, tmp_path / "outcomes.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/outcomes.db"))
    learner = DurationLearner(engine)
    learner.prepare([IMAGE])
    yield learner
    engine.dispose()


@pytest.fixture
def outcomes(learner: DurationLearner) -> Outcomes:
    """Decisions whose waits do not depend on what was learned: about 1.5 s after the first poll."""
    return Outcomes(learner, Pace("exponential", 0.5, 0.0), OrderBacklog(), random.Random(0))


def strikes_of(outcome: Outcome) -> Strikes:
    """Return the strikes of a job that is polled again."""
    assert isinstance(outcome.step, AskAgain)
    return outcome.step.strikes


@pytest.mark.parametrize(
    ("reply", "least", "most"),
    [
        (Processing(), 1.5, 1.7),
        (ApiError("wrong size"), 1.5, 1.7),
        (ApiDown("HTTP 502"), 5.0, 10.0),
        (ApiError("something went wrong", vague=True), 10.0, 10.0),
    ],
)
def test_given_an_answer_without_a_result_then_the_next_poll_leaves_the_api_the_time_to_recover(
    outcomes: Outcomes, reply: Reply, least: float, most: float
) -> None:
    plans = [outcomes.outcome(answer_about(claimed_job(), reply), NOW + seconds(2)).plan for _ in range(20)]

    waits = [plan.wait for plan in plans if plan is not None]
    assert len(waits) == 20
    assert least <= min(waits) <= max(waits) <= most


@pytest.mark.parametrize(
    ("breaker", "ends"),
    [
        (CircuitBreaker("account", "default", released_at=LATE - seconds(5)), False),
        (CircuitBreaker("host", "api.test", released_at=LATE - seconds(5)), False),
        (CircuitBreaker("account", "default", reason="no credits", since=NOW), False),
        (CircuitBreaker("account", "default", released_at=LATE - seconds(90)), True),
        (CircuitBreaker("account", "other", released_at=LATE - seconds(5)), True),
        (CircuitBreaker("host", "other.test", released_at=LATE - seconds(5)), True),
    ],
    ids=["account", "host", "held now", "long ago", "another account", "another host"],
)
def test_given_a_late_job_when_its_account_or_host_was_held_until_just_now_then_it_does_not_expire_yet(
    outcomes: Outcomes, breaker: CircuitBreaker, ends: bool
) -> None:
    answer = answer_about(claimed_job(), Processing())

    without_hold = outcomes.outcome(answer, LATE)
    with_hold = outcomes.outcome(answer, LATE, {(breaker.scope, breaker.name): breaker})

    assert (expires(without_hold), expires(with_hold)) == (True, ends)


def test_given_a_late_job_that_was_polled_at_a_wrong_address_then_it_is_polled_again_without_a_strike(
    outcomes: Outcomes,
) -> None:
    strikes = Strikes(failed=1, error=2, last=NOW)
    job = claimed_job(facts=claimed_job().facts._replace(strikes=strikes))

    outcome = outcomes.outcome(answer_about(job, MOVED), LATE)

    assert not expires(outcome)
    assert strikes_of(outcome) == strikes
    assert outcome.note == MOVED.message


@pytest.mark.parametrize(
    ("before", "answered", "stored"),
    [
        (None, 600.0, 600.0),
        (None, None, None),
        (600.0, 650.0, 650.0),
        (600.0, 605.0, None),
        (600.0, None, None),
        (None, 3_600.0, 3_600.0),
        (600.0, 3_601.0, None),
    ],
    ids=["first", "none", "changed", "the same", "none after one", "at the deadline", "after the deadline"],
)
def test_given_an_eta_then_it_is_stored_if_it_has_changed_and_is_not_after_the_deadline(
    outcomes: Outcomes, before: float | None, answered: float | None, stored: float | None
) -> None:
    job = claimed_job(eta=before, eta_at=None if before is None else NOW)

    outcome = outcomes.outcome(answer_about(job, Processing(eta=answered)), NOW + seconds(2))

    assert outcome.eta == stored


def test_given_answers_that_promise_links_then_those_of_a_few_polls_are_stored(outcomes: Outcomes) -> None:
    """Every answer repeats them."""
    reply = Processing(promised=("https://cdn.test/a.png",))

    answers = [answer_about(claimed_job(polls=polls), reply) for polls in range(1, 20)]

    assert [answer.job.polls for answer in answers if outcomes.outcome(answer, NOW + seconds(2)).promised] == [
        1,
        2,
        4,
        8,
        16,
    ]


def test_given_an_answer_that_ends_its_job_then_the_links_that_it_promises_are_stored_in_any_case(
    outcomes: Outcomes,
) -> None:
    """They are tried before the job ends, and there is no later answer."""
    facts = claimed_job().facts._replace(strikes=Strikes(empty=EMPTY_ANSWERS - 1, last=NOW))
    links = ("https://cdn.test/a.png",)

    outcome = outcomes.outcome(answer_about(claimed_job(polls=7, facts=facts), Empty(links)), NOW + seconds(60))

    assert isinstance(outcome.step, EndJob)
    assert outcome.promised == links


def test_given_an_answer_that_is_written_at_the_second_try_then_it_is_learned_once(
    outcomes: Outcomes, learner: DurationLearner
) -> None:
    ready = answer_about(claimed_job(), Ready((Link("https://cdn.test/a.png"),)))
    outcomes.take([ready])

    for _ in range(2):
        outcomes.learn(NOW + seconds(20))

    assert learner.model(*IMAGE).polls == 1
    delay = outcomes.outcome(ready, NOW + seconds(20)).delay
    assert delay is not None
    assert 0.0 < delay < 20.0
    outcomes.forget_delays()
    assert outcomes.outcome(ready, NOW + seconds(20)).delay is None


def test_given_a_job_that_is_downloading_when_its_links_are_renewed_then_nothing_is_learned(
    outcomes: Outcomes, learner: DurationLearner
) -> None:
    """It was ready before."""
    job = claimed_job(facts=claimed_job().facts._replace(status="downloading"))
    outcomes.take([answer_about(job, Ready((Link("https://cdn.test/b.png"),))), answer_about(job, Processing())])

    outcomes.learn(NOW + seconds(20))

    assert learner.model(*IMAGE).polls == 0
