"""`move-storage` copies stored outputs to another storage, updates their rows and removes the old files."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, delete, insert, select, update

import worker
from tests.crashes import DIES_AFTER, EXIT_CODE
from tests.moving import (
    assert_all_at,
    body_of,
    files_below,
    objects_in,
    plant_outputs,
    remove_file,
    write_files,
)
from tests.rows import NOW, read_output
from tests.s3_servers import S3Server, give_second_name
from worker.errors import OutputMissing, StorageTrouble
from worker.operations import move_storage as module
from worker.operations.move_storage import MoveReport, move_storage, plan_move
from worker.operations.prune import Retention, prune
from worker.operations.verify import verify
from worker.settings import Settings, load
from worker.storage import local
from worker.storage.local import FileStorage, path_of
from worker.storage.s3 import S3Storage
from worker.storage.select import storage_for, storage_of
from worker.store.engine import transact
from worker.store.events import create_events
from worker.store.moved_files import Move, output_places, record_moves
from worker.store.outputs import requeue_output
from worker.store.schema import events, jobs, moved_files, outputs

COUNT = 300
LONG_COUNT = 10_000
PROGRAM = str(Path(sys.executable).with_name("fetch-worker"))


@pytest.fixture
def database(configured_sqlite: Engine) -> Engine:
    """An SQLite database, set as DATABASE_URL."""
    return configured_sqlite


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket. The environment variables for its server are set."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3.bucket()


UseStorage = Callable[[str], Settings]


def _plant(engine: Engine, folder: Path, count: int) -> None:
    write_files(folder, plant_outputs(engine, f"file://{folder}", count))


def _move(engine: Engine, settings: Settings, **options: Any) -> MoveReport:
    return move_storage(engine, settings, **({"threads": 4} | options))


def _rows(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(select(outputs).order_by(outputs.c.id)))


def _problems(report: MoveReport) -> dict[str, int]:
    return {problem: group.count for problem, group in report.problems.items()}


def _old_files(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.execute(select(moved_files.c.location).order_by(moved_files.c.id)).scalars())


# ── from storage to storage ───────────────────────────────────────────────────────────────────────────────────────────


def test_given_files_in_a_folder_when_moved_to_another_folder_then_rows_and_files_are_there(
    engine: Engine, tmp_path: Path, use_storage: UseStorage
) -> None:
    """On each database. Nothing is left in the old folder but its folder for partial files."""
    _plant(engine, tmp_path / "old", 20)
    settings = use_storage(f"file:{tmp_path}/new")

    report = _move(engine, settings)

    assert (report.moved, report.removed, report.problems) == (20, 20, {})
    assert report.bytes == sum(row.size_bytes for row in _rows(engine))
    assert_all_at(engine, settings, f"file://{tmp_path}/new", files_below(tmp_path / "new"), 20)
    assert list((tmp_path / "old").iterdir()) == [tmp_path / "old" / local.PARTIAL]
    assert _move(engine, settings).moved == 0


@pytest.mark.server
def test_given_files_when_moved_to_a_bucket_and_back_then_nothing_is_lost_or_left(
    database: Engine, tmp_path: Path, s3: S3Server, bucket: str, use_storage: UseStorage
) -> None:
    """The prefix has characters that are quoted in file: URLs. The type of an object is that of its output."""
    _plant(database, tmp_path / "old", 20)

    in_bucket = use_storage(f"s3://{bucket}/prä fix")
    assert _move(database, in_bucket).problems == {}

    assert_all_at(database, in_bucket, f"s3://{bucket}/prä fix", objects_in(s3, bucket), 20)
    assert files_below(tmp_path / "old") == set()
    key = next(iter(objects_in(s3, bucket))).removeprefix(f"s3://{bucket}/")
    assert s3.client.head_object(Bucket=bucket, Key=key)["ContentType"] == "image/png"
    report = verify(database, in_bucket)
    assert (report.whole, report.wrong, report.orphans, report.kept) == (20, [], [], [])

    in_folder = use_storage(f"file:{tmp_path}/new")
    assert _move(database, in_folder).removed == 20

    assert_all_at(database, in_folder, f"file://{tmp_path}/new", files_below(tmp_path / "new"), 20)
    assert objects_in(s3, bucket) == set()


@pytest.mark.server
def test_given_objects_when_moved_to_another_bucket_or_prefix_then_the_old_ones_are_removed(
    database: Engine, tmp_path: Path, s3: S3Server, bucket: str, use_storage: UseStorage
) -> None:
    _plant(database, tmp_path / "old", 5)
    _move(database, use_storage(f"s3://{bucket}"))
    _move(database, use_storage(f"s3://{bucket}/below"))
    assert_all_at(database, load(), f"s3://{bucket}/below", objects_in(s3, bucket), 5)
    other = s3.bucket()

    assert _move(database, use_storage(f"s3://{other}/below")).removed == 5

    assert_all_at(database, load(), f"s3://{other}/below", objects_in(s3, other), 5)
    assert objects_in(s3, bucket) == set()


def test_given_a_folder_inside_the_old_one_when_moved_then_only_the_outputs_in_their_place_stay(
    database: Engine, tmp_path: Path, use_storage: UseStorage
) -> None:
    """The old location then begins like the new ones, or the other way round."""
    _plant(database, tmp_path / "old", 3)
    _move(database, use_storage(f"file:{tmp_path}/old/below"))
    assert_all_at(database, load(), f"file://{tmp_path}/old/below", files_below(tmp_path / "old"), 3)

    assert _move(database, use_storage(f"file:{tmp_path}/old")).moved == 3

    assert_all_at(database, load(), f"file://{tmp_path}/old", files_below(tmp_path / "old"), 3)


def test_given_keep_when_moved_then_the_old_files_stay(
    database: Engine, tmp_path: Path, use_storage: UseStorage
) -> None:
    _plant(database, tmp_path / "old", 3)
    settings = use_storage(f"file:{tmp_path}/new")

    report = _move(database, settings, keep_old=True)

    assert (report.moved, report.removed) == (3, 0)
    assert len(files_below(tmp_path / "old")) == 3
    assert_all_at(database, settings, f"file://{tmp_path}/new", files_below(tmp_path / "new"), 3)


def test_only_stored_outputs_are_moved(database: Engine, tmp_path: Path, use_storage: UseStorage) -> None:
    """A pruned output keeps its location, because the next prune removes its file there."""
    _plant(database, tmp_path / "old", 3)
    with database.begin() as connection:
        connection.execute(update(outputs).where(outputs.c.id == 2).values(status="failed", error_code="pruned"))

    assert _move(database, use_storage(f"file:{tmp_path}/new")).moved == 2

    assert read_output(database, 2).location.startswith(f"file://{tmp_path}/old/")
    assert len(files_below(tmp_path / "old")) == 1


def test_the_plan_counts_outputs_by_old_place_and_changes_nothing(
    database: Engine, tmp_path: Path, use_storage: UseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page by page."""
    monkeypatch.setattr(module, "PAGE", 2)
    plant_outputs(database, f"file://{tmp_path}/old", 4)
    plant_outputs(database, "s3://bucket/out", 3)
    plant_outputs(database, f"file://{tmp_path}/new", 2)
    rows = _rows(database)

    plan = plan_move(database, use_storage(f"file:{tmp_path}/new"))

    assert plan.target == f"file://{tmp_path}/new/"
    assert plan.sources == {f"file://{tmp_path}/old/": 4, "s3://bucket/out/": 3}
    assert (plan.outputs, plan.bytes) == (7, sum(row.size_bytes for row in rows[:7]))
    assert _rows(database) == rows
    assert not (tmp_path / "new").exists()


