"""What the API's answer means: (HTTP status, headers, body) in, one typed reply out. Pure, and total: it never raises.

The order of the rules matters, and is the order of `parse`: redirects, JSON, rate limits, keys, server trouble, then
the status word. Messages are believed only where the answer calls itself an error, since prompts echoed in a success
can contain any words.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from worker.core.json_size import MAX_VALUES, too_many_values
from worker.core.links import Link, left_out, listed
from worker.core.plain_text import plain_text

Hold = Literal["key", "credits", "plan", "request"]

RETRY_DEFAULT = 30.0
RETRY_LEAST = 1.0
RETRY_MOST = 900.0
MAX_MESSAGE = 500

WAITING = frozenset({"processing", "queued", "pending", "in_progress", "in progress", "starting", "started", "running"})

_LIMITED = re.compile(r"rate limit|limit exceeded|spam filter|too many (?:requests|attempts)", re.IGNORECASE)
_KEY = re.compile(r"invalid api key|api key (?:is )?required|api key.{0,40}(?:expired|revoked|invalid)", re.IGNORECASE)
_CREDITS = re.compile(
    r"insufficient (?:credits?|balance|funds)|out of credits|not enough credits|credits? (?:are |is )?exhausted",
    re.IGNORECASE,
)
_PLAN = re.compile(
    r"subscription (?:is |has |was )?(?:expired|required|ended)|requires an? [a-z ]{0,30}subscription", re.IGNORECASE
)
_REQUEST = re.compile(r"invalid api request", re.IGNORECASE)
_UNKNOWN = re.compile(
    r"request (?:was |is )?not found|specified id|\bid (?:does not exist|is not queued)|no such (?:request|id)"
    r"|not queued",
    re.IGNORECASE,
)
_SERVER = re.compile(
    r"(?:internal )?server error\b.{0,60}|(?:the )?service (?:is )?(?:temporarily )?unavailable\b.{0,60}", re.IGNORECASE
)
_WAIT = re.compile(r"(\d{1,6})\s*(second|sec|minute|min)\w*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Processing:
    """Not ready yet; ask again. `eta` in seconds from now, in the rare answer that has one."""

    eta: float | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """Done: `outputs` is what was made (empty for a trained model), but for the `left_out` last of a long list."""

    outputs: tuple[Link, ...]
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Empty:
    """Success that lists no output."""


@dataclass(frozen=True, slots=True)
class AnotherJob:
    """A success that echoes another job's id: it says nothing about this one."""

    echoed: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The API says that the job failed."""

    message: str


@dataclass(frozen=True, slots=True)
class UnknownId:
    """The API knows no such job, yet or any more."""

    message: str


@dataclass(frozen=True, slots=True)
class ApiError:
    """An `error` of no other class: about this request, as far as can be told."""

    message: str


@dataclass(frozen=True, slots=True)
class Odd:
    """An answer that makes no sense (unknown status, no JSON). Keep asking."""

    message: str


@dataclass(frozen=True, slots=True)
class RateLimited:
    """Asked too often: the whole account waits `seconds`."""

    seconds: float
    message: str


@dataclass(frozen=True, slots=True)
class AccountRefused:
    """The API refuses the account, not the job: its key, its credits, its plan, or the way we ask."""

    reason: Hold
    message: str


@dataclass(frozen=True, slots=True)
class ApiDown:
    """The API, or the way to it, is in trouble: no connection, time-out, 5xx, challenge page, redirect."""

    message: str


Reply = (
    Processing
    | Ready
    | Empty
    | AnotherJob
    | Failed
    | UnknownId
    | ApiError
    | Odd
    | RateLimited
    | AccountRefused
    | ApiDown
)


def parse(
    status: int, headers: Mapping[str, str], body: bytes, *, remote_id: str, now: float, training: bool = False
) -> Reply:
    """The reply that an HTTP answer stands for. `now` is Unix seconds, for waits that are given as dates."""
    if 300 <= status < 400:
        return ApiDown(f"HTTP {status}: the API redirects; a redirect is never followed with a key. Check SD_API_URL")
    answer = json_object(body)
    if status == 429:
        return RateLimited(_retry_after(headers, answer or {}, now), message_of(answer or {}) or "HTTP 429")
    if answer is None:
        return _not_json(status, headers, body, now)
    word = status_of(answer)
    message = message_of(answer)
    if word == "error" or (word == "" and status >= 400):
        refusal = _refusal(message)
        if refusal == "limited":
            return RateLimited(_retry_after(headers, answer, now), message)
        if refusal is not None:
            return AccountRefused(refusal, message)
    if status in (401, 402, 403):
        reasons: dict[int, Hold] = {401: "key", 402: "credits", 403: "plan"}
        return AccountRefused(reasons[status], message or f"HTTP {status}")
    if status >= 500 or (word in ("", "error") and _SERVER.fullmatch(message.strip())):
        return ApiDown(f"HTTP {status}: {message}" if message else f"HTTP {status}")
    return _about_the_job(status, word, message, answer, remote_id, training)


def _about_the_job(
    status: int, word: str, message: str, answer: dict[str, Any], remote_id: str, training: bool
) -> Reply:
    if word in WAITING:
        return Processing(_eta(answer.get("eta")))
    if word in ("failed", "error") and (status == 404 or _UNKNOWN.search(message)):
        return UnknownId(message or f"HTTP {status}")
    if word == "" and status == 404 and _UNKNOWN.search(message):  # any other 404 may be a wrong SD_API_URL
        return UnknownId(message)
    if word == "failed":
        return Failed(message or "failed, without a message")
    if word == "error":
        return ApiError(message or f"HTTP {status}, without a message")
    if word != "success":
        return Odd(f"unknown status {word[:60]!r}" if word else f"HTTP {status} without a status")
    if status >= 400:
        return Odd(f"HTTP {status} that says success")
    if training:
        state = message.strip().lower()
        return Ready(()) if state == "model_ready" else Processing()
    return _success(answer, remote_id)


def _success(answer: dict[str, Any], remote_id: str) -> Reply:
    echoed = answer.get("id")
    if isinstance(echoed, float) and echoed.is_integer():
        echoed = int(echoed)
    if isinstance(echoed, (str, int)) and not isinstance(echoed, bool):
        text = str(echoed).strip() if isinstance(echoed, str) else f"{echoed:d}"
        if text and text != remote_id:
            return AnotherJob(plain_text(text[:128]))
    outputs = listed(answer)
    return Ready(outputs, left_out(answer)) if outputs else Empty()


def _refusal(message: str) -> Hold | Literal["limited"] | None:
    """Rate limits before keys: "limit exceeded" comes with any code."""
    rules: tuple[tuple[re.Pattern[str], Hold | Literal["limited"]], ...] = (
        (_LIMITED, "limited"),
        (_KEY, "key"),
        (_CREDITS, "credits"),
        (_PLAN, "plan"),
        (_REQUEST, "request"),
    )
    return next((name for rule, name in rules if rule.search(message)), None)


def _not_json(status: int, headers: Mapping[str, str], body: bytes, now: float) -> Reply:
    start = body[:MAX_MESSAGE].decode("utf-8-sig", "replace").lstrip()
    if too_many_values(body):
        return Odd(f"HTTP {status} with JSON of more than {MAX_VALUES:,} values ({len(body)} bytes)")
    page = start.startswith("<")
    what = "an HTML page" if page else "no JSON object"
    if status >= 500 or (status >= 400 and page and status != 404):
        return ApiDown(f"HTTP {status} with {what}")
    if status == 404 and not page and _UNKNOWN.search(start):
        return UnknownId(plain_text(start))
    return Odd(f"HTTP {status} with {what} ({len(body)} bytes)")


def json_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object in `body`, or None for anything else, however broken or hostile.

    >>> json_object(b'\\xef\\xbb\\xbf{"status": "processing"}')
    {'status': 'processing'}
    >>> json_object(b"[" * 100_000) is None
    True
    """
    if too_many_values(body):
        return None
    try:
        answer = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def status_of(answer: Mapping[str, Any]) -> str:
    """The status word in lower case; empty where there is none, or where it is no text."""
    status = answer.get("status")
    return plain_text(status.strip()[:100]).strip().lower() if isinstance(status, str) else ""


