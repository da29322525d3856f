"""Move outputs to new locations, and remember their old files until these are removed.

The transaction that writes a new location also records the old file. So an old file is never forgotten, and a file that
an output still needs is never recorded.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from worker.store.events import update_event_locations
from worker.store.schema import jobs, moved_files, outputs


class Move(NamedTuple):
    """A stored output whose file was copied from its old location to a new one."""

    output_id: int
    job_id: int
    old: str
    new: str


def stored_files_after(connection: Connection, after: int, *, limit: int) -> list[Row[Any]]:
    """Return the stored outputs with ids above `after`, in order, with the columns that describe their files."""
    columns = (
        *(outputs.c.id, outputs.c.job_id, outputs.c.position, outputs.c.location),
        *(outputs.c.size_bytes, outputs.c.sha256, outputs.c.media_type),
    )
    query = select(*columns).where(outputs.c.id > after, outputs.c.status == "stored")
    return list(connection.execute(query.order_by(outputs.c.id).limit(limit)))


def record_moves(connection: Connection, moves: Sequence[Move], *, keep_old: bool) -> set[int]:
    """Write the new locations and return the ids of the changed outputs.

    An output that is not stored at its old location any more is not changed. Webhook events that are not delivered yet
    get the new locations too. Unless `keep_old`, the old files are recorded for removal.
    """
    # All transactions lock the job before its outputs. This also waits for events that are being created.
    job_ids = {move.job_id for move in moves}
    connection.execute(select(jobs.c.id).where(jobs.c.id.in_(job_ids)).order_by(jobs.c.id).with_for_update())
    changed = [
        move
        for move in moves
        if connection.execute(
            update(outputs)
            .where(outputs.c.id == move.output_id, outputs.c.status == "stored", outputs.c.location == move.old)
            .values(location=move.new)
        ).rowcount
    ]
    if changed:
        update_event_locations(connection, {move.job_id for move in changed}, {move.old: move.new for move in changed})
    if changed and not keep_old:
        connection.execute(
            insert(moved_files),
            [{"output_id": move.output_id, "job_id": move.job_id, "location": move.old} for move in changed],
        )
    return {move.output_id for move in changed}


def old_files_after(connection: Connection, after: int, *, limit: int) -> Sequence[Row[Any]]:
    """Return old files with ids above `after`, in order.

    The columns `status`, `new_location`, `size_bytes` and `sha256` are those of the output; without one they are None.
    """
    columns = (outputs.c.status, outputs.c.location.label("new_location"), outputs.c.size_bytes, outputs.c.sha256)
    query = (
        select(moved_files, *columns)
        .outerjoin(outputs, outputs.c.id == moved_files.c.output_id)
        .where(moved_files.c.id > after)
        .order_by(moved_files.c.id)
        .limit(limit)
    )
    return connection.execute(query).all()


def count_old_files(connection: Connection) -> int:
    """Return the number of old files that are not removed yet."""
    return int(connection.execute(select(func.count()).select_from(moved_files)).scalar_one())


def forget_old_files(connection: Connection, ids: Collection[int]) -> None:
    """Delete the rows of old files that are removed, or that are needed again."""
    connection.execute(delete(moved_files).where(moved_files.c.id.in_(ids)))


def output_places(connection: Connection, output_ids: Collection[int]) -> dict[int, tuple[str, str | None]]:
    """Return state and location of the outputs that exist, by id."""
    query = select(outputs.c.id, outputs.c.status, outputs.c.location).where(outputs.c.id.in_(output_ids))
    return {row.id: (row.status, row.location) for row in connection.execute(query)}
