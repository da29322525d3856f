"""Remove finished jobs by age and state, and their files if requested, in small batches that block no other work.

A batch skips locked jobs and is followed by a pause as long as the batch took. A batch that removes files has three
steps: mark the rows, remove the files, remove the rows. The next prune completes what a crash left unfinished. Two
prunes may run at the same time: neither waits for the jobs of the other.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, Row
from sqlalchemy.exc import DBAPIError

from worker.errors import StorageTrouble
from worker.settings import Settings
from worker.storage.removal import FileRemover
from worker.store import pruning
from worker.store.audit import CountedAction, forget_old_actions
from worker.store.engine import LOCK_WAIT, RELAXED, database_now, error_kind, is_server_error

BATCH = 200  # jobs per transaction
COUNT_IDS = 250_000  # ids per counting statement: about a second, far below the statement time-out
LOCK_WAIT_SECONDS = 0.5  # then a locked row is left to the next prune
LEAST_PAUSE, LONGEST_PAUSE = 0.005, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which finished jobs to remove: states, minimum age, maximum number, and whether to remove their files."""

    older_than: timedelta
    states: Sequence[str]
    remove_files: bool
    limit: int | None = None


@dataclass(slots=True)
class Pruned:
    """What a prune removed. `kept` jobs could not be removed; `reason` is the error of one of them.

    `stopped` means that no file of a batch could be removed, so the prune ended there.
    """

    jobs: int = 0
    outputs: int = 0
    files: int = 0
    bytes: int = 0
    kept: int = 0
    reason: str | None = None
    stopped: bool = False


def count_prunable(engine: Engine, retention: Retention) -> Pruned:
    """Count what `prune` would remove, from the rows alone."""
    total = Pruned()
    with engine.connect() as connection:
        cutoff = database_now(connection) - retention.older_than
        windows = pruning.id_windows(connection, cutoff=cutoff, width=COUNT_IDS)
    for status in retention.states:
        for first, last in windows:
            remaining = _remaining(retention, total)
            if remaining == 0:
                return total
            with engine.connect() as connection:
                prunable = pruning.count_prunable(
                    connection, status, first=first, last=last, cutoff=cutoff, limit=remaining
                )
            total.jobs += prunable.jobs
            total.outputs += prunable.outputs
            if retention.remove_files:
                total.files += prunable.files
                total.bytes += prunable.bytes
    return total


def prune(
    engine: Engine,
    settings: Settings,
    retention: Retention,
    *,
    audit: CountedAction | None = None,
    keep_going: Callable[[], bool] = lambda: True,
    sleep: Callable[[float], object] = time.sleep,
) -> Pruned:
    """Remove jobs that are old enough, for as long as `keep_going` returns true.

    Jobs whose files can't be removed stay and are counted in the result. The next prune tries them again. `audit`
    counts the removed jobs if an operator prunes.
    """
    pruned = Pruned()
    pruner = _Pruner(engine, FileRemover(settings), retention, pruned, audit)
    for status, ids, cutoff in _windows(engine, retention):
        started = time.monotonic()
        pruner.prune(status, ids, cutoff)
        if pruned.stopped or _remaining(retention, pruned) == 0 or not keep_going():
            break
        sleep(min(max(time.monotonic() - started, LEAST_PAUSE), LONGEST_PAUSE))
    if pruned.jobs:
        with engine.begin() as connection:
            pruning.delete_stale_crashes(connection)
    return pruned


def _windows(engine: Engine, retention: Retention) -> Iterator[tuple[str, list[int], datetime]]:
    with engine.connect() as connection:
        cutoff = database_now(connection) - retention.older_than
    for status in retention.states:
        last_id: int | None = 0
        while last_id is not None:
            with engine.connect() as connection:
                ids, last_id = pruning.next_window(connection, status, after=last_id, cutoff=cutoff, limit=BATCH)
            if ids:
                yield status, ids, cutoff


def _remaining(retention: Retention, pruned: Pruned) -> int | None:
    return None if retention.limit is None else retention.limit - pruned.jobs


