"""`doctor` on an app's Alembic history in the same database: with our filter, without it, and with unknown code."""

from pathlib import Path

import pytest
from sqlalchemy import Engine

from worker.operations.app_migrations import check_app_migrations, other_histories

ENV = "from alembic import context\ncontext.configure(connection=connection, target_metadata=metadata)\n"
IMPORT = "from worker.alembic import include_name\n"
FILTERED = f"{IMPORT}{ENV}".replace(")\n", ", include_name=include_name)\n")


@pytest.fixture
def app_history(empty: Engine) -> Engine:
    """A database with the version table of an app's own Alembic."""
    with empty.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.exec_driver_sql("CREATE TABLE picture_versions (id INTEGER, version_num VARCHAR(32))")
    return empty


def _check(engine: Engine, folder: Path) -> tuple[bool, str]:
    with engine.connect() as connection:
        check = check_app_migrations(connection, folder)
    return check.ok, check.message


def test_given_no_other_history_then_all_is_well(engine: Engine, tmp_path: Path) -> None:
    """Our own version table is not another history."""
    assert _check(engine, tmp_path) == (True, "no other Alembic history is in the database")


def test_given_another_history_then_it_is_found_by_its_table(app_history: Engine) -> None:
    with app_history.connect() as connection:
        assert other_histories(connection) == ["alembic_version"]


@pytest.mark.parametrize("file", ["migrations/env.py", "shop/db/alembic/env.py"])
def test_given_an_env_without_the_filter_then_it_is_named_with_the_line_to_write(
    app_history: Engine, tmp_path: Path, file: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(ENV)

    ok, message = _check(app_history, tmp_path)

    assert not ok
    assert str(path) in message
    assert "include_name=worker.alembic.include_name" in message


@pytest.mark.parametrize("file", ["migrations/env.py", "app.py"])
def test_given_the_filter_in_the_apps_code_then_all_is_well(app_history: Engine, tmp_path: Path, file: str) -> None:
    """In `env.py`, or where the app makes Flask-Migrate."""
    (tmp_path / "migrations").mkdir()
    (tmp_path / "migrations/env.py").write_text(ENV)
    (tmp_path / file).write_text(FILTERED)

    ok, message = _check(app_history, tmp_path)

    assert ok
    assert f"{tmp_path / file} passes the filter" in message


@pytest.mark.parametrize(
    "code",
    [
        f"{IMPORT}{ENV}",
        f"{IMPORT}{ENV}# context.configure(…, include_name=include_name)\n",
        ENV.replace(")\n", ", include_name=my_own)\n"),
        f"{FILTERED}context.configure(",
    ],
    ids=["imported", "in a comment", "another filter", "no valid code"],
)
def test_given_a_filter_that_is_not_passed_then_the_check_fails(app_history: Engine, tmp_path: Path, code: str) -> None:
    (tmp_path / "env.py").write_text(code)

    assert not _check(app_history, tmp_path)[0]


@pytest.mark.parametrize("passed", ["Migrate(app, db, include_name=ours)", "options = {'include_name': ours}"])
def test_given_a_filter_from_another_module_then_the_file_that_passes_it_is_named(
    app_history: Engine, tmp_path: Path, passed: str
) -> None:
    (tmp_path / "env.py").write_text(ENV)
    (tmp_path / "filters.py").write_text("from worker.alembic import include_name as ours\n")
    (tmp_path / "app.py").write_text(f"from filters import ours\n{passed}\n")

    ok, message = _check(app_history, tmp_path)

    assert ok
    assert f"{tmp_path / 'app.py'} passes the filter" in message


def test_given_code_that_is_elsewhere_then_the_check_says_what_to_look_at_and_does_not_fail(
    app_history: Engine, tmp_path: Path
) -> None:
    """A worker's host need not have the app's code. What is installed there is not the app."""
    installed = tmp_path / "venv/lib/site-packages/worker"
    installed.mkdir(parents=True)
    (installed / "env.py").write_text(FILTERED)

    ok, message = _check(app_history, tmp_path)

    assert ok
    assert "include_name=worker.alembic.include_name" in message
