"""Reading again what is stored: whatever is gone or damaged is fetched once more."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, Row

from worker.errors import StorageTrouble
from worker.settings import Settings
from worker.storage.local import Storage, canonical_location, job_id_of
from worker.storage.select import storage_for, storage_of
from worker.store.engine import database_now
from worker.store.events import create_events
from worker.store.outputs import existing_jobs, requeue_output, stored_after, unknown_locations

PAGE = 200
SUSPICIOUS = 20
TROUBLES = 5


@dataclass(slots=True)
class Finding:
    """One stored output that is not as it should be. `after` says what became of it."""

    output_id: int
    job_id: int
    location: str
    condition: str
    after: str


@dataclass(slots=True)
class Findings:
    """What came of it. `orphans` are files that no output knows; `kept` are those whose job is not there any more."""

    checked: int = 0
    whole: int = 0
    wrong: list[Finding] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        """Whether all is well, or will be by itself."""
        return all(one.after == PUT_BACK for one in self.wrong)


PUT_BACK = "put back"


def verify(
    engine: Engine,
    settings: Settings,
    *,
    job_ids: Sequence[int] | None = None,
    dry_run: bool = False,
    force: bool = False,
) -> Findings:
    """Reads every stored output, or those of some jobs, and hashes it.

    What is missing is put back, what is damaged is moved aside and put back, what can't be read is left; a dry run only
    says what it would do. Raises StorageTrouble where TROUBLES outputs in a row can't be read, or where the first
    SUSPICIOUS outputs are all missing, unless it is forced: rather is a disk not mounted then, and nothing is touched.
    """
    found = Findings()
    stores: dict[str, Storage] = {}
    known: set[int] = set()  # hashes of places, which take a tenth of the room
    troubles = 0
    missing: list[Row[Any]] | None = None if force or dry_run else []
    for row in _stored(engine, job_ids):
        found.checked += 1
        known.add(hash(canonical_location(row.location)))
        scheme = row.location.partition(":")[0]
        if scheme not in stores:
            stores[scheme] = storage_of(row.location, settings)
        try:
            condition = stores[scheme].examine(row.location, size=row.size_bytes, sha256=row.sha256)
        except StorageTrouble as refused:
            troubles += 1
            if troubles >= TROUBLES:
                raise
            found.wrong.append(Finding(row.id, row.job_id, row.location, "unreadable", f"left: {refused}"))
            continue
        troubles = 0
        if missing is not None and condition == "missing":
            missing.append(row)
            if len(missing) >= SUSPICIOUS:
                raise StorageTrouble(
                    f"the first {SUSPICIOUS} outputs are all missing: is {_place(row.location)} mounted?"
                )
            continue
        for late in missing or ():
            found.wrong.append(_mended(engine, stores, late, "missing"))
        missing = None  # something is there
        if condition == "whole":
            found.whole += 1
        elif dry_run:
            found.wrong.append(Finding(row.id, row.job_id, row.location, condition, "would be put back"))
        else:
            found.wrong.append(_mended(engine, stores, row, condition))
    for late in missing or ():
        found.wrong.append(_mended(engine, stores, late, "missing"))
    if job_ids is None:
        strangers = [one for one in storage_for(settings).locations() if hash(canonical_location(one)) not in known]
        with engine.connect() as connection:
            unknown = sorted(unknown_locations(connection, strangers))
            there = existing_jobs(connection, {job for one in unknown if (job := job_id_of(one)) is not None})
        found.kept = [one for one in unknown if (job := job_id_of(one)) is not None and job not in there]
        kept = set(found.kept)
        found.orphans = [one for one in unknown if one not in kept]
    return found


def _stored(engine: Engine, job_ids: Sequence[int] | None) -> Iterator[Row[Any]]:
    after = 0
    while True:
        with engine.connect() as connection:
            rows = stored_after(connection, after, job_ids=job_ids, limit=PAGE)
        yield from rows
        if len(rows) < PAGE:
            return
        after = rows[-1].id


def _mended(engine: Engine, stores: dict[str, Storage], row: Row[Any], condition: str) -> Finding:
    storage = stores[row.location.partition(":")[0]]
    return Finding(row.id, row.job_id, row.location, condition, _mend(engine, storage, row, condition))


def _place(location: str) -> str:
    return location.rsplit("/", 3)[0]


def _mend(engine: Engine, storage: Storage, row: Row[Any], condition: str) -> str:
    if row.job_status == "cancelled":
        return "left: its job was cancelled"
    if row.url.startswith("data:"):
        return "lost: its bytes came with the answer alone"
    try:
        if condition == "damaged":
            storage.quarantine(row.location)
    except StorageTrouble as refused:
        return f"left: {refused}"
    with engine.begin() as connection:
        now = database_now(connection)
        create_events(connection, now=now, of=[row.job_id])  # of the end that is taken back
        done = requeue_output(connection, row.id, location=row.location, now=now)
    return PUT_BACK if done else "left: it was changed meanwhile"
