"""Late looks on real databases: planned when a job expires, made by one process, deleted when it is not expired."""

from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, delete, select

from tests.rows import NOW, add_job, read_job, seconds
from worker.store.jobs import retry
from worker.store.late_looks import (
    ClaimedLook,
    claim_look,
    defer_due_looks,
    defer_look,
    delete_stale_looks,
    due_looks,
    lock_look,
    look_of,
    plan_looks,
    plan_next_look,
)
from worker.store.schema import jobs, late_looks

HOUR = 3_600.0
AFTER = (HOUR, 3 * HOUR, 10 * HOUR, 24 * HOUR)
LEASE = seconds(50)


def _expired(connection: Connection, remote_id: str = "1", **changes: Any) -> int:
    ended = {"status": "expired", "error_code": "expired", "due_at": None, "completed_at": NOW, "deadline_at": NOW}
    return add_job(connection, remote_id, **(ended | changes))


def _planned(connection: Connection, remote_id: str = "1", *, at: datetime = NOW, **changes: Any) -> int:
    job_id = _expired(connection, remote_id, **changes)
    plan_looks(connection, [job_id], AFTER, now=at)
    return job_id


def _due_at(connection: Connection, job_id: int) -> datetime | None:
    look = look_of(connection, job_id)
    return None if look is None else look.due_at


def _claim(connection: Connection, job_id: int, at: datetime) -> ClaimedLook:
    look = claim_look(connection, job_id, now=at, lease=LEASE)
    assert look is not None
    return look


def test_the_looks_are_one_three_ten_and_twenty_four_hours_after_the_deadline(engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = _planned(connection)
        moments = []
        while (due_at := _due_at(connection, job_id)) is not None:
            moments.append((due_at - NOW).total_seconds() / HOUR)
            look = _claim(connection, job_id, due_at)
            plan_next_look(connection, look, AFTER, now=due_at)
        assert moments == [1, 3, 10, 24]
        assert read_job_in(connection, job_id).polls == 4


def read_job_in(connection: Connection, job_id: int) -> Any:
    """Return a job's row within a transaction."""
    return connection.execute(select(jobs).where(jobs.c.id == job_id)).one()


@pytest.mark.parametrize(("late", "first"), [(0, 1), (1, 3), (2.9, 3), (3, 10), (23, 24), (24, None), (300, None)])
def test_a_job_that_expired_late_has_only_the_remaining_looks(engine: Engine, late: float, first: float | None) -> None:
    """A hold may have delayed its expiry for hours."""
    with engine.begin() as connection:
        due_at = _due_at(connection, _planned(connection, at=NOW + seconds(late * HOUR)))
    assert (None if due_at is None else (due_at - NOW).total_seconds() / HOUR) == first


def test_jobs_that_can_not_be_polled_or_are_not_expired_have_no_looks(engine: Engine) -> None:
    with engine.begin() as connection:
        made_up = _planned(connection, "sha256:" + "0a" * 16)
        ready = _planned(connection, "8", fetch_base="ready:abc", fetch_url="ready:abc")
        pending = add_job(connection, "2")
        plan_looks(connection, [pending], AFTER, now=NOW)
        off = _expired(connection, "3")
        plan_looks(connection, [off], (), now=NOW)
        assert [look_of(connection, job_id) for job_id in (made_up, ready, pending, off)] == [None] * 4


def test_a_look_is_claimed_by_one_process_and_is_due_again_after_its_lease(engine: Engine) -> None:
    """A process that dies in between loses no look, and its request stays counted."""
    at = NOW + seconds(HOUR)
    with engine.begin() as connection:
        job_id = _planned(connection)
        assert claim_look(connection, job_id, now=at - seconds(1), lease=LEASE) is None
        first = _claim(connection, job_id, at)
    with engine.begin() as connection:
        assert due_looks(connection, ["default"], now=at, limit=10) == []
        assert claim_look(connection, job_id, now=at + seconds(49), lease=LEASE) is None
        assert lock_look(connection, first)

        second = _claim(connection, job_id, at + seconds(50))
        assert not lock_look(connection, first)
        assert lock_look(connection, second)
    assert (first.looks, second.looks) == (1, 2)
    assert read_job(engine, job_id).polls == 2


def test_the_look_of_a_locked_job_is_skipped(engine: Engine) -> None:
    """SQLite has only one writer at a time."""
    if engine.dialect.name == "sqlite":
        return
    at = NOW + seconds(HOUR)
    with engine.begin() as connection:
        job_id, free = _planned(connection, "1"), _planned(connection, "2")
    with engine.begin() as first, engine.begin() as second:
        _claim(first, job_id, at)
        assert claim_look(second, job_id, now=at, lease=LEASE) is None
        _claim(second, free, at)


def test_a_look_without_an_answer_does_not_count_and_its_request_counts_only_if_it_was_sent(engine: Engine) -> None:
    at = NOW + seconds(HOUR)
    later = at + seconds(60)
    with engine.begin() as connection:
        sent, unsent = _planned(connection, "1"), _planned(connection, "2")
        defer_look(connection, _claim(connection, sent, at), due_at=later, sent=True)
        defer_look(connection, _claim(connection, unsent, at), due_at=later, sent=False)

        for job_id, polls in ((sent, 1), (unsent, 0)):
            look = look_of(connection, job_id)
            assert look is not None
            assert (look.looks, look.due_at, read_job_in(connection, job_id).polls) == (0, later, polls)


def test_looks_that_can_not_be_made_now_do_not_block_others(engine: Engine) -> None:
    at = NOW + seconds(HOUR)
    with engine.begin() as connection:
        shut, free = _planned(connection, "1"), _planned(connection, "2")
        assert [due.job_id for due in due_looks(connection, ["default"], now=at, limit=1)] == [shut]
        defer_due_looks(connection, [shut], now=at, due_at=at + seconds(60))
        [due] = due_looks(connection, ["default"], now=at, limit=1)
        assert (due.job_id, due.account, due.host) == (free, "default", "api.test")


def test_retried_and_deleted_jobs_have_no_looks(engine: Engine) -> None:
    with engine.begin() as connection:
        retried, removed, changed = (_planned(connection, name) for name in ("1", "2", "3"))
        assert retry(connection, retried, now=NOW)
        connection.execute(delete(jobs).where(jobs.c.id == removed))
        connection.execute(  # a manual UPDATE
            jobs.update().where(jobs.c.id == changed).values(status="cancelled", error_code=None)
        )
        due = NOW + seconds(HOUR)
        assert due_looks(connection, ["default"], now=due, limit=10) == []
        assert claim_look(connection, changed, now=due, lease=LEASE) is None
        assert delete_stale_looks(connection, AFTER, now=due, limit=10) == 1
        assert connection.execute(select(late_looks)).all() == []


def test_looks_that_were_not_made_in_time_are_deleted(engine: Engine) -> None:
    """A day after the last look, the links have expired."""
    with engine.begin() as connection:
        job_id = _planned(connection)
        assert delete_stale_looks(connection, AFTER, now=NOW + seconds(47.9 * HOUR), limit=10) == 0
        assert delete_stale_looks(connection, AFTER, now=NOW + seconds(48.1 * HOUR), limit=10) == 1
        assert look_of(connection, job_id) is None
