"""Log lines as JSON: one event each, ids as fields, and the key in none of them, wherever it was written."""

import ast
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from tests.servers import celery_worker, free_port
from tests.waiting import wait_until
from worker import track
from worker.launch.up import json_writer
from worker.settings import load
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.system import json_logs
from worker.system.json_logs import RESERVED, JsonFormatter
from worker.system.redaction import Scrubber

KEY = 'sk-"canary"/\\-é7f3a'
ROOT = Path(__file__).parents[2]


class Lines:
    """A logger of a name, and what it wrote."""

    def __init__(self, name: str) -> None:
        self.out = io.StringIO()
        handler = logging.StreamHandler(self.out)
        handler.setFormatter(JsonFormatter(Scrubber([KEY]), "downloads"))
        self.log = logging.Logger(name)  # of its own, with no parents
        self.log.addHandler(handler)

    @property
    def last(self) -> dict[str, Any]:
        """The last line, which must be JSON."""
        found: dict[str, Any] = json.loads(self.out.getvalue().splitlines()[-1])
        return found


@pytest.fixture
def ours() -> Lines:
    """A logger of ours."""
    return Lines("worker.polling.recorder")


def test_an_event_has_its_words_and_its_ids_as_fields(ours: Lines) -> None:
    """Numbers stay numbers, lists lists; who wrote it, and when, in UTC."""
    ours.log.warning("rows are set aside jobs=%s ms=%.1f at=%s:%s name=%s", (1, 2), 1.26, "file.py", 7, None)

    line = ours.last
    moment = datetime.fromisoformat(line.pop("time"))
    assert moment.utcoffset() == timedelta()
    assert line == {
        "level": "WARNING",
        "logger": "worker.polling.recorder",
        "event": "rows are set aside",
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
        ("told job=7 words", (), "told job=7 words", {}),
        ("half %% job=%s", (7,), "half % job=7", {}),
        ("told level=%s event=%s", ("x", "y"), "told", {"level_": "x", "event_": "y"}),
        ("one job=%(job)s", ({"job": 7},), "one job=7", {}),
        ("worth share=%s", (float("nan"),), "worth", {"share": "nan"}),
    ],
)
def test_fields_come_from_the_template_alone(
    ours: Lines, template: str, args: tuple[Any, ...], event: str, fields: dict[str, Any]
) -> None:
    """What somebody else wrote can't make a field, nor hide one."""
    ours.log.error(template, *args)

    line = ours.last
    shown = {name: value for name, value in line.items() if name not in RESERVED}
    assert (line["event"], shown, line["level"]) == (event, fields, "ERROR")


def test_others_lines_are_events_as_a_whole() -> None:
    """Those of Celery about a task name it."""
    theirs = Lines("celery.app.trace")
    about = {"id": "0-1", "name": "worker.poll", "args": "[secret]"}
    theirs.log.info("Task %(name)s[%(id)s] key=value", about, extra={"data": about})

    line = theirs.last
    assert (line["event"], line["task"], line["task_id"]) == ("Task worker.poll[0-1] key=value", "worker.poll", "0-1")
    assert "secret" not in theirs.out.getvalue()


def test_the_key_is_nowhere_in_a_line(ours: Lines) -> None:
    """Template, arguments, lists, objects, exception and its causes, extra, stack."""
    try:
        try:
            raise ValueError(KEY)
        except ValueError as inner:
            raise RuntimeError(f"because of {inner}") from inner
    except RuntimeError:
        ours.log.exception(
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
        ours.log.exception("%s", KEY)

    for text in ours.out.getvalue().splitlines():
        line = json.loads(text)
        assert "canary" not in text
        assert "[key]" in line["event"]
        assert "[key]" in line["exception"]
    first = json.loads(ours.out.getvalue().splitlines()[0])
    assert (first["one"], first["two"], first["four"]) == ("[key]", ["[key]", 1], "[key]")
    assert "RuntimeError: because of [key]" in first["exception"]


def test_a_key_that_looks_like_an_escape_spoils_no_line() -> None:
    """Texts are scrubbed before they become JSON."""
    lines = Lines("worker")
    handler = lines.log.handlers[0]
    handler.setFormatter(JsonFormatter(Scrubber(["nabc"]), "worker"))
    lines.log.warning("x=%s", "\nabc nabc")
    assert lines.last["x"] == "\nabc [key]"


# ── our own lines ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _calls() -> Iterator[tuple[str, str, int]]:
    """Every line that this package logs: (where, template, how many arguments)."""
    for path in sorted((ROOT / "worker").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=attr), args=[first, *rest]):
                    if attr in ("debug", "info", "warning", "error", "exception"):
                        assert isinstance(first, ast.Constant), f"{path}:{node.lineno} has no fixed event"
                        starred = any(isinstance(one, ast.Starred) for one in rest)
                        yield f"{path}:{node.lineno}", str(first.value), -1 if starred else len(rest)