class _Pruner:
    """Prunes batches of jobs, and counts them in `pruned` and in the audit trail."""

    def __init__(
        self, engine: Engine, files: FileRemover, retention: Retention, pruned: Pruned, audit: CountedAction | None
    ) -> None:
        self._engine = engine
        self._files = files
        self._retention = retention
        self._pruned = pruned
        self._audit = audit

    def prune(self, status: str, ids: list[int], cutoff: datetime) -> None:
        """Prune a batch. If the database refuses it, prune its jobs one by one and keep those that it refuses."""
        try:
            self._batch(status, ids, cutoff)
        except DBAPIError as error:
            if error_kind(error) == "locked":
                return  # the next prune tries them again
            if is_server_error(error):
                raise
            if len(ids) == 1:
                self._pruned.kept += 1
                self._pruned.reason = f"the database refuses to remove job {ids[0]}: {type(error.orig).__name__}"
                return
            for job_id in ids:
                if not self._pruned.stopped and _remaining(self._retention, self._pruned) != 0:
                    self.prune(status, [job_id], cutoff)

    def _batch(self, status: str, ids: list[int], cutoff: datetime) -> None:
        # A server crash may undo an asynchronous commit: removed rows are then pruned again. Marks must be durable,
        # because the files are removed after them.
        remove_files, remaining = self._retention.remove_files, _remaining(self._retention, self._pruned)
        patient = self._engine.execution_options(**{LOCK_WAIT: LOCK_WAIT_SECONDS, RELAXED: not remove_files})
        with patient.begin() as connection:
            locked_ids = pruning.lock_prunable(connection, ids, status, cutoff=cutoff)[:remaining]
            if not locked_ids:
                return
            outputs = pruning.outputs_to_prune(connection, locked_ids)
            stored = [row for row in outputs if row.location is not None] if remove_files else []
            marked = {row.job_id for row in stored}
            if marked:
                pruning.mark_pruned(connection, sorted(marked))
            removed = self._delete(connection, [job_id for job_id in locked_ids if job_id not in marked])
        self._pruned.jobs += removed
        self._pruned.outputs += sum(row.job_id not in marked for row in outputs)
        if marked:
            self._remove_marked(outputs, stored)

    def _remove_marked(self, outputs: Sequence[Row[Any]], stored: Sequence[Row[Any]]) -> None:
        """Remove the files, then the rows of the jobs whose files are all removed. Unmark the rows of the others."""
        pruned, marked = self._pruned, {row.job_id for row in stored}
        try:
            errors = self._files.remove(stored)
        except StorageTrouble as error:  # unknown which files are removed: the marks stay for the next prune
            pruned.kept += len(marked)
            pruned.reason, pruned.stopped = str(error), True
            return
        kept_ids = {row.job_id for row in stored if row.id in errors}
        removable_ids = marked - kept_ids
        with self._engine.execution_options(**{LOCK_WAIT: LOCK_WAIT_SECONDS, RELAXED: True}).begin() as connection:
            if errors:
                pruning.unmark_pruned(connection, sorted(errors))
            removed = self._delete(connection, sorted(removable_ids))
        removed_outputs = [row for row in stored if row.id not in errors]
        pruned.jobs += removed
        pruned.outputs += sum(row.job_id in removable_ids for row in outputs)
        pruned.files += len(removed_outputs)
        pruned.bytes += sum(row.size_bytes or 0 for row in removed_outputs)
        pruned.kept += len(kept_ids)
        pruned.reason = next(iter(errors.values()), pruned.reason)
        pruned.stopped = not removed_outputs

    def _delete(self, connection: Connection, job_ids: Sequence[int]) -> int:
        removed = pruning.delete_jobs(connection, job_ids) if job_ids else 0
        if self._audit is not None:
            self._audit.add(connection, removed, now=database_now(connection))
        return removed


def forget_actions(engine: Engine, *, keep_going: Callable[[], bool] = lambda: True) -> None:
    """Remove old rows of the audit trail, for as long as `keep_going` returns true."""
    more = True
    while more and keep_going():
        with engine.begin() as connection:
            more = forget_old_actions(connection, now=database_now(connection))
