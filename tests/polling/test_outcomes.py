"""What follows from an answer: the next state of its job, or its next poll, and what is learned."""

from datetime import timedelta

import pytest
from sqlalchemy import Engine

from tests.polling.polls import KEY, Polls, scripted, submitted
from worker.core.pacing.policy import PaceModel
from worker.polling import duration_learner
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.engine import database_now


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
