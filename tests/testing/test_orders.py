"""The test kit with orders: those of `worker.order`, and those that an app posts itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from sqlalchemy.orm import Session

import worker
from worker.client import hooks
from worker.client.hooks import hook_url, received
from worker.errors import WaitTimeout
from worker.testing import Kit, NeverEnds, kit
from worker.testing.stand_in import KEY


@pytest.fixture
def testkit(tmp_path: Path, migrated_sqlite: Path) -> Iterator[Kit]:
    with kit(tmp_path / "kit", tables=migrated_sqlite) as testkit:
        yield testkit


def post(testkit: Kit, prompt: str = "a lake") -> requests.Response:
    """Post an order, as an app does."""
    body = {"key": KEY, "prompt": prompt}
    return requests.post(f"{testkit.api.url}/text2img", json=body, headers={"Connection": "close"}, timeout=5)


def test_given_it_loses_the_answer_when_orders_come_then_they_are_charged_and_the_next_one_is_answered(
    testkit: Kit,
) -> None:
    testkit.api.loses_the_answer(times=2)

    for _ in range(2):
        with pytest.raises(requests.ConnectionError):
            post(testkit)
    answer: dict[str, Any] = post(testkit).json()

    assert answer["status"] == "processing"
    assert testkit.api.charged == 3
    assert len(testkit.api.submissions) == 3
    assert testkit.api.job(int(answer["id"]) - 1) is not None


def test_given_it_refuses_when_an_order_comes_then_nothing_is_charged(testkit: Kit) -> None:
    testkit.api.refuses("The width must be a multiple of 8", status=422)

    refused, taken = post(testkit), post(testkit)

    assert (refused.status_code, refused.json()["message"]) == (422, "The width must be a multiple of 8")
    assert taken.status_code == 200
    assert testkit.api.charged == 1


def test_refusals_and_lost_answers_come_in_the_order_in_which_they_were_set(testkit: Kit) -> None:
    testkit.api.refuses("first")
    testkit.api.loses_the_answer()
    testkit.api.refuses("third")

    statuses = [post(testkit).status_code]
    with pytest.raises(requests.ConnectionError):
        post(testkit)
    statuses += [post(testkit).status_code, post(testkit).status_code]

    assert statuses == [400, 400, 200]
    assert testkit.api.charged == 2


def test_an_order_that_finds_no_slot_does_not_use_up_a_lost_answer(testkit: Kit) -> None:
    testkit.api.options_now(slots=1)
    post(testkit)
    testkit.api.loses_the_answer()

    full = post(testkit)
    testkit.worker.advance(60)
    with pytest.raises(requests.ConnectionError):
        post(testkit)

    assert (full.status_code, json.loads(full.content)["retry_after"]) == (429, 30)
    assert testkit.api.charged == 2


def test_a_lost_answer_does_not_change_what_the_job_plays(testkit: Kit) -> None:
    testkit.api.play("failed")
    testkit.api.loses_the_answer()

    with pytest.raises(requests.ConnectionError):
        post(testkit)

    job = testkit.api.job(post(testkit).json()["id"] - 1)
    assert job is not None
    assert job.scenario == "failed"


def test_orders_without_http_are_charged_and_ids_made_up_by_the_test_are_not(testkit: Kit) -> None:
    testkit.api.submit("a lake")
    testkit.api.answers("77").success()

    assert testkit.api.charged == 1


@pytest.mark.parametrize("times", [0, -1])
def test_at_least_one_order_is_concerned(testkit: Kit, times: int) -> None:
    with pytest.raises(ValueError, match="at least one submission"):
        testkit.api.loses_the_answer(times)
    with pytest.raises(ValueError, match="at least one submission"):
        testkit.api.refuses("no", times=times)


# ── worker.order ──────────────────────────────────────────────────────────────────────────────────────────────────────


def order(reference: str | None = None, **options: Any) -> int:
    """Order a picture, as an app does."""
    return worker.order("v6/images/text2img", {"prompt": "a lake", "samples": 2}, reference=reference, **options)


def test_an_order_is_sent_once_without_a_key_in_its_row_and_its_pictures_are_stored(testkit: Kit) -> None:
    job_id = order(on_done="shop.ready")
    assert testkit.api.submissions == []

    job = testkit.worker.run(job_id)

    assert (job.status, len(job.outputs)) == ("completed", 2)
    assert testkit.api.submissions == [{"prompt": "a lake", "samples": 2}]
    assert testkit.api.charged == 1
    assert testkit.worker.told == [("shop.ready", "celery", job_id)]
    assert testkit.worker.run_all() == []


def test_given_a_rollback_then_nothing_is_sent(testkit: Kit) -> None:
    with Session(testkit.worker.engine) as session:
        order(session=session)
        session.rollback()

    assert testkit.worker.run_all() == []
    assert testkit.api.submissions == []


def test_a_refused_order_fails_with_the_words_of_the_api(testkit: Kit) -> None:
    testkit.api.refuses("The width must be a multiple of 8")

    job = testkit.worker.run(order())

    assert (job.status, job.error_message) == ("failed", "The width must be a multiple of 8")
    assert job.error_code == "bad_request"
    assert testkit.api.charged == 0


def test_an_order_whose_answer_is_lost_is_returned_as_uncertain_and_never_sent_again(testkit: Kit) -> None:
    testkit.api.loses_the_answer()
    job_id = order(webhook_url="https://shop.test/hook", on_done="shop.ready")

    job = testkit.worker.run(job_id)
    testkit.worker.advance(3_600)
    again = testkit.worker.run(job_id)

    assert (job.status, job.final, again.status) == ("uncertain", False, "uncertain")
    assert testkit.api.charged == 1
    assert ['"type":"job.uncertain"' in sent.body.replace(" ", "") for sent in testkit.worker.webhooks] == [True]
    assert testkit.worker.told == []


def test_an_uncertain_order_that_is_attached_gets_the_pictures_that_were_paid_for(testkit: Kit) -> None:
    testkit.api.loses_the_answer()
    with pytest.raises(LookupError, match="has taken no order"):
        _ = testkit.api.last_id
    job_id = testkit.worker.run(order()).id

    assert worker.attach(job_id, testkit.api.last_id)

    job = testkit.worker.run(job_id)
    assert (job.status, job.remote_id, len(job.outputs)) == ("completed", testkit.api.last_id, 2)
    assert testkit.api.charged == 1


def test_an_uncertain_order_whose_job_the_api_calls_about_goes_on_by_itself(
    testkit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEBHOOK_SECRET", "whsec_" + "A" * 44)
    hooks._keys.cache_clear()
    testkit.api.loses_the_answer()
    job_id = testkit.worker.run(order(reference="order-7")).id
    reference, signature = hook_url("https://shop.test/hook", "order-7").rsplit("/", 2)[1:]

    testkit.worker.advance(600)  # the API calls when the job is ready
    assert received(reference, signature, json.dumps({"id": testkit.api.last_id}).encode)

    job = testkit.worker.run(job_id)
    assert (job.status, job.remote_id, len(job.outputs)) == ("completed", testkit.api.last_id, 2)
    assert testkit.api.charged == 1
    hooks._keys.cache_clear()


def test_an_uncertain_order_that_is_retried_is_sent_again(testkit: Kit) -> None:
    testkit.api.loses_the_answer()
    job_id = testkit.worker.run(order()).id

    assert worker.retry(job_id)

    assert testkit.worker.run(job_id).status == "completed"
    assert testkit.api.charged == 2


def test_run_all_leaves_uncertain_orders_and_ends_the_others(testkit: Kit) -> None:
    testkit.api.loses_the_answer()
    lost, taken = order("lost"), order("taken")

    assert [(job.id, job.status) for job in testkit.worker.run_all()] == [(lost, "uncertain"), (taken, "completed")]
    assert testkit.worker.run_all() == []


def test_waiting_for_an_uncertain_order_times_out_or_says_what_to_do(testkit: Kit) -> None:
    testkit.api.loses_the_answer()
    job_id = order()

    with pytest.raises(WaitTimeout, match="is still uncertain"):
        worker.wait(job_id, timeout=600)
    with pytest.raises(NeverEnds, match=r"is uncertain: .* Call worker\.attach or worker\.retry"):
        worker.wait(job_id)


def test_given_two_slots_then_orders_wait_for_each_other_best_first(testkit: Kit) -> None:
    testkit.api.options_now(slots=2)
    for number in range(5):
        order(f"usual {number}")
    urgent = order("urgent", priority=1)

    testkit.worker.advance(0)

    jobs = {job.reference: job.status for job in worker.find()}
    assert [name for name, status in jobs.items() if status == "pending"] == ["urgent", "usual 0"]
    assert testkit.worker.run(urgent).status == "completed"
    testkit.worker.run_all()
    assert len(worker.find(status="completed")) == testkit.api.charged == 6


def test_progress_of_an_order_counts_the_orders_before_it(testkit: Kit) -> None:
    testkit.api.options_now(slots=1)
    first, second = order(), order()

    ordered = worker.get(second)
    assert ordered is not None
    before = ordered.progress()
    assert (before.phase, before.before, before.fraction, before.chance) == ("ordered", 1, 0.0, 0.0)
    testkit.worker.run(first)
    testkit.worker.run(second)
    ended = worker.get(second)
    assert ended is not None
    assert (ended.progress().phase, ended.progress().before) == ("final", None)
