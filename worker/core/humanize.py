"""Durations, byte sizes and times as text. Pure."""

from datetime import datetime


def format_duration(seconds: float) -> str:
    """Return a duration as a short text.

    >>> format_duration(0.25), format_duration(75.0), format_duration(600.0)
    ('0.2 s', '75 s', '10 min')
    >>> format_duration(-0.0)
    '0.0 s'
    >>> format_duration(9_000.0), format_duration(400_000.0)
    ('2.5 h', '4.6 d')
    """
    seconds = max(0.0, seconds)  # in this order: max(-0.0, 0.0) is -0.0
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7_200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3_600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"


def format_bytes(count: float) -> str:
    """Return a number of bytes as a short text.

    >>> format_bytes(0), format_bytes(1_500), format_bytes(3_900_000)
    ('0 B', '1.5 kB', '3.9 MB')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1_000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1_000
    return f"{count:.1f} GB"


def format_count(count: int, noun: str) -> str:
    """Return a number and its noun, in the plural unless the number is 1.

    >>> format_count(1, "attempt"), format_count(0, "attempt"), format_count(1200, "job")
    ('1 attempt', '0 attempts', '1,200 jobs')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def iso_time(moment: datetime) -> str:
    """Return a time of UTC in ISO 8601, with Z.

    >>> from datetime import UTC
    >>> iso_time(datetime(2026, 3, 1, 12, tzinfo=UTC))
    '2026-03-01T12:00:00Z'
    """
    return moment.isoformat().replace("+00:00", "Z")
