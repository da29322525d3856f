"""The page of webhooks: find them by receiver and state, and send them again."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, insert, select, update

from tests.admin_pages import Operator
from tests.rows import NOW, add_job
from worker.core.webhook import event_id
from worker.store.engine import database_now
from worker.store.reports import pages
from worker.store.reports.pages import WebhookFilter, webhooks_page
from worker.store.schema import events

SECRET_PATH = "/hooks/canary-path?token=canary-token"  # made up


def add_event(connection: Connection, number: int, url: str, **changes: Any) -> int:
    """Add a final job with a webhook event, and return the job's id."""
    final = {"status": "completed", "due_at": None, "ready_at": NOW, "completed_at": NOW}
    job_id = add_job(connection, f"e{number}", webhook_url=url, announced_at=NOW, **final)
    values = {
        "event_id": event_id(job_id, NOW), "job_id": job_id, "type": "job.completed", "url": url, "body": "{}",
        "status": "delivered", "created_at": NOW, "due_at": None, "ended_at": NOW, "attempts": 1, "http_status": 200,
    }  # fmt: skip
    connection.execute(insert(events).values(values | changes))
    return job_id


REFUSED = {"status": "failed", "http_status": 410, "error_message": "HTTP 410"}


def test_webhooks_are_found_by_receiver_and_state(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        waiting = {"status": "pending", "due_at": NOW, "ended_at": None, "http_status": 500}
        here = add_event(connection, 1, f"https://app.test{SECRET_PATH}", **REFUSED)
        there = add_event(connection, 2, "https://other.test/hook")
        late = add_event(connection, 3, "http://app.test:8080/hook", **waiting)
        bare = add_event(connection, 4, "https://app.test?x=1")

    assert operator.ids("/webhooks/") == [bare, late, there, here]
    assert operator.ids("/webhooks/?receiver=app.test") == [bare, here]
    assert operator.ids("/webhooks/?receiver=app.test:8080") == [late]
    assert operator.ids("/webhooks/?status=failed") == [here]
    assert operator.ids("/webhooks/?status=pending") == [late]
    assert operator.ids("/webhooks/?receiver=pp.test") == []


def test_the_page_shows_the_error_and_not_the_path_of_the_receiver(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        add_event(connection, 1, f"https://app.test{SECRET_PATH}", **REFUSED)

    page = operator.client.get("/webhooks/").text

    assert "HTTP 410" in page
    assert "app.test" in page
    assert "canary" not in page


def test_selected_webhooks_are_sent_again(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        jobs = [add_event(connection, number, "https://app.test/hook", **REFUSED) for number in range(3)]

    assert "Send webhooks again" in operator.page("/webhooks/?receiver=app.test")
    assert operator.act("notify", jobs[:2]) == "2 jobs notified."

    with engine.connect() as connection:
        states = connection.execute(select(events.c.status).order_by(events.c.id)).scalars().all()
    assert states == ["pending", "pending", "failed"]


def test_given_more_webhooks_than_a_page_then_the_next_page_continues(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        jobs = [add_event(connection, number, "https://app.test/hook") for number in range(60)]
        (tenth,) = connection.execute(select(events.c.id).where(events.c.job_id == jobs[10])).one()

    assert operator.ids("/webhooks/") == jobs[:9:-1]
    assert operator.ids(f"/webhooks/?before={tenth}") == jobs[9::-1]


def test_given_no_webhook_then_the_page_says_how_to_get_one(operator: Operator) -> None:
    assert "No webhooks yet" in operator.page("/webhooks/")
    assert "No webhook matches" in operator.page("/webhooks/?receiver=app.test")


def test_a_search_that_takes_too_long_stops_and_can_be_continued(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "WINDOW", 5)
    with engine.begin() as connection:
        oldest = add_event(connection, 0, "https://app.test/hook")
        for number in range(1, 30):
            add_event(connection, number, "https://other.test/")
        ticks = iter(range(1_000))
        only_first = WebhookFilter(receiver="app.test")
        first = webhooks_page(connection, only_first, before=None, limit=50, clock=lambda: next(ticks))
        rest = webhooks_page(connection, only_first, before=first.before, limit=50)

    assert (first.rows, first.searched_to) == ([], first.before)
    assert [row.job_id for row in rest.rows] == [oldest]


def test_pending_events_of_the_database_have_a_due_time(operator: Operator, engine: Engine) -> None:
    """The page shows when the next attempt is due."""
    with engine.begin() as connection:
        due = database_now(connection) + timedelta(hours=1)
        add_event(connection, 1, "https://app.test/", status="pending", due_at=NOW, ended_at=None)
        connection.execute(update(events).values(due_at=due))

    assert f"{due:%Y-%m-%d %H:%M}" in operator.page("/webhooks/")
