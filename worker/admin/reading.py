"""What the pages read: short transactions on the worker's own tables, each over before anything is sent."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Connection, Engine, Row

from worker.coordination.rate_limiter import RateLimiter
from worker.core.answer_history import AnswerNote, parse_history
from worker.core.circuit_breaker import CircuitBreaker
from worker.operations.explain import Finding, read_context, read_explanation
from worker.operations.overview import Overview, overview, ready_estimate, why
from worker.operations.snapshot import Snapshot, SnapshotReader
from worker.settings import Settings
from worker.store.breakers import all_breakers
from worker.store.engine import database_now, engine_for, translate_errors
from worker.store.events import events_of
from worker.store.jobs import job_row, outputs_of, waiting_accounts
from worker.store.outputs import output_row
from worker.store.reports.pages import history_at, latest_history

OUTPUTS_SHOWN = 200
RATES_FRESH = timedelta(minutes=3)


@dataclass(frozen=True, slots=True)
class JobPage:
    """One job as its page shows it."""

    job: Row[Any]
    why: str
    now: datetime
    outputs: list[Row[Any]]
    events: list[Row[Any]]
    answers: list[AnswerNote]
    likely: str
    findings: list[Finding]
    advice: str


@dataclass(frozen=True, slots=True)
class BreakerState:
    """An account or a host, whether it is held, its requests per second, and whether jobs wait for it."""

    breaker: CircuitBreaker
    held: bool
    rps: float
    waiting: bool
    now: datetime


@dataclass(frozen=True, slots=True)
class Reading:
    """The database as the pages see it."""

    settings: Settings

    @property
    def engine(self) -> Engine:
        """This process's engine."""
        return engine_for(self.settings.database)

    @contextmanager
    def connection(self) -> Iterator[tuple[Connection, datetime]]:
        """A transaction, and the database's time. Raises SchemaOutdated, Unavailable."""
        with translate_errors(self.settings.database), self.engine.connect() as connection:
            yield connection, database_now(connection)

    def job(self, job_id: int) -> JobPage | None:
        """A job with all that belongs to it, or None."""
        with self.connection() as (connection, now):
            job = job_row(connection, job_id)
            if job is None:
                return None
            settings = self.as_the_workers([job.account])
            outputs, events = outputs_of(connection, [job_id]), events_of(connection, job_id)
            believed = ready_estimate(connection, job)
            said = why(connection, job, outputs, settings)
            context = read_context(connection, job, outputs, events, settings)
        explanation = read_explanation(context, _budget(settings.redis))
        return JobPage(
            job=job,
            why=said,
            now=now,
            outputs=list(outputs[:OUTPUTS_SHOWN]),
            events=list(events),
            answers=parse_history(job.last_answer),
            likely="" if believed is None else f"{believed.chance_now:.0%}",
            findings=explanation.findings,
            advice=explanation.advice,
        )

    def output(self, output_id: int) -> Row[Any] | None:
        """One output, or None."""
        with self.connection() as (connection, _):
            return output_row(connection, output_id)

    def breakers(self) -> list[BreakerState]:
        """Every account and host that anything is known of, those that are held first."""
        with self.connection() as (connection, now):
            known = all_breakers(connection)
            waiting = waiting_accounts(connection)
            rates = _rates(connection, now)
        for name in waiting:
            known.setdefault(("account", name), CircuitBreaker("account", name))
        states = [
            BreakerState(
                breaker,
                breaker.held(now),
                rates.get(breaker.name, breaker.rate(self.settings.rps(breaker.name), now)),
                breaker.name in waiting,
                now,
            )
            for breaker in known.values()
        ]
        return sorted(states, key=lambda state: (not state.held, state.breaker.scope, state.breaker.name))

    def overview(self) -> Overview:
        """How everything stands."""
        with self.connection() as (connection, _):
            return overview(connection, self.as_the_workers(waiting_accounts(connection)))

    def snapshot(self) -> Snapshot:
        """What `top` shows: the troubles that there are."""
        with self.connection() as (connection, _):
            accounts = waiting_accounts(connection)
        return SnapshotReader(self.engine, self.as_the_workers(accounts)).read()

    def as_the_workers(self, accounts: Iterable[str]) -> Settings:
        """The settings with a key for these accounts, where this process has none.

        It needs none, so it can't tell which accounts have one in the workers' environment, and must not say.
        """
        if self.settings.keys:
            return self.settings
        stand_ins = SecretStr(json.dumps(dict.fromkeys(accounts, "in the environment of the workers")))
        same = self.settings.model_copy(update={"sd_api_keys": stand_ins, "sd_api_keys_file": None})
        same.__dict__.pop("keys", None)  # read already, and copied
        return same


@cache
def _budget(redis_url: str) -> RateLimiter:
    return RateLimiter(redis_url)


def _rates(connection: Connection, now: datetime) -> dict[str, float]:
    """Requests per second in force, by account, as the workers wrote them down just now: their settings decide."""
    latest = latest_history(connection)
    if latest is None or now - latest > RATES_FRESH:
        return {}
    (row,) = history_at(connection, [latest])
    return {name: float(state["rps"]) for name, state in json.loads(row.body).get("accounts", {}).items()}
