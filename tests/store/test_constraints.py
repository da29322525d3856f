"""Constraints: the schema refuses invalid rows, whatever code writes them."""

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import Engine, insert, select
from sqlalchemy.exc import IntegrityError, OperationalError

from tests.rows import NOW, add_downloading, add_job, add_output, job_values, output_values
from worker.store.schema import bodies, breakers, jobs, outputs

CONSTRAINT_ERRORS = (IntegrityError, OperationalError)  # MariaDB raises OperationalError for a CHECK constraint
FINAL = {"due_at": None, "completed_at": NOW}
STORED = {
    "status": "stored",
    "due_at": None,
    "location": "file:///a",
    "size_bytes": 1,
    "sha256": "0" * 64,
    "media_type": "image/png",
    "stored_at": NOW,
}


@pytest.mark.parametrize(
    ("constraint", "changes"),
    [
        ("known_status", {"status": "ready"}),
        ("known_status", {"status": ""}),
        ("final_has_completed_at", {"status": "cancelled", "due_at": None}),
        ("final_has_completed_at", {"status": "completed", "due_at": None, "ready_at": NOW}),
        ("final_has_completed_at", {"status": "pending", "completed_at": NOW}),
        ("final_has_completed_at", {"status": "downloading", "ready_at": NOW, "due_at": None, "completed_at": NOW}),
        ("final_is_at_rest", {"status": "cancelled", "completed_at": NOW, "due_at": NOW}),
        ("pending_is_due", {"status": "pending", "due_at": None}),
        ("failed_has_code", {"status": "failed", **FINAL}),
        ("failed_has_code", {"status": "expired", **FINAL}),
        ("ready_has_ready_at", {"status": "downloading", "due_at": None}),
        ("ready_has_ready_at", {"status": "completed", **FINAL}),
        ("claim_is_leased", {"claim_token": "t", "claim_holder": None}),
        (
            "claim_is_leased",
            {"status": "downloading", "ready_at": NOW, "due_at": None, "claim_token": "t", "claim_holder": "h"},
        ),
        ("polls_count_up", {"polls": -1}),
    ],
)
def test_an_invalid_job_row_is_refused(engine: Engine, constraint: str, changes: dict[str, Any]) -> None:
    """The error names the constraint for the operator."""
    with pytest.raises(CONSTRAINT_ERRORS, match=f"ck_fetch_jobs_{constraint}"), engine.begin() as connection:
        connection.execute(insert(jobs).values(job_values(**changes)))


@pytest.mark.parametrize(
    "missing",
    ["account", "remote_id", "kind", "fetch_url", "fetch_base", "fetch_host", "submitted_at", "deadline_at"],
)
def test_a_job_row_without_a_required_value_is_refused(engine: Engine, missing: str) -> None:
    """The columns are NOT NULL."""
    with pytest.raises(CONSTRAINT_ERRORS, match=missing), engine.begin() as connection:
        connection.execute(insert(jobs).values(job_values() | {missing: None}))


def test_the_same_job_is_refused_but_another_account_or_family_is_not(engine: Engine) -> None:
    """Two jobs are the same if account, fetch address without the id, and remote id are equal."""
    with engine.begin() as connection:
        add_job(connection, "7")
        add_job(connection, "7", account="other")
        add_job(connection, "7", fetch_base="https://api.test/api/v6/video/fetch")
    with pytest.raises(CONSTRAINT_ERRORS), engine.begin() as connection:
        add_job(connection, "7")


