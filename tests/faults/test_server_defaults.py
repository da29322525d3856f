"""The database has other defaults, is read-only for some seconds, or closes all connections: work continues."""

import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.engine import make_url

from tests.faults.servers import RedisServer, all_completed, assert_nothing_lost, running_mariadb, states, until, up
from worker import Unavailable, track, track_many
from worker.sandbox import Sandbox
from worker.settings import load
from worker.store.engine import engine_for, make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs

JOBS = 300
READ_ONLY_SECONDS = 10.0
BACK_WITHIN_SECONDS = 5.0

Fault = Callable[[Engine], None]


def _administer(database: Engine, statement: str) -> None:
    url = database.url.set(drivername="postgresql", database="postgres").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.format(name=database.url.database).encode())


def _end_connections(database: Engine) -> None:
    _administer(database, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    database.dispose()


def _isolation(level: str) -> Fault:
    def fault(database: Engine) -> None:
        _administer(database, f"ALTER DATABASE \"{{name}}\" SET default_transaction_isolation = '{level}'")
        _end_connections(database)

    fault.__name__ = level.replace(" ", "_")
    return fault


def _polls(database: Engine) -> int:
    with database.connect() as connection:
        return int(connection.execute(select(func.sum(jobs.c.polls))).scalar_one())


def read_only_for_a_while(database: Engine) -> None:
    """Make the database read-only, as in a failover or on a full disk. Check that polling resumes soon afterwards."""
    _administer(database, 'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    _end_connections(database)
    time.sleep(READ_ONLY_SECONDS)
    before = _polls(database)
    _administer(database, 'ALTER DATABASE "{name}" RESET default_transaction_read_only')
    assert not all_completed(database, JOBS), "all jobs were completed before the database was read-only"
    seconds = until(lambda: _polls(database) > before, BACK_WITHIN_SECONDS, lambda: states(database))
    print(f"polling resumed {seconds:.1f} s after writes were possible again")


def connections_killed(database: Engine) -> None:
    """Close all connections once a second, five times."""
    for _ in range(5):
        _end_connections(database)
        time.sleep(1)


@pytest.mark.long
@pytest.mark.server
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "fault",
    [_isolation("repeatable read"), _isolation("serializable"), read_only_for_a_while, connections_killed],
    ids=lambda fault: fault.__name__,
)
def test_given_waiting_jobs_when_the_database_is_reconfigured_then_all_complete_and_none_is_quarantined(
    fault: Fault, tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    log = tmp_path / "up.log"
    with up(tmp_path):
        track_many([sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS)])
        time.sleep(1)
        fault(database)
        until(lambda: all_completed(database, JOBS), 120, lambda: f"{states(database)} {log.read_text()[-1_500:]}")
    log_text = log.read_text()
    assert_nothing_lost(database, sandbox, tmp_path, JOBS, asked_again=JOBS)
    assert "died at each" not in log_text
    assert "Traceback" not in log_text
    assert "restart in" not in log_text, "a process exited because of the fault"


MARIADB_DEFAULTS = (
    "SET GLOBAL sql_mode = 'ANSI_QUOTES,PIPES_AS_CONCAT,NO_BACKSLASH_ESCAPES'",
    "SET GLOBAL tx_isolation = 'SERIALIZABLE'",
    "SET GLOBAL autocommit = 0",
    "SET GLOBAL time_zone = '+05:45'",
    "SET GLOBAL sql_safe_updates = 1",
    "SET GLOBAL sql_select_limit = 1",
    "SET GLOBAL completion_type = 'CHAIN'",
    "SET GLOBAL max_statement_time = 0.01",
    "SET GLOBAL character_set_server = 'latin1'",
)


@pytest.mark.long
@pytest.mark.server
@pytest.mark.timeout(240)
def test_given_a_mariadb_with_other_defaults_when_it_is_read_only_for_a_while_then_all_jobs_are_completed(
    tmp_path: Path, sandbox: Sandbox, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Polling resumes soon after writes are possible again."""
    log = tmp_path / "up.log"
    with running_mariadb(tmp_path / "mariadb") as server:
        server.run(*MARIADB_DEFAULTS)
        monkeypatch.setenv("DATABASE_URL", server.url)
        database = make_engine(make_url(server.url).set(drivername="mariadb+pymysql"))
        migrate(database)
        with up(tmp_path):
            track_many([sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS)])
            time.sleep(1)
            server.run("SET GLOBAL read_only = 1")
            with pytest.raises(Unavailable, match="read-only"):
                track("1")
            time.sleep(READ_ONLY_SECONDS)
            before = _polls(database)
            server.run("SET GLOBAL read_only = 0")
            seconds = until(lambda: _polls(database) > before, BACK_WITHIN_SECONDS, lambda: states(database))
            print(f"polling resumed {seconds:.1f} s after writes were possible again")
            until(lambda: all_completed(database, JOBS), 120, lambda: f"{states(database)} {log.read_text()[-1_500:]}")
        assert_nothing_lost(database, sandbox, tmp_path, JOBS, asked_again=JOBS)
        database.dispose()
        engine_for(load().database).dispose()
    log_text = log.read_text()
    assert "died at each" not in log_text
    assert "Traceback" not in log_text
