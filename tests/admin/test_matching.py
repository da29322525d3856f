"""Actions on all jobs that a filter finds."""

import html
import re
from datetime import timedelta

import pytest
from sqlalchemy import Engine, func, select, update

from tests.admin_pages import Operator
from tests.rows import NOW, add_downloading, add_job, add_output, add_process, read_job
from worker.admin import job_actions
from worker.store.engine import database_now
from worker.store.schema import actions, jobs

FAILED = {"status": "failed", "due_at": None, "completed_at": NOW, "error_code": "api_failed"}
MANY = 700  # more than a form can name, and more than one transaction


def messages(page: str) -> list[str]:
    """Return the messages of a page."""
    return [html.unescape(text) for text in re.findall(r'<p class="message [a-z]+" role="status">([^<]*)</p>', page)]


def count(engine: Engine, status: str) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).where(jobs.c.status == status)).scalar_one()


def test_given_many_matching_jobs_then_the_page_asks_with_their_number_and_changes_all_of_them(
    operator: Operator, engine: Engine
) -> None:
    with engine.begin() as connection:
        for number in range(MANY):
            add_job(connection, f"f{number}", **FAILED)
        others = [add_job(connection, "x", account="shop", **FAILED), add_job(connection, "waits")]
    path = "/jobs/matching/?status=failed&account=default"

    question = operator.send(path, action="retry").text
    untouched = count(engine, "failed")
    answer = operator.send(path, action="retry", confirmed="yes")
    page = operator.client.get(answer.location).text

    assert "Retry 700 jobs?" in question
    assert "--status failed --account default" in question
    assert untouched == MANY + 1
    assert answer.location == "/jobs/?status=failed&account=default"
    assert messages(page) == ["700 jobs retried."]
    assert [read_job(engine, job_id).status for job_id in others] == ["failed", "pending"]
    assert count(engine, "pending") == MANY + 1


def test_the_number_counts_only_jobs_that_the_action_can_change(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        for number in range(3):
            add_job(connection, f"f{number}", **FAILED)
        add_job(connection, "waits")

    assert "Retry 3 jobs?" in operator.send("/jobs/matching/?account=default", action="retry").text
    assert "Hold 1 job?" in operator.send("/jobs/matching/?account=default", action="hold").text


def test_the_audit_trail_has_one_row_with_the_filter(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        for number in range(2):
            add_job(connection, f"f{number}", **FAILED)

    operator.send("/jobs/matching/?code=api_failed", action="retry", confirmed="yes")

    with engine.connect() as connection:
        (row,) = connection.execute(select(actions)).all()
    assert (row.action, row.source, row.who, row.filter, row.jobs) == ("retry", "page", "admin", "--code api_failed", 2)


@pytest.mark.parametrize(
    ("query", "message"),
    [("", "Choose a filter first: without one, all jobs would change."),
     ("?status=failed", "No matching job can be retried."),
     ("?account=shp", "No matching job can be retried.")],
    ids=["no filter", "nothing matches", "an unknown account"],
)  # fmt: skip
def test_given_nothing_to_change_then_the_page_says_so(
    operator: Operator, engine: Engine, query: str, message: str
) -> None:
    with engine.begin() as connection:
        job_id = add_job(connection, "waits")

    answer = operator.send(f"/jobs/matching/{query}", action="retry")

    assert answer.status_code == 302
    assert messages(operator.client.get(answer.location).text) == [message]
    assert read_job(engine, job_id).status == "pending"


@pytest.mark.parametrize("action", ["", "notify", "delete", "retry; drop"])
def test_other_actions_are_refused(operator: Operator, action: str) -> None:
    assert operator.send("/jobs/matching/?status=failed", action=action, confirmed="yes").status_code == 404


def test_given_a_url_with_other_parameters_then_they_do_not_reach_the_next_address(operator: Operator) -> None:
    answer = operator.send("/jobs/matching/?status=failed&_external=1&_scheme=javascript&_anchor=x", action="retry")

    assert answer.location == "/jobs/?status=failed"


def test_given_that_the_time_has_run_out_then_the_page_says_how_to_change_the_rest(
    operator: Operator, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_actions, "MATCHING_SECONDS", 0.0)
    with engine.begin() as connection:
        for number in range(MANY):
            add_job(connection, f"f{number}", **FAILED)

    answer = operator.send("/jobs/matching/?status=failed", action="cancel", confirmed="yes")
    first = messages(operator.client.get(answer.location).text)
    answer = operator.send("/jobs/matching/?status=failed", action="retry", confirmed="yes")
    (message,) = messages(operator.client.get(answer.location).text)

    assert first == ["0 jobs cancelled."]
    assert message.startswith("300 jobs retried. The page stopped after")
    assert "`fetch-worker retry --status failed`" in message
    assert count(engine, "failed") == MANY - 300


def test_given_a_filter_then_the_list_offers_actions_on_all_its_jobs(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        add_job(connection, "waits")

    assert "All jobs that match" in operator.page("/jobs/?status=pending")
    assert "All jobs that match" not in operator.page("/jobs/")
    assert "All jobs that match" not in operator.page("/jobs/?status=pending&search=waits")
    assert "All jobs that match" not in operator.page("/jobs/?account=shp")


def test_jobs_can_be_found_by_the_error_of_an_output(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        stuck = add_downloading(connection, "stuck")
        add_output(connection, stuck, error_code="storage", error_message="disk full")
        add_output(connection, add_downloading(connection, "fine"))

    assert operator.ids("/jobs/?output_code=storage") == [stuck]


def test_given_a_trouble_then_the_overview_has_a_button_that_does_what_its_command_does(
    operator: Operator, engine: Engine
) -> None:
    with engine.begin() as connection:
        now = database_now(connection)
        add_process(connection)
        job_id = add_job(connection, "late", submitted_at=now, deadline_at=now - timedelta(hours=1))
        connection.execute(update(jobs).values(due_at=now + timedelta(hours=1)))
    page = operator.client.get("/").text
    command = re.search(r"<code>(fetch-worker resume [^<]*)</code>", page)
    form = re.search(r'<form method="post" action="([^"]+)">(.*?)</form>', page[page.index("Troubles") :], re.DOTALL)
    assert command is not None
    assert form is not None
    fields = dict(re.findall(r'name="([^"]+)" value="([^"]*)"', form[2]))

    question = operator.send(form[1], **fields).text

    assert command[1] == f"fetch-worker resume {job_id}"
    assert "Resume this job?" in question
