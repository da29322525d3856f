"""The outputs that an answer lists, in whatever shape the API wrote them: one `Link` each, in order, none twice."""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_LINKS = 1_000
MAX_URL = 8_192
MAX_DEPTH = 8

_DATA = re.compile(r"data:(?P<head>[^,]{0,200}),", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_LEAST_BASE64 = 64  # shorter text is a word, not a file


@dataclass(frozen=True, slots=True)
class Link:
    """One output: where it is (`url`), where else it may be (`proxies`), or the bytes themselves (`body`)."""

    url: str
    proxies: tuple[str, ...] = ()
    body: bytes | None = None


def links(output: object, proxy_links: object = None) -> tuple[Link, ...]:
    """Every output that `output` lists (text, list, object, nested), each with the proxy link of its place.

    >>> links("https://h/a.png")
    (Link(url='https://h/a.png', proxies=(), body=None),)
    >>> links(["https://h/a.png", "", "https://h/a.png"], "")
    (Link(url='https://h/a.png', proxies=(), body=None),)
    """
    texts = list(_texts(output))
    proxies = [text for text in _texts(proxy_links) if text.lower().startswith(("https://", "http://"))]
    paired = proxies if len(proxies) == len(texts) else []
    found: dict[str, Link] = {}
    for place, text in enumerate(texts[:MAX_LINKS]):
        link = _link(text, (paired[place],) if paired and paired[place] != text else ())
        found.setdefault(link.url, link)
    return tuple(found.values())


def _texts(value: object, depth: int = 0) -> Iterator[str]:
    if isinstance(value, str):
        if text := value.strip():
            yield text
    elif isinstance(value, (list, dict)) and depth < MAX_DEPTH:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item, depth + 1)


def _link(text: str, proxies: tuple[str, ...]) -> Link:
    data = _DATA.match(text)
    if data:
        encoded = text[data.end() :] if data["head"].lower().endswith(";base64") else None
        return _decoded(encoded, "data:" + data["head"].split(";")[0].strip()[:100])
    if len(text) >= _LEAST_BASE64 and _BASE64.fullmatch(text):
        return _decoded(text, "data:")
    return Link(text if len(text) <= MAX_URL else text[:MAX_URL] + "…", proxies)


def _decoded(encoded: str | None, prefix: str) -> Link:
    try:
        body = base64.b64decode("".join((encoded or "").split()), validate=True)
    except (binascii.Error, ValueError):
        body = b""  # an empty body is no media: the output ends by the ordinary rule, it is not dropped
    return Link(f"{prefix};sha256={hashlib.sha256(body).hexdigest()}", (), body)
