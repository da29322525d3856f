"""The audit trail of the commands: who did what, as `show` lists it."""

import io
import os
import pwd
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, Row

from tests.command_line import Run, command_runner
from tests.moving import plant_outputs, write_files
from tests.rows import NOW, STORED, add_job, add_output
from worker.store.audit import latest_actions
from worker.store.engine import database_now
from worker.store.kept_answers import KeptAnswer, keep_answers
from worker.store.schema import HELD_UNTIL

LATER = {"due_at": HELD_UNTIL.replace(year=9998), "deadline_at": HELD_UNTIL.replace(year=9998)}
FAILED: dict[str, Any] = {"status": "failed", "error_code": "api_failed", "due_at": None, "completed_at": NOW}
READY = '{"status": "success", "id": 1, "output": ["https://cdn.test/a.png"]}'
USER = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
def run(
    engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, redis_url: str
) -> Run:
    """Return a function that runs a command in this process, on the test database, without a terminal."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("STORAGE_URL", f"file:{tmp_path}/out")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.delenv("SUDO_USER", raising=False)
    (tmp_path / "out").mkdir()
    return command_runner(capsys)


def _trail(engine: Engine) -> list[Row[Any]]:
    with engine.connect() as connection:
        return list(reversed(latest_actions(connection)))


def _acts(engine: Engine) -> list[tuple[str, str, int]]:
    return [(row.action, row.filter, row.jobs) for row in _trail(engine)]


def test_given_a_job_when_commands_change_it_then_show_lists_them_with_the_user(engine: Engine, run: Run) -> None:
    """A dry run and a command that changes nothing are no actions."""
    with engine.begin() as connection:
        job_id = add_job(connection, "1", **LATER)
        add_job(connection, "2", **LATER)

    for arguments in (("hold", "--dry-run"), ("hold",), ("hold",), ("resume",), ("cancel",)):
        run(*arguments, str(job_id))
    shown = run("show", str(job_id), "--json").document["actions"]
    table = run("show", str(job_id)).out

    assert [(act["action"], act["filter"], act["jobs"]) for act in shown] == [
        (name, str(job_id), 1) for name in ("hold", "resume", "cancel")
    ]
    assert {(act["source"], act["who"]) for act in shown} == {("cli", USER)}
    assert all(act["at"].endswith("Z") for act in shown)
    assert "cli" in table
    assert USER in table


def test_given_sudo_when_a_command_changes_a_job_then_its_caller_is_the_user(
    engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_USER", "ann")
    with engine.begin() as connection:
        job_id = add_job(connection, "1", **LATER)

    run("cancel", str(job_id))

    assert [row.who for row in _trail(engine)] == ["ann"]


def test_given_a_user_without_a_name_when_a_command_changes_a_job_then_its_number_is_recorded(
    engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4_294_000_000)
    with engine.begin() as connection:
        job_id = add_job(connection, "1", **LATER)

    run("cancel", str(job_id))

    assert [row.who for row in _trail(engine)] == ["4294000000"]


def test_given_filters_when_commands_change_their_jobs_then_the_rows_can_be_typed_again(
    engine: Engine, run: Run
) -> None:
    with engine.begin() as connection:
        for number in range(3):
            add_job(connection, str(number), **FAILED, account="shop", reference="order 7")
        add_job(connection, "4", account="shop", **LATER)

    run("retry", "--status", "failed", "--account", "shop", "--reference", "order 7", "--yes")
    run("retry", "--status", "failed", "--account", "shop", "--yes")  # no job is failed any more
    run("hold", "--account", "shop")
    run("hold", "--account", "shop", "--status", "pending", "--yes")

    assert _acts(engine) == [
        ("retry", "--status failed --account shop --reference 'order 7'", 3),
        ("hold", "--account shop", 0),
        ("hold", "--status pending --account shop", 4),
    ]


def test_given_kept_answers_when_they_are_read_again_then_the_changed_jobs_are_recorded(
    engine: Engine, run: Run
) -> None:
    with engine.begin() as connection:
        now = database_now(connection)
        for number in range(2):
            job_id = add_job(connection, str(number + 1), **LATER)
            body = READY.replace('"id": 1', f'"id": {number + 1}')
            keep_answers(connection, [KeptAnswer(job_id, 200, f"shape {number}", body, recognised=False)], now=now)

    run("unread", "--apply", "--shape", "shape 1")
    for _ in range(2):
        run("unread", "--apply")

    assert _acts(engine) == [("unread", "--apply --shape 'shape 1'", 1), ("unread", "--apply", 1)]


def test_given_old_jobs_when_an_operator_prunes_then_the_removed_jobs_are_recorded(
    engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.operations.prune.BATCH", 2)
    with engine.begin() as connection:
        ended = database_now(connection) - timedelta(days=40)
        for number in range(5):
            add_job(connection, str(number), **(FAILED | {"completed_at": ended, "tracked_at": ended}))

    run("prune", "--older-than", "720h", "--status", "failed", "--dry-run")
    run("prune", "--older-than", "720h", "--status", "failed", "--limit", "4", "--yes")
    run("prune", "--older-than", "90m", "--status", "failed", "--status", "expired", "--remove-files", "--yes")

    assert _acts(engine) == [
        ("prune", "--older-than 30d --status failed --limit 4", 4),
        ("prune", "--older-than 90m --status failed --status expired --remove-files", 1),
    ]


def test_given_lost_files_when_verify_queues_them_again_then_their_jobs_are_recorded(
    engine: Engine, run: Run, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        ids = []
        for number in range(3):
            job_id = add_job(connection, str(number), status="completed", due_at=None, ready_at=NOW, completed_at=NOW)
            for position in range(2):
                location = f"file://{tmp_path}/out/0/{job_id}/{position}-{'a' * 16}.png"
                add_output(connection, job_id, position, size_bytes=1, **STORED | {"location": location})
            ids.append(job_id)

    run("verify", str(ids[0]), "--dry-run")
    run("verify", str(ids[0]), "--force")
    run("verify", "--force")

    assert _acts(engine) == [("verify", str(ids[0]), 1), ("verify", "", 2)]
    assert [row.job_id for row in _trail(engine)] == [ids[0], None]


def test_given_outputs_when_they_are_moved_then_their_jobs_are_recorded(
    engine: Engine, run: Run, tmp_path: Path
) -> None:
    write_files(tmp_path / "old", plant_outputs(engine, f"file://{tmp_path}/old", 3))

    run("move-storage", "--dry-run")
    run("move-storage", "--keep", "--yes")
    run("move-storage", "--yes")

    assert _acts(engine) == [("move-storage", f"STORAGE_URL=file://{tmp_path}/out/ --keep", 3)]
