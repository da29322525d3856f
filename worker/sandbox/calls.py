"""Counters of the requests that the stand-in received."""

import json
from collections import Counter, deque
from dataclasses import dataclass, field

MAX_FETCH_TIMES = 100_000


@dataclass(slots=True)
class Calls:
    """The requests that the stand-in received so far."""

    by_path: Counter[str] = field(default_factory=Counter)
    orders: Counter[str] = field(default_factory=Counter)  # by path below /api/, for any answer
    fetches: Counter[str] = field(default_factory=Counter)  # by job id, for any answer
    fetches_after_success: Counter[str] = field(default_factory=Counter)  # by job id, after an answer with success
    fetch_answers: Counter[str] = field(default_factory=Counter)  # by status field of the answer
    fetch_moments: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=MAX_FETCH_TIMES))
    """Time of each fetch by the clock of the stand-in, and the job id."""
    pictures: Counter[str] = field(default_factory=Counter)  # GETs that returned the output, by name
    pictures_missing: Counter[str] = field(default_factory=Counter)  # GETs that did not, by name
    webhooks: list[tuple[str, int]] = field(default_factory=list)  # URLs that were called, with the HTTP status


def status_text(body: bytes) -> str:
    """Return the status field of an answer, or `unreadable`."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return "unreadable"
    return str(content.get("status")) if isinstance(content, dict) else "unreadable"
