"""Signs that there is work for a sweep: claims, unsent `on_done` calls, lapsed orders, and outputs in no queue."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, bindparam, or_, select

from worker.store.candidates import has_due_candidates
from worker.store.claims import CLAIMED_TABLES, outputs_to_queue
from worker.store.on_done import GIVE_UP, due_calls
from worker.store.schema import jobs, orders, outputs

_NOW, _GIVEN_UP_BEFORE, _QUEUED_BEFORE = (
    bindparam(name, type_=jobs.c.due_at.type) for name in ("now", "given_up_before", "queued_before")
)
_SIGNS = select(
    or_(*(select(table.c.id).where(table.c.claim_holder.is_not(None)).exists() for table in CLAIMED_TABLES)).label(
        "claims"
    ),
    select(jobs.c.id).where(*due_calls(_NOW, _GIVEN_UP_BEFORE)).exists().label("calls"),
    select(outputs.c.id).where(*outputs_to_queue(_NOW, _QUEUED_BEFORE)).exists().label("outputs"),
    select(orders.c.id).where(orders.c.claim_holder.is_not(None), orders.c.due_at <= _NOW).exists().label("orders"),
    has_due_candidates(_NOW).label("candidates"),
)


@dataclass(frozen=True, slots=True)
class SweepSigns:
    """Whether there are claims, due calls, outputs to queue, and orders whose lease has ended.

    Some of the claims may be of dead processes. `candidates`: the API can be asked about a job that may
    belong to an uncertain order.
    """

    claims: bool
    calls: bool
    outputs: bool
    orders: bool
    candidates: bool


def sweep_signs(connection: Connection, *, now: datetime, queued_before: datetime) -> SweepSigns:
    """Return the signs. Outputs that were queued after `queued_before` do not count.

    An idle worker asks this all the time, so it is one statement.
    """
    moments = {"now": now, "given_up_before": now - GIVE_UP, "queued_before": queued_before}
    row = connection.execute(_SIGNS, moments).one()
    return SweepSigns(*map(bool, row))
