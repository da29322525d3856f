"""Runs the commands on a prepared database: their JSON documents and exit codes."""

import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sqlalchemy import Engine, make_url, select, update

from tests import planted
from tests.planted_orders import add_order, add_uncertain
from tests.rows import add_output, seconds
from worker.cli import main
from worker.client.connection import loaded_settings
from worker.core.pacing.policy import PacedJob
from worker.polling.duration_learner import DurationLearner
from worker.settings import load
from worker.store.audit import record_job_action
from worker.store.counters import Tally
from worker.store.engine import close_engines, engine_for, make_engine
from worker.store.events import create_events
from worker.store.kept_answers import KeptAnswer, keep_answers
from worker.store.migrate import migrate
from worker.store.schema import events, jobs

NOWHERE = "redis://127.0.0.1:1/0"  # a closed port
ANSWER = '{"status": "success", "id": 77, "output": ["https://cdn.test/a.png"]}'
UNREAD = '{"status": "done", "assets": ["https://cdn.test/a.png"]}'
PAYLOAD = '{"prompt": "a lake"}'
TRACE = '{"t": 0, "duration": 5, "kind": "image", "eta": null}\n{"t": 1, "duration": null, "kind": "image", "eta": 3}\n'


def command_documents() -> Iterator[tuple[str, Any]]:
    """Yield each command that prints JSON, and its document, from a database that has a value for every key."""
    with _planted_folder() as folder:
        (folder / "answer.json").write_text(ANSWER)
        (folder / "trace.jsonl").write_text(TRACE)
        (folder / "order.json").write_text(PAYLOAD)
        for arguments in (
            ("track", "1001", "1002"),
            ("list",),
            ("show", "1"),
            ("show", "2"),
            ("show", "3"),
            ("show", "8"),
            ("show", "9"),
            ("status",),
            ("doctor",),
            ("top",),
            ("unread",),
            ("unread", "--shape", "status=done"),
            ("parse", "answer.json"),
            ("parse", "answer.json", "--submit"),
            ("simulate", "--trace", "trace.jsonl"),
            ("hold", "1"),
            ("resume", "1"),
            ("cancel", "1"),
            ("notify", "1"),
            ("retry", "3"),
            ("order", "v6/images/text2img", "order.json"),
            ("attach", "9", "1009"),
            ("cancel", "--account", "default", "--status", "pending", "--dry-run"),
            ("retry", "--status", "failed", "--yes"),
            ("verify", "--dry-run"),
            ("prune", "--older-than", "1h", "--dry-run"),
            ("move-storage", "--dry-run"),
            ("move-storage", "--yes"),
            ("copy-database", "sqlite:///copy.db", "--force"),
            ("unread", "--apply"),
            ("simulate", "--trace", "trace.jsonl", "--slots", "1"),
            ("order", "v6/images/text2img", "order.json"),
            ("attach", "1", "77"),
        ):
            yield " ".join(arguments), json.loads(run(*arguments, "--json")[1])


def exit_codes() -> Iterator[tuple[Sequence[str], int]]:
    """Yield commands with their exit codes: for success, failure and wrong usage."""
    with _planted_folder() as folder:
        (folder / "order.json").write_text(PAYLOAD)
        (folder / "refused.json").write_text('{"status": "error", "message": "Invalid API Key"}')
        for arguments in (
            ("--version",),
            ("list",),
            ("show", "1"),
            ("show", "999"),
            ("show", "one"),
            ("status",),
            ("doctor",),
            ("track", "1001"),
            ("track", "not an id"),
            ("track",),
            ("cancel", "1"),
            ("cancel", "1"),
            ("cancel", "999"),
            ("cancel", "--status", "pending"),
            ("retry", "2"),
            ("order", "v6/images/text2img", "missing.json"),
            ("attach", "9"),
            ("attach", "9", "1009"),
            ("attach", "9", "1009"),
            ("attach", "9", "not an id"),
            ("attach", "9"),
            ("hold", "--remote", "nobody"),
            ("verify", "--dry-run"),
            ("prune", "--older-than", "1s"),
            ("move-storage", "--dry-run"),
            ("move-storage", "--yes"),
            ("copy-database", "sqlite:///copy.db", "--force"),
            ("copy-database", "sqlite:///copy.db"),
            ("copy-database", "nonsense"),
            ("parse", "refused.json"),
            ("parse", "refused.json", "--submit"),
            ("parse", "missing.json"),
            ("simulate", "--trace", "missing.jsonl"),
            ("order", "v6/images/text2img", "order.json"),
            ("order", "v6/images/fetch/1", "order.json"),
            ("order", "v6/images/text2img", "refused.json", "--priority", "9999"),
            ("order",),
            ("attach", "1", "77"),
            ("nonsense",),
            ("list", "--status", "nonsense"),
        ):
            yield arguments, run(*arguments)[0]


