"""Telling web apps of final jobs: what the look for them costs."""

from typing import Any

from sqlalchemy import Engine, event, insert

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