# ── what cannot be moved ──────────────────────────────────────────────────────────────────────────────────────────────


def test_missing_damaged_and_foreign_files_are_reported_and_the_others_are_moved(
    database: Engine, tmp_path: Path, use_storage: UseStorage
) -> None:
    """Each kind with its number and one example. These rows and files do not change."""
    _plant(database, tmp_path / "old", 7)
    rows = _rows(database)
    remove_file(rows[0].location)
    remove_file(rows[1].location)
    path_of(rows[2].location).write_bytes(body_of(3)[:-1] + b"!")
    path_of(rows[3].location).write_bytes(body_of(4) * 9)
    with database.begin() as connection:
        connection.execute(update(outputs).where(outputs.c.id == 5).values(location="file:///etc/hostname"))

    report = _move(database, use_storage(f"file:{tmp_path}/new"))

    assert report.moved == 2
    assert _problems(report) == {"missing": 2, "damaged": 2, "name": 1}
    assert report.problems["missing"].example == f"output 1: {rows[0].location} is missing: is its disk mounted?"
    assert [row.location for row in _rows(database)[:4]] == [row.location for row in rows[:4]]
    assert len(files_below(tmp_path / "new")) == 2
    assert path_of(rows[3].location).exists()


def test_an_unreadable_file_is_reported_and_stays(database: Engine, tmp_path: Path, use_storage: UseStorage) -> None:
    """A directory with the name of the file stands for a bad sector: it can be opened by nobody, not even root."""
    _plant(database, tmp_path / "old", 2)
    row = _rows(database)[0]
    remove_file(row.location)
    path_of(row.location).mkdir()

    report = _move(database, use_storage(f"file:{tmp_path}/new"))

    assert (report.moved, _problems(report)) == (1, {"storage": 1})
    assert "can't read" in report.problems["storage"].example


