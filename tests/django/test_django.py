"""`worker.django` in a real Django project, on each database: transactions, migrations, admin, signal, test runner."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import URL

REPOSITORY = Path(__file__).parents[2]
ENGINES = {"sqlite": "sqlite3", "postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql"}

Run = Callable[..., Any]


def django_settings(url: URL) -> dict[str, Any]:
    """Return Django's setting for a database."""
    host = url.host or url.query.get("host") or ""
    values: dict[str, Any] = {"ENGINE": f"django.db.backends.{ENGINES[url.get_backend_name()]}", "NAME": url.database}
    values |= {"USER": url.username or "", "PASSWORD": url.password or "", "HOST": host, "PORT": str(url.port or "")}
    return values if url.get_backend_name() != "sqlite" else {"ENGINE": values["ENGINE"], "NAME": values["NAME"]}


def run_project(*arguments: str, database: dict[str, Any], **variables: str) -> str:
    """Run a module in a process of its own, and return what it printed."""
    databases = database if "default" in database else {"default": database}
    environment = {**os.environ, "PROJECT_DATABASES": json.dumps(databases), **variables}
    environment.pop("DATABASE_URL", None) if "DATABASE_URL" not in variables else None
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=environment | {"FETCH_WORKER_DOTENV": "off", "REDIS_URL": "redis+socket:///nowhere/redis.sock"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture
def run(empty: Engine) -> Run:
    """Run a scenario of the project on an empty database, and return what it printed."""

    def run(scenario: str, **variables: str) -> Any:
        text = run_project("-m", "tests.django.project", scenario, database=django_settings(empty.url), **variables)
        return json.loads(text.splitlines()[-1])

    return run


@pytest.mark.parametrize("use_tz", ["1", "0"])
def test_a_job_is_committed_or_rolled_back_with_atomic_blocks(run: Run, use_tz: str) -> None:
    """Nested ones too. Workers are woken after the commit, and times are UTC whatever Django's time zone is."""
    assert run("transactions", PROJECT_USE_TZ=use_tz) == {
        "alone": [1],
        "inside": ["order", "2026-01-01T00:00:00+00:00", 1],
        "orm inside": ["alone", "committed", "nested"],
        "woken after the commit": [1, 3],
        "after a rollback": [3, None],
        "outputs": ["https://cdn/1.png", "pending"],
        "refused": "'../x' can't be a re",
        "left": [["9", "cancelled"], ["alone", "pending"], ["committed", "pending"], ["nested", "pending"]],
    }


def test_an_order_is_committed_or_rolled_back_with_atomic_blocks(run: Run) -> None:
    """And a remote id of another job leaves the transaction usable."""
    assert run("orders") == {
        "woken inside": [],
        "woken after the commit": [2],
        "left": [["committed", "ordered"], ["nested", "ordered"]],
        "refused": "remote id 12 belongs to another job:",
        "attached": True,
        "jobs": [["", "ordered"], ["12", "pending"], ["13", "pending"]],
    }


@pytest.mark.parametrize("empty", ["sqlite", "postgresql"], indirect=True)
def test_an_error_of_the_database_rolls_back_only_the_call(run: Run) -> None:
    """Not on MariaDB, which commits at each ALTER TABLE, as the scenario needs it."""
    assert run("broken") == {"error": "SchemaOutdated", "left": ["after", "before"]}


def test_migrate_makes_the_tables_and_makemigrations_finds_nothing_to_do(run: Run) -> None:
    seen = run("migrations")
    assert seen["jobs"] == 0
    assert {"fetch_jobs", "fetch_outputs", "fetch_worker_version"} <= set(seen["tables"])


def test_the_admin_shows_jobs_and_changes_nothing(run: Run) -> None:
    assert run("admin_pages") == {
        "status": {"list": 200, "search": 200, "job": 200, "add": 403, "delete": 403, "change": 403},
        "shows": [True, False],
        "state": "downloading",
    }


def test_a_final_job_is_a_signal(run: Run) -> None:
    seen = run("signal")
    assert seen["received"] == [["Job", seen["id"], "cancelled"]]


def test_coroutines_and_changes_leave_no_connection_of_their_threads_open(run: Run) -> None:
    """Django closes the connections of its own threads only."""
    assert run("threads") == {"aio": ["pending", "pending", "cancelled"], "wait": "cancelled", "connections": 1}


def test_given_another_database_url_then_the_jobs_are_there_and_not_in_djangos_database(
    run: Run, migrated_sqlite: Path
) -> None:
    seen = run("elsewhere", DATABASE_URL=f"sqlite:///{migrated_sqlite}")
    assert seen == {"joined": False, "database": str(migrated_sqlite)}
    assert run("system_check", DATABASE_URL=f"sqlite:///{migrated_sqlite}") == ["fetch_worker.W001"]


def test_given_djangos_own_database_url_then_it_is_joined(run: Run, empty: Engine) -> None:
    url = empty.url.render_as_string(hide_password=False)
    seen = run("elsewhere", DATABASE_URL=url)
    assert (seen["joined"], seen["database"]) == (True, empty.url.database)
    assert run("system_check", DATABASE_URL=url) == []


@pytest.mark.parametrize("empty", ["postgresql"], indirect=True)
def test_given_an_alias_then_jobs_models_and_admin_use_that_database(empty: Engine, tmp_path: Path) -> None:
    default = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "default.db")}
    databases = {"default": default, "jobs": django_settings(empty.url)}
    text = run_project("-m", "tests.django.project", "second_database", database=databases, PROJECT_ALIAS="jobs")
    seen = json.loads(text.splitlines()[-1])
    assert seen["tables"] == {"default": False, "jobs": True}
    assert seen["found"] == [1, 1]
    assert seen["status"]["list"] == seen["status"]["job"] == 200


@pytest.mark.parametrize(
    ("empty", "in_memory"),
    [("sqlite", True), ("sqlite", False), ("postgresql", False), ("mariadb", False)],
    indirect=["empty"],
)
def test_djangos_test_runner_uses_its_own_database(in_memory: bool, empty: Engine, tmp_path: Path) -> None:
    """With the tables, and without a row in the development database."""
    database = django_settings(empty.url)
    if empty.dialect.name == "sqlite" and not in_memory:
        database["TEST"] = {"NAME": str(tmp_path / "test-run.db")}
    assert "9 tests passed" in run_project("-m", "tests.django.runner", database=database)
    with empty.connect() as connection:
        assert not empty.dialect.has_table(connection, "fetch_jobs")
