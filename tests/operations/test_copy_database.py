"""`copy-database` copies all rows into another database, of any kind, exactly and once."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, delete, func, insert, select, update
from sqlalchemy.engine import make_url

from tests import servers
from tests.copied import add_process, all_rows, plant_many, plant_rows, with_claims_released
from tests.crashes import DIES_AFTER, EXIT_CODE
from tests.rows import NOW, add_job
from worker.errors import CopyRefused, SchemaOutdated
from worker.operations.copy_database import CopyReport, copy_database, count_rows
from worker.store import copying
from worker.store.audit import latest_actions
from worker.store.copying import COPIED_TABLES
from worker.store.engine import SCHEMA_VERSION, database_now, make_engine, schema_version, shown_url
from worker.store.migrate import migrate
from worker.store.processes import remove_process
from worker.store.schema import VERSION_TABLE, copies, jobs, metadata, processes, unread

NewDatabase = Callable[[str], Engine]


@pytest.fixture
def new_database(tmp_path: Path) -> Iterator[NewDatabase]:
    """Return a function that makes an empty database of a kind. Repeated calls make several."""
    with ExitStack() as stack:
        made: list[Engine] = []

        def make(kind: str) -> Engine:
            folder = tmp_path / f"{kind}{len(made)}"
            if kind == "sqlite":
                url = make_url(f"sqlite:///{folder}.db")
            elif kind == "postgresql":
                url = make_url(stack.enter_context(servers.postgres(folder))).set(drivername="postgresql+psycopg")
            else:
                url = make_url(stack.enter_context(servers.mariadb())).set(drivername="mariadb+pymysql")
            made.append(make_engine(url))
            return made[-1]

        yield make
        for engine in made:
            engine.dispose()


@pytest.fixture
def source(new_database: NewDatabase, migrated_sqlite: Path) -> Engine:
    """An SQLite database without rows."""
    engine = new_database("sqlite")
    Path(str(engine.url.database)).write_bytes(migrated_sqlite.read_bytes())
    return engine


@pytest.fixture
def target(new_database: NewDatabase) -> Engine:
    """An SQLite database without tables."""
    return new_database("sqlite")


def _copied_counts(report: CopyReport) -> dict[str, int]:
    return {table.table: table.copied for table in report.tables if table.copied}


def _finished(engine: Engine) -> bool:
    with engine.connect() as connection:
        return connection.execute(select(copies.c.finished_at)).scalar_one() is not None


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_table_is_copied_or_named_here() -> None:
    """A new table is copied, unless it describes the database itself."""
    assert {*COPIED_TABLES, processes, copies} == set(metadata.tables.values())


@pytest.mark.server
@pytest.mark.parametrize(
    "kinds", [("sqlite", "postgresql", "mariadb", "sqlite"), ("sqlite", "mariadb", "postgresql", "sqlite")]
)
def test_given_odd_values_in_every_table_when_copied_from_kind_to_kind_then_all_rows_are_equal(
    kinds: tuple[str, ...], new_database: NewDatabase
) -> None:
    """Long and odd text, bytes, floats, large integers, microseconds, NULL. Claims are released by the first copy."""
    first, *others = [new_database(kind) for kind in kinds]
    migrate(first)
    plant_rows(first)
    assert all(all_rows(first).values())

    before = first
    for engine in others:
        report = copy_database(before, engine, force=True)
        assert report.different == []
        before = engine

    expected = with_claims_released(all_rows(first), all_rows(others[0]))
    for engine in others:
        assert all_rows(engine) == expected
        with engine.connect() as connection:
            assert schema_version(connection) == SCHEMA_VERSION
            assert connection.execute(select(func.count()).select_from(processes)).scalar_one() == 0


def test_more_rows_than_a_batch_are_copied(source: Engine, target: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "BATCH_ROWS", 7)
    plant_many(source, 100)
    progress: list[int] = []

    report = copy_database(source, target, show_progress=progress.append)

    assert _copied_counts(report) == {"fetch_jobs": 100, "fetch_outputs": 100}
    assert all_rows(target) == all_rows(source)
    assert progress == sorted(progress)
    assert progress[-1] == count_rows(source) == 200


def test_the_audit_trail_of_the_copy_says_what_was_copied_once(source: Engine, target: Engine) -> None:
    plant_many(source, 3)

    copy_database(source, target)
    copy_database(source, target)

    with target.connect() as connection:
        (action,) = latest_actions(connection)
    with source.connect() as connection:
        assert latest_actions(connection) == []
    assert (action.action, action.jobs, action.job_id) == ("copy-database", 3, None)
    assert action.filter == f"DATABASE_URL={shown_url(source.url)}"


@pytest.mark.parametrize(
    ("engine", "kind"),
    [("sqlite", "postgresql"), ("postgresql", "mariadb"), ("mariadb", "sqlite")],
    indirect=["engine"],
)
def test_a_generated_id_is_never_one_that_the_source_has_used(
    engine: Engine, kind: str, new_database: NewDatabase
) -> None:
    """Files are named after ids, so this holds for deleted rows too. Tables without rows generate ids as well."""
    target = new_database(kind)
    with engine.begin() as connection:
        ids = [add_job(connection, str(number)) for number in range(3)]
        connection.execute(delete(jobs).where(jobs.c.id == ids[-1]))

    copy_database(engine, target)

    with target.begin() as connection:
        job_id = add_job(connection, "new")
        row = {"job_id": job_id, "at": NOW, "http_status": 200, "shape": "", "body": ""}
        assert job_id == ids[-1] + 1
        assert connection.execute(insert(unread).values(row).returning(unread.c.id)).scalar_one() >= 1


def test_a_row_that_the_target_refuses_is_named(source: Engine, new_database: NewDatabase) -> None:
    """PostgreSQL takes no NUL in text. The rows before it are copied; once it is corrected, a run copies the rest."""
    plant_many(source, 30)
    with source.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == 17).values(reference="a\x00b"))
    target = new_database("postgresql")

    with pytest.raises(CopyRefused, match=r"TARGET_URL refuses the row of fetch_jobs with id 17: DataError"):
        copy_database(source, target)

    with source.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == 17).values(reference="ab"))
    assert copy_database(source, target).different == []
    assert all_rows(target) == all_rows(source)


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_a_target_with_rows_then_nothing_is_copied(source: Engine, target: Engine) -> None:
    plant_many(source, 3)
    migrate(target)
    with target.begin() as connection:
        add_job(connection, "of another app")
    before = all_rows(target)

    with pytest.raises(CopyRefused, match=r"TARGET_URL has rows already \(fetch_jobs: 1\): give an empty database"):
        copy_database(source, target)

    assert all_rows(target) == before


def test_given_a_copy_of_another_database_then_nothing_is_copied(
    source: Engine, target: Engine, new_database: NewDatabase
) -> None:
    plant_many(source, 3)
    copy_database(source, target)
    other = new_database("sqlite")
    migrate(other)

    with pytest.raises(CopyRefused, match="a copy of another database"):
        copy_database(other, target)


def test_the_database_itself_is_refused(source: Engine) -> None:
    """Whatever the address."""
    plant_many(source, 1)
    again = make_engine(make_url(f"sqlite:////{source.url.database}"))

    with pytest.raises(CopyRefused, match="TARGET_URL is the database of DATABASE_URL"):
        copy_database(source, again)
    again.dispose()


def test_given_workers_that_are_alive_then_it_is_refused_until_they_are_stopped(source: Engine, target: Engine) -> None:
    """In the source or in the target. A process that was killed counts as alive for some seconds."""
    plant_many(source, 1)
    migrate(target)
    with source.connect() as connection:
        now = database_now(connection)
    add_process(source, "killed", seen_at=now - timedelta(seconds=25))
    add_process(target, "alive", seen_at=now)
    with pytest.raises(CopyRefused, match=r"of TARGET_URL: celery@alive\. Stop them first"):
        copy_database(source, target)
    with target.begin() as connection:
        remove_process(connection, "alive")
    add_process(source, "alive", seen_at=now)
    with pytest.raises(CopyRefused, match=r"of DATABASE_URL: celery@alive\. Stop them first.*--force"):
        copy_database(source, target)
    with source.begin() as connection:
        remove_process(connection, "alive")

    assert copy_database(source, target).different == []


def test_force_copies_beside_workers(source: Engine, target: Engine) -> None:
    plant_many(source, 1)
    with source.connect() as connection:
        now = database_now(connection)
    add_process(source, "alive", seen_at=now)

    assert copy_database(source, target, force=True).different == []


def test_a_source_of_another_version_is_refused(source: Engine, target: Engine) -> None:
    """An older one has to be migrated. A newer one has columns that this version would lose."""
    for version, error in (("0001", SchemaOutdated), ("9999", CopyRefused)):
        with source.begin() as connection:
            connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '{version}'")  # noqa: S608
        with pytest.raises(error):
            count_rows(source)


# ── interrupted and repeated copies ───────────────────────────────────────────────────────────────────────────────────


def test_given_a_finished_copy_when_run_again_then_nothing_is_changed(source: Engine, target: Engine) -> None:
    """The target may be in use already."""
    plant_many(source, 3)
    copy_database(source, target)
    with target.begin() as connection:
        add_job(connection, "after the move")
    before = all_rows(target)

    report = copy_database(source, target)

    assert (report.finished_before is not None, report.tables) == (True, [])
    assert all_rows(target) == before


def test_given_rows_that_are_added_during_the_copy_then_the_difference_is_reported_and_the_next_run_copies_them(
    source: Engine, target: Engine
) -> None:
    """An app may still track jobs."""
    plant_many(source, 3)

    def track_once(_: int) -> None:
        with source.begin() as connection:
            if connection.execute(select(func.count()).select_from(jobs)).scalar_one() == 3:
                add_job(connection, "new")

    report = copy_database(source, target, show_progress=track_once)

    assert [(table.table, table.source, table.target) for table in report.different] == [("fetch_jobs", 4, 3)]
    assert not _finished(target)
    with pytest.raises(CopyRefused, match="is itself an unfinished copy"):
        count_rows(target)
    assert _copied_counts(copy_database(source, target)) == {"fetch_jobs": 1}
    assert _finished(target)
    assert all_rows(target) == all_rows(source)


@pytest.mark.parametrize("changed", ["source", "target"])
def test_given_an_interrupted_copy_when_other_rows_were_removed_or_added_then_it_is_refused(
    changed: str, source: Engine, target: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_many(source, 10)
    _interrupt(source, target, monkeypatch)
    with (source if changed == "source" else target).begin() as connection:
        if changed == "source":
            connection.execute(delete(jobs).where(jobs.c.id == 2))
        else:
            add_job(connection, "by a worker")

    with pytest.raises(CopyRefused, match="rows of fetch_jobs were added or removed"):
        copy_database(source, target)


def _interrupt(source: Engine, target: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the first jobs only."""
    with monkeypatch.context() as patched:
        patched.setattr(copying, "BATCH_ROWS", 4)

        def stop(copied: int) -> None:
            if copied:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            copy_database(source, target, show_progress=stop)
    with target.connect() as connection:
        assert connection.execute(select(func.count()).select_from(jobs)).scalar_one() == 4


