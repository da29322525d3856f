"""Format times and texts for the pages. Pure; the templates escape the texts."""

import re
from datetime import datetime

from markupsafe import Markup

_LINK = re.compile(r"""(https?://[^\s/?#"'<>,]+)[/?#][^\s"'<>,]*""")


def moment(value: datetime | None) -> str:
    """Format a time in UTC, to the second, as a `time` element. The script of the pages shows it as local time.

    >>> moment(None)
    ''
    """
    if value is None:
        return ""
    element = Markup('<time datetime="{}">{} UTC</time>')
    return element.format(f"{value:%Y-%m-%dT%H:%M:%SZ}", f"{value:%Y-%m-%d %H:%M:%S}")


def without_links(text: str | None) -> str:
    """Cut the links in a text after their host.

    >>> without_links("404 of https://cdn.example/a.png?Signature=secret, again later")
    '404 of https://cdn.example/…, again later'
    """
    return _LINK.sub(r"\1/…", text or "")
