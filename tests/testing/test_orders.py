"""The test kit's stand-in with orders that an app posts itself: refused, lost, and counted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from worker.testing import Kit, kit
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