def test_given_another_run_into_the_same_target_then_one_of_them_is_refused(
    source: Engine, target: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the second one is faster."""
    monkeypatch.setattr(copying, "BATCH_ROWS", 4)
    plant_many(source, 10)
    reports: list[CopyReport] = []

    def copy_too(copied: int) -> None:
        if copied == 4:
            reports.append(copy_database(source, target))

    with pytest.raises(CopyRefused, match="another run copies into TARGET_URL"):
        copy_database(source, target, show_progress=copy_too)

    assert [report.different for report in reports] == [[]]
    assert all_rows(target) == all_rows(source)


DIES = f"""{DIES_AFTER}
from sqlalchemy.engine import make_url
from worker.operations import copy_database
from worker.store import copying
from worker.store.engine import make_engine

copying.BATCH_ROWS = 4
{{crash}}
copy_database.copy_database(make_engine(make_url({{source!r}})), make_engine(make_url({{target!r}})), force=True)
"""
POINTS = {
    "before the migration": "copy_database.migrate = die",
    "before the start is committed": "after(copying, 'record_start')",
    "in the first batch": "after(copying, 'record_position')",
    "in a later batch": "after(copying, 'insert_rows', 4)",
    "in a small table": "after(copying, 'delete_rows', 2)",
    "between the last row and the ids": "copy_database._continue_ids = die",
    "between the ids": "after(copying, 'set_next_id', 2)",
    "before the end is committed": "after(copying, 'record_end')",
}


@pytest.mark.parametrize(
    ("kind", "point"),
    [*(("sqlite", point) for point in POINTS), ("postgresql", "in a later batch"), ("mariadb", "between the ids")],
)
def test_given_a_crash_when_run_again_then_every_row_is_there_once(
    kind: str, point: str, source: Engine, new_database: NewDatabase
) -> None:
    plant_rows(source)
    target = new_database(kind)
    urls = {"source": str(source.url), "target": target.url.render_as_string(hide_password=False)}

    died = subprocess.run(
        [sys.executable, "-c", DIES.format(crash=POINTS[point], **urls)], capture_output=True, text=True, check=False
    )

    assert died.returncode == EXIT_CODE, died.stderr
    assert copy_database(source, target).different == []
    copy = all_rows(target)
    assert copy == with_claims_released(all_rows(source), copy)
    with target.begin() as connection:
        assert add_job(connection, "new") == len(copy["fetch_jobs"]) + 1
