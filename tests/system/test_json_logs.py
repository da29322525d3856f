"""Log lines as JSON: one event per line, ids as fields, and the API key in none of them."""

import ast
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from tests.servers import celery_worker, free_port
from tests.waiting import wait_until
from worker import track
from worker.launch.output import json_writer
from worker.settings import load
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.system import json_logs
from worker.system.json_logs import RESERVED, JsonFormatter
from worker.system.redaction import Scrubber

KEY = 'sk-"canary"/\\-é7f3a'
ROOT = Path(__file__).parents[2]


class CapturedLogs:
    """A logger and the lines that it wrote."""

    def __init__(self, name: str) -> None:
        self.out = io.StringIO()
        handler = logging.StreamHandler(self.out)
        handler.setFormatter(JsonFormatter(Scrubber([KEY]), "downloads"))
        self.log = logging.Logger(name)  # separate, without parents
        self.log.addHandler(handler)

    @property
    def last(self) -> dict[str, Any]:
        """The last line, which must be JSON."""
        document: dict[str, Any] = json.loads(self.out.getvalue().splitlines()[-1])
        return document


@pytest.fixture
def logger() -> CapturedLogs:
    """A logger of our own package."""
    return CapturedLogs("worker.polling.recorder")


def test_an_event_has_its_words_and_its_ids_as_fields(logger: CapturedLogs) -> None:
    """Numbers stay numbers and lists stay lists. The line has its source, and a time in UTC."""
    logger.log.warning("rows are quarantined jobs=%s ms=%.1f at=%s:%s name=%s", (1, 2), 1.26, "file.py", 7, None)

    line = logger.last
    moment = datetime.fromisoformat(line.pop("time"))
    assert moment.utcoffset() == timedelta()
    assert line == {
        "level": "WARNING",
        "logger": "worker.polling.recorder",
        "event": "rows are quarantined",
        "jobs": [1, 2],
        "ms": 1.3,
        "at": "file.py:7",
        "name": None,
        "process": "downloads",
        "pid": os.getpid(),
        "thread": "MainThread",
    }


@pytest.mark.parametrize(
    ("template", "args", "event", "fields"),
    [
        ("held reason=%s", ("x job=7 level=%s\n{}",), "held", {"reason": "x job=7 level=%s\n{}"}),
        ("%s; waiting for it", ("a=b",), "a=b; waiting for it", {}),
        ("no SD_API_KEY: jobs are held", (), "no SD_API_KEY: jobs are held", {}),
        ("sent job=7 words", (), "sent job=7 words", {}),
        ("half %% job=%s", (7,), "half % job=7", {}),
        ("told level=%s event=%s", ("x", "y"), "told", {"level_": "x", "event_": "y"}),
        ("one job=%(job)s", ({"job": 7},), "one job=7", {}),
        ("worth share=%s", (float("nan"),), "worth", {"share": "nan"}),
    ],
)
def test_fields_come_only_from_the_template(
    logger: CapturedLogs, template: str, args: tuple[Any, ...], event: str, fields: dict[str, Any]
) -> None:
    """Values cannot add a field or hide one."""
    logger.log.error(template, *args)

    line = logger.last
    other_fields = {name: value for name, value in line.items() if name not in RESERVED}
    assert (line["event"], other_fields, line["level"]) == (event, fields, "ERROR")


def test_lines_of_other_packages_become_one_event() -> None:
    """Celery's lines about a task also name the task."""
    celery_logger = CapturedLogs("celery.app.trace")
    task = {"id": "0-1", "name": "worker.poll", "args": "[secret]"}
    celery_logger.log.info("Task %(name)s[%(id)s] key=value", task, extra={"data": task})

    line = celery_logger.last
    assert (line["event"], line["task"], line["task_id"]) == ("Task worker.poll[0-1] key=value", "worker.poll", "0-1")
    assert "secret" not in celery_logger.out.getvalue()


def test_a_line_never_contains_the_key(logger: CapturedLogs) -> None:
    """It is removed from template, arguments, lists, objects, the exception and its causes, extra fields and stack."""
    try:
        try:
            raise ValueError(KEY)
        except ValueError as inner:
            raise RuntimeError(f"because of {inner}") from inner
    except RuntimeError:
        logger.log.exception(
            f"no luck with {KEY} one=%s two=%s three=%s",
            KEY,
            [KEY, 1],
            {"x": KEY},
            extra={"four": KEY},
            stack_info=True,
        )
    try:
        raise OSError(KEY)
    except OSError:
        logger.log.exception("%s", KEY)

    for text in logger.out.getvalue().splitlines():
        line = json.loads(text)
        assert "canary" not in text
        assert "[key]" in line["event"]
        assert "[key]" in line["exception"]
    first = json.loads(logger.out.getvalue().splitlines()[0])
    assert (first["one"], first["two"], first["four"]) == ("[key]", ["[key]", 1], "[key]")
    assert "RuntimeError: because of [key]" in first["exception"]


def test_a_key_that_resembles_an_escape_does_not_break_a_line() -> None:
    """Texts are redacted before they become JSON."""
    lines = CapturedLogs("worker")
    handler = lines.log.handlers[0]
    handler.setFormatter(JsonFormatter(Scrubber(["nabc"]), "worker"))
    lines.log.warning("x=%s", "\nabc nabc")
    assert lines.last["x"] == "\nabc [key]"


