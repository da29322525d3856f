"""Migrations: upgrade, downgrade and upgrade again, in an empty database and beside an app with its own history."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import CheckConstraint, Engine, UniqueConstraint, insert, inspect, select, text

from tests.rows import add_downloading, add_job, add_output, job_values
from worker.errors import SchemaOutdated, Unavailable
from worker.store import migrate as migrate_module
from worker.store.engine import SCHEMA_VERSION, check_schema, missing_tables, schema_version
from worker.store.migrate import migrate, scripts
from worker.store.schema import VERSION_TABLE, jobs, metadata, outputs

ROOT = Path(__file__).parents[2]

APP_ENV = """
from alembic import context
from sqlalchemy import Column, Integer, MetaData, Table
metadata = MetaData()
Table("shop_orders", metadata, Column("id", Integer, primary_key=True), Column("total", Integer))
connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transaction_per_migration=True)
with context.begin_transaction():
    context.run_migrations()
"""
APP_REVISION = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "a5b7", None
def upgrade():
    op.create_table("shop_orders", sa.Column("id", sa.Integer, primary_key=True), sa.Column("total", sa.Integer))
    op.create_index("ix_shop_total", "shop_orders", ["total"])
def downgrade():
    op.drop_table("shop_orders")
"""


@pytest.fixture
def app_scripts(tmp_path: Path) -> Path:
    """Return the migrations of a web app, with one revision."""
    folder = tmp_path / "app_migrations"
    (folder / "versions").mkdir(parents=True)
    (folder / "env.py").write_text(APP_ENV)
    (folder / "versions" / "a5b7_orders.py").write_text(APP_REVISION)
    return folder


def _run(engine: Engine, folder: Path, verb: str, *arguments: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(folder))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        getattr(command, verb)(config, *arguments)
        connection.commit()


def _tables(engine: Engine) -> set[str]:
    return {name for name in inspect(engine).get_table_names() if not name.startswith("sqlite_")}


OURS = {*metadata.tables, VERSION_TABLE}


def test_upgrade_downgrade_and_upgrade_again(empty: Engine) -> None:
    """After the downgrade, only the empty version table is left."""
    assert migrate(empty) == (None, SCHEMA_VERSION)
    assert _tables(empty) == OURS
    assert migrate(empty) == (SCHEMA_VERSION, SCHEMA_VERSION)

    _run(empty, scripts(), "downgrade", "base")
    assert _tables(empty) == {VERSION_TABLE}
    with empty.connect() as connection:
        assert schema_version(connection) is None
    with pytest.raises(SchemaOutdated, match="fetch-worker migrate"):
        check_schema(empty)

    assert migrate(empty) == (None, SCHEMA_VERSION)
    check_schema(empty)


def test_the_migrations_create_exactly_the_tables_of_the_code(empty: Engine) -> None:
    """`alembic check` finds no difference in columns, types, indexes and keys."""
    migrate(empty)
    _run(empty, scripts(), "check")


def test_the_migrations_create_every_constraint_with_its_name(empty: Engine) -> None:
    """`alembic check` does not compare CHECK constraints."""
    migrate(empty)
    inspector = inspect(empty)
    for table in metadata.sorted_tables:
        checks = {str(item.name) for item in table.constraints if isinstance(item, CheckConstraint)}
        assert {item["name"] for item in inspector.get_check_constraints(table.name)} == checks
        unique = {str(item.name) for item in table.constraints if isinstance(item, UniqueConstraint)}
        assert {item["name"] for item in inspector.get_unique_constraints(table.name)} == unique
        if empty.dialect.name == "postgresql":  # the other databases don't return the names of all primary keys
            assert inspector.get_pk_constraint(table.name)["name"] == f"pk_{table.name}"


def test_check_finds_a_difference(empty: Engine) -> None:
    """Otherwise the two tests above would prove nothing."""
    migrate(empty)
    with empty.begin() as connection:
        connection.execute(text("ALTER TABLE fetch_jobs ADD COLUMN stray INTEGER"))
    with pytest.raises(CommandError):
        _run(empty, scripts(), "check")


