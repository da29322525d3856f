"""The outputs that an answer lists, in whatever shape the API wrote them: one `Link` each, in order, none twice."""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from worker.core.plain_text import plain_text

MAX_LINKS = 1_000
MAX_URL = 8_192
MAX_DEPTH = 8

_DATA = re.compile(r"data:(?P<head>[^,]{0,200}),", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]++={0,2}")  # possessive: megabytes that do not match cost one pass
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LEAST_BASE64 = 64  # shorter text is a word, not a file


@dataclass(frozen=True, slots=True)
class Link:
    """One output: where it is (`url`), where else it may be (`proxies`), or the bytes themselves (`body`)."""

    url: str
    proxies: tuple[str, ...] = ()
    body: bytes | None = None


def listed(answer: Mapping[str, object]) -> tuple[Link, ...]:
    """What a success lists: its `output`, else its `proxy_links`, else its `links`; never its `future_links`."""
    proxies = answer.get("proxy_links")
    return links(answer.get("output"), proxies) or links(proxies) or links(answer.get("links"))


def left_out(answer: Mapping[str, object]) -> int:
    """How many outputs a success lists beyond those that `listed` returns."""
    for name in ("output", "proxy_links", "links"):
        if texts := list(_texts(answer.get(name))):
            return len(set(texts[MAX_LINKS:]).difference(texts[:MAX_LINKS]))
    return 0


def left_out_note(listed: int, missing: int) -> str:
    """The note for a job of whose outputs some are not stored.

    >>> left_out_note(1000, 500)
    'the answer listed 1,500 outputs; only the first 1,000 are stored'
    """
    return f"the answer listed {listed + missing:,} outputs; only the first {listed:,} are stored"


def links(output: object, proxy_links: object = None) -> tuple[Link, ...]:
    """Every output that `output` lists (text, list, object, nested), each with the proxy link of its place.

    >>> links("https://h/a.png")
    (Link(url='https://h/a.png', proxies=(), body=None),)
    >>> links(["https://h/a.png", "", "https://h/a.png"], "")
    (Link(url='https://h/a.png', proxies=(), body=None),)
    """
    texts = list(_texts(output))
    addresses = [text for text in _texts(proxy_links) if text.lower().startswith(("https://", "http://"))]
    proxies = [stored_address(text) if len(text) <= MAX_URL else "" for text in addresses]
    paired = proxies if len(proxies) == len(texts) else []
    found: dict[str, Link] = {}
    for place, text in enumerate(texts[:MAX_LINKS]):
        link = _link(text, (paired[place],) if paired and paired[place] not in ("", text) else ())
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
        content = text[data.end() :]
        media_type = plain_text(data["head"].split(";")[0].strip()[:100])
        body = _decoded(content) if data["head"].lower().endswith(";base64") else _unquoted(content)
        return _inline(body, f"data:{media_type}")
    if len(text) >= _LEAST_BASE64 and _BASE64.fullmatch(text):
        return _inline(_decoded(text), "data:")
    return Link(stored_address(text), proxies)


def stored_address(text: str) -> str:
    r"""Return an address as it is stored. A control character becomes an escape, whose backslash has it refused.

    >>> stored_address("https://h/a\nb")
    'https://h/a\\nb'
    """
    text = text if len(text) <= MAX_URL else text[:MAX_URL] + "…"
    return plain_text(_CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text))


def _inline(body: bytes, prefix: str) -> Link:
    return Link(f"{prefix};sha256={hashlib.sha256(body).hexdigest()}", (), body)


def _decoded(encoded: str) -> bytes:
    """The bytes that base64 stands for; what is none stays as it is: no media, so it ends by the ordinary rule."""
    digits = "".join(encoded.split())
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError):
        return encoded.encode("utf-8", "replace")


def _unquoted(content: str) -> bytes:
    return unquote_to_bytes(content.encode("utf-8", "replace"))
