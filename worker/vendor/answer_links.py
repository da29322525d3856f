"""The links in an answer: the outputs that a success lists, and the URLs at which outputs are promised."""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from worker.core.json_size import too_many_values
from worker.core.plain_text import plain_text
from worker.core.reply import MAX_URL, Link

MAX_LINKS = 1_000
MAX_DEPTH = 8
MAX_PROMISED = 20

# The fields that contain the outputs of a success, in order of priority. The vendor's own command line tool reads
# `output`, then `output_url`, then `future_links`. `links` and `link` are used by voice and cropping. The others come
# from client libraries; some of them read an envelope (`data`, `result`) or the outputs repeated in `meta`.
OUTPUT_FIELDS = (
    "output",
    "outputs",
    "output_url",
    "output_urls",
    "proxy_links",
    "links",
    "link",
    "images",
    "videos",
    "audios",
    "files",
    "urls",
    "url",
    "assets",
    "result",
    "results",
    *("image_url", "video_url", "audio_url", "file_url", "download_url", "image", "video", "audio", "data"),
)
_MAIN_FIELDS = frozenset({"output", "outputs", "proxy_links", "links"})  # any text in them is an output
PROXY_FIELD = "proxy_links"
PROMISE_FIELD = "future_links"
_PROMISED_LINKS = "links"  # some queued orders list their future outputs only here
# Fields next to an output that contain other URLs: inputs of the order, previews, help pages, callbacks.
_NO_OUTPUT = re.compile(
    r"(?:^|[_-])(?:init|input|inputs|source|src|mask|target|reference|ref|prompt|thumbnail|thumb"
    r"|preview|poster|webhook|callback|docs|doc|help|tip|tips|tip_1|meta|metadata|message|messege|status|fetch|license"
    r"|page|homepage|website|schema)(?:$|[_-])"
)
_MODEL = re.compile(r"(?:^|[_-])model(?:$|[_-])")  # the model that was used; if it is a file, the model that was made
_MODEL_FILE = re.compile(r"\.(?:glb|gltf|obj|ply|fbx|stl|usdz|zip|safetensors)\b", re.IGNORECASE)
_PLACEHOLDERS = frozenset({"null", "none", "n/a", "undefined", "false", "true", "processing", "pending", "queued"})

_DATA = re.compile(r"data:(?P<head>[^,]{0,200}),", re.IGNORECASE)
_ADDRESS = re.compile(r"https?://[^\s/]", re.IGNORECASE)
_BETWEEN = re.compile(r"(?<![\s,])[\s,]++(?=https?://)", re.IGNORECASE)  # between the URLs in one text
# Line breaks are allowed, but blanks are not: text with blanks is a sentence. The quantifiers are possessive, so that
# megabytes of other text take only one pass.
_BASE64 = re.compile(r"[A-Za-z0-9+/\r\n]++={0,2}")
_NAMES_A_FILE = re.compile(r"/|^[A-Za-z][A-Za-z0-9+.-]{0,30}:.|[^.]\.(?=[0-9]?[A-Za-z])[A-Za-z0-9]{2,11}$")
_BLANK = re.compile(r"\s")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BRACKETS = frozenset("[{")  # the start of a list of outputs that was sent as JSON text
_MIN_BASE64 = 64  # a shorter text is a word, not a file


class ListedOutputs(NamedTuple):
    """The outputs of a success. `left_out` counts those after the first MAX_LINKS."""

    links: tuple[Link, ...]
    left_out: int


def listed_outputs(answer: Mapping[str, object]) -> ListedOutputs:
    """Return the outputs of a success, from the first field that contains any. `future_links` is not read.

    >>> listed_outputs({"status": "success", "output": [], "links": ["https://h/a.wav"]}).links
    (Link(url='https://h/a.wav', proxies=(), body=None),)
    """
    proxies = answer.get(PROXY_FIELD)
    for name in OUTPUT_FIELDS:
        value = answer.get(name)
        if value:
            outputs = collect_links(value, None if name == PROXY_FIELD else proxies, strict=name not in _MAIN_FIELDS)
            if outputs.links:
                return outputs
    meta = answer.get("meta")
    return collect_links(meta.get("output"), strict=True) if isinstance(meta, dict) else ListedOutputs((), 0)


def promised_urls(answer: Mapping[str, object]) -> tuple[str, ...]:
    """Return the URLs at which the API promises outputs, in order, at most MAX_PROMISED.

    >>> promised_urls({"future_links": ["https://h/a.mp4", "", 5]})
    ('https://h/a.mp4',)
    """
    value = answer.get(PROMISE_FIELD)
    urls = _addresses(value) if value else ()
    if not urls and (value := answer.get(_PROMISED_LINKS)):
        urls = _addresses(value)
    return urls


def _addresses(value: object) -> tuple[str, ...]:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]  # a shortcut for the most common case
    addresses = (stored_address(text) for text in _texts(value) if _is_address(text) and len(text) <= MAX_URL)
    return tuple(dict.fromkeys(addresses))[:MAX_PROMISED]


