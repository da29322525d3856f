"""Read from an answer how long to wait after a rate limit: from headers, fields or the message."""

import re
from collections.abc import Mapping
from typing import Any

from worker.core.numbers import number, retry_after_seconds
from worker.vendor.answer_fields import MAX_MESSAGE

DEFAULT_RETRY_SECONDS = 30.0  # seconds, as in the vendor's own answers
MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 900.0
_DAY = 86_400.0

_TIME = r"(\d{1,6}(?:\.\d{1,3})?)\s*(seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h)\b"
_WAIT = re.compile(_TIME, re.IGNORECASE)
_WAIT_IN = re.compile(
    rf"\b(?:in|after|wait)\b[a-z ]{{0,30}}{_TIME}", re.IGNORECASE
)  # the wait, not the period of a limit
_MILLISECONDS = 1e11  # larger numbers are milliseconds: as seconds they would be after the year 5138
_RETRY_FIELDS = ("retry_after", "retryAfter")


def retry_after(
    headers: Mapping[str, str],
    fields: Mapping[str, Any],
    message: str,
    now: float,
    default: float = DEFAULT_RETRY_SECONDS,
) -> float:
    """Return the seconds to wait, between 1 s and 15 min, or `default`. `now` is in seconds since 1970.

    >>> retry_after({}, {}, "5 requests per 60 seconds, try again in 12 s", 1.7e9)
    12.0
    """
    headers = {name.lower(): value for name, value in headers.items()}
    error = fields.get("error")
    inner = error if isinstance(error, dict) else {}
    for wait in (
        retry_after_seconds(headers.get("retry-after"), now),
        *(number(holder.get(name)) for holder in (fields, inner) for name in _RETRY_FIELDS),
        _until(headers.get("x-ratelimit-reset"), now),
        _wait_in_words(message, fields),
    ):
        if wait is not None:
            return min(max(wait, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
    return default


def _until(value: str | None, now: float) -> float | None:
    at = number(value)
    if at is not None and at > _MILLISECONDS:
        at /= 1_000
    if at is not None and 0 < at <= _DAY < now:
        return at  # some servers send the remaining seconds instead of a time
    return None if at is None or at <= now else at - now


def _wait_in_words(message: str, fields: Mapping[str, Any]) -> float | None:
    texts = [message, *(fields[name] for name in (*_RETRY_FIELDS, "tips", "tip") if isinstance(fields.get(name), str))]
    for text in (text[:MAX_MESSAGE] for text in texts):
        if match := _WAIT_IN.search(text) or _WAIT.search(text):
            unit = match[2].lower()
            return float(match[1]) * (3_600.0 if unit.startswith("h") else 60.0 if unit.startswith("m") else 1.0)
    return None
