"""Overview of all jobs, accounts and outputs, with the troubles and the learned paces."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from worker.core.lifecycle import JOB_STATES
from worker.core.pacing.policy import PaceModel
from worker.core.pacing.survival import MAX_POLL_AGE
from worker.operations.troubles import Evidence, Trouble, read_evidence, read_troubles
from worker.operations.unstored import UnstoredOutputs
from worker.polling.duration_learner import read_models
from worker.settings import Settings
from worker.store.jobs import count_by_state
from worker.store.paces import newest_paces
from worker.store.reports.order_state import AccountOrders
from worker.store.reports.work_state import WorkState

MAX_KINDS = 50  # the most recently updated kinds


@dataclass(frozen=True, slots=True)
class KindState:
    """The learned pace of one kind of an account's jobs. Times are in seconds.

    `median` and `p90` are the ages at which half and 90 % of the jobs are ready, or `None` if fewer ever become ready.
    `expected` and `ready` are shares of the recent requests: those predicted to find the job ready, and those that did.
    `planned_delay` and `seen_delay` are the mean times from ready to seen, as planned and as measured.
    """

    account: str
    kind: str
    jobs: float
    median: float | None
    p90: float | None
    expected: float
    ready: float
    planned_delay: float
    seen_delay: float


@dataclass(frozen=True, slots=True)
class Overview:
    """The state of all jobs, accounts and outputs, and the troubles, worst first."""

    jobs: Mapping[str, int]
    evidence: Evidence
    troubles: Sequence[Trouble]
    settings: Settings

    @property
    def work(self) -> WorkState:
        """The state of accounts, hosts, processes and due work."""
        return self.evidence.work

    def orders_of(self, account: str) -> AccountOrders:
        """Return the orders of an account, and its slots."""
        return self.work.orders.of(account, self.settings.slots(account))

    @property
    def unstored(self) -> UnstoredOutputs:
        """The outputs that are not stored yet."""
        return self.evidence.unstored


def overview(
    connection: Connection,
    settings: Settings,
    count_jobs: Callable[[Connection], Mapping[str, int]] = count_by_state,
) -> Overview:
    """Read the state of all jobs, accounts and outputs."""
    evidence = read_evidence(connection, settings)
    job_counts = count_jobs(connection)
    return Overview(
        jobs={state: job_counts.get(state, 0) for state in JOB_STATES},
        evidence=evidence,
        troubles=read_troubles(connection, settings, evidence),
        settings=settings,
    )


def read_kinds(connection: Connection) -> list[KindState]:
    """Return the learned paces of the kinds that were updated last."""
    classes = sorted((row.account, row.kind) for row in newest_paces(connection, limit=MAX_KINDS))
    return [_kind(account, kind, read[0]) for (account, kind), read in read_models(connection, classes).items()]


def _kind(account: str, kind: str, model: PaceModel) -> KindState:
    requests = max(model.polls, 1e-9)
    return KindState(
        account=account,
        kind=kind,
        jobs=model.by_age.moments.count,
        median=finite_seconds(model.by_age.quantile(0.0, 0.5)),
        p90=finite_seconds(model.by_age.quantile(0.0, 0.9)),
        expected=round(model.expected_ready / requests, 3),
        ready=round(model.found_ready / requests, 3),
        planned_delay=round(model.planned_delay, 2),
        seen_delay=round(model.actual_delay, 2),
    )


def finite_seconds(seconds: float) -> float | None:
    """Return a number of seconds from now, at least 0, or `None` for never."""
    return round(max(seconds, 0.0), 1) if seconds < MAX_POLL_AGE else None
