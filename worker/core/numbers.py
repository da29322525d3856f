"""Parse numbers from answers and headers, which may contain any value."""

import math
from datetime import UTC
from email.utils import parsedate_to_datetime


def number(value: object) -> float | None:
    """Return a finite number, also from text. Return None for anything else.

    >>> number("20.9"), number(True), number(float("nan"))
    (20.9, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        parsed = float(value)
    except (ValueError, OverflowError):
        return None
    return parsed if math.isfinite(parsed) else None


def positive_number(value: object) -> float | None:
    """Return a finite number above zero. Return None for anything else.

    >>> positive_number("20.9"), positive_number(-1), positive_number(True)
    (20.9, None, None)
    """
    parsed = number(value)
    return parsed if parsed is not None and parsed > 0 else None


def retry_after_seconds(value: str | None, now: float) -> float | None:
    """Return the seconds in a Retry-After header, which is a number or a date. `now` is in seconds since 1970.

    >>> retry_after_seconds("120", 0.0), retry_after_seconds("Thu, 01 Jan 1970 00:01:00 GMT", 0.0)
    (120.0, 60.0)
    """
    seconds = number(value)
    return _seconds_until(value, now) if seconds is None else seconds


def _seconds_until(date: str | None, now: float) -> float | None:
    if not date:
        return None
    try:
        at = parsedate_to_datetime(date)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - now
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
