"""The queries of the pages: short transactions, each committed before the page is rendered."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import Connection, Engine, Row

from worker.coordination.rate_limiter import RateLimiter
from worker.core.answer_history import AnswerNote, parse_history
from worker.core.circuit_breaker import CircuitBreaker
from worker.operations.explain import read_explanation, why
from worker.operations.job_context import Finding, read_context
from worker.operations.lost_work import lost_claims
from worker.operations.order_findings import order_document, shown_order
from worker.operations.overview import Overview, overview
from worker.operations.snapshot import LostClaimNow, OverdueJob
from worker.operations.snapshot_reader import lost_now, overdue_now
from worker.settings import Settings
from worker.store.audit import actions_of
from worker.store.engine import database_now, engine_for, translate_errors
from worker.store.events import events_of
from worker.store.jobs import job_row, outputs_of
from worker.store.outputs import output_row
from worker.store.reports.history import answered_lately
from worker.store.reports.order_state import AccountOrders
from worker.store.reports.recent_counts import RecentCounts
from worker.store.reports.work_state import WorkState, read_work_state

OUTPUTS_SHOWN = 200
PROBLEMS_SHOWN = 20  # of each kind, on the overview


@dataclass(frozen=True, slots=True)
class JobPage:
    """The data of the page of one job."""

    job: Row[Any]
    why: str
    now: datetime
    outputs: list[Row[Any]]
    events: list[Row[Any]]
    actions: list[Row[Any]]
    answers: list[AnswerNote]
    likely: str
    findings: list[Finding]
    advice: str
    order: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class BreakerState:
    """An account or host: its circuit breaker, its hold, and the requests per second that it may get and got lately.

    `orders` is None for a host, and for an account that never had an order.
    """

    breaker: CircuitBreaker
    held: bool
    reason: str | None
    since: datetime | None
    rps: float
    asked: float | None
    orders: AccountOrders | None
    now: datetime


@dataclass(frozen=True, slots=True)
class StartPage:
    """The data of the overview page. `claims` and `overdue` are the first ones."""

    overview: Overview
    held: list[BreakerState]
    claims: list[LostClaimNow]
    overdue: list[OverdueJob]


@dataclass(frozen=True, slots=True)
class AdminReader:
    """Reads the data of the pages."""

    settings: Settings
    count_jobs: RecentCounts = field(default_factory=RecentCounts)

    @property
    def engine(self) -> Engine:
        """The engine of this process."""
        return engine_for(self.settings.database)

    @contextmanager
    def connection(self) -> Iterator[tuple[Connection, datetime]]:
        """Open a transaction and read the time of the database. Raises SchemaOutdated and Unavailable."""
        with translate_errors(self.settings.database), self.engine.connect() as connection:
            yield connection, database_now(connection)

    def job(self, job_id: int) -> JobPage | None:
        """Return a job with its outputs, events and explanation, or `None`."""
        with self.connection() as (connection, now):
            job = job_row(connection, job_id)
            if job is None:
                return None
            outputs, events = outputs_of(connection, [job_id]), events_of(connection, job_id)
            actions = actions_of(connection, job_id)
            context = read_context(connection, job, outputs, events, self.settings)
        order = order_document(context)
        explanation = read_explanation(context, _rate_limiter(self.settings.redis))
        return JobPage(
            job=job,
            why=why(context),
            now=now,
            outputs=list(outputs[:OUTPUTS_SHOWN]),
            events=list(events),
            actions=list(actions),
            answers=parse_history(job.last_answer),
            likely="" if context.estimate is None else f"{context.estimate.chance_now:.0%}",
            findings=explanation.findings,
            advice=explanation.advice,
            order=None if order is None else shown_order(order),
        )

    def output(self, output_id: int) -> Row[Any] | None:
        """Return an output, or `None`."""
        with self.connection() as (connection, _):
            return output_row(connection, output_id)

    def breakers(self) -> list[BreakerState]:
        """Return all accounts and hosts, held ones first."""
        with self.connection() as (connection, now):
            work = read_work_state(connection, self.settings.rps, self.settings.slots)
            return _breaker_states(work, answered_lately(connection, now=now))

    def start(self) -> StartPage:
        """Read the data of the overview page."""
        with self.connection() as (connection, _):
            state = overview(connection, self.settings, self.count_jobs)
            now, dead = state.work.now, state.evidence.dead_holders
            claims = lost_claims(connection, self.settings, now, dead=dead)
        return StartPage(
            overview=state,
            held=[breaker for breaker in _breaker_states(state.work, {}) if breaker.held],
            claims=[lost_now(claim, dead, now) for claim in claims[:PROBLEMS_SHOWN]],
            overdue=[overdue_now(row, now) for row in state.evidence.overdue[:PROBLEMS_SHOWN]],
        )


def _breaker_states(work: WorkState, asked: Mapping[str, float]) -> list[BreakerState]:
    """Return all accounts and hosts, held ones first."""
    accounts = {state.account: state for state in work.accounts}
    breakers = {("account", name): CircuitBreaker("account", name) for name in accounts} | dict(work.breakers)
    states = []
    for breaker in breakers.values():
        account = accounts.get(breaker.name) if breaker.scope == "account" else None
        states.append(
            BreakerState(
                breaker=breaker,
                reason=breaker.why if account is None else account.reason,
                since=breaker.held_since if account is None else account.since,
                held=breaker.held(work.now) or (account is not None and account.reason is not None),
                rps=0.0 if account is None else account.rps,
                asked=asked.get(breaker.name, 0.0) if account is not None and asked else None,
                orders=work.orders.accounts.get(breaker.name) if breaker.scope == "account" else None,
                now=work.now,
            )
        )
    return sorted(states, key=lambda state: (not state.held, state.breaker.scope, state.breaker.name))


@cache
def _rate_limiter(redis_url: str) -> RateLimiter:
    return RateLimiter(redis_url)
