"""Outputs that are stored, or not yet: looking them up, and putting back those whose file is gone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, func, select, update

from worker.store.job_values import clear_end
from worker.store.jobs import fresh_output
from worker.store.schema import events, jobs, outputs

_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class UnstoredGroup:
    """Outputs that are paid for and not stored yet, of one kind of trouble (None: none so far).

    `message` is one of theirs.
    """

    code: str | None
    count: int
    oldest: datetime
    message: str | None


def unstored_by_code(connection: Connection) -> list[UnstoredGroup]:
    """The outputs that wait or are on their way, by their last trouble."""
    found = (
        select(
            outputs.c.error_code,
            func.count().label("count"),
            func.min(outputs.c.listed_at).label("oldest"),
            func.max(outputs.c.error_message).label("message"),
        )
        .where(outputs.c.due_at.is_not(None))
        .group_by(outputs.c.error_code)
    )
    rows = connection.execute(found).all()
    return [UnstoredGroup(row.error_code, row._mapping["count"], row.oldest, row.message) for row in rows]


def count_expired_claims(connection: Connection, *, before: datetime) -> int:
    """Rows, of jobs and of outputs, whose claim was over before that and that nobody has taken up since."""
    return sum(
        connection.execute(
            select(func.count()).where(table.c.claim_holder.is_not(None), table.c.due_at < before)
        ).scalar_one()
        for table in (jobs, outputs)
    )


def count_claims(connection: Connection) -> dict[str, int]:
    """How many jobs, outputs and webhooks are being worked on, or were when their process died."""
    return {
        name: int(connection.execute(select(func.count()).where(table.c.claim_holder.is_not(None))).scalar_one())
        for name, table in (("job", jobs), ("output", outputs), ("webhook", events))
    }


def output_row(connection: Connection, output_id: int) -> Row[Any] | None:
    """One output, or None."""
    if not 0 < output_id < 2**63:
        return None
    return connection.execute(select(outputs).where(outputs.c.id == output_id)).one_or_none()


def stored_after(connection: Connection, after: int, *, job_ids: Sequence[int] | None, limit: int) -> list[Row[Any]]:
    """Stored outputs with higher ids than `after`, in order; of some jobs only, where they are given."""
    wanted = (
        select(outputs, jobs.c.status.label("job_status"))
        .join(jobs, jobs.c.id == outputs.c.job_id)
        .where(outputs.c.id > after, outputs.c.status == "stored")
        .order_by(outputs.c.id)
        .limit(limit)
    )
    if job_ids is not None:
        wanted = wanted.where(outputs.c.job_id.in_(job_ids))
    return list(connection.execute(wanted))


def unknown_locations(connection: Connection, locations: Sequence[str]) -> list[str]:
    """Those of the locations that no output has."""
    known: set[str | None] = set()
    for start in range(0, len(locations), _AT_ONCE):
        some = locations[start : start + _AT_ONCE]
        known.update(connection.execute(select(outputs.c.location).where(outputs.c.location.in_(some))).scalars())
    return [location for location in locations if location not in known]


def existing_jobs(connection: Connection, job_ids: Iterable[int]) -> set[int]:
    """Those of the jobs that there are."""
    wanted = sorted(job_ids)
    known: set[int] = set()
    for start in range(0, len(wanted), _AT_ONCE):
        some = jobs.c.id.in_(wanted[start : start + _AT_ONCE])
        known.update(connection.execute(select(jobs.c.id).where(some)).scalars())
    return known


def requeue_output(connection: Connection, output_id: int, *, location: str, now: datetime) -> bool:
    """Makes a stored output whose file is gone or damaged due again, and its job unfinished.

    False where it is not stored there any more, its job was cancelled, or nothing but the answer ever had its bytes.
    """
    job_id = select(outputs.c.job_id).where(outputs.c.id == output_id).scalar_subquery()
    # The job is locked before its outputs, as everywhere.
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
