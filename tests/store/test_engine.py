"""Engines: waiting for a full server, replacing broken connections, transaction settings, the database's clock."""

import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, func, insert, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError

from tests import servers
from tests.rows import add_job
from worker import DeploymentError, Unavailable, get, track
from worker.settings import load
from worker.store import engine as engine_module
from worker.store.engine import (
    LOCK_WAIT,
    RELAXED,
    SNAPSHOT,
    close_unused_connections,
    database_now,
    engine_for,
    error_kind,
    is_writable,
    make_engine,
    translate_errors,
)
from worker.store.migrate import migrate
from worker.store.schema import bodies, jobs


def test_given_a_full_server_when_a_connection_is_released_then_it_is_used(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"))
    connect = engine.dialect.connect
    refusals = iter([True, True])

    def connect_to_full_server(*arguments: object, **options: object) -> object:
        if next(refusals, False):
            raise psycopg.OperationalError("FATAL:  sorry, too many clients already")
        return connect(*arguments, **options)

    monkeypatch.setattr(engine.dialect, "connect", connect_to_full_server)

    with engine.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
    engine.dispose()


def test_given_an_idle_connection_that_the_server_closed_when_it_is_used_then_it_is_replaced(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", 0.0)
    engine = make_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        backend = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(%s)", [backend])

    with engine.connect() as connection:
        assert connection.execute(text("SELECT pg_backend_pid()")).scalar_one() != backend
    engine.dispose()


def test_given_an_open_transaction_then_the_time_continues_from_the_databases_clock(
    postgres_url: str,
) -> None:
    engine = make_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        first = database_now(connection)
        time.sleep(0.01)
        assert database_now(connection) - first >= timedelta(seconds=0.01)
        assert abs(first - datetime.now(UTC)) < timedelta(seconds=5)
    engine.dispose()


def test_given_a_closed_connection_when_a_transaction_begins_then_sqlalchemy_raises_and_the_next_one_works(
    postgres_url: str,
) -> None:
    engine = make_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        backend = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(%s)", [backend])

    with pytest.raises(OperationalError) as caught, engine.begin():
        pass
    with engine.begin() as connection:
        assert connection.execute(text("SELECT pg_backend_pid()")).scalar_one() != backend
    engine.dispose()

    assert error_kind(caught.value) == "away"


def test_given_a_transaction_then_its_settings_end_with_it(postgres_url: str) -> None:
    engine = make_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"))
    with engine.connect().execution_options(**{LOCK_WAIT: 0.25, RELAXED: True}) as connection:
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


HOSTILE = {
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "TimeZone": "Asia/Kathmandu",
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "sql_standard",
    "extra_float_digits": "-15",
    "bytea_output": "escape",
    "standard_conforming_strings": "off",
    "client_encoding": "LATIN1",
    "statement_timeout": "5s",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": "5s",
    "synchronous_commit": "off",
}


@pytest.fixture
def separate_database(tmp_path: Path) -> Iterator[str]:
    """Create a PostgreSQL database for one test, whose defaults it may change."""
    with servers.postgres(tmp_path / "postgres") as url:
        yield url


def _alter(url: str, *settings: str) -> None:
    with psycopg.connect(make_url(url).set(database="postgres").render_as_string(hide_password=False)) as connection:
        connection.autocommit = True
        for setting in settings:
            connection.execute(f'ALTER DATABASE "{make_url(url).database}" {setting}'.encode())


def test_given_a_database_with_other_defaults_when_jobs_are_tracked_then_their_values_are_unchanged(
    separate_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each session and transaction sets its own options."""
    _alter(separate_database, *(f"SET {name} = '{value}'" for name, value in HOSTILE.items()))
    monkeypatch.setenv("DATABASE_URL", separate_database)
    engine = make_engine(make_url(separate_database))
    migrate(engine)
    picture = "data:image/png;base64," + b64encode(bytes(range(256))).decode()
    job_id = track(
        {"status": "success", "id": "1", "output": [picture]}, reference="naïve \U0001f353 \\", eta=0.1 + 0.2
    )
    job = get(job_id)
    assert job is not None
    assert (job.reference, job.eta) == ("naïve \U0001f353 \\", 0.1 + 0.2)
    assert abs(job.submitted_at - datetime.now(UTC)) < timedelta(minutes=1)
    with engine.begin() as connection:
        assert connection.execute(select(bodies.c.body)).scalar_one() == bytes(range(256))
        assert connection.execute(text("SHOW transaction_isolation")).scalar_one() == "read committed"
        assert connection.execute(text("SHOW transaction_deferrable")).scalar_one() == "off"
        assert connection.execute(text("SHOW synchronous_commit")).scalar_one() == "on"
        assert connection.execute(text("SHOW statement_timeout")).scalar_one() == "1min"
        assert connection.execute(text("SHOW lock_timeout")).scalar_one() == "15s"
        assert connection.execute(text("SHOW idle_in_transaction_session_timeout")).scalar_one() == "1min"
    engine.dispose()
    engine_for(load().database).dispose()


def test_given_a_server_that_was_read_only_when_it_accepts_writes_then_no_old_connection_is_used(
    separate_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections from the read-only time stay read-only, although they answer every SELECT."""
    engine = make_engine(make_url(separate_database))
    migrate(engine)
    engine.dispose()
    _alter(separate_database, "SET default_transaction_read_only = on")
    with engine.connect(), engine.connect(), engine.connect():
        pass  # three connections in the pool
    with pytest.raises(Unavailable, match="read-only"), translate_errors(engine.url), engine.begin() as connection:
        add_job(connection)
    with engine.connect() as connection:
        assert not is_writable(connection)
    _alter(separate_database, "RESET default_transaction_read_only")
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", 0.0)
    with engine.begin() as connection:
        add_job(connection)
        assert is_writable(connection)
    engine.dispose()


def test_given_connections_that_an_administrator_closed_when_one_fails_then_all_are_replaced(
    postgres_url: str,
) -> None:
    engine = make_engine(make_url(postgres_url))
    with engine.connect() as first, engine.connect() as second:
        backends = [connection.execute(text("SELECT pg_backend_pid()")).scalar_one() for connection in (first, second)]
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        for backend in backends:
            admin.execute("SELECT pg_terminate_backend(%s)", [backend])

    with pytest.raises(OperationalError) as caught, engine.begin():
        pass
    assert error_kind(caught.value) == "away"
    with engine.begin(), engine.begin():
        pass
    engine.dispose()


@pytest.mark.parametrize(
    ("engine", "moved"),
    [("sqlite", "PRAGMA query_only=ON"), ("mariadb", "SET SESSION TRANSACTION READ ONLY")],
    indirect=["engine"],
)
def test_given_a_read_only_session_when_it_writes_then_the_server_is_away_and_the_connection_is_replaced(
    engine: Engine, moved: str
) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql(moved)
        connection.rollback()
        with pytest.raises(DBAPIError) as caught:
            add_job(connection)
    assert error_kind(caught.value) == "away"
    with engine.begin() as connection:
        add_job(connection)


def test_given_a_statement_that_is_too_large_for_mariadb_then_the_error_has_the_kind_row(
    migrated_mariadb: Engine,
) -> None:
    """The server may return an error, or just close the connection. The other connections stay open."""
    with migrated_mariadb.connect() as connection:
        limit = connection.execute(text("SELECT @@max_allowed_packet")).scalar_one()
        with migrated_mariadb.connect() as other_connection:
            before = other_connection.execute(text("SELECT CONNECTION_ID()")).scalar_one()
        with pytest.raises(DBAPIError) as caught:
            connection.execute(insert(bodies), {"output_id": 1, "body": bytes(limit + 1_000)})
    assert error_kind(caught.value) == "row"
    with migrated_mariadb.connect() as other_connection:
        alive = text("SELECT count(*) FROM information_schema.processlist WHERE id = :id")
        assert other_connection.execute(alive, {"id": before}).scalar_one() == 1


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_given_a_database_with_another_encoding_when_it_is_used_then_the_error_has_the_advice(
    postgres_url: str, encoding: str
) -> None:
    name = f"{make_url(postgres_url).database}_{encoding.lower()}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0".encode())
        engine = make_engine(make_url(postgres_url).set(database=name))
        with pytest.raises(DeploymentError, match=f"{encoding}.*must be UTF8"), engine.connect():
            pass
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def test_given_a_snapshot_when_other_transactions_write_then_they_do_not_wait_and_it_does_not_change(
    engine: Engine,
) -> None:
    """The next transaction on the same connection is a normal one."""
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


def test_given_connections_that_are_not_needed_any_more_then_they_are_closed_and_the_used_one_stays(
    engine: Engine,
) -> None:
    own = make_engine(engine.url)
    try:
        connections = [own.connect() for _ in range(3)]
        for connection in connections:
            connection.close()
        first = close_unused_connections(own)
        pool = own.pool
        assert isinstance(pool, engine_module.FrugalPool)
        for _ in range(3):  # the same connection each time: the others stay unused
            time.sleep(0.1)
            with own.connect() as connection:
                connection.execute(text("SELECT 1"))
        closed = pool.close_unused(0.2)

        assert (first, closed) == (0, 2)
        assert (pool.checkedin(), pool.overflow()) == (1, 1 - engine_module.POOL_KEEPS)
        for connection in [own.connect(), own.connect()]:
            connection.close()
        assert pool.checkedin() == 2
    finally:
        own.dispose()


def test_given_a_pool_in_use_by_threads_when_unused_connections_are_closed_then_every_query_works(
    engine: Engine,
) -> None:
    own = make_engine(engine.url)
    errors: list[Exception] = []
    stopping = threading.Event()

    def query() -> None:
        while not stopping.is_set():
            try:
                with own.connect() as connection:
                    connection.execute(text("SELECT 1"))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=query) for _ in range(6)]
    try:
        for thread in threads:
            thread.start()
        pool = own.pool
        assert isinstance(pool, engine_module.FrugalPool)
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            pool.close_unused(0.001)
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
        checked_out = own.pool.checkedout()  # type: ignore[attr-defined]  # of a QueuePool
        own.dispose()
    assert errors == []
    assert checked_out == 0
