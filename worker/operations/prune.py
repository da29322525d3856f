"""Removing finished jobs by age and state, in small batches that no other work has to wait for; their files if wanted.

Each batch takes the jobs that nobody has locked, and is followed by a pause as long as it took. Where files go, a batch
has three parts: the rows say that their files are going, the files go, the rows go. Whatever a crash leaves undone, the
next prune does. Two at once do no harm: neither waits for the other's jobs.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Engine, Row
from sqlalchemy.exc import DBAPIError

from worker.errors import SettingsError, StorageTrouble
from worker.settings import Settings
from worker.storage.local import Storage, job_id_of
from worker.storage.select import storage_of
from worker.store import pruning
from worker.store.engine import LOCK_WAIT, RELAXED, database_now, error_kind, is_server_error

BATCH = 200  # jobs per transaction
LOOK_IDS = 250_000  # ids per statement that counts: about a second, far below the statement time-out
PATIENCE_SECONDS = 0.5  # for a row that is locked: it is left to the next prune then
LEAST_PAUSE, LONGEST_PAUSE = 0.005, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which finished jobs go: those of these states that ended longer ago, at most so many; their files or not."""

    older_than: timedelta
    states: Sequence[str]
    remove_files: bool
    limit: int | None = None


@dataclass(slots=True)
class Pruned:
    """What was removed. `kept` jobs stay since a file of theirs could not be removed; `reason` is what one of them met.

    `stopped` where that went for all of a batch, so that the rest was left for another time.
    """

    jobs: int = 0
    outputs: int = 0
    files: int = 0
    bytes: int = 0
    kept: int = 0
    reason: str | None = None
    stopped: bool = False


def look(engine: Engine, retention: Retention) -> Pruned:
    """Count what would be removed, by what the rows say."""
    total = Pruned()
    with engine.connect() as connection:
        cutoff = database_now(connection) - retention.older_than
        windows = pruning.id_windows(connection, cutoff=cutoff, width=LOOK_IDS)
    for status in retention.states:
        for first, last in windows:
            left = _left(retention, total)
            if left == 0:
                return total
            with engine.connect() as connection:
                prunable = pruning.count_prunable(connection, status, first=first, last=last, cutoff=cutoff, limit=left)
            total.jobs += prunable.jobs
            total.outputs += prunable.outputs
            if retention.remove_files:
                total.files += prunable.files
                total.bytes += prunable.bytes
    return total


def prune(
    engine: Engine,
    settings: Settings,
    wanted: Retention,
    *,
    go_on: Callable[[], bool] = lambda: True,
    rest: Callable[[float], object] = time.sleep,
) -> Pruned:
    """Removes what is old enough, as long as it may go on.

    Trouble with files is in what it answers: their jobs stay, and the next prune tries again.
    """
    done = Pruned()
    files = _Files(settings)
    for status, ids, cutoff in _windows(engine, wanted):
        began = time.monotonic()
        _batch_or_singly(engine, files, wanted, done, status, ids, cutoff)
        if done.stopped or _left(wanted, done) == 0 or not go_on():
            break
        rest(min(max(time.monotonic() - began, LEAST_PAUSE), LONGEST_PAUSE))
    if done.jobs:
        with engine.begin() as connection:
            pruning.delete_stale_crashes(connection)
    return done


def _windows(engine: Engine, wanted: Retention) -> Iterator[tuple[str, list[int], datetime]]:
    with engine.connect() as connection:
        cutoff = database_now(connection) - wanted.older_than
    for status in wanted.states:
        after: int | None = 0
        while after is not None:
            with engine.connect() as connection:
                ids, after = pruning.next_window(connection, status, after=after, cutoff=cutoff, limit=BATCH)
            if ids:
                yield status, ids, cutoff