def webhook_body() -> str:
    """Return the webhook body for a cancelled job with a stored and an unstored output."""
    with _planted_folder():
        engine = engine_for(load().database)
        with engine.begin() as connection:
            connection.execute(update(jobs).values(webhook_url="https://shop.test/hook"))
        run("cancel", "4")
        with engine.begin() as connection:
            create_events(connection, now=planted.now(), of=[4])
            return str(connection.execute(select(events.c.body).where(events.c.job_id == 4)).scalar_one())


def run(*arguments: str) -> tuple[int, str]:
    """Run a command in this process. Return its exit code and output."""
    output, messages = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(messages):
        try:
            main(list(arguments))
        except SystemExit as ended:
            code = ended.code
    return int(code or 0), output.getvalue()


@contextmanager
def planted_engine() -> Iterator[Engine]:
    """Create an SQLite database with jobs in every state and all other data that commands show."""
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(make_url(f"sqlite:///{folder}/planted.db"))
        try:
            migrate(engine)
            plant(engine)
            yield engine
        finally:
            engine.dispose()


@contextmanager
def _planted_folder() -> Iterator[Path]:
    """Change to a temporary folder with settings for a prepared database."""
    before = Path.cwd()
    with planted_engine() as engine, tempfile.TemporaryDirectory() as name:
        environment = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG")}
        settings = {"DATABASE_URL": str(engine.url), "REDIS_URL": NOWHERE, "SD_API_URL": "http://127.0.0.1:1/api/v3"}
        loaded_settings.cache_clear()
        os.chdir(name)
        try:
            with patch.dict(os.environ, environment | settings | {"SD_API_KEY": "a-key-of-the-test"}, clear=True):
                yield Path(name)
        finally:
            os.chdir(before)
            loaded_settings.cache_clear()
            close_engines()


def plant(engine: Engine) -> None:
    """Insert the data that commands and metrics show.

    Job 1 waits, 2 is downloading, 3 has failed, 8 is ordered, 9 is uncertain.
    """
    with engine.begin() as connection:
        first = planted.add_waiting_job(
            connection, "1", reference="an order", eta=12.0, webhook_url="https://shop.test/hook"
        )
        planted.add_downloading_job(connection, "2", error_code="http_error", error_message="HTTP 503")
        third = planted.add_failed_job(connection, "3", on_done="shop.done", on_done_attempts=1)
        planted.add_event(connection, third, due=-100.0)
        stored = {"status": "stored", "due_at": None, "stored_at": planted.now(), "location": "file:///gone/x.png"}
        file = {"sha256": "ab" * 32, "media_type": "image/png", "size_bytes": 12}
        completed = planted.add_downloading_job(connection, "4", **(stored | file))
        add_output(connection, completed, 1, error_code="gone", due_at=planted.now())
        planted.add_receiving_job(connection, "5")
        planted.add_claimed_job(connection, "6", planted.DEAD, over=500.0)
        planted.add_waiting_job(connection, "7", account="shop", due=-400.0)
        add_order(connection, "8", last_error="Failed, Try Again")
        add_uncertain(connection, "9")
        planted.add_open_breaker(connection, "account", "shop", "key_refused")
        planted.add_open_breaker(connection, "host", "api.test", "unreachable")
        planted.add_breaker(connection, "account", "default", ceiling=4.0, cut_at=planted.now())
        now = planted.now()
        tally = Tally()
        tally.finished("default", "image", "failed")
        tally.delay("default", "image", 0.4)
        tally.polled("default", "image", 3)
        tally.attempt("stored", seconds=0.2, stored_bytes=12)
        tally.write(connection)
        record_job_action(connection, "retry", third, now=now)
        keep_answers(
            connection, [KeptAnswer(first, 200, "status=done", UNREAD, recognised=False)], now=now - seconds(5)
        )
    learner = DurationLearner(engine)
    learner.prepare([("default", "image")])
    for _ in range(40):
        learner.observe("default", "image", PacedJob(20.0, 19.0), ready=True, planned=20.0)
    learner.share()