def test_given_a_storage_that_refuses_every_file_then_the_run_ends_early(
    database: Engine, tmp_path: Path, use_storage: UseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TROUBLES_MOST", 10)
    monkeypatch.setattr(module, "RECORD_MOST", 1)
    _plant(database, tmp_path / "old", 100)
    settings = use_storage(f"file:{tmp_path}/new")

    def refuse(*_: Any, **__: Any) -> str:
        raise StorageTrouble("can't write: No space left on device")

    monkeypatch.setattr(FileStorage, "keep", refuse)
    report = _move(database, settings)

    assert (report.moved, report.stopped) == (0, True)
    assert 10 <= _problems(report)["storage"] < 100
    assert files_below(tmp_path / "new") == set()


def test_given_an_old_file_that_can_not_be_removed_then_it_is_reported_until_a_run_removes_it(
    database: Engine, tmp_path: Path, use_storage: UseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plant(database, tmp_path / "old", 2)
    settings = use_storage(f"file:{tmp_path}/new")
    with monkeypatch.context() as patched:
        patched.setattr(FileStorage, "remove", lambda _, places: dict.fromkeys(places, "can't remove it"))
        report = _move(database, settings)

    assert (report.moved, report.removed, _problems(report)) == (2, 0, {"old file": 2})
    assert plan_move(database, settings).old_files == 2
    report = _move(database, settings)
    assert (report.moved, report.removed, report.problems) == (0, 2, {})
    assert_all_at(database, settings, f"file://{tmp_path}/new", files_below(tmp_path / "new"), 2)
    assert files_below(tmp_path / "old") == set()


def test_given_a_link_to_the_old_folder_when_moved_there_then_the_only_file_is_not_removed(
    database: Engine, tmp_path: Path, use_storage: UseStorage
) -> None:
    """A symbolic link, or another mount of the disk, gives one file two names."""
    _plant(database, tmp_path / "old", 3)
    (tmp_path / "link").symlink_to(tmp_path / "old")
    settings = use_storage(f"file:{tmp_path}/link")

    report = _move(database, settings)

    assert (report.moved, report.removed, report.problems) == (3, 0, {})
    assert _old_files(database) == []
    report_after = verify(database, settings)
    assert (report_after.whole, report_after.wrong) == (3, [])


@pytest.mark.server
def test_given_a_second_name_of_the_old_bucket_when_moved_there_then_no_object_is_removed(
    database: Engine, tmp_path: Path, s3: S3Server, bucket: str, use_storage: UseStorage
) -> None:
    _plant(database, tmp_path / "old", 3)
    _move(database, use_storage(f"s3://{bucket}/out"))
    settings = use_storage("s3://second-name/out")
    storage = storage_for(settings)
    assert isinstance(storage, S3Storage)
    give_second_name(storage.client.boto3_client(), bucket, "second-name")

    report = _move(database, settings)

    assert (report.moved, report.removed, report.problems) == (3, 0, {})
    assert len(objects_in(s3, bucket)) == 3
    assert verify(database, settings).whole == 3


# ── crashes ───────────────────────────────────────────────────────────────────────────────────────────────────────────

DIES = f"""{DIES_AFTER}
from worker.operations import move_storage
from worker.settings import load
from worker.storage import local
from worker.store.engine import engine_for

move_storage.RECORD_MOST = 4
{{crash}}
move_storage.move_storage(engine_for(load().database), load(), threads=1)
"""
POINTS = {  # the statement that plants the crash, and the number of rows that are moved before it
    "in the middle of a copy": ("after(move_storage, '_read', 7)", 0),
    "between two copies": ("after(local.FileStorage, 'keep', 3)", 0),
    "before the rows are committed": ("after(move_storage, 'record_moves')", 0),
    "between the rows and the first old file": ("move_storage.FileRemover.remove = die", 4),
    "between two old files": ("after(local.Path, 'unlink', 3)", 4),
    "between the old files and their rows": ("after(move_storage.FileRemover, 'remove')", 4),
    "before the end of the old files is committed": ("after(move_storage, 'forget_old_files')", 4),
}


@pytest.mark.parametrize("point", POINTS)
def test_given_a_crash_when_run_again_then_every_file_and_row_is_there_once(
    point: str, database: Engine, tmp_path: Path, use_storage: UseStorage
) -> None:
    """At each step. After the crash, each output can be read."""
    crash, moved = POINTS[point]
    _plant(database, tmp_path / "old", 12)
    settings = use_storage(f"file:{tmp_path}/new")

    died = subprocess.run([sys.executable, "-c", DIES.format(crash=crash)], capture_output=True, text=True, check=False)

    assert died.returncode == EXIT_CODE, died.stderr
    rows = _rows(database)
    assert sum(row.location.startswith(f"file://{tmp_path}/new/") for row in rows) == moved
    for row in rows:
        with worker.open_output(row.id) as file:
            assert len(file.read()) == row.size_bytes
    report = _move(database, settings)
    assert (report.moved, report.problems) == (12 - moved, {})
    assert_all_at(database, settings, f"file://{tmp_path}/new", files_below(tmp_path / "new"), 12)
    assert files_below(tmp_path / "old") == set()


def test_given_lost_transactions_when_run_again_then_the_copies_are_found(
    database: Engine, tmp_path: Path, use_storage: UseStorage
) -> None:
    """After a power failure, SQLite may lack the last transactions, though the old files were removed after them."""
    _plant(database, tmp_path / "old", 3)
    before = _rows(database)
    settings = use_storage(f"file:{tmp_path}/new")
    _move(database, settings)
    with database.begin() as connection:
        for row in before:
            connection.execute(update(outputs).where(outputs.c.id == row.id).values(location=row.location))

    report = _move(database, settings)

    assert (report.moved, report.problems) == (3, {})
    assert_all_at(database, settings, f"file://{tmp_path}/new", files_below(tmp_path / "new"), 3)


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        ({"status": "pending", "location": None, "due_at": NOW}, "output 1 is pending"),
        ({"size_bytes": 1}, "is damaged"),
    ],
)
def test_given_an_old_file_of_an_earlier_run_when_its_new_copy_is_not_whole_then_it_stays(
    change: dict[str, Any], stays: str, database: Engine, tmp_path: Path, use_storage: UseStorage
) -> None:
    """It may be the only file of the output."""
    _plant(database, tmp_path / "old", 1)
    old = _rows(database)[0].location
    settings = use_storage(f"file:{tmp_path}/new")
    _move(database, settings, keep_old=True)
    with database.begin() as connection:
        connection.execute(insert(moved_files).values(output_id=1, job_id=1, location=old))
        connection.execute(update(outputs).values(change))

    report = _move(database, settings)

    assert stays in report.problems["old file"].example
    assert path_of(old).exists()
    assert _old_files(database) == [old]