def test_an_apps_tables_and_history_are_not_changed(empty: Engine, app_scripts: Path) -> None:
    """In the same database and in any order, each side changes only its own tables."""
    _run(empty, app_scripts, "upgrade", "head")
    with empty.begin() as connection:
        connection.execute(text("INSERT INTO shop_orders (id, total) VALUES (1, 99)"))
    migrate(empty)
    _run(empty, scripts(), "check")
    assert _tables(empty) == OURS | {"shop_orders", "alembic_version"}

    _run(empty, scripts(), "downgrade", "base")
    with empty.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == ["a5b7"]
        assert connection.execute(text("SELECT total FROM shop_orders")).scalars().all() == [99]
    assert {index["name"] for index in inspect(empty).get_indexes("shop_orders")} == {"ix_shop_total"}

    migrate(empty)
    with empty.begin() as connection:
        connection.execute(insert(jobs).values(job_values()))
    _run(empty, app_scripts, "downgrade", "base")
    _run(empty, app_scripts, "upgrade", "head")
    _run(empty, app_scripts, "current")
    with empty.connect() as connection:
        assert schema_version(connection) == SCHEMA_VERSION
        assert connection.execute(select(jobs.c.remote_id)).scalars().all() == ["1"]
    _run(empty, scripts(), "check")


DROPPED = [
    ["fetch_outputs", "fetch_output_bodies"],
    ["fetch_actions"],
    ["fetch_processes", "fetch_late_looks"],
    ["fetch_totals"],
    sorted(metadata.tables),
]


@pytest.mark.parametrize("dropped", DROPPED, ids=lambda names: names[0] if len(names) < 3 else "all")
def test_given_dropped_tables_when_migrate_runs_then_they_are_back_and_the_others_unchanged(
    empty: Engine, dropped: list[str]
) -> None:
    """An app's autogenerate may have dropped them, while the version table says that all is there."""
    migrate(empty)
    with empty.begin() as connection:
        connection.execute(insert(jobs).values(job_values()))
        for table in reversed(metadata.sorted_tables):
            if table.name in dropped:
                connection.execute(text(f"DROP TABLE {table.name}"))
    with empty.connect() as connection:
        assert missing_tables(connection) == sorted(dropped)

    assert migrate(empty) == (SCHEMA_VERSION, SCHEMA_VERSION)

    assert _tables(empty) == OURS
    _run(empty, scripts(), "check")
    with empty.connect() as connection:
        assert missing_tables(connection) == []
        left = connection.execute(select(jobs.c.remote_id)).scalars().all()
    assert left == ([] if "fetch_jobs" in dropped else ["1"])


def test_given_a_dropped_table_of_jobs_then_new_jobs_do_not_get_the_outputs_of_old_ones(empty: Engine) -> None:
    """Their rows are still there. The references between the tables are put back, too."""
    migrate(empty)
    with empty.begin() as connection:
        job_id = add_downloading(connection)
        add_output(connection, job_id, 0)
    drop = {
        "postgresql": ["DROP TABLE fetch_jobs CASCADE"],
        "sqlite": ["PRAGMA foreign_keys=OFF", "DROP TABLE fetch_jobs"],
    }.get(empty.dialect.name, ["SET foreign_key_checks=0", "DROP TABLE fetch_jobs"])
    raw = empty.raw_connection()
    for statement in drop:
        raw.cursor().execute(statement)
    raw.commit()
    raw.invalidate()

    migrate(empty)

    with empty.begin() as connection:
        new_id = add_job(connection, "2")
        with_outputs = set(connection.execute(select(outputs.c.job_id)).scalars())
    assert with_outputs == {job_id}
    assert new_id > job_id
    _run(empty, scripts(), "check")


def test_tables_of_a_newer_version_raise_an_error_and_are_not_changed(empty: Engine) -> None:
    """After a rollback of the code, the database may be newer."""
    migrate(empty)
    with empty.begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))  # noqa: S608  # a constant
    with pytest.raises(SchemaOutdated, match="9999"):
        migrate(empty)
    assert _tables(empty) == OURS


