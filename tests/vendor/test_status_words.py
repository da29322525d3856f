"""Custom status words: they apply to all answers, and invalid ones are refused with a reason."""

import json

import pytest

from worker.core.reply import Failed, Processing, Ready, Reply, Unread
from worker.errors import ApiRefused
from worker.vendor.fetch_url import AllowedApi
from worker.vendor.replies import Question, parse
from worker.vendor.status_words import parse_status_words
from worker.vendor.submissions import planned_job

API = AllowedApi("https://modelslab.com/api/v3", frozenset({"modelslab.com"}))
LINK = "https://cdn.test/a.png"


def _read(answer: object, status_words: dict[str, str], *, training: bool = False) -> Reply:
    return parse(200, {}, json.dumps(answer).encode(), Question("7", 0.0, training, status_words))


def test_a_custom_word_has_the_meaning_of_its_status() -> None:
    """The case does not matter, and only the status is compared."""
    status_words = parse_status_words('{"done": "success", "Cooking": "processing", "burnt": "failed"}')

    ready = _read({"status": " DONE", "assets": [LINK], "id": 7}, status_words)
    assert isinstance(ready, Ready)
    assert [link.url for link in ready.outputs] == [LINK]
    assert isinstance(_read({"status": "cooking", "eta": 4}, status_words), Processing)
    assert _read({"status": "burnt", "message": "too hot"}, status_words) == Failed("too hot")
    assert isinstance(_read({"status": "served", "message": "done"}, status_words), Unread)
    assert isinstance(_read({"status": "done", "assets": [LINK]}, {}), Unread)


def test_custom_words_apply_to_submit_answers() -> None:
    status_words = parse_status_words('{"done": "success", "burnt": "failed"}')

    ready = planned_job({"status": "done", "assets": [LINK], "id": 7}, API, status_words=status_words).submission
    assert [link.url for link in ready.outputs] == [LINK]
    assert planned_job({"status": "done", "assets": [LINK], "id": 7}, API).submission.outputs == ()
    with pytest.raises(ApiRefused, match="too hot"):
        planned_job({"status": "burnt", "message": "too hot", "id": 7}, API, status_words=status_words)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("done", "JSON object"),
        ("[]", "JSON object"),
        ('"done"', "JSON object"),
        ('{"done": "success"', "JSON object"),
        ("[" * 100_000, "JSON object"),
        ('{"done": "ready"}', "'done' to one of error, failed, processing, success"),
        ('{"done": true}', "'done' to one of"),
        ('{"done": null}', "'done' to one of"),
        ('{" ": "success"}', "0 characters"),
        (json.dumps({"x" * 101: "success"}), "101 characters"),
        ('{"Done": "success", "done": "failed"}', "two meanings"),
        ('{"processing": "success"}', "can't change the meaning"),
    ],
)
def test_invalid_status_words_are_refused_with_a_hint(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_status_words(text)


def test_a_custom_word_that_the_worker_knows_now_stays_allowed() -> None:
    """An upgrade must not prevent a worker from starting."""
    assert parse_status_words('{"queued": "processing", "success": "success"}') == {
        "queued": "processing",
        "success": "success",
    }
