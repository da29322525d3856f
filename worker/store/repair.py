"""Repair rows in states that the code never leaves behind. A restore, a manual UPDATE or a lost write can cause them.

- A job is downloading, but all its outputs are final, or it has none. The job is finished.
- An output is pending, but its job is cancelled. The output is cancelled too. If the job ended in another way, the
  output is downloaded as usual, because it is paid for.
- A job is ordered and its order is missing: the job fails. Or its order is in no queue: the order waits again.
- A job is uncertain and its order waits in the queue: the order is taken out, so that it is not sent twice.
- A claim ends later than any lease can. It is released, and the row is due again; of an order, the lease ends now.

A pending row without a due time can't exist, because the tables' constraints refuse it. Each run reads one page of an
index and remembers where it stopped, so its cost does not grow with the number of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Engine, and_, or_, select, update

from worker.core.lifecycle import ORDER_STATES
from worker.store.counters import Tally
from worker.store.engine import SNAPSHOT, database_now
from worker.store.jobs import cancel_outputs, finish_job_if_done
from worker.store.orders import order_again
from worker.store.schema import events, jobs, orders, outputs
from worker.store.transitions import NO_CLAIM, ORDER_DONE, job_ended

PAGE = 2_500  # index rows per run
LONGEST_CLAIM = timedelta(hours=2)  # RECOVERY_SECONDS, the length of a lease, is at most one hour


@dataclass(frozen=True, slots=True)
class Repaired:
    """The jobs that became final, and the numbers of cancelled outputs, released claims and corrected orders."""

    jobs: tuple[int, ...] = ()
    outputs: int = 0
    claims: int = 0
    orders: int = 0


@dataclass(frozen=True, slots=True)
class _Broken:
    jobs: Sequence[int]
    outputs: Sequence[int]
    claims: bool
    orders: Sequence[int]


class Repairer:
    """Searches for such rows page by page and repairs them. Not thread-safe."""

    def __init__(self, engine: Engine, *, page: int = PAGE) -> None:
        self._engine = engine
        self._reading = engine.execution_options(**{SNAPSHOT: True})  # locks nothing
        self._page = page
        self._job = 0
        self._output: tuple[datetime, int] | None = None
        self._ordered: dict[str, int] = dict.fromkeys(ORDER_STATES, 0)

    def run(self) -> Repaired:
        """Read the next page of each index and repair its rows. Raises the database's errors."""
        with self._reading.connect() as connection:
            broken = _Broken(
                self._downloading(connection),
                self._waiting(connection),
                _overlong(connection, database_now(connection)),
                [job_id for state in ORDER_STATES for job_id in self._broken_orders(connection, state)],
            )
        if not (broken.jobs or broken.outputs or broken.claims or broken.orders):
            return Repaired()
        with self._engine.begin() as connection:
            now = database_now(connection)
            tally = Tally()
            claims = _release_overlong(connection, now) if broken.claims else 0
            ended = [
                job_id
                for job_id in _locked(connection, broken.jobs)
                if finish_job_if_done(connection, job_id, tally, now=now)
            ]
            cancelled = cancel_outputs(connection, outputs.c.id.in_(broken.outputs)) if broken.outputs else 0
            failed, corrected = _repair_orders(connection, broken.orders, tally, now)
            tally.write(connection)
        return Repaired((*ended, *failed), cancelled, claims, corrected)

    def _downloading(self, connection: Connection) -> list[int]:
        """Return the downloading jobs of the next page that have no pending output."""
        waiting = (
            select(outputs.c.position)
            .where(outputs.c.job_id == jobs.c.id, outputs.c.status == "pending")
            .order_by(outputs.c.job_id, outputs.c.position)  # uses the index, whatever statistics the planner has
            .limit(1)
            .scalar_subquery()
        )
        page = (
            select(jobs.c.id, waiting.label("waiting"))
            .where(jobs.c.status == "downloading", jobs.c.id > self._job)
            .order_by(jobs.c.id)
            .limit(self._page)
        )
        rows = connection.execute(page).all()
        self._job = rows[-1].id if len(rows) == self._page else 0
        return [row.id for row in rows if row.waiting is None]

    def _waiting(self, connection: Connection) -> list[int]:
        """Return the pending outputs of the next page whose job is cancelled."""
        after = self._output
        key: tuple[ColumnElement[bool], ...] = (outputs.c.due_at.is_not(None),)
        if after is not None:
            due_at, output_id = after
            later = or_(outputs.c.due_at > due_at, and_(outputs.c.due_at == due_at, outputs.c.id > output_id))
            key = (outputs.c.due_at >= due_at, later)
        page = select(outputs.c.id, outputs.c.job_id, outputs.c.due_at).where(*key)
        rows = connection.execute(page.order_by(outputs.c.due_at, outputs.c.id).limit(self._page)).all()
        self._output = (rows[-1].due_at, rows[-1].id) if len(rows) == self._page else None
        of_jobs = select(jobs.c.id).where(jobs.c.id.in_({row.job_id for row in rows}), jobs.c.status == "cancelled")
        cancelled = set(connection.execute(of_jobs).scalars()) if rows else set()
        return [row.id for row in rows if row.job_id in cancelled]

    def _broken_orders(self, connection: Connection, state: str) -> list[int]:
        """Return the jobs of the next page in this state whose order does not fit."""
        page = _WITH_ORDERS.where(jobs.c.status == state, jobs.c.id > self._ordered[state]).order_by(jobs.c.id)
        rows = connection.execute(page.limit(self._page)).all()
        self._ordered[state] = rows[-1].id if len(rows) == self._page else 0
        return [row.id for row in rows if _order_fault(row) is not None]


