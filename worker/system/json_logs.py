"""Log lines as JSON: the event, the fields of its template, and no API key.

Our log lines have the form `event words key=%s other=%s`. Fields come from the template and not from the formatted
text, so blanks and equal signs in a logged value stay part of that value.
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
from worker.system.redaction import OWN_LOGGER, Scrubber

LINE_START = '{"time":'  # identifies a line that this module wrote
RESERVED = frozenset(
    {"time", "level", "logger", "event", "task", "task_id", "process", "pid", "thread", "exception", "stack"}
)
_FIELD = re.compile(r"(?P<name>[a-z][a-z_]*)=(?P<value>.*%.*)", re.DOTALL)
_CONVERSION = re.compile(r"%[-#0 +]*+[0-9]*+(?:\.[0-9]++)?[a-zA-Z]")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@dataclass(frozen=True, slots=True)
class _TemplatePart:
    """One word of a log template: its text, the number of arguments it takes, and the field it sets, if any."""

    text: str
    arguments: int
    field: str | None


class JsonFormatter(logging.Formatter):
    """Format a record as one line of JSON. `process` is the name of the process."""

    def __init__(self, scrubber: Scrubber, process: str) -> None:
        super().__init__()
        self._scrubber = scrubber
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the line. Each text in it is redacted on its own, so that the line stays valid JSON."""
        event, fields = _event(record)
        created = datetime.fromtimestamp(record.created, UTC)
        document: dict[str, Any] = {
            "time": created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
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
        scrubbed = {name: self._json_value(value) for name, value in document.items()}
        return display_json(json.dumps(scrubbed, ensure_ascii=False))

    def _json_value(self, value: object) -> object:
        """Return the value as JSON can have it, with API keys redacted."""
        match value:
            case None | bool() | int():
                return value
            case float():
                return value if math.isfinite(value) else str(value)
            case tuple() | list() | set() | frozenset():
                return [self._json_value(item) for item in value]
            case _:
                return self._scrubber.text(str(value))


def plain_line(process: str, text: str) -> str:
    """Return a JSON line for output of a process that is not one of our log lines."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = {"time": now, "level": "INFO", "event": text, "process": process}
    return display_json(json.dumps(line, ensure_ascii=False))


def _event(record: logging.LogRecord) -> tuple[str, dict[str, object]]:
    """Return the event and its fields. For loggers of other packages the whole text is the event."""
    template, args = record.msg, record.args
    own = record.name == OWN_LOGGER or record.name.startswith(f"{OWN_LOGGER}.")
    extra = {name: value for name, value in vars(record).items() if name not in _STANDARD} if own else {}
    parts = _parse_template(template) if own and isinstance(template, str) and isinstance(args, tuple) and args else ()
    if not parts or not isinstance(args, tuple) or sum(part.arguments for part in parts) != len(args):
        return record.getMessage(), _without_reserved(extra)
    event: list[str] = []
    fields: dict[str, object] = {}
    remaining = list(args)
    for part in parts:
        arguments, remaining = tuple(remaining[: part.arguments]), remaining[part.arguments :]
        if part.field is None:
            event.append(part.text % arguments if arguments else part.text)
        elif not _CONVERSION.fullmatch(part.text):
            fields[part.field] = part.text % arguments
        elif isinstance(arguments[0], float):
            fields[part.field] = float(part.text % arguments)  # rounded as in the text line
        else:
            fields[part.field] = arguments[0]
    return " ".join(event), _without_reserved(fields | extra)


def _without_reserved(fields: Mapping[str, object]) -> dict[str, object]:
    return {f"{name}_" if name in RESERVED else name: value for name, value in fields.items()}


@lru_cache(maxsize=1_024)
def _parse_template(template: str) -> tuple[_TemplatePart, ...]:
    """Split a template into its words. Return nothing if it uses a conversion that is not supported here."""
    if "%" in _CONVERSION.sub("", template):
        return ()
    parts = []
    for text in template.split(" "):
        match = _FIELD.fullmatch(text)
        value = text if match is None else match["value"]
        parts.append(_TemplatePart(value, len(_CONVERSION.findall(value)), None if match is None else match["name"]))
    return tuple(parts)


def _task(record: logging.LogRecord) -> dict[str, object]:
    """Return the Celery task that the line is about, or else the task that is running."""
    data = getattr(record, "data", None)
    if isinstance(data, Mapping) and "id" in data and "name" in data:
        return {"task": data["name"], "task_id": data["id"]}
    if current_task:
        return {"task": current_task.name, "task_id": current_task.request.id}
    return {}
