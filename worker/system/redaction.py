"""The scrubber: removes every configured API key from texts and bytes that come in or go out."""

import logging
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from worker.core.display import display_lines, display_text
from worker.core.redaction.key_finder import KeyFinder

MASK = "[key]"
OWN_LOGGER = "worker"  # parent of this package's loggers
MAX_DEPTH = 32  # levels of lists and mappings; API answers are read eight levels deep
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) - {"msg", "args", "exc_text", "stack_info"}


class Scrubber:
    """Removes keys in every spelling that `worker.core.redaction.key_finder` supports, in linear time. Thread-safe.

    A process has one, `shared_scrubber()`, so that a key that is read while it runs is known everywhere at once. `add`
    adds keys; earlier keys are kept.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self._keys = frozenset[str]()
        self._whole = self._texts = KeyFinder((), pieces=False)
        self.add(keys)

    def add(self, keys: Iterable[str]) -> None:
        """Remove these keys too from now on. They are in use when the call returns. Known keys cost nothing."""
        with self._lock:
            keys_now = self._keys | {key for key in keys if key}
            if keys_now != self._keys:
                self._whole, self._texts = KeyFinder(keys_now, pieces=False), KeyFinder(keys_now, pieces=True)
                self._keys = keys_now

    def text(self, text: str) -> str:
        """Return the text without any key, and without a fragment of one (at least half of it, 16 characters).

        Scrub a text before you truncate it: truncation may leave a shorter fragment.
        """
        data = text.encode("utf-8", "surrogatepass")
        spans = self._texts.spans(data)
        return _mask(data, spans).decode("utf-8", "surrogatepass") if spans else text

    def link(self, url: str) -> str:
        """Return a URL without any whole key. Fragments stay: a signed link may begin like a JSON Web Token."""
        return self.body(url.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")

    def body(self, body: bytes) -> bytes:
        """Return the bytes without any whole key. Fragments stay, as in `link`: the bytes may contain links."""
        return _mask(body, self._whole.spans(body))

    def links(self, value: object) -> object:
        """Apply `link` to a text, or to the texts in lists and mappings. Values below `MAX_DEPTH` become None."""
        return _mapped(value, self.link)

    def texts(self, value: object) -> object:
        """Apply `text` to a text, or to the texts in lists and mappings. Values below `MAX_DEPTH` become None."""
        return _mapped(value, self.text)

    def __repr__(self) -> str:
        """Return a text that contains no key."""
        return "Scrubber()"


MIN_SECRET = 8  # characters: payloads are not searched for shorter keys
_shared = Scrubber()


def shared_scrubber(keys: Iterable[str] = ()) -> Scrubber:
    """Return this process's scrubber, after adding these keys."""
    _shared.add(keys)
    return _shared


@lru_cache(maxsize=4)
def long_secret_scrubber(texts: tuple[str, ...]) -> Scrubber:
    """Return a scrubber for text that people write, such as prompts. Short keys, as tests have them, occur there."""
    return Scrubber(text for text in texts if len(text) >= MIN_SECRET)


def _mapped(value: object, scrub: Callable[[str], str], depth: int = 0) -> object:
    match value:
        case str():
            return scrub(value)
        case None | bool() | int() | float():
            return value
        case Mapping() | list() | tuple() | set() | frozenset() if depth == MAX_DEPTH:
            return None
        case Mapping():
            return {_mapped(name, scrub, depth + 1): _mapped(item, scrub, depth + 1) for name, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_mapped(item, scrub, depth + 1) for item in value]
        case _:
            text = _text_of(value)
            scrubbed = scrub(text)
            return value if scrubbed == text else scrubbed


def _text_of(value: object) -> str:
    try:
        return str(value)
    except Exception:  # `__str__` of a foreign object may raise anything
        return f"<{type(value).__name__}>"


def _mask(data: bytes, spans: list[tuple[int, int]]) -> bytes:
    if not spans:
        return data
    parts, position = [], 0
    for begin, end in spans:
        parts.append(data[position:begin].rstrip(b"\\") if data[begin - 1 : begin] == b"\\" else data[position:begin])
        position = end
    return MASK.encode().join((*parts, data[position:]))


class RedactingFilter(logging.Filter):
    """Logging filter that redacts whole records: message, arguments, traceback with its notes, stack and extra fields.

    It also removes control and invisible characters. Messages of our own loggers become one line.
    """

    def __init__(self, scrubber: Scrubber) -> None:
        super().__init__()
        self._scrubber = scrubber

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact the record in place. Always True: no record is dropped."""
        self._scrub_message(record)
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        if record.exc_text:
            record.exc_text = display_lines(self._scrubber.text(record.exc_text))
        if record.stack_info:
            record.stack_info = self._scrubber.text(record.stack_info)
        extra: dict[str, Any] = vars(record)
        for name in extra.keys() - _STANDARD - {"msg", "args"}:
            extra[name] = self._scrubber.texts(extra[name])
        return True

    def _scrub_message(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # arguments do not match the template; logging would print them unredacted
            record.msg, record.args = self._scrubber.text(f"{record.msg} {record.args!r}"), None
            return
        scrubbed = self._scrubber.text(message)
        own = f"{record.name}.".startswith(f"{OWN_LOGGER}.")
        cleaned = display_text(scrubbed) if own else display_lines(scrubbed)  # Celery logs lists of several lines
        if cleaned != message:
            record.msg, record.args = cleaned, None
