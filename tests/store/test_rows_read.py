"""The number of rows that MariaDB reads for queries about waiting jobs: few, with any number of other jobs."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, insert

from tests.rows import LEASE, NOW, job_values, seconds
from worker.settings import Settings
from worker.store.claims import claim_jobs
from worker.store.due_groups import DueGroup, due_groups
from worker.store.jobs import waiting_accounts
from worker.store.reports.known_names import unknown_name
from worker.store.reports.search import JobFilter, find_job_ids
from worker.store.reports.snapshot_rows import last_failures
from worker.store.reports.stats import waiting_by_account, waiting_by_kind
from worker.store.schema import jobs

AT_REST = 3_000
ACCOUNTS = ("default", "idle", "shop")
WAITING = 20  # per account, except the idle one
LEVELS = 2 * (len(ACCOUNTS) - 1)

Look = Callable[[Connection], object]


@pytest.fixture
def filled_database(engine: Engine) -> Engine:
    """Create three accounts with thousands of final jobs. Two of them have a few waiting jobs."""
    final: dict[str, Any] = {"status": "completed", "due_at": None, "ready_at": NOW, "completed_at": NOW, "priority": 9}
    rows = [
        job_values(f"final{n}", account=ACCOUNTS[n % 3], fetch_host=f"h{n % 7}.test", **final) for n in range(AT_REST)
    ]
    for number in range(WAITING):
        due = {"status": "pending", "ready_at": None, "completed_at": None, "due_at": NOW - seconds(number)}
        later = NOW + timedelta(days=365)
        rows += [
            job_values(f"due{number}", account=name, priority=number % 2, deadline_at=later, **due)
            for name in ("default", "shop")
        ]
    with engine.begin() as connection:
        connection.execute(insert(jobs), rows)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE TABLE fetch_jobs")
    return engine


def _rows_read(engine: Engine, look: Look) -> int:
    def rows_read_so_far(connection: Connection) -> int:
        status = connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Handler_read%%'").all()
        return sum(int(value) for _, value in status)

    with engine.connect() as connection:
        before = rows_read_so_far(connection)
        own_price = rows_read_so_far(connection) - before  # reading the counter reads rows too
        before = rows_read_so_far(connection)
        look(connection)
        return rows_read_so_far(connection) - before - own_price


def _claim(connection: Connection) -> object:
    level = DueGroup("default", 1, "api.test", NOW)
    return claim_jobs(connection, level, limit=5, token="t", holder="h", lease=LEASE, now=NOW)


@pytest.mark.parametrize("engine", ["mariadb"], indirect=True)
@pytest.mark.parametrize(
    ("query", "limit"),
    [
        (lambda connection: due_groups(connection, ACCOUNTS), 3 * (LEVELS + len(ACCOUNTS))),
        (waiting_accounts, 3 * LEVELS),
        (_claim, 8 * 5),
        (lambda connection: waiting_by_account(connection, now=NOW), 4 * 2 * WAITING),
        (lambda connection: waiting_by_kind(connection, now=NOW), 6 * 2 * WAITING),
        (lambda connection: find_job_ids(connection, JobFilter(past_deadline=True), limit=50), 4 * 2 * WAITING),
        (lambda connection: find_job_ids(connection, JobFilter(late=10.0), limit=50), 10 * 2 * WAITING),
        (lambda connection: find_job_ids(connection, JobFilter(held=True), limit=50), 4 * 2 * WAITING),
        (lambda connection: last_failures(connection, limit=5), 20),
        (lambda connection: unknown_name(connection, JobFilter(accounts=("typo",)), Settings()), 40),
        (lambda connection: unknown_name(connection, JobFilter(hosts=("typo",)), Settings()), 80),
    ],
    ids=[
        *("levels", "accounts", "claim", "by account", "by kind", "past deadline", "late", "held", "failures"),
        *("unknown account", "unknown host"),
    ],
)
def test_queries_for_waiting_jobs_do_not_read_final_jobs(filled_database: Engine, query: Look, limit: int) -> None:
    """With thousands of final jobs, only the waiting jobs are read."""
    assert limit < AT_REST / 5
    assert 0 < _rows_read(filled_database, query) <= limit
