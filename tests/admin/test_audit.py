"""The audit trail on the page: the list of actions, the actions of a job, and what the page itself records."""

import re
from typing import Any

from sqlalchemy import Engine, Row, insert, select

from tests.admin_pages import Operator
from tests.rows import NOW, add_job, seconds
from worker.store.audit import latest_actions, record_action, record_job_action
from worker.store.schema import breakers, events
from worker.system.who import acting


def _trail(engine: Engine) -> list[Row[Any]]:
    with engine.connect() as connection:
        return list(reversed(latest_actions(connection)))


def test_given_the_page_when_an_operator_acts_then_each_changed_job_is_recorded(
    operator: Operator, engine: Engine
) -> None:
    """Jobs that do not change, and forms that are not confirmed, are no actions."""
    with engine.begin() as connection:
        first, second = add_job(connection, "1"), add_job(connection, "2")
        connection.execute(insert(breakers).values(scope="host", name="api.test", proven=True))

    operator.send("/jobs/action/", action="hold", rowid=[first, second])
    operator.act("hold", [first, second, 4_711])
    operator.act("hold", [first])
    operator.send("/accounts/act/", action="hold", confirmed="yes", scope="host", name="api.test")

    assert [(row.action, row.filter, row.jobs) for row in _trail(engine)] == [
        ("hold", str(first), 1),
        ("hold", str(second), 1),
        ("hold", "--host api.test", 0),
    ]
    assert {(row.source, row.who) for row in _trail(engine)} == {("page", "admin")}


def test_the_page_of_a_job_lists_its_actions(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection, acting("cli", "ann"):
        job_id, other = add_job(connection, "1"), add_job(connection, "2")
        record_job_action(connection, "retry", job_id, now=NOW)

    text = " ".join(operator.page(f"/jobs/details/?id={job_id}").split())

    assert f"2026-03-01 12:00:00 UTC retry {job_id} 1 cli ann" in text
    assert " ann " not in operator.page(f"/jobs/details/?id={other}")


def test_the_page_of_actions_lists_them_newest_first_in_pages(operator: Operator, engine: Engine) -> None:
    evil = "<script>alert(1)</script>"
    with engine.begin() as connection:
        for number in range(70):
            record_action(connection, "cancel", f"--account a{number}", jobs=number, now=NOW + seconds(number))
        with acting("cli", evil):
            record_action(connection, "cancel", evil, jobs=1_234, now=NOW)

    pages, path = [], "/actions/"
    while path:
        text = operator.client.get(path).text
        assert evil not in text
        pages.append(re.findall(r"--account (a\d+)", text))
        next_link = re.search(r'rel="next" href="([^"]+)"', text)
        path = "" if next_link is None else next_link[1].replace("&amp;", "&")

    assert [len(page) for page in pages] == [49, 21]
    assert [name for page in pages for name in page] == [f"a{number}" for number in range(69, -1, -1)]
    assert "1,234" in operator.page("/actions/")


def test_without_actions_the_page_says_so(operator: Operator) -> None:
    assert "No actions." in operator.page("/actions/")


def test_given_a_job_with_a_webhook_when_its_button_is_pressed_then_the_webhook_is_sent_again(
    operator: Operator, engine: Engine
) -> None:
    """The button is on the page of each job that has a webhook to send."""
    final: dict[str, Any] = {"status": "completed", "due_at": None, "ready_at": NOW, "completed_at": NOW}
    with engine.begin() as connection:
        job_id = add_job(connection, "1", webhook_url="https://shop.test/hook", **final)
        silent = add_job(connection, "2", **final)
        waiting = add_job(connection, "3", webhook_url="https://shop.test/hook")

    buttons = {id_: 'value="notify"' in operator.client.get(f"/jobs/details/?id={id_}").text
               for id_ in (job_id, silent, waiting)}  # fmt: skip
    message = operator.act("notify", [job_id, silent])

    assert buttons == {job_id: True, silent: False, waiting: False}
    assert message == "1 job notified, 1 was without a webhook to send."
    with engine.connect() as connection:
        assert [event.job_id for event in connection.execute(select(events)).all()] == [job_id]
    assert [(row.action, row.source, row.who) for row in _trail(engine)] == [("notify", "page", "admin")]
