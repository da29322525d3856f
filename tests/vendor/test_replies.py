"""The meaning of answers: real ones, every HTTP code with every kind of body, and random ones."""
# ruff: noqa: E501  # a table has one line per case

import json
import tracemalloc
from dataclasses import astuple
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.core.reply import (
    AccountRefused,
    AnotherJob,
    ApiDown,
    ApiError,
    Empty,
    Failed,
    Link,
    Processing,
    RateLimited,
    Ready,
    Reply,
    UnknownId,
    Unread,
)
from worker.vendor import replies
from worker.vendor.replies import Question, parse

ID = "12202888"
NO_SUCH_PATH = replies.NO_SUCH_PATH
NOW = 1_700_000_000.0
A, B = "https://pub-8b49.r2.dev/generations/a-0.png", "https://pub-8b49.r2.dev/generations/a-1.png"
CDN = "https://cdn2.stablediffusionapi.com/generations/a-0.png"
WAV = "https://pub-3626.r2.dev/generations/8b8f.wav"
TIP = "Get 20x faster image generation using enterprise plan. Click here : https://modelslab.com/enterprise"
KEY_TIP = "1. Make sure you are passing Content-Type: application/json in header. 4. Make sure you have valid API key."
SPAM = "you are sending same request multiple times, spam filter is enabled, please wait for 30 seconds and try again"
QUEUE_LIMIT = "Rate limit exceeded. Maximum 5 queued requests allowed."
CREDITS = "Insufficient credits. Please add more credits to continue."
PREMIUM = "This feature requires a premium subscription"
NOT_QUEUED = "The specified ID does not exist or is not queued"
HTML = "<!DOCTYPE html><title>Just a moment...</title>"


def ask(body: object, status: int = 200, headers: dict[str, str] | None = None, *, training: bool = False) -> Reply:
    """Return the reply for a body, which is an object, text or bytes."""
    raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    return parse(status, headers or {}, raw, Question(ID, NOW, training))


def error(message: object, **more: object) -> dict[str, object]:
    return {"status": "error", "message": message, **more}


def shown(value: object) -> str:
    """Return a short name for a case."""
    return type(value).__name__ if isinstance(value, Reply) else ascii(value)[:60]


def success(output: object, **more: object) -> dict[str, object]:
    return {"status": "success", "output": output, **more}


