"""Sends webhooks: claims due events, has them posted, and retries with growing delays for a day."""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from datetime import timedelta
from functools import partial

from sqlalchemy import Engine

from worker.coordination.leases import LeaseKeeper, LeaseLost
from worker.core.plain_text import plain_text
from worker.core.webhook import retry_delay
from worker.notify.receivers import Receivers, receiver_name, url_prefix
from worker.notify.webhook_sender import CONNECT_SECONDS, ReceiverAnswer, WebhookSender
from worker.store.engine import database_now
from worker.store.events import ClaimedEvent, claim_events, create_events, defer_events, record_delivery, release_events
from worker.system.redaction import Scrubber

log = logging.getLogger(__name__)

MAX_DELIVERIES = 48
# Deliveries to one receiver: at most this many, and at most as many as there are free places. So a slow receiver does
# not take all places.
PER_RECEIVER = 16
DEFERRAL = timedelta(seconds=0.5)  # after which the event of a busy receiver is due again
BATCH = 200
GIVE_UP = timedelta(days=1)
GONE = 410  # the receiver wants no more webhooks


class Webhooks:
    """Delivers webhooks for one process. One thread calls `run` repeatedly."""

    def __init__(
        self,
        *,
        engine: Engine,
        leases: LeaseKeeper,
        sender: WebhookSender,
        scrubber: Scrubber,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._leases = leases
        self._sender = sender
        self._scrubber = scrubber
        self._clock = clock
        # The database's clock minus this process's: it is used to sign, since a host's clock may be wrong.
        self._clock_offset = 0.0
        self._threads = ThreadPoolExecutor(MAX_DELIVERIES, thread_name_prefix="webhook")  # starts threads on demand
        self._in_progress: dict[Future[None], ClaimedEvent] = {}  # single dict operations need no lock
        self._receivers = Receivers()
        self._busy: Counter[str] = Counter()  # deliveries in progress, by receiver
        self._places = threading.Lock()
        self._claims_lost = threading.Event()  # set if a claim may be left that no delivery ends

    def run(self) -> int:
        """Create missing events and start to deliver due ones. Return how many deliveries were started."""
        free = MAX_DELIVERIES - len(self._in_progress)
        if not self._sender.secrets or free <= 0:
            return 0
        with self._leases:
            try:
                return self._claim_and_start(free)
            except Exception:
                self._claims_lost.set()
                raise

    def _claim_and_start(self, free: int) -> int:
        release_lost = self._claims_lost.is_set()
        self._claims_lost.clear()  # before reading the deliveries in progress, so that a later failure sets it again
        in_progress = list(self._in_progress.values())
        busy = Counter(self._receivers.cached(event.url) for event in in_progress)
        token = self._leases.new_token()
        with self._engine.begin() as connection:
            now = database_now(connection)
            self._clock_offset = now.timestamp() - self._clock()
            if release_lost:  # their leases would be renewed as long as this process has any work
                own_holder, retry_at = [self._leases.holder], now + self._leases.lease
                release_events(connection, own_holder, due_at=retry_at, but=[event.id for event in in_progress])
            create_events(connection, now=now, limit=BATCH)
            due = claim_events(
                connection,
                token=token,
                holder=self._leases.holder,
                lease=self._leases.lease,
                now=now,
                limit=free,
                without={
                    url_prefix(event.url)
                    for event in in_progress
                    if _full(busy[self._receivers.cached(event.url)], free)
                },
            )
        deferred = self._start(due, busy, free)
        if deferred:
            with self._engine.begin() as connection:
                defer_events(connection, deferred, now=now, due_at=now + DEFERRAL)
        return len(due) - len(deferred)

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for the deliveries in progress. Return whether all of them have ended."""
        return not wait_for(list(self._in_progress), timeout=seconds).not_done

    def _start(self, due: Sequence[ClaimedEvent], busy: Counter[str], free: int) -> list[ClaimedEvent]:
        """Start deliveries, and return the events of receivers that are busy: a slow one must not block the others."""
        deferred = []
        for event in due:
            receiver = self._receivers.cached(event.url)
            if _full(busy[receiver], free):
                deferred.append(event)
                continue
            busy[receiver] += 1
            free -= 1
            future = self._threads.submit(self._deliver, event)
            self._in_progress[future] = event
            future.add_done_callback(self._on_end)
        return deferred

    def _on_end(self, future: "Future[None]") -> None:
        self._in_progress.pop(future, None)
        if future.exception() is not None:
            self._claims_lost.set()  # the next run releases the claim
            log.error("webhook not recorded reason=%s", type(future.exception()).__name__)

    def _deliver(self, event: ClaimedEvent) -> None:
        with self._leases:
            receiver = self._receivers.look_up(event.url, CONNECT_SECONDS)
            if not self._take_place(receiver):  # another spelling of a busy receiver
                self._defer(event, DEFERRAL)
                return
            try:
                check_lease = partial(self._leases.check, event.id, event.token)
                answer = self._sender.post(event, int(self._clock_offset + self._clock()), check_lease)
            except LeaseLost:
                self._defer(event, timedelta(0))
                log.warning("a lease may have ended, no webhook was sent event_id=%s", event.event_id)
            else:
                self._record(event, answer)
            finally:
                self._free_place(receiver)

    def _take_place(self, receiver: str) -> bool:
        """Take a place of a receiver. Return False if none is free."""
        with self._places:
            if self._busy[receiver] >= PER_RECEIVER:
                return False
            self._busy[receiver] += 1
            return True

    def _free_place(self, receiver: str) -> None:
        with self._places:
            self._busy[receiver] -= 1
            if not self._busy[receiver]:
                del self._busy[receiver]

    def _defer(self, event: ClaimedEvent, wait: timedelta) -> None:
        """Release an event that was not sent. It is due again after `wait`."""
        with self._engine.begin() as connection:
            now = database_now(connection)
            defer_events(connection, [event], now=now, due_at=now + wait)

    def _record(self, event: ClaimedEvent, answer: ReceiverAnswer) -> None:
        message = None if answer.error is None else plain_text(self._scrubber.text(answer.error))
        with self._engine.begin() as connection:
            now = database_now(connection)
            ended = _ended(answer.status, late=now - event.created_at > GIVE_UP)
            wait = timedelta(seconds=retry_delay(event.attempts, random.random(), answer.retry_after))
            recorded = record_delivery(
                connection, event, now=now, ended=ended, due_at=now + wait, http_status=answer.status, message=message
            )
        if ended == "delivered":
            log.info("webhook delivered job=%s event_id=%s attempts=%s", event.job_id, event.event_id, event.attempts)
            return
        outcome = "gave up" if ended else f"again in {wait.total_seconds():.0f} s" if recorded else "the claim was lost"
        log.warning(
            "webhook not delivered job=%s event_id=%s receiver=%s attempts=%s outcome=%s reason=%s",
            *(event.job_id, event.event_id, receiver_name(event.url), event.attempts, outcome, message),
        )


def _full(in_progress: int, free: int) -> bool:
    return in_progress >= min(PER_RECEIVER, free)


def _ended(status: int | None, *, late: bool) -> str | None:
    if status is not None and 200 <= status < 300:
        return "delivered"
    return "failed" if late or status == GONE else None
