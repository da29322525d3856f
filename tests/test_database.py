"""Connections: a full server is waited for, an idle connection that broke is replaced, the clock is the database's."""

import time
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DataError, IntegrityError, InterfaceError, OperationalError

from tests.rows import add_job
from worker import database
from worker.database import PATIENCE, RELAXED, SNAPSHOT, database_now, make_engine, trouble
from worker.tables import jobs


def test_given_a_server_without_a_free_connection_when_one_is_freed_then_it_is_taken(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"))
    connect = engine.dialect.connect
    refusals = iter([True, True])

    def crowded(*arguments: object, **options: object) -> object:
        if next(refusals, False):
            raise psycopg.OperationalError("FATAL:  sorry, too many clients already")
        return connect(*arguments, **options)

    monkeypatch.setattr(engine.dialect, "connect", crowded)

    with engine.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
    engine.dispose()


def test_given_an_idle_connection_that_the_server_ended_when_it_is_used_then_another_takes_its_place(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "IDLE_SECONDS", 0.0)
    engine = make_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        backend = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    with psycopg.connect(postgres_url, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s)", [backend])

    with engine.connect() as connection:
        assert connection.execute(text("SELECT pg_backend_pid()")).scalar_one() != backend
    engine.dispose()


def test_given_an_open_transaction_when_asked_for_the_time_then_it_goes_on_from_the_databases_clock(
    postgres_url: str,
) -> None:
    engine = make_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        first = database_now(connection)
        time.sleep(0.01)
        assert database_now(connection) - first >= timedelta(seconds=0.01)
        assert abs(first - datetime.now(UTC)) < timedelta(seconds=5)
    engine.dispose()


def test_given_a_connection_that_the_server_ended_when_a_transaction_begins_then_it_is_sqlalchemy_s_error_and_passes(
    postgres_url: str,
) -> None:
    engine = make_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        backend = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    with psycopg.connect(postgres_url, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s)", [backend])

    with pytest.raises(OperationalError) as caught, engine.begin():
        pass
    with engine.begin() as connection:
        assert connection.execute(text("SELECT pg_backend_pid()")).scalar_one() != backend
    engine.dispose()

    assert trouble(caught.value) == "away"


def test_given_a_transaction_when_it_begins_then_it_is_one_and_its_settings_end_with_it(postgres_url: str) -> None:
    engine = make_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"))
    with engine.connect().execution_options(**{PATIENCE: 0.25, RELAXED: True}) as connection:
        assert connection.execute(text("SHOW lock_timeout")).scalar() == "250ms"
        assert connection.execute(text("SHOW synchronous_commit")).scalar() == "off"
        connection.execute(text("CREATE TABLE passing (id int)"))
        connection.rollback()
        assert connection.execute(text("SELECT to_regclass('passing')")).scalar() is None
    with psycopg.connect(postgres_url) as plain:
        assert plain.execute("SHOW lock_timeout").fetchone() == ("0",)
    with engine.begin() as connection:
        assert connection.execute(text("SHOW lock_timeout")).scalar() == "15s"
        assert connection.execute(text("SHOW synchronous_commit")).scalar() == "on"
    engine.dispose()


class _Said(Exception):
    """What a driver raises."""

    def __init__(self, *words: object, sqlstate: str | None = None) -> None:
        super().__init__(*words)
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("error", "means"),
    [
        (OperationalError("", {}, _Said("server closed the connection")), "away"),
        (InterfaceError("", {}, _Said("connection already closed")), "away"),
        (OperationalError("", {}, _Said("canceling statement due to lock timeout", sqlstate="55P03")), "locked"),
        (OperationalError("", {}, _Said("deadlock detected", sqlstate="40P01")), "locked"),
        (OperationalError("", {}, _Said(1205, "Lock wait timeout exceeded")), "locked"),
        (OperationalError("", {}, _Said(1213, "Deadlock found")), "locked"),
        (OperationalError("", {}, _Said(4025, "CONSTRAINT failed")), "row"),
        (OperationalError("", {}, _Said(2006, "server has gone away")), "away"),
        (DataError("", {}, _Said("invalid byte sequence", sqlstate="22021")), "row"),
        (IntegrityError("", {}, _Said("violates check constraint", sqlstate="23514")), "row"),
        (DataError("", {}, _Said("broken off"), connection_invalidated=True), "away"),
        (ValueError("a time without a zone"), "row"),
    ],
)
def test_what_an_error_says_of_the_database(error: Exception, means: str) -> None:
    assert trouble(error) == means


def test_given_a_snapshot_when_others_write_then_they_do_not_wait_and_it_stays_what_it_was(engine: Engine) -> None:
    """The next transaction on the same connection is as every other one."""
    count = select(func.count()).select_from(jobs)
    with engine.execution_options(**{SNAPSHOT: True}).connect() as reading:
        before = reading.execute(count).scalar_one()
        began = time.monotonic()
        with engine.begin() as writing:
            add_job(writing)
        waited = time.monotonic() - began
        during = reading.execute(count).scalar_one()
    with engine.begin() as connection:
        add_job(connection, "2")
        after = connection.execute(count).scalar_one()

    assert (before, during, after) == (0, 0, 2)
    assert waited < 5
