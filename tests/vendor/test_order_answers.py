"""What the answer to an order means: taken, refused, later, or lost. A wrong "not taken" is paid for twice."""
# ruff: noqa: E501  # a table has one line per case

import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vendor.recorded_submits import SUBMITS, Submit
from tests.vendor.test_replies import ANSWERS, ANY_JSON, CODES, HEADERS
from worker.core.identity import READY, REMOTE_ID, SYNTHETIC_ID
from worker.core.order_reply import (
    AnswerLost,
    OrderNotSent,
    OrderPostponed,
    OrderRefused,
    OrderReply,
    OrderTaken,
    QueueFull,
)
from worker.core.reply import AccountRefused, Link, RateLimited
from worker.vendor.fetch_url import VENDOR_HOSTS, AllowedApi, fetch_address
from worker.vendor.order_answers import read_order_answer
from worker.vendor.order_endpoint import order_target
from worker.vendor.phrases import PHRASES
from worker.vendor.replies import RULES

API = AllowedApi("https://modelslab.com/api/v6", VENDOR_HOSTS)
SITE = "https://modelslab.com/api/"
NOW = 1_700_000_000.0
PICTURE, VIDEO = "v6/images/text2img", "v6/video/text2video"
CHALLENGE = "<!DOCTYPE html><html><head><title>Just a moment...</title></head></html>"
NGINX = "<html><head><title>{}</title></head></html>"


def read(
    body: object,
    status: int = 200,
    endpoint: str = PICTURE,
    headers: Mapping[str, str] | None = None,
    words: Mapping[str, str] | None = None,
) -> OrderReply:
    raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    return read_order_answer(
        status, headers or {}, raw, order_target(endpoint, API), API, now=NOW, status_words=words or {}
    )


def describe(reply: OrderReply) -> str:
    """Return a reply in the notation of the tables."""
    match reply:
        case OrderTaken(remote_id, address):
            url = "-" if address.base.startswith(READY) else address.url.removeprefix(SITE)
            outputs = f" ready:{len(reply.outputs)}" if reply.outputs else ""
            return f"taken {remote_id.partition(':')[0]} at {url}{outputs}{' warning' if reply.warning else ''}"
        case OrderRefused(code):
            return f"refused {code}"
        case OrderPostponed(_, seconds):
            return f"postponed {seconds:g}"
        case QueueFull(_, seconds, limit):
            return f"full {seconds:g} limit:{limit}"
        case RateLimited(seconds):
            return f"limited {seconds:g}"
        case AccountRefused(reason):
            return f"account {reason}"
        case OrderNotSent():
            return "not_sent"
        case AnswerLost():
            return "lost"


class Case(NamedTuple):
    """One answer to an order, and what it means."""

    sentence: str
    means: str
    body: object
    status: int = 200
    endpoint: str = PICTURE


def error(message: object, **fields: object) -> dict[str, object]:
    return {"status": "error", "message": message, **fields}


def failed(message: str, **fields: object) -> dict[str, object]:
    return {"status": "failed", "message": message, "output": "", **fields}


def wait(**fields: object) -> dict[str, object]:
    return {"status": "processing", "eta": 9, "output": [], **fields}


def done(**fields: object) -> dict[str, object]:
    return {"status": "success", "output": ["https://h/a.png"], **fields}


