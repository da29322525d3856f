"""Two versions beside each other: migrations only add, so a deploy stops nobody, and can be taken back."""

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

from tests.faults.servers import HurtRedis, assert_nothing_lost, wait_completed
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
    """The worker of that commit."""
    folder = tmp_path_factory.mktemp("first_release")
    words = ["git", "-C", str(ROOT), "archive", "--format=zip", FIRST_RELEASE, "worker", "migrations"]
    packed = subprocess.run(words, capture_output=True, check=False)
    if packed.returncode:
        missing(f"the history back to {FIRST_RELEASE[:7]}")
    with zipfile.ZipFile(io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def place(empty: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where two workers share a database and a store."""
    monkeypatch.setenv("DATABASE_URL", empty.url.render_as_string(hide_password=False).replace("+psycopg", ""))
    monkeypatch.setenv("STORAGE_URL", f"file:{tmp_path}/var/outputs")
    for name in ("first", "present"):
        (tmp_path / name).mkdir()
    return tmp_path


def _of(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, processes are of that release."""
    monkeypatch.setenv("PYTHONPATH", str(release))
    words = [sys.executable, "-c", "import worker; print(worker.__file__)"]
    said = subprocess.run(words, capture_output=True, text=True, check=True, cwd=release)
    assert Path(said.stdout.strip()).is_relative_to(release)


def _migrate_of(release: Path) -> None:
    words = [sys.executable, "-c", "from worker.cli import main; main(['migrate'])"]
    subprocess.run(words, check=True, cwd=release, capture_output=True)


def _track(broker: HurtRedis, sandbox: Sandbox, subject: str) -> None:
    with Celery(broker=broker.url, set_as_current=False) as client:
        for number in range(JOBS):
            answer = sandbox.submit(f"{subject}, {number}", samples=1)
            words: dict[str, Any] = {"fetch_url": answer["fetch_result"], "eta": answer["eta"]}
            client.send_task("worker.track", [str(answer["id"])], words, queue="fetch-worker")


def tracebacks(log: Path) -> list[str]:
    """Return the tracebacks in the log of the first release, but for deadlocks on MariaDB, which it tries again."""
    return [block for block in log.read_text().split("Traceback (most")[1:] if "(1213," not in block]


def _version(engine: Engine) -> str | None:
    with engine.connect() as connection:
        return schema_version(connection)


@pytest.mark.long
@pytest.mark.server
def test_a_worker_of_the_first_release_goes_on_with_the_tables_of_today(
    first_release: Path,
    place: Path,
    empty: Engine,
    sandbox: Sandbox,
    broker: HurtRedis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A deploy that is taken back: the tables stay as they are."""
    migrate(empty)
    _of(first_release, monkeypatch)
    with celery_worker(place / "first"):
        _track(broker, sandbox, "a lighthouse")
        log = place / "first" / "worker.log"
        wait_completed(empty, JOBS, place)
    assert_nothing_lost(empty, sandbox, place, JOBS)
    assert not tracebacks(log)


@pytest.mark.long
@pytest.mark.server
def test_a_worker_of_today_takes_up_the_tables_of_the_first_release_beside_its_worker(
    first_release: Path,
    place: Path,
    empty: Engine,
    sandbox: Sandbox,
    broker: HurtRedis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A deploy in mid-work: the new process adds what it needs, the old one goes on, each job is done once."""
    _of(first_release, monkeypatch)
    _migrate_of(first_release)
    assert _version(empty) == FIRST_SCHEMA
    with celery_worker(place / "first", "--hostname", "first@%h"):
        _track(broker, sandbox, "a lighthouse")
        _of(ROOT, monkeypatch)
        with celery_worker(place / "present", "--hostname", "present@%h"):
            assert _version(empty) == SCHEMA_VERSION
            _track(broker, sandbox, "a harbour")
            wait_completed(empty, 2 * JOBS, place)
            said = (place / "present" / "worker.log").read_text()
        assert not tracebacks(place / "first" / "worker.log")
    assert_nothing_lost(empty, sandbox, place, 2 * JOBS)
    assert "Traceback" not in said


def _as_of_the_first_release(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(scripts()))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, FIRST_SCHEMA)
        connection.commit()


def test_tables_of_an_older_version_are_expanded_and_none_are_made_where_there_are_none(empty: Engine) -> None:
    """The first tables are made by whoever runs `fetch-worker migrate`: a wrong DATABASE_URL must not get any."""
    with pytest.raises(SchemaOutdated, match="fetch-worker migrate"):
        expand(empty)
    _as_of_the_first_release(empty)
    expand(empty)
    assert _version(empty) == SCHEMA_VERSION


def test_a_worker_without_the_right_to_expand_says_what_to_do(tmp_path: Path) -> None:
    """A role that may only read and write; the tables stay as they are."""
    with postgres(tmp_path / "postgres") as url:
        owner = make_engine(make_url(url).set(drivername="postgresql+psycopg"))
        _as_of_the_first_release(owner)
        role = f"{owner.url.database}_reader"
        with owner.begin() as connection:
            connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'harmless'"))
            connection.execute(text(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}"))
        poor = make_engine(owner.url.set(username=role, password="harmless"))  # of this test's own
        try:
            with pytest.raises(SchemaOutdated, match=f"the database schema is {FIRST_SCHEMA}.*fetch-worker migrate"):
                expand(poor)
            assert _version(owner) == FIRST_SCHEMA
        finally:
            poor.dispose()
            with owner.begin() as connection:
                connection.execute(text(f"DROP OWNED BY {role}"))
                connection.execute(text(f"DROP ROLE {role}"))
            owner.dispose()


# Run by a process of its own without threads: it forks one migration after the other, and each dies a statement later.
KILLED_ANYWHERE = """
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
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ended != -signal.SIGKILL:
        print(last - 1)
        sys.exit(ended)
"""


def test_a_migration_that_was_killed_anywhere_can_be_run_again(empty: Engine) -> None:
    """By `kill -9` after each of its statements in turn: the last run finds everything there, once."""
    words = [sys.executable, "-c", KILLED_ANYWHERE, empty.url.render_as_string(hide_password=False)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20, "so few statements make no tables"
    assert _version(empty) == SCHEMA_VERSION
    config = Config()
    config.set_main_option("script_location", str(scripts()))
    with empty.connect() as connection:
        config.attributes["connection"] = connection
        command.check(config)
        assert connection.execute(text(f"SELECT count(*) FROM {VERSION_TABLE}")).scalar_one() == 1  # noqa: S608
