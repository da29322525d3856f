"""Notifying web apps of final jobs: the cost of finding them, and broker errors."""

from typing import Any

import pytest
import redis
from amqp.exceptions import RecoverableConnectionError as AmqpLost
from kombu.exceptions import OperationalError as BrokerError
from redis import exceptions as redis_errors
from sqlalchemy import Engine, event, insert, select

from tests.rows import NOW, job_values
from worker.notify.on_done import notify, refusal
from worker.store.schema import jobs

ENDED = {"status": "completed", "due_at": None, "ready_at": NOW, "completed_at": NOW}


def test_a_sweep_reads_no_job_without_on_done(migrated_mariadb: Engine) -> None:
    """The query runs every two seconds, also on MariaDB, which has no partial indexes."""
    engine = migrated_mariadb
    sent: list[int] = []
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
        assert notify(engine, lambda task, queue, job_id: sent.append(job_id)) == 1
    finally:
        event.remove(engine, "after_cursor_execute", count)
        with engine.begin() as connection:
            connection.execute(jobs.delete())
    assert len(sent) == 1
    assert 0 < read[0] < 50


def test_given_a_process_that_sleeps_between_two_calls_then_the_others_are_left_to_the_next_sweep(
    engine: Engine,
) -> None:
    """Another process may have claimed them meanwhile."""
    now, sent = [0.0], list[int]()

    def send(task: str, queue: str, job_id: int) -> None:
        sent.append(job_id)
        now[0] += 61.0  # the process was stopped right after it sent this call

    with engine.begin() as connection:
        rows = [job_values(str(number), **ENDED) | {"on_done": "shop.ready"} for number in range(3)]
        connection.execute(insert(jobs), rows)
    assert notify(engine, send, clock=lambda: now[0]) == 1
    with engine.connect() as connection:
        untold = connection.execute(select(jobs.c.on_done_due_at).where(jobs.c.told_at.is_(None))).scalars().all()
    assert len(sent) == 1
    assert len(untold) == 2
    assert None not in untold, "the other process keeps its claims"


@pytest.mark.parametrize(
    "error",
    [
        redis_errors.ConnectionError("Connection refused"),
        redis_errors.TimeoutError("Timeout reading from socket"),
        redis_errors.ReadOnlyError("You can't write against a read only replica."),
        redis_errors.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        redis_errors.ResponseError("Command # 1 (LPUSH celery) of pipeline caused error: MISCONF Redis can't save"),
        redis_errors.AuthenticationError("invalid username-password pair"),
        AmqpLost("the connection is lost"),
        OSError("Network is unreachable"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_given_a_kombu_error_of_an_unavailable_broker_then_it_is_no_refusal(error: Exception) -> None:
    wrapped = BrokerError(str(error))
    wrapped.__cause__ = error
    assert refusal(error) is None
    assert refusal(wrapped) is None


def test_given_a_kombu_error_about_a_key_that_is_no_list_then_it_is_a_refusal() -> None:
    wrapped = BrokerError("WRONGTYPE")
    wrapped.__cause__ = redis_errors.ResponseError(
        "Command # 1 (LPUSH shop) of pipeline caused error: WRONGTYPE Operation against a key of the wrong kind"
    )
    reason = refusal(wrapped)
    assert reason is not None
    assert "WRONGTYPE" in reason


def test_given_no_redis_when_a_job_has_ended_then_its_call_stays_due_and_is_not_deferred(engine: Engine) -> None:
    """The call is then sent as soon as Redis is back."""
    closed = redis.Redis(port=1)

    def send(task: str, queue: str, job_id: int) -> None:
        try:
            closed.lpush(queue, job_id)
        except redis_errors.ConnectionError as error:
            raise BrokerError(str(error)) from error

    with engine.begin() as connection:
        connection.execute(insert(jobs), [job_values("1", **ENDED) | {"on_done": "shop.ready"}])
    with pytest.raises(BrokerError):
        notify(engine, send)
    with engine.connect() as connection:
        row = connection.execute(select(jobs)).one()
    assert (row.told_at, row.on_done_attempts, row.on_done_error) == (None, 0, None)
