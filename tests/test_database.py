"""Connections: a full server is waited for, an idle connection that broke is replaced, the clock is the database's."""

import time
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from worker import database
from worker.database import database_now, make_engine


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
