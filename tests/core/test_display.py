"""External text is never markup, never moves the cursor, never changes the text direction and never hides text."""

import io
import json
import logging
import os
import pty
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, insert, update
from sqlalchemy.engine import make_url

from tests.admin_pages import PASSWORD, Operator
from tests.rows import NOW, add_downloading, add_job, add_output
from worker.admin.access import AccessControl
from worker.admin.site import make_site
from worker.cli.commands import run_command
from worker.settings import load
from worker.store.engine import make_engine
from worker.store.schema import breakers, jobs
from worker.system.json_logs import JsonFormatter
from worker.system.redaction import RedactingFilter, Scrubber

HOSTILE = (
    "[/] [bold]b[/bold] [link=http://evil.test/]l[/link] :smile: \x1b[31mred\x1b[0m \x1b]8;;http://evil.test/\x07x"
    " \u202eevil\u2066\u200b\u2060\ufeff\u061c \x9b2J line\nbreak\u2028 \U000e0041<script>"
)
HIDDEN = "\x1b\x07\x9b\u202e\u2066\u200b\u2060\ufeff\u061c\u2028\U000e0041"


@pytest.fixture
def hostile(migrated_sqlite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Fill a database in which every text is hostile, and return the id of a job. Other programs may write it."""
    shutil.copy(migrated_sqlite, tmp_path / "jobs.db")
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/jobs.db")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/jobs.db"))
    _fill(engine)
    engine.dispose()
    return 1


def _fill(engine: Engine) -> None:
    with engine.begin() as connection:
        ended = {"status": "failed", "error_code": "api_failed", "due_at": None, "completed_at": NOW}
        add_job(connection, "1", **ended)
        add_job(connection, "2", due_at=NOW - timedelta(days=1))
        stored = add_downloading(connection, "3")
        add_output(connection, stored, 0, error_code="http_error", error_message=HOSTILE, url=f"https://h/{HOSTILE}")
        texts = {
            "reference": HOSTILE,
            "kind": HOSTILE[:40],
            "error_message": HOSTILE,
            "last_answer": f"1.0 s: {HOSTILE}",
        }
        connection.execute(update(jobs).values(**texts))
        hold = {"reason": f"key: {HOSTILE}", "since": NOW, "until": NOW + timedelta(days=9_999)}
        connection.execute(insert(breakers).values(scope="account", name="default", **hold))
        connection.execute(insert(breakers).values(scope="host", name=HOSTILE, **hold))


COMMANDS = (
    ["list"], ["show", "1"], ["show", "2"], ["show", "3"], ["status"], ["doctor"], ["top", "--once"],
    ["track", HOSTILE], ["track", "1", "--reference", HOSTILE], ["track", "1", "--account", HOSTILE],
    ["track", "1", "--fetch-url", f"https://evil.test/{HOSTILE}"], ["show", "--remote", HOSTILE], ["show", HOSTILE],
    ["cancel", HOSTILE], ["retry", "--host", HOSTILE, "--yes"], ["hold", "--account", HOSTILE],
    ["hold", "--host", HOSTILE],
    ["prune", "--older-than", HOSTILE], ["list", "--status", HOSTILE], ["list", "--reference", HOSTILE], [HOSTILE],
    ["simulate", "--trace", HOSTILE], ["verify"], ["cancel", "2"], ["metrics"],
)  # fmt: skip


@pytest.mark.parametrize(
    "arguments", COMMANDS, ids=[" ".join(arguments)[:20].replace("\x1b", "") for arguments in COMMANDS]
)
def test_commands_show_hostile_texts_as_plain_text(
    arguments: list[str], hostile: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments) in (0, 1, 2)

    printed = "".join(capsys.readouterr())
    assert not set(HIDDEN) & set(printed)
    assert "MarkupError" not in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("arguments", [["list"], ["show", "1"]])
def test_the_terminal_view_ignores_links_colours_and_emoji_in_hostile_texts(arguments: list[str], hostile: int) -> None:
    leader, follower = pty.openpty()
    program = [str(Path(sys.executable).with_name("fetch-worker")), *arguments]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "1000"}
    with subprocess.Popen(program, stdout=follower, stderr=subprocess.DEVNULL, env=environment) as command:
        os.close(follower)
        printed = b""
        try:
            while chunk := os.read(leader, 65_536):
                printed += chunk
        except OSError:  # the end of a terminal
            pass
    os.close(leader)

    assert command.returncode == 0
    assert b"\x1b]8" not in printed
    assert b"\x1b[31mred" not in printed
    assert b":smile:" in printed
    assert b"[bold]b[/bold]" in printed


def test_json_output_keeps_hostile_texts_and_is_safe_for_the_terminal(
    hostile: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["show", "1", "--json"]) == 0

    printed = capsys.readouterr().out
    assert json.loads(printed)["error_message"].endswith(HOSTILE)
    assert not set(HIDDEN) & set(printed)


def test_a_hostile_message_is_logged_as_one_line() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.addFilter(RedactingFilter(Scrubber([])))
    logger = logging.Logger("worker.something")
    logger.addHandler(handler)

    logger.warning("held reason=%s", HOSTILE)

    assert out.getvalue().count("\n") == 1
    assert not set(HIDDEN) & set(out.getvalue())


def test_a_hostile_message_is_escaped_in_json_logs() -> None:
    record = logging.LogRecord("worker.x", logging.INFO, "", 1, "held reason=%s", (HOSTILE,), None)

    line = JsonFormatter(Scrubber([]), "worker").format(record)

    assert json.loads(line)["reason"] == HOSTILE
    assert not set(HIDDEN) & set(line)


def test_pages_show_hostile_texts_as_plain_text(hostile: int) -> None:
    site = make_site(load(), AccessControl(PASSWORD, "127.0.0.1"))
    operator = Operator(site.test_client())

    for path in (
        "/",
        "/jobs/",
        f"/jobs/details/?id={hostile}",
        "/jobs/details/?id=3",
        "/outputs/",
        "/accounts/",
        "/plots/",
    ):
        page = operator.client.get(path, follow_redirects=True).text
        assert not set(HIDDEN) & set(page), path
        assert "<script>" not in page.replace("<script src", ""), path
