"""Prune removes finished jobs that are old enough with all their rows and files, and nothing else."""

import hashlib
import os
import subprocess
import sys
import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Engine, ForeignKey, MetaData, Table, func, insert, select, update

from tests.crashes import DIES_AFTER, EXIT_CODE
from tests.rows import add_job, add_output, claim_due_jobs, read_job, read_output
from tests.s3_servers import S3Server
from worker.client import tracking
from worker.core.lifecycle import AskAgain
from worker.core.pacing.policy import PollPlan
from worker.operations import prune as prune_module
from worker.operations.prune import Pruned, Retention, count_prunable, prune
from worker.operations.verify import verify
from worker.settings import Settings, load
from worker.storage import local
from worker.storage.base import name_of
from worker.store import jobs as job_store
from worker.store.counters import Tally
from worker.store.engine import database_now
from worker.store.outputs import requeue_output
from worker.store.pruning import lock_prunable, mark_pruned
from worker.store.results import Outcome, record_answers
from worker.store.schema import bodies, counters, crashes, events, jobs, outputs

DAY = timedelta(days=1)
BODY = b"picture " * 100
SHA = hashlib.sha256(BODY).hexdigest()
ENDED = {"completed": {}, "cancelled": {}, "failed": {"error_code": "api_failed"}, "expired": {"error_code": "expired"}}


