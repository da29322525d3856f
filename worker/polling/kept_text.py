"""What is kept of an answer: its shape, and its first 64 KiB as text, without any key and with its links whole."""

import re
from typing import NamedTuple

from worker.core.reply import RawAnswer
from worker.system.redaction import Scrubber
from worker.vendor.shapes import shape_of

MAX_BYTES = 64 * 1024
RAW_BYTES = 128 * 1024  # of an answer, before keys are taken out of what is kept of it
# A link, as JSON may write it too. A signed one may begin like a key, so only whole keys are taken out of it.
_LINK = re.compile(r"(https?:(?:\\?/){2}[^\s\"'<>]+)", re.IGNORECASE)


class KeptText(NamedTuple):
    """The form of an answer, and its text."""

    shape: str
    text: str


def raw_answer(http_status: int, body: bytes, scrubber: Scrubber, shape: str | None = None) -> RawAnswer:
    """Return an answer as it may be kept later. Of a long one that is the beginning, with the shape of the whole."""
    if len(body) <= RAW_BYTES:
        return RawAnswer(http_status, body, shape)
    return RawAnswer(http_status, body[:RAW_BYTES], shape or shape_of(http_status, _scrubbed(body, scrubber).encode()))


def kept_text(raw: RawAnswer, scrubber: Scrubber) -> KeptText:
    """Return what is kept of an answer. Keys are taken out before it is cut.

    Bytes that are no UTF-8 and NUL, which no database takes as text, become replacement characters.
    """
    text = _scrubbed(raw.body, scrubber)
    shape = shape_of(raw.http_status, text.encode()) if raw.shape is None else raw.shape
    return KeptText(shape, text.encode()[:MAX_BYTES].decode("utf-8", "ignore"))


def _scrubbed(body: bytes, scrubber: Scrubber) -> str:
    """Return a body as text, without a key in its links, nor the beginning or end of one elsewhere."""
    text = scrubber.link(body.decode("utf-8", "replace").replace("\x00", "\N{REPLACEMENT CHARACTER}"))
    return "".join(part if _LINK.fullmatch(part) else scrubber.text(part) for part in _LINK.split(text))
