"""Outputs that are not stored yet: how many, for how long, and what hinders them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from worker.core.redaction.masking import link_host, mask_personal_data
from worker.store.outputs import unstored_by_code
from worker.store.reports.snapshot_rows import oldest_unstored

MAX_ROWS = 1_000  # outputs that are grouped by host: the oldest ones


@dataclass(frozen=True, slots=True)
class UnstoredByHost:
    """Outputs that are not stored yet, grouped by host and code of the last error (`None`: no error so far).

    `next_seconds` is the time until the first of them is tried again. It is negative if that output is overdue.
    """

    code: str | None
    host: str
    job_id: int
    count: int
    oldest_seconds: float
    next_seconds: float
    message: str | None


@dataclass(frozen=True, slots=True)
class UnstoredOutputs:
    """Outputs that are not stored yet: their number, and the seconds since the oldest link was first seen.

    `trouble` counts them by the code of their last error. `storage` is the last error message of the storage, if any.
    `groups` has the oldest ones by code and host, and `more` says whether there are more than it counts.
    """

    count: int
    oldest_seconds: float
    trouble: Mapping[str, int]
    storage: str | None
    groups: Sequence[UnstoredByHost] = ()
    more: bool = False


def read_unstored(connection: Connection, now: datetime) -> UnstoredOutputs:
    """Read the outputs that are not stored yet."""
    by_code = unstored_by_code(connection)
    rows = oldest_unstored(connection, limit=MAX_ROWS)
    oldest = min((group.oldest for group in by_code), default=now)
    return UnstoredOutputs(
        count=sum(group.count for group in by_code),
        oldest_seconds=round(max(0.0, (now - oldest).total_seconds()), 3),
        trouble={group.code: group.count for group in by_code if group.code is not None},
        storage=next((group.message for group in by_code if group.code == "storage"), None),
        groups=_by_host(rows, now),
        more=len(rows) == MAX_ROWS,
    )


def _by_host(rows: Iterable[Row[Any]], now: datetime) -> list[UnstoredByHost]:
    """Group the outputs: groups with errors first, then by waiting time."""
    groups: dict[tuple[str | None, str], list[Row[Any]]] = defaultdict(list)
    for row in rows:
        host = "" if row.error_code in (None, "storage") else link_host(row.url)
        groups[row.error_code, host].append(row)
    unstored = [
        UnstoredByHost(
            code=code,
            host=host,
            job_id=min(group, key=lambda row: row.listed_at).job_id,
            count=len(group),
            oldest_seconds=_seconds_between(min(row.listed_at for row in group), now),
            next_seconds=_seconds_between(now, min(row.due_at for row in group)),
            message=next((mask_personal_data(row.error_message) for row in group if row.error_message), None),
        )
        for (code, host), group in groups.items()
    ]
    return sorted(unstored, key=lambda outputs: (outputs.code is None, -outputs.oldest_seconds))


def _seconds_between(start: datetime, end: datetime) -> float:
    return round((end - start).total_seconds(), 1)
