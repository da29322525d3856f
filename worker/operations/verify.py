"""Verify stored outputs: read and hash each file, and queue missing or damaged ones for download again."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, Row

from worker.errors import StorageTrouble
from worker.settings import Settings
from worker.storage.base import Storage, job_id_of
from worker.storage.local import canonical_location
from worker.storage.select import storage_for, storage_of
from worker.store.audit import CountedAction
from worker.store.engine import database_now
from worker.store.events import create_events
from worker.store.outputs import existing_jobs, requeue_output, stored_after, unknown_locations

PAGE = 200
MISSING_LIMIT = 20  # if the first outputs are all missing, the storage is probably not mounted
UNREADABLE_LIMIT = 5  # unreadable outputs in a row that end the run


@dataclass(slots=True)
class WrongOutput:
    """A stored output that is missing, damaged or unreadable. `after` says what was done about it."""

    output_id: int
    job_id: int
    location: str
    condition: str
    after: str


@dataclass(slots=True)
class VerifyReport:
    """The result. `orphans` are files without an output row; `kept` are files of jobs that were pruned without them."""

    checked: int = 0
    whole: int = 0
    wrong: list[WrongOutput] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    @property
    def repaired(self) -> bool:
        """Whether every output is whole or queued for download again."""
        return all(output.after == QUEUED_AGAIN for output in self.wrong)


QUEUED_AGAIN = "queued for download again"


def verify(
    engine: Engine,
    settings: Settings,
    *,
    job_ids: Sequence[int] | None = None,
    dry_run: bool = False,
    force: bool = False,
) -> VerifyReport:
    """Read and hash every stored output, or the outputs of `job_ids`.

    A missing output is queued for download again. A damaged file is quarantined first. An unreadable output is left.
    A dry run only reports. Raises StorageTrouble if UNREADABLE_LIMIT outputs in a row can't be read, or, without
    `force`, if the first MISSING_LIMIT outputs are all missing: the storage is then treated as not mounted, and nothing
    is changed.
    """
    report = VerifyReport()
    stores: dict[str, Storage] = {}
    repairer = _Repairer(engine, stores, job_ids)
    known_locations: set[int] = set()  # hashes of locations need a tenth of the memory
    unreadable = 0
    missing: list[Row[Any]] | None = None if force or dry_run else []
    for row in _stored(engine, job_ids):
        report.checked += 1
        known_locations.add(hash(canonical_location(row.location)))
        scheme = row.location.partition(":")[0]
        if scheme not in stores:
            stores[scheme] = storage_of(row.location, settings)
        try:
            condition = stores[scheme].examine(row.location, size=row.size_bytes, sha256=row.sha256)
        except StorageTrouble as error:
            unreadable += 1
            if unreadable >= UNREADABLE_LIMIT:
                raise
            report.wrong.append(WrongOutput(row.id, row.job_id, row.location, "unreadable", f"left: {error}"))
            continue
        unreadable = 0
        if missing is not None and condition == "missing":
            missing.append(row)
            _check_mounted(missing)
            continue
        for missing_row in missing or ():
            report.wrong.append(repairer.repair(missing_row, "missing"))
        missing = None  # at least one file exists, so the storage is mounted
        if condition == "whole":
            report.whole += 1
        elif dry_run:
            report.wrong.append(
                WrongOutput(row.id, row.job_id, row.location, condition, "would be queued for download again")
            )
        else:
            report.wrong.append(repairer.repair(row, condition))
    for missing_row in missing or ():
        report.wrong.append(repairer.repair(missing_row, "missing"))
    if job_ids is None:
        report.orphans, report.kept = _files_without_output(engine, settings, known_locations)
    return report


def _stored(engine: Engine, job_ids: Sequence[int] | None) -> Iterator[Row[Any]]:
    last_id = 0
    while True:
        with engine.connect() as connection:
            rows = stored_after(connection, last_id, job_ids=job_ids, limit=PAGE)
        yield from rows
        if len(rows) < PAGE:
            return
        last_id = rows[-1].id


def _check_mounted(missing: Sequence[Row[Any]]) -> None:
    """Raise StorageTrouble if all outputs so far are missing, and there are MISSING_LIMIT of them."""
    if len(missing) >= MISSING_LIMIT:
        raise StorageTrouble(
            f"the first {MISSING_LIMIT} outputs are all missing: is {_folder(missing[-1].location)} mounted? "
            "If the files are really lost, use --force"
        )


def _files_without_output(
    engine: Engine, settings: Settings, known_locations: Collection[int]
) -> tuple[list[str], list[str]]:
    """Return the orphans, and the kept files of pruned jobs. `known_locations` are hashes of the outputs' locations."""
    unlisted = [
        location
        for location in storage_for(settings).locations()
        if hash(canonical_location(location)) not in known_locations
    ]
    with engine.connect() as connection:
        unknown = sorted(unknown_locations(connection, unlisted))
        known_jobs = existing_jobs(
            connection, {job_id for location in unknown if (job_id := job_id_of(location)) is not None}
        )
    kept = [
        location for location in unknown if (job_id := job_id_of(location)) is not None and job_id not in known_jobs
    ]
    kept_locations = set(kept)
    return [location for location in unknown if location not in kept_locations], kept


def _folder(location: str) -> str:
    return location.rsplit("/", 3)[0]


class _Repairer:
    """Queues missing and damaged outputs for download again. The audit trail has one row for all of them."""

    def __init__(self, engine: Engine, stores: dict[str, Storage], job_ids: Sequence[int] | None) -> None:
        self._engine = engine
        self._stores = stores
        self._changed_jobs: set[int] = set()
        named = list(job_ids or ())
        only_job = named[0] if len(named) == 1 else None
        self._audit = CountedAction("verify", " ".join(map(str, named)), job_id=only_job)

    def repair(self, row: Row[Any], condition: str) -> WrongOutput:
        """Repair an output if possible. Return it with what was done."""
        return WrongOutput(row.id, row.job_id, row.location, condition, self._repair(row, condition))

    def _repair(self, row: Row[Any], condition: str) -> str:
        if row.job_status == "cancelled":
            return "left: its job was cancelled"
        if row.url.startswith("data:"):
            return "lost: the API sent its bytes inside the answer, so there is no link to download"
        try:
            if condition == "damaged":
                self._stores[row.location.partition(":")[0]].quarantine(row.location)
        except StorageTrouble as error:
            return f"left: {error}"
        with self._engine.begin() as connection:
            now = database_now(connection)
            create_events(connection, now=now, of=[row.job_id])  # create the event of the final state before leaving it
            requeued = requeue_output(connection, row.id, location=row.location, now=now)
            self._audit.add(connection, int(requeued and row.job_id not in self._changed_jobs), now=now)
        if requeued:
            self._changed_jobs.add(row.job_id)
        return QUEUED_AGAIN if requeued else "left: another process changed it meanwhile"
