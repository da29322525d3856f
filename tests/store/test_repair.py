"""Repairs of rows in invalid states: each run repairs one page, and costs little if there is nothing to repair."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event

from tests.planted_orders import add_at_api, add_order, add_uncertain
from tests.rows import STORED, add_downloading, add_job, add_output, read_job, read_output
from worker.store.counters import FINISHED, read_counters
from worker.store.orders import order_row
from worker.store.repair import Repaired, Repairer
from worker.store.schema import orders

WHOLE: dict[str, Any] = STORED | {"size_bytes": 1}
FAILED: dict[str, Any] = {"status": "failed", "due_at": None, "error_code": "gone"}


def _now() -> datetime:
    return datetime.now(UTC)


@pytest.mark.parametrize(
    ("ended", "status", "code"),
    [
        ([WHOLE, WHOLE], "completed", None),
        ([WHOLE, FAILED], "failed", "output_failed"),
        ([], "failed", "no_output"),
    ],
)
def test_given_a_downloading_job_without_pending_outputs_when_repaired_then_it_ends(
    engine: Engine, ended: list[dict[str, Any]], status: str, code: str | None
) -> None:
    """It is counted as finished, once."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        for position, values in enumerate(ended):
            add_output(connection, job_id, position, **values)

    assert Repairer(engine).run() == Repaired(jobs=(job_id,))
    assert (read_job(engine, job_id).status, read_job(engine, job_id).error_code) == (status, code)
    assert read_job(engine, job_id).completed_at is not None
    assert Repairer(engine).run() == Repaired()
    with engine.connect() as connection:
        assert [(total.key.label, total.times) for total in read_counters(connection, [FINISHED])] == [(status, 1)]


def test_given_a_job_with_a_pending_output_when_repaired_then_it_does_not_change(engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        add_output(connection, job_id, **WHOLE)
        output_id = add_output(connection, job_id, 1)

    assert Repairer(engine).run() == Repaired()
    assert read_job(engine, job_id).status == "downloading"
    assert read_output(engine, output_id).status == "pending"


def test_given_a_pending_output_of_a_cancelled_job_when_repaired_then_it_is_cancelled_too(engine: Engine) -> None:
    """The output of a job that ended in another way is paid for, so it is still downloaded."""
    final: dict[str, Any] = {"due_at": None, "completed_at": _now()}
    with engine.begin() as connection:
        cancelled = add_output(connection, add_job(connection, "1", status="cancelled", **final))
        failed = add_job(connection, "2", status="failed", error_code="output_failed", **final)
        paid = add_output(connection, failed)

    assert Repairer(engine).run() == Repaired(outputs=1)
    assert (read_output(engine, cancelled).status, read_output(engine, cancelled).error_code) == ("failed", "cancelled")
    assert read_output(engine, paid).status == "pending"


def test_given_a_claim_longer_than_any_lease_when_repaired_then_its_row_is_due_again(engine: Engine) -> None:
    """A lease lasts at most an hour and is renewed every few seconds, so the holder must be dead."""
    overlong: dict[str, Any] = {"claim_token": "t", "claim_holder": "h", "due_at": _now() + timedelta(days=30)}
    near = overlong | {"due_at": _now() + timedelta(minutes=50)}
    with engine.begin() as connection:
        job_id, normal = add_job(connection, "1", **overlong), add_job(connection, "2", **near)
        output_id = add_output(connection, add_downloading(connection, "3"), **overlong)

    assert Repairer(engine).run() == Repaired(claims=2)
    assert read_job(engine, job_id).claim_holder is None
    assert read_job(engine, job_id).due_at < _now() + timedelta(seconds=5)
    assert read_output(engine, output_id).claim_holder is None
    assert read_job(engine, normal).claim_holder == "h"


def test_given_several_pages_when_repaired_then_all_rows_are_read_and_it_starts_again(
    engine: Engine,
) -> None:
    final: dict[str, Any] = {"status": "cancelled", "due_at": None, "completed_at": _now()}
    with engine.begin() as connection:
        for number in range(7):
            add_output(connection, add_job(connection, f"c{number}", **final))
            if number % 3:
                add_output(connection, add_downloading(connection, f"d{number}"))
            else:
                add_downloading(connection, f"d{number}")
    repairer = Repairer(engine, page=2)
    repairs = [repairer.run() for _ in range(8)]
    with engine.begin() as connection:
        late = add_downloading(connection, "late")
    repairs += [repairer.run() for _ in range(5)]

    assert sum(len(repaired.jobs) for repaired in repairs) == 4
    assert sum(repaired.outputs for repaired in repairs) == 7
    assert read_job(engine, late).status == "failed"


def test_given_nothing_to_repair_then_no_statement_writes_or_locks(engine: Engine) -> None:
    with engine.begin() as connection:
        add_output(connection, add_downloading(connection))
    statements: list[str] = []

    def record_statement(*arguments: Any) -> None:
        statements.append(arguments[2])

    event.listen(engine, "before_cursor_execute", record_statement)
    Repairer(engine).run()
    event.remove(engine, "before_cursor_execute", record_statement)
    assert len(statements) < 12
    assert not [statement for statement in statements if "UPDATE" in statement]


def test_given_an_ordered_job_without_its_order_when_repaired_then_it_fails(engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = add_order(connection)
        connection.execute(orders.delete())

    assert Repairer(engine).run() == Repaired(jobs=(job_id,))
    job = read_job(engine, job_id)
    assert (job.status, job.error_code) == ("failed", "refused")
    assert "its order is missing" in job.error_message


def test_given_an_order_in_no_queue_when_repaired_then_it_waits_again(engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = add_order(connection, account="shop", queue=None, due_at=None)

    assert Repairer(engine).run() == Repaired(orders=1)
    with engine.connect() as connection:
        order = order_row(connection, job_id)
    assert order is not None
    assert (order.queue, order.takes_slot) == ("shop", False)
    assert order.due_at is not None


def test_given_an_uncertain_order_in_the_queue_when_repaired_then_it_is_not_sent_twice(engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = add_uncertain(connection, queue="default", due_at=_now())

    assert Repairer(engine).run() == Repaired(orders=1)
    with engine.connect() as connection:
        order = order_row(connection, job_id)
    assert order is not None
    assert (order.queue, order.due_at, read_job(engine, job_id).status) == (None, None, "uncertain")


def test_given_valid_orders_when_repaired_then_none_changes(engine: Engine) -> None:
    with engine.begin() as connection:
        add_order(connection, "waits")
        claim: dict[str, Any] = {
            "takes_slot": True,
            "claim_token": "t",
            "claim_holder": "h",
            "due_at": _now() + timedelta(seconds=30),
        }
        add_order(connection, "is sent", attempt_token="t", **claim)
        add_at_api(connection, "at the API")
        add_uncertain(connection, "lost", queue="default", takes_slot=True, slot_until=_now() + timedelta(seconds=60))
        add_uncertain(connection, "lost long ago")

    assert Repairer(engine).run() == Repaired()


def test_given_a_claim_of_an_order_beyond_any_lease_when_repaired_then_its_lease_ends(engine: Engine) -> None:
    claim: dict[str, Any] = {"takes_slot": True, "claim_token": "t", "claim_holder": "h", "attempt_token": "t"}
    with engine.begin() as connection:
        job_id = add_order(connection, due_at=_now() + timedelta(days=2), **claim)

    assert Repairer(engine).run() == Repaired(claims=1)
    with engine.connect() as connection:
        order = order_row(connection, job_id)
    assert order is not None
    assert order.due_at <= _now()
    assert order.attempt_token == "t"
