"""Every rule and phrase is needed, and a message has the same meaning in every field of an answer."""
# ruff: noqa: E501  # a table of wordings

import json
from collections.abc import Iterator

import pytest

from tests.vendor.test_recorded_answers import describe
from worker.core.reply import Reply
from worker.vendor import phrases, replies
from worker.vendor.answer_fields import json_object
from worker.vendor.phrases import PHRASES, Phrase, meaning_of
from worker.vendor.replies import RULES, ParsedAnswer, Question, Rule, parse, rule_for

ID = "7"
QUESTION = Question(ID, 1_700_000_000.0)


def read(body: object, status: int = 200, *, training: bool = False) -> Reply:
    raw = body if isinstance(body, str) else json.dumps(body)
    return parse(status, {}, raw.encode(), QUESTION._replace(training=training))


def error(message: str) -> dict[str, object]:
    return {"status": "error", "message": message}


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_every_rule_is_needed_for_its_example(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    example = rule.example
    body = example.body.encode()
    answer = ParsedAnswer(
        example.http_status, {}, body, json_object(body), QUESTION._replace(training=example.training)
    )
    used, reply = rule_for(answer)
    monkeypatch.setattr(replies, "RULES", tuple(candidate for candidate in RULES if candidate is not rule))

    try:
        other_reply = rule_for(answer)[1]
    except StopIteration:  # only the last rule matches all other answers
        assert rule is RULES[-1]
        return
    assert used is rule
    assert other_reply != reply


@pytest.mark.parametrize("phrase", PHRASES, ids=[phrase.example for phrase in PHRASES])
def test_every_phrase_is_needed_for_its_example(phrase: Phrase, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = read(error(phrase.example))
    assert meaning_of(phrase.example) == phrase.meaning
    remaining = tuple(
        pair for pair, candidate in zip(phrases._COMPILED, PHRASES, strict=True) if candidate is not phrase
    )
    monkeypatch.setattr(phrases, "_COMPILED", remaining)
    meaning_of.cache_clear()
    try:
        other_reply = read(error(phrase.example))
    finally:
        monkeypatch.undo()
        meaning_of.cache_clear()

    assert other_reply != reply


# fmt: off
WORDINGS: dict[str, list[str]] = {
    "account_refused key": [
        "Invalid Api Key", "invalid API-key", "Wrong api key", "Missing API key", "Missing or invalid API key", "No API key provided",
        "API key required", "Api key is missing", "Please provide a valid API key", "The key field is required.", "API key not found",
        "API key is not valid", "Your API key has expired", "This API key was disabled", "Unauthenticated.", "Unauthorized",
        "Authentication failed", "Invalid token", "Token has expired", "Your account has been suspended", "This account is blocked",
        "User not found", "Account is currently inactive", "Your account is not active", "API key does not exist", "Api_key not recognized",
        "Invalid key", "Invalid key provided.", "Invalid credentials", "Invalid login credentials", "Access denied", "Permission denied", "invalid_api_key",
        "Key is invalid", "Your key has expired", "API usage is prohibited", "API access is prohibited for your account", "Access is denied to this account",
    ],
    "account_refused credits": [
        "Insufficient credits. Please add more credits to continue.", "Insufficient credit", "Insufficient API credits", "insufficient_quota",
        "Insufficient account balance", "Not enough balance", "Not enough credits left", "You are out of credits", "No more credits",
        "You have 0 credits left", "You do not have enough credits", "You don't have sufficient balance", "Your credit balance is too low",
        "Balance is not sufficient", "Your credits are exhausted", "Credits finished", "You have run out of credits", "Please recharge",
        "Top up your account to continue", "Payment required", "Payment is overdue", "Please buy more credits", "Wallet balance is 0",
        "insufficient_credits", "INSUFFICIENT-CREDITS", "Your wallet is empty", "Add money to your wallet",
    ],
    "account_refused plan": [
        "Your monthly limit exceeded, upgrade subscription now on https://stablediffusionapi.com/pricing", "Monthly limit reached",
        "Daily limit exceeded", "You have exceeded your monthly limit", "You have reached the daily image limit", "Yearly quota exhausted",
        "Your plan limit exceeded", "Free limit has been reached", "API call limit exceeded", "Trial limits are crossed",
        "You have used all your free images", "You have exhausted your API calls", "Quota exceeded", "You have exceeded your quota",
        "No API calls left", "You have no more images remaining", "Your subscription has expired", "Subscription required",
        "Your plan has ended", "This feature requires a premium subscription", "You need an active plan", "No active subscription",
        "Not available in your current plan", "Only for enterprise customers", "You must be a premium member", "Please upgrade your plan",
        "Please subscribe", "Monthly token limit exceeded", "You have reached the maximum number of images for today", "100 requests per day allowed",
        "Your API requests are exhausted", "Limits exhausted", "Only 50 images per month", "monthly_limit_exceeded", "Monthly-limit exceeded",
        "You have reached your token limit", "You have reached the limit of your plan", "You've hit the cap for your current plan",
        "Exceeded the number of images in your subscription", "Your package limit is over", "Your membership has expired",
        "You do not have any active subscription", "You don't have an active plan", "You need to subscribe", "Your plan's limit has been reached",
        "Your plan’s limit is exceeded", "You hit your monthly cap", "Daily cap reached", "Token limit reached for your plan", "Limit exceeded for month", "Limit exceeded for the month",
    ],
    "account_refused request": ["Invalid API Request"],
    "rate_limited 30": [
        "Rate limit exceeded. Maximum 5 queued requests allowed.", "Rate limit exceeded", "rate-limit", "Limit exceeded", "Too many requests",
        "Too many API requests", "Too Many Attempts.", "Spam filter is enabled", "You are being throttled", "Slow down",
        "Maximum 5 concurrent jobs allowed", "Maximum 10 requests allowed", "You already have 15 requests in queue",
        "Your plan limit is reached: 5 concurrent requests", "Free plan rate limit exceeded", "10 requests per minute allowed",
        "Rate limit exceeded, upgrade your plan", "Request limit reached", "API rate limit has been reached", "rate_limit_exceeded",
        "Queue size limit reached", "Queue length limit exceeded", "Queue limit reached", "Queue is full: maximum 5 queued requests",
    ],
    "unknown_id": [
        "Request not found", "Request was not found", "Request id not found", "The specified ID does not exist or is not queued",
        "Request does not exist", "No such request", "Invalid request id", "Invalid job ID", "Unknown task id", "No request found",
        "No records found", "No query results for model", "Job not found", "Training not found", "Execution not found.",
        "This request does not belong to you", "Request 4711 not found", "Job with id abc-12 was not found", "Request 12202888 does not exist",
        "Task 9f8e7d6c-1 could not be found", "request_id not found", "The selected id is invalid.", "The given ID 7 does not exist", "ID is not valid",
        "Requested id not found", "Fetch id is invalid", "Execution id 7 was not found", "Training id does not exist", "The selected request id is invalid.",
        "Image with id 7 not found", "Video with this id does not exist", "No task with id 7", "No image found for the given id",
        "Request could not be found", "Could not find the request", "This image belongs to another user", "You do not own this request",
        "id: 7 not found", "Request Id: 7 does not exist", "Invalid ID", "Invalid id provided.",
        "Request '7' not found", 'No job with id "7"',
    ],
    "processing": [
        "Your image is still processing", "Request is processing", "Your video is being generated", "Image is not ready yet", "Not yet ready",
        "Training in progress", "Request is in queue", "Your request is currently processing",
    ],
    "api_down answered": [
        "Queue is full", "Queue is full, try again later", "The server is busy", "Service is not available, try again later",
        "Service temporarily unavailable", "Server is down", "GPU overloaded", "Under maintenance", "current_queue: 15", "Try again later",
        "Please try later", "Model is not available right now, please try again later", "Failed, Try Again", "Please retry",
        "Internal server error. Please try again.", "Server Error", "Request timed out", "Timeout", "No GPU available", "At capacity",
        "High demand", "Bad gateway", "Failed to process image, please try again", "Failed to load model, please try again later",
        "Unable to load model weights, server is busy", "Could not fetch image, retry later", "Queue is full. Upgrade your plan to skip it",
        "Server is busy right now. Premium users have priority", "Server is overloaded, try again later", "Database connection failed",
        "SQLSTATE[HY000] [2002] Connection refused", "Internal error", "Internal processing error", "Upstream error", "Model is loading", "The model is still loading",
        "GPU is starting", "Could not connect to the database", "MySQL server has gone away", "Something went wrong on our end",
    ],
    "api_error": [
        "The prompt field is required.", "prompt is required", "The key word parameter is invalid", "Model id not found", "lora_id does not exist",
        "Model not found: x", "Image is too large", "Invalid image", "Unsupported audio format", "Invalid input dimensions",
        "Unable to fetch image from provided URL", "Could not download video", "init_image must be a valid url", "Error message",
        "NSFW content detected", "Blocked by moderation", "Violates our content policy", "Prohibited words",
        "Invalid prompt: a wallet on a table", "Prompt 'recharge my phone, rate limit exceeded' is too long", "The prompt contains invalid api key",
        "Model not found: wallet-v2", "Unable to fetch image from provided URL: 401 Unauthorized", "Could not download video: 503 Service Unavailable",
        "Image size limit exceeded", "Prompt length limit exceeded", "File size limit exceeded", "Token limit exceeded",
        "Prohibited content", "Your prompt contains prohibited words", "The image includes prohibited material", "You do not own this model, the model is not valid", "The selected model id is invalid.", "Model id 7 not found",
        "Unable to fetch image, check the url and try again", "NSFW content detected in the prompt: my wallet", "Failed to load the audio: Too many requests", "Unknown model: free-trial-ended",
    ],
    "api_error vague": [
        "Something went wrong", "Error", "Unknown error", "Oops", "Failed to process image", "Bad request", "Invalid request", "fail",
        "Human-readable error description", "Your card was declined.", "Generation error for prompt: an empty wallet on a table", "Oops: a wallet",
        "Error while painting 'out of credits, server is busy'", 'Error while painting "your api key has expired"', "This is prohibited", "This model belongs to another user", "Permission denied: /tmp/7.png",
    ],
}
# fmt: on
CASES = [(text, means) for means, texts in WORDINGS.items() for text in texts]


def carriers(text: str) -> Iterator[dict[str, object]]:
    """Return error answers that contain the text in different fields."""
    for name in ("message", "messege", "error_message", "msg", "detail"):
        yield {"status": "error", name: text}
        yield {"status": " ERROR ", "id": "", "output": "", name: text, "tip": "1. Make sure you have valid API key."}
    yield {"status": "error", "message": "", "messege": text}
    yield {"status": "error", "error": text}
    yield {"status": "error", "error": {"message": text}}
    yield {"status": "error", "message": text.upper()}
    yield {"status": "error", "message": text.lower()}
    yield {"status": "error", "message": f"Error: {text}" if not text.lower().startswith("error") else text}
    yield {"error": text}
    yield {"error": {"code": "x", "message": text}, "data": None}
    yield {"success": False, "message": text}
    yield {"status": False, "message": text}


@pytest.mark.parametrize(("text", "means"), CASES, ids=[text for text, _ in CASES])
def test_a_message_has_the_same_meaning_in_every_field(text: str, means: str) -> None:
    for carrier in carriers(text):
        if means == "api_error" and text == "Error message" and text.lower() not in str(carrier).lower():
            continue
        assert describe(read(carrier)) == means, carrier
    if not means.startswith("api_error"):  # without a status, only messages with a meaning are read
        bare: list[dict[str, object]] = [
            {"message": text},
            {"messege": text, "output": "", "id": None},
            {"message": text, "status": None},
        ]
        for carrier in bare:
            assert describe(read(carrier)) == means, carrier


@pytest.mark.parametrize(("text", "means"), CASES, ids=[text for text, _ in CASES])
@pytest.mark.parametrize("status", [200, 400, 402, 403, 429, 500])
def test_message_and_status_code_determine_the_reply(text: str, means: str, status: int) -> None:
    for body in (error(text), {"message": text}):
        with_status = "status" in body
        reply = describe(read(body, status)).removesuffix(" answered")
        expected = means.removesuffix(" answered")
        account = expected.startswith("account_refused")
        if status == 429:
            run_out = expected in ("account_refused credits", "account_refused plan")
            expected = expected if run_out else "rate_limited"
            reply = reply if run_out else reply.partition(" ")[0]
        elif not account and not expected.startswith("rate_limited"):
            if status == 500:
                expected = "api_down"
            elif status == 402:
                of_the_job = expected == "unknown_id" or meaning_of(text) == "moderated"
                expected = expected if of_the_job else "account_refused credits"
            elif status == 403 and meaning_of(text) == "service":
                expected = "api_down"
            elif status == 403 and (expected in ("api_down", "api_error vague") or text == "Error message"):
                expected = "account_refused plan" if text != "Error message" else "api_error"
            elif not with_status and expected.startswith("api_error"):
                expected = expected if meaning_of(text) in ("order", "moderated") else "unread"
        assert reply == expected, body


@pytest.mark.parametrize(("text", "means"), CASES, ids=[text for text, _ in CASES])
def test_messages_without_an_error_have_no_effect(text: str, means: str) -> None:
    """A prompt may contain any of these texts, and servers repeat prompts in messages, tips and meta."""
    url = "https://h/a.png"
    more = {"message": text, "messege": text, "tip": text, "tips": text, "meta": {"prompt": text}}

    assert describe(read({"status": "success", "id": 7, "output": [url], **more})) == "ready:1"
    assert describe(read({"status": "processing", **more})) == "processing"
    assert (
        describe(read({"status": "success", "messege": "deploying_gpu", "data": text}, training=True)) == "processing"
    )
    assert describe(read({"id": 7, "output": [], **more})) == "unread"


@pytest.mark.parametrize(("text", "means"), CASES, ids=[text for text, _ in CASES])
def test_a_failure_is_final_unless_its_message_is_temporary(text: str, means: str) -> None:
    """The key and the limits of an account affect all jobs. Missing credits can be bought."""
    passes = means in ("api_down answered", "processing", "account_refused credits", "account_refused plan")
    expected = "failed recoverable" if passes else "failed"
    if means in ("unknown_id", "rate_limited 30", "account_refused key", "account_refused request"):
        expected = means

    for status in ("failed", "FAILED", "failure"):
        for training in (False, True):
            body = {"status": status, "id": "", "message": text, "output": ""}
            assert describe(read(body, training=training)) == expected, training


def test_out_of_memory_is_temporary_for_the_service_but_final_for_a_job() -> None:
    for text in ("CUDA out of memory", "GPU ran out of memory", "Out of GPU memory", "OOM"):
        assert describe(read(error(text))) == "api_down answered"
        assert describe(read({"status": "failed", "message": text})) == "failed"


@pytest.mark.parametrize("code", [402, 403])
@pytest.mark.parametrize("word", ["failed", "processing"])
def test_a_status_code_does_not_hold_the_account_if_the_answer_is_about_the_job(code: int, word: str) -> None:
    assert describe(read({"status": word, "message": "no"}, code)) == word
    assert describe(read({"status": word, "message": "Invalid API key"}, code)).partition(" ")[0] == (
        "account_refused" if word == "failed" else "processing"
    )


@pytest.mark.parametrize("code", [401, 403])
def test_an_overloaded_service_does_not_hold_the_account(code: int) -> None:
    assert describe(read(error("Server is overloaded, try again later"), code)) == "api_down answered"
