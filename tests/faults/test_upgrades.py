"""Two versions run at the same time: migrations only add to the schema, so a deployment needs no downtime."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from celery import Celery
from sqlalchemy import Engine, text
from sqlalchemy.engine import make_url

from tests.faults.servers import RedisServer, assert_nothing_lost, wait_completed
from tests.servers import celery_worker, missing, postgres
from worker.errors import SchemaOutdated
from worker.sandbox import Sandbox
from worker.store.engine import SCHEMA_VERSION, make_engine, schema_version
from worker.store.migrate import expand, migrate, scripts
from worker.store.schema import VERSION_TABLE

ROOT = Path(__file__).parents[2]
FIRST_RELEASE = "e9ef5a9341c11e3576358a3e90dcc251889d5694"
FIRST_SCHEMA = "0001"
JOBS = 12


@pytest.fixture(scope="session")
def first_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Extract the worker of the first release from the Git history."""
    folder = tmp_path_factory.mktemp("first_release")
    command = ["git", "-C", str(ROOT), "archive", "--format=zip", FIRST_RELEASE, "worker", "migrations"]
    result = subprocess.run(command, capture_output=True, check=False)
    if result.returncode:
        missing(f"the history back to {FIRST_RELEASE[:7]}")
    with zipfile.ZipFile(io.BytesIO(result.stdout)) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def workspace(empty: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for two workers that share a database and a storage."""
    monkeypatch.setenv("DATABASE_URL", empty.url.render_as_string(hide_password=False).replace("+psycopg", ""))
    monkeypatch.setenv("STORAGE_URL", f"file:{tmp_path}/var/outputs")
    for name in ("first", "present"):
        (tmp_path / name).mkdir()
    return tmp_path


def _use_release(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the processes that are started from now on with the code of a release."""
    monkeypatch.setenv("PYTHONPATH", str(release))
    command = [sys.executable, "-c", "import worker; print(worker.__file__)"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=release)
    assert Path(result.stdout.strip()).is_relative_to(release)


def _migrate_with(release: Path) -> None:
    command = [sys.executable, "-c", "from worker.cli import main; main(['migrate'])"]
    subprocess.run(command, check=True, cwd=release, capture_output=True)


def _track(broker: RedisServer, sandbox: Sandbox, subject: str) -> None:
    with Celery(broker=broker.url, set_as_current=False) as client:
        for number in range(JOBS):
            answer = sandbox.submit(f"{subject}, {number}", samples=1)
            options: dict[str, Any] = {"fetch_url": answer["fetch_result"], "eta": answer["eta"]}
            client.send_task("worker.track", [str(answer["id"])], options, queue="fetch-worker")


def tracebacks(log: Path) -> list[str]:
    """Return the tracebacks in a log, except those of MariaDB deadlocks, which the first release logs and retries."""
    return [block for block in log.read_text().split("Traceback (most")[1:] if "(1213," not in block]


def _version(engine: Engine) -> str | None:
    with engine.connect() as connection:
        return schema_version(connection)


@pytest.mark.long
@pytest.mark.server
def test_a_worker_of_the_first_release_works_with_the_current_tables(
    first_release: Path,
    workspace: Path,
    empty: Engine,
    sandbox: Sandbox,
    broker: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A deployment is rolled back, and the tables are not downgraded.

    The first release asks again after a deadlock of MariaDB.
    """
    migrate(empty)
    _use_release(first_release, monkeypatch)
    with celery_worker(workspace / "first"):
        _track(broker, sandbox, "a lighthouse")
        log = workspace / "first" / "worker.log"
        wait_completed(empty, JOBS, workspace)
    waited = "polling waits for the database" in log.read_text()
    assert_nothing_lost(empty, sandbox, workspace, JOBS, asked_again=JOBS if waited else 0)
    assert not tracebacks(log)


@pytest.mark.long
@pytest.mark.server
def test_a_current_worker_upgrades_the_tables_of_the_first_release_while_the_old_worker_runs(
    first_release: Path,
    workspace: Path,
    empty: Engine,
    sandbox: Sandbox,
    broker: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The new worker upgrades the schema, the old worker continues, and each job is done once."""
    _use_release(first_release, monkeypatch)
    _migrate_with(first_release)
    assert _version(empty) == FIRST_SCHEMA
    with celery_worker(workspace / "first", "--hostname", "first@%h"):
        _track(broker, sandbox, "a lighthouse")
        _use_release(ROOT, monkeypatch)
        with celery_worker(workspace / "present", "--hostname", "present@%h"):
            assert _version(empty) == SCHEMA_VERSION
            _track(broker, sandbox, "a harbour")
            wait_completed(empty, 2 * JOBS, workspace)
            log_text = (workspace / "present" / "worker.log").read_text()
        first_log = workspace / "first" / "worker.log"
        assert not tracebacks(first_log)
        waited = "polling waits for the database" in first_log.read_text()
    assert_nothing_lost(empty, sandbox, workspace, 2 * JOBS, asked_again=JOBS if waited else 0)
    assert "Traceback" not in log_text


def _create_first_schema(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(scripts()))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, FIRST_SCHEMA)
        connection.commit()


def test_tables_of_an_older_version_are_expanded_but_an_empty_database_gets_none(empty: Engine) -> None:
    """Only `fetch-worker migrate` creates the first tables, so that a wrong DATABASE_URL gets none."""
    with pytest.raises(SchemaOutdated, match="fetch-worker migrate"):
        expand(empty)
    _create_first_schema(empty)
    expand(empty)
    assert _version(empty) == SCHEMA_VERSION


def test_a_worker_that_may_not_change_the_schema_says_what_to_do(tmp_path: Path) -> None:
    """The role may only read and write rows. The schema does not change."""
    with postgres(tmp_path / "postgres") as url:
        owner = make_engine(make_url(url).set(drivername="postgresql+psycopg"))
        _create_first_schema(owner)
        role = f"{owner.url.database}_reader"
        with owner.begin() as connection:
            connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'harmless'"))
            connection.execute(text(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}"))
        limited = make_engine(owner.url.set(username=role, password="harmless"))
        try:
            with pytest.raises(SchemaOutdated, match=f"the database schema is {FIRST_SCHEMA}.*fetch-worker migrate"):
                expand(limited)
            assert _version(owner) == FIRST_SCHEMA
        finally:
            limited.dispose()
            with owner.begin() as connection:
                connection.execute(text(f"DROP OWNED BY {role}"))
                connection.execute(text(f"DROP ROLE {role}"))
            owner.dispose()


# Runs in a process without threads, because it forks. Each forked migration is killed one statement later.
KILL_AFTER_EACH_STATEMENT = """
import os, signal, sys
from sqlalchemy import Engine, event
from sqlalchemy.engine import make_url
from worker.store.engine import make_engine
from worker.store.migrate import migrate

def run(last):
    executed = 0
    @event.listens_for(Engine, "after_cursor_execute")
    def kill(*_):
        nonlocal executed
        executed += 1
        if executed == last:
            os.kill(os.getpid(), signal.SIGKILL)
    migrate(make_engine(make_url(sys.argv[1])))

for last in range(1, 500):
    child = os.fork()
    if not child:
        run(last)
        os._exit(0)
    exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if exit_code != -signal.SIGKILL:
        print(last - 1)
        sys.exit(exit_code)
"""


def test_a_migration_that_was_killed_after_any_statement_can_be_run_again(empty: Engine) -> None:
    """The migration is killed after each of its statements in turn. The last run completes it."""
    command_line = [sys.executable, "-c", KILL_AFTER_EACH_STATEMENT, empty.url.render_as_string(hide_password=False)]
    result = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20, "too few statements to create the tables"
    assert _version(empty) == SCHEMA_VERSION
    config = Config()
    config.set_main_option("script_location", str(scripts()))
    with empty.connect() as connection:
        config.attributes["connection"] = connection
        command.check(config)
        assert connection.execute(text(f"SELECT count(*) FROM {VERSION_TABLE}")).scalar_one() == 1  # noqa: S608
