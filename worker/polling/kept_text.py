"""The stored part of an answer: its shape and its first 64 KiB as text. Keys are removed, links stay whole."""

import re
from typing import NamedTuple

from worker.core.reply import RawAnswer
from worker.system.redaction import Scrubber
from worker.vendor.shapes import shape_of

MAX_BYTES = 64 * 1024
RAW_BYTES = 128 * 1024  # of an answer, before keys are removed
# A link, also in JSON's spelling. A signed link may start like a key, so only whole keys are removed from it.
_LINK = re.compile(r"(https?:(?:\\?/){2}[^\s\"'<>]+)", re.IGNORECASE)


class KeptText(NamedTuple):
    """The shape of an answer, and its text."""

    shape: str
    text: str


def raw_answer(http_status: int, body: bytes, scrubber: Scrubber, shape: str | None = None) -> RawAnswer:
    """Return an answer as it may be stored later: of a long one only the beginning, with the shape of the whole."""
    if len(body) <= RAW_BYTES:
        return RawAnswer(http_status, body, shape)
    return RawAnswer(http_status, body[:RAW_BYTES], shape or shape_of(http_status, _scrubbed(body, scrubber).encode()))


def kept_text(raw: RawAnswer, scrubber: Scrubber) -> KeptText:
    """Return the shape and the text to store. Keys are removed before the text is cut.

    Invalid UTF-8 and NUL characters, which databases refuse in text, become replacement characters.
    """
    text = _scrubbed(raw.body, scrubber)
    shape = shape_of(raw.http_status, text.encode()) if raw.shape is None else raw.shape
    return KeptText(shape, text.encode()[:MAX_BYTES].decode("utf-8", "ignore"))


def _scrubbed(body: bytes, scrubber: Scrubber) -> str:
    """Return a body as text: no key in its links, and not even the beginning or end of a key elsewhere."""
    text = scrubber.link(body.decode("utf-8", "replace").replace("\x00", "\N{REPLACEMENT CHARACTER}"))
    return "".join(part if _LINK.fullmatch(part) else scrubber.text(part) for part in _LINK.split(text))