def test_given_an_old_file_of_an_earlier_run_when_its_job_was_pruned_then_it_is_removed(
    database: Engine, tmp_path: Path, use_storage: UseStorage
) -> None:
    _plant(database, tmp_path / "old", 1)
    old = _rows(database)[0].location
    settings = use_storage(f"file:{tmp_path}/new")
    _move(database, settings, keep_old=True)
    with database.begin() as connection:
        connection.execute(insert(moved_files).values(output_id=1, job_id=1, location=old))
        connection.execute(delete(jobs))

    assert _move(database, settings).removed == 1

    assert not path_of(old).exists()
    assert _old_files(database) == []


def test_given_an_old_file_of_an_earlier_run_when_the_outputs_are_moved_back_then_no_file_is_lost(
    database: Engine, tmp_path: Path, use_storage: UseStorage
) -> None:
    """The old file is at the new place. It is removed first, and then written again."""
    _plant(database, tmp_path / "old", 2)
    olds = [row.location for row in _rows(database)]
    _move(database, use_storage(f"file:{tmp_path}/new"), keep_old=True)
    with database.begin() as connection:
        connection.execute(insert(moved_files).values(output_id=1, job_id=1, location=olds[0]))

    report = _move(database, use_storage(f"file:{tmp_path}/old"))

    assert (report.moved, report.problems) == (2, {})
    assert_all_at(database, load(), f"file://{tmp_path}/old", files_below(tmp_path / "old"), 2)


