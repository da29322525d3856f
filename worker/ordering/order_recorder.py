"""Records the answers to orders, and keeps each answer in memory until it is written."""

import logging
import random
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError

from worker.core.circuit_breaker import NO_SUCH_PATH
from worker.core.order_reply import (
    AnswerLost,
    OrderNotSent,
    OrderPostponed,
    OrderRefused,
    OrderReply,
    OrderTaken,
    QueueFull,
)
from worker.core.pacing.backlog import OrderBacklog
from worker.core.pacing.policy import PacedJob, PaceModel, PollPlan
from worker.core.reply import AccountRefused, ApiDown, ApiError, Processing, RateLimited, Reply, Unread
from worker.core.slots import after_refusal
from worker.ordering.options import AfterRecording, OrderOptions
from worker.polling.breaker_updates import Breakers, update_breakers
from worker.polling.duration_learner import FRESH_SECONDS, read_models
from worker.store.counters import ORDERS, Tally
from worker.store.engine import database_now
from worker.store.order_results import (
    Locked,
    TakenOrder,
    lock_attempts,
    record_all_taken,
    record_lost,
    record_refused,
    record_taken,
    record_waiting,
)
from worker.store.orders import ClaimedOrder, taken_slots
from worker.store.slots import locked_slots, save_slots

log = logging.getLogger(__name__)

MAX_BATCH = 50  # answers per transaction
MAX_MODELS = 2_000
SOON_SECONDS = 1.0  # a poll run that waits checks for due jobs at least this often
POSTPONED_MOST = 20  # times that the API may postpone an order, over an hour or more; then it counts as refused
MAX_POSTPONED_WAIT = 300.0  # seconds
NOT_SENT_WAIT = 2.0  # seconds; the circuit breaker of the host waits longer after several failures

NAMES: Mapping[type[OrderReply], str] = {
    OrderTaken: "taken",
    OrderRefused: "refused",
    OrderPostponed: "postponed",
    QueueFull: "queue_full",
    RateLimited: "rate_limited",
    AccountRefused: "account_refused",
    OrderNotSent: "not_sent",
    AnswerLost: "uncertain",
}


class OrderAnswer(NamedTuple):
    """The answer to an order: when it was sent by the monotonic clock, and whether it was a probe.

    `reached_api` is False if no request was tried, because the endpoint is refused.
    """

    job: ClaimedOrder
    order_reply: OrderReply
    probe: bool
    sent: float
    reached_api: bool = True

    @property
    def reply(self) -> Reply:
        """The meaning of the answer for the circuit breakers of account and host."""
        if not self.reached_api:
            return Unread("no request was sent")
        match self.order_reply:
            case RateLimited() | AccountRefused() as reply:
                return reply
            case OrderRefused(_, message) | OrderPostponed(message, _):
                return ApiError(message)
            case OrderNotSent(message) | AnswerLost(message):
                return ApiDown(message.replace(NO_SUCH_PATH, "another path"))
            case _:
                return Processing()