_WITH_ORDERS = select(
    jobs.c.id,
    jobs.c.account,
    jobs.c.kind,
    jobs.c.status,
    orders.c.id.label("order_id"),
    orders.c.queue,
    orders.c.due_at,
    orders.c.takes_slot,
    orders.c.claim_holder,
).outerjoin(orders, orders.c.id == jobs.c.id)


def _order_fault(row: Any) -> Literal["missing", "unqueued", "queued"] | None:
    """Return what is wrong with the order of an ordered or uncertain job."""
    if row.status == "uncertain":
        waits = row.queue is not None and not row.takes_slot and row.due_at is not None
        return "queued" if waits else None
    if row.order_id is None:
        return "missing"
    return "unqueued" if row.claim_holder is None and (row.queue is None or row.due_at is None) else None


def _repair_orders(
    connection: Connection, job_ids: Sequence[int], tally: Tally, now: datetime
) -> tuple[list[int], int]:
    """Repair the orders that still do not fit. Return the jobs that failed, and the number of corrected orders."""
    if not job_ids:
        return [], 0
    locked = _WITH_ORDERS.where(jobs.c.id.in_(job_ids), jobs.c.status.in_(ORDER_STATES)).order_by(jobs.c.id)
    rows = connection.execute(locked.with_for_update(of=jobs, skip_locked=True)).all()
    by_fault: dict[str | None, list[Any]] = {}
    for row in rows:
        by_fault.setdefault(_order_fault(row), []).append(row)
    missing = by_fault.get("missing", [])
    if missing:
        message = "its order is missing in the database: order it again"
        values = job_ended("failed", now) | {"error_code": "refused", "error_message": message}
        connection.execute(update(jobs).where(jobs.c.id.in_([row.id for row in missing])).values(values))
    for row in missing:
        tally.finished(row.account, row.kind, "failed")
    unqueued = [row.id for row in by_fault.get("unqueued", [])]
    if unqueued:
        order_again(connection, unqueued, now=now)
    queued = [row.id for row in by_fault.get("queued", [])]
    if queued:
        waiting = (orders.c.id.in_(queued), orders.c.takes_slot.is_(False))
        connection.execute(update(orders).where(*waiting).values(ORDER_DONE))
    return [row.id for row in missing], len(unqueued) + len(queued)


def _locked(connection: Connection, job_ids: Sequence[int]) -> list[int]:
    """Lock the jobs that are still downloading, and return their ids. Jobs that are locked already are skipped."""
    if not job_ids:
        return []
    query = select(jobs.c.id).where(jobs.c.id.in_(job_ids), jobs.c.status == "downloading").order_by(jobs.c.id)
    return list(connection.execute(query.with_for_update(skip_locked=True)).scalars())


def _overlong(connection: Connection, now: datetime) -> bool:
    claims = [
        select(table.c.id)
        .where(table.c.claim_holder.is_not(None), table.c.due_at > now + LONGEST_CLAIM)
        .order_by(table.c.claim_holder)  # uses the index, which contains only claimed rows
        .limit(1)
        .scalar_subquery()
        for table in (jobs, outputs, events, orders)
    ]
    return any(claim is not None for claim in connection.execute(select(*claims)).one())


def _release_overlong(connection: Connection, now: datetime) -> int:
    """Release overlong claims. The lease of an order ends now; the next sweep knows whether it was sent."""
    released = {jobs: NO_CLAIM, outputs: NO_CLAIM, events: NO_CLAIM, orders: {}}
    return sum(
        connection.execute(
            update(table)
            .where(table.c.claim_holder.is_not(None), table.c.due_at > now + LONGEST_CLAIM)
            .values(due_at=now, **values)
        ).rowcount
        for table, values in released.items()
    )
