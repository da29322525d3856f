"""Parse durations such as `30d`, `12h`, `90m`, `45s`, or a number of seconds."""

import math

UNITS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}


def parse_duration(text: str) -> float:
    """Return the seconds of a duration. Raises ValueError with a message for the user.

    >>> parse_duration("30d"), parse_duration("1.5h"), parse_duration("90")
    (2592000.0, 5400.0, 90.0)
    """
    word = text.strip().lower()
    unit = UNITS.get(word[-1:], 0.0)
    try:
        seconds = float(word[:-1]) * unit if unit else float(word)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError("must be a duration such as 30d, 12h, 90m or 3600 (seconds)")
    return seconds


def shortest_duration(seconds: float) -> str:
    """Return seconds in the largest unit that gives a whole number, as `parse_duration` reads it.

    >>> shortest_duration(2592000.0), shortest_duration(5400.0), shortest_duration(0.5)
    ('30d', '90m', '0.5s')
    """
    unit = next((unit for unit in "dhm" if seconds and seconds % UNITS[unit] == 0), "s")
    return f"{seconds / UNITS[unit]:.15g}{unit}"