# fmt: off
TAKEN = (
    Case("processing, with an id and no address, is fetched in the family of the endpoint", "taken 9 at v6/images/fetch/9", wait(id=9)),
    Case("processing, with its own address, is fetched there", "taken 9 at v3/dreambooth/fetch/9", wait(id=9, fetch_result=SITE + "v3/dreambooth/fetch/9"), 200, "v4/dreambooth"),
    Case("an empty address is no address", "taken 9 at v6/video/fetch/9", wait(id=9, fetch_result=""), 200, VIDEO),
    Case("queued, with a task id", "taken a35-88 at v1/enterprise/voice/fetch/a35-88", {"status": "queued", "taskId": "a35-88", "links": ["https://h/a.wav"]}, 200, "v1/enterprise/voice/sfx"),
    Case("ready at once", "taken 7 at v6/images/fetch/7 ready:1", done(id=7)),
    Case("ready at once without an id is never fetched", "taken sha256 at - ready:1", done()),
    Case("ready at once with a null id", "taken sha256 at - ready:1", done(id=None)),
    Case("an id and no outputs yet", "taken 7 at v6/images/fetch/7", done(id=7, output=[])),
    Case("a training", "taken F5 at v3/fine_tune_status/F5", {"status": "success", "messege": "deploying_gpu", "training_id": "F5"}, 200, "v3/lora_fine_tune"),
    Case("a workflow run", "taken 12345 at v1/workflows/w-1/runs/12345", {"status": "success", "execution_id": 12345, "workflow_id": "w-1"}, 202, "v1/workflows/w-1/run"),
    Case("a workflow run that names its state", "taken 5 at v1/workflows/w-1/runs/5", {"status": "success", "execution": {"id": 5, "status": "running"}}, 202, "v1/workflows/w-1/run"),
    Case("a chat in the queue", "taken c-1 at v6/llm/get_queued_response", wait(meta={"chat_id": "c-1"}), 200, "v6/llm/uncensored_chat"),
    Case("no id, but an address that has it", "taken 155 at v7/video-fusion/fetch/155", wait(fetch_result=SITE + "v7/video-fusion/fetch/155"), 200, "v7/video-fusion/lip-sync"),
    Case("an unknown status with an id will be polled", "taken 7 at v6/images/fetch/7", {"status": "surprise", "id": 7}),
    Case("no status, but an id", "taken 10 at v6/voice/fetch/10", {"generationTime": 1.5, "id": 10, "links": ["https://h/a.wav"]}, 200, "v6/voice/voice_cover"),
    Case("nothing but an id", "taken 7 at v6/images/fetch/7", {"id": 7}, 201),
    Case("HTTP 500 contradicts a job, but the id shows that it was taken", "taken 7 at v6/images/fetch/7", wait(id=7), 500),
    Case("HTTP 400 beside a job", "taken 7 at v6/images/fetch/7", wait(id=7), 400),
    Case("HTTP 429 beside a job", "taken 7 at v6/images/fetch/7", wait(id=7), 429),
    Case("a failure that asks to try again, of a job with an id, is polled", "taken 7 at v6/images/fetch/7", failed("Failed, Try Again", id=7)),
    Case("the same with HTTP 500", "taken 7 at v6/images/fetch/7", failed("Failed, Try Again", id=7), 500),
    Case("an error that says that the request is being processed, with an id", "taken 7 at v6/images/fetch/7", error("Your request is processing", id=7)),
    Case("the address names another id", "taken 8 at v6/images/fetch/8 warning", wait(id=8, fetch_result=SITE + "v6/images/fetch/7")),
    Case("the address is at another host", "taken 5 at v6/images/fetch/5 warning", wait(id=5, fetch_result="https://evil.example/api/v6/images/fetch/5")),
    Case("the address is at the vendor's test host, and has the only id", "taken 5 at v6/images/fetch/5 warning", wait(fetch_result="http://sdapi_backend.test/api/v6/images/fetch/5")),
    Case("the address has a query, and the only id", "taken 5 at v6/images/fetch/5 warning", wait(fetch_result=SITE + "v6/images/fetch/5?x=1")),
    Case("the address is no fetch path", "taken 5 at v6/images/fetch/5 warning", wait(id=5, fetch_result=SITE + "v1/enterprise/flux/clear_queue")),
    Case("the address is no text", "taken 5 at v6/images/fetch/5 warning", wait(id=5, fetch_result={"url": "x"})),
    Case("the address is refused, and the job is ready", "taken 5 at v6/images/fetch/5 ready:1 warning", done(id=5, fetch_result="https://evil.example/api/v6/images/fetch/5")),
    Case("the address is refused, and the job is ready without an id", "taken sha256 at - ready:1 warning", done(fetch_result=["x"])),
    Case("the address has an id that can't be one", "taken 5 at v6/images/fetch/5 warning", wait(id=5, fetch_result=SITE + "v6/images/fetch/_" + "a" * 200)),
    Case("the id breaks the rule, the address has a valid one", "taken 155 at v6/images/fetch/155 warning", wait(id="../7", fetch_result=SITE + "v6/images/fetch/155")),
    Case("the id is a list, and another field has a valid one", "taken 6 at v6/images/fetch/6 warning", wait(id=[5], request_id=6)),
    Case("the id is true, and both the address and the host are wrong", "taken 5 at v6/images/fetch/5 warning", wait(id=True, fetch_result="https://evil.example/api/v6/images/fetch/5")),
    Case("the id of a run is no id, another field has one", "taken 6 at v1/workflows/w-1/runs/6 warning", {"status": "success", "execution": {"id": {"x": 1}, "status": "running"}, "execution_id": 6}, 202, "v1/workflows/w-1/run"),
    Case("the id is a whole number with a point", "taken 7 at v6/images/fetch/7", wait(id=7.0)),
    Case("a hostile workflow id does not matter: the endpoint names the workflow", "taken 1 at v1/workflows/w-1/runs/1", {"status": "success", "execution_id": 1, "workflow_id": "../../x"}, 202, "v1/workflows/w-1/run"),
)
REFUSED = (
    Case("moderated", "refused moderated", error("NSFW content detected")),
    Case("moderated, with HTTP 400 and no status", "refused moderated", {"message": "Your prompt violates our content policy"}, 400),
    Case("moderated, as a failure with an id", "refused moderated", failed("Blocked by the safety filter", id=7)),
    Case("moderated, with HTTP 500 and a status", "refused moderated", error("NSFW content detected"), 500),
    Case("a model that does not exist", "refused unknown_model", error("Model not found: invalid_model_name"), 400),
    Case("a model id that does not exist", "refused unknown_model", error("Model id not found")),
    Case("a model id that a validator rejects", "refused unknown_model", error({"model_id": ["The selected model_id is invalid."]}), 422),
    Case("an invalid model, HTTP 404", "refused unknown_model", error("Invalid model"), 404),
    Case("a missing model is a bad request", "refused bad_request", error("The model_id field is required.")),
    Case("a wrong parameter of a model is a bad request", "refused bad_request", error("The model parameter width is invalid")),
    Case("a quoted prompt says nothing about the queue", "refused moderated", error("Prompt 'maximum 5 queued requests' contains prohibited words")),
    Case("a validator's object", "refused bad_request", error({"prompt": ["The prompt field is required."]})),
    Case("a validator's message", "refused bad_request", error("The prompt field is required.")),
    Case("a validator's message without a status", "refused bad_request", {"message": "The prompt field is required.", "errors": {"prompt": ["required"]}}, 422),
    Case("invalid dimensions", "refused bad_request", failed("Invalid input dimensions")),
    Case("a picture that can't be loaded", "refused bad_request", error("Unable to fetch image from provided URL")),
    Case("a request that the API can't read", "refused bad_request", error("Invalid API Request")),
    Case("HTTP 400 with any object", "refused bad_request", {"foo": "bar"}, 400),
    Case("HTTP 422 with an unknown message", "refused bad_request", error("Something is wrong"), 422),
    Case("HTTP 400 with plain text", "refused bad_request", "Bad Request", 400),
    Case("a request that is too large, refused with a page", "refused bad_request", NGINX.format("413 Request Entity Too Large"), 413),
    Case("a path that does not exist", "refused bad_request", {"message": "The route api/v6/images/text3img could not be found."}, 404),
    Case("a path that does not exist, in short", "refused bad_request", {"detail": "Not Found"}, 404),
    Case("a method that is not allowed", "refused bad_request", {"message": "The POST method is not supported for this route."}, 405),
    Case("a vague error", "refused refused", error("Something went wrong")),
    Case("an error without a message", "refused refused", {"status": "error"}),
    Case("an error alone", "refused refused", {"error": "Something went wrong"}),
    Case("a failure without a reason", "refused refused", {"status": "failed", "id": ""}),
    Case("a failure of a job with an id", "refused refused", failed("Processing failed", id=7)),
    Case("something that is not found", "refused refused", failed("Request not found", id="")),
    Case("HTTP 418 with any object", "refused refused", {"detail": "Not today"}, 418),
    Case("a failed run", "refused bad_request", {"status": "success", "execution": {"id": 5, "status": "failed", "error": "Invalid prompt"}}, 200, "v1/workflows/w-1/run"),
    Case("a finished chat is no job, and its id can't be fetched", "refused refused", {"id": "chat-abc123", "object": "chat.completion", "choices": []}, 200, "v6/llm/chat"),
)
LATER = (
    Case("the queue of a plan", "full 30 limit:5", error("Rate limit exceeded. Maximum 5 queued requests allowed.", retry_after=30), 429),
    Case("the queue of a plan, with HTTP 200 and another time", "full 12 limit:15", error("Rate limit exceeded. Maximum 15 queued requests allowed.", retry_after=12)),
    Case("the queue of a plan, with HTTP 500", "full 30 limit:10", error("Maximum 10 queued requests allowed"), 500),
    Case("the queue of a plan that one can upgrade", "full 30 limit:5", error("Your plan limit is reached: 5 concurrent requests. Upgrade your plan")),
    Case("the queue names what waits and what may", "full 30 limit:5", error("You already have 6 queued requests (maximum 5)")),
    Case("the queue is full", "full 30 limit:None", error("Queue is full, try again later")),
    Case("the queue is full, as a failure", "full 30 limit:None", failed("Queue is full")),
    Case("the queue is full, without a status", "full 30 limit:None", {"message": "Queue is full, try again later"}, 400),
    Case("the queue is full, beside a vague message", "full 30 limit:None", {"status": "error", "message": "Error", "error": "Queue is full"}),
    Case("the size of the queue", "full 30 limit:10", error("You have reached the queue size limit (10)")),
    Case("too many at once", "full 60 limit:None", error("Too many concurrent requests, please wait 60 seconds")),
    Case("pending requests", "full 30 limit:5", error("You have 5 pending requests")),
    Case("the spam filter", "limited 30", error("Rate limit exceeded", tips="you are sending same request multiple times, spam filter is enabled, please wait for 30 seconds and try again")),
    Case("too many attempts", "limited 30", {"message": "Too Many Attempts."}, 429),
    Case("HTTP 429 with plain text", "limited 30", "slow down", 429),
    Case("HTTP 429 with an object that waits, and no id", "limited 30", wait(), 429),
    Case("failed, try again, without an id", "postponed 10", failed("Failed, Try Again", id="")),
    Case("an error that asks to try again", "postponed 10", error("Please try again")),
    Case("a busy server", "postponed 10", error("The server is busy")),
    Case("a busy server that names a time", "postponed 45", error("The server is busy, try again in 45 seconds")),
    Case("not available", "postponed 10", error("Service temporarily unavailable. Please try again later."), 503),
    Case("not available, with a time", "postponed 20", error("Service temporarily unavailable.", retry_after=20), 503),
    Case("an internal error that asks to try again", "postponed 10", error("Internal server error. Please try again."), 500),
    Case("a vague error of the server", "postponed 10", error("Something went wrong"), 500),
    Case("a busy server, HTTP 400 without a status", "postponed 10", {"message": "Server is busy"}, 400),
)
ACCOUNT = (
    Case("the key", "account key", error("Invalid Api Key", tip="1. Make sure you are passing Content-Type")),
    Case("the key, with HTTP 401", "account key", {"message": "Unauthenticated."}, 401),
    Case("the key, in plain text", "account key", "Unauthorized", 401),
    Case("the credits", "account credits", error("Insufficient credits. Please add more credits to continue."), 402),
    Case("the credits, as a failure without an id", "account credits", failed("Insufficient credits", id="")),
    Case("the credits, with HTTP 500", "account credits", error("Insufficient credits"), 500),
    Case("the credits, as an error alone", "account credits", {"error": "Insufficient credits"}, 400),
    Case("the plan", "account plan", error("This feature requires a premium subscription"), 403),
    Case("the month", "account plan", error("Your monthly limit exceeded, upgrade subscription now on stablediffusionapi.com")),
    Case("the month, with HTTP 429", "account plan", error("Your monthly limit exceeded"), 429),
)
NOT_SENT = (
    Case("a redirect", "not_sent", "", 301),
    Case("a redirect with an answer that is not read", "not_sent", wait(id=7), 307),
    Case("a challenge page", "not_sent", CHALLENGE, 403),
    Case("a page of too many requests", "not_sent", CHALLENGE, 429),
    Case("a page that is not the API", "not_sent", NGINX.format("404 Not Found"), 404),
    Case("a text that is not the API", "not_sent", "404 page not found", 404),
    Case("a refusal without a body", "not_sent", "", 403),
    Case("a bad request at a proxy", "not_sent", NGINX.format("400 Bad Request"), 400),
    Case("a login page", "not_sent", NGINX.format("401"), 401),
    Case("an error of the wall", "not_sent", {"cloudflare_error": True, "status": 403, "title": "Error 1020: Access denied"}, 403),
    Case("a rate limit of the wall", "not_sent", {"type": "https://developers.cloudflare.com/x", "status": 429, "detail": "slow"}, 429),
)
LOST = (
    Case("a server error without a status", "lost", {"message": "Server Error"}, 500),
    Case("the same with HTTP 200", "lost", {"message": "Server Error"}),
    Case("a server error with the code as status", "lost", {"status": 500, "error": "Internal Server Error"}, 500),
    Case("the same with HTTP 200", "lost", {"status": 500, "error": "Internal Server Error"}),
    Case("a server error that is only an error", "lost", {"error": "Service temporarily unavailable"}, 503),
    Case("a limit without a status, with HTTP 503", "lost", {"message": "Queue is full"}, 503),
    Case("a page of a server", "lost", NGINX.format("503 Service Unavailable"), 503),
    Case("a text of a proxy", "lost", "upstream connect error or disconnect/reset before headers", 503),
    *(Case(f"HTTP {code}, whatever the body", "lost", error("Queue is full"), code) for code in (502, 504, *range(520, 528))),
    Case("HTTP 502 with a job", "lost", wait(id=7), 502),
    Case("an error of the wall about the server", "lost", {"cloudflare_error": True, "status": 524}, 524),
    Case("an empty answer", "lost", ""),
    Case("an empty answer without content", "lost", "", 204),
    Case("a page with HTTP 200", "lost", CHALLENGE),
    Case("an answer that breaks off", "lost", '{"status": "processing", "id": 7'),
    Case("a refusal that breaks off", "lost", '{"status": "error", "mess', 400),
    Case("a list", "lost", "[1]"),
    Case("an unknown status and no id", "lost", {"status": "surprise"}),
    Case("the state of a server", "lost", {"status": "ok", "model_count": 0}),
    Case("a success without an id and outputs", "lost", {"status": "success", "message": "done"}),
    Case("the same with HTTP 400", "lost", {"status": "success"}, 400),
    Case("waiting without an id", "lost", wait()),
    Case("waiting, with promised links and no id", "lost", wait(future_links=["https://h/a.png"])),
    Case("an id that can't be one", "lost", wait(id="../7")),
    Case("an id of nothing", "lost", wait(id=0)),
    Case("words to wait, and no id", "lost", error("Your last request is still processing")),
    Case("a time-out behind the API", "lost", error("Request timed out, try again")),
    Case("a gateway behind the API", "lost", error("Gateway timeout"), 500),
    Case("a time-out of the request", "lost", NGINX.format("408 Request Time-out"), 408),
    Case("a conflict", "lost", {"message": "Conflict"}, 409),
    Case("a remote procedure", "lost", {"jsonrpc": "2.0", "id": 1, "result": {}}),
    Case("an envelope that is no job", "lost", {"data": {"balance": 75.5}, "error": None}),
    Case("an HTTP status that does not exist", "lost", "", 999),
)
# fmt: on
CASES = (*TAKEN, *REFUSED, *LATER, *ACCOUNT, *NOT_SENT, *LOST)