# ── beside other work ─────────────────────────────────────────────────────────────────────────────────────────────────


def _before_the_rows_change(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call `act` after the first files are copied, before their rows are updated."""
    acts = [act]

    def act_first(engine: Engine, work: Callable[[Connection], set[int]]) -> set[int]:
        if acts:
            acts.pop()()
        return transact(engine, work)

    monkeypatch.setattr(module, "transact", act_first)


def test_given_an_output_that_is_pruned_during_its_copy_then_no_file_is_left(
    database: Engine, tmp_path: Path, use_storage: UseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plant(database, tmp_path / "old", 2)
    settings = use_storage(f"file:{tmp_path}/new")

    old = _rows(database)[0].location

    def prune_first() -> None:
        with database.begin() as connection:
            connection.execute(delete(jobs).where(jobs.c.id == 1))
        remove_file(old)

    _before_the_rows_change(monkeypatch, prune_first)
    report = _move(database, settings)

    assert (report.moved, report.problems) == (1, {})
    assert_all_at(database, settings, f"file://{tmp_path}/new", files_below(tmp_path / "new"), 1)
    assert files_below(tmp_path / "old") == set()


def test_given_an_output_that_is_queued_again_during_its_copy_then_its_row_does_not_change(
    database: Engine, tmp_path: Path, use_storage: UseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify` does this. The download finds the copy."""
    _plant(database, tmp_path / "old", 1)
    row = _rows(database)[0]

    def requeue() -> None:
        with database.begin() as connection:
            assert requeue_output(connection, row.id, location=row.location, now=NOW)

    _before_the_rows_change(monkeypatch, requeue)
    report = _move(database, use_storage(f"file:{tmp_path}/new"))

    assert (report.moved, report.problems) == (0, {})
    assert (read_output(database, row.id).status, read_output(database, row.id).location) == ("pending", None)
    assert path_of(row.location).exists()
    assert len(files_below(tmp_path / "new")) == 1


def test_an_output_that_is_pruned_with_its_file_before_its_copy_is_no_problem(
    database: Engine, tmp_path: Path, use_storage: UseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plant(database, tmp_path / "old", 2)
    remove_file(_rows(database)[0].location)

    def prune_first(connection: Connection, output_ids: Any) -> Any:
        connection.execute(delete(jobs).where(jobs.c.id == 1))
        return output_places(connection, output_ids)

    monkeypatch.setattr(module, "output_places", prune_first)

    report = _move(database, use_storage(f"file:{tmp_path}/new"))

    assert (report.moved, report.problems) == (1, {})


def test_two_runs_at_the_same_time_do_no_harm(database: Engine, tmp_path: Path, use_storage: UseStorage) -> None:
    _plant(database, tmp_path / "old", 200)
    settings = use_storage(f"file:{tmp_path}/new")
    reports: list[MoveReport] = []
    runs = [threading.Thread(target=lambda: reports.append(_move(database, settings))) for _ in range(2)]

    for run in runs:
        run.start()
    for run in runs:
        run.join()

    assert sum(report.moved for report in reports) == 200
    assert _move(database, settings).problems == {}
    assert_all_at(database, settings, f"file://{tmp_path}/new", files_below(tmp_path / "new"), 200)
    assert files_below(tmp_path / "old") == set()


def test_a_webhook_that_is_not_delivered_yet_gets_the_new_location(
    database: Engine, tmp_path: Path, use_storage: UseStorage
) -> None:
    """A delivered one is not changed."""
    _plant(database, tmp_path / "old", 2)
    old = [row.location for row in _rows(database)]
    with database.begin() as connection:
        connection.execute(update(jobs).values(webhook_url="https://shop.test/hook"))
        create_events(connection, now=NOW, of=[1, 2])
        delivered = {"status": "delivered", "due_at": None, "ended_at": NOW}
        connection.execute(update(events).where(events.c.job_id == 2).values(delivered))

    _move(database, use_storage(f"file:{tmp_path}/new"))

    new = [row.location for row in _rows(database)]
    with database.connect() as connection:
        bodies = [
            json.loads(body) for body in connection.execute(select(events.c.body).order_by(events.c.job_id)).scalars()
        ]
    assert [body["data"]["outputs"][0]["location"] for body in bodies] == [new[0], old[1]]


def test_apps_and_prune_find_moved_outputs(database: Engine, tmp_path: Path, use_storage: UseStorage) -> None:
    _plant(database, tmp_path / "old", 2)
    settings = use_storage(f"file:{tmp_path}/new")
    _move(database, settings)

    with worker.open_output(1) as file:
        assert file.read() == body_of(1)
    assert worker.output_url(1) == read_output(database, 1).location
    pruned = prune(
        database,
        settings,
        Retention(older_than=NOW - NOW, states=("completed",), remove_files=True),
        sleep=lambda _: None,
    )
    assert (pruned.jobs, pruned.files, pruned.kept) == (2, 2, 0)
    assert files_below(tmp_path / "new") == set()


def test_an_output_that_is_moved_while_an_app_opens_it_is_opened_at_its_new_location(
    database: Engine, tmp_path: Path, use_storage: UseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may be removed between the look at the row and the look at the file."""
    _plant(database, tmp_path / "old", 1)
    settings = use_storage(f"file:{tmp_path}/new")
    moves = [partial(_move, database, settings)]

    def move_first(*arguments: Any) -> Any:
        while moves:
            moves.pop()()
        return storage_of(*arguments)

    monkeypatch.setattr("worker.client.jobs.storage_of", move_first)

    with worker.open_output(1) as file:
        assert file.read() == body_of(1)
    remove_file(read_output(database, 1).location)
    with pytest.raises(OutputMissing):
        worker.open_output(1)


def test_a_row_is_only_updated_while_it_has_its_old_location(engine: Engine, tmp_path: Path) -> None:
    """On each database."""
    plant_outputs(engine, f"file://{tmp_path}/old", 3)
    rows = _rows(engine)
    moves = [Move(row.id, row.job_id, row.location, f"{row.location}.new") for row in rows]
    with engine.begin() as connection:
        connection.execute(update(outputs).where(outputs.c.id == rows[1].id).values(location="file:///elsewhere"))
        connection.execute(
            update(outputs).where(outputs.c.id == rows[2].id).values(status="failed", error_code="pruned")
        )

        assert record_moves(connection, moves, keep_old=False) == {rows[0].id}

    after = _rows(engine)
    assert [row.location for row in after] == [f"{rows[0].location}.new", "file:///elsewhere", rows[2].location]
    assert _old_files(engine) == [rows[0].location]
