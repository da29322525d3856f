"""The model of the API: each answer has the form that clients see, and the seed decides everything."""

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


def ask(model: Behaviour, path: str, now: float, **body: object) -> dict[str, Any]:
    """Return the JSON of the answer to a request with the right key."""
    answer = model.answer(path, {**KEYED, **body}, now=now, origin=ORIGIN)
    content = json.loads(answer.body)
    assert isinstance(content, dict)
    return content


def model(**options: Any) -> Behaviour:
    return Behaviour(SandboxOptions(**options))


def test_an_order_that_takes_time_is_answered_with_an_id_and_where_to_fetch_it() -> None:
    """The answer has an id, an estimate, a fetch URL and links that do not work yet."""
    answer = ask(model(min_seconds=5, max_seconds=5), "/api/v3/text2img", 100.0, prompt="sea", samples="2")

    assert answer["status"] == "processing"
    assert (answer["id"], answer["output"]) == (12202888, [])
    assert answer["fetch_result"] == f"{ORIGIN}/api/v3/fetch/12202888"
    assert isinstance(answer["eta"], float)
    assert 2 < answer["eta"] < 9
    assert len(answer["future_links"]) == 2
    assert "messege" in answer
    assert (answer["meta"]["prompt"], answer["meta"]["n_samples"]) == ("sea", 2)


def test_the_answer_to_an_order_may_have_no_estimate() -> None:
    """Some families of the API give none."""
    assert "eta" not in ask(model(eta=False), "/api/v3/text2img", 0.0, prompt="sea")


def test_an_order_that_is_ready_at_once_is_answered_with_success() -> None:
    """Such a job is never polled."""
    answer = ask(model(min_seconds=0, max_seconds=0), "/api/v3/text2img", 0.0, prompt="sea", samples=3)

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
def test_each_family_is_fetched_where_the_answer_to_its_order_says(
    submit: str, fetch_result: str, fetch: str, in_body: bool, label: str
) -> None:
    """An early fetch answer has neither id nor estimate, and empty text as output; a later one has the links."""
    stand_in = model(min_seconds=5, max_seconds=5)
    body = {"request_id": "12202888"} if in_body else {}

    submitted = ask(stand_in, submit, 0.0, prompt="sea", samples=1)
    early = ask(stand_in, fetch, 4.9, **body)
    ready = ask(stand_in, fetch, 5.0, **body)

    assert submitted["fetch_result"] == ORIGIN + fetch_result
    assert early == {"status": "processing", label: "try again later.", "output": "", "tip": early["tip"]}
    assert (ready["status"], ready["id"]) == ("success", 12202888)
    assert ready["output"] == submitted["future_links"]


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
def test_an_unknown_id_is_answered_as_failed_in_http_200(path: str, body: Mapping[str, object]) -> None:
    """Only the message distinguishes it from a failed job."""
    stand_in = model()
    ask(stand_in, "/api/v3/text2img", 0.0, prompt="sea")

    answer = ask(stand_in, path, 1.0, **body)

    assert (answer["status"], answer["id"], answer["output"]) == ("failed", "", "")
    assert answer["message"] == "Request not found"


def test_a_failing_job_only_says_so_when_it_is_ready() -> None:
    """Failure takes as long as success."""
    stand_in = model(min_seconds=2, max_seconds=2, failure_rate=1)
    ask(stand_in, "/api/v3/text2img", 0.0, prompt="sea")

    assert ask(stand_in, "/api/v3/fetch/12202888", 1.0)["status"] == "processing"
    assert ask(stand_in, "/api/v3/fetch/12202888", 2.0) == {
        "status": "failed",
        "id": "",
        "message": "Processing failed: Invalid input dimensions",
        "output": "",
    }


@pytest.mark.parametrize("key", ["wrong", "", None, 5, ["sandbox-key"]])
def test_any_other_key_is_refused_in_http_200(key: object) -> None:
    """The API reports errors with status 200."""
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
def test_an_invalid_field_is_named_in_an_object(body: Mapping[str, object], field: str) -> None:
    """The message about a refused field is an object, not a text. No job is created."""
    stand_in = model()

    answer = ask(stand_in, "/api/v3/text2img", 0.0, **body)

    assert answer["status"] == "error"
    assert list(answer["message"]) == [field]
    assert stand_in.latest(1) == []


@pytest.mark.parametrize(("style", "status"), [("http429", 429), ("http200", 200)])
def test_the_rate_limit_allows_the_requests_of_one_second_and_then_says_when_to_retry(style: str, status: int) -> None:
    """With a limit of 2, the third request is refused, and half a second later one is allowed."""
    stand_in = model(rps=2, limit_style=style)
    answers = [
        stand_in.answer("/api/v3/fetch/1", KEYED, now=now, origin=ORIGIN) for now in (10.0, 10.0, 10.0, 10.5, 10.5)
    ]

    messages = [json.loads(answer.body)["message"] for answer in answers]
    assert [message.startswith("Rate limit exceeded") for message in messages] == [False, False, True, False, True]
    assert answers[2].status == status
    assert json.loads(answers[2].body)["retry_after"] == 1


def test_the_system_load_is_reported() -> None:
    """The answer has the jobs in the queue, and the seconds until the last of them is ready."""
    stand_in = model(min_seconds=4, max_seconds=4)
    ask(stand_in, "/api/v3/text2img", 0.0, prompt="sea")
    ask(stand_in, "/api/v3/text2img", 1.0, prompt="sea")

    assert ask(stand_in, "/api/v3/system_load", 2.0) == {"queue_num": 2, "queue_time": 3, "status": "ok"}
    assert ask(stand_in, "/api/v3/system_load", 5.0) == {"queue_num": 0, "queue_time": 0, "status": "ok"}


def test_the_seed_decides_durations_counts_and_names() -> None:
    """Two stand-ins with one seed agree on everything; one with another seed differs."""

    def jobs(seed: int) -> list[object]:
        stand_in = model(seed=seed, failure_rate=0.3)
        return [stand_in.submit(f"p{n}", now=float(n)) for n in range(40)]

    assert jobs(1) == jobs(1)
    assert jobs(1) != jobs(2)


def test_durations_and_counts_are_within_their_limits_and_some_jobs_have_proxy_links() -> None:
    """A few hundred jobs have every count, and answers with and without proxy links."""
    stand_in = model(min_seconds=1, max_seconds=10)
    jobs = [stand_in.submit("p", now=0.0) for _ in range(300)]

    assert {len(job.files) for job in jobs} == {1, 2, 3, 4}
    assert all(1 <= job.ready_at <= 10 for job in jobs)
    answers = [ask(stand_in, f"/api/v3/fetch/{job.id}", 10.0) for job in jobs]
    assert {"proxy_links" in answer for answer in answers} == {True, False}


def test_a_picture_is_available_as_soon_as_its_job_is_ready() -> None:
    """Until then a promised link answers 404."""
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
def test_invalid_options_are_refused(options: dict[str, Any]) -> None:
    """The error has a readable message."""
    with pytest.raises(ValueError, match=r" must "):
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
def test_only_a_json_object_sent_as_json_is_accepted_as_a_body(content_type: str, raw: bytes, content: object) -> None:
    """Anything else is an invalid request and never an exception."""
    assert parse_body(content_type, raw) == content