@pytest.mark.parametrize("case", CASES, ids=[f"{case.means.split()[0]}: {case.sentence}" for case in CASES])
def test_the_answer_to_an_order_means(case: Case) -> None:
    reply = read(case.body, case.status, case.endpoint)

    assert describe(reply) == case.means, reply


@pytest.mark.parametrize("row", SUBMITS, ids=[row.name for row in SUBMITS])
def test_no_recorded_answer_of_a_taken_order_is_read_as_not_taken(row: Submit) -> None:
    reply = read(row.answer, row.status, row.endpoint or PICTURE)

    if row.means.startswith(("tracked", "ready")):
        assert isinstance(reply, OrderTaken), reply
        assert reply.remote_id.partition(":")[0] == row.means.split()[1]
    elif row.means == "refused":
        assert not isinstance(reply, OrderTaken), reply


def test_a_taken_order_has_everything_that_the_answer_says_about_its_job() -> None:
    answer = wait(id=7, eta=20.5, future_links=["https://h/a.mp4"], meta={"model_id": "ultra"})

    reply = read(answer, endpoint=VIDEO)

    assert isinstance(reply, OrderTaken)
    assert (reply.kind, reply.eta, reply.promised) == ("video/ultra", 20.5, ("https://h/a.mp4",))
    assert (reply.outputs, reply.left_out, reply.default_address, reply.warning) == ((), 0, False, None)
    assert reply.address == fetch_address(SITE + "v6/video/fetch/7", "7", API)


