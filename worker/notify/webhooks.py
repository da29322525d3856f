"""Sends webhooks: claims due events, posts them signed, and retries with growing delays for a day.

Receivers are not trusted: their addresses are guarded like those of downloads, redirects are not followed, and no
answer body is read.
"""

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
from http.client import HTTPException

from sqlalchemy import Engine
from urllib3.exceptions import HTTPError

from worker.coordination.leases import LeaseKeeper, LeaseLost
from worker.core.plain_text import plain_text
from worker.core.urls import percent_encoded
from worker.core.webhook import headers, retry_delay
from worker.net.address_guard import Guard, RefusedTarget
from worker.net.deadlines import TimeLimit
from worker.net.network_errors import describe
from worker.net.pooled_adapter import PooledAdapter
from worker.notify.receivers import Receivers, url_prefix
from worker.notify.receivers import receiver_name as _receiver
from worker.store.engine import database_now
from worker.store.events import ClaimedEvent, claim_events, create_events, defer_events, record_delivery, release_events
from worker.system.redaction import Scrubber

log = logging.getLogger(__name__)

MAX_DELIVERIES = 48
PER_RECEIVER = (
    16  # at most this many of them, and at most as many as there are free places: a slow receiver must not take all
)
DEFER_SECONDS = 0.5
BATCH = 200
TIMEOUT_SECONDS = 15.0  # Standard Webhooks: receivers should answer within 15 to 30 s
CONNECT_SECONDS = 5.0
GIVE_UP = timedelta(days=1)
GONE = 410  # the receiver wants no more webhooks


class Webhooks:
    """Delivers webhooks for one process. One thread calls `run` repeatedly."""

    def __init__(
        self,
        *,
        engine: Engine,
        leases: LeaseKeeper,
        guard: Guard,
        adapter: PooledAdapter,
        scrubber: Scrubber,
        secrets: Sequence[bytes],
        user_agent: str = "fetch-worker",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._leases = leases
        self._guard = guard
        self._scrubber = scrubber
        self._secrets = tuple(secrets)
        self._clock = clock
        self._clock_offset = (
            0.0  # the database's clock minus this process's: it is used to sign, since a host's clock may be wrong
        )
        self._adapter = adapter
        self._user_agent = user_agent
        self._threads = ThreadPoolExecutor(MAX_DELIVERIES, thread_name_prefix="webhook")  # starts threads on demand
        self._in_progress: dict[Future[None], ClaimedEvent] = {}  # single dict operations need no lock
        self._receivers = Receivers()
        self._busy: Counter[str] = Counter()  # deliveries in progress, by receiver
        self._places = threading.Lock()
        self._claims_lost = threading.Event()  # set if a claim may be left that no delivery ends

    def run(self) -> int:
        """Create missing events and start to deliver due ones. Return how many deliveries were started."""
        free = MAX_DELIVERIES - len(self._in_progress)
        if not self._secrets or free <= 0:
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
                defer_events(connection, deferred, now=now, due_at=now + timedelta(seconds=DEFER_SECONDS))
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
                self._defer(event)
                return
            try:
                outcome = self._post(event)
            except LeaseLost:
                self._release(event)
            else:
                self._record(event, *outcome)
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

    def _defer(self, event: ClaimedEvent) -> None:
        with self._engine.begin() as connection:
            now = database_now(connection)
            defer_events(connection, [event], now=now, due_at=now + timedelta(seconds=DEFER_SECONDS))

    def _release(self, event: ClaimedEvent) -> None:
        """Release an event that was not sent because its lease may have ended."""
        with self._engine.begin() as connection:
            now = database_now(connection)
            defer_events(connection, [event], now=now, due_at=now)
        log.warning("a lease may have ended, no webhook was sent event_id=%s", event.event_id)

    def _record(self, event: ClaimedEvent, status: int | None, message: str | None, retry_after: float | None) -> None:
        message = None if message is None else plain_text(self._scrubber.text(message))
        with self._engine.begin() as connection:
            now = database_now(connection)
            ended = _ended(status, late=now - event.created_at > GIVE_UP)
            wait = timedelta(seconds=retry_delay(event.attempts, random.random(), retry_after))
            recorded = record_delivery(
                connection, event, now=now, ended=ended, due_at=now + wait, http_status=status, message=message
            )
        if ended == "delivered":
            log.info("webhook delivered job=%s event_id=%s attempts=%s", event.job_id, event.event_id, event.attempts)
            return
        outcome = "gave up" if ended else f"again in {wait.total_seconds():.0f} s" if recorded else "the claim was lost"
        log.warning(
            "webhook not delivered job=%s event_id=%s receiver=%s attempts=%s outcome=%s reason=%s",
            *(event.job_id, event.event_id, _receiver(event.url), event.attempts, outcome, message),
        )

    def _post(self, event: ClaimedEvent) -> tuple[int | None, str | None, float | None]:
        """Post an event. Return the HTTP status, the error, and the seconds that the receiver asks us to wait."""
        sent_at = int(self._clock_offset + self._clock())
        signed = headers(self._secrets, event.event_id, sent_at, event.body) | {"User-Agent": self._user_agent}
        url, limit = (
            percent_encoded(event.url),
            TimeLimit(TIMEOUT_SECONDS, partial(self._leases.check, event.id, event.token)),
        )
        try:
            with limit:
                self._guard.check_url(url)
                timeout = (min(CONNECT_SECONDS, limit.remaining), limit.remaining)
                with self._adapter.exchange("POST", url, signed, timeout, event.body.encode()) as answer:
                    status = answer.status
                    retry_after = _seconds(answer.headers.get("retry-after"))
            if limit.expired:  # truncated headers look like complete ones
                raise TimeoutError
        except LeaseLost:
            raise
        except RefusedTarget as refused:
            return None, f"{refused}; see WEBHOOK_ALLOWED_NETWORKS", None
        except (HTTPError, HTTPException, OSError, ValueError) as error:
            if limit.expired:
                return None, f"no answer within {TIMEOUT_SECONDS:.0f} s", None
            return None, f"the receiver can't be reached: {describe(error)}", None
        except Exception as error:  # a claim without an end would be retried forever and without delay
            log.error("internal error in a delivery event_id=%s reason=%s", event.event_id, type(error).__name__)
            return None, f"internal error: {type(error).__name__}", None
        return status, None if 200 <= status < 300 else f"HTTP {status}", retry_after


def _full(in_progress: int, free: int) -> bool:
    return in_progress >= min(PER_RECEIVER, free)


def _ended(status: int | None, *, late: bool) -> str | None:
    if status is not None and 200 <= status < 300:
        return "delivered"
    return "failed" if late or status == GONE else None


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 7 else None
