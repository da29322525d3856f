"""`copy-database` is killed at random moments and run again: every row is there exactly once."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from tests import servers
from tests.copied import all_rows, plant_many
from tests.waiting import wait_until
from worker.store.engine import make_engine
from worker.store.schema import jobs, outputs

COUNT = 4_000
LONG_COUNT = 10_000
SLOW = """
import sys, time
from worker.cli import main
from worker.store import copying

insert_rows = copying.insert_rows
copying.insert_rows = lambda *arguments: time.sleep(0.2) or insert_rows(*arguments)
main(sys.argv[1:])
"""  # the command, slowed down: otherwise it copies some thousand rows faster than it can be killed


@pytest.fixture
def source(configured_sqlite: Engine) -> Engine:
    """A migrated SQLite database. DATABASE_URL names it."""
    return configured_sqlite


@pytest.fixture(params=["postgresql", "mariadb"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An empty database."""
    server = servers.postgres(tmp_path / "postgres") if request.param == "postgresql" else servers.mariadb()
    driver = "postgresql+psycopg" if request.param == "postgresql" else "mariadb+pymysql"
    with server as url:
        engine = make_engine(make_url(url).set(drivername=driver))
        yield engine
        engine.dispose()


def _count(engine: Engine) -> int:
    """Return the number of jobs and outputs."""
    try:
        with engine.connect() as connection:
            queries = (select(func.count()).select_from(table) for table in (jobs, outputs))
            return sum(int(connection.execute(query).scalar_one()) for query in queries)
    except DBAPIError:  # the tables are not there yet
        return 0


def _check_kills(source: Engine, target: Engine, count: int, *, longest: float) -> None:
    plant_many(source, count)
    rng, killed = random.Random(count), 0
    command = [sys.executable, "-c", SLOW, "copy-database", "--json", "-"]
    url = target.url.render_as_string(hide_password=False).encode()
    for _ in range(4):
        before = _count(target)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert process.stdin is not None
        process.stdin.write(url)
        process.stdin.close()
        wait_until(
            lambda: process.poll() is not None or _count(target) > before,  # noqa: B023
            "the command has copied rows",
        )
        time.sleep(rng.uniform(0, longest))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    finished = subprocess.run(command, input=url, capture_output=True, check=False, timeout=600)

    assert finished.returncode == 0, finished.stderr.decode()
    tables = json.loads(finished.stdout)["tables"]
    print(f"{killed} kills, then {sum(table['copied'] for table in tables)} of {2 * count} rows were left")
    assert killed > 0
    assert all_rows(target) == all_rows(source)


@pytest.mark.server
@pytest.mark.parametrize("target", ["postgresql"], indirect=True)
def test_given_kills_at_random_moments_when_run_again_then_every_row_is_there_once(
    source: Engine, target: Engine
) -> None:
    _check_kills(source, target, COUNT, longest=0.6)


@pytest.mark.long
@pytest.mark.server
def test_ten_thousand_jobs_survive_kills(source: Engine, target: Engine) -> None:
    _check_kills(source, target, LONG_COUNT, longest=1.5)
