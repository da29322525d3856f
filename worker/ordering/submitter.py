"""One submit run: claim orders that have a free slot, send each once, record the answers, and repeat until idle.

A claim says who sends an order. Right before the first byte, another commit says that it is sent. So after a crash it
is known whether an order may be sent again, or is uncertain.
"""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple

from pydantic import SecretStr
from sqlalchemy import Engine

from worker.coordination.leases import LeaseKeeper, LeaseLost
from worker.coordination.rate_limiter import RateLimiter
from worker.core.order_reply import AnswerLost, OrderPostponed, OrderRefused, OrderReply, OrderTaken
from worker.core.pacing.backlog import OrderBacklog
from worker.errors import NotTrackable
from worker.net.network_errors import describe
from worker.ordering.options import MAX_SENDING_PER_ACCOUNT, AfterRecording, OrderOptions
from worker.ordering.order_claims import OrderClaims, OrderView
from worker.ordering.order_client import OrderClient
from worker.ordering.order_recorder import NAMES, OrderAnswer, OrderRecorder
from worker.polling.breaker_updates import count_accepted
from worker.store.engine import database_now
from worker.store.orders import ClaimedOrder, mark_attempted

log = logging.getLogger(__name__)

RUN_SECONDS = 10.0  # a task should end soon, so that monitors show what it did and its worker can stop
IDLE_SECONDS = 1.0  # longest time between two looks: a wake-up can get lost
LOOK_SECONDS = 0.05  # least time between two looks
KEY_IN_PAYLOAD = "payload contains an API key or a secret of this installation: order it again without it"
REFUSED_SECONDS = 60.0  # until the next claim of an order whose endpoint is refused: settings may change
GATHER_SECONDS = 0.005  # what arrives within this time is written together
ALERT_SECONDS = 0.4  # look often after a wake-up: its sender sends no second one for a while


@dataclass(slots=True)
class SubmitReport:
    """What a run did, in numbers. Its text is the result of the task."""

    sent: int = 0
    answers: Counter[type[OrderReply]] = field(default_factory=Counter)
    more: bool = False  # whether the run ended by its time limit, and more can be sent or is in flight

    def __str__(self) -> str:
        if not self.sent:
            return "nothing to send"
        counts = ", ".join(f"{count:,} {NAMES[reply].replace('_', ' ')}" for reply, count in self.answers.most_common())
        return f"sent {self.sent:,}: {counts}"


