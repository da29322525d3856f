"""The one scrubber: removes every configured API key from texts and bytes that come from outside or go out."""

import logging
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from worker.core.display import display_lines, display_text
from worker.core.redaction.key_finder import KeyFinder

MASK = "[key]"
OURS = "worker"  # the loggers of this package
DEEPEST = 32  # levels of lists and mappings; what is read of an answer has eight
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) - {"msg", "args", "exc_text", "stack_info"}


class Scrubber:
    """Removes keys in every spelling that `worker.core.redaction.key_finder` knows, in linear time. Thread-safe.

    A process has one, `shared_scrubber()`, so that keys that are read again while it runs are known everywhere at once:
    `add` takes them in, and those of before stay.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self._keys = frozenset[str]()
        self._whole = self._texts = KeyFinder((), pieces=False)
        self.add(keys)

    def add(self, keys: Iterable[str]) -> None:
        """Remove these keys, too, from now on. Returns once they are in use; keys that are known cost nothing."""
        with self._lock:
            known = self._keys | {key for key in keys if key}
            if known != self._keys:
                self._whole, self._texts = KeyFinder(known, pieces=False), KeyFinder(known, pieces=True)
                self._keys = known

    def text(self, text: str) -> str:
        """The text without any key, and without the beginning or end of one (at least half of it, 16 characters).

        Scrub before you cut: a piece that a cut leaves may be shorter than that.
        """
        data = text.encode("utf-8", "surrogatepass")
        spans = self._texts.spans(data)
        return _masked(data, spans).decode("utf-8", "surrogatepass") if spans else text

    def link(self, url: str) -> str:
        """An address without any key. Pieces stay: a signed link may begin like a key that is a JSON Web Token."""
        return self.body(url.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")

    def body(self, body: bytes) -> bytes:
        """The bytes without any key. Pieces stay, as in `link`: there may be links in them."""
        return _masked(body, self._whole.spans(body))

    def links(self, value: object) -> object:
        """As `link`, for a text or the texts in lists and mappings, `DEEPEST` levels deep; the rest is left out."""
        return _mapped(value, self.link)

    def texts(self, value: object) -> object:
        """As `text`, for a text or the texts in lists and mappings, `DEEPEST` levels deep; the rest is left out."""
        return _mapped(value, self.text)

    def __repr__(self) -> str:
        """Says nothing of the keys."""
        return "Scrubber()"


_shared = Scrubber()


def shared_scrubber(keys: Iterable[str] = ()) -> Scrubber:
    """This process's scrubber, which knows these keys from now on, too."""
    _shared.add(keys)
    return _shared


def _mapped(value: object, scrub: Callable[[str], str], depth: int = 0) -> object:
    match value:
        case str():
            return scrub(value)
        case None | bool() | int() | float():
            return value
        case Mapping() | list() | tuple() | set() | frozenset() if depth == DEEPEST:
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
    except Exception:  # an object of anybody's may fail in any way
        return f"<{type(value).__name__}>"


def _masked(data: bytes, spans: list[tuple[int, int]]) -> bytes:
    if not spans:
        return data
    parts, at = [], 0
    for begin, end in spans:
        parts.append(data[at:begin].rstrip(b"\\") if data[begin - 1 : begin] == b"\\" else data[at:begin])
        at = end
    return MASK.encode().join((*parts, data[at:]))


class ScrubbedLogs(logging.Filter):
    """A filter that scrubs whole log records: message, arguments, traceback with its notes, stack and extra fields.

    Control characters and invisible ones go, too; a message of our own loggers is one line.
    """

    def __init__(self, scrubber: Scrubber) -> None:
        super().__init__()
        self._scrubber = scrubber

    def filter(self, record: logging.LogRecord) -> bool:
        """Scrub the record in place; it is always let through."""
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
        except Exception:  # arguments that don't fit: logging would print them as they are
            record.msg, record.args = self._scrubber.text(f"{record.msg} {record.args!r}"), None
            return
        scrubbed = self._scrubber.text(message)
        ours = f"{record.name}.".startswith(f"{OURS}.")
        plain = display_text(scrubbed) if ours else display_lines(scrubbed)  # Celery writes lists of several lines
        if plain != message:
            record.msg, record.args = plain, None
