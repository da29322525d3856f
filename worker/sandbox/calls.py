"""What was asked of the stand-in so far."""

import json
from collections import Counter, deque
from dataclasses import dataclass, field

MOMENTS_KEPT = 100_000


@dataclass(slots=True)
class Calls:
    """What was asked of the stand-in so far."""

    by_path: Counter[str] = field(default_factory=Counter)
    orders: Counter[str] = field(default_factory=Counter)  # by path below /api/, whatever was answered
    fetches: Counter[str] = field(default_factory=Counter)  # by job id, whatever was answered
    fetches_after_success: Counter[str] = field(default_factory=Counter)  # by job id, after a success was answered
    fetch_answers: Counter[str] = field(default_factory=Counter)  # by status text of the answer
    fetch_moments: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=MOMENTS_KEPT))
    """When each fetch came, by the clock of the stand-in, and the job id."""
    pictures: Counter[str] = field(default_factory=Counter)  # GETs that had the output, by name
    pictures_missing: Counter[str] = field(default_factory=Counter)  # GETs that had not, by name
    webhooks: list[tuple[str, int]] = field(default_factory=list)  # addresses called, and the HTTP status of each


def status_text(body: bytes) -> str:
    """Return the status word of an answer, or `unreadable`."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return "unreadable"
    return str(content.get("status")) if isinstance(content, dict) else "unreadable"
