"""The numbers of jobs on the overview: exact for few jobs, at most half a minute old for many."""

from collections.abc import Callable

import pytest
from sqlalchemy import Engine, event

from tests.rows import NOW, add_job
from worker.store.engine import database_now
from worker.store.reports import recent_counts
from worker.store.reports.recent_counts import RecentCounts

FAILED = {"status": "failed", "due_at": None, "completed_at": NOW, "error_code": "api_failed"}


@pytest.fixture
def add(engine: Engine) -> Callable[..., None]:
    def add_one(remote_id: str, **changes: object) -> None:
        with engine.begin() as connection:
            add_job(connection, remote_id, **changes)

    return add_one


def test_given_few_jobs_then_the_numbers_are_exact(engine: Engine, add: Callable[..., None]) -> None:
    count_jobs = RecentCounts(lambda: 0.0)
    add("1", **FAILED)
    add("2")
    with engine.connect() as connection:
        first = count_jobs(connection)
    add("3", **FAILED)
    add("4")
    with engine.connect() as connection:
        second = count_jobs(connection)

    assert first == {"failed": 1, "pending": 1}
    assert second == {"failed": 2, "pending": 2}


def test_given_many_final_jobs_then_they_are_counted_only_now_and_then_and_few_pending_ones_always(
    engine: Engine, add: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent_counts, "MANY", 2)
    now = 0.0
    count_jobs = RecentCounts(lambda: now)
    add("1", **FAILED)
    add("2", **FAILED)
    with engine.connect() as connection:
        count_jobs(connection)
    add("3", **FAILED)
    add("4")
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))

    with engine.connect() as connection:
        soon = count_jobs(connection)
        counted = [statement for statement in statements if "GROUP BY" in statement]
        now = 31.0
        later = count_jobs(connection)

    assert soon == {"failed": 2, "pending": 1}
    assert counted == []
    assert later == {"failed": 3, "pending": 1}


def test_given_many_pending_jobs_then_they_are_counted_only_now_and_then_and_few_final_ones_always(
    engine: Engine, add: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent_counts, "MANY", 2)
    now = 0.0
    count_jobs = RecentCounts(lambda: now)
    add("1")
    add("2")
    with engine.connect() as connection:
        count_jobs(connection)
    add("3")
    add("4", **FAILED)

    with engine.connect() as connection:
        soon = count_jobs(connection)
        now = 31.0
        later = count_jobs(connection)

    assert soon == {"failed": 1, "pending": 2}
    assert later == {"failed": 1, "pending": 3}


def test_given_many_waiting_jobs_then_they_are_counted_again_after_half_a_minute(
    engine: Engine, add: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent_counts, "MANY", 2)
    moment = 100.0
    counts = RecentCounts(lambda: moment)

    def waiting() -> int:
        with engine.connect() as connection:
            return sum(entry.count for entry in counts.waiting(connection, now=database_now(connection)))

    numbers = []
    for number in range(3):
        add(f"w{number}")
        numbers.append(waiting())
    moment += 31

    assert (numbers, waiting()) == ([1, 2, 2], 3)
