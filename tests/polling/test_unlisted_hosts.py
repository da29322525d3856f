"""Jobs whose fetch host is not on SD_API_HOSTS: they get no request, every view says why, and they end."""

from datetime import timedelta

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, select, update

from tests.polling.polls import KEY, Polls, submitted
from worker.core.circuit_breaker import NOT_LISTED
from worker.operations.explain import explain, why
from worker.operations.job_context import read_context
from worker.operations.overview import overview
from worker.sandbox import Sandbox
from worker.settings import Settings
from worker.store.engine import database_now
from worker.store.jobs import job_row, outputs_of
from worker.store.late_looks import look_of
from worker.store.promises import add_promises, promise_row
from worker.store.schema import breakers, jobs


class Unlisted:
    """A job at a host that one process lists and another does not."""

    def __init__(self, engine: Engine, redis_url: str, sandbox: Sandbox) -> None:
        own = sandbox.url.split("/")[2]
        self.engine = engine
        self.host = own.replace("127.0.0.1", "localhost")
        self.listing = Polls(engine, redis_url, sandbox, other_host=self.host)
        self.unlisting = Polls(engine, redis_url, sandbox, options={"unlisted_seconds": 0.0, "late_looks": (3_600.0,)})
        (remote_id,) = submitted(sandbox, 1)
        (self.job_id,) = self.listing.track([remote_id], host=self.host)
        self.settings = Settings(sd_api_url=sandbox.url, sd_api_key=SecretStr(KEY))

    @property
    def held(self) -> bool:
        """Return whether its host is held because it is not listed."""
        with self.engine.connect() as connection:
            reason = connection.execute(select(breakers.c.reason).where(breakers.c.name == self.host)).scalar()
        return (reason or "").startswith(NOT_LISTED)

    def age_hold(self) -> None:
        """Make the hold two minutes old."""
        with self.engine.begin() as connection:
            since = database_now(connection) - timedelta(minutes=2)
            connection.execute(update(breakers).where(breakers.c.name == self.host).values(since=since))

    def pass_deadline(self) -> None:
        """Move the job's deadline into the past."""
        with self.engine.begin() as connection:
            late = database_now(connection) - timedelta(seconds=1)
            connection.execute(update(jobs).where(jobs.c.id == self.job_id).values(deadline_at=late))


@pytest.fixture
def unlisted(engine: Engine, redis_url: str, sandbox: Sandbox) -> Unlisted:
    """A job at an unlisted host."""
    return Unlisted(engine, redis_url, sandbox)


def test_given_an_unlisted_host_then_it_is_held_and_every_view_says_so(unlisted: Unlisted) -> None:
    """The advice names the setting. No request is sent or counted."""
    unlisted.unlisting.until(lambda: unlisted.held)
    row = unlisted.unlisting.row(unlisted.job_id)
    assert (row.status, row.polls, row.claim_token) == ("pending", 0, None)
    with unlisted.engine.connect() as connection:
        job = job_row(connection, unlisted.job_id)
        assert job is not None
        state = overview(connection, unlisted.settings)
        context = read_context(connection, job, [], [], unlisted.settings)
    assert [(host.host, host.reason.startswith(NOT_LISTED)) for host in state.work.hosts] == [(unlisted.host, True)]
    assert state.work.healthy
    assert f"held: {unlisted.host} {NOT_LISTED}: add {unlisted.host} to it" in why(context)
    explanation = explain(context, None)
    assert any(NOT_LISTED in finding.detail for finding in explanation.findings)
    assert f"add {unlisted.host} to SD_API_HOSTS" in explanation.advice


def test_given_such_a_job_past_its_deadline_when_the_hold_is_a_minute_old_then_it_ends_as_expired(
    unlisted: Unlisted,
) -> None:
    """No process may poll it. The `on_done` call is sent."""
    unlisted.unlisting.until(lambda: unlisted.held)
    unlisted.pass_deadline()
    unlisted.unlisting.run()
    assert unlisted.unlisting.row(unlisted.job_id).status == "pending"
    unlisted.age_hold()
    unlisted.unlisting.until(lambda: unlisted.unlisting.row(unlisted.job_id).status == "expired")
    row = unlisted.unlisting.row(unlisted.job_id)
    assert (row.error_code, row.polls, row.due_at) == ("expired", 0, None)
    assert NOT_LISTED in row.error_message
    assert row.completed_at is not None
    assert unlisted.unlisting.notified == [unlisted.job_id]


def test_given_such_a_job_with_a_promised_link_when_it_would_expire_then_the_link_is_tried_first(
    unlisted: Unlisted,
) -> None:
    """A link can be fetched without the API. If it does not work, the expired job is polled again later."""
    with unlisted.engine.begin() as connection:
        add_promises(connection, {unlisted.job_id: ("https://h.example/a.png",)})
    unlisted.unlisting.until(lambda: unlisted.held)
    unlisted.pass_deadline()
    unlisted.age_hold()
    unlisted.unlisting.until(lambda: unlisted.unlisting.row(unlisted.job_id).status == "downloading")

    with unlisted.engine.connect() as connection:
        [output] = outputs_of(connection, [unlisted.job_id])
        promise = promise_row(connection, unlisted.job_id)
        look = look_of(connection, unlisted.job_id)
    assert (output.url, output.status) == ("https://h.example/a.png", "pending")
    assert look is not None
    assert (look.looks, look.due_at) == (
        0,
        unlisted.unlisting.row(unlisted.job_id).deadline_at + timedelta(hours=1),
    )
    assert promise is not None
    assert (promise.end_status, promise.end_code) == ("expired", "expired")


def test_given_such_a_job_before_its_deadline_then_it_waits(unlisted: Unlisted) -> None:
    """However old the hold is."""
    unlisted.unlisting.until(lambda: unlisted.held)
    unlisted.age_hold()
    unlisted.unlisting.run()
    assert unlisted.unlisting.row(unlisted.job_id).status == "pending"


def test_given_a_corrected_setting_then_the_job_is_polled_at_once(unlisted: Unlisted) -> None:
    """By the process that lists the host. The hold ends with the answer."""
    unlisted.unlisting.until(lambda: unlisted.held)
    unlisted.listing.until(lambda: unlisted.listing.row(unlisted.job_id).status == "downloading")
    assert not unlisted.held


def test_given_a_process_that_lists_the_host_then_no_other_process_holds_it(unlisted: Unlisted) -> None:
    """As in a rolling deployment: the old process leaves the host to the new one."""
    unlisted.listing.until(lambda: unlisted.listing.row(unlisted.job_id).status == "downloading")
    unlisted.listing.track(["78"], host=unlisted.host)
    unlisted.unlisting.run()
    assert not unlisted.held