@pytest.mark.parametrize(
    ("constraint", "changes"),
    [
        ("known_status", {"status": "completed", "due_at": None}),
        ("pending_is_due", {"status": "pending", "due_at": None}),
        ("pending_is_due", {"status": "failed", "error_code": "gone", "due_at": NOW}),
        ("pending_is_due", STORED | {"due_at": NOW}),
        ("failed_has_code", {"status": "failed", "due_at": None}),
        ("stored_is_described", STORED | {"location": None}),
        ("stored_is_described", STORED | {"sha256": None}),
        ("stored_is_described", STORED | {"size_bytes": None}),
        ("stored_is_described", STORED | {"media_type": None}),
        ("stored_is_described", STORED | {"stored_at": None}),
        ("claim_is_leased", {"claim_token": "t"}),
        ("claim_is_leased", STORED | {"claim_token": "t", "claim_holder": "h"}),
    ],
)
def test_an_invalid_output_row_is_refused(engine: Engine, constraint: str, changes: dict[str, Any]) -> None:
    """The error names the constraint."""
    with pytest.raises(CONSTRAINT_ERRORS, match=f"ck_fetch_outputs_{constraint}"), engine.begin() as connection:
        connection.execute(insert(outputs).values(output_values(add_downloading(connection), **changes)))


def test_an_output_needs_a_job_and_a_position_of_its_own(engine: Engine) -> None:
    """An output without a job, and a second output with the same position, are refused."""
    with pytest.raises(CONSTRAINT_ERRORS), engine.begin() as connection:
        add_output(connection, 4_711)
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        add_output(connection, job_id, 0)
    with pytest.raises(CONSTRAINT_ERRORS), engine.begin() as connection:
        add_output(connection, job_id, 0)


@pytest.mark.parametrize(
    ("constraint", "values"),
    [
        ("known_scope", {"scope": "planet", "name": "x"}),
        ("hold_has_since", {"scope": "host", "name": "x", "reason": "down"}),
        ("hold_has_since", {"scope": "host", "name": "x", "since": NOW}),
    ],
)
def test_an_invalid_circuit_breaker_row_is_refused(engine: Engine, constraint: str, values: dict[str, Any]) -> None:
    """A hold has a reason and a start, or neither."""
    with pytest.raises(CONSTRAINT_ERRORS, match=f"ck_fetch_gates_{constraint}"), engine.begin() as connection:
        connection.execute(insert(breakers).values(values))


def test_deleting_a_job_deletes_its_outputs_and_their_bytes(engine: Engine) -> None:
    """Foreign keys are enforced on every database."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        output_id = add_output(connection, job_id)
        connection.execute(insert(bodies).values(output_id=output_id, body=b"bytes"))
        connection.execute(jobs.delete().where(jobs.c.id == job_id))
        assert connection.execute(select(outputs)).all() == []
        assert connection.execute(select(bodies)).all() == []


def test_an_id_is_never_used_twice(engine: Engine) -> None:
    """Files are named after ids, so the id of a deleted job must not be used again."""
    with engine.begin() as connection:
        first = add_job(connection, "1")
        connection.execute(jobs.delete())
        assert add_job(connection, "2") > first


def test_a_naive_time_is_refused_and_aware_times_are_returned_in_utc(engine: Engine) -> None:
    """12:00+05:00 is 07:00 UTC on every database. The time zone of a naive 12:00 is unknown."""
    east = datetime(2026, 3, 1, 12, tzinfo=timezone(timedelta(hours=5)))
    with engine.begin() as connection:
        job_id = add_job(connection, submitted_at=east)
        submitted_at = connection.execute(select(jobs.c.submitted_at).where(jobs.c.id == job_id)).scalar_one()
    assert submitted_at == east
    assert submitted_at.isoformat() == "2026-03-01T07:00:00+00:00"
    with pytest.raises(Exception, match="without a time zone"), engine.begin() as connection:
        add_job(connection, "2", submitted_at=datetime(2026, 3, 1, 12))


def test_names_are_case_sensitive(engine: Engine) -> None:
    with engine.begin() as connection:
        ids = {add_job(connection, name, account=account) for name in ("aB", "Ab") for account in ("Shop", "shop")}
        rows = connection.execute(select(jobs.c.id).where(jobs.c.account == "shop", jobs.c.remote_id == "Ab")).all()

    assert len(ids) == 4
    assert len(rows) == 1
