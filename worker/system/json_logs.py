"""Log lines as JSON: one event each, with what its template names as fields, and no key anywhere in it.

Our lines are written as `event words key=%s other=%s`. Fields are taken from the template, never from the text that
came out of it: what somebody else wrote, blanks and equal signs included, stays the value of one field.
"""

import json
import logging
import math
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from celery import current_task

from worker.core.display import display_json
from worker.system.redaction import OURS, Scrubber

OPENING = '{"time":'  # by which a line is known that is one of ours
RESERVED = frozenset(
    {"time", "level", "logger", "event", "task", "task_id", "process", "pid", "thread", "exception", "stack"}
)
_FIELD = re.compile(r"(?P<name>[a-z][a-z_]*)=(?P<value>.*%.*)", re.DOTALL)
_CONVERSION = re.compile(r"%[-#0 +]*+[0-9]*+(?:\.[0-9]++)?[a-zA-Z]")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@dataclass(frozen=True, slots=True)
class _Word:
    """A word of a template: its text, how many arguments it takes, and which field it is."""

    text: str
    takes: int
    field: str | None


class JsonLines(logging.Formatter):
    """Writes a record as one line of JSON, for a process of this name."""

    def __init__(self, scrubber: Scrubber, process: str) -> None:
        super().__init__()
        self._scrubber = scrubber
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line. Every text in it is scrubbed by itself, so that it stays JSON."""
        event, fields = _event(record)
        made = datetime.fromtimestamp(record.created, UTC)
        document: dict[str, Any] = {
            "time": made.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "event": event,
            **fields,
            **_task(record),
            "process": self._process,
            "pid": record.process,
            "thread": record.threadName,
        }
        if record.exc_info and record.exc_info[1] is not None:
            document["exception"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        elif record.exc_text:
            document["exception"] = record.exc_text
        if record.stack_info:
            document["stack"] = record.stack_info
        plain = {name: self._plain(value) for name, value in document.items()}
        return display_json(json.dumps(plain, ensure_ascii=False))

    def _plain(self, value: object) -> object:
        """What JSON takes, without any key."""
        match value:
            case None | bool() | int():
                return value
            case float():
                return value if math.isfinite(value) else str(value)
            case tuple() | list() | set() | frozenset():
                return [self._plain(one) for one in value]
            case _:
                return self._scrubber.text(str(value))


def plain_line(process: str, text: str) -> str:
    """What a process wrote that is no line of ours, as one."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = {"time": now, "level": "INFO", "event": text, "process": process}
    return display_json(json.dumps(line, ensure_ascii=False))


def _event(record: logging.LogRecord) -> tuple[str, dict[str, object]]:
    """The event and its fields. Of others' lines the whole text is the event."""
    template, args = record.msg, record.args
    ours = record.name == OURS or record.name.startswith(f"{OURS}.")
    extra = {name: value for name, value in vars(record).items() if name not in _STANDARD} if ours else {}
    words = _words(template) if ours and isinstance(template, str) and isinstance(args, tuple) and args else ()
    if not words or not isinstance(args, tuple) or sum(word.takes for word in words) != len(args):
        return record.getMessage(), _named(extra)
    event: list[str] = []
    fields: dict[str, object] = {}
    left = list(args)
    for word in words:
        taken, left = tuple(left[: word.takes]), left[word.takes :]
        if word.field is None:
            event.append(word.text % taken if taken else word.text)
        elif not _CONVERSION.fullmatch(word.text):
            fields[word.field] = word.text % taken
        elif isinstance(taken[0], float):
            fields[word.field] = float(word.text % taken)  # as many digits as the line has
        else:
            fields[word.field] = taken[0]
    return " ".join(event), _named(fields | extra)


def _named(fields: Mapping[str, object]) -> dict[str, object]:
    return {f"{name}_" if name in RESERVED else name: value for name, value in fields.items()}


@lru_cache(maxsize=1_024)
def _words(template: str) -> tuple[_Word, ...]:
    """The words of a template; none where it has a sign that is not understood here."""
    if "%" in _CONVERSION.sub("", template):
        return ()
    words = []
    for text in template.split(" "):
        found = _FIELD.fullmatch(text)
        value = text if found is None else found["value"]
        words.append(_Word(value, len(_CONVERSION.findall(value)), None if found is None else found["name"]))
    return tuple(words)


def _task(record: logging.LogRecord) -> dict[str, object]:
    """The Celery task that a line is about, or comes from."""
    about = getattr(record, "data", None)
    if isinstance(about, Mapping) and "id" in about and "name" in about:
        return {"task": about["name"], "task_id": about["id"]}
    if current_task:
        return {"task": current_task.name, "task_id": current_task.request.id}
    return {}
