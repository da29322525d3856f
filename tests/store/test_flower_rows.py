"""Job rows for Flower: the newest and the unfinished jobs, with few and short columns."""

from typing import Any

from sqlalchemy import Engine, event, update

from tests.rows import NOW, STORED, add_downloading, add_job, add_output, seconds
from worker.core.flower_rows import MAX_MESSAGE_LENGTH, FlowerJob, Outputs
from worker.store.engine import use_clock
from worker.store.jobs import retry
from worker.store.reports.flower_rows import read_flower_jobs
from worker.store.schema import jobs

ENDED: dict[str, Any] = {"due_at": None, "completed_at": NOW + seconds(10)}


def read_rows(engine: Engine, before: dict[int, FlowerJob], limit: int, *, late: float = 20.0) -> dict[int, FlowerJob]:
    """Read the rows, `late` seconds after the jobs were submitted."""
    with use_clock(lambda: NOW + seconds(late)), engine.connect() as connection:
        return read_flower_jobs(connection, before, limit)


def test_given_outputs_then_stored_ones_are_counted_with_their_bytes(engine: Engine) -> None:
    with engine.begin() as connection:
        waiting = add_job(connection, "1")
        on_its_way = add_downloading(connection, "2")
        completed = add_downloading(connection, "3", status="completed", completed_at=NOW + seconds(10))
        add_output(connection, on_its_way, 0, size_bytes=1_500, **STORED)
        add_output(connection, on_its_way, 1)
        add_output(connection, completed, 0, size_bytes=391_002, **STORED)

    rows = read_rows(engine, {}, 10)

    assert list(rows) == [completed, on_its_way, waiting]
    assert [job.outputs for job in rows.values()] == [Outputs(1, 1, 391_002), Outputs(2, 1, 1_500), Outputs()]
    assert rows[waiting].submitted_at == NOW


def test_given_more_jobs_than_the_limit_then_old_jobs_are_dropped_after_they_end(
    engine: Engine,
) -> None:
    with engine.begin() as connection:
        ids = [add_job(connection, f"old{number}") for number in range(4)]
    before = read_rows(engine, {}, 4)
    with engine.begin() as connection:
        new = [add_job(connection, f"new{number}") for number in range(4)]
        connection.execute(
            update(jobs).where(jobs.c.id == ids[3]).values(status="failed", error_code="api_failed", **ENDED)
        )

    after = read_rows(engine, before, 4)
    assert [(job.id, job.status) for job in after.values()] == [
        *((new[3], "pending"), (new[2], "pending")),
        *((ids[3], "failed"), (ids[2], "pending")),
    ]
    assert list(read_rows(engine, after, 4, late=90)) == [new[3], new[2], new[1], ids[2]]


def test_given_a_deleted_job_then_it_is_not_returned(engine: Engine) -> None:
    with engine.begin() as connection:
        job, other_job = add_job(connection, "1"), add_job(connection, "2")
    before = read_rows(engine, {}, 10)
    with engine.begin() as connection:
        connection.execute(jobs.delete().where(jobs.c.id == job))

    assert list(read_rows(engine, before, 10)) == [other_job]


def test_given_a_retried_job_then_it_has_no_values_of_its_former_end(engine: Engine) -> None:
    with engine.begin() as connection:
        failed = {"status": "failed", "error_code": "api_failed", "error_message": "m" * 900}
        job = add_job(connection, **failed, **ENDED)
    before = read_rows(engine, {}, 10)
    assert before[job].error_message == "m" * MAX_MESSAGE_LENGTH

    with engine.begin() as connection:
        retry(connection, job, now=NOW)

    row = read_rows(engine, before, 10)[job]
    assert (row.status, row.completed_at, row.error_code) == ("pending", None, None)


def test_outputs_of_a_finished_job_are_not_counted_again(engine: Engine) -> None:
    with engine.begin() as connection:
        job = add_downloading(connection, status="completed", completed_at=NOW + seconds(10))
        add_output(connection, job, 0, size_bytes=391_002, **STORED)
    before = read_rows(engine, {}, 10)
    statements: list[str] = []

    def record_statement(connection: object, cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(engine, "before_cursor_execute", record_statement)
    try:
        again = read_rows(engine, before, 10)
    finally:
        event.remove(engine, "before_cursor_execute", record_statement)

    assert again == before
    assert not [statement for statement in statements if "fetch_outputs" in statement]


def test_given_a_job_that_ended_again_between_two_reads_then_its_outputs_are_counted_again(engine: Engine) -> None:
    with engine.begin() as connection:
        job = add_downloading(connection, status="completed", completed_at=NOW + seconds(10))
        add_output(connection, job, 0, size_bytes=391_002, **STORED)
    before = read_rows(engine, {}, 10)
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job).values(completed_at=NOW + seconds(15)))
        add_output(connection, job, 1, size_bytes=8, **STORED)

    assert read_rows(engine, before, 10)[job].outputs == Outputs(2, 2, 391_010)