# ── log lines in our code ─────────────────────────────────────────────────────────────────────────────────────────────


def _calls() -> Iterator[tuple[str, str, int]]:
    """Yield every log call of this package: (place, template, number of arguments)."""
    for path in sorted((ROOT / "worker").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=attr), args=[first, *rest]):
                    if attr in ("debug", "info", "warning", "error", "exception"):
                        assert isinstance(first, ast.Constant), f"{path}:{node.lineno} has no fixed event"
                        starred = any(isinstance(argument, ast.Starred) for argument in rest)
                        yield f"{path}:{node.lineno}", str(first.value), -1 if starred else len(rest)


def test_every_log_template_of_ours_can_be_parsed_and_has_distinct_fields() -> None:
    """Each has a fixed event, matching arguments, and field names that are not reserved."""
    calls = list(_calls())
    assert len(calls) > 30
    for place, template, count in calls:
        if not count:
            continue
        parts = json_logs._parse_template(template)
        names = [part.field for part in parts if part.field is not None]
        assert parts, f"{place}: {template}"
        assert count in (-1, sum(part.arguments for part in parts)), place
        assert len(names) == len(set(names)), place
        assert not RESERVED.intersection(names), f"{place}: {template}"


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def database_and_redis(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, Redis, and the log format that is used without a terminal."""
    database = f"sqlite:///{tmp_path}/worker.db"
    engine = make_engine(make_url(database))
    migrate(engine)
    engine.dispose()
    for name, value in {"DATABASE_URL": database, "REDIS_URL": redis_url, "SD_API_KEY": KEY}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOG_FORMAT")


@pytest.mark.usefixtures("database_and_redis")
def test_a_worker_writes_only_json_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This includes Celery's own lines. A failed task is named, without its arguments."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # Celery warns if run as root, before logging is set up
    monkeypatch.setenv("SD_API_URL", f"http://127.0.0.1:{free_port()}/api/v3")
    with celery_worker(tmp_path, "--hostname", "worker@%h") as process:
        from celery import Celery

        app = Celery(broker=os.environ["REDIS_URL"], backend=os.environ["REDIS_URL"], set_as_current=False)
        answer = app.send_task("worker.track", ["12"], {"account": KEY, "nonsense": KEY}, queue="fetch-worker")
        with pytest.raises(Exception, match="nonsense"):
            answer.get(timeout=20)
        track("13")
        assert process.poll() is None
    lines = (tmp_path / "worker.log").read_text().splitlines()
    other_lines = [line for line in lines if line and not line.startswith("{")]
    assert all("shutdown" in line for line in other_lines), other_lines  # Celery writes it without the logging module
    documents = [json.loads(line) for line in lines if line.startswith("{")]
    assert {document["process"] for document in documents} == {"worker"}
    assert any(document["event"].endswith(" ready.") for document in documents)
    assert any(
        document.get("task") == "worker.track" and document.get("task_id") == answer.id for document in documents
    )
    assert "canary" not in "".join(lines)


@pytest.mark.usefixtures("database_and_redis")
@pytest.mark.parametrize("name", ["beat", "flower"])
def test_beat_and_flower_write_json_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All lines are JSON from the first one on."""
    if name == "flower":
        monkeypatch.setenv("FLOWER_BASIC_AUTH", "a:b")
        monkeypatch.setenv("FLOWER_PORT", str(free_port()))
    text = {"beat": "beat: Starting", "flower": "Visit me"}[name]
    command = [sys.executable, "-m", "celery", "-A", "worker.app", name]
    command += ["--loglevel", "INFO"] if name == "beat" else []
    log = tmp_path / f"{name}.log"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, cwd=tmp_path) as process:
        try:
            wait_until(
                lambda: process.poll() is not None or text in log.read_text(), f"it says {text!r}", seen=log.read_text
            )
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()  # Celery may lose the SystemExit that its signal handler raises
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(text in record["event"] for record in records), log.read_text()
    assert {record["process"] for record in records} == {name}


def test_up_passes_json_lines_on_and_converts_other_lines() -> None:
    """Converted lines have the name of the process that wrote them."""
    out = io.StringIO()
    say = json_writer(out)
    say("worker", '{"time": "2026-01-01T00:00:00.000Z", "event": "x"}')
    say("release", 'is at "0007"')
    first, second = map(json.loads, out.getvalue().splitlines())
    assert first == {"time": "2026-01-01T00:00:00.000Z", "event": "x"}
    assert (second["process"], second["event"], second["level"]) == ("release", 'is at "0007"', "INFO")


@pytest.mark.parametrize(
    ("value", "is_terminal", "as_json"),
    [
        ("auto", True, False),
        ("auto", False, True),
        ("json", True, True),
        ("TEXT", False, False),
        ("%(message)s", False, True),  # a value that a web app may have set
    ],
)
def test_logs_are_text_on_a_terminal_unless_log_format_says_otherwise(
    value: str, is_terminal: bool, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOG_FORMAT", value)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    assert load().json_logs(stream) is as_json