# fmt: off
REAL_ANSWERS: list[tuple[str, int, object, Reply]] = [
    ("1 success", 200, success([A], id=12202888), Ready((Link(A),))),
    ("2 success with an empty tip", 200, success([A], id=12202888, tip=""), Ready((Link(A),))),
    ("3 success with proxy links", 200, success([A], id=12202888, proxy_links=[CDN]), Ready((Link(A, (CDN,)),))),
    ("4 null proxy links, URL in the tip", 200, success([A], tip="http://sdapi_backend.test/enterprise", proxy_links=None), Ready((Link(A),))),
    ("5 processing", 200, {"status": "processing", "message": "try again later.", "output": "", "tip": TIP}, Processing()),
    ("6 processing, messege", 200, {"status": "processing", "messege": "try again later.", "output": "", "tip": TIP}, Processing()),
    ("7 bare processing", 200, {"status": "processing", "message": "Try Again", "output": ""}, Processing()),
    ("8 failed", 200, {"status": "failed", "id": "", "message": "Failed, Try Again", "output": ""}, Failed("Failed, Try Again", may_recover=True)),
    ("9 unknown id", 200, {"status": "failed", "id": "", "message": "Request not found", "output": "", "tip": TIP}, UnknownId("Request not found")),
    ("10 spam filter, HTTP 200", 200, error("Rate limit exceeded", tips=SPAM), RateLimited(30.0, "Rate limit exceeded")),
    ("11 spam filter, messege", 200, {"status": "error", "messege": "Rate limit exceeded", "tips": SPAM}, RateLimited(30.0, "Rate limit exceeded")),
    ("12 queue limit, HTTP 429", 429, error(QUEUE_LIMIT, retry_after=30), RateLimited(30.0, QUEUE_LIMIT)),
    ("13 wrong key, HTTP 200", 200, error("Invalid Api Key", tip=KEY_TIP), AccountRefused("key", "Invalid Api Key")),
    ("14 wrong key, HTTP 401", 401, error("Invalid API key"), AccountRefused("key", "Invalid API key")),
    ("15 no credits, HTTP 402", 402, error(CREDITS), AccountRefused("credits", CREDITS)),
    ("16 plan, HTTP 403", 403, error(PREMIUM), AccountRefused("plan", PREMIUM)),
    ("17 our request is malformed", 200, error("Invalid API Request", tip=KEY_TIP), AccountRefused("request", "Invalid API Request")),
    ("18 server error without status", 500, {"message": "Server Error"}, ApiDown("HTTP 500: Server Error")),
    ("19 internal error", 500, error("Internal server error. Please try again."), ApiDown("HTTP 500: Internal server error. Please try again.")),
    ("20 unavailable", 503, error("Service temporarily unavailable. Please try again later."), ApiDown("HTTP 503: Service temporarily unavailable. Please try again later.")),
    ("21 message is an object", 200, error({"prompt": ["The prompt field is required."]}), ApiError('{"prompt": ["The prompt field is required."]}')),
    ("22 error of no class", 200, error("Error message"), ApiError("Error message")),
    ("23 the same, messege", 200, {"status": "error", "messege": "Error message"}, ApiError("Error message")),
    ("24 like a submit answer", 200, {"status": "processing", "eta": 20.9379869184, "messege": "Try to fetch", "fetch_result": "https://evil.example/api/v3/fetch/1", "id": 32798037, "output": [], "meta": {}}, Processing(20.9379869184)),
    ("25 future links are not outputs", 200, {"status": "processing", "output": "", "future_links": [A]}, Processing(promised=(A,))),
    ("26 long eta", 200, {"status": "processing", "eta": 416.94}, Processing(416.94)),
    ("27 longer eta", 200, {"status": "processing", "eta": 960}, Processing(960.0)),
    ("28 output is plain text", 200, success(A, generationTime=6.9, id=12202888), Ready((Link(A),))),
    ("29 null id", 200, success(["https://h/a.glb"], id=None, warning="", webhook_status=""), Ready((Link("https://h/a.glb"),))),
    ("30 no id", 200, success([A], warning=""), Ready((Link(A),))),
    ("31 id as text", 200, success([A], id=ID), Ready((Link(A),))),
    ("32 queued with links", 200, {"status": "queued", "taskId": "a352", "links": [WAV], "message": "Request has been queued"}, Processing(promised=(WAV,))),
    ("33 broken JSON", 200, '{ { "eta": 5, "status":"queued" }}', Unread("HTTP 200 with no JSON object (34 bytes)")),
    ("33a no status", 200, {"generationTime": 1.57, "id": 12202888, "links": [WAV], "proxy_links": [CDN], "meta": {"id": None}}, Unread("HTTP 200 without a status")),
    ("33b proxy link is plain text", 200, success([A], proxy_links=CDN), Ready((Link(A, (CDN,)),))),
    ("34 training words about an image", 200, {"status": "success", "messege": "deploying_gpu", "data": "it will take upto 30 minutes.", "training_id": "F5jvdzGnYi"}, Empty()),
    ("35 queue health", 200, {"queue_num": 0, "queue_time": 0, "status": "ok"}, Unread("unknown status 'ok'")),
    ("36 not safe for work", 200, success([A], nsfw_content_detected=True), Ready((Link(A),))),
    ("37 38 39 43 are about downloads: all their answers", 200, success([A], proxy_links=[CDN]), Ready((Link(A, (CDN,)),))),
    ("40 data URI", 200, success(["data:image/png;base64,iVBORw0KGgo="]), Ready((Link("data:image/png;sha256=4c4b6a3be1314ab86138bef4314dde022e600960d8689a2c8f8631802d20dab6", (), b"\x89PNG\r\n\x1a\n"),))),
    ("41 empty proxy links, success", 200, success([A], proxy_links=""), Ready((Link(A),))),
    ("41 empty proxy links, processing", 200, {"status": "processing", "proxy_links": ""}, Processing()),
    ("42 four outputs", 200, success([A, B, A + "2", B + "2"]), Ready((Link(A), Link(B), Link(A + "2"), Link(B + "2")))),
    ("44 another job's answer", 200, success([A], id=12202889), AnotherJob("12202889")),
    ("45 HTTP 404", 404, error(NOT_QUEUED), UnknownId(NOT_QUEUED)),
    ("45 HTTP 404 without a status", 404, {"message": NOT_QUEUED}, UnknownId(NOT_QUEUED)),
    ("45 HTTP 404 in plain text", 404, NOT_QUEUED, UnknownId(NOT_QUEUED)),
]

