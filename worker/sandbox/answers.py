"""HTTP answers as the API gives them, and the bodies that it takes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TIP = "This is the stand-in of the API: the waiting is real, the outputs are made here."
_REQUEST_TIP = "Send a POST request with the header Content-Type: application/json and one valid JSON object."
_KEY_TIP = _REQUEST_TIP + " Its key must be the one that the stand-in was started with."


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer. A Content-Length of its own is sent as it stands, and the connection closed after it."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    drip_seconds: float = 0.0  # between any two bytes of the body
    drip_headers: bool = False  # the headers come as slowly


def json_answer(content: Mapping[str, Any], status: int = 200) -> Answer:
    """Return an answer as the API gives nearly all of them: JSON, mostly with HTTP 200, whatever it says."""
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(content, separators=(",", ":")).encode())


def page_answer(status: int, title: str) -> Answer:
    """Return a page, as a gateway in front of the API or a store of files gives it."""
    return Answer(
        status, {"Content-Type": "text/html"}, f"<!doctype html><title>{status}</title><h1>{title}</h1>\n".encode()
    )


def invalid_request() -> Answer:
    """Return the answer to a call with the wrong method, or without a JSON object."""
    return json_answer({"status": "error", "message": "Invalid API Request", "tip": _REQUEST_TIP})


def invalid_key() -> Answer:
    """Return the answer to a call with a key that is not taken."""
    return json_answer({"status": "error", "message": "Invalid Api Key", "tip": _KEY_TIP})


def invalid_field(name: str, complaint: str) -> Answer:
    """Return the answer to an order with a field that is not taken: the message is an object."""
    return json_answer({"status": "error", "message": {name: [complaint]}})


def no_such_route(path: str) -> Answer:
    """Return the answer to a path that the API does not have: a 404 of its framework, without a status word."""
    return json_answer({"message": f"The route {path.lstrip('/')} could not be found."}, status=404)


def unknown_id() -> Answer:
    """Return the answer about an id that no job has: `failed`, and only the message tells it from a failure."""
    return json_answer({"status": "failed", "id": "", "message": "Request not found", "output": "", "tip": TIP})


def parse_body(content_type: str, raw: bytes) -> Mapping[str, Any] | None:
    """Return the JSON object of a call, or None where there is none that can be read."""
    if "application/json" not in content_type.lower():
        return None
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
