"""Insert the output rows for the links that an answer lists or promises."""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select

from worker.core.reply import Link
from worker.store.bulk_write import INSERT_ROWS, batch_columns, batch_parameter
from worker.store.schema import bodies, outputs


def insert_outputs(
    connection: Connection, links_by_job: Iterable[tuple[int, Sequence[Link]]], *, now: datetime, queued: bool
) -> list[int]:
    """Insert an output row for each link, due now, and return the ids in the same order.

    Also insert the bytes of outputs that the answer itself contained. Pass `queued=True` if the caller sends the
    download messages after the commit. Otherwise the next sweep sends them.
    """
    links = [(job_id, position, link) for job_id, job_links in links_by_job for position, link in enumerate(job_links)]
    rows = [
        {
            "job_id": job_id,
            "position": position,
            "url": link.url,
            "proxy_urls": json.dumps(link.proxies, ensure_ascii=False),
            "status": "pending",
            "listed_at": now,
            "due_at": now,
            "queued_at": now if queued else None,
        }
        for job_id, position, link in links
    ]
    ids: dict[tuple[int, int], int] = {}
    for start in range(0, len(rows), INSERT_ROWS):
        ids |= _insert_outputs(connection, rows[start : start + INSERT_ROWS])
    body_rows = [
        {"output_id": ids[job_id, position], "body": link.body}
        for job_id, position, link in links
        if link.body is not None
    ]
    if body_rows:
        connection.execute(insert(bodies), body_rows)
    return [ids[job_id, position] for job_id, position, _ in links]


def _insert_outputs(connection: Connection, rows: list[dict[str, Any]]) -> dict[tuple[int, int], int]:
    """Insert output rows; return their ids by job and position."""
    columns = (outputs.c.id, outputs.c.job_id, outputs.c.position)
    match connection.dialect.name:
        case "postgresql":
            names = list(rows[0])
            batch = batch_columns(outputs, names)
            statement = insert(outputs).from_select(names, select(*batch.values())).returning(*columns)
            inserted = connection.execute(statement, batch_parameter(names, rows))
        case "sqlite":
            inserted = connection.execute(insert(outputs).values(rows).returning(*columns))
        case _:
            connection.execute(insert(outputs), rows)
            jobs_of_rows = {row["job_id"] for row in rows}
            inserted = connection.execute(select(*columns).where(outputs.c.job_id.in_(jobs_of_rows)))
    return {(row.job_id, row.position): row.id for row in inserted}
