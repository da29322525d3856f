"""The condition that a URL in a column is at a host."""

from typing import Any

from sqlalchemy import ColumnElement, or_


def is_at_host(url: ColumnElement[Any], host: str) -> ColumnElement[bool]:
    """Return the condition that a URL is at this host, which has a port if the URL has one."""
    origins = [f"{scheme}://{host}" for scheme in ("https", "http")]
    after_host = [url.startswith(origin + mark, autoescape=True) for origin in origins for mark in ("/", "?")]
    return or_(url.in_(origins), *after_host)
