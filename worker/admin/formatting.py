"""Format values for the pages: ages, sizes, times and hosts. Pure; the templates escape the results."""

import re
from datetime import datetime
from urllib.parse import urlsplit

_LINK = re.compile(r"""(https?://[^\s/?#"'<>,]+)[/?#][^\s"'<>,]*""")
UNITS = (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1))


def age(seconds: float) -> str:
    """Format a duration in one or two units.

    >>> age(4.2), age(75), age(3_700), age(200_000)
    ('4 s', '1 min 15 s', '1 h 1 min', '2 d 7 h')
    """
    whole_seconds = max(0, int(seconds))
    for unit, length, smaller_unit, smaller_length in UNITS:
        if whole_seconds >= length:
            remainder = whole_seconds % length // smaller_length
            return f"{whole_seconds // length} {unit}" + (f" {remainder} {smaller_unit}" if remainder else "")
    return f"{whole_seconds} s"


def size(count: int) -> str:
    """Format a number of bytes.

    >>> size(999), size(391_002), size(5_000_000_000)
    ('999 bytes', '391 kB', '5.0 GB')
    """
    if count < 1_000:
        return f"{count} bytes"
    for unit, bytes_each in (("GB", 10**9), ("MB", 10**6)):
        if count >= bytes_each:
            return f"{count / bytes_each:.1f} {unit}"
    return f"{count // 1_000} kB"


def moment(value: datetime | None) -> str:
    """Format a time in UTC, to the second.

    >>> moment(None)
    ''
    """
    return "" if value is None else f"{value:%Y-%m-%d %H:%M:%S}"


def host_of(url: str) -> str:
    """Return the host of a link. The rest is not shown, because a signed link needs no login.

    >>> host_of("https://cdn.example/a/b.png?Signature=secret"), host_of("data:image/png;sha256=ab"), host_of("https://[")
    ('cdn.example', 'data:', '?')
    """
    try:
        parts = urlsplit(url)
        return parts.hostname or f"{parts.scheme}:"
    except ValueError:
        return "?"


def without_links(text: str | None) -> str:
    """Cut the links in a text after their host.

    >>> without_links("404 of https://cdn.example/a.png?Signature=secret, again later")
    '404 of https://cdn.example/…, again later'
    """
    return _LINK.sub(r"\1/…", text or "")
