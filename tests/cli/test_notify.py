"""The command `notify`: webhooks of jobs are sent again."""

from typing import Any

import pytest
from sqlalchemy import Engine, select

from tests.command_line import Run, command_runner
from tests.rows import NOW, add_job
from worker.store.audit import latest_actions
from worker.store.schema import events

FINAL: dict[str, Any] = {"status": "completed", "due_at": None, "ready_at": NOW, "completed_at": NOW}


@pytest.fixture
def run(engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command in this process, on the test database."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return command_runner(capsys)


def test_given_final_jobs_when_they_are_notified_about_then_their_events_are_due(engine: Engine, run: Run) -> None:
    with engine.begin() as connection:
        first, second = (
            add_job(connection, remote, webhook_url="https://shop.test/hook", **FINAL) for remote in ("1", "2")
        )
        silent = add_job(connection, "3", **FINAL)

    result = run("notify", str(first), "--json")
    by_remote_id = run("notify", "--remote", "2")
    mixed = run("notify", str(silent), "999999", "--json")

    assert (result.code, result.document) == (0, [{"id": first, "changed": True, "status": "completed"}])
    assert (by_remote_id.code, "True" in by_remote_id.out) == (0, True)
    assert (mixed.code, mixed.document) == (1, [{"id": silent, "changed": False, "status": "completed"}])
    assert "there is no job 999999" in mixed.err
    with engine.connect() as connection:
        due = connection.execute(select(events.c.job_id).where(events.c.due_at.is_not(None)).order_by(events.c.id))
        assert due.scalars().all() == [first, second]
        assert [(row.action, row.job_id, row.source) for row in latest_actions(connection)] == [
            ("notify", second, "cli"),
            ("notify", first, "cli"),
        ]


@pytest.mark.parametrize("arguments", [(), ("x",), ("1", "--remote", "1")])
def test_it_takes_ids_or_a_remote_id(arguments: tuple[str, ...], run: Run) -> None:
    assert run("notify", *arguments).code == 2