def test_an_order_that_is_ready_at_once_has_its_outputs_and_the_kind_of_its_family() -> None:
    reply = read(done(proxy_links=["https://cdn/a.png"]), endpoint="v7/images/text-to-image")

    assert isinstance(reply, OrderTaken)
    assert (reply.kind, reply.outputs) == ("images", (Link("https://h/a.png", ("https://cdn/a.png",)),))


def test_a_custom_status_word_decides() -> None:
    answer = {"status": "denied", "message": "No"}

    assert describe(read(answer)) == "lost"
    assert describe(read(answer, words={"denied": "error"})) == "refused refused"
    assert (
        describe(read({**done(id=7), "status": "fertig"}, words={"fertig": "success"}))
        == "taken 7 at v6/images/fetch/7 ready:1"
    )


def test_the_header_says_when_to_send_the_order_again() -> None:
    assert describe(read(error("The server is busy"), headers={"Retry-After": "77"})) == "postponed 77"
    assert describe(read(error("Queue is full"), 429, headers={"retry-after": "7"})) == "full 7 limit:None"


@pytest.mark.parametrize(
    ("body", "status"), [("\x00 \ud800" * 400, 200), (NGINX.format("x" * 900), 503), ("x" * 900, 403)]
)
def test_an_answer_that_is_not_read_is_quoted_in_short(body: str, status: int) -> None:
    reply = read(body.encode("utf-8", "replace"), status)

    assert isinstance(reply, (AnswerLost, OrderNotSent))
    assert str(status) in reply.message
    assert len(reply.message) <= 300
    assert reply.message.isprintable()


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
@pytest.mark.parametrize("endpoint", [PICTURE, "v3/lora_fine_tune", "v1/workflows/w-1/run", "v6/llm/chat"])
def test_the_example_of_every_rule_is_read(rule: Any, endpoint: str) -> None:
    assert describe(read(rule.example.body, rule.example.http_status, endpoint))