def test_two_concurrent_migrations_create_the_tables_once(empty: Engine) -> None:
    """One works, the other waits and finds the tables."""
    with ThreadPoolExecutor(1) as executor:
        theirs = subprocess.Popen(
            [sys.executable, "-c", "from worker.cli import main; main(['migrate'])"],
            cwd=ROOT,
            env=os.environ | {"DATABASE_URL": empty.url.render_as_string(hide_password=False)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        ours = executor.submit(migrate, empty)
        output, complained = theirs.communicate(timeout=60)
        assert ours.result()[1] == SCHEMA_VERSION
    assert theirs.returncode == 0, complained
    assert SCHEMA_VERSION in output
    assert _tables(empty) == OURS


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the files of a clone."""
    copy = tmp_path / "a clone"
    copy.mkdir()
    shutil.copy(ROOT / "alembic.ini", copy)
    for folder in ("migrations", "worker"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def _alembic(checkout: Path, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=checkout,
        env=os.environ | {"DATABASE_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_alembic_command_works_in_a_clone(empty: Engine, checkout: Path) -> None:
    """The commands upgrade, check and downgrade work on the database in DATABASE_URL."""
    url = empty.url.render_as_string(hide_password=False).replace("+psycopg", "")
    for arguments in (("upgrade", "head"), ("check",), ("downgrade", "base")):
        result = _alembic(checkout, url, *arguments)
        assert result.returncode == 0, result.stderr
        if arguments == ("check",):
            assert _tables(empty) == OURS
    assert _tables(empty) == {VERSION_TABLE}


def test_the_alembic_command_prints_sql_without_a_database(checkout: Path) -> None:
    """For teams whose database administrator runs the statements."""
    result = _alembic(checkout, "postgresql://nobody@127.0.0.1:1/none", "upgrade", "head", "--sql")
    assert result.returncode == 0, result.stderr
    for table in metadata.tables:
        assert f"CREATE TABLE IF NOT EXISTS {table} " in result.stdout
    assert f"CREATE TABLE {VERSION_TABLE} " in result.stdout


@pytest.mark.parametrize("empty", ["mariadb"], indirect=True)
@pytest.mark.parametrize(
    "halves",
    [
        ["DROP TABLE fetch_copies"],
        ["DROP TABLE fetch_actions"],
        ["ALTER TABLE fetch_jobs DROP COLUMN default_address"],
        [
            "ALTER TABLE fetch_jobs DROP COLUMN default_address",
            "DROP TABLE fetch_late_looks",
            "DROP TABLE fetch_promises",
        ],
    ],
    ids=["0013", "0012", "0011", "0010"],
)
def test_an_interrupted_downgrade_can_run_again(empty: Engine, halves: list[str]) -> None:
    """MariaDB commits each statement at once, so the second run finds the changes of the first."""
    migrate(empty)
    with empty.begin() as connection:
        for statement in halves:
            connection.exec_driver_sql(statement)

    _run(empty, scripts(), "downgrade", "0009")

    with empty.connect() as connection:
        assert schema_version(connection) == "0009"
    assert not {"fetch_late_looks", "fetch_promises", "fetch_unread"} & _tables(empty)


@pytest.mark.parametrize("empty", ["mariadb"], indirect=True)
def test_a_migration_that_waited_too_long_for_another_one_does_nothing(
    empty: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MariaDB returns a number for this, not an error."""
    monkeypatch.setattr(migrate_module, "_LOCK_SECONDS", 0)
    with empty.connect() as locking:
        assert locking.exec_driver_sql(f"SELECT GET_LOCK({migrate_module.MYSQL_LOCK}, 0)").scalar() == 1
        with pytest.raises(Unavailable):
            migrate(empty)
        locking.exec_driver_sql(f"SELECT RELEASE_LOCK({migrate_module.MYSQL_LOCK})")
    assert _tables(empty) == set()
