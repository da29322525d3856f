"""Outputs: look them up, count them, and requeue stored outputs whose file is missing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, func, select, update

from worker.store.schema import events, jobs, orders, outputs
from worker.store.transitions import clear_end, fresh_output

_IDS_PER_QUERY = 500


@dataclass(frozen=True, slots=True)
class UnstoredGroup:
    """The outputs that are not stored yet and have the same error code (None if there was no error).

    `message` is the error message of one of them.
    """

    code: str | None
    count: int
    oldest: datetime
    message: str | None


def unstored_by_code(connection: Connection) -> list[UnstoredGroup]:
    """Return the pending outputs, grouped by their last error code."""
    query = (
        select(
            outputs.c.error_code,
            func.count().label("count"),
            func.min(outputs.c.listed_at).label("oldest"),
            func.max(outputs.c.error_message).label("message"),
        )
        .where(outputs.c.due_at.is_not(None))
        .group_by(outputs.c.error_code)
    )
    rows = connection.execute(query).all()
    return [UnstoredGroup(row.error_code, row._mapping["count"], row.oldest, row.message) for row in rows]


def count_expired_claims(connection: Connection, *, before: datetime) -> int:
    """Count the jobs and outputs whose lease ended before this time and that were not released or claimed since."""
    return sum(
        connection.execute(
            select(func.count()).where(table.c.claim_holder.is_not(None), table.c.due_at < before)
        ).scalar_one()
        for table in (jobs, outputs)
    )


def count_claims(connection: Connection) -> dict[str, int]:
    """Return the number of claimed jobs, outputs, webhook events and orders, including claims of dead processes."""
    return {
        name: int(connection.execute(select(func.count()).where(table.c.claim_holder.is_not(None))).scalar_one())
        for name, table in (("job", jobs), ("output", outputs), ("webhook", events), ("order", orders))
    }


def output_row(connection: Connection, output_id: int) -> Row[Any] | None:
    """Return the row of an output, or None."""
    if not 0 < output_id < 2**63:
        return None
    return connection.execute(select(outputs).where(outputs.c.id == output_id)).one_or_none()


def stored_after(connection: Connection, after: int, *, job_ids: Sequence[int] | None, limit: int) -> list[Row[Any]]:
    """Return stored outputs with ids above `after`, in order. With `job_ids`, only outputs of these jobs."""
    query = (
        select(outputs, jobs.c.status.label("job_status"))
        .join(jobs, jobs.c.id == outputs.c.job_id)
        .where(outputs.c.id > after, outputs.c.status == "stored")
        .order_by(outputs.c.id)
        .limit(limit)
    )
    if job_ids is not None:
        query = query.where(outputs.c.job_id.in_(job_ids))
    return list(connection.execute(query))


def unknown_locations(connection: Connection, locations: Sequence[str]) -> list[str]:
    """Return the locations that no output has."""
    used: set[str | None] = set()
    for start in range(0, len(locations), _IDS_PER_QUERY):
        batch = locations[start : start + _IDS_PER_QUERY]
        used.update(connection.execute(select(outputs.c.location).where(outputs.c.location.in_(batch))).scalars())
    return [location for location in locations if location not in used]


def existing_jobs(connection: Connection, job_ids: Iterable[int]) -> set[int]:
    """Return the ids of the jobs that exist."""
    sorted_ids = sorted(job_ids)
    existing: set[int] = set()
    for start in range(0, len(sorted_ids), _IDS_PER_QUERY):
        in_batch = jobs.c.id.in_(sorted_ids[start : start + _IDS_PER_QUERY])
        existing.update(connection.execute(select(jobs.c.id).where(in_batch)).scalars())
    return existing


def requeue_output(connection: Connection, output_id: int, *, location: str, now: datetime) -> bool:
    """Requeue a stored output whose file is missing or damaged, and set its job to downloading.

    Return False if the output is no longer stored at this location, if its job was cancelled, or if its bytes came with
    the answer itself and can't be downloaded again.
    """
    job_id = select(outputs.c.job_id).where(outputs.c.id == output_id).scalar_subquery()
    # All transactions lock the job before its outputs.
    job = connection.execute(
        select(jobs.c.id, jobs.c.status).where(jobs.c.id == job_id).with_for_update()
    ).one_or_none()
    if job is None or job.status == "cancelled":
        return False
    changed = connection.execute(
        update(outputs)
        .where(
            outputs.c.id == output_id,
            outputs.c.status == "stored",
            outputs.c.location == location,
            outputs.c.url.not_like("data:%"),
        )
        .values(fresh_output(now) | dict.fromkeys(("location", "size_bytes", "sha256", "media_type", "stored_at")))
    ).rowcount
    if changed:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(status="downloading", **clear_end()))
    return bool(changed)
