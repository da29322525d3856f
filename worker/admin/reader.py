"""The queries of the pages: short transactions, each committed before the page is rendered."""

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
from worker.operations.explain import read_explanation, why
from worker.operations.job_context import Finding, read_context
from worker.operations.overview import Overview, overview
from worker.operations.snapshot import Snapshot
from worker.operations.snapshot_reader import SnapshotReader
from worker.settings import Settings
from worker.store.breakers import all_breakers
from worker.store.engine import database_now, engine_for, translate_errors
from worker.store.events import events_of
from worker.store.jobs import job_row, outputs_of, waiting_accounts
from worker.store.outputs import output_row
from worker.store.reports.history import history_at, latest_history

OUTPUTS_SHOWN = 200
RATES_FRESH = timedelta(minutes=3)


@dataclass(frozen=True, slots=True)
class JobPage:
    """The data of the page of one job."""

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
    """An account or host: its circuit breaker, whether it is held, its requests per second, and whether jobs wait."""

    breaker: CircuitBreaker
    held: bool
    rps: float
    waiting: bool
    now: datetime


@dataclass(frozen=True, slots=True)
class AdminReader:
    """Reads the data of the pages."""

    settings: Settings

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
            settings = self.with_placeholder_keys([job.account])
            outputs, events = outputs_of(connection, [job_id]), events_of(connection, job_id)
            context = read_context(connection, job, outputs, events, settings)
        explanation = read_explanation(context, _rate_limiter(settings.redis))
        return JobPage(
            job=job,
            why=why(context),
            now=now,
            outputs=list(outputs[:OUTPUTS_SHOWN]),
            events=list(events),
            answers=parse_history(job.last_answer),
            likely="" if context.estimate is None else f"{context.estimate.chance_now:.0%}",
            findings=explanation.findings,
            advice=explanation.advice,
        )

    def output(self, output_id: int) -> Row[Any] | None:
        """Return an output, or `None`."""
        with self.connection() as (connection, _):
            return output_row(connection, output_id)

    def breakers(self) -> list[BreakerState]:
        """Return all accounts and hosts, held ones first."""
        with self.connection() as (connection, now):
            breakers = all_breakers(connection)
            waiting = waiting_accounts(connection)
            rates = _rates(connection, now)
        for name in waiting:
            breakers.setdefault(("account", name), CircuitBreaker("account", name))
        states = [
            BreakerState(
                breaker,
                breaker.held(now),
                rates.get(breaker.name, breaker.rate(self.settings.rps(breaker.name), now)),
                breaker.name in waiting,
                now,
            )
            for breaker in breakers.values()
        ]
        return sorted(states, key=lambda state: (not state.held, state.breaker.scope, state.breaker.name))

    def overview(self) -> Overview:
        """Return the state of all jobs and accounts."""
        with self.connection() as (connection, _):
            return overview(connection, self.with_placeholder_keys(waiting_accounts(connection)))

    def snapshot(self) -> Snapshot:
        """Return the snapshot that `top` shows."""
        with self.connection() as (connection, _):
            accounts = waiting_accounts(connection)
        return SnapshotReader(self.engine, self.with_placeholder_keys(accounts)).read()

    def with_placeholder_keys(self, accounts: Iterable[str]) -> Settings:
        """Return the settings, with a placeholder key for these accounts if this process has no keys.

        The admin page needs no keys, so it does not know which accounts have one in the environment of the workers.
        """
        if self.settings.keys:
            return self.settings
        placeholders = SecretStr(json.dumps(dict.fromkeys(accounts, "in the environment of the workers")))
        settings = self.settings.model_copy(update={"sd_api_keys": placeholders, "sd_api_keys_file": None})
        settings.__dict__.pop("keys", None)  # drop the copied cached value
        return settings


@cache
def _rate_limiter(redis_url: str) -> RateLimiter:
    return RateLimiter(redis_url)


def _rates(connection: Connection, now: datetime) -> dict[str, float]:
    """Return the current requests per second by account, as the workers recorded them from their own settings."""
    latest = latest_history(connection)
    if latest is None or now - latest > RATES_FRESH:
        return {}
    (row,) = history_at(connection, [latest])
    return {name: float(state["rps"]) for name, state in json.loads(row.body).get("accounts", {}).items()}
