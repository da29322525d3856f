"""Move stored outputs to the storage in the settings: copy a file, update its row, remove the old file.

The run can stop at any moment and be started again. Until its row is updated, an output is at its old location, and the
next run finds a copy that was made already. The transaction that updates the row also records the old file, so that the
next run removes it if this one did not.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, Literal

from sqlalchemy import Connection, Engine, Row
from sqlalchemy.exc import DBAPIError

from worker.core.media.signatures import Media
from worker.errors import OutputMissing, SettingsError, StorageTrouble
from worker.settings import Settings
from worker.storage.base import HASH_DIGITS, READ_BYTES, Storage, job_id_of, name_of, root_of
from worker.storage.partial_files import Source, link_hash
from worker.storage.removal import FileRemover
from worker.storage.select import storage_for, storage_of
from worker.store.audit import CountedAction
from worker.store.engine import database_now, error_kind, transact
from worker.store.moved_files import (
    Move,
    count_old_files,
    forget_old_files,
    old_files_after,
    output_places,
    record_moves,
    stored_files_after,
)
from worker.store.outputs import unknown_locations

PAGE = 1_000  # rows per query
QUEUED_PER_THREAD = 4  # outputs that wait for a thread, so that threads never wait for the database
RECORD_MOST = 100  # copies per transaction
RECORD_SECONDS = 2.0  # copies of large files are recorded in smaller batches
TROUBLES_MOST = 50  # outputs in a row that the storage refuses; then it is down, and the run ends

Problem = Literal["missing", "damaged", "storage", "busy", "name", "old file"]


@dataclass(slots=True)
class Problems:
    """The number of outputs with the same problem, and the message about one of them."""

    count: int
    example: str


@dataclass(slots=True)
class MoveReport:
    """The result of a run: moved outputs with the size of their files, removed old files, and what failed.

    `stopped` means that the storage refused so many outputs in a row that the run ended early.
    """

    moved: int = 0
    bytes: int = 0
    removed: int = 0
    problems: dict[Problem, Problems] = field(default_factory=dict)
    stopped: bool = False

    def add_problem(self, problem: Problem, message: str) -> None:
        """Count a problem, and keep the first message."""
        self.problems.setdefault(problem, Problems(0, message)).count += 1


@dataclass(slots=True)
class MovePlan:
    """What a run would move: outputs with the size of their files, by old folder or bucket, and to where.

    `old_files` is the number of files that an interrupted run has left.
    """

    target: str
    outputs: int = 0
    bytes: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    old_files: int = 0


@dataclass(frozen=True, slots=True)
class _Copy:
    """The result of copying a file: its new location, or the problem."""

    row: Row[Any]
    location: str = ""
    problem: Problem | None = None
    message: str = ""


def plan_move(engine: Engine, settings: Settings) -> MovePlan:
    """Count what `move_storage` would move, from the rows alone."""
    target = storage_for(settings)
    plan = MovePlan(target.root)
    for row in _outputs_elsewhere(engine, target):
        root = root_of(row.location)
        plan.sources[root] = plan.sources.get(root, 0) + 1
        plan.outputs += 1
        plan.bytes += row.size_bytes
    with engine.connect() as connection:
        plan.old_files = count_old_files(connection)
    return plan


def move_storage(
    engine: Engine,
    settings: Settings,
    *,
    threads: int,
    keep_old: bool = False,
    show_progress: Callable[[int], None] = lambda _: None,
) -> MoveReport:
    """Move every stored output that is not in the storage of the settings.

    With `keep_old`, the old files stay. `show_progress` is called with the number of outputs moved so far. Raises
    StorageTrouble if the new storage can't be used at all.
    """
    target = storage_for(settings)
    target.prepare()
    mover = _Mover(engine, settings, target, keep_old=keep_old)
    mover.remove_old_files(check_copies=True)
    executor = ThreadPoolExecutor(threads, "move-storage")
    running: set[Future[_Copy]] = set()
    copies: list[_Copy] = []
    recorded_at = time.monotonic()
    try:
        for row in _outputs_elsewhere(engine, target):
            running.add(executor.submit(mover.copy, row))
            if len(running) < threads * QUEUED_PER_THREAD:
                continue
            done, running = wait(running, return_when=FIRST_COMPLETED)
            copies += [future.result() for future in done]
            if len(copies) >= RECORD_MOST or time.monotonic() - recorded_at > RECORD_SECONDS:
                mover.record(copies)
                copies, recorded_at = [], time.monotonic()
                show_progress(mover.report.moved)
                if mover.report.stopped:
                    return mover.report
        mover.record([*copies, *(future.result() for future in running)])
        show_progress(mover.report.moved)
        return mover.report
    finally:
        executor.shutdown(cancel_futures=True)


def _outputs_elsewhere(engine: Engine, target: Storage) -> Iterator[Row[Any]]:
    """Yield the stored outputs that are not at their place in the target."""
    last_id = 0
    while True:
        with engine.connect() as connection:
            rows = stored_files_after(connection, last_id, limit=PAGE)
        yield from (row for row in rows if row.location not in _places(target, row))
        if len(rows) < PAGE:
            return
        last_id = rows[-1].id


def _places(target: Storage, row: Row[Any]) -> Iterator[str]:
    """Yield the possible locations of an output in a storage."""
    extension = _extension(row.location)
    for digits in HASH_DIGITS:
        sha256 = row.sha256[:digits]
        yield target.root + name_of(job_id=row.job_id, position=row.position, sha256=sha256, extension=extension)


def _extension(location: str) -> str:
    return location.rpartition("/")[2].partition(".")[2]


class _Mover:
    """Moves outputs. `copy` is thread-safe; call the other methods from one thread."""

    def __init__(self, engine: Engine, settings: Settings, target: Storage, *, keep_old: bool) -> None:
        self.report = MoveReport()
        self._engine = engine
        self._settings = settings
        self._target = target
        self._keep_old = keep_old
        self._audit = CountedAction("move-storage", f"STORAGE_URL={target.root}" + (" --keep" if keep_old else ""))
        self._remover = FileRemover(settings)
        self._token = secrets.token_hex(8)
        self._last_old_file = 0
        self._troubles_in_a_row = 0

    def copy(self, row: Row[Any]) -> _Copy:
        """Copy the file of an output to the new storage, unless a whole copy is there already."""
        if job_id_of(row.location) != row.job_id:
            return _Copy(row, problem="name", message=f"{row.location} is not the name of a file of its job")
        try:
            with storage_of(row.location, self._settings).open(row.location) as file:
                return self._receive(row, file)
        except OutputMissing:
            return self._find_copy(row)
        except (StorageTrouble, SettingsError) as error:
            return _Copy(row, problem="storage", message=str(error))

    def _receive(self, row: Row[Any], file: BinaryIO) -> _Copy:
        with self._target.partials.receive(row.id, self._token) as incoming:
            if incoming.source is not None:  # left by a download
                incoming.begin(Source(link_hash(row.location)))
            for chunk in iter(partial(_read, file, row.location), b""):
                incoming.write(chunk)
                if incoming.size > row.size_bytes:
                    break
            if (incoming.size, incoming.sha256) != (row.size_bytes, row.sha256):
                return _Copy(row, problem="damaged", message=f"{row.location} is damaged: `fetch-worker verify`")
            media = Media(row.media_type, _extension(row.location))
            location = self._target.keep(incoming, job_id=row.job_id, position=row.position, media=media)
        return _Copy(row, location)

    def _find_copy(self, row: Row[Any]) -> _Copy:
        """Find the copy of an output whose old file is missing.

        A database may lose its last transactions in a power failure, after the old files were removed.
        """
        try:
            for location in _places(self._target, row):
                if self._target.examine(location, size=row.size_bytes, sha256=row.sha256) == "whole":
                    return _Copy(row, location)
        except StorageTrouble as error:
            return _Copy(row, problem="storage", message=str(error))
        return _Copy(row, problem="missing", message=f"{row.location} is missing: is its disk mounted?")

    def record(self, unsorted: Iterable[_Copy]) -> None:
        """Update the rows of copied outputs, then remove the old files."""
        copies = sorted(unsorted, key=lambda copy: copy.row.id)
        self._count_problems(copies)
        moves = [
            Move(copy.row.id, copy.row.job_id, copy.row.location, copy.location) for copy in copies if copy.location
        ]
        if not moves:
            return
        try:
            changed = transact(self._engine, partial(self._update_rows, moves=moves))
        except DBAPIError as error:
            if error_kind(error) != "locked":
                raise
            for move in moves:
                self.report.add_problem("busy", f"the row of output {move.output_id} is locked by another transaction")
            return
        self.report.moved += len(changed)
        self.report.bytes += sum(copy.row.size_bytes for copy in copies if copy.row.id in changed)
        self._remove_unused([move for move in moves if move.output_id not in changed])
        self.remove_old_files()

    def _update_rows(self, connection: Connection, *, moves: Sequence[Move]) -> set[int]:
        changed = record_moves(connection, moves, keep_old=self._keep_old)
        changed_jobs = {move.job_id for move in moves if move.output_id in changed}
        self._audit.add(connection, len(changed_jobs), now=database_now(connection))
        return changed

    def _count_problems(self, copies: Sequence[_Copy]) -> None:
        """Count the problems of outputs that are still where they were. Others were moved or pruned meanwhile."""
        failed_ids = [copy.row.id for copy in copies if copy.problem is not None]
        places = {}
        if failed_ids:
            with self._engine.connect() as connection:
                places = output_places(connection, failed_ids)
        for copy in copies:
            self._troubles_in_a_row = self._troubles_in_a_row + 1 if copy.problem == "storage" else 0
            if copy.problem is not None and places.get(copy.row.id) == ("stored", copy.row.location):
                self.report.add_problem(copy.problem, f"output {copy.row.id}: {copy.message}")
        self.report.stopped = self._troubles_in_a_row >= TROUBLES_MOST

    def _remove_unused(self, moves: Sequence[Move]) -> None:
        """Remove the copies of outputs that were pruned meanwhile.

        The copy of an output that is downloaded again stays, because the download finds it.
        """
        if not moves:
            return
        with self._engine.connect() as connection:
            places = output_places(connection, [move.output_id for move in moves])
            unused = [move.new for move in moves if places.get(move.output_id, ("failed", None))[0] == "failed"]
            unused = unknown_locations(connection, unused)
        with suppress(StorageTrouble):  # `verify` lists files without an output
            self._target.remove(unused)

    def remove_old_files(self, *, check_copies: bool = False) -> None:
        """Remove the recorded old files that this run has not tried yet.

        With `check_copies`, an old file stays if its new copy is not whole: for files of an earlier run.
        """
        while True:
            with self._engine.connect() as connection:
                rows = old_files_after(connection, self._last_old_file, limit=PAGE)
                free = set(unknown_locations(connection, [row.location for row in rows]))
            if not rows:
                return
            self._last_old_file = rows[-1].id
            self._remove(rows, free, check_copies=check_copies)

    def _remove(self, rows: Sequence[Row[Any]], free: set[str], *, check_copies: bool) -> None:
        """Remove old files, except those that an output uses again."""
        removable, stays = [], dict[int, str]()
        for row in rows:
            try:
                reason = self._why_needed(row) if check_copies else None
                is_removable = row.location in free and not self._is_same_file(row)
            except (StorageTrouble, SettingsError) as error:
                reason = str(error)
            if reason is not None:
                stays[row.id] = reason
            elif is_removable:
                removable.append(row)
        try:
            stays |= self._remover.remove(removable)
        except StorageTrouble as error:
            stays |= {row.id: str(error) for row in removable}
        for reason in stays.values():
            self.report.add_problem("old file", reason)
        self.report.removed += sum(row.id not in stays for row in removable)
        with self._engine.begin() as connection:
            forget_old_files(connection, [row.id for row in rows if row.id not in stays])

    def _is_same_file(self, row: Row[Any]) -> bool:
        """Return whether the new location is only another name of the old file."""
        if row.new_location is None:
            return False
        return storage_of(row.new_location, self._settings).is_same_file(row.location, row.new_location)

    def _why_needed(self, row: Row[Any]) -> str | None:
        """Return the reason why an old file must stay, or None: its output has no whole copy. Raises StorageTrouble."""
        if row.status is None or row.location == row.new_location:
            return None
        if row.status != "stored":
            return f"{row.location} stays: output {row.output_id} is {row.status}"
        storage = storage_of(row.new_location, self._settings)
        condition = storage.examine(row.new_location, size=row.size_bytes, sha256=row.sha256)
        return None if condition == "whole" else f"{row.location} stays: {row.new_location} is {condition}"


def _read(file: BinaryIO, location: str) -> bytes:
    try:
        return file.read(READ_BYTES)
    except OSError as error:  # of a local file; a storage in S3 raises StorageTrouble
        raise StorageTrouble(f"can't read {location}: {error.strerror}") from None