def _batch_or_singly(
    engine: Engine, files: "_Files", wanted: Retention, done: Pruned, status: str, ids: list[int], cutoff: datetime
) -> None:
    """Prune a batch. Where the database refuses it, prune its jobs one by one, and leave those that it refuses."""
    try:
        _batch(engine, files, wanted, done, status, ids, cutoff)
    except DBAPIError as error:
        if error_kind(error) == "locked":
            return  # the next prune tries them again
        if is_server_error(error):
            raise
        if len(ids) == 1:
            done.kept += 1
            done.reason = f"the database refuses to remove job {ids[0]}: {type(error.orig).__name__}"
            return
        for job_id in ids:
            if not done.stopped and _left(wanted, done) != 0:
                _batch_or_singly(engine, files, wanted, done, status, [job_id], cutoff)


def _left(wanted: Retention, done: Pruned) -> int | None:
    return None if wanted.limit is None else wanted.limit - done.jobs


def _batch(
    engine: Engine, files: "_Files", wanted: Retention, done: Pruned, status: str, ids: list[int], cutoff: datetime
) -> None:
    # Rows that a crash of the server brings back are pruned again; but what marks say must outlast it: files go then.
    patient = engine.execution_options(**{LOCK_WAIT: PATIENCE_SECONDS, RELAXED: not wanted.remove_files})
    with patient.begin() as connection:
        going = pruning.lock_prunable(connection, ids, status, cutoff=cutoff)[: _left(wanted, done)]
        if not going:
            return
        found = pruning.outputs_to_prune(connection, going)
        stored = [row for row in found if row.location is not None] if wanted.remove_files else []
        marked = {row.job_id for row in stored}
        if marked:
            pruning.mark_pruned(connection, sorted(marked))
        at_once = [job_id for job_id in going if job_id not in marked]
        removed = pruning.delete_jobs(connection, at_once) if at_once else 0
    done.jobs += removed
    done.outputs += sum(row.job_id not in marked for row in found)
    if marked:
        _remove_marked(engine, files, done, found, stored)


def _remove_marked(
    engine: Engine, files: "_Files", done: Pruned, found: Sequence[Row[Any]], stored: Sequence[Row[Any]]
) -> None:
    """Removes files, then the rows of the jobs that have none any more; the others' rows say again what is there."""
    marked = {row.job_id for row in stored}
    try:
        refused = files.remove(stored)
    except StorageTrouble as away:  # nobody can tell what is gone: the marks stay, the next prune goes on from them
        done.kept += len(marked)
        done.reason, done.stopped = str(away), True
        return
    staying = {row.job_id for row in stored if row.id in refused}
    going = marked - staying
    with engine.execution_options(**{LOCK_WAIT: PATIENCE_SECONDS, RELAXED: True}).begin() as connection:
        if refused:
            pruning.unmark_pruned(connection, sorted(refused))
        removed = pruning.delete_jobs(connection, sorted(going)) if going else 0
    gone = [row for row in stored if row.id not in refused]
    done.jobs += removed
    done.outputs += sum(row.job_id in going for row in found)
    done.files += len(gone)
    done.bytes += sum(row.size_bytes or 0 for row in gone)
    done.kept += len(staying)
    done.reason = next(iter(refused.values()), done.reason)
    done.stopped = not gone


class _Files:
    """Removes the files of outputs, wherever they are."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stores: dict[str, Storage] = {}

    def remove(self, rows: Sequence[Row[Any]]) -> dict[int, str]:
        """The outputs whose files stay, and why. Raises StorageTrouble where it can't be told what was removed."""
        refused: dict[int, str] = {}
        by_scheme: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for row in rows:
            if job_id_of(row.location) == row.job_id:
                by_scheme[row.location.partition(":")[0]][row.location] = row.id
            else:
                refused[row.id] = f"{row.location[:200]} is no name that this job's files have"
        for scheme, ids in by_scheme.items():
            staying = self._remove(scheme, list(ids))
            refused |= {ids[location]: why for location, why in staying.items()}
        return refused

    def _remove(self, scheme: str, locations: list[str]) -> dict[str, str]:
        try:
            if scheme not in self._stores:
                self._stores[scheme] = storage_of(locations[0], self._settings)
        except StorageTrouble as nowhere:
            return dict.fromkeys(locations, str(nowhere))
        try:
            return self._stores[scheme].remove(locations)
        except SettingsError as missing:  # a library, without which nothing was done
            return dict.fromkeys(locations, str(missing))