def message_of(answer: Mapping[str, Any]) -> str:
    """The message, under either of its spellings, as plain text of at most 500 characters."""
    message = next((answer[name] for name in ("message", "messege") if answer.get(name)), "")
    if not isinstance(message, str):
        try:
            message = json.dumps(message, ensure_ascii=False, default=str)
        except (ValueError, RecursionError):
            message = type(message).__name__
    return plain_text(message[:MAX_MESSAGE])


def _eta(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and number > 0 else None


def _retry_after(headers: Mapping[str, str], answer: Mapping[str, Any], now: float) -> float:
    """Seconds to wait, from wherever the answer says so, clamped to 1 s and 15 min; 30 s where it does not say."""
    named = {name.lower(): value for name, value in headers.items()}
    for wait in (
        retry_after_seconds(named.get("retry-after"), now),
        _number(answer.get("retry_after")),
        _reset(named.get("x-ratelimit-reset"), now),
        _words(answer),
    ):
        if wait is not None:
            return min(max(wait, RETRY_LEAST), RETRY_MOST)
    return RETRY_DEFAULT


def retry_after_seconds(value: str | None, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks for: a number or a date. `now` is in seconds since 1970.

    >>> retry_after_seconds("120", 0.0), retry_after_seconds("Thu, 01 Jan 1970 00:01:00 GMT", 0.0)
    (120.0, 60.0)
    """
    number = _number(value)
    return _date(value, now) if number is None else number


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _date(value: str | None, now: float) -> float | None:
    if not value:
        return None
    try:
        at = parsedate_to_datetime(value)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - now
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _reset(value: str | None, now: float) -> float | None:
    at = _number(value)
    return None if at is None or at <= now else at - now


def _words(answer: Mapping[str, Any]) -> float | None:
    texts = [message_of(answer), *(answer[name] for name in ("tips", "tip") if isinstance(answer.get(name), str))]
    for text in (text[:MAX_MESSAGE] for text in texts):
        if match := _WAIT.search(text):
            return int(match[1]) * (60.0 if match[2].lower().startswith("min") else 1.0)
    return None
