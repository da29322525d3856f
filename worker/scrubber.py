"""The one scrubber: takes every configured API key out of texts and bytes that come from outside or go out."""

import base64
import json
import logging
import re
import traceback
from collections.abc import Iterable
from urllib.parse import quote

MASK = "[key]"


class Scrubber:
    """Replaces keys, also where they were quoted for a URL, escaped for JSON or encoded as base64."""

    def __init__(self, keys: Iterable[str]) -> None:
        forms = {form for key in keys if key for form in _forms(key)}
        longest_first = sorted(forms, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._bytes = (
            re.compile(b"|".join(re.escape(form.encode()) for form in longest_first)) if longest_first else None
        )

    def text(self, text: str) -> str:
        """The text without any key."""
        return self._pattern.sub(MASK, text) if self._pattern else text

    def body(self, body: bytes) -> bytes:
        """The bytes without any key."""
        return self._bytes.sub(MASK.encode(), body) if self._bytes else body

    def __repr__(self) -> str:
        """Says nothing of the keys."""
        return "Scrubber()"


def _forms(key: str) -> Iterable[str]:
    yield key
    yield quote(key, safe="")
    yield json.dumps(key)[1:-1]
    yield json.dumps(key)[1:-1].replace("/", "\\/")
    yield base64.b64encode(key.encode()).decode().rstrip("=")


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
