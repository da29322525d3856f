"""How values are put before a reader: ages, sizes, moments, hosts. Pure; whatever shows them escapes them."""

import re
from datetime import datetime
from urllib.parse import urlsplit

_LINK = re.compile(r"""(https?://[^\s/?#"'<>,]+)[/?#][^\s"'<>,]*""")
UNITS = (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1))


def age(seconds: float) -> str:
    """A length of time in one or two units.

    >>> age(4.2), age(75), age(3_700), age(200_000)
    ('4 s', '1 min 15 s', '1 h 1 min', '2 d 7 h')
    """
    left = max(0, int(seconds))
    for unit, length, smaller, least in UNITS:
        if left >= length:
            rest = left % length // least
            return f"{left // length} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{left} s"


def size(count: int) -> str:
    """Bytes as people say them.

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
    """A time in UTC, to the second.

    >>> moment(None)
    ''
    """
    return "" if value is None else f"{value:%Y-%m-%d %H:%M:%S}"


def host_of(url: str) -> str:
    """The host of a link: all of it that is shown, since whoever has a signed link needs no login.

    >>> host_of("https://cdn.example/a/b.png?Signature=secret"), host_of("data:image/png;sha256=ab"), host_of("https://[")
    ('cdn.example', 'data:', '?')
    """
    try:
        parts = urlsplit(url)
        return parts.hostname or f"{parts.scheme}:"
    except ValueError:
        return "?"


def counted(number: int, one: str) -> str:
    """How many there are of something.

    >>> counted(1, "job"), counted(1200, "job")
    ('1 job', '1,200 jobs')
    """
    return f"{number:,} {one}" + ("" if number == 1 else "s")


def without_links(text: str | None) -> str:
    """A text whose links end with their host.

    >>> without_links("404 of https://cdn.example/a.png?Signature=secret, again later")
    '404 of https://cdn.example/…, again later'
    """
    return _LINK.sub(r"\1/…", text or "")
