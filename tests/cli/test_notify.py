"""The command `notify`: webhooks of jobs are sent again."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, insert, select

from tests.command_line import Run, command_runner
from tests.rows import NOW, add_job
from worker.core.webhook import event_id
from worker.store.audit import latest_actions
from worker.store.engine import database_now
from worker.store.schema import events

FINAL: dict[str, Any] = {"status": "completed", "due_at": None, "ready_at": NOW, "completed_at": NOW}


@pytest.fixture
def run(engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command in this process, on the test database."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return command_runner(capsys)


def add_event(connection: Connection, remote_id: str, url: str = "https://shop.test/hook", **changes: Any) -> int:
    """Add a completed job with a webhook event. Return the id of the job."""
    job_id = add_job(connection, remote_id, webhook_url=url, announced_at=NOW, **FINAL)
    values = {
        "event_id": f"{event_id(job_id, NOW)}",
        "job_id": job_id,
        "type": "job.completed",
        "url": url,
        "body": "{}",
    }
    connection.execute(insert(events).values(**(values | {"status": "pending", "created_at": NOW} | changes)))
    return job_id


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


def test_given_a_receiver_that_refused_webhooks_then_those_are_sent_again_and_no_others(
    engine: Engine, run: Run
) -> None:
    refused: dict[str, Any] = {"attempts": 3, "http_status": 500, "error_message": "HTTP 500"}
    given_up: dict[str, Any] = {"status": "failed", "due_at": None, "ended_at": NOW, **refused}
    delivered: dict[str, Any] = {"status": "delivered", "due_at": None, "ended_at": NOW}
    with engine.begin() as connection:
        later = database_now(connection) + timedelta(hours=1)
        first = add_event(connection, "1", **given_up)
        second = add_event(connection, "2", due_at=later, **refused)
        add_event(connection, "3", due_at=later)
        add_event(connection, "4", **delivered)
        add_event(connection, "5", "https://shop.test:8443/hook", **given_up)

    result = run("notify", "--receiver", "shop.test", "--json")
    again = run("notify", "--receiver", "shop.test")

    assert (result.code, [(row["id"], row["changed"]) for row in result.document]) == (
        0,
        [(first, True), (second, True)],
    )
    assert (again.code, again.out) == (0, "")
    assert "shop.test has refused no webhook that is not delivered" in again.err


@pytest.mark.parametrize("arguments", [(), ("x",), ("1", "--remote", "1"), ("1", "--receiver", "shop.test")])
def test_it_takes_ids_or_a_remote_id(arguments: tuple[str, ...], run: Run) -> None:
    assert run("notify", *arguments).code == 2
