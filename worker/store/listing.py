"""Listing: the rows of the outputs that an answer lists, or that a promise names."""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select

from worker.core.reply import Link
from worker.store.bulk_write import INSERT_ROWS, batch_columns, batch_parameter
from worker.store.schema import bodies, outputs


def insert_outputs(
    connection: Connection, found: Iterable[tuple[int, Sequence[Link]]], *, now: datetime, queued: bool
) -> list[int]:
    """Put in an output row for each link of these jobs, due at once, and the bytes that an answer carried; return ids.

    `queued` where the caller sends their messages after the commit; else the next sweep does.
    """
    links = [(job_id, position, link) for job_id, listed in found for position, link in enumerate(listed)]
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
    carried = [
        {"output_id": ids[job_id, position], "body": link.body}
        for job_id, position, link in links
        if link.body is not None
    ]
    if carried:
        connection.execute(insert(bodies), carried)
    return [ids[job_id, position] for job_id, position, _ in links]


def _insert_outputs(connection: Connection, rows: list[dict[str, Any]]) -> dict[tuple[int, int], int]:
    """Put output rows in; return their ids by job and position."""
    known = (outputs.c.id, outputs.c.job_id, outputs.c.position)
    match connection.dialect.name:
        case "postgresql":
            names = list(rows[0])
            fresh = batch_columns(outputs, names)
            statement = insert(outputs).from_select(names, select(*fresh.values())).returning(*known)
            found = connection.execute(statement, batch_parameter(names, rows))
        case "sqlite":
            found = connection.execute(insert(outputs).values(rows).returning(*known))
        case _:
            connection.execute(insert(outputs), rows)
            jobs_of_rows = {row["job_id"] for row in rows}
            found = connection.execute(select(*known).where(outputs.c.job_id.in_(jobs_of_rows)))
    return {(row.job_id, row.position): row.id for row in found}
