"""Read the fields of an answer, in all spellings that the API uses. No function here raises."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from worker.core.json_size import too_many_values
from worker.core.numbers import positive_number
from worker.core.plain_text import plain_text

MAX_MESSAGE = 500
MESSAGE_FIELDS = ("message", "messege", "error_message", "msg", "detail", "title")
_FALLBACK_MESSAGE_FIELDS = ("reason", "description", "data", "result", "tips")  # used if all the fields above are empty
_MAX_ERRORS = 10  # the number of errors in one answer that are read
_CODE_FIELDS = ("code", "error_code", "status_code", "statusCode", "status")
_ABOUT_THE_CALLER = frozenset({401, 402, 403, 429})
_STATE_FIELDS = ("model_training_status", "training_status")
_TRAINING_FIELDS = (*_STATE_FIELDS, "messege", "message")


def json_object(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object in `body`, or None if there is none. `body` may be any bytes.

    >>> json_object(b'\\xef\\xbb\\xbf{"status": "processing"}')
    {'status': 'processing'}
    >>> json_object(b"[" * 100_000) is None
    True
    """
    answer = json_value(body)
    return answer if isinstance(answer, dict) else None


def json_value(body: bytes) -> Any:
    """Return the JSON value in `body`, or None if there is none or it has too many values. `body` may be any bytes.

    >>> json_value(b'[{"id": 7}]'), json_value(b"<html>")
    ([{'id': 7}], None)
    """
    if too_many_values(body):
        return None
    try:
        return json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def status_of(answer: Mapping[str, Any]) -> str:
    """Return the status word in lower case, or an empty string.

    The status is `error` if the answer says `false`, names an HTTP error code, or has an `error` but no status. It is
    `success` if the answer says `true`.

    >>> status_of({"status": " SUCCESS"}), status_of({"success": False}), status_of({"error": "No credits"})
    ('success', 'error', 'error')
    """
    status = answer.get("status")
    if isinstance(status, str) and not status.strip().isdecimal():
        return plain_text(status.strip()[:100]).strip().lower()
    if status is False or http_status_of(answer) is not None:
        return "error"
    if isinstance(status, str):
        return plain_text(status.strip()[:100]).strip()
    if status is None and (answer.get("success") is False or answer.get("error") or answer.get("errors")):
        return "error"
    if status is True or (status is None and answer.get("success") is True):
        return "success"
    return ""


def http_status_of(answer: Mapping[str, Any]) -> int | None:
    """Return the HTTP error code that an answer contains as its status, or None.

    Other fields with a code are read only if the answer has no status of the job, and only for codes about the caller
    (401, 402, 403, 429).

    >>> http_status_of({"status": 401, "message": "Unauthenticated."}), http_status_of({"error": {"code": "402"}})
    (401, 402)
    """
    status = answer.get("status")
    code = _whole_number(status)
    if code is not None and 400 <= code < 600:
        return code
    if status is True or (isinstance(status, str) and status.strip().lower() not in ("", "error")):
        return None
    if status is None and answer.get("success") is True:
        return None
    error = answer.get("error")
    holders = (answer, error) if isinstance(error, dict) else (answer,)
    codes = (_whole_number(holder.get(name)) for holder in holders for name in _CODE_FIELDS)
    return next((code for code in codes if code in _ABOUT_THE_CALLER), None)


def _whole_number(value: object) -> int | None:
    if isinstance(value, str) and len(value) <= 9 and value.strip().isdecimal():
        return int(value)
    return value if type(value) is int else None


def message_of(answer: Mapping[str, Any]) -> str:
    """Return the message from any of its fields, as plain text of at most 500 characters.

    >>> message_of({"messege": "try again later."})
    'try again later.'
    >>> message_of({"error": {"code": "unauthenticated", "message": "No key."}})
    'No key.'
    """
    message = next((answer[name] for name in MESSAGE_FIELDS if answer.get(name)), None)
    if message is None:
        error = answer.get("error") or answer.get("errors")
        if isinstance(error, list) and len(error) == 1:
            error = error[0]
        message = (message_of(error) or error.get("code") or error) if isinstance(error, dict) else error
    if not message or message is True:
        fallback = next((answer[name] for name in _FALLBACK_MESSAGE_FIELDS if answer.get(name)), "")
        message = message_of(fallback) if isinstance(fallback, dict) else fallback
    if not isinstance(message, str):
        try:
            message = json.dumps(message, ensure_ascii=False, default=str)
        except (ValueError, RecursionError):
            message = type(message).__name__
    return plain_text(message[:MAX_MESSAGE])


def other_error_texts(answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the error texts besides the message: from all message fields, from the errors, and from their codes.

    >>> list(other_error_texts({"message": "Error", "error": "Insufficient credits"}))
    ['Error', 'Insufficient credits', '']
    """
    for name in MESSAGE_FIELDS:
        if answer.get(name):
            yield message_of({"message": answer[name]})
    for name in ("error", "errors"):
        error = answer.get(name)
        for part in error[:_MAX_ERRORS] if isinstance(error, list) else [error]:
            text = message_of(part) if isinstance(part, dict) else ""
            if part:
                yield text or message_of({"message": part})
            if isinstance(part, dict):
                yield code_of(part)
    yield code_of(answer)


def code_of(answer: Mapping[str, Any]) -> str:
    """Return the machine-readable code of an error, with blanks for `_` and `-`, or an empty string.

    >>> code_of({"error": {"code": "insufficient_credits", "message": "x"}})
    'insufficient credits'
    """
    error = answer.get("error")
    holders = [error, answer] if isinstance(error, dict) else [answer]
    for holder in holders:
        for name in ("code", "error_code", "type"):
            code = holder.get(name)
            if isinstance(code, str):
                return plain_text(code[:100]).replace("_", " ").replace("-", " ").lower()
    return ""


def training_state(word: str) -> str:
    """Return a word in the spelling of training states: lower case, with `_` for blanks.

    >>> training_state(" Model-Ready ")
    'model_ready'
    """
    return "_".join(word.lower().replace("-", " ").split())


def training_states(answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts that may be the state of a training, in the spelling of `training_state`.

    >>> list(training_states({"messege": "Model Ready"}))
    ['model_ready']
    """
    for name in _TRAINING_FIELDS:
        word = answer.get(name)
        if isinstance(word, str) and word.strip():
            state = training_state(word[:100])
            # `error` as the state of the training means that it failed. In a message it may be about the request.
            yield "failed" if state == "error" and name in _STATE_FIELDS else state


def execution_of(answer: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the workflow run of an answer, or None. The `status` next to it describes only the request."""
    execution = answer.get("execution")
    return execution if isinstance(execution, dict) else None


def chat_id_of(answer: Mapping[str, Any]) -> object:
    """Return the `chat_id` of an answer, or that of its `meta`."""
    meta = answer.get("meta")
    return answer.get("chat_id") or (meta.get("chat_id") if isinstance(meta, dict) else None)


def eta_of(answer: Mapping[str, Any]) -> float | None:
    """Return the estimated seconds until the job is ready, or None if the answer contains no number for it.

    >>> eta_of({"eta": 20.9}), eta_of({"eta": "30 Minutes"}), eta_of({"estimated_time": 12})
    (20.9, None, 12.0)
    """
    return positive_number(answer.get("eta")) or positive_number(answer.get("estimated_time"))
