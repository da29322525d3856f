"""Base64 texts that stand for media: some outputs of the API are kept so. Where the digits begin, and their bytes."""

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
    """Return where the base64 digits begin in a text that stands for media; None for any other text.

    Before them may come a byte order mark, blanks, a quotation mark and `data:...;base64,`.

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
    """Decode base64 piece by piece, in the standard and the URL-safe alphabet, and keep no more than a few bytes.

    Blanks don't count. After the last digit may come what padding is missing, and a quotation mark.
    """

    __slots__ = ("_after", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._after = b""

    def feed(self, chunk: bytes) -> bytes:
        """Return the bytes that are complete with `chunk`. Raises ValueError for what is no base64."""
        text = chunk.translate(_STANDARD, _BLANKS)
        after = text.lstrip(_DIGITS)
        digits = self._rest + text[: len(text) - len(after)]
        if self._after and len(digits) > len(self._rest):
            raise ValueError("more after the end of the base64")
        complete = len(digits) - len(digits) % 4
        self._rest = digits[complete:]
        self._after += after[:4]  # more than four are too many
        if not _AFTER_BASE64.fullmatch(self._after) or self._after.count(b"=") > -len(self._rest) % 4:
            raise ValueError("no base64")
        return binascii.a2b_base64(digits[:complete])

    def finish(self) -> bytes:
        """Return the last bytes. Raises ValueError where the text ends with half a byte."""
        if len(self._rest) == 1:
            raise ValueError("base64 that ends too early")
        return binascii.a2b_base64(self._rest + b"=" * (-len(self._rest) % 4))
