"""Promised links are tried before a job ends without an output: with real polls and downloads, on each database."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

import worker
from tests.download_stand import PNG, png
from tests.servers import celery_worker
from tests.testing.test_kit import content
from tests.waiting import wait_until
from tests.web import Answer, Web, page
from worker.core.lifecycle import PROMISE_PATIENCE
from worker.operations.explain import explain, why
from worker.operations.job_context import read_context
from worker.operations.prune import Retention, prune
from worker.operations.verify import verify
from worker.sandbox import Sandbox, SandboxOptions
from worker.storage.local import path_of
from worker.store.jobs import job_row, outputs_of
from worker.store.promises import promise_row
from worker.store.schema import outputs, promises
from worker.testing import Kit, kit

DEAD = page(404, b"<Error><Code>NoSuchKey</Code></Error>")
ACCEPTED = {"status": "processing", "id": 7, "eta": 5}
EMPTY: dict[str, Any] = {"status": "success", "output": []}
NOT_READY: dict[str, Any] = {"status": "processing", "output": ""}
KEY = "a-key-of-the-sandbox"


@pytest.fixture
def env(engine: Engine, tmp_path: Path) -> Iterator[Kit]:
    """The test kit on a real database. The test controls the clock; the requests are real."""
    with kit(tmp_path / "kit", database=engine) as env:
        yield env


def promise_of(engine: Engine, job_id: int) -> Any:
    """Return the stored promise of a job."""
    with engine.connect() as connection:
        return promise_row(connection, job_id)


def promised(engine: Engine, job_id: int) -> list[str] | None:
    """Return the stored promised links of a job."""
    row = promise_of(engine, job_id)
    return None if row is None else json.loads(row.urls)


def step_of(env: Kit, job_id: int, name: str) -> Any:
    """Return one step of the explanation that `show` prints."""
    with env.worker.engine.connect() as connection:
        row = job_row(connection, job_id)
        assert row is not None
        context = read_context(connection, row, outputs_of(connection, [job_id]), [], env.worker.settings)
    explanation = explain(context, None)
    return next(finding for finding in explanation.findings if finding.step == name), explanation.advice


# ── links that are tried ──────────────────────────────────────────────────────────────────────────────────────────────


def test_given_a_job_that_the_api_forgot_when_its_promised_link_works_then_the_output_is_stored(
    env: Kit, web: Web
) -> None:
    links = [web.serves("/a.png", page(200, PNG)), web.serves("/b.png", page(200, png(4, 4)))]
    env.api.answers("7").processing().not_found()
    job_id = worker.track(ACCEPTED | {"future_links": links})

    job = env.worker.run(job_id)

    assert (job.status, job.error_code, job.error_message) == ("completed", None, None)
    assert [(output.url, output.status, output.position) for output in job.outputs] == [
        (links[0], "stored", 0),
        (links[1], "stored", 1),
    ]
    assert [content(job, 0), content(job, 1)] == [PNG, png(4, 4)]
    assert job.polls == env.api.asked("7") >= 4
    assert len(web.requests) == 2
    assert step_of(env, job_id, "promise")[0].state == "stored"


def test_given_a_dead_promised_link_then_the_job_ends_as_not_found_after_ten_minutes(env: Kit, web: Web) -> None:
    env.api.answers("7").not_found()
    job_id = worker.track(ACCEPTED | {"future_links": [web.serves("/a.png", DEAD)]})
    while not web.requests:
        env.worker.advance(1)
    began, polls = env.worker.now, env.api.asked("7")
    while_tried = worker.get(job_id)

    job = env.worker.run(job_id)

    assert while_tried is not None
    assert (while_tried.status, while_tried.error_code) == ("downloading", None)
    assert (job.status, job.error_code, job.error_message) == ("failed", "not_found", "Request not found")
    assert abs(env.worker.now - began - PROMISE_PATIENCE) < timedelta(seconds=5)
    assert (job.polls, env.api.asked("7"), job.ready_at) == (polls, polls, None)
    assert [(output.status, output.error_code) for output in job.outputs] == [("failed", "gone")]
    assert 10 <= len(web.requests) <= 16
    assert step_of(env, job_id, "promise")[0].state == "dead"


@pytest.mark.parametrize(
    "before",
    [DEAD, page(200, b"<html>soon</html>"), page(200, PNG[:-20]), page(500, b""), page(429, b"", Retry_After="30")],
    ids=["dead", "a page", "a part", "an error", "too many"],
)
def test_given_a_promised_link_that_starts_to_work_in_time_then_its_output_is_stored(
    env: Kit, web: Web, before: Answer
) -> None:
    env.api.answers("7").not_found()
    link = web.serves("/a.png", before)
    job_id = worker.track(ACCEPTED | {"future_links": [link]})
    while not web.requests:
        env.worker.advance(1)

    env.worker.advance(400)
    waiting = worker.get(job_id)
    web.serves("/a.png", page(200, PNG))
    job = env.worker.run(job_id)

    assert waiting is not None
    assert waiting.status == "downloading"
    assert (job.status, len(job.outputs), content(job)) == ("completed", 1, PNG)


def test_given_success_answers_with_only_future_links_then_these_are_the_outputs(env: Kit, web: Web) -> None:
    link = web.serves("/a.png", page(200, PNG))
    env.api.answers("7").body(EMPTY | {"future_links": [link]})
    job_id = worker.track("7")

    job = env.worker.run(job_id)

    assert (job.status, job.polls, content(job)) == ("completed", 5, PNG)
    assert [output.url for output in job.outputs] == [link]


@pytest.mark.parametrize(("answer", "status", "code"), [(PNG, "completed", None), (None, "expired", "expired")])
def test_given_a_job_past_its_deadline_then_its_promised_link_decides_whether_it_expires(
    env: Kit, web: Web, answer: bytes | None, status: str, code: str | None
) -> None:
    link = web.serves("/a.png", DEAD if answer is None else page(200, answer))
    env.api.answers("7").body(NOT_READY | {"future_links": [link]})
    job_id = worker.track("7", deadline=30, on_done="shop.done")

    job = env.worker.run(job_id)

    assert (job.status, job.error_code) == (status, code)
    assert (job.ready_at is None) == (status == "expired")
    assert (job.error_message or "not ready by its deadline").startswith("not ready by its deadline")
    assert [call.job_id for call in env.worker.told] == [job_id]


def test_given_two_promised_links_with_one_dead_then_the_job_ends_as_output_failed(env: Kit, web: Web) -> None:
    links = [web.serves("/a.png", DEAD), web.serves("/b.png", page(200, PNG))]
    env.api.answers("7").not_found()
    job_id = worker.track(ACCEPTED | {"future_links": links})

    job = env.worker.run(job_id)

    assert (job.status, job.error_code) == ("failed", "output_failed")
    assert [output.status for output in job.outputs] == ["failed", "stored"]


@pytest.mark.parametrize("link", ["http://10.0.0.1/a.png", "https://192.168.0.1/a.png", "http://[::1]/a.png"])
def test_given_a_promised_link_to_a_refused_address_then_the_job_ends_at_once(env: Kit, link: str) -> None:
    env.api.answers("7").not_found()
    began = env.worker.now
    job_id = worker.track(ACCEPTED | {"future_links": [link]})

    job = env.worker.run(job_id)

    assert (job.status, job.error_code) == ("failed", "not_found")
    assert env.worker.now - began < timedelta(minutes=5)


# ── links that are not tried ──────────────────────────────────────────────────────────────────────────────────────────


def test_given_a_job_that_becomes_ready_then_its_promised_links_are_never_tried(env: Kit, web: Web) -> None:
    env.api.answers("7").processing(3).success(pictures=2)
    job_id = worker.track(ACCEPTED | {"future_links": [web.serves("/a.png", page(200, PNG))]})

    job = env.worker.run(job_id)

    assert (job.status, len(job.outputs), web.requests) == ("completed", 2, [])


def test_given_a_job_that_the_api_failed_then_its_promised_links_are_never_tried(env: Kit, web: Web) -> None:
    env.api.answers("7").failed("out of paint")
    job_id = worker.track(ACCEPTED | {"future_links": [web.serves("/a.png", page(200, PNG))]})

    job = env.worker.run(job_id)

    assert (job.status, job.error_code, web.requests) == ("failed", "api_failed", [])


def test_given_a_job_without_promises_then_it_ends_as_usual_and_nothing_is_stored(env: Kit) -> None:
    env.api.answers("7").not_found()
    job_id = worker.track(ACCEPTED | {"future_links": []})

    job = env.worker.run(job_id)

    assert (job.status, job.error_code, job.outputs) == ("failed", "not_found", ())
    assert promised(env.worker.engine, job_id) is None


# ── stored promises ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_many_jobs_at_once_then_each_has_the_links_of_its_own_answer(env: Kit, engine: Engine) -> None:
    answers = [ACCEPTED | {"id": number, "future_links": [f"https://h/{number}.mp4"]} for number in range(1, 602)]
    answers.append({"status": "processing", "id": 9_999})

    ids = worker.track_many(answers)
    again = worker.track_many([answers[0] | {"future_links": ["https://h/other.mp4"]}, answers[1]])

    assert again == ids[:2]
    assert [promised(engine, job_id) for job_id in (ids[0], ids[600], ids[601])] == [
        ["https://h/1.mp4"],
        ["https://h/601.mp4"],
        None,
    ]
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(promises)).scalar_one() == 601


def test_given_processing_answers_with_promises_then_the_first_second_and_fourth_are_stored(
    env: Kit, engine: Engine
) -> None:
    answers = env.api.answers("7")
    for number in range(1, 6):
        answers.body(NOT_READY | {"future_links": [f"https://h/{number}.png"]})
    job_id = worker.track("7")
    stored: dict[int, list[str] | None] = {}
    while len(stored) < 5:
        env.worker.advance(1)
        stored[env.api.asked("7")] = promised(engine, job_id)
        stored.pop(0, None)

    assert {polls: None if urls is None else urls[0][-5] for polls, urls in stored.items()} == {
        1: "1", 2: "2", 3: "2", 4: "4", 5: "4",
    }  # fmt: skip


def test_given_a_key_in_a_promised_link_then_the_link_is_stored_without_it(env: Kit, engine: Engine) -> None:
    key = env.worker.settings.sd_api_key
    assert key is not None
    link = f"https://h/a.png?key={key.get_secret_value()}"
    env.api.answers("8").body(NOT_READY | {"future_links": [link]}, times=50)
    stored = [promised(engine, worker.track(ACCEPTED | {"future_links": [link]}))]
    polled = worker.track("8")
    env.worker.advance(30)

    stored.append(promised(engine, polled))

    assert all(urls is not None and len(urls) == 1 for urls in stored)
    assert key.get_secret_value() not in str(stored)


def test_given_an_app_transaction_that_is_rolled_back_then_no_promise_is_stored(env: Kit, engine: Engine) -> None:
    with Session(engine) as session:
        worker.track(ACCEPTED | {"future_links": ["https://h/a.png"]}, session=session)
        session.rollback()

    with engine.connect() as connection:
        assert connection.execute(select(promises)).all() == []


# ── operators ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ended_as_not_found(env: Kit, web: Web) -> int:
    env.api.answers("7").not_found()
    job_id = worker.track(ACCEPTED | {"future_links": [web.serves("/a.png", DEAD), web.serves("/b.png", DEAD)]})
    assert env.worker.run(job_id).error_code == "not_found"
    return job_id


def test_given_a_job_that_ended_after_its_promise_failed_when_it_is_retried_then_the_api_is_polled_again(
    env: Kit, web: Web
) -> None:
    job_id = _ended_as_not_found(env, web)
    requests_before = len(web.requests)
    env.api.answers("7").processing().success(pictures=3)

    worker.retry(job_id)
    retried = worker.get(job_id)
    job = env.worker.run(job_id)

    assert retried is not None
    assert (retried.status, retried.outputs, retried.error_code) == ("pending", (), None)
    assert (job.status, len(job.outputs), len(web.requests)) == ("completed", 3, requests_before)


def test_given_a_retried_job_that_the_api_still_does_not_know_then_its_promise_is_tried_again(
    env: Kit, web: Web
) -> None:
    job_id = _ended_as_not_found(env, web)
    web.serves("/a.png", page(200, PNG))
    web.serves("/b.png", page(200, PNG))

    worker.retry(job_id)
    job = env.worker.run(job_id)

    assert (job.status, job.error_code, [output.status for output in job.outputs]) == (
        "completed",
        None,
        ["stored", "stored"],
    )


def test_given_a_job_whose_promise_is_tried_when_it_is_shown_then_it_says_so_and_how_it_would_end(
    env: Kit, web: Web
) -> None:
    env.api.answers("7").not_found()
    job_id = worker.track(ACCEPTED | {"future_links": [web.serves("/a.png", DEAD)]})
    before, _ = step_of(env, job_id, "promise")
    while not web.requests:
        env.worker.advance(1)
    tried, advice = step_of(env, job_id, "promise")

    assert (before.state, before.detail) == ("kept", "1 link; tried before the job ends without an output")
    assert tried.state == "tried"
    assert "because the API promised output there" in tried.detail
    assert "if none gives an output, the job ends as not_found: Request not found" in tried.detail
    assert "the API promised output at this link" in advice
    with env.worker.engine.connect() as connection:
        row = job_row(connection, job_id)
        assert row is not None
        outputs = outputs_of(connection, [job_id])
        explanation = why(read_context(connection, row, outputs, [], env.worker.settings))
    assert explanation.startswith(
        "it ends as not_found unless a promised link gives an output; 0 of 1 outputs are stored"
    )


def test_given_a_job_whose_promise_is_tried_when_it_is_cancelled_then_it_stays_cancelled(env: Kit, web: Web) -> None:
    env.api.answers("7").not_found()
    job_id = worker.track(ACCEPTED | {"future_links": [web.serves("/a.png", DEAD)]})
    while not web.requests:
        env.worker.advance(1)

    worker.cancel(job_id)
    env.worker.advance(900)

    job = worker.get(job_id)
    assert job is not None
    assert (job.status, job.error_code) == ("cancelled", None)
    assert [(output.status, output.error_code) for output in job.outputs] == [("failed", "cancelled")]


def test_given_an_output_of_a_promised_link_whose_file_is_missing_when_verified_then_it_is_downloaded_again(
    env: Kit, web: Web
) -> None:
    env.api.answers("7").not_found()
    job_id = worker.track(ACCEPTED | {"future_links": [web.serves("/a.png", page(200, PNG))]})
    location = env.worker.run(job_id).outputs[0].location
    assert location is not None
    path_of(location).unlink()

    verify(env.worker.engine, env.worker.settings, force=True)
    job = env.worker.run(job_id)

    assert (job.status, content(job)) == ("completed", PNG)


def test_given_jobs_with_promises_when_they_are_pruned_then_their_promises_are_removed(env: Kit, web: Web) -> None:
    engine = env.worker.engine
    _ended_as_not_found(env, web)
    env.worker.advance(2 * 86_400)

    retention = Retention(older_than=timedelta(days=1), states=["failed"], remove_files=False)
    pruned = prune(engine, env.worker.settings, retention)

    assert pruned.jobs == 1
    with engine.connect() as connection:
        assert [connection.execute(select(table)).all() for table in (promises, outputs)] == [[], []]


# ── outputs of other jobs ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("was_seen_before", [False, True], ids=["family unknown", "wrong family"])
def test_given_a_voice_with_a_dead_link_when_its_id_is_also_a_picture_then_the_picture_is_not_stored(
    env: Kit, web: Web, was_seen_before: bool
) -> None:
    env.api.answers("298").success(pictures=[PNG])
    ready = {"status": "success", "id": 298, "output": [web.serves("/voice.wav", DEAD)]}
    job_id = worker.track(ready, fetch_url=f"{env.api.url}/fetch/298" if was_seen_before else None)

    job = env.worker.run(job_id)

    assert (job.status, job.error_code) == ("failed", "output_failed")
    assert [(output.status, output.error_code, output.url) for output in job.outputs] == [
        ("failed", "gone", web.url + "/voice.wav")
    ]
    assert env.api.asked("298") == (1 if was_seen_before else 0)
    assert list((env.worker.settings.storage_path or Path()).rglob("*.png")) == []


def test_given_a_picture_with_a_dead_link_when_the_api_names_another_then_that_is_stored(env: Kit, web: Web) -> None:
    env.api.answers("299").success(pictures=[web.serves("/b.webp", page(200, PNG))])
    ready = {"status": "success", "id": 299, "output": [web.serves("/a.png", DEAD)]}
    job_id = worker.track(ready, fetch_url=f"{env.api.url}/fetch/299")

    job = env.worker.run(job_id)

    assert (job.status, content(job)) == ("completed", PNG)


# ── a real worker ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("alive", [True, False], ids=["alive", "dead"])
def test_given_a_real_worker_when_answers_have_only_promised_links_then_the_links_decide(
    alive: bool, web: Web, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    """OUTPUT_DEADLINE limits the time in which the links are tried."""
    link = web.serves("/a.png", page(200, PNG) if alive else DEAD)
    with Sandbox(SandboxOptions(key=KEY)) as api:
        for name, value in {
            "SD_API_URL": api.url, "SD_API_KEY": KEY, "OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8", "POLL_MIN": "0.2",
            "REDIS_URL": redis_url, "OUTPUT_DEADLINE": "4",
            "DATABASE_URL": engine.url.render_as_string(hide_password=False),
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        body = json.dumps(EMPTY | {"future_links": [link]}).encode()
        api.script("7", [(200, {"Content-Type": "application/json"}, body)] * 40)
        job_id = worker.track("7", eta=0.1)
        with celery_worker(tmp_path, "--hostname", f"promise-{alive}-{engine.dialect.name}@%h"):
            wait_until(lambda: _final(job_id), "the job is final", seen=lambda: worker.get(job_id))
        polls = api.calls.fetches["7"]

    job = worker.get(job_id)
    assert job is not None
    assert (job.status, job.error_code) == (("completed", None) if alive else ("failed", "no_output"))
    assert job.polls == polls
    assert b"Traceback" not in (tmp_path / "worker.log").read_bytes()


def _final(job_id: int) -> bool:
    job = worker.get(job_id)
    return job is not None and job.final
