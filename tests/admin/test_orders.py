"""Orders on the admin page: their payload and place, the filter by state, and the form that attaches one."""

import json
import re

import pytest
from sqlalchemy import Engine, select

from tests.admin_pages import Operator
from tests.planted_orders import ENDPOINT, LOST, add_at_api, add_order, add_uncertain
from tests.rows import read_job
from worker.store.schema import actions


@pytest.fixture
def engine(sqlite_engine: Engine) -> Engine:
    """SQLite only: the pages do not depend on the database."""
    return sqlite_engine


def buttons(operator: Operator, job_id: int) -> list[str]:
    """Return the buttons of a job's page that act on the job."""
    text = operator.client.get(f"/jobs/details/?id={job_id}").text
    forms = re.findall(r'<form class="acts".*?</form>', text, re.DOTALL)
    return [label for form in forms for label in re.findall(r"<button[^>]*>([^<]+)</button>", form)]


def test_a_job_that_waits_to_be_sent_has_its_order_on_its_page(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        payload = json.dumps({"prompt": "x" * 5_000})
        job_id = add_order(connection, payload=payload, attempts=2, last_error="Failed, Try Again")

    page = operator.page(f"/jobs/details/?id={job_id}")

    for text in (ENDPOINT, "Failed, Try Again", "0 of 5 taken", "place in the queue", "characters more"):
        assert text in page, text
    assert page.count("x") < 2_300
    assert buttons(operator, job_id) == ["Cancel"]


def test_an_uncertain_order_is_attached_by_its_form(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = add_uncertain(connection)

    assert LOST in operator.page(f"/jobs/details/?id={job_id}")
    assert buttons(operator, job_id) == ["Retry", "Cancel", "Attach"]
    answer = operator.send("/jobs/attach/", rowid=job_id, remote_id=" 12202888 ")

    assert answer.location == f"/jobs/details/?id={job_id}"
    assert f"Job {job_id} is attached to 12202888" in operator.page(f"/jobs/details/?id={job_id}")
    job = read_job(engine, job_id)
    assert (job.status, job.remote_id) == ("pending", "12202888")
    with engine.connect() as connection:
        row = connection.execute(select(actions)).one()
    assert (row.action, row.source, row.who, row.job_id) == ("attach", "page", "admin", job_id)


@pytest.mark.parametrize(("remote_id", "message"), [("../x", "Not attached: "), ("", "Not attached: ")])
def test_an_invalid_remote_id_is_refused(operator: Operator, engine: Engine, remote_id: str, message: str) -> None:
    with engine.begin() as connection:
        job_id = add_uncertain(connection)

    operator.send("/jobs/attach/", rowid=job_id, remote_id=remote_id)

    assert message in operator.page(f"/jobs/details/?id={job_id}")
    assert read_job(engine, job_id).status == "uncertain"


def test_an_order_that_is_not_uncertain_is_not_attached(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = add_order(connection)

    operator.send("/jobs/attach/", rowid=job_id, remote_id="12202888")

    assert f"Not attached: job {job_id} is not uncertain." in operator.page("/jobs/")
    assert read_job(engine, job_id).status == "ordered"


def test_an_uncertain_order_is_sent_again_and_a_waiting_one_is_cancelled(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        lost, waiting = add_uncertain(connection, "1"), add_order(connection, "2")

    assert operator.act("retry", [lost]) == "1 job retried."
    assert operator.act("cancel", [waiting]) == "1 job cancelled."
    assert [read_job(engine, job_id).status for job_id in (lost, waiting)] == ["ordered", "cancelled"]


def test_orders_are_counted_and_found_by_their_states(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        waiting, lost = add_order(connection, "1"), add_uncertain(connection, "2")
        add_at_api(connection, "3")

    overview = operator.page("/")
    accounts = operator.page("/accounts/")

    assert re.search(r"1\s+ordered\s+1\s+uncertain\s+1\s+pending", overview)
    assert "1 job uncertain: the order was sent and its answer is lost" in overview
    assert "1 of 5" in accounts
    assert operator.ids("/jobs/?status=ordered") == [waiting]
    assert operator.ids("/jobs/?status=uncertain") == [lost]


def test_a_viewer_sees_the_order_and_no_form(viewer: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = add_uncertain(connection)

    assert ENDPOINT in viewer.page(f"/jobs/details/?id={job_id}")
    assert buttons(viewer, job_id) == []
    assert viewer.send("/jobs/attach/", rowid=job_id, remote_id="1").status_code == 403
    assert read_job(engine, job_id).status == "uncertain"
