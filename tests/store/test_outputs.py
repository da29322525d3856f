"""Outputs on every database: unstored outputs, stored outputs, and requeueing an output whose file is missing."""

from typing import Any

import pytest
from sqlalchemy import Engine, select

from tests.rows import NOW, add_downloading, add_job, add_output, read_job, read_output, seconds
from worker.store.outputs import output_row, requeue_output, stored_after, unknown_locations, unstored_by_code
from worker.store.schema import outputs

STORED: dict[str, Any] = {
    "status": "stored",
    "due_at": None,
    "location": "file:///o/0.png",
    "size_bytes": 7,
    "sha256": "ab" * 32,
    "media_type": "image/png",
    "stored_at": NOW,
}
COMPLETED: dict[str, Any] = {
    "status": "completed",
    "due_at": None,
    "ready_at": NOW,
    "completed_at": NOW,
    "told_at": NOW,
}


def test_given_unstored_outputs_then_they_are_grouped_by_code_with_the_oldest_link(engine: Engine) -> None:
    """Stored and failed outputs are not counted."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        add_output(connection, job_id, 0)
        for position in (1, 2):
            listed = NOW - seconds(60 * position)
            add_output(connection, job_id, position, listed_at=listed, error_code="storage", error_message="full")
        add_output(connection, job_id, 3, **STORED)
        add_output(connection, job_id, 4, status="failed", due_at=None, error_code="gone")

        groups = {group.code: (group.count, group.oldest, group.message) for group in unstored_by_code(connection)}

    assert groups == {None: (1, NOW, None), "storage": (2, NOW - seconds(120), "full")}


def test_given_stored_outputs_then_they_are_returned_in_pages_and_for_some_jobs_only(engine: Engine) -> None:
    """Each has the state of its job."""
    with engine.begin() as connection:
        first, second = (add_job(connection, name, **COMPLETED) for name in "12")
        ids = [add_output(connection, job, n, **STORED) for job in (first, second) for n in range(2)]
        add_output(connection, second, 2)

        pages = (
            stored_after(connection, 0, job_ids=None, limit=3),
            stored_after(connection, ids[2], job_ids=None, limit=3),
        )
        of_one = stored_after(connection, 0, job_ids=[second], limit=9)

    assert [[row.id for row in page] for page in pages] == [ids[:3], ids[3:]]
    assert [(row.id, row.job_status) for row in of_one] == [(ids[2], "completed"), (ids[3], "completed")]


def test_given_files_then_the_locations_without_an_output_are_returned(engine: Engine) -> None:
    """For any number of files."""
    with engine.begin() as connection:
        add_output(connection, add_job(connection, **COMPLETED), **STORED)
        locations = [f"file:///o/{number}.png" for number in range(1_200)]

        assert unknown_locations(connection, locations) == locations[1:]
        assert unknown_locations(connection, []) == []


def test_given_a_stored_output_when_requeued_then_it_is_due_and_its_job_is_downloading(engine: Engine) -> None:
    """It is like a new output, and `on_done` is called again at the end."""
    later = NOW + seconds(90_000)
    with engine.begin() as connection:
        job_id = add_job(connection, **COMPLETED)
        output_id = add_output(connection, job_id, **STORED, attempts=4, bad_bodies=1, renewed=True)

        assert requeue_output(connection, output_id, location="file:///o/0.png", now=later)
        assert not requeue_output(connection, output_id, location="file:///o/0.png", now=later)

    row, job = read_output(engine, output_id), read_job(engine, job_id)
    assert (row.status, row.location, row.due_at, row.listed_at) == ("pending", None, later, later)
    assert (row.queued_at, row.bad_bodies, row.renewed, row.attempts) == (None, 0, False, 4)
    assert (job.status, job.completed_at, job.told_at) == ("downloading", None, None)


@pytest.mark.parametrize("case", ["moved", "cancelled", "data", "unknown"])
def test_given_an_output_that_can_not_be_requeued_then_nothing_changes(engine: Engine, case: str) -> None:
    """It was changed meanwhile, its job was cancelled, or its bytes came with the answer itself."""
    with engine.begin() as connection:
        job_id = add_job(connection, **(COMPLETED | ({"status": "cancelled"} if case == "cancelled" else {})))
        url: dict[str, Any] = {"url": "data:image/png;sha256=00"} if case == "data" else {}
        output_id = add_output(connection, job_id, **STORED, **url)
        before = connection.execute(select(outputs)).all()
        location = "file:///elsewhere" if case == "moved" else "file:///o/0.png"

        assert not requeue_output(connection, output_id + (case == "unknown"), location=location, now=NOW)
        assert connection.execute(select(outputs)).all() == before


def test_given_an_id_then_its_output_or_none_is_returned(engine: Engine) -> None:
    """Also for numbers that are too large for the database."""
    with engine.begin() as connection:
        output_id = add_output(connection, add_downloading(connection))

        assert getattr(output_row(connection, output_id), "id", None) == output_id
        assert [output_row(connection, number) for number in (0, -1, output_id + 1, 2**63, 10**30)] == [None] * 5