CODES_AND_BODIES: list[tuple[int, object, Reply]] = [
    # redirects are never followed
    *[(code, success([A]), ApiDown(f"HTTP {code}: the API redirects. Redirects are not followed, to protect the API key. Check SD_API_URL")) for code in (300, 301, 302, 303, 304, 307, 308, 399)],
    # every 429 pauses the account
    (429, HTML, RateLimited(30.0, "HTTP 429")),
    (429, "", RateLimited(30.0, "HTTP 429")),
    (429, "[]", RateLimited(30.0, "HTTP 429")),
    (429, {"message": "Too Many Attempts."}, RateLimited(30.0, "Too Many Attempts.")),
    (429, error("Invalid API key"), RateLimited(30.0, "Invalid API key")),
    (429, success([A]), RateLimited(30.0, "HTTP 429")),
    # JSON refusals are about the account
    (401, {"message": "Unauthenticated."}, AccountRefused("key", "Unauthenticated.")),
    (401, {}, AccountRefused("key", "HTTP 401")),
    (401, error("API key required"), AccountRefused("key", "API key required")),
    (402, {"detail": "pay"}, AccountRefused("credits", "pay")),
    (403, {"status": "failed", "message": "no"}, Failed("no")),
    (403, error("Invalid API key"), AccountRefused("key", "Invalid API key")),
    (401, error("out of credits"), AccountRefused("credits", "out of credits")),
    (403, error("Daily limit exceeded"), AccountRefused("plan", "Daily limit exceeded")),
    (400, error("Invalid API Request"), AccountRefused("request", "Invalid API Request")),
    # challenge pages are about the host
    *[(code, HTML, ApiDown(f"HTTP {code} with an HTML page")) for code in (400, 401, 402, 403, 418, 500, 502, 503, 504, 520, 524, 527)],
    (403, "\ufeff\r\n  <html>", ApiDown("HTTP 403 with an HTML page")),
    # every 5xx is a failure of the host
    *[(code, body, ApiDown(f"HTTP {code} with no JSON object")) for code in (500, 502, 599) for body in ("", "null", "[1]", "error code: 520")],
    (500, {"status": "failed", "message": "Failed, Try Again"}, ApiDown("HTTP 500: Failed, Try Again")),
    (502, success([A]), ApiDown("HTTP 502")),
    (503, {"status": "processing"}, ApiDown("HTTP 503")),
    (503, error("Too many requests"), RateLimited(30.0, "Too many requests")),
    (200, {"message": "Server Error"}, ApiDown("HTTP 200: Server Error", answered=True)),
    (200, error("Internal server error. Please try again."), ApiDown("HTTP 200: Internal server error. Please try again.", answered=True)),
    (200, error("Service temporarily unavailable. Please try again later."), ApiDown("HTTP 200: Service temporarily unavailable. Please try again later.", answered=True)),
    # 404: an unknown id if the message says so, else maybe a wrong URL of the API
    (404, error("Not Found"), ApiDown(f"HTTP 404: {NO_SUCH_PATH}")),
    (404, {"status": "failed"}, UnknownId("HTTP 404")),
    (404, {"message": "The route api/v3/fetch/1 could not be found."}, ApiDown(f"HTTP 404: {NO_SUCH_PATH}")),
    (404, {}, ApiDown(f"HTTP 404: {NO_SUCH_PATH}")),
    (404, HTML, ApiDown(f"HTTP 404: {NO_SUCH_PATH}")),
    (404, "<p>" + NOT_QUEUED, ApiDown(f"HTTP 404: {NO_SUCH_PATH}")),
    (404, "", ApiDown(f"HTTP 404: {NO_SUCH_PATH}")),
    (404, {"status": "processing"}, Processing()),
    # answers without meaning are polled again
    (200, HTML, Unread(f"HTTP 200 with an HTML page ({len(HTML)} bytes)")),
    (200, "", Unread("HTTP 200 with no JSON object (0 bytes)")),
    (200, "null", Unread("HTTP 200 with no JSON object (4 bytes)")),
    (200, '"success"', Unread("HTTP 200 with no JSON object (9 bytes)")),
    (200, json.dumps([success([A])]), Unread(f"HTTP 200 with no JSON object ({len(json.dumps([success([A])]))} bytes)")),
    (200, {}, Unread("HTTP 200 without a status")),
    (200, {"status": None, "output": [A]}, Unread("HTTP 200 without a status")),
    (200, {"status": ["success"], "output": [A]}, Unread("HTTP 200 without a status")),
    (200, {"status": "complete", "output": [A]}, Unread("unknown status 'complete'")),
    (400, success([A]), Unread("HTTP 400 that says success")),
    (200, b"[" * 100_000, Unread("HTTP 200 with no JSON object (100000 bytes)")),
    (200, b'{"id": ' + b"9" * 5000 + b"}", Unread("HTTP 200 with no JSON object (5008 bytes)")),
    (200, b'\xff\xfe{"status": "success"}', Unread("HTTP 200 with no JSON object (23 bytes)")),
    # spellings
    (200, b'\xef\xbb\xbf{"status": "processing"}', Processing()),
    *[(200, {"status": word}, Processing()) for word in (" Processing ", "QUEUED", "pending", "in_progress", "starting", "running")],
    (200, {"status": "SUCCESS ", "output": A}, Ready((Link(A),))),
    (200, {"status": "Failed"}, Failed("failed, without a message")),
    (200, {"status": "error"}, ApiError("HTTP 200, without a message", vague=True)),
    (200, {"status": "error", "message": "", "messege": "Error"}, ApiError("Error", vague=True)),
    (200, {"status": "error", "message": None, "messege": 5}, ApiError("5", vague=True)),
    (200, error("a\x00b\nc\x7f\ud800"), ApiError("a b c ?", vague=True)),
    (200, error("x" * 9_000), ApiError("x" * 500, vague=True)),
    (201, success([A]), Ready((Link(A),))),
    (202, {"status": "processing"}, Processing()),
    # other messages about accounts
    *[(200, error(text), AccountRefused("key", text)) for text in ("API key is required", "Your API key has expired", "This api key was revoked", "The API key you use is invalid")],
    *[(200, error(text), AccountRefused("credits", text)) for text in ("You are out of credits", "Not enough credits left", "Insufficient balance", "Your credits are exhausted")],
    *[(200, error(text), AccountRefused("plan", text)) for text in ("Subscription required", "Your subscription has expired", "Subscription is expired")],
    *[(200, error(text), RateLimited(30.0, text)) for text in ("Too many requests", "Limit exceeded", "spam filter", "RATE LIMIT")],
    # texts about the account in an answer without an error are only prompts
    *[(200, success([A], meta={"prompt": text}, message=text, tip=text), Ready((Link(A),))) for text in ("rate limit exceeded", "Invalid API key", "out of credits", "server error")],
    (200, {"status": "processing", "message": "rate limit exceeded"}, Processing()),
    (200, {"status": "failed", "message": "the prompt says invalid api key"}, Failed("the prompt says invalid api key")),
    (200, error("Error", meta={"prompt": "invalid api key"}, tip=KEY_TIP), ApiError("Error", vague=True)),
    # outputs
    (200, success(""), Empty()),
    (200, success([]), Empty()),
    (200, success(None), Empty()),
    (200, success([None, "", 5, {"x": []}]), Empty()),
    (200, success("", future_links=[A]), Empty(promised=(A,))),
    (200, success([], proxy_links=[CDN]), Ready((Link(CDN),))),
    (200, success([], links=[WAV]), Ready((Link(WAV),))),
    (200, success({"images": [A, [B]], "seed": 1}), Ready((Link(A), Link(B)))),
]