@pytest.fixture
def settings(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings for the test database and an output folder that already has a `.partial` folder."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("STORAGE_URL", f"file:{tmp_path}/out")
    (tmp_path / "out" / local.PARTIAL).mkdir(parents=True)
    return load()


def _ago(engine: Engine, age: timedelta) -> datetime:
    with engine.connect() as connection:
        return database_now(connection) - age


def _finished(engine: Engine, remote_id: str, age: timedelta, status: str = "completed", **changes: Any) -> int:
    """Add a job that ended `age` ago. Return its id."""
    ended = _ago(engine, age)
    values: dict[str, Any] = {"status": status, "due_at": None, "ready_at": ended, "completed_at": ended}
    values |= {"tracked_at": ended - timedelta(minutes=1), "submitted_at": ended - timedelta(minutes=1)}
    with engine.begin() as connection:
        return add_job(connection, remote_id, **(values | ENDED[status] | changes))


def _stored(engine: Engine, root: Path, job_id: int, position: int = 0) -> int:
    """Add a stored output with its file. Return its id."""
    path = root / name_of(job_id=job_id, position=position, sha256=SHA[:16], extension="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(BODY)
    return _stored_at(engine, job_id, f"file://{path}", position)


def _stored_at(engine: Engine, job_id: int, location: str, position: int = 0) -> int:
    values = {"status": "stored", "due_at": None, "location": location, "size_bytes": len(BODY), "sha256": SHA}
    with engine.begin() as connection:
        now = database_now(connection)
        return add_output(connection, job_id, position, stored_at=now, media_type="image/png", **values)


def _job_ids(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.execute(select(jobs.c.id).order_by(jobs.c.id)).scalars())


def _count(engine: Engine, table: Any) -> int:
    with engine.connect() as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.name != local.PARTIAL)


def _retention(**changes: Any) -> Retention:
    values: dict[str, Any] = {"older_than": 30 * DAY, "states": ("completed",), "remove_files": False}
    return Retention(**(values | changes))


def _prune_now(engine: Engine, settings: Settings, retention: Retention) -> Pruned:
    return prune(engine, settings, retention, sleep=lambda _: None)


# ── which jobs are removed ────────────────────────────────────────────────────────────────────────────────────────────


def test_jobs_are_removed_by_age_and_state(engine: Engine, settings: Settings) -> None:
    """Pending and downloading jobs are never removed, whatever their age."""
    old, young = {}, {}
    for number, status in enumerate(ENDED):
        old[status] = _finished(engine, f"old{number}", 40 * DAY, status)
    for number, status in enumerate(ENDED):
        young[status] = _finished(engine, f"young{number}", 20 * DAY, status)
    long_ago = _ago(engine, 90 * DAY)
    with engine.begin() as connection:
        waits = add_job(connection, "waits", tracked_at=long_ago)
        downloads = add_job(
            connection, "downloads", tracked_at=long_ago, status="downloading", due_at=None, ready_at=long_ago
        )

    pruned = _prune_now(engine, settings, _retention(states=("completed", "failed")))

    assert (pruned.jobs, pruned.kept, pruned.stopped) == (2, 0, False)
    assert _job_ids(engine) == [old["cancelled"], old["expired"], *young.values(), waits, downloads]


def test_a_job_that_was_tracked_long_ago_and_ended_recently_stays_and_the_jobs_after_it_are_still_removed(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retried job is such a job."""
    monkeypatch.setattr(prune_module, "BATCH", 2)
    again = _finished(engine, "again", 1 * DAY, tracked_at=_ago(engine, 90 * DAY))
    for number in range(5):
        _finished(engine, f"old{number}", 40 * DAY)
    young = _finished(engine, "young", 1 * DAY)

    assert _prune_now(engine, settings, _retention()).jobs == 5
    assert _job_ids(engine) == [again, young]


def test_a_job_stays_until_its_on_done_task_and_webhook_are_sent(engine: Engine, settings: Settings) -> None:
    """An event that was given up does not keep its job."""
    now = _ago(engine, timedelta())
    _finished(engine, "told", 40 * DAY, on_done="shop.done", told_at=now)
    given_up = _finished(engine, "given up", 40 * DAY, webhook_url="https://shop.test/", announced_at=now)
    untold = _finished(engine, "untold", 40 * DAY, on_done="shop.done")
    unannounced = _finished(engine, "unannounced", 40 * DAY, webhook_url="https://shop.test/")
    undelivered = _finished(engine, "undelivered", 40 * DAY, webhook_url="https://shop.test/", announced_at=now)
    event = {"type": "job.completed", "url": "https://shop.test/", "body": "{}", "created_at": now}
    with engine.begin() as connection:
        connection.execute(
            insert(events),
            [
                event | {"event_id": "a", "job_id": given_up, "status": "failed", "due_at": None, "ended_at": now},
                event | {"event_id": "b", "job_id": undelivered, "status": "pending", "due_at": now, "ended_at": None},
            ],
        )

    assert count_prunable(engine, _retention()).jobs == 2
    assert _prune_now(engine, settings, _retention()).jobs == 2
    assert _job_ids(engine) == [untold, unannounced, undelivered]


def test_all_rows_of_a_job_are_removed_with_it_and_counters_stay(engine: Engine, settings: Settings) -> None:
    """Outputs, bodies, events and crash counts. The rows of other jobs stay."""
    now = _ago(engine, timedelta())
    for number, age in enumerate((40 * DAY, 1 * DAY)):
        job_id = _finished(engine, str(number), age, webhook_url="https://shop.test/", announced_at=now)
        with engine.begin() as connection:
            failed: dict[str, Any] = {"status": "failed", "error_code": "gone", "due_at": None}
            output_id = add_output(connection, job_id, **failed)
            connection.execute(insert(bodies).values(output_id=output_id, body=b"x"))
            for scope, row_id in (("job", job_id), ("output", output_id)):
                connection.execute(
                    insert(crashes).values(scope=scope, row_id=row_id, times=1, attempt=1, crashed_at=now)
                )
            connection.execute(
                insert(events).values(
                    event_id=str(number), job_id=job_id, type="job.completed", url="https://shop.test/", body="{}",
                    status="delivered", created_at=now, ended_at=now,
                )
            )  # fmt: skip
    with engine.begin() as connection:
        connection.execute(
            insert(counters).values(name="finished", account="", kind="", label="completed", slot=0, times=2, total=0)
        )

    pruned = _prune_now(engine, settings, _retention())

    assert (pruned.jobs, pruned.outputs) == (1, 1)
    assert [_count(engine, table) for table in (jobs, outputs, bodies, events, crashes, counters)] == [1, 1, 1, 1, 2, 1]


def test_given_a_row_of_the_app_that_refers_to_a_job_when_pruned_then_only_that_job_stays(
    engine: Engine, settings: Settings
) -> None:
    """A foreign key of the app makes the database refuse the removal."""
    done_jobs = [_finished(engine, f"old{number}", 40 * DAY) for number in range(5)]
    own = MetaData()
    pictures = Table("shop_pictures", own, Column("job_id", jobs.c.id.type, ForeignKey(jobs.c.id), primary_key=True))
    pictures.create(engine)
    try:
        with engine.begin() as connection:
            connection.execute(insert(pictures).values(job_id=done_jobs[2]))

        pruned = _prune_now(engine, settings, _retention())

        assert (pruned.jobs, pruned.kept, pruned.stopped) == (4, 1, False)
        assert f"job {done_jobs[2]}" in str(pruned.reason)
        assert _job_ids(engine) == [done_jobs[2]]
    finally:
        pictures.drop(engine)


def test_a_limit_bounds_how_many_jobs_are_removed(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest jobs are removed first. Counting removes nothing."""
    monkeypatch.setattr(prune_module, "BATCH", 2)
    monkeypatch.setattr(prune_module, "COUNT_IDS", 2)
    ids = [_finished(engine, str(number), 40 * DAY) for number in range(5)]

    assert count_prunable(engine, _retention()).jobs == 5
    assert count_prunable(engine, _retention(limit=3)).jobs == 3
    assert _job_ids(engine) == ids
    assert _prune_now(engine, settings, _retention(limit=3)).jobs == 3
    assert _job_ids(engine) == ids[3:]


def test_each_batch_is_followed_by_a_pause_as_long_as_it_took(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruning never uses more than half of the time, and it can be stopped between two batches."""
    monkeypatch.setattr(prune_module, "BATCH", 1)
    ids = [_finished(engine, str(number), 40 * DAY) for number in range(4)]
    pauses: list[float] = []

    prune(engine, settings, _retention(), sleep=pauses.append, keep_going=lambda: len(pauses) < 2)

    assert _job_ids(engine) == ids[3:]
    assert len(pauses) == 2
    assert min(pauses) >= prune_module.LEAST_PAUSE


def test_a_pruned_job_that_is_tracked_again_is_a_new_job(engine: Engine, settings: Settings) -> None:
    """It gets a new id: ids are never reused."""
    first = tracking.track("12202888")
    with engine.begin() as connection:
        long_ago = database_now(connection) - 40 * DAY
        ended = {"status": "cancelled", "due_at": None, "completed_at": long_ago, "tracked_at": long_ago}
        connection.execute(update(jobs).where(jobs.c.id == first).values(ended))
    assert tracking.track("12202888") == first

    assert _prune_now(engine, settings, _retention(states=("cancelled",))).jobs == 1

    assert tracking.track("12202888") > first


# ── concurrent work ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_locked_job_is_skipped(engine: Engine, settings: Settings, request: pytest.FixtureRequest) -> None:
    """SQLite has no row locks: it allows one writer at a time."""
    if engine.dialect.name == "sqlite":
        return
    first, second = (_finished(engine, name, 40 * DAY) for name in "ab")
    with engine.begin() as other:
        other.execute(select(jobs.c.id).where(jobs.c.id == first).with_for_update()).all()
        assert _prune_now(engine, settings, _retention()).jobs == 1
    assert _job_ids(engine) == [first]
    assert second not in _job_ids(engine)


def test_two_concurrent_prunes_remove_every_job_once(
    engine: Engine, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither waits for the jobs of the other, and each job is counted by one of them."""
    monkeypatch.setattr(prune_module, "BATCH", 5)
    for number in range(60):
        _stored(engine, tmp_path / "out", _finished(engine, str(number), 40 * DAY))
    results: list[Pruned] = []
    runs = [
        threading.Thread(target=lambda: results.append(_prune_now(engine, settings, _retention(remove_files=True))))
        for _ in range(2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()

    assert sum(result.jobs for result in results) == 60
    assert [result.kept for result in results] == [0, 0]
    assert _job_ids(engine) == []
    assert _files(tmp_path / "out") == []


def test_a_prune_during_polling_removes_no_pending_job_and_loses_no_answer(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old pending jobs are claimed and polled while finished jobs of the same days are removed."""
    monkeypatch.setattr(prune_module, "BATCH", 4)
    long_ago = _ago(engine, 60 * DAY)
    live = []
    for number in range(60):
        _finished(engine, f"over{number}", 40 * DAY)
        if number % 3 == 0:
            with engine.begin() as connection:
                live.append(add_job(connection, f"live{number}", tracked_at=long_ago, due_at=long_ago))
    over = threading.Event()
    lost: list[int] = []
    answered: list[int] = []

    def work() -> None:
        while not over.is_set():
            with engine.begin() as connection:
                now = database_now(connection)
                claimed = claim_due_jobs(connection, token=f"t{len(answered)}", now=now, limit=5)
            again = [
                Outcome(job, AskAgain(job.facts.strikes, "processing"), "processing", PollPlan(0.0)) for job in claimed
            ]
            with engine.begin() as connection:
                tally = Tally()
                lost.append(record_answers(connection, again, tally, now=database_now(connection)).lost)
                tally.write(connection)
            answered.extend(job.id for job in claimed)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        pruned = 0
        for _ in range(20):  # locked rows are left to the next prune; MariaDB also locks their neighbours
            pruned += prune(engine, settings, _retention(states=tuple(ENDED))).jobs
            if pruned == 60:
                break
    finally:
        over.set()
        worker.join()

    assert pruned == 60
    assert (_job_ids(engine), sum(lost)) == (live, 0)
    assert answered


def test_a_job_whose_files_are_being_removed_can_not_be_retried(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    """Neither by retry nor by verify: the new file would get the name of a file that is about to be removed."""
    job_id = _finished(engine, "1", 40 * DAY, "failed")
    output_id = _stored(engine, tmp_path / "out", job_id)
    location = read_output(engine, output_id).location
    with engine.begin() as connection:
        assert lock_prunable(connection, [job_id], "failed", cutoff=_ago(engine, DAY)) == [job_id]
        mark_pruned(connection, [job_id])

    with engine.begin() as connection:
        now = database_now(connection)
        assert not job_store.retry(connection, job_id, now=now)
        assert not requeue_output(connection, output_id, location=location, now=now)
    assert verify(engine, settings).orphans == []

    assert _prune_now(engine, settings, _retention(states=("failed",), remove_files=True)).files == 1
    assert _files(tmp_path / "out") == []


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_files_are_kept_by_default_and_verify_reports_them_as_kept(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    """They are not reported as orphans."""
    _stored(engine, tmp_path / "out", _finished(engine, "1", 40 * DAY))
    (tmp_path / "out" / "stray.png").write_bytes(BODY)

    pruned = _prune_now(engine, settings, _retention())

    assert (pruned.jobs, pruned.outputs, pruned.files, pruned.bytes) == (1, 1, 0, 0)
    report = verify(engine, settings)
    assert [location.rpartition("/")[2] for location in report.kept] == [f"0-{SHA[:16]}.png"]
    assert [location.rpartition("/")[2] for location in report.orphans] == ["stray.png"]


def test_files_and_empty_folders_are_removed_with_their_jobs(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    """Other files stay, with their folders."""
    out = tmp_path / "out"
    first, second = (_finished(engine, name, 40 * DAY) for name in "ab")
    young = _finished(engine, "c", 1 * DAY)
    for job_id in (first, second, young):
        _stored(engine, out, job_id)
    _stored(engine, out, first, position=1)
    note = out / str(second // 1_000) / str(second) / "note.txt"
    note.write_text("mine")
    assert count_prunable(engine, _retention(remove_files=True)) == Pruned(
        jobs=2, outputs=3, files=3, bytes=3 * len(BODY)
    )

    pruned = _prune_now(engine, settings, _retention(remove_files=True))

    assert pruned == Pruned(jobs=2, outputs=3, files=3, bytes=3 * len(BODY))
    assert [path for path in _files(out) if path.is_file()] == sorted(
        [note, out / str(young // 1_000) / str(young) / f"0-{SHA[:16]}.png"]
    )
    assert not (out / str(first // 1_000) / str(first)).exists()


def test_files_of_a_former_storage_url_are_removed_and_missing_files_are_ignored(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    """The location of an output names its file, whatever STORAGE_URL is now."""
    elsewhere = tmp_path / "before"
    (elsewhere / local.PARTIAL).mkdir(parents=True)
    _stored(engine, elsewhere, _finished(engine, "1", 40 * DAY))
    missing = _finished(engine, "2", 40 * DAY)
    _stored_at(engine, missing, f"file://{tmp_path}/out/0/{missing}/0-{SHA[:16]}.png")

    assert _prune_now(engine, settings, _retention(remove_files=True)).jobs == 2
    assert _files(elsewhere) == []


@pytest.mark.parametrize("place", ["empty", "not there"])
def test_if_the_disk_is_not_mounted_no_row_changes(
    engine: Engine, settings: Settings, tmp_path: Path, place: str
) -> None:
    """Otherwise their files would stay as orphans."""
    if place == "empty":
        (tmp_path / "mount").mkdir()
    job_id = _finished(engine, "1", 40 * DAY)
    output_id = _stored_at(engine, job_id, f"file://{tmp_path}/mount/0/{job_id}/0-{SHA[:16]}.png")
    before = read_output(engine, output_id)

    pruned = _prune_now(engine, settings, _retention(remove_files=True))

    assert (pruned.jobs, pruned.kept, pruned.stopped) == (0, 1, True)
    assert "mount it" in str(pruned.reason)
    assert read_output(engine, output_id) == before


def test_a_job_stays_if_its_file_can_not_be_removed(
    engine: Engine, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output is stored as before. The other jobs are removed, and the next prune removes this one."""
    first, second = (_finished(engine, name, 40 * DAY) for name in "ab")
    stays = _stored(engine, tmp_path / "out", first)
    _stored(engine, tmp_path / "out", second)
    before = read_output(engine, stays)
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == str(first):
            raise OSError(30, os.strerror(30))
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        pruned = _prune_now(engine, settings, _retention(remove_files=True))

    assert (pruned.jobs, pruned.files, pruned.kept, pruned.stopped) == (1, 1, 1, False)
    assert "Read-only file system" in str(pruned.reason)
    assert read_output(engine, stays) == before
    assert _prune_now(engine, settings, _retention(remove_files=True)).jobs == 1


def test_a_location_outside_the_folder_of_its_job_is_not_removed(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    """Write access to the table must not allow the removal of other files."""
    precious = tmp_path / "precious.txt"
    precious.write_text("x")
    job_id = _finished(engine, "1", 40 * DAY)
    _stored_at(engine, job_id, f"file://{precious}")
    _stored_at(engine, job_id, f"file://{tmp_path}/out/0/999999/0-{SHA[:16]}.png", position=1)
    _stored_at(engine, _finished(engine, "2", 40 * DAY), "gs://elsewhere/x", position=0)

    pruned = _prune_now(engine, settings, _retention(remove_files=True))

    assert (pruned.jobs, pruned.kept) == (0, 2)
    assert precious.exists()
    assert read_job(engine, job_id).status == "completed"


def test_objects_in_a_bucket_are_removed(
    engine: Engine, settings: Settings, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STORAGE_URL may name another storage now. A missing object is ignored; a missing bucket ends the prune."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    bucket = s3.bucket()
    for number in range(2):
        job_id = _finished(engine, str(number), 40 * DAY)
        key = "pre fix/" + name_of(job_id=job_id, position=0, sha256=SHA[:16], extension="png")
        if number:
            s3.client.put_object(Bucket=bucket, Key=key, Body=BODY)
        _stored_at(engine, job_id, f"s3://{bucket}/{key}")

    assert _prune_now(engine, settings, _retention(remove_files=True)).jobs == 2
    assert "Contents" not in s3.client.list_objects_v2(Bucket=bucket)

    job_id = _finished(engine, "lost", 40 * DAY)
    _stored_at(engine, job_id, f"s3://no-such-bucket/0/{job_id}/0-{SHA[:16]}.png")
    pruned = _prune_now(engine, settings, _retention(remove_files=True))
    assert (pruned.jobs, pruned.kept, pruned.stopped) == (0, 1, True)
    assert "NoSuchBucket" in str(pruned.reason)
    assert _job_ids(engine) == [job_id]


# ── crashes ───────────────────────────────────────────────────────────────────────────────────────────────────────────

DIES = f"""{DIES_AFTER}
from datetime import timedelta
from worker.operations import prune
from worker.storage import local
from worker.storage.base import name_of
from worker.store.engine import engine_for
from worker.settings import load
from worker.store import pruning

{{plant}}
wanted = prune.Retention(older_than=timedelta(days=30), states=("completed",), remove_files=True)
prune.prune(engine_for(load().database), load(), wanted)
"""
POINTS = {
    "before the marks are committed": ("after(pruning, 'mark_pruned')", 6),
    "between the marks and the first file": ("prune.FileRemover.remove = die", 6),
    "between two files": ("after(local.Path, 'unlink', 3)", 3),
    "between the files and their rows": ("after(prune.FileRemover, 'remove')", 0),
    "before the rows are committed": ("after(pruning, 'delete_jobs')", 0),
}


@pytest.mark.parametrize("name", POINTS)
def test_given_a_crash_between_file_and_row_when_the_next_prune_runs_then_both_are_removed(
    name: str, engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    """After the crash, no row names a stored file that does not exist."""
    plant, remaining_files = POINTS[name]
    ids = [_finished(engine, str(number), 40 * DAY) for number in range(6)]
    for job_id in ids:
        _stored(engine, tmp_path / "out", job_id)

    died = subprocess.run(
        [sys.executable, "-c", DIES.format(plant=plant)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )

    assert died.returncode == EXIT_CODE, died.stderr
    assert len([path for path in _files(tmp_path / "out") if path.is_file()]) == remaining_files
    report = verify(engine, settings)
    assert (report.wrong, report.orphans, report.kept) == ([], [], [])
    assert _job_ids(engine) == ids

    pruned = _prune_now(engine, settings, _retention(remove_files=True))

    assert (pruned.jobs, pruned.kept) == (6, 0)
    assert (_job_ids(engine), _files(tmp_path / "out")) == ([], [])
