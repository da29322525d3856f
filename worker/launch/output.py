"""The output of `up`: the lines of all processes as text or JSON, or only the lines that matter."""

import json
import os
import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

from worker.core.display import display_json, display_text
from worker.launch.embedded_redis import EMBEDDED_NAME
from worker.launch.procfile import RELEASE
from worker.launch.supervised_process import OWN_NAME, Say
from worker.system.json_logs import LINE_START, plain_line
from worker.system.redaction import OWN_LOGGER

KEPT_LINES = 20  # of each process, shown when it ends
TROUBLE = frozenset({"WARNING", "ERROR", "CRITICAL"})
PER_JOB = frozenset({"webhook delivered"})  # own events of level INFO that are no change of state
LOGIN = "Flower: "  # the begin of the line with its random password
IGNORED = ("flower.inspector", "py.warnings")  # loggers: Flower misses workers that start later; deprecations
CONNECTED = "celery.worker.consumer.connection"  # the logger of lost and new connections to the broker
FRAME = ("time", "level", "logger", "event", "process", "pid", "thread", "task", "task_id", "exception", "stack")

# What a worker, beat, Flower and Redis write when they are ready, as text and as JSON.
_READY = re.compile(
    r"@[^\s@]+ ready\.|beat: Starting\.\.\.|Visit me at (?P<address>https?://[^\s\"]+)|Ready to accept connections"
)
# What `up` says of a process that has ended.
_ENDED = re.compile(r"(?P<name>[A-Za-z0-9_-]+) (?:.*; restart in|refuses its settings)")
_EXPECTED = re.compile(r"\s*|worker: \w+ shutdown \(MainProcess\)|Flower: .*")  # output that is no log line
_COLOURS = (36, 33, 32, 35, 34, 31, 96, 93, 92, 95)


def text_writer(names: Sequence[str], stream: TextIO) -> Say:
    """Return a function that writes lines prefixed with the process name, coloured on a terminal."""
    all_names = [OWN_NAME, EMBEDDED_NAME, *names]
    width = max(len(name) for name in all_names)
    coloured = stream.isatty() and not os.environ.get("NO_COLOR")
    prefixes: dict[str, str] = {}
    for number, name in enumerate(all_names):
        label = f"{name:<{width}} |"
        prefixes[name] = f"\x1b[{_COLOURS[number % len(_COLOURS)]}m{label}\x1b[0m " if coloured else f"{label} "

    def say(name: str, text: str) -> None:
        with suppress(OSError):  # the reader has gone; keep working
            stream.write(f"{prefixes[name]}{display_text(text)}\n")
            stream.flush()

    return say


def json_writer(stream: TextIO) -> Say:
    """Return a function that writes each line as JSON. Lines that are JSON already are written unchanged."""

    def say(name: str, text: str) -> None:
        line = display_json(text) if text.startswith(LINE_START) else plain_line(name, text)
        with suppress(OSError):  # the reader has gone; keep working
            stream.write(f"{line}\n")
            stream.flush()

    return say


class QuietWriter:
    """Writes warnings, errors and changes of state. It reads the JSON log lines of the processes.

    Other lines of a process are kept, and written if it ends. Output that is no log line is kept until the process is
    ready: from then on it has an unusual reason and is written at once, except that of the embedded Redis.
    """

    def __init__(self, write: Say) -> None:
        self._write = write
        self._ready = set[str]()
        self._login = ""
        self._unwritten: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=KEPT_LINES))

    def __call__(self, name: str, text: str) -> None:
        """Write a line of a process if it matters."""
        if name == OWN_NAME and (ended := _ENDED.match(text)):
            self._show_end(ended["name"])
        if text.startswith(LOGIN):
            self._login = f"; {text.removeprefix(LOGIN)}"
        if self._matters(name, text):
            for line in _readable(text):
                self._write(name, line)
        elif _EXPECTED.fullmatch(text) is None:
            self._unwritten[name].extend(_readable(text))
        if ready := _READY.search(text):
            self._ready.add(name)
            self._unwritten.pop(name, None)
            if ready["address"]:
                self._write(name, f"shows jobs and tasks at {ready['address']}{self._login}")

    def _show_end(self, name: str) -> None:
        """Write the last lines of a process that has ended."""
        self._ready.discard(name)
        for line in self._unwritten.pop(name, ()):
            self._write(name, line)

    def _matters(self, name: str, text: str) -> bool:
        if name in (OWN_NAME, RELEASE):
            return True
        record = _record(text)
        if record is None:
            return name in self._ready and name != EMBEDDED_NAME and _EXPECTED.fullmatch(text) is None
        logger = str(record.get("logger"))
        if record.get("level") in TROUBLE:
            return logger not in IGNORED
        own = f"{logger}.".startswith(f"{OWN_LOGGER}.") and record.get("event") not in PER_JOB
        return own or (logger == CONNECTED and name in self._ready)


class ReadyLine:
    """Passes lines on. Says when all processes are ready, with a `note`, and when one of them is ready again."""

    def __init__(
        self, say: Say, names: Collection[str], *, note: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.waiting = set(names)
        self._names = frozenset(names)
        self._say, self._note, self._clock, self._started_at = say, note, clock, clock()

    def __call__(self, name: str, text: str) -> None:
        """Pass a line on."""
        self._say(name, text)
        if name not in self._names or _READY.search(text) is None:
            return
        if name not in self.waiting:
            self._say(OWN_NAME, f"{name} is ready again")
            return
        self.waiting.discard(name)
        if not self.waiting:
            self._say(OWN_NAME, f"ready after {self._clock() - self._started_at:.1f} s{self._note}")


def _record(text: str) -> Mapping[str, Any] | None:
    """Return the fields of a JSON log line. `None` for any other line."""
    if not text.startswith(LINE_START):
        return None
    try:
        record: Mapping[str, Any] = json.loads(text)
    except ValueError:  # the line was too long and is cut
        return None
    return record


def _readable(text: str) -> Sequence[str]:
    """Return a line as people read it: of a JSON log line the time, level, event and fields.

    A traceback follows. Of the traceback of a warning, only the last line does.
    """
    record = _record(text)
    if record is None:
        return [text]
    fields = " ".join(f"{name}={value}" for name, value in record.items() if name not in FRAME)
    line = f"{str(record['time'])[11:19]} {record.get('level')} {record.get('event')} {fields}".rstrip()
    traceback = str(record.get("exception", "")).splitlines()
    return [line, *(traceback if record.get("level") != "WARNING" else traceback[-1:])]