class OrderRecorder:
    """Writes the answers to orders of one process. Not thread-safe: call it from the submit loop only."""

    def __init__(
        self,
        engine: Engine,
        options: OrderOptions,
        backlog: OrderBacklog,
        after: AfterRecording,
        rng: random.Random,
    ) -> None:
        self._engine = engine
        self._options = options
        self._backlog = backlog
        self._after = after
        self._rng = rng
        self._answers: list[OrderAnswer] = []
        self._models: dict[tuple[str, str], tuple[PaceModel, float]] = {}

    @property
    def unwritten(self) -> int:
        """How many answers are not written yet."""
        return len(self._answers)

    def take(self, answers: Sequence[OrderAnswer]) -> None:
        """Accept answers for writing."""
        self._answers += answers

    def write(self, breakers: Breakers, accepted_rates: Mapping[str, float]) -> None:
        """Write the accepted answers and update the circuit breakers. Raises the errors of a database that is away."""
        while self._answers:
            batch = self._answers[:MAX_BATCH]
            try:
                self._write_batch(batch, breakers, accepted_rates, alone=False)
            except IntegrityError:  # the API gave the id of another job: each answer is written alone
                for answer in batch:
                    self._write_batch([answer], breakers, accepted_rates, alone=True)

    def _write_batch(
        self, batch: Sequence[OrderAnswer], breakers: Breakers, accepted_rates: Mapping[str, float], *, alone: bool
    ) -> None:
        """Write answers in one transaction."""
        tally = Tally()
        plain: list[TakenOrder] = []  # the usual answers, which are written together
        with self._engine.begin() as connection:
            now = database_now(connection)
            changed = update_breakers(connection, batch, breakers, self._options.rps, accepted_rates, now=now)
            locked = lock_attempts(connection, [answer.job for answer in batch])
            results = []
            for answer in batch:
                tally.add(ORDERS, NAMES[type(answer.order_reply)], account=answer.job.account)
                if isinstance(answer.order_reply, OrderTaken):
                    taken = self._taken(connection, answer, answer.order_reply)
                    if alone or taken.reply.outputs or taken.reply.promised:
                        results.append(self._record_taken(connection, taken, locked, tally, now))
                    else:
                        plain.append(taken)
                else:
                    results.append(self._record(connection, answer, locked, tally, now))
            record_all_taken(connection, plain, locked, now=now)
            tally.write(connection)
        breakers.update(changed)
        del self._answers[: len(batch)]
        if any(result.soon for result in results) or any(taken.plan.wait < SOON_SECONDS for taken in plain):
            self._after.poll()
        self._after.queue_downloads([output_id for result in results for output_id in result.outputs])
        self._after.notify([job_id for result in results for job_id in result.ended])

    def _taken(self, connection: Connection, answer: OrderAnswer, reply: OrderTaken) -> TakenOrder:
        if reply.warning is not None:
            log.warning("%s job=%s", reply.warning, answer.job.id)
        return TakenOrder(
            answer.job, reply, self._first_poll(connection, answer.job, reply, time.monotonic() - answer.sent)
        )

    def _record_taken(
        self, connection: Connection, taken: TakenOrder, locked: Locked, tally: Tally, now: datetime
    ) -> "_Result":
        result = record_taken(connection, taken, locked, tally, now=now)
        if result is None:
            return _Result()
        ended = (taken.order.id,) if result.ended else ()
        return _Result(taken.plan.wait < SOON_SECONDS, tuple(result.outputs), ended)

    def _record(
        self, connection: Connection, answer: OrderAnswer, locked: Locked, tally: Tally, now: datetime
    ) -> "_Result":
        order = answer.job
        match answer.order_reply:
            case OrderRefused(code, message, payload):
                return _refused(connection, order, locked, code, message, tally, now, payload)
            case AnswerLost(message):
                if record_lost(connection, order, locked, message, now=now):
                    log.error("an order is uncertain, its answer is lost job=%s reason=%s", order.id, message)
            case QueueFull(message, seconds, limit):
                self._refused_by_queue(connection, order, seconds, limit, now)
                record_waiting(connection, order, locked, message, due_at=now)
            case OrderPostponed(message, seconds):
                if order.attempts >= POSTPONED_MOST:
                    message = f"postponed {order.attempts} times, at last: {message}"
                    return _refused(connection, order, locked, "refused", message, tally, now)
                wait = timedelta(seconds=max(seconds, min(2.0**order.attempts, MAX_POSTPONED_WAIT)))
                record_waiting(connection, order, locked, message, due_at=now + wait, counts=True)
            case OrderNotSent(message):
                record_waiting(connection, order, locked, message, due_at=now + timedelta(seconds=NOT_SENT_WAIT))
            case RateLimited(_, message) | AccountRefused(_, message):
                record_waiting(connection, order, locked, message, due_at=now)
        return _Result()

    def _refused_by_queue(
        self, connection: Connection, order: ClaimedOrder, seconds: float, named: int | None, now: datetime
    ) -> None:
        """Learn from a refusal how many orders may wait at the API."""
        limit = locked_slots(connection, order.account)
        taken = taken_slots(connection, order.account, now=now, without=order.id)
        configured = self._options.slots(order.account)
        learned = after_refusal(limit, configured, taken=taken, named=named, seconds=seconds, now=now)
        save_slots(connection, learned)
        if learned.slots != limit.slots:
            log.warning("the API accepts fewer waiting orders account=%s slots=%s", order.account, learned.slots)

    def _first_poll(self, connection: Connection, order: ClaimedOrder, reply: OrderTaken, age: float) -> PollPlan:
        """Return when to poll the job first."""
        model = self._model(connection, order.account, order.kind)
        eta = reply.eta if order.eta is None else order.eta
        job = PacedJob(max(age, 0.0), eta=eta, seconds_left=order.deadline_seconds - age)
        return self._backlog.pace(self._options.pace, order.account).first(job, model, spread=self._rng.random())

    def _model(self, connection: Connection, account: str, kind: str) -> PaceModel:
        model, until = self._models.get((account, kind), (None, 0.0))
        if model is None or time.monotonic() >= until:
            if len(self._models) >= MAX_MODELS:
                self._models.clear()
            model, _ = read_models(connection, [(account, kind)])[account, kind]
            self._models[account, kind] = (model, time.monotonic() + FRESH_SECONDS)
        return model


class _Result(NamedTuple):
    soon: bool = False
    outputs: tuple[int, ...] = ()
    ended: tuple[int, ...] = ()


def _refused(
    connection: Connection,
    order: ClaimedOrder,
    locked: Locked,
    code: str,
    message: str,
    tally: Tally,
    now: datetime,
    payload: str | None = None,
) -> _Result:
    ended = record_refused(connection, order, locked, code, message, tally, now=now, payload=payload)
    return _Result(ended=(order.id,) if ended else ())