ECHOES: list[tuple[object, Reply]] = [
    *[(echo, Ready((Link(A),))) for echo in (12202888, "12202888", " 12202888 ", 12202888.0, 0, "0", " 0 ", 0.0, "", "  ", None, [], [1], {"a": 1}, True, False)],
    (1, AnotherJob("1")),
    (-12202888, AnotherJob("-12202888")),
    ("12202888x", AnotherJob("12202888x")),
    ("012202888", AnotherJob("012202888")),
    (12202889.0, AnotherJob("12202889")),
    ("x\x00" * 500, AnotherJob("x " * 64)),
]

WAITS: list[tuple[str, dict[str, str], dict[str, object], float]] = [
    ("nowhere", {}, {}, 30.0),
    ("header", {"Retry-After": "7"}, {}, 7.0),
    ("header in any case", {"rEtRy-AfTeR": "7"}, {}, 7.0),
    ("header before body", {"Retry-After": "7"}, {"retry_after": 8}, 7.0),
    ("body", {}, {"retry_after": 8}, 8.0),
    ("body as text", {}, {"retry_after": "8.5"}, 8.5),
    ("body before reset", {"X-RateLimit-Reset": str(NOW + 20)}, {"retry_after": 8}, 8.0),
    ("reset", {"X-RateLimit-Reset": str(NOW + 20)}, {}, 20.0),
    ("reset in the past", {"X-RateLimit-Reset": str(NOW - 20)}, {}, 30.0),
    ("reset that is nonsense", {"X-RateLimit-Reset": "soon"}, {}, 30.0),
    ("reset before the message", {"X-RateLimit-Reset": str(NOW + 20)}, {"message": "wait 9 seconds"}, 20.0),
    ("date", {"Retry-After": formatdate(NOW + 45, usegmt=True)}, {}, 45.0),
    ("date without a zone is UTC", {"Retry-After": formatdate(NOW + 45, usegmt=True)[:-4]}, {}, 45.0),
    ("date in the past", {"Retry-After": formatdate(NOW - 86_400, usegmt=True)}, {}, 1.0),
    ("date far in the future", {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, {}, 900.0),
    ("impossible date", {"Retry-After": "Mon, 99 Foo 0000 99:99:99 GMT"}, {}, 30.0),
    ("empty header", {"Retry-After": ""}, {"retry_after": 8}, 8.0),
    ("words", {}, {"message": "try again in 2 minutes"}, 120.0),
    ("wait in a tip", {}, {"tips": "wait for 45 seconds"}, 45.0),
    ("one and a half", {}, {"message": "try again in 1.5 minutes"}, 90.0),
    ("a letter", {}, {"message": "wait 45s"}, 45.0),
    ("the time to wait, not of the limit", {}, {"message": "5 requests per 60 seconds, try again in 12 sec"}, 12.0),
    ("the time to wait comes after", {}, {"message": "1 request per minute: please wait for another 20 seconds, not 50 seconds"}, 20.0),
    ("no unit", {}, {"message": "wait 45 smiles"}, 30.0),
    ("reset in milliseconds", {"X-RateLimit-Reset": str(int((NOW + 20) * 1000))}, {}, 20.0),
    ("body in another spelling", {}, {"retryAfter": 8}, 8.0),
    ("wait as text in a field", {}, {"retryAfter": "8 seconds"}, 8.0),
    ("half an hour", {}, {"message": "429: try again in 30 minutes"}, 900.0),
    ("a day", {"Retry-After": "86400"}, {}, 900.0),
    ("negative", {"Retry-After": "-5"}, {}, 1.0),
    ("zero", {"Retry-After": "0"}, {}, 1.0),
    ("not a number", {"Retry-After": "nan"}, {}, 30.0),
    ("infinite", {"Retry-After": "1e999"}, {}, 30.0),
    ("body is not a number", {}, {"retry_after": float("nan")}, 30.0),
    ("body is infinite", {}, {"retry_after": float("inf")}, 30.0),
    ("body is huge", {}, {"retry_after": 10**400}, 30.0),
    ("body is true", {}, {"retry_after": True}, 30.0),
    ("body is a list", {}, {"retry_after": [60]}, 30.0),
    ("body is null", {}, {"retry_after": None}, 30.0),
]

TRAININGS: list[tuple[object, Reply]] = [
    *[({"status": "success", name: word}, Processing()) for name in ("message", "messege") for word in ("deploying_gpu", "training_started", "training_success", "trained_model_uploading", "deploying_model", "", "anything")],
    ({"status": "success", "messege": "model_ready", "data": "/n Step:1"}, Ready(())),
    ({"status": "processing", "message": "model_ready", "eta": 20}, Processing(20.0)),
    ({"status": "success", "message": " Model_Ready "}, Ready(())),
    ({"status": "success", "messege": "deploying_gpu", "output": [A]}, Processing()),
    ({"status": "failed", "message": "Request not found"}, UnknownId("Request not found")),
    ({"status": "failed", "message": "out of memory"}, Failed("out of memory")),
    *[({"status": "success", "messege": word}, Ready(())) for word in ("Model Ready", "MODEL-READY", " model  ready ")],
    *[({"status": "success", "messege": word, "data": "x"}, Failed("x")) for word in ("Training failed", "Training Failed: no GPU", "training-failed")],
    *[({"status": "success", name: "Error", "data": "x"}, Failed("x")) for name in ("model_training_status", "training_status")],
    ({"status": "Model Ready"}, Ready(())),
    ({"status": "Training failed", "data": "x"}, Failed("x")),
    ({"status": "success", "messege": "model_ready", "training_id": "F6"}, AnotherJob("F6")),
    ({"status": "success", "messege": "training_failed", "id": 8}, AnotherJob("8")),
    ({"status": "success", "messege": "model_ready", "id": 8, "training_id": ID}, Ready(())),
    ({"status": "success", "messege": "deploying_gpu", "id": 8}, Processing()),
    ({"status": "success", "messege": "model_ready", "id": 0, "model_id": "x"}, Ready(())),
    (error("Invalid Api Key"), AccountRefused("key", "Invalid Api Key")),
]
# fmt: on


@pytest.mark.parametrize(("status", "body", "reply"), [pytest.param(*case, id=name) for name, *case in REAL_ANSWERS])
def test_real_answers_have_the_expected_reply(status: int, body: object, reply: Reply) -> None:
    assert ask(body, status) == reply


@pytest.mark.parametrize("of_what", ["Model id", "model_id", "Voice id", "LoRA id", "Scheduler id"])
def test_an_unknown_id_of_something_else_is_not_about_the_job(of_what: str) -> None:
    assert isinstance(ask(error(f"{of_what} not found")), ApiError)


@pytest.mark.parametrize("text", ["ID not found", "Request id not found", "The id does not exist", "Such id not found"])
def test_an_unknown_job_id_is_recognised(text: str) -> None:
    assert ask(error(text)) == UnknownId(text)


@pytest.mark.parametrize(("status", "body", "reply"), CODES_AND_BODIES, ids=shown)
def test_status_code_and_body_determine_the_reply(status: int, body: object, reply: Reply) -> None:
    assert ask(body, status) == reply


@pytest.mark.parametrize(("echoed", "reply"), ECHOES, ids=shown)
def test_a_success_with_another_id_is_not_about_this_job(echoed: object, reply: Reply) -> None:
    assert ask(success([A], id=echoed)) == reply


@pytest.mark.parametrize(("echoed", "reply"), ECHOES, ids=shown)
def test_a_failure_with_another_id_is_not_about_this_job(echoed: object, reply: Reply) -> None:
    body = {"status": "failed", "id": echoed, "message": "Invalid input dimensions"}

    assert ask(body) == (reply if isinstance(reply, AnotherJob) else Failed("Invalid input dimensions"))


def test_the_id_may_differ_in_case_or_be_in_another_field() -> None:
    question = Question("Ab-7", NOW)
    for fields in ({"id": "aB-7"}, {"id": " AB-7"}, {"id": 9, "chat_id": "ab-7"}, {"id": 9, "request_id": "ab-7"}):
        assert parse(200, {}, json.dumps(success([A], **fields)).encode(), question) == Ready((Link(A),))


BESIDE: list[tuple[dict[str, object], Reply]] = [
    ({"message": "Error", "error": "Insufficient credits"}, AccountRefused("credits", "Error")),
    ({"status": "error", "message": "Error", "msg": "Invalid API key"}, AccountRefused("key", "Error")),
    ({"error": "insufficient_credits"}, AccountRefused("credits", "insufficient_credits")),
    ({"errors": [{"code": "insufficient_credits"}]}, AccountRefused("credits", "insufficient_credits")),
    (
        {"errors": [{"title": "Oops"}, {"code": "rate_limit_exceeded"}]},
        RateLimited(30.0, '[{"title": "Oops"}, {"code": "rate_limit_exceeded"}]'),
    ),
    ({"errors": ["Oops", "Request not found"]}, UnknownId('["Oops", "Request not found"]')),
    ({"status": "error", "message": "Oops", "code": "invalid-api-key"}, AccountRefused("key", "Oops")),
    ({"status": "failed", "message": "Error", "error": "Invalid API key"}, AccountRefused("key", "Error")),
    ({"status": "failed", "message": "Error", "error": "Insufficient credits"}, Failed("Error", may_recover=True)),
    ({"status": "error", "message": "Oops", "code": 401}, AccountRefused("key", "Oops")),
    ({"message": "Oops", "code": "402"}, AccountRefused("credits", "Oops")),
    ({"error": {"code": 403, "message": "Oops"}}, AccountRefused("plan", "Oops")),
    ({"error": {"code": 429, "message": "Oops"}}, RateLimited(30.0, "Oops")),
    ({"status": "401", "message": "Oops"}, AccountRefused("key", "Oops")),
    ({"status": "429"}, RateLimited(30.0, "HTTP 429")),
    ({"status": "500", "message": "Oops"}, ApiDown("HTTP 500: Oops")),
    ({"status": "200", "message": "Oops"}, Unread("unknown status '200'")),
    ({"status": "success", "code": 401, "output": [A]}, Ready((Link(A),))),
    ({"status": "failed", "code": 402, "message": "Oops"}, Failed("Oops")),
    ({"status": "error", "message": "Oops", "code": 7}, ApiError("Oops", vague=True)),
    ({"status": "error", "message": "Oops", "errors": {"prompt": ["required"]}}, ApiError("Oops")),
]


@pytest.mark.parametrize(("body", "reply"), BESIDE, ids=shown)
def test_other_error_texts_are_read_if_the_message_has_no_meaning(body: dict[str, object], reply: Reply) -> None:
    assert ask(body) == reply


@pytest.mark.parametrize(("headers", "body", "wait"), [pytest.param(*case, id=name) for name, *case in WAITS])
@pytest.mark.parametrize("status", [200, 429])
def test_a_rate_limit_has_the_requested_wait_within_bounds(
    status: int, headers: dict[str, str], body: dict[str, object], wait: float
) -> None:
    message = f"rate limit: {body.get('message', '')}"

    reply = ask({**body, "status": "error", "message": message}, status, headers)

    assert isinstance(reply, RateLimited)
    assert reply.seconds == pytest.approx(wait)


def test_the_retry_after_header_of_a_page_is_read() -> None:
    assert ask(HTML, 429, {"Retry-After": "12"}) == RateLimited(12.0, "HTTP 429")


@pytest.mark.parametrize(("body", "reply"), TRAININGS, ids=shown)
def test_a_training_is_ready_only_when_its_model_is_ready(body: object, reply: Reply) -> None:
    assert ask(body, training=True) == reply


def test_megabytes_of_blanks_in_an_output_are_fast() -> None:
    """A pattern with backtracking would need hours."""
    blanks = "A" + " " * 1_000_000 + "!"

    assert ask(success([blanks])) == Empty()


# ── properties ────────────────────────────────────────────────────────────────────────────────────────────────────────

ANY_TEXT = st.text("a0 é☃\x00\ud800\n\u2028{:/=", max_size=12) | st.sampled_from(
    ["success", "failed", "error", "processing", "model_ready", "rate limit", "Request not found", A, "data:,x", "\x00"]
)
ANY_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=8,
)
FIELDS = ["status", "id", "output", "message", "messege", "proxy_links", "links", "eta", "retry_after", "tip", "tips"]
ANSWERS = st.dictionaries(st.sampled_from(FIELDS), ANY_JSON).map(lambda answer: json.dumps(answer).encode())
HEADERS = st.dictionaries(st.sampled_from(["Retry-After", "retry-after", "X-RateLimit-Reset", "x"]), ANY_TEXT)
CODES = st.sampled_from([200, 201, 301, 400, 401, 402, 403, 404, 429, 500, 503, 520]) | st.integers(-1, 10**6)


