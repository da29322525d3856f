"""HTTP answers in the form of the API, and parsing of request bodies."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TIP = "This is the stand-in of the API: the waiting is real, the outputs are made here."
QUEUE_FULL_SECONDS = 30
_REQUEST_TIP = "Send a POST request with the header Content-Type: application/json and one valid JSON object."
_KEY_TIP = _REQUEST_TIP + " Its key must be the one that the stand-in was started with."


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer. If it sets Content-Length, it is sent unchanged and the connection is closed afterwards."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    drip_seconds: float = 0.0  # between any two bytes of the body
    drip_headers: bool = False  # send the headers slowly too
    lost: Literal["", "closed", "stalled"] = ""
    """What is done instead of sending it: the connection is closed, or left open until the client closes it."""


def json_answer(content: Mapping[str, Any], status: int = 200) -> Answer:
    """Return a JSON answer. Nearly all answers of the API are JSON, mostly with HTTP 200, also for errors."""
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(content, separators=(",", ":")).encode())


def page_answer(status: int, title: str) -> Answer:
    """Return an HTML page, like one of a gateway in front of the API, or of a file store."""
    return Answer(
        status, {"Content-Type": "text/html"}, f"<!doctype html><title>{status}</title><h1>{title}</h1>\n".encode()
    )


def invalid_request() -> Answer:
    """Return the answer to a request with the wrong method or without a JSON object."""
    return json_answer({"status": "error", "message": "Invalid API Request", "tip": _REQUEST_TIP})


def invalid_key() -> Answer:
    """Return the answer to a request with an invalid key."""
    return json_answer({"status": "error", "message": "Invalid Api Key", "tip": _KEY_TIP})


def invalid_field(name: str, complaint: str) -> Answer:
    """Return the answer to an order with an invalid field. Its message is an object."""
    return json_answer({"status": "error", "message": {name: [complaint]}})


def queue_full(limit: int) -> Answer:
    """Return the answer to an order if as many wait as the plan allows."""
    text = f"Rate limit exceeded. Maximum {limit} queued requests allowed."
    return json_answer({"status": "error", "message": text, "retry_after": QUEUE_FULL_SECONDS}, status=429)


def no_such_route(path: str) -> Answer:
    """Return the answer for a path that the API does not have: a 404 of its framework, without a status field."""
    return json_answer({"message": f"The route {path.lstrip('/')} could not be found."}, status=404)


def unknown_id() -> Answer:
    """Return the answer about an unknown id: status `failed`. Only the message distinguishes it from a failed job."""
    return json_answer({"status": "failed", "id": "", "message": "Request not found", "output": "", "tip": TIP})


def parse_body(content_type: str, raw: bytes) -> Mapping[str, Any] | None:
    """Return the JSON object of a request, or None if there is no readable one."""
    if "application/json" not in content_type.lower():
        return None
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
