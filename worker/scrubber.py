"""The one scrubber: takes every configured API key out of texts and bytes that come from outside or go out."""

import base64
import json
import logging
import re
import struct
import traceback
from collections.abc import Iterable

MASK = "[key]"


class Scrubber:
    """Replaces keys, also where any characters were quoted for a URL or escaped for JSON, and encoded as base64."""

    def __init__(self, keys: Iterable[str]) -> None:
        longest_first = sorted({key for key in keys if key}, key=len, reverse=True)
        ways = "|".join(f"{_spelled(key)}|{_base64(key)}" for key in longest_first)
        self._pattern = re.compile(ways) if ways else None
        self._bytes = re.compile(ways.encode()) if ways else None

    def text(self, text: str) -> str:
        """The text without any key."""
        return self._pattern.sub(MASK, text) if self._pattern else text

    def body(self, body: bytes) -> bytes:
        """The bytes without any key."""
        return self._bytes.sub(MASK.encode(), body) if self._bytes else body

    def __repr__(self) -> str:
        """Says nothing of the keys."""
        return "Scrubber()"


def _spelled(key: str) -> str:
    """A pattern for a key each of whose characters may be written in any of its ways."""
    return "".join(f"(?:{'|'.join(map(_either_case, _ways(char)))})" for char in key)


def _ways(char: str) -> Iterable[str]:
    yield char
    yield "".join(f"%{byte:02x}" for byte in char.encode())
    units = char.encode("utf-16-be")
    yield "".join(f"\\u{unit:04x}" for (unit,) in struct.iter_unpack(">H", units))
    yield f"\\{char}" if char == "/" else json.dumps(char)[1:-1]


def _either_case(way: str) -> str:
    """A pattern: the hexadecimal digits of an escape may be of either case."""
    return re.escape(way) if len(way) < 3 else f"(?i:{re.escape(way)})"


def _base64(key: str) -> str:
    return re.escape(base64.b64encode(key.encode()).decode().rstrip("="))


class ScrubbedLogs(logging.Filter):
    """A filter that scrubs whole log records, tracebacks included."""

    def __init__(self, scrubber: Scrubber) -> None:
        super().__init__()
        self._scrubber = scrubber

    def filter(self, record: logging.LogRecord) -> bool:
        """Scrubs the record in place; it is always let through."""
        message = record.getMessage()
        scrubbed = self._scrubber.text(message)
        if scrubbed != message:
            record.msg, record.args = scrubbed, None
        if record.exc_info and record.exc_info[1] is not None:
            text = "".join(traceback.format_exception(*record.exc_info)).rstrip()
            record.exc_text = self._scrubber.text(text)
        return True
