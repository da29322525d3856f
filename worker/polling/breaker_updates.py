"""Updates the circuit breakers with the answers of polls."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Protocol

from sqlalchemy import Connection

from worker.coordination.rate_limiter import RateLimiter
from worker.core import circuit_breaker
from worker.core.circuit_breaker import BreakerInput, CircuitBreaker, RateMeasurement, Scope
from worker.core.identity import FetchAddress
from worker.core.reply import ApiDown, Processing, RateLimited, Reply
from worker.polling.request_pool import PollAnswer
from worker.store.breakers import locked_breaker, save_breaker

log = logging.getLogger(__name__)


class AddressedJob(Protocol):
    """What an answer is about: a job or an order of an account, at the host of its address."""

    @property
    def account(self) -> str:
        """The account whose key was used."""
        ...

    @property
    def address(self) -> FetchAddress:
        """The address, of which only the host counts here."""
        ...


class BreakerAnswer(Protocol):
    """An answer, when its request was sent by the monotonic clock, and whether it was a probe."""

    @property
    def job(self) -> AddressedJob:
        """What the answer is about."""
        ...

    @property
    def reply(self) -> Reply:
        """Its meaning."""
        ...

    @property
    def probe(self) -> bool:
        """Whether the request was a probe."""
        ...

    @property
    def sent(self) -> float:
        """When the request was sent."""
        ...


Breakers = dict[tuple[Scope, str], CircuitBreaker]


def count_accepted(budget: RateLimiter, answers: Sequence[BreakerAnswer]) -> dict[str, float]:
    """Count the requests that the API accepted. Return how many per second it accepts of each account."""
    accepted: Counter[str] = Counter()
    for answer in answers:
        accepted[answer.job.account] += not isinstance(answer.reply, (RateLimited, ApiDown))
    return {account: budget.count_accepted(account, count) for account, count in accepted.items()}


def mark_own_path_error(answer: PollAnswer, default_address: Callable[[str], FetchAddress]) -> PollAnswer:
    """Mark a 404 about a path that only this job uses as an answer about the job: the host itself works.

    If the API has answered "not ready" at that path before, the path is right and the host has a problem.
    """
    reply, job = answer.reply, answer.job
    if not isinstance(reply, ApiDown) or not reply.no_such_path or job.not_ready_at is not None:
        return answer
    if job.address.base == default_address(job.remote_id).base:
        return answer
    return answer._replace(reply=replace(reply, answered=True))


def update_breakers(
    connection: Connection,
    answers: Sequence[BreakerAnswer],
    known_breakers: Breakers,
    rps: Callable[[str], float],
    accepted_rates: Mapping[str, float],
    *,
    now: datetime,
) -> Breakers:
    """Update the circuit breakers with these answers. Return the changed ones. A row is locked only if it changes.

    `known_breakers` has the breakers as they were read last. `rps` returns the configured rate of an account, and
    `accepted_rates` has the requests per second that the API accepts of it.
    """
    changed: Breakers = {}
    for (scope, name), breaker_answers in sorted(_answers_by_breaker(answers).items()):
        inputs = [
            BreakerInput(answer.reply, now - timedelta(seconds=time.monotonic() - answer.sent), answer.probe)
            for answer in breaker_answers
        ]
        rates = RateMeasurement(rps(name), accepted_rates.get(name, 0.0))
        breaker = known_breakers.get((scope, name))
        if breaker is None or circuit_breaker.after_replies(breaker, inputs, rates, now=now) != breaker:
            locked = locked_breaker(connection, scope, name)
            breaker = circuit_breaker.after_replies(locked, inputs, rates, now=now)
            save_breaker(connection, breaker)
            _log_hold(locked, breaker, now)
            changed[scope, name] = breaker
    return changed


def _answers_by_breaker(answers: Sequence[BreakerAnswer]) -> dict[tuple[Scope, str], list[BreakerAnswer]]:
    """Return the answers that concern each circuit breaker. Of equal consecutive "not ready" answers one is enough."""
    by_breaker: dict[tuple[Scope, str], list[BreakerAnswer]] = {}
    for answer in answers:
        keys: tuple[tuple[Scope, str], ...] = (("account", answer.job.account), ("host", answer.job.address.host))
        for key in keys:
            breaker_answers = by_breaker.setdefault(key, [])
            repeated = (
                breaker_answers
                and not answer.probe
                and type(breaker_answers[-1].reply) is type(answer.reply) is Processing
            )
            if not repeated:
                breaker_answers.append(answer)
    return by_breaker


def _log_hold(before: CircuitBreaker, after: CircuitBreaker, now: datetime) -> None:
    if after.held(now) and not before.held(now):
        log.warning("held scope=%s name=%s reason=%s", after.scope, after.name, after.why)
        if after.ceiling is not None and after.ceiling != before.ceiling:
            log.warning("slowed account=%s ceiling_per_second=%.1f", after.name, after.ceiling)
    elif before.held(now) and not after.held(now):
        log.warning("resumed scope=%s name=%s", after.scope, after.name)