def collect_links(output: object, proxy_links: object = None, *, strict: bool = False) -> ListedOutputs:
    """Return all outputs in `output` (a text, list or object, also nested), each with the proxy link at its position.

    A text by itself or in a list is an output, unless it is a word or a sentence. In an object, or with `strict`, only
    http(s) URLs, data URIs and long base64 texts are outputs, because the other texts in an object describe them.
    `proxy_links` in an object are alternative URLs of its outputs.

    >>> collect_links("https://h/a.png").links
    (Link(url='https://h/a.png', proxies=(), body=None),)
    >>> collect_links([{"text": "A sentence.", "words": [{"word": "A"}]}]).links
    ()
    """
    inner: list[str] = []
    if isinstance(output, str) and output.lstrip()[:1] in _BRACKETS:
        inside = _json_in(output)
        output = output if inside is None else inside
    texts = list(_texts(output, inner, strict=strict))
    proxies = list(_proxies(proxy_links)) or [_stored_proxy(text) for text in inner]
    paired = proxies if len(proxies) == len(texts) else []
    links: dict[str, Link] = {}
    for position, text in enumerate(texts[:MAX_LINKS]):
        link = _link(text, (paired[position],) if paired and paired[position] not in ("", text) else ())
        links.setdefault(link.url, link)
    return ListedOutputs(tuple(links.values()), len(set(texts[MAX_LINKS:]).difference(texts[:MAX_LINKS])))


def _proxies(value: object) -> Iterator[str]:
    """Yield the proxy links in `value`. A link that is too long to be stored is yielded as an empty string."""
    return (_stored_proxy(text) for text in _texts(value) if _is_address(text))


def _stored_proxy(text: str) -> str:
    return stored_address(text) if len(text) <= MAX_URL else ""


def _texts(value: object, proxies: list[str] | None = None, depth: int = 0, *, strict: bool = False) -> Iterator[str]:
    """Yield the texts that may be outputs. Texts in `proxy_links` of an inner object are added to `proxies` instead."""
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return
        if _is_address(text):
            if text.count("://") == 1:
                yield text
            else:
                yield from _BETWEEN.split(text)
        elif _is_output(text) or not (strict or _is_word(text)):
            yield text
    elif depth < MAX_DEPTH and isinstance(value, list):
        for item in value:
            yield from _texts(item, proxies, depth + 1, strict=strict)
    elif depth < MAX_DEPTH and isinstance(value, dict):
        for name, item in value.items():
            if name == PROXY_FIELD:
                if proxies is not None:
                    proxies += [text for text in _texts(item, None, depth + 1) if _is_address(text)]
            elif name != PROMISE_FIELD and _holds_outputs(str(name).lower(), item):
                yield from _texts(item, proxies, depth + 1, strict=True)


def _json_in(text: str) -> object:
    """Return the list or object in a JSON text, or None."""
    try:
        return None if too_many_values(text.encode("utf-8", "replace")) else json.loads(text)
    except (ValueError, RecursionError):
        return None


def _holds_outputs(name: str, item: object) -> bool:
    """Return whether a field next to an output may contain another output."""
    if _NO_OUTPUT.search(name):
        return False
    return not (_MODEL.search(name) and isinstance(item, str)) or _MODEL_FILE.search(str(item)[:MAX_URL]) is not None


def _is_output(text: str) -> bool:
    return _is_address(text) or _DATA.match(text) is not None or _is_base64(text)


def _is_word(text: str) -> bool:
    """Return whether a text is a word or a sentence, and not part of a URL or a file name."""
    return (
        _BLANK.search(text) is not None or text.lower() in _PLACEHOLDERS or _NAMES_A_FILE.search(text[:MAX_URL]) is None
    )


def _is_address(text: str) -> bool:
    return _ADDRESS.match(text) is not None


def _is_base64(text: str) -> bool:
    return len(text) >= _MIN_BASE64 and _BASE64.fullmatch(text) is not None


def _link(text: str, proxies: tuple[str, ...]) -> Link:
    data = _DATA.match(text)
    if data:
        content = text[data.end() :]
        media_type = plain_text(data["head"].split(";")[0].strip()[:100])
        body = _decoded(content) if data["head"].lower().endswith(";base64") else _unquoted(content)
        return _inline(body, f"data:{media_type}")
    if _is_base64(text):
        return _inline(_decoded(text), "data:")
    return Link(stored_address(text), proxies)


def stored_address(text: str) -> str:
    r"""Return a URL in the form in which it is stored.

    Control characters are escaped. The backslash of the escape makes the URL invalid, so that it is refused later.

    >>> stored_address("https://h/a\nb")
    'https://h/a\\nb'
    """
    text = text if len(text) <= MAX_URL else text[:MAX_URL] + "…"
    return plain_text(_CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text))


def _inline(body: bytes, prefix: str) -> Link:
    return Link(f"{prefix};sha256={hashlib.sha256(body).hexdigest()}", (), body)


def _decoded(encoded: str) -> bytes:
    """Return the decoded bytes. Invalid base64 is returned as it is; it is refused later because it is not media."""
    digits = "".join(encoded.split())
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError):
        return encoded.encode("utf-8", "replace")


def _unquoted(content: str) -> bytes:
    return unquote_to_bytes(content.encode("utf-8", "replace"))
