"""The arguments that `track` accepts, and those that it refuses."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vendor.test_replies import ANY_JSON
from worker.core.identity import REMOTE_ID, SYNTHETIC_ID, can_be_asked
from worker.core.numbers import positive_number
from worker.core.reply import Link
from worker.errors import NotTrackable, WorkerError
from worker.vendor.families import CHAT, TRAINING
from worker.vendor.fetch_url import AllowedApi
from worker.vendor.submissions import Submission, planned_job, submission

A, B = "https://h/a.png", "https://h/b.png"
P = "https://cdn2/a.png"
FETCH = "https://modelslab.com/api/v6/video/fetch/7"
NOTHING: list[object] = [False, [], {}, "", " ", None, 0]
NO_ADDRESS: list[object] = [5, True, [FETCH], {"url": FETCH}]
RUNS = "/api/v1/workflows/w-1/runs"
TRAINED = Submission("F5", model="F5", implied_path=TRAINING)
API = AllowedApi("https://modelslab.com/api/v6", frozenset({"modelslab.com"}))
LONGEST = "a" * 128


@pytest.mark.parametrize(
    ("remote", "remote_id"),
    [
        ("12202888", "12202888"),
        (12202888, "12202888"),
        (155_918_900, "155918900"),
        ("abc123-def456", "abc123-def456"),
        ("F5jvdzGnYi", "F5jvdzGnYi"),
        ("a_b", "a_b"),
        (" 7\n", "7"),
        (LONGEST, LONGEST),
        (int("9" * 128), "9" * 128),
    ],
)
def test_a_bare_id_is_a_submission(remote: object, remote_id: str) -> None:
    assert submission(remote) == Submission(remote_id)


@pytest.mark.parametrize(
    "remote",
    [
        "",
        " ",
        "None",
        "null",
        "-1",
        -1,
        "_a",
        LONGEST + "a",
        10**128,
        pytest.param(10**5_000, id="a number that Python refuses to print"),
        "../../v1/enterprise/flux/clear_queue",
        "7/../8",
        "7%2f8",
        "7?x=1",
        "7#",
        "7.",
        "7 8",
        "7\x00",
        "7\n8",
        "\u0667",  # a digit that is not ASCII
        "é",
        "sha256:" + "0" * 32,  # ids of this form are made only by the worker
        True,
        False,
        None,
        7.0,
        float("nan"),
        b"7",
        [7],
        ["12202888"],
        (7,),
        object(),
        "[7]",
        '"7"',
        "{",
        "{7}",
        '{"id": 7',
        pytest.param('{"id": ' + "9" * 5_000 + "}", id="JSON with such a number"),
        pytest.param('{"a":' * 100_000, id="endlessly nested JSON"),
    ],
)
def test_an_invalid_id_raises_not_trackable(remote: object) -> None:
    with pytest.raises(NotTrackable) as refused:
        submission(remote)

    assert isinstance(refused.value, WorkerError)
    assert "\n" not in str(refused.value)


# one line per case: the submit answer and the expected submission
ANSWERS: list[tuple[dict[str, object], Submission]] = [
    ({"id": 7}, Submission("7")),
    ({"id": "7"}, Submission("7")),
    ({"status": "processing", "id": 7, "eta": 20.9, "fetch_result": FETCH}, Submission("7", FETCH, 20.9)),
    ({"status": "processing", "id": 7, "fetch_result": ""}, Submission("7")),
    ({"status": "processing", "id": 7, "fetch_result": None}, Submission("7")),
    ({"status": "processing", "id": 7, "fetch_result": f" {FETCH} "}, Submission("7", FETCH)),
    ({"status": "processing", "id": 7, "eta": "12"}, Submission("7", eta=12.0)),
    ({"status": "processing", "id": 7, "eta": -1}, Submission("7")),
    ({"status": "processing", "id": 7, "eta": float("nan")}, Submission("7")),
    ({"status": "processing", "id": 7, "eta": True}, Submission("7")),
    ({"status": "processing", "id": 7, "eta": {}}, Submission("7")),
    ({"status": "processing", "id": 7, "output": "", "future_links": [A]}, Submission("7", promised=(A,))),
    ({"status": "processing", "id": 7, "output": [A]}, Submission("7")),  # the status says that it is not ready
    ({"id": 7, "output": [A]}, Submission("7")),
    ({"status": "surprise", "id": 7}, Submission("7")),
    ({"status": "success", "id": 7, "output": [A, B]}, Submission("7", outputs=(Link(A), Link(B)))),
    ({"status": " SUCCESS", "id": 7, "output": A}, Submission("7", outputs=(Link(A),))),
    ({"status": "success", "id": 7, "output": [A], "proxy_links": [P]}, Submission("7", outputs=(Link(A, (P,)),))),
    ({"status": "success", "id": 7, "links": [A]}, Submission("7", outputs=(Link(A),))),
    ({"status": "success", "id": 7, "output": []}, Submission("7")),
    (
        {"status": "success", "messege": "deploying_gpu", "training_id": "F5jvdz"},
        Submission("F5jvdz", implied_path=TRAINING),
    ),
    ({"status": "queued", "taskId": "a352-b", "links": [A]}, Submission("a352-b", promised=(A,))),
    ({"status": "processing", "id": None, "request_id": 8}, Submission("8")),
    ({"id": 7, "model_id": "midjourney"}, Submission("7", model="midjourney")),
    ({"id": 7, "meta": {"model_id": " sdxl "}}, Submission("7", model="sdxl")),
    ({"id": 7, "meta": {"model_id": "x" * 90}}, Submission("7", model="x" * 40)),
    ({"id": 7, "meta": {"model_id": "\x00\ud800"}}, Submission("7")),
    ({"id": 7, "meta": {"model_id": 5}}, Submission("7")),
    ({"id": 7, "meta": ["model_id"]}, Submission("7")),
    *(
        ({"status": "processing", "id": 7, name: value}, Submission("7"))
        for name in ("fetch_result", "status_url", "fetch_url", "fetchResult")
        for value in NOTHING
    ),
    *(
        ({"status": "success", "id": 7, "output": [A], "status_url": value}, Submission("7", outputs=(Link(A),)))
        for value in NO_ADDRESS
    ),
    *(
        ({"status": "processing", "id": none, "chat_id": "c-1"}, Submission("c-1", implied_path=CHAT))
        for none in NOTHING
    ),
    *(({"status": "success", "id": none, "training_status": "x", "model_id": "F5"}, TRAINED) for none in NOTHING),
    ({"execution": {"id": 8}, "workflow_id": "w-1"}, Submission("8", implied_path=RUNS, is_run=True)),
    ({"execution": {"id": 8, "workflow_id": "w-1"}}, Submission("8", implied_path=RUNS, is_run=True)),
    ({"execution_id": 8}, Submission("8", is_run=True)),
    ({"id": 7, "message": "rate limit", "meta": {"prompt": "failed"}}, Submission("7")),
]


@pytest.mark.parametrize(("answer", "expected"), ANSWERS)
def test_a_submit_answer_is_read(answer: dict[str, object], expected: Submission) -> None:
    text = json.dumps(answer)

    assert submission(answer) == expected
    assert submission(text) == expected
    assert submission(f"\ufeff\r\n {text}\n") == expected


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"status": "error", "message": "Invalid Api Key", "id": 7}, "Invalid Api Key"),
        ({"status": "Error", "messege": {"prompt": ["required"]}}, "required"),
        ({"status": "failed", "id": 7, "output": [A]}, "failed"),
        ({"status": "error"}, "without a message"),
        ({}, "neither an id"),
        ({"message": "Server Error"}, "Server Error"),
        ({"status": "processing"}, "neither an id"),
        ({"status": "processing", "output": [A]}, "neither an id"),
        ({"status": "success", "output": []}, "neither an id"),
        ({"status": "success", "id": "", "output": ""}, "neither an id"),
        ({"status": "success", "future_links": [A]}, "neither an id"),
        ({"id": ""}, "neither an id"),
        ({"id": None}, "neither an id"),
        ({"id": 7.5}, "not float"),
        ({"id": True}, "not bool"),
        ({"id": [7]}, "not list"),
        ({"id": "../7"}, "can't be a remote id"),
        ({"id": 7, "fetch_result": 5}, "fetch_result"),
        ({"id": 7, "status_url": 5}, "status_url"),
        ({"status": "success", "id": 7, "output": [A], "fetch_result": 5}, "fetch_result"),
        ({"id": "chat-1", "choices": []}, "chat API"),
        ({"id": "chat-1", "choices": [{"message": {"content": "x"}}]}, "chat API"),
        ({"id": 7, "fetch_result": [FETCH]}, "fetch_result"),
    ],
)
def test_an_answer_without_a_job_is_refused_with_a_reason(answer: dict[str, object], says: str) -> None:
    with pytest.raises(NotTrackable, match=re.escape(says)):
        submission(answer)


def test_a_success_without_an_id_gets_an_id_from_its_outputs() -> None:
    """Tracking it twice must give the same job, so the id is made from the outputs in their order."""
    first = submission({"status": "success", "output": [A, B]})
    again = submission({"status": "success", "id": None, "output": [A, B], "meta": {}})
    reordered = submission({"status": "success", "output": [B, A]})

    assert SYNTHETIC_ID.fullmatch(first.remote_id)
    assert first == again
    assert not can_be_asked("https://h/api/v3/fetch", first.remote_id)
    assert reordered.remote_id != first.remote_id


@pytest.mark.parametrize("value", [0, -0.0, -1, "", "x", None, True, [], float("inf"), "1e999", 10**400, "nan"])
def test_an_eta_that_is_not_a_positive_number_is_ignored(value: object) -> None:
    assert positive_number(value) is None


@settings(max_examples=100, deadline=None)
@given(
    ANY_JSON
    | st.dictionaries(
        st.sampled_from(["status", "id", "eta", "fetch_result", "output", "training_id", "proxy_links", "meta"]),
        ANY_JSON,
    )
)
def test_any_value_is_a_submission_with_a_valid_id_or_refused(remote: object) -> None:
    try:
        submitted = submission(remote)
    except NotTrackable:
        return

    assert REMOTE_ID.fullmatch(submitted.remote_id) or (
        SYNTHETIC_ID.fullmatch(submitted.remote_id) and submitted.outputs
    )
    assert submitted.eta is None or 0 < submitted.eta < float("inf")
    assert can_be_asked("https://h/api/v3/fetch", submitted.remote_id) == bool(REMOTE_ID.fullmatch(submitted.remote_id))


@pytest.mark.parametrize("url", ["https://evil.example/api/v6/video/fetch/7", "https://h/status/7", "soon"])
def test_a_refused_fetch_url_does_not_matter_if_the_outputs_are_ready(url: str) -> None:
    ready = {"status": "success", "id": 7, "output": [A]}

    for name in ("status_url", "fetch_url", "fetchResult"):
        assert planned_job({**ready, name: url}, API) == planned_job(ready, API)
        with pytest.raises(NotTrackable):
            planned_job({"status": "processing", "id": 7, name: url}, API)
    with pytest.raises(NotTrackable):
        planned_job({**ready, "fetch_result": url}, API)


def test_the_model_id_of_a_training_order_is_its_id() -> None:
    answer = {"status": "success", "message": "deploying_gpu", "model_id": "F5"}

    job = planned_job(answer, API, endpoint="v3/lora_fine_tune")

    assert job.address.url == "https://modelslab.com/api/v3/fine_tune_status/F5"
    with pytest.raises(NotTrackable, match="neither an id"):
        planned_job(answer, API, endpoint="v6/images/text2img")


@pytest.mark.parametrize("answer", [{"execution": {"id": 8}}, {"status": "success", "execution_id": 8}])
def test_a_workflow_run_without_its_workflow_needs_the_endpoint(answer: dict[str, object]) -> None:
    with pytest.raises(NotTrackable, match="endpoint"):
        planned_job(answer, API)

    job = planned_job(answer, API, endpoint="v1/workflows/w-1/run")
    assert job.address.url == f"https://modelslab.com{RUNS}/8"
    assert planned_job({**answer, "workflow_id": "w-1"}, API).address == job.address
    assert planned_job({**answer, "status_url": job.address.url}, API).address == job.address
