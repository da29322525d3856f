"""A database with other defaults, one that takes no writes for a while, or that ends every connection: work goes on."""

import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, func, select

from tests.faults.servers import HurtRedis, all_completed, assert_nothing_lost, states, until, up
from worker import track_many
from worker.sandbox import Sandbox
from worker.tables import jobs

JOBS = 300
READ_ONLY_SECONDS = 10.0
BACK_WITHIN_SECONDS = 5.0

Hurt = Callable[[Engine], None]


def _administer(database: Engine, statement: str) -> None:
    url = database.url.set(drivername="postgresql", database="postgres").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.format(name=database.url.database).encode())


def _end_connections(database: Engine) -> None:
    _administer(database, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    database.dispose()


def _isolation(level: str) -> Hurt:
    def hurt(database: Engine) -> None:
        _administer(database, f"ALTER DATABASE \"{{name}}\" SET default_transaction_isolation = '{level}'")
        _end_connections(database)

    hurt.__name__ = level.replace(" ", "_")
    return hurt


def _polls(database: Engine) -> int:
    with database.connect() as connection:
        return int(connection.execute(select(func.sum(jobs.c.polls))).scalar_one())


def read_only_for_a_while(database: Engine) -> None:
    """As a failover, or a provider whose disk is full. Polls go on soon after it."""
    _administer(database, 'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    _end_connections(database)
    time.sleep(READ_ONLY_SECONDS)
    before = _polls(database)
    _administer(database, 'ALTER DATABASE "{name}" RESET default_transaction_read_only')
    assert not all_completed(database, JOBS), "it was over too soon"
    took = until(lambda: _polls(database) > before, BACK_WITHIN_SECONDS, lambda: states(database))
    print(f"polls went on {took:.1f} s after writes were possible again")


def connections_killed(database: Engine) -> None:
    """Each second, for a few."""
    for _ in range(5):
        _end_connections(database)
        time.sleep(1)


@pytest.mark.long
@pytest.mark.server
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "hurt",
    [_isolation("repeatable read"), _isolation("serializable"), read_only_for_a_while, connections_killed],
    ids=lambda hurt: hurt.__name__,
)
def test_given_jobs_under_way_when_the_database_is_so_then_all_are_completed_and_none_is_set_aside(
    hurt: Hurt, tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis
) -> None:
    log = tmp_path / "up.log"
    with up(tmp_path):
        track_many([sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS)])
        time.sleep(1)
        hurt(database)
        until(lambda: all_completed(database, JOBS), 120, lambda: f"{states(database)} {log.read_text()[-1_500:]}")
    said = log.read_text()
    assert_nothing_lost(database, sandbox, tmp_path, JOBS, asked_again=JOBS)
    assert "set aside" not in said
    assert "Traceback" not in said
    assert "it is started again" not in said, "a process ended for it"
