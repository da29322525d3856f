"""Spans of time and numbers of bytes in a few characters, as a person reads them. Pure."""


def span(seconds: float) -> str:
    """A span of time in a few characters.

    >>> span(0.25), span(75.0), span(600.0), span(9_000.0), span(400_000.0)
    ('0.2 s', '75 s', '10 min', '2.5 h', '4.6 d')
    """
    seconds = max(seconds, 0.0)
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7_200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3_600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"


def size(count: float) -> str:
    """A number of bytes in a few characters.

    >>> size(0), size(1_500), size(3_900_000)
    ('0 B', '1.5 kB', '3.9 MB')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1_000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1_000
    return f"{count:.1f} GB"