def test_every_line_of_ours_is_understood_and_no_field_hides_another() -> None:
    """A fixed event, arguments that fit, names of their own."""
    found = list(_calls())
    assert len(found) > 30
    for where, template, count in found:
        if not count:
            continue
        words = json_logs._parse_template(template)
        names = [word.field for word in words if word.field is not None]
        assert words, f"{where}: {template}"
        assert count in (-1, sum(word.arguments for word in words)), where
        assert len(names) == len(set(names)), where
        assert not RESERVED.intersection(names), f"{where}: {template}"


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def settled(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and a Redis, and logs as they are where no terminal is."""
    database = f"sqlite:///{tmp_path}/worker.db"
    made = make_engine(make_url(database))
    migrate(made)
    made.dispose()
    for name, value in {"DATABASE_URL": database, "REDIS_URL": redis_url, "SD_API_KEY": KEY}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOG_FORMAT")


@pytest.mark.usefixtures("settled")
def test_a_worker_writes_nothing_but_json_where_no_terminal_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery's own lines too; a task that fails names itself, and not what it was given."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # Celery warns whoever is root, before anything is logged
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
    words = [line for line in lines if line and not line.startswith("{")]
    assert all("shutdown" in line for line in words), words  # Celery writes this one past all logging
    documents = [json.loads(line) for line in lines if line.startswith("{")]
    assert {one["process"] for one in documents} == {"worker"}
    assert any(one["event"].endswith(" ready.") for one in documents)
    assert any(one.get("task") == "worker.track" and one.get("task_id") == answer.id for one in documents)
    assert "canary" not in "".join(lines)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("name", ["beat", "flower"])
def test_beat_and_flower_write_json_as_well(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From their first line on."""
    if name == "flower":
        monkeypatch.setenv("FLOWER_BASIC_AUTH", "a:b")
        monkeypatch.setenv("FLOWER_PORT", str(free_port()))
    says = {"beat": "Sending due task", "flower": "Visit me"}[name]
    words = [sys.executable, "-m", "celery", "-A", "worker.app", name]
    words += ["--loglevel", "INFO"] if name == "beat" else []
    log = tmp_path / f"{name}.log"
    with log.open("wb") as out, subprocess.Popen(words, stdout=out, stderr=out, cwd=tmp_path) as process:
        try:
            wait_until(
                lambda: process.poll() is not None or says in log.read_text(), f"it says {says!r}", seen=log.read_text
            )
        finally:
            process.terminate()
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(says in record["event"] for record in records), log.read_text()
    assert {record["process"] for record in records} == {name}


def test_up_hands_on_what_is_json_and_makes_json_of_the_rest() -> None:
    """With the name of the process that wrote it."""
    out = io.StringIO()
    say = json_writer(out)
    say("worker", '{"time": "2026-01-01T00:00:00.000Z", "event": "x"}')
    say("release", 'is at "0007"')
    first, second = map(json.loads, out.getvalue().splitlines())
    assert first == {"time": "2026-01-01T00:00:00.000Z", "event": "x"}
    assert (second["process"], second["event"], second["level"]) == ("release", 'is at "0007"', "INFO")


@pytest.mark.parametrize(
    ("said", "terminal", "as_json"),
    [
        ("auto", True, False),
        ("auto", False, True),
        ("json", True, True),
        ("TEXT", False, False),
        ("%(message)s", False, True),  # an app's own
    ],
)
def test_logs_are_text_on_a_terminal_unless_something_else_is_said(
    said: str, terminal: bool, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOG_FORMAT", said)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    assert load().json_logs(stream) is as_json
