"""Promised links: addresses at which an answer said that outputs will be. They are kept with their job.

Before a job ends without an output they are tried like listed ones. Meanwhile `end_status`, `end_code` and
`end_message` say how the job ends if none of them brings anything.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update

from worker.core.lifecycle import EndJob
from worker.core.reply import Link
from worker.store.bulk_write import INSERT_ROWS, JSON_BATCH_ROWS, batch_columns, batch_parameter
from worker.store.listing import insert_outputs
from worker.store.schema import outputs, promises

_NEW = ("job_id", "urls")


class PromisedEnd(NamedTuple):
    """A job that would end now, and the links that are tried before that."""

    job_id: int
    end: EndJob
    urls: Sequence[str]


def add_promises(connection: Connection, promised: Mapping[int, Sequence[str]]) -> None:
    """Put in the links that were promised of new jobs."""
    rows = [{"job_id": job_id, "urls": _listed(urls)} for job_id, urls in sorted(promised.items())]
    if connection.dialect.name != "postgresql":
        size, statement = INSERT_ROWS, insert(promises)
    else:
        size, statement = (
            JSON_BATCH_ROWS,
            insert(promises).from_select(_NEW, select(*batch_columns(promises, _NEW).values())),
        )
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        connection.execute(statement, batch_parameter(_NEW, some) if size == JSON_BATCH_ROWS else some)


def save_promises(connection: Connection, promised: Mapping[int, Sequence[str]]) -> None:
    """Write down the links that answers promised, in place of those before. The caller has locked the jobs' rows."""
    if not promised:
        return
    query = select(promises.c.job_id, promises.c.urls).where(promises.c.job_id.in_(sorted(promised)))
    before = {row.job_id: row.urls for row in connection.execute(query)}
    add_promises(connection, {job_id: urls for job_id, urls in promised.items() if job_id not in before})
    other = [
        {"of_job": job_id, "links": _listed(urls)}
        for job_id, urls in sorted(promised.items())
        if job_id in before and before[job_id] != _listed(urls)
    ]
    if other:
        of_job = promises.c.job_id == bindparam("of_job")
        connection.execute(update(promises).where(of_job).values(urls=bindparam("links")), other)


def promised_links(connection: Connection, job_ids: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """Return the links that were promised of these jobs and not tried yet, by job."""
    if not job_ids:
        return {}
    query = select(promises.c.job_id, promises.c.urls).where(
        promises.c.job_id.in_(sorted(job_ids)), promises.c.tried_at.is_(None)
    )
    listed = {row.job_id: tuple(json.loads(row.urls)) for row in connection.execute(query)}
    return {job_id: urls for job_id, urls in listed.items() if urls}


def promise_row(connection: Connection, job_id: int) -> Row[Any] | None:
    """Return what was promised of a job, and whether it is tried or was; None where nothing was promised."""
    return connection.execute(select(promises).where(promises.c.job_id == job_id)).one_or_none()


def try_promises(connection: Connection, ends: Sequence[PromisedEnd], *, now: datetime, queued: bool) -> list[int]:
    """List promised links as outputs of jobs that are downloading from now on; return the ids of the outputs.

    `queued` where the caller sends their messages after the commit; else the next sweep does.
    """
    if not ends:
        return []
    save_promises(connection, {job_id: urls for job_id, _, urls in ends})
    connection.execute(
        update(promises)
        .where(promises.c.job_id == bindparam("of_job"))
        .values(
            tried_at=now,
            end_status=bindparam("status"),
            end_code=bindparam("code"),
            end_message=bindparam("message"),
        ),
        [{"of_job": job_id, "status": end.status, "code": end.code, "message": end.message} for job_id, end, _ in ends],
    )
    listed = [(job_id, [Link(url) for url in urls]) for job_id, _, urls in ends]
    return insert_outputs(connection, listed, now=now, queued=queued)


def clear_promised_end(connection: Connection, job_id: int) -> None:
    """Note that a promised link brought an output: from now on the job is like any other."""
    connection.execute(
        update(promises).where(promises.c.job_id == job_id).values(end_status=None, end_code=None, end_message=None)
    )


def delete_promises(connection: Connection, job_ids: Collection[int]) -> None:
    """Forget the links that were promised of jobs whose outputs are listed. The caller has the jobs' rows."""
    if job_ids:
        connection.execute(delete(promises).where(promises.c.job_id.in_(sorted(job_ids))))


def reset_promises(connection: Connection, job_ids: Sequence[int]) -> set[int]:
    """Make promised links untried again where none brought anything; return those of the jobs.

    Their rows of outputs are removed: the API is asked again, and its answer lists outputs from the first position on.
    """
    query = select(promises.c.job_id).where(promises.c.job_id.in_(sorted(job_ids)), promises.c.end_status.is_not(None))
    tried = set(connection.execute(query).scalars()) if job_ids else set()
    if tried:
        connection.execute(delete(outputs).where(outputs.c.job_id.in_(tried), outputs.c.status == "failed"))
        connection.execute(
            update(promises)
            .where(promises.c.job_id.in_(tried))
            .values(tried_at=None, end_status=None, end_code=None, end_message=None)
        )
    return tried


def _listed(urls: Sequence[str]) -> str:
    return json.dumps(list(urls), ensure_ascii=False)
