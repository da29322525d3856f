"""The model of the API: each answer has the shape that clients meet, and the seed decides everything."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from worker.sandbox.answers import parse_body
from worker.sandbox.behaviour import Behaviour
from worker.sandbox.options import SandboxOptions

ORIGIN = "http://127.0.0.1:9"
BOOTH = "/api/v3/dreambooth/fetch/12202888"
KEYED = {"key": "sandbox-key"}


def asked(model: Behaviour, path: str, now: float, **body: object) -> dict[str, Any]:
    """The JSON of the answer to a call with the right key."""
    answer = model.answer(path, {**KEYED, **body}, now=now, origin=ORIGIN)
    content = json.loads(answer.body)
    assert isinstance(content, dict)
    return content


def model(**options: Any) -> Behaviour:
    return Behaviour(SandboxOptions(**options))


def test_a_submission_that_takes_time_promises_and_says_where_to_ask() -> None:
    """It has an id, an estimate, a fetch address and links that are not there yet."""
    answer = asked(model(min_seconds=5, max_seconds=5), "/api/v3/text2img", 100.0, prompt="sea", samples="2")

    assert answer["status"] == "processing"
    assert (answer["id"], answer["output"]) == (12202888, [])
    assert answer["fetch_result"] == f"{ORIGIN}/api/v3/fetch/12202888"
    assert isinstance(answer["eta"], float)
    assert 2 < answer["eta"] < 9
    assert len(answer["future_links"]) == 2
    assert "messege" in answer
    assert (answer["meta"]["prompt"], answer["meta"]["n_samples"]) == ("sea", 2)


def test_a_submission_may_come_without_an_estimate() -> None:
    """Not every family of the API gives one."""
    assert "eta" not in asked(model(eta=False), "/api/v3/text2img", 0.0, prompt="sea")


def test_a_submission_that_is_ready_at_once_is_a_success() -> None:
    """Such a job is never polled."""
    answer = asked(model(min_seconds=0, max_seconds=0), "/api/v3/text2img", 0.0, prompt="sea", samples=3)

    assert answer["status"] == "success"
    assert len(answer["output"]) == 3
    assert "fetch_result" not in answer
    assert "future_links" not in answer


@pytest.mark.parametrize(
    ("submit", "fetch_result", "fetch", "in_body", "label"),
    [
        ("/api/v3/text2img", "/api/v3/fetch/12202888", "/api/v3/fetch/12202888", False, "message"),
        ("/api/v3/dreambooth", BOOTH, BOOTH, False, "messege"),
        ("/api/v4/dreambooth", BOOTH, "/api/v4/dreambooth/fetch", True, "messege"),
        ("/api/v6/images/text2img", "/api/v6/images/fetch/12202888", "/api/v6/images/fetch", True, "messege"),
        ("/api/v6/images/text2img", "/api/v6/images/fetch/12202888", "/api/v6/images/fetch/12202888", False, "messege"),
    ],
)  # fmt: skip
def test_each_family_is_fetched_where_its_submission_says(
    submit: str, fetch_result: str, fetch: str, in_body: bool, label: str
) -> None:
    """A fetch that waits has neither id nor estimate, and an empty text for output; a done one has the links."""
    stand_in = model(min_seconds=5, max_seconds=5)
    named = {"request_id": "12202888"} if in_body else {}

    submitted = asked(stand_in, submit, 0.0, prompt="sea", samples=1)
    waiting = asked(stand_in, fetch, 4.9, **named)
    done = asked(stand_in, fetch, 5.0, **named)

    assert submitted["fetch_result"] == ORIGIN + fetch_result
    assert waiting == {"status": "processing", label: "try again later.", "output": "", "tip": waiting["tip"]}
    assert (done["status"], done["id"]) == ("success", 12202888)
    assert done["output"] == submitted["future_links"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/v3/fetch/1", {}),
        ("/api/v3/fetch/no-such-job", {}),
        ("/api/v3/dreambooth/fetch/12202888", {}),  # the job is of another family
        ("/api/v4/dreambooth/fetch", {"request_id": 12202888}),
        ("/api/v6/images/fetch", {}),
    ],
)
def test_an_unknown_id_is_failed_in_http_200(path: str, body: Mapping[str, object]) -> None:
    """Only the message tells it from a real failure."""
    stand_in = model()
    asked(stand_in, "/api/v3/text2img", 0.0, prompt="sea")

    answer = asked(stand_in, path, 1.0, **body)

    assert (answer["status"], answer["id"], answer["output"]) == ("failed", "", "")
    assert answer["message"] == "Request not found"


def test_a_failing_job_says_so_only_when_its_time_has_come() -> None:
    """Failure takes as long as success."""
    stand_in = model(min_seconds=2, max_seconds=2, failure_rate=1)
    asked(stand_in, "/api/v3/text2img", 0.0, prompt="sea")

    assert asked(stand_in, "/api/v3/fetch/12202888", 1.0)["status"] == "processing"
    assert asked(stand_in, "/api/v3/fetch/12202888", 2.0) == {
        "status": "failed",
        "id": "",
        "message": "Processing failed: Invalid input dimensions",
        "output": "",
    }


@pytest.mark.parametrize("key", ["wrong", "", None, 5, ["sandbox-key"]])
def test_any_other_key_is_refused_in_http_200(key: object) -> None:
    """Errors of the old API come with a friendly status code."""
    answer = model().answer("/api/v3/fetch/1", {"key": key}, now=0.0, origin=ORIGIN)

    assert answer.status == 200
    content = json.loads(answer.body)
    assert (content["status"], content["message"]) == ("error", "Invalid Api Key")
    assert content["tip"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": ["sea"]}, "prompt"),
        ({"prompt": "sea", "samples": 0}, "samples"),
        ({"prompt": "sea", "samples": 5}, "samples"),
        ({"prompt": "sea", "samples": "many"}, "samples"),
        ({"prompt": "sea", "samples": True}, "samples"),
    ],
)
def test_a_bad_field_is_named_in_an_object(body: Mapping[str, object], field: str) -> None:
    """The message of a refused field is an object, not a text; nothing is taken in."""
    stand_in = model()

    answer = asked(stand_in, "/api/v3/text2img", 0.0, **body)

    assert answer["status"] == "error"
    assert list(answer["message"]) == [field]
    assert stand_in.latest(1) == []


@pytest.mark.parametrize(("style", "status"), [("http429", 429), ("http200", 200)])
def test_the_limit_lets_a_second_of_calls_through_and_then_says_when_to_come_back(style: str, status: int) -> None:
    """Two a second: the third at once is refused, half a second later one passes."""
    stand_in = model(rps=2, limit_style=style)
    calls = [
        stand_in.answer("/api/v3/fetch/1", KEYED, now=now, origin=ORIGIN) for now in (10.0, 10.0, 10.0, 10.5, 10.5)
    ]

    texts = [json.loads(call.body)["message"] for call in calls]
    assert [text.startswith("Rate limit exceeded") for text in texts] == [False, False, True, False, True]
    assert calls[2].status == status
    assert json.loads(calls[2].body)["retry_after"] == 1


def test_the_queue_reports_its_load() -> None:
    """Jobs in work, and the seconds until the last of them is done."""
    stand_in = model(min_seconds=4, max_seconds=4)
    asked(stand_in, "/api/v3/text2img", 0.0, prompt="sea")
    asked(stand_in, "/api/v3/text2img", 1.0, prompt="sea")

    assert asked(stand_in, "/api/v3/system_load", 2.0) == {"queue_num": 2, "queue_time": 3, "status": "ok"}
    assert asked(stand_in, "/api/v3/system_load", 5.0) == {"queue_num": 0, "queue_time": 0, "status": "ok"}


def test_the_seed_decides_durations_counts_and_names() -> None:
    """Two stand-ins of one seed agree on everything; another seed differs."""

    def jobs(seed: int) -> list[object]:
        stand_in = model(seed=seed, failure_rate=0.3)
        return [stand_in.submit(f"p{n}", now=float(n)) for n in range(40)]

    assert jobs(1) == jobs(1)
    assert jobs(1) != jobs(2)


def test_durations_and_counts_stay_in_their_bounds_and_some_jobs_have_second_links() -> None:
    """Over a few hundred jobs every count appears, and so do both kinds of success."""
    stand_in = model(min_seconds=1, max_seconds=10)
    jobs = [stand_in.submit("p", now=0.0) for _ in range(300)]

    assert {len(job.files) for job in jobs} == {1, 2, 3, 4}
    assert all(1 <= job.ready_at <= 10 for job in jobs)
    answers = [asked(stand_in, f"/api/v3/fetch/{job.id}", 10.0) for job in jobs]
    assert {"proxy_links" in answer for answer in answers} == {True, False}


def test_a_picture_is_there_only_when_its_job_is_ready() -> None:
    """A promised link answers nothing before its time."""
    stand_in = model(min_seconds=3, max_seconds=3)
    job = stand_in.submit("sea", samples=1, now=0.0)

    assert stand_in.file(job.files[0], now=2.9) == (job, 0, 404)
    assert stand_in.file(job.files[0], now=3.0) == (job, 0, 200)
    assert stand_in.file("other.png", now=3.0) is None


@pytest.mark.parametrize(
    "options",
    [
        {"min_seconds": -1},
        {"min_seconds": 9, "max_seconds": 8},
        {"max_seconds": float("nan")},
        {"max_seconds": float("inf")},
        {"min_outputs": 0},
        {"max_outputs": 5},
        {"min_outputs": 3, "max_outputs": 2},
        {"key": ""},
        {"rps": -1},
        {"limit_style": "polite"},
        {"size": 4},
        {"failure_rate": 1.1},
        {"ids_after": -1},
        {"plan": "free"},
        {"scenarios": ("unheard-of",)},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    """With a sentence that a person can read."""
    with pytest.raises(ValueError, match=r" must | is one of "):
        SandboxOptions(**options)


@pytest.mark.parametrize(
    ("content_type", "raw", "content"),
    [
        ("application/json", b'{"key": "k"}', {"key": "k"}),
        ("Application/JSON; charset=utf-8", b"{}", {}),
        ("", b"{}", None),
        ("text/plain", b"{}", None),
        ("application/json", b"", None),
        ("application/json", b"[1]", None),
        ("application/json", b'"key"', None),
        ("application/json", b"{'key': 1}", None),
        ("application/json", b"\xff\xfe{", None),
        ("application/json", b"[" * 100_000, None),
    ],
)
def test_only_a_json_object_sent_as_json_is_a_body(content_type: str, raw: bytes, content: object) -> None:
    """Anything else is an invalid request, never a crash."""
    assert parse_body(content_type, raw) == content
