"""Every action that changes something is in the audit trail, in the transaction of the change."""

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from celery.app.task import Context
from sqlalchemy import Engine, Row, select

import worker
from tests.rows import NOW, add_job, read_job
from worker import tasks
from worker.client import holds, matching
from worker.client.matching import change_matching
from worker.settings import Settings, load
from worker.store.audit import latest_actions
from worker.store.engine import transact
from worker.store.reports.search import JobFilter
from worker.store.schema import HELD_UNTIL, jobs
from worker.system.who import acting

FAILED: dict[str, Any] = {"status": "failed", "error_code": "api_failed", "due_at": None, "completed_at": NOW}
KILLED_IN_THE_THIRD_BATCH = """
import os, signal
from worker.client import matching
from worker.settings import load
from worker.store.counters import Tally
from worker.store.reports.search import JobFilter

matching.BATCH = 2
batches, write = [], Tally.write

def write_or_die(tally, connection):
    batches.append(tally)
    write(tally, connection)
    if len(batches) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

Tally.write = write_or_die
for _ in matching.change_matching("cancel", JobFilter(accounts=("shop",)), load()):
    pass
"""


@pytest.fixture
def settings(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings for the test database, with small batches."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setattr(matching, "FEW", 5)
    monkeypatch.setattr(matching, "BATCH", 2)
    monkeypatch.setattr(sys, "argv", ["/srv/shop/manage.py"])
    return load()


def _trail(engine: Engine) -> list[Row[Any]]:
    with engine.connect() as connection:
        return list(reversed(latest_actions(connection)))


def _acts(engine: Engine) -> list[tuple[str, str, int]]:
    return [(row.action, row.filter, row.jobs) for row in _trail(engine)]


@pytest.mark.usefixtures("settings")
def test_given_jobs_when_the_python_api_changes_them_then_each_change_is_recorded_once(engine: Engine) -> None:
    """A call that changes nothing is no action, and a hint is none either."""
    with engine.begin() as connection:
        job_id = add_job(connection, "1", due_at=HELD_UNTIL.replace(year=9998))

    for act in (worker.hold, worker.resume, worker.cancel):
        assert [act(job_id), act(job_id)] == [True, False]
    worker.nudge("1")
    assert not worker.retry(job_id)

    assert _acts(engine) == [(name, str(job_id), 1) for name in ("hold", "resume", "cancel")]
    assert {(row.source, row.who, row.job_id) for row in _trail(engine)} == {("python", "manage.py", job_id)}


@pytest.mark.usefixtures("settings")
def test_given_a_failed_job_when_it_is_retried_then_the_time_of_the_action_is_the_time_of_the_change(
    engine: Engine,
) -> None:
    with engine.begin() as connection:
        job_id = add_job(connection, "1", **FAILED)

    worker.retry(job_id)

    assert [row.at for row in _trail(engine)] == [read_job(engine, job_id).due_at]


@pytest.mark.usefixtures("settings")
def test_accounts_and_hosts_are_recorded_with_their_option_and_no_jobs(engine: Engine) -> None:
    for act in (holds.hold_account_or_host, holds.resume_account_or_host):
        assert [act("account", "shop"), act("account", "shop"), act("host", "api.test:8443")] == [True, False, True]

    options = ("--account shop", "--host api.test:8443")
    assert _acts(engine) == [(name, option, 0) for name in ("hold", "resume") for option in options]


def test_given_a_filter_when_its_jobs_change_in_batches_then_one_row_counts_them(
    engine: Engine, settings: Settings
) -> None:
    with engine.begin() as connection:
        for number in range(7):
            add_job(connection, str(number), account="shop")
    job_filter = JobFilter(statuses=("pending", "failed"), accounts=("shop",))

    with acting("cli", "ann"):
        for _ in range(2):
            list(change_matching("cancel", job_filter, settings))

    assert _acts(engine) == [("cancel", "--status pending --status failed --account shop", 7)]
    assert [(row.source, row.who, row.job_id) for row in _trail(engine)] == [("cli", "ann", None)]


def test_given_a_filter_when_the_command_is_interrupted_then_the_committed_batches_are_recorded(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine.begin() as connection:
        for number in range(7):
            add_job(connection, str(number))
    calls: list[Any] = []

    def cut_off(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return transact(*arguments)

    monkeypatch.setattr(matching, "transact", cut_off)
    with pytest.raises(KeyboardInterrupt):
        list(change_matching("hold", JobFilter(), settings))

    assert _acts(engine) == [("hold", "", 4)]


def test_given_a_filter_when_its_process_is_killed_in_a_batch_then_the_row_has_the_committed_jobs(
    engine: Engine, settings: Settings
) -> None:
    with engine.begin() as connection:
        for number in range(9):
            add_job(connection, str(number), account="shop")

    script = [sys.executable, "-c", KILLED_IN_THE_THIRD_BATCH]
    process = subprocess.run(script, env=dict(os.environ), capture_output=True, text=True, timeout=60, check=False)

    assert process.returncode == -signal.SIGKILL, process.stderr
    with engine.connect() as connection:
        states = list(connection.execute(select(jobs.c.status)).scalars())
    assert states.count("cancelled") == 4
    assert _acts(engine) == [("cancel", "--account shop", 4)]


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    ("request_fields", "actor"),
    [
        ({"origin": "gen7@shop"}, ("task", "gen7@shop")),
        ({}, ("task", "")),
        ({"origin": "gen8@ops", "fetch_worker_source": "flower", "fetch_worker_who": "ann"}, ("flower", "ann")),
        ({"fetch_worker_source": "cli", "fetch_worker_who": "root"}, ("task", "")),
    ],
)
def test_given_a_task_when_it_changes_a_job_then_the_sender_of_its_message_is_the_actor(
    request_fields: dict[str, str], actor: tuple[str, str], engine: Engine
) -> None:
    with engine.begin() as connection:
        job_id = add_job(connection, "1")
    task: Any = tasks.cancel
    task.request_stack.push(Context(**request_fields))
    try:
        assert task.run(job_id) == "cancelled"
    finally:
        task.request_stack.pop()

    assert [(row.source, row.who) for row in _trail(engine)] == [actor]