def texts_of(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, (tuple, list)):
        return [text for item in value for text in texts_of(item)]
    return []


@settings(max_examples=150, deadline=None)
@given(CODES, HEADERS, st.binary(max_size=200) | ANSWERS, st.booleans())
def test_any_answer_gives_a_reply_with_storable_texts(
    status: int, headers: dict[str, str], body: bytes, training: bool
) -> None:
    reply = parse(status, headers, body, Question(ID, NOW, training))

    for text in texts_of(astuple(reply)):
        text.encode()
        assert "\x00" not in text
    match reply:
        case Ready(outputs):
            assert outputs or training
            assert len({output.url for output in outputs}) == len(outputs)
        case RateLimited(seconds, _):
            assert 1.0 <= seconds <= 900.0
        case Processing(eta):
            assert eta is None or 0 < eta < float("inf")


@settings(max_examples=40, deadline=None)
@given(ANY_TEXT, ANY_JSON)
def test_no_text_in_a_success_holds_an_account(text: str, meta: object) -> None:
    reply = ask(success([A], message=text, messege=text, tip=text, meta=meta))

    assert reply == Ready((Link(A),))


@settings(max_examples=40, deadline=None)
@given(ANSWERS, st.sampled_from([300, 307, 429, 500, 503, 524]))
def test_some_status_codes_are_never_about_the_job(body: bytes, status: int) -> None:
    assert isinstance(ask(body, status), (ApiDown, RateLimited, AccountRefused))


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": [' + b"[]," * 1_000_000 + b"1]}",
        b'{"a": [' + b'"",' * 1_000_000 + b"1]}",
        b'{"a": ["\\"", ' + b"{}," * 1_000_000 + b"1]}",
        b'{"a": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
        b'{"a": 1' + b"0" * 3_000_000 + b"}",
    ],
    ids=["lists", "strings", "after an escaped quotation mark", "deep", "digits"],
)
def test_an_answer_with_too_many_values_needs_little_memory_and_is_polled_again(body: bytes) -> None:
    tracemalloc.start()
    try:
        reply = parse(200, {}, body, Question("1", 0.0))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert isinstance(reply, Unread)
    assert peak < 3 * len(body)


def test_commas_in_a_text_do_not_count_as_values() -> None:
    body = json.dumps({"status": "processing", "prompt": 'a lake, "at dawn", \\' * 300_000}).encode()

    assert parse(200, {}, body, Question("1", 0.0)) == Processing()


def test_outputs_beyond_the_limit_are_counted() -> None:
    listed = [f"https://cdn.example/{number}.png" for number in range(1_500)]
    body = json.dumps({"status": "success", "output": [*listed, *listed[-100:]]}).encode()

    reply = parse(200, {}, body, Question("1", 0.0))

    assert isinstance(reply, Ready)
    assert (len(reply.outputs), reply.left_out) == (1_000, 500)