class Submitter:
    """Sends orders for one process. `run` does the work of the task; only one run at a time is useful.

    A run can end while requests are in flight. The next run records their answers.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        client: OrderClient,
        budget: RateLimiter,
        leases: LeaseKeeper,
        options: OrderOptions,
        backlog: OrderBacklog,
        after: AfterRecording,
        rng: random.Random | None = None,
    ) -> None:
        rng = rng or random.Random()  # spreads accounts and polls; not used for security
        self._engine = engine
        self._client = client
        self._budget = budget
        self._leases = leases
        self._options = options
        self._claims = OrderClaims(engine, leases, options, backlog, rng)
        self._recorder = OrderRecorder(engine, options, backlog, after, rng)
        self._requests = _Requests(options.threads)
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._alert_until = 0.0
        self._look_now = False  # a slot may be free, or an order was made
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Stop claiming orders. Requests that have started are finished."""
        self._stopping.set()
        self.wake()

    def wake(self) -> None:
        """Look for orders at once. May be called from any thread."""
        self._alert_until = time.monotonic() + ALERT_SECONDS
        self._look_now = True
        self._woken.set()
        self._requests.wake()

    def wait(self, seconds: float) -> None:
        """Wait until `wake` is called, for at most this time."""
        self._woken.wait(LOOK_SECONDS if time.monotonic() < self._alert_until else seconds)
        self._woken.clear()

    @property
    def running(self) -> bool:
        """Whether a run is active in this process."""
        return self._lock.locked()

    @property
    def busy(self) -> bool:
        """Whether requests are in flight, or answers wait to be written."""
        return bool(self._requests.outstanding or self._recorder.unwritten)

    def has_work(self) -> bool:
        """Return whether orders can be sent now, as far as is known without claiming them."""
        return not self._stopping.is_set() and bool(self._claims.view().sendable)

    def close(self) -> None:
        """End the threads. The submitter can't be used afterwards."""
        self._requests.close()

    def submit_once(self) -> SubmitReport:
        """Send the orders that can be sent now and record the answers. For callers that control the clock."""
        report = SubmitReport()
        with self._lock:
            self._start(self._claims.view())
            while self.busy:
                self._record(IDLE_SECONDS, report)
        return report

    def run(self, *, seconds: float = RUN_SECONDS, finish: bool = False) -> SubmitReport | None:
        """Send orders until none can be sent for a second, or for `seconds`. Return None if another run is active.

        With `finish` the run waits for the last answer, since no other run follows it in this process.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            return self._run(time.monotonic() + seconds, finish)
        finally:
            self._lock.release()

    def _run(self, until: float, finish: bool) -> SubmitReport:
        report = SubmitReport()
        self._record(0.0, report)  # if the database is still away, nothing more is claimed
        idle_until = time.monotonic() + IDLE_SECONDS
        looked_at, look_at = 0.0, 0.0
        while True:
            now = time.monotonic()
            over = now >= until or self._stopping.is_set()
            if over and not (self.busy and (finish or self._stopping.is_set())):
                report.more = self.busy or not self._stopping.is_set()
                return report
            alert = now < self._alert_until and now >= looked_at + LOOK_SECONDS
            if not over and (self._look_now or alert or now >= look_at):
                self._look_now = False
                view = self._claims.view()
                started = self._start(view)
                self._claims.tidy(view)
                looked_at, look_at = now, now + (LOOK_SECONDS if started else IDLE_SECONDS)
                if started or view.waiting:
                    idle_until = now + IDLE_SECONDS
            if not self.busy and now >= idle_until:
                return report
            wait = LOOK_SECONDS if now < self._alert_until else max(min(look_at, until) - now, LOOK_SECONDS)
            self._record(0.0 if self._look_now else wait, report)

    def _start(self, view: OrderView) -> int:
        """Claim the orders that can be sent now, and start their requests. Return how many were started."""
        started = 0
        for account in view.sendable:
            room = min(self._requests.room, MAX_SENDING_PER_ACCOUNT - self._requests.of_account(account))
            reservation = self._budget.take(account, max(room, 0), rate=view.rate(account, self._options.rps(account)))
            claimed = self._claims.claim(account, view, limit=len(reservation.send_times))
            self._budget.give_back(reservation, len(reservation.send_times) - len(claimed.orders))
            for order, moment in zip(claimed.orders, reservation.send_times, strict=False):
                self._leases.hold()  # until the request is finished
                self._requests.start(partial(self._send, order, moment, probe=claimed.probe), account)
            started += len(claimed.orders)
        return started

    def _send(self, order: ClaimedOrder, moment: float, *, probe: bool) -> OrderAnswer | ClaimedOrder:
        """Send one order. Return the answer, or the order itself if no byte of it was sent and its claim ends."""
        delay = moment - time.monotonic()
        if delay > 0:
            time.sleep(delay)
        began = time.monotonic()
        key = self._options.keys.get(order.account)
        if key is None or self._stopping.is_set():
            return order
        masked = self._options.payload_secrets().text(order.payload)
        if masked != order.payload or not order.is_unchanged:  # the app that made the order does not know the key
            return OrderAnswer(
                order, OrderRefused("bad_request", KEY_IN_PAYLOAD, masked), probe, began, reached_api=False
            )
        may_be_sent = threading.Event()

        def permit() -> None:
            self._attempt(order)
            may_be_sent.set()

        try:
            reply = self._client.send(order, SecretStr(key.get_secret_value()), permit)
        except NotTrackable as refused:  # the settings have changed since the order was made
            reply = OrderPostponed(f"the endpoint is refused: {refused}", REFUSED_SECONDS)
            return OrderAnswer(order, reply, probe, began, reached_api=False)
        except LeaseLost:
            log.warning("a lease may have ended, the order was not sent job=%s", order.id)
            return order
        except Exception as error:
            if may_be_sent.is_set():  # never send it again
                log.exception("internal error after an order was sent job=%s", order.id)
                return OrderAnswer(order, AnswerLost(f"internal error: {type(error).__name__}"), probe, began)
            log.warning("an order was not sent job=%s reason=%s", order.id, describe(error))
            return order
        return OrderAnswer(order, reply, probe, began)

    def _attempt(self, order: ClaimedOrder) -> None:
        """Wait until the loop has noted that an order is sent now. Raises LeaseLost if its claim may have ended."""
        self._leases.check(order.id, order.token)
        noted = self._requests.ask_to_note(order).result(timeout=self._options.timeout)
        if not noted:
            raise LeaseLost

    def _note_attempts(self, attempts: "Sequence[_Attempt]") -> None:
        """Note in one transaction that these orders are sent now. If that fails, or at a stop, none of them is sent."""
        if self._stopping.is_set():
            for attempt in attempts:
                attempt.noted.set_result(False)  # nothing of it was sent: another process sends it
            return
        if not attempts:
            return
        try:
            with self._engine.begin() as connection:
                now = database_now(connection)
                noted = mark_attempted(connection, [attempt.order for attempt in attempts], now=now)
        except Exception as error:
            for attempt in attempts:
                attempt.noted.set_exception(error)
            raise
        for attempt in attempts:
            attempt.noted.set_result(attempt.order.id in noted)

    def _record(self, timeout: float, report: SubmitReport) -> None:
        """Wait up to `timeout` seconds for something to do: note attempts, record answers, release unsent orders."""
        attempts, finished = self._requests.take(timeout)
        answers = [item for item in finished if isinstance(item, OrderAnswer)]
        report.sent += len(answers)
        report.answers.update(type(answer.order_reply) for answer in answers)
        self._recorder.take(answers)
        self._claims.release_later([item for item in finished if isinstance(item, ClaimedOrder)])
        for _ in finished:
            self._leases.drop()
        self._note_attempts(attempts)
        self._claims.release_now()
        if self._recorder.unwritten:
            self._recorder.write(self._claims.breakers, count_accepted(self._budget, answers))
            self._look_now = self._look_now or any(_frees_slot(answer.order_reply) for answer in answers)


def _frees_slot(reply: OrderReply) -> bool:
    """Return whether an order takes no slot after this answer."""
    return not isinstance(reply, (OrderTaken, AnswerLost)) or (isinstance(reply, OrderTaken) and bool(reply.outputs))


class _Attempt(NamedTuple):
    """An order whose connection is open. `noted` becomes true when it may be sent."""

    order: ClaimedOrder
    noted: "Future[bool]"


class _Requests:
    """The requests in flight, each in a thread of its own. The threads report to one inbox."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="order")
        self._threads = threads
        self._inbox: SimpleQueue[_Attempt | tuple[str, OrderAnswer | ClaimedOrder] | None] = SimpleQueue()
        self._by_account: Counter[str] = Counter()

    @property
    def outstanding(self) -> int:
        return self._by_account.total()

    @property
    def room(self) -> int:
        return self._threads - self.outstanding

    def of_account(self, account: str) -> int:
        return self._by_account[account]

    def start(self, send: "Callable[[], OrderAnswer | ClaimedOrder]", account: str) -> None:
        self._by_account[account] += 1
        self._executor.submit(lambda: self._inbox.put((account, send())))

    def ask_to_note(self, order: ClaimedOrder) -> "Future[bool]":
        noted: Future[bool] = Future()
        self._inbox.put(_Attempt(order, noted))
        return noted

    def wake(self) -> None:
        self._inbox.put(None)

    def take(self, timeout: float) -> "tuple[list[_Attempt], list[OrderAnswer | ClaimedOrder]]":
        """Return the attempts to note, and the finished requests. Wait up to `timeout` seconds for the first of them.

        `wake` ends the wait. Some milliseconds later, there are often more: one transaction is enough for all.
        """
        attempts: list[_Attempt] = []
        finished: list[OrderAnswer | ClaimedOrder] = []
        try:
            item = self._inbox.get(timeout=timeout)
            if item is not None and self.outstanding > 1:
                time.sleep(GATHER_SECONDS)
            while True:
                if isinstance(item, _Attempt):
                    attempts.append(item)
                elif item is not None:
                    account, result = item
                    self._by_account[account] -= 1
                    finished.append(result)
                item = self._inbox.get_nowait()
        except Empty:
            return attempts, finished

    def close(self) -> None:
        self._executor.shutdown(wait=False)
