"""A process exits between two steps of sending an order. Each has one right outcome, and no order is paid for twice."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from tests.faults.servers import RedisServer, celery, wait_completed
from tests.faults.test_crash_points import EXIT_AFTER, EXIT_BEFORE, EXIT_CODE
from tests.waiting import wait_until
from worker import get, order, retry
from worker.sandbox import Sandbox
from worker.store.schema import jobs

LEASE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """Where a process exits: the planted code, the state afterwards, and how often the order is charged by then."""

    plant: str
    state: str
    charged: int


CRASH_POINTS = {
    "between claim and attempt": CrashPoint(
        EXIT_BEFORE.format(module="worker.ordering.order_client", owner="OrderClient", name="send"), "ordered", 0
    ),
    "between attempt and first byte": CrashPoint(
        EXIT_AFTER.format(module="worker.ordering.submitter", owner="Submitter", name="_attempt"), "uncertain", 0
    ),
    "between the request and its answer": CrashPoint(
        EXIT_BEFORE.format(module="worker.net", owner="pooled_adapter", name="read_whole"), "uncertain", 1
    ),
    "between the answer and its record": CrashPoint(
        EXIT_BEFORE.format(module="worker.ordering", owner="order_recorder", name="record_taken"), "uncertain", 1
    ),
    "before the commit of an answer": CrashPoint(
        EXIT_AFTER.format(module="worker.ordering", owner="order_recorder", name="record_taken"), "uncertain", 1
    ),
}


def _state(database: Engine) -> str:
    with database.connect() as connection:
        return str(connection.execute(select(jobs.c.status)).scalar_one())


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize("name", CRASH_POINTS)
def test_given_a_sender_that_exits_between_two_steps_when_another_one_starts_then_the_order_has_its_one_right_outcome(
    name: str, tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """An order that was not sent is sent by the next process; any other is uncertain until somebody retries it."""
    point = CRASH_POINTS[name]
    sandbox.options_now(min_seconds=0.2, max_seconds=0.5)
    with celery(tmp_path, "doomed", plant=point.plant) as doomed:
        job_id = order("v6/images/text2img", {"prompt": "a lighthouse", "samples": 1})
        assert doomed.wait(120) == EXIT_CODE, (tmp_path / "doomed.log").read_text()[-2_000:]
    assert sandbox.charges.charged == point.charged

    with celery(tmp_path, "healthy"):
        if point.state == "uncertain":
            wait_until(lambda: _state(database) == "uncertain", "the order is uncertain", seconds=LEASE_SECONDS)
            assert sandbox.charges.charged == point.charged, "it is not sent again by itself"
            assert retry(job_id)
        wait_completed(database, 1, tmp_path)

    job = get(job_id)
    assert job is not None
    assert job.status == "completed"
    assert sandbox.charges.charged == point.charged + 1
