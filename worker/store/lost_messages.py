"""Lost messages: unsent `on_done` calls of final jobs, and due outputs whose download task is in no queue."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, bindparam, select

from worker.store.claims import outputs_to_queue
from worker.store.on_done import GIVE_UP, due_calls
from worker.store.schema import jobs, outputs

_NOW, _GIVEN_UP_BEFORE, _QUEUED_BEFORE = (
    bindparam(name, type_=jobs.c.due_at.type) for name in ("now", "given_up_before", "queued_before")
)
_LOST = select(
    select(jobs.c.id).where(*due_calls(_NOW, _GIVEN_UP_BEFORE)).exists().label("calls"),
    select(outputs.c.id).where(*outputs_to_queue(_NOW, _QUEUED_BEFORE)).exists().label("outputs"),
)


@dataclass(frozen=True, slots=True)
class LostMessages:
    """Whether there are due calls, and outputs to queue."""

    calls: bool
    outputs: bool


def find_lost_messages(connection: Connection, *, now: datetime, queued_before: datetime) -> LostMessages:
    """Return whether messages are lost. Outputs that were queued after `queued_before` do not count.

    An idle worker asks this all the time, so it is one prepared statement.
    """
    moments = {"now": now, "given_up_before": now - GIVE_UP, "queued_before": queued_before}
    row = connection.execute(_LOST, moments).one()
    return LostMessages(bool(row.calls), bool(row.outputs))