@pytest.mark.parametrize("phrase", PHRASES, ids=[phrase.example for phrase in PHRASES])
def test_every_known_error_message_is_a_refusal_of_some_kind(phrase: Any) -> None:
    reply = read(error(phrase.example))

    assert isinstance(reply, AnswerLost) == (phrase.meaning == "waiting" or phrase.example == "Gateway timeout"), reply
    assert not isinstance(reply, (OrderTaken, OrderNotSent))


FIELDS = (
    *("status", "id", "taskId", "execution", "execution_id", "training_id", "meta", "error", "errors", "message"),
    *("fetch_result", "status_url", "output", "links", "future_links", "retry_after", "code", "success", "object"),
)
ANY_FIELDS = st.dictionaries(
    st.sampled_from(FIELDS),
    ANY_JSON
    | st.sampled_from(["success", "processing", "error", "failed", 7, "7", True, False, 429, 500, "https://h/a.png"])
    | st.sampled_from([SITE + "v6/images/fetch/7", "Queue is full", "Server Error", "Invalid model", {"id": 7}]),
).map(lambda fields: json.dumps(fields).encode())
BODIES = st.binary(max_size=200) | ANSWERS | ANY_FIELDS
ENDPOINTS = st.sampled_from(
    [PICTURE, VIDEO, "v3/lora_fine_tune", "v1/workflows/w-1/run", "v6/llm/chat", "v4/dreambooth"]
)


