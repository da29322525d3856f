"""Telling web apps of final jobs: what the look for them costs."""

from typing import Any

from sqlalchemy import Engine, event, insert, select

from tests.rows import NOW, job_values
from worker.notifier import tell
from worker.tables import jobs

ENDED = {"status": "completed", "due_at": None, "ready_at": NOW, "completed_at": NOW}


def test_a_sweep_goes_through_no_job_that_nobody_is_told_of(migrated_mariadb: Engine) -> None:
    """It is made every two seconds, on MariaDB too, where no index is of some rows alone."""
    engine = migrated_mariadb
    told: list[int] = []
    read: list[int] = []
    rows = [
        job_values(str(number), **ENDED) | {"on_done": "shop.ready" if number == 7 else None} for number in range(300)
    ]

    def count(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT fetch_jobs"):
            cursor.connection.query("SHOW SESSION STATUS LIKE 'Handler_read%'")
            read.append(sum(int(times) for _, times in cursor.connection._result.rows))

    with engine.begin() as connection:
        connection.execute(insert(jobs), rows)
        connection.exec_driver_sql("ANALYZE TABLE fetch_jobs")
    engine.dispose()  # a new session counts from zero
    event.listen(engine, "after_cursor_execute", count)
    try:
        assert tell(engine, lambda task, queue, job_id: told.append(job_id)) == 1
    finally:
        event.remove(engine, "after_cursor_execute", count)
        with engine.begin() as connection:
            connection.execute(jobs.delete())
    assert len(told) == 1
    assert 0 < read[0] < 50


def test_given_a_process_that_sleeps_between_two_calls_then_the_rest_is_left_to_the_next_sweep(engine: Engine) -> None:
    """Another process may have claimed them meanwhile."""
    now, sent = [0.0], list[int]()

    def send(task: str, queue: str, job_id: int) -> None:
        sent.append(job_id)
        now[0] += 61.0  # it was stopped, right after it sent this one

    with engine.begin() as connection:
        rows = [job_values(str(number), **ENDED) | {"on_done": "shop.ready"} for number in range(3)]
        connection.execute(insert(jobs), rows)
    assert tell(engine, send, clock=lambda: now[0]) == 1
    with engine.connect() as connection:
        untold = connection.execute(select(jobs.c.on_done_due_at).where(jobs.c.told_at.is_(None))).scalars().all()
    assert len(sent) == 1
    assert len(untold) == 2
    assert None not in untold, "whoever has claimed them goes on having them"
