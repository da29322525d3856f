"""Claims of dead processes on every database: released at different times, and failed after repeated crashes."""

from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, select, update

from tests.rows import NOW, add_downloading, add_job, add_output, read_job, read_output, seconds
from worker.store.reaper import CRASHES_MOST, Released, release_crashed
from worker.store.schema import crashes, jobs, outputs

HELD: dict[str, Any] = {"claim_token": "t", "claim_holder": "dead.1.1", "due_at": NOW + seconds(30)}


def _crash(engine: Engine, *, at: datetime, attempts: int = 1) -> Released:
    """Claim everything `attempts` times, then let the process die."""
    with engine.begin() as connection:
        for table, counter in ((jobs, "polls"), (outputs, "attempts")):
            more: Any = {counter: table.c[counter] + attempts}
            unfinished = table.c.status == "pending"
            connection.execute(update(table).where(unfinished).values(**(HELD | more)))
        return release_crashed(connection, ["dead.1.1"], now=at)


def test_given_claims_of_a_dead_process_when_released_then_they_are_due_at_once(engine: Engine) -> None:
    """Claims of other processes do not change."""
    with engine.begin() as connection:
        job_id = add_job(connection, **HELD)
        output_id = add_output(connection, add_downloading(connection, "2"), **HELD)
        of_living_process = add_job(connection, "3", **(HELD | {"claim_holder": "alive.2.2"}))

        released = release_crashed(connection, ["dead.1.1"], now=NOW)

    assert released == Released(2, (), (), ())
    assert (read_job(engine, job_id).due_at, read_job(engine, job_id).claim_token) == (NOW, None)
    assert (read_output(engine, output_id).due_at, read_output(engine, output_id).claim_token) == (NOW, None)
    assert read_job(engine, of_living_process).claim_token == "t"


def test_given_rows_that_crash_again_when_released_then_they_are_due_at_different_times(engine: Engine) -> None:
    """So a row that crashes its process does not affect the same other rows each time."""
    with engine.begin() as connection:
        ids = [add_job(connection, str(number)) for number in range(12)]

    for _ in range(4):
        _crash(engine, at=NOW)

    dues = {read_job(engine, job_id).due_at for job_id in ids}
    assert len(dues) == 12
    assert min(dues) >= NOW
    assert max(dues) <= NOW + timedelta(seconds=16)


def test_given_a_job_that_crashes_its_process_often_then_it_fails(
    engine: Engine,
) -> None:
    """With the reason. Before that, nothing changes."""
    with engine.begin() as connection:
        job_id = add_job(connection)

    for _ in range(CRASHES_MOST - 1):
        assert _crash(engine, at=NOW).jobs == ()
    released = _crash(engine, at=NOW)

    row = read_job(engine, job_id)
    assert released == Released(0, (job_id,), (), (job_id,))
    assert (row.status, row.error_code, row.completed_at, row.due_at) == ("failed", "worker_crash", NOW, None)
    assert "8 times in a row" in row.error_message


def _crash_before_sending(engine: Engine) -> Released:
    """Claim everything, then let the process die before it sends a request."""
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.status == "pending").values(polls=jobs.c.polls + 1, **HELD))
        return release_crashed(connection, ["dead.1.1"], now=NOW, sent={"dead.1.1": set()})


def test_given_a_job_that_crashes_its_process_before_the_request_then_it_fails_too(
    engine: Engine,
) -> None:
    """No request is counted, but each crash is."""
    with engine.begin() as connection:
        job_id = add_job(connection)

    for _ in range(CRASHES_MOST - 1):
        assert _crash_before_sending(engine).jobs == ()
    polls = read_job(engine, job_id).polls
    released = _crash_before_sending(engine)

    assert polls == 0
    assert released.jobs == (job_id,)
    assert read_job(engine, job_id).error_code == "worker_crash"


@pytest.mark.parametrize("before_sending", [True, False])
def test_given_an_answer_between_two_crashes_then_the_count_starts_again(
    engine: Engine, *, before_sending: bool
) -> None:
    """Whether or not the request of the crash was sent."""
    with engine.begin() as connection:
        job_id = add_job(connection)
    for _ in range(3):
        _crash_before_sending(engine)
    _crash(engine, at=NOW)  # its request was sent: the fourth consecutive crash
    with engine.begin() as connection:
        fourth = connection.execute(select(crashes.c.times)).scalar_one()
        connection.execute(
            update(jobs).where(jobs.c.id == job_id).values(polls=jobs.c.polls + 1)
        )  # an answer was recorded

    if before_sending:
        _crash_before_sending(engine)
    else:
        _crash(engine, at=NOW)

    with engine.connect() as connection:
        assert (fourth, connection.execute(select(crashes.c.times)).scalar_one()) == (4, 1)


def test_given_an_output_that_crashes_its_process_often_then_its_job_ends_with_the_other_outputs(
    engine: Engine,
) -> None:
    """As for any other failed output."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        output_id = add_output(connection, job_id)

    for _ in range(CRASHES_MOST):
        released = _crash(engine, at=NOW)

    row, job = read_output(engine, output_id), read_job(engine, job_id)
    assert released == Released(0, (), (output_id,), (job_id,))
    assert (row.status, row.error_code, row.due_at) == ("failed", "worker_crash", None)
    assert (job.status, job.error_code) == ("failed", "output_failed")


@pytest.mark.parametrize("attempts", [2, 3])
def test_given_a_finished_attempt_between_two_crashes_then_the_count_starts_again(
    engine: Engine, attempts: int
) -> None:
    """A row that is held by unlucky processes never fails."""
    with engine.begin() as connection:
        add_job(connection)

    for _ in range(3 * CRASHES_MOST):
        assert _crash(engine, at=NOW, attempts=attempts).jobs == ()

    with engine.connect() as connection:
        assert connection.execute(select(crashes.c.times)).scalars().all() == [1]