@settings(max_examples=150, deadline=None)
@given(CODES, HEADERS, BODIES, ENDPOINTS)
def test_any_answer_gives_a_reply_that_can_be_used(
    status: int, headers: dict[str, str], body: bytes, endpoint: str
) -> None:
    reply = read(body, status, endpoint, headers)

    assert describe(reply)
    if isinstance(reply, OrderTaken):
        assert REMOTE_ID.fullmatch(reply.remote_id) or SYNTHETIC_ID.fullmatch(reply.remote_id)
        assert reply.address.host in API.hosts
        assert reply.outputs or not SYNTHETIC_ID.fullmatch(reply.remote_id)
    if isinstance(reply, (OrderPostponed, QueueFull)):
        assert 1 <= reply.seconds <= 900
    if isinstance(reply, QueueFull):
        assert reply.limit is None or reply.limit > 0


@settings(max_examples=120, deadline=None)
@given(st.sampled_from([500, 501, 503, 505, 507, 529, 530, 599]), BODIES, ENDPOINTS)
def test_a_server_error_without_a_status_is_never_read_as_not_taken(status: int, body: bytes, endpoint: str) -> None:
    reply = read(body, status, endpoint)

    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    word = fields.get("status") if isinstance(fields, dict) else None
    if not isinstance(word, str) or word.strip().isdecimal() or not word.strip():
        assert isinstance(reply, (AnswerLost, OrderTaken)), reply


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([502, 504, *range(520, 528)]), BODIES)
def test_an_answer_of_a_gateway_is_always_lost(status: int, body: bytes) -> None:
    assert isinstance(read(body, status), AnswerLost)


def test_a_large_answer_is_read_in_little_time() -> None:
    body = json.dumps(error("maximum queued requests limit of the plan is " * 20_000)).encode()
    begin = time.process_time()

    read(body)

    assert time.process_time() - begin < 1.0
