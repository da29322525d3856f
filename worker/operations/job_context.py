"""A job and everything in the database that explains it, read in one transaction."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from worker.core.lifecycle import ORDER_STATES
from worker.core.pacing.policy import PacedJob, PaceModel
from worker.operations.overview import finite_seconds
from worker.polling.duration_learner import read_models
from worker.settings import Settings
from worker.store.candidates import candidates_of
from worker.store.late_looks import look_of
from worker.store.orders import QueuePlace, order_row, queue_place
from worker.store.promises import promise_row
from worker.store.reports.order_state import AccountOrders
from worker.store.reports.snapshot_rows import count_due_before
from worker.store.reports.work_state import AccountState, WorkState, read_work_state

MAX_JOBS_AHEAD = 10_000  # jobs counted in front of this one


@dataclass(frozen=True, slots=True)
class Finding:
    """One check of an explanation: what was checked (`step`), its state in one or two words, and the numbers.

    `advice` says what to do. It is `None` where this check does not block the job.
    """

    step: str
    state: str
    detail: str
    advice: str | None = None


@dataclass(frozen=True, slots=True)
class ReadyEstimate:
    """The estimate for one waiting job: the chances that it is ready now and at its next poll.

    `median` and `p90` are the seconds from now until half and 90 % of the jobs of this kind are ready. `by` says
    whether the estimate uses the job's `age` or its `eta`.
    """

    chance_now: float
    chance_then: float
    median: float | None
    p90: float | None
    by: str
    jobs: float


@dataclass(frozen=True, slots=True)
class JobContext:
    """A job and everything in the database that it depends on. `work` is the state of its account's work."""

    job: Row[Any]
    outputs: Sequence[Row[Any]]
    events: Sequence[Row[Any]]
    work: WorkState
    model: PaceModel
    jobs_ahead: int
    settings: Settings
    promise: Row[Any] | None = None
    late_look: Row[Any] | None = None
    order: Row[Any] | None = None
    place: QueuePlace | None = None
    candidates: Sequence[Row[Any]] = ()

    @property
    def tries_promised_links(self) -> bool:
        """Whether the outputs are promised links, which no answer has listed."""
        return self.promise is not None and self.promise.end_status is not None

    @property
    def now(self) -> datetime:
        """The database's time when the context was read."""
        return self.work.now

    @property
    def account_state(self) -> AccountState:
        """The state of the job's account."""
        default = AccountState(self.job.account, None, None, None, self.settings.rps(self.job.account))
        return next((state for state in self.work.accounts if state.account == self.job.account), default)

    @property
    def account_orders(self) -> AccountOrders:
        """The orders and slots of the job's account."""
        return self.work.orders.of(self.job.account, self.settings.slots(self.job.account))

    @property
    def rate(self) -> float:
        """The requests per second that the account may make."""
        return self.account_state.rps

    @property
    def estimate(self) -> ReadyEstimate | None:
        """The estimate of a pending job, or `None` for a job that is held or not pending."""
        job, model = self.job, self.model
        if job.status != "pending" or job.held_at is not None:
            return None
        waiting = PacedJob.at(self.now, job)
        due = max((job.due_at - job.submitted_at).total_seconds(), waiting.not_ready_age)
        clock, _, _ = model.clock(waiting)
        return ReadyEstimate(
            chance_now=round(model.chance(waiting, waiting.age), 3),
            chance_then=round(model.chance(waiting, due), 3),
            median=finite_seconds(model.quantile(waiting, 0.5) - waiting.age),
            p90=finite_seconds(model.quantile(waiting, 0.9) - waiting.age),
            by="age" if clock is model.by_age else "eta",
            jobs=clock.moments.count,
        )

    def seconds_since(self, moment: datetime) -> float:
        """Return the seconds since a moment. The result is negative for a moment in the future."""
        return (self.now - moment).total_seconds()


def read_context(
    connection: Connection, job: Row[Any], outputs: Sequence[Row[Any]], events: Sequence[Row[Any]], settings: Settings
) -> JobContext:
    """Read everything from the database that explains a job."""
    work = read_work_state(connection, settings.rps, settings.slots, accounts=[job.account])
    waits = job.due_at is not None
    order = order_row(connection, job.id)
    waits_in_queue = order is not None and order.queue is not None and not order.takes_slot
    return JobContext(
        job=job,
        outputs=outputs,
        events=events,
        work=work,
        model=read_models(connection, [(job.account, job.kind)])[job.account, job.kind][0],
        jobs_ahead=(
            count_due_before(connection, work.groups, job, now=work.now, limit=MAX_JOBS_AHEAD + 1) if waits else 0
        ),
        settings=settings,
        promise=promise_row(connection, job.id),
        late_look=look_of(connection, job.id),
        order=order,
        candidates=candidates_of(connection, job.id) if job.status in ORDER_STATES else (),
        place=queue_place(connection, order, now=work.now) if order is not None and waits_in_queue else None,
    )
