"""Media as base64 text, which the API returns for some outputs: find the start of the digits and decode them."""

import binascii
import re

from worker.core.media.signatures import sniff

_BEFORE_BASE64 = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*+(?:b?[\"'])?\s*+(?:data:[^,\"'<>]{0,200}?;\s*base64\s*,\s*+)?", re.IGNORECASE
)
_AFTER_BASE64 = re.compile(rb"={0,2}[\"']?")
_DIGITS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_STANDARD = bytes.maketrans(b"-_", b"+/")
_BLANKS = b" \t\r\n\v\f"


def base64_start(head: bytes) -> int | None:
    """Return the position of the first base64 digit in a text that contains media. None for any other text.

    A byte order mark, blanks, a quotation mark and `data:...;base64,` may come before it.

    >>> base64_start(b'"data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAACAkQBADs="')
    23
    """
    before = _BEFORE_BASE64.match(head)
    start = before.end() if before else 0
    try:
        body = Base64Decoder().feed(head[start:])
    except ValueError:
        return None
    return start if sniff(body) is not None else None


class Base64Decoder:
    """Decode base64 in chunks, in the standard and the URL-safe alphabet, with only a few bytes of memory.

    Blanks are ignored. Padding and a quotation mark may follow the last digit.
    """

    __slots__ = ("_after", "_pending")

    def __init__(self) -> None:
        self._pending = b""
        self._after = b""

    def feed(self, chunk: bytes) -> bytes:
        """Return the bytes that are complete after `chunk`. Raises ValueError if it is not base64."""
        text = chunk.translate(_STANDARD, _BLANKS)
        after = text.lstrip(_DIGITS)
        digits = self._pending + text[: len(text) - len(after)]
        if self._after and len(digits) > len(self._pending):
            raise ValueError("digits after the end of the base64")
        complete = len(digits) - len(digits) % 4
        self._pending = digits[complete:]
        self._after += after[:4]  # four are enough to see that there are too many
        if not _AFTER_BASE64.fullmatch(self._after) or self._after.count(b"=") > -len(self._pending) % 4:
            raise ValueError("not base64")
        return binascii.a2b_base64(digits[:complete])

    def finish(self) -> bytes:
        """Return the last bytes. Raises ValueError if the text ends within a byte."""
        if len(self._pending) == 1:
            raise ValueError("the base64 ends too early")
        return binascii.a2b_base64(self._pending + b"=" * (-len(self._pending) % 4))
