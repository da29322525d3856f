"""Repairs: rows in a state that no step of ours leaves behind. A restore, an UPDATE by hand or a lost write may.

- A job that is downloading though all its outputs are final, or though it has none: it ends.
- An output that waits though its job is cancelled: it is cancelled, too. (Where the job ended otherwise, the output is
  paid for: it is downloaded like any other, and ends by itself.)
- A claim that lasts longer than any lease: nobody renews it, so the row is due again.

A row in a waiting state without a due time can't exist: the tables' constraints refuse it. Each look reads one page of
an index and remembers where it stopped. So it costs the same with a thousand rows as with a million.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, Engine, and_, or_, select, update

from worker.store.counters import Tally
from worker.store.engine import SNAPSHOT, database_now
from worker.store.jobs import cancel_outputs, finish_job_if_done
from worker.store.schema import events, jobs, outputs

PAGE = 500  # rows of an index per look
LONGEST_CLAIM = timedelta(hours=2)  # RECOVERY_SECONDS, the length of a lease, is an hour at most


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was repaired: jobs that became final, and how many outputs and claims."""

    jobs: tuple[int, ...] = ()
    outputs: int = 0
    claims: int = 0


@dataclass(frozen=True, slots=True)
class _Broken:
    jobs: Sequence[int]
    outputs: Sequence[int]
    claims: bool


class Repairer:
    """Looks for such rows page by page, and repairs them. For one thread at a time."""

    def __init__(self, engine: Engine, *, page: int = PAGE) -> None:
        self._engine = engine
        self._reading = engine.execution_options(**{SNAPSHOT: True})  # it locks nothing
        self._page = page
        self._job = 0
        self._output: tuple[datetime, int] | None = None

    def run(self) -> Repaired:
        """Look at the next page of each index and repair what is wrong there. Raises what the database raises."""
        with self._reading.connect() as connection:
            broken = _Broken(
                self._downloading(connection),
                self._waiting(connection),
                _overlong(connection, database_now(connection)),
            )
        if not (broken.jobs or broken.outputs or broken.claims):
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
            tally.write(connection)
        return Repaired(tuple(ended), cancelled, claims)

    def _downloading(self, connection: Connection) -> list[int]:
        """Return jobs of the next page that are downloading while none of their outputs waits."""
        waiting = (
            select(outputs.c.position)
            .where(outputs.c.job_id == jobs.c.id, outputs.c.status == "pending")
            .order_by(outputs.c.job_id, outputs.c.position)  # by its index, whatever the planner knows of the table
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
        """Return outputs of the next page that wait while their job is cancelled."""
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


def _locked(connection: Connection, job_ids: Sequence[int]) -> list[int]:
    """Lock those of the jobs that are still downloading; one that somebody else has locked is left to the next look."""
    if not job_ids:
        return []
    query = select(jobs.c.id).where(jobs.c.id.in_(job_ids), jobs.c.status == "downloading").order_by(jobs.c.id)
    return list(connection.execute(query.with_for_update(skip_locked=True)).scalars())


def _overlong(connection: Connection, now: datetime) -> bool:
    claims = [
        select(table.c.id)
        .where(table.c.claim_holder.is_not(None), table.c.due_at > now + LONGEST_CLAIM)
        .order_by(table.c.claim_holder)  # by its index, which has the claimed rows alone
        .limit(1)
        for table in (jobs, outputs, events)
    ]
    return any(connection.execute(query).first() for query in claims)


def _release_overlong(connection: Connection, now: datetime) -> int:
    return sum(
        connection.execute(
            update(table)
            .where(table.c.claim_holder.is_not(None), table.c.due_at > now + LONGEST_CLAIM)
            .values(due_at=now, claim_token=None, claim_holder=None)
        ).rowcount
        for table in (jobs, outputs, events)
    )
