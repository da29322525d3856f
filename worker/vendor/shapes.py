"""The shape of an answer: a short, stable description of its structure. Unread answers are grouped by it."""

import json
import re
from typing import Any

from worker.core.json_size import too_many_values
from worker.core.plain_text import plain_text
from worker.vendor.answer_fields import execution_of, json_object, status_of

MAX_SHAPE = 255
MAX_WORD = 40
TOO_LARGE = "too large"
MAX_FIELDS = 60
MAX_ITEMS = 200  # the number of items in a list whose types are read
MAX_LEVELS = 2  # the depth of objects, and of lists in lists

_ECHOED = frozenset({"meta", "metadata", "parameters", "params", "input", "inputs", "data_sent"})
# A field name with an id, a hash or a date is data: it differs in each answer.
_NAME = re.compile(r"(?![0-9a-fA-F]{8,40}$)[A-Za-z_][A-Za-z0-9_.-]{0,39}")
_DIGITS = re.compile(r"[0-9]")
MAX_DIGITS = 3
_NO_WORD = re.compile(r"[^\w .%-]+")
_NUMBER = re.compile(r"\b[0-9]+\b|[0-9]{3,}")


def shape_of(http_status: int, body: bytes) -> str:
    """Return the shape of an answer: HTTP status if it is not 200, status word, and the fields with their types.

    Only the status word and the field names are copied from the answer. A field name that may be data becomes `*`.

    >>> shape_of(200, b'{"status": "Done", "id": 7, "assets": ["https://h/a.png"]}')
    'status=done; assets: [text]; id: number'
    >>> shape_of(502, b"<html>")
    'HTTP 502; no JSON object: page'
    """
    code = [] if http_status == 200 else [f"HTTP {http_status}"]
    fields = json_object(body)
    parts = [f"no JSON object: {_other(body)}"] if fields is None else _object_parts(fields)
    return _cut("; ".join([*code, *parts]))


def _object_parts(fields: dict[str, Any]) -> list[str]:
    described = _fields(fields, depth=1)
    run = execution_of(fields)
    statuses = [_status(fields), None if run is None else _status(run, "execution status")]
    return [status for status in statuses if status is not None] + described or ["empty object"]


def _status(fields: Any, name: str = "status") -> str | None:
    if not isinstance(fields.get("status"), str):
        return None
    return f"{name}={status_word(status_of(fields)) or 'empty'}"


def status_word(text: str) -> str:
    """Return a status word for display, with `#` for numbers and `?` for special characters.

    >>> status_word("step 3 of 10"), status_word("rendering; see https://h")
    ('step # of #', 'rendering? see https?h')
    """
    return _NUMBER.sub("#", _NO_WORD.sub("?", text))[:MAX_WORD].strip()


def _fields(fields: dict[str, Any], depth: int) -> list[str]:
    by_name = {_name(name): fields[name] for name in sorted(fields)[:MAX_FIELDS]}
    return [
        f"{name}: {'object' if name in _ECHOED and isinstance(value, dict) else _type(value, depth)}"
        for name, value in sorted(by_name.items())
        if not (name == "status" and isinstance(value, str))
    ]


def _name(name: str) -> str:
    is_data = not _NAME.fullmatch(name) or len(_DIGITS.findall(name)) > MAX_DIGITS
    return "*" if is_data else name


def _type(value: object, depth: int, lists: int = 0) -> str:
    """Return the type of a value. The contents of objects and lists are described up to `MAX_LEVELS` levels."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "text"
        case list() if lists < MAX_LEVELS:
            return f"[{', '.join(sorted({_type(item, depth, lists + 1) for item in value[:MAX_ITEMS]}))}]"
        case dict() if depth < MAX_LEVELS:
            return "{" + ", ".join(_fields(value, depth + 1)) + "}"
        case list():
            return "list"
        case _:
            return "object"


def _other(body: bytes) -> str:
    """Return what a body contains if it is not a JSON object."""
    text = plain_text(body[:1_000].decode("utf-8-sig", "replace")).strip()
    if not text:
        return "nothing"
    if text.startswith("<"):
        return "page"
    if too_many_values(body):
        return "too many values"
    try:
        return _type(json.loads(body.decode("utf-8-sig")), depth=1)
    except (ValueError, RecursionError):
        return "broken JSON" if text.startswith(("{", "[")) else "plain text"


def _cut(shape: str) -> str:
    return shape if len(shape) <= MAX_SHAPE else f"{shape[: MAX_SHAPE - 1]}…"
