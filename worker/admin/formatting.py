"""Format times and texts for the pages. Pure; the templates escape the results."""

import re
from datetime import datetime

_LINK = re.compile(r"""(https?://[^\s/?#"'<>,]+)[/?#][^\s"'<>,]*""")


def moment(value: datetime | None) -> str:
    """Format a time in UTC, to the second.

    >>> moment(None)
    ''
    """
    return "" if value is None else f"{value:%Y-%m-%d %H:%M:%S}"


def without_links(text: str | None) -> str:
    """Cut the links in a text after their host.

    >>> without_links("404 of https://cdn.example/a.png?Signature=secret, again later")
    '404 of https://cdn.example/…, again later'
    """
    return _LINK.sub(r"\1/…", text or "")
