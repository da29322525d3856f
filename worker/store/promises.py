"""Promised links: links at which, by an answer of the API, outputs will appear later. One row per job.

Before a job ends without an output, its promised links are downloaded like listed outputs. Meanwhile `end_status`,
`end_code` and `end_message` contain how the job ends if no link can be stored.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update

from worker.core.lifecycle import EndJob
from worker.core.reply import Link
from worker.store.bulk_write import INSERT_ROWS, JSON_BATCH_ROWS, batch_columns, batch_parameter
from worker.store.new_outputs import insert_outputs
from worker.store.schema import outputs, promises

_NAMES = ("job_id", "urls")


class PromisedEnd(NamedTuple):
    """A job that would end now, and the promised links that are tried first."""

    job_id: int
    end: EndJob
    urls: Sequence[str]


def add_promises(connection: Connection, promised: Mapping[int, Sequence[str]]) -> None:
    """Insert the promised links of jobs that have none yet."""
    rows = [{"job_id": job_id, "urls": _to_json(urls)} for job_id, urls in sorted(promised.items())]
    if connection.dialect.name != "postgresql":
        size, statement = INSERT_ROWS, insert(promises)
    else:
        size, statement = (
            JSON_BATCH_ROWS,
            insert(promises).from_select(_NAMES, select(*batch_columns(promises, _NAMES).values())),
        )
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        connection.execute(statement, batch_parameter(_NAMES, batch) if size == JSON_BATCH_ROWS else batch)


def save_promises(connection: Connection, promised: Mapping[int, Sequence[str]]) -> None:
    """Save the links that answers promised, and replace previous ones. The caller has locked the jobs' rows."""
    if not promised:
        return
    query = select(promises.c.job_id, promises.c.urls).where(promises.c.job_id.in_(sorted(promised)))
    previous = {row.job_id: row.urls for row in connection.execute(query)}
    add_promises(connection, {job_id: urls for job_id, urls in promised.items() if job_id not in previous})
    changed = [
        {"of_job": job_id, "links": _to_json(urls)}
        for job_id, urls in sorted(promised.items())
        if job_id in previous and previous[job_id] != _to_json(urls)
    ]
    if changed:
        of_job = promises.c.job_id == bindparam("of_job")
        connection.execute(update(promises).where(of_job).values(urls=bindparam("links")), changed)


def promised_links(connection: Connection, job_ids: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """Return the promised links of these jobs that were not tried yet, by job."""
    if not job_ids:
        return {}
    query = select(promises.c.job_id, promises.c.urls).where(
        promises.c.job_id.in_(sorted(job_ids)), promises.c.tried_at.is_(None)
    )
    urls_by_job = {row.job_id: tuple(json.loads(row.urls)) for row in connection.execute(query)}
    return {job_id: urls for job_id, urls in urls_by_job.items() if urls}


def promise_row(connection: Connection, job_id: int) -> Row[Any] | None:
    """Return the row with a job's promised links, or None."""
    return connection.execute(select(promises).where(promises.c.job_id == job_id)).one_or_none()


def try_promises(connection: Connection, ends: Sequence[PromisedEnd], *, now: datetime, queued: bool) -> list[int]:
    """Insert promised links as outputs of jobs that are downloading from now on; return the ids of the outputs.

    Pass `queued=True` if the caller sends the download messages after the commit. Otherwise the next sweep sends them.
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
    links_by_job = [(job_id, [Link(url) for url in urls]) for job_id, _, urls in ends]
    return insert_outputs(connection, links_by_job, now=now, queued=queued)


def clear_promised_end(connection: Connection, job_id: int) -> None:
    """Clear the planned end of a job, because an output of a promised link was stored."""
    connection.execute(
        update(promises).where(promises.c.job_id == job_id).values(end_status=None, end_code=None, end_message=None)
    )


def delete_promises(connection: Connection, job_ids: Collection[int]) -> None:
    """Delete the promised links of jobs whose outputs are listed now. The caller has locked the jobs' rows."""
    if job_ids:
        connection.execute(delete(promises).where(promises.c.job_id.in_(sorted(job_ids))))


def reset_promises(connection: Connection, job_ids: Sequence[int]) -> set[int]:
    """Mark promised links as untried if none could be stored; return the ids of these jobs.

    Their failed output rows are deleted. The API is asked again, and its answer lists outputs from position 0.
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


def _to_json(urls: Sequence[str]) -> str:
    return json.dumps(list(urls), ensure_ascii=False)
