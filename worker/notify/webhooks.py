"""Sends webhooks: claims due events, posts them signed, and tries again with growing delays for a day.

Receivers are trusted with nothing: addresses are guarded like downloads, redirects are not followed, no answer is read.
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
from worker.notify.receivers import Receivers, prefix
from worker.notify.receivers import receiver_name as _receiver
from worker.store.engine import database_now
from worker.store.events import ClaimedEvent, claim_events, create_events, defer_events, record_delivery, release_events
from worker.system.redaction import Scrubber

log = logging.getLogger(__name__)

AT_ONCE = 48
PER_RECEIVER = 16  # of those, and never more than there are places left: many that hang leave some to the others
PUT_OFF_SECONDS = 0.5
BATCH = 200
TIMEOUT_SECONDS = 15.0  # Standard Webhooks: receivers answer within 15 to 30 s
CONNECT_SECONDS = 5.0
GIVE_UP = timedelta(days=1)
GONE = 410  # the receiver wants nothing more


class Webhooks:
    """What one process delivers. `run` is called again and again by one thread."""

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
        self._ahead = 0.0  # the database's clock, which signs, before that one: a host's own may be wrong
        self._adapter = adapter
        self._user_agent = user_agent
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="webhook")  # starts none before the first call
        self._under_way: dict[Future[None], ClaimedEvent] = {}  # single operations on it need no lock
        self._receivers = Receivers()
        self._busy: Counter[str] = Counter()  # calls under way, by receiver
        self._places = threading.Lock()
        self._astray = threading.Event()  # some claim may be left that nobody ends

    def run(self) -> int:
        """Makes the events that are missing and begins to deliver those that are due; how many were begun."""
        free = AT_ONCE - len(self._under_way)
        if not self._secrets or free <= 0:
            return 0
        with self._leases:
            try:
                return self._claim_and_begin(free)
            except Exception:
                self._astray.set()
                raise

    def _claim_and_begin(self, free: int) -> int:
        astray = self._astray.is_set()
        self._astray.clear()  # before the look at what is under way: whoever goes astray from here on says so again
        under_way = list(self._under_way.values())
        busy = Counter(self._receivers.known(event.url) for event in under_way)
        token = self._leases.new_token()
        with self._engine.begin() as connection:
            now = database_now(connection)
            self._ahead = now.timestamp() - self._clock()
            if astray:  # their leases would be renewed for as long as this process has any work
                mine, again = [self._leases.holder], now + self._leases.lease
                release_events(connection, mine, due_at=again, but=[event.id for event in under_way])
            create_events(connection, now=now, limit=BATCH)
            due = claim_events(
                connection,
                token=token,
                holder=self._leases.holder,
                lease=self._leases.lease,
                now=now,
                limit=free,
                without={
                    prefix(event.url) for event in under_way if _full(busy[self._receivers.known(event.url)], free)
                },
            )
        later = self._begin(due, busy, free)
        if later:
            with self._engine.begin() as connection:
                defer_events(connection, later, now=now, due_at=now + timedelta(seconds=PUT_OFF_SECONDS))
        return len(due) - len(later)

    def wait(self, seconds: float) -> bool:
        """Waits for what is under way, but not longer; whether all of it is over."""
        return not wait_for(list(self._under_way), timeout=seconds).not_done

    def _begin(self, due: Sequence[ClaimedEvent], busy: Counter[str], free: int) -> list[ClaimedEvent]:
        """Those of a receiver that has enough to do already are left over: one that hangs must not stop the others."""
        later = []
        for event in due:
            receiver = self._receivers.known(event.url)
            if _full(busy[receiver], free):
                later.append(event)
                continue
            busy[receiver] += 1
            free -= 1
            begun = self._threads.submit(self._deliver, event)
            self._under_way[begun] = event
            begun.add_done_callback(self._over)
        return later

    def _over(self, begun: "Future[None]") -> None:
        self._under_way.pop(begun, None)
        if begun.exception() is not None:
            self._astray.set()  # the next run gives it back
            log.error("webhook not recorded reason=%s", type(begun.exception()).__name__)

    def _deliver(self, event: ClaimedEvent) -> None:
        with self._leases:
            receiver = self._receivers.look_up(event.url, CONNECT_SECONDS)
            if not self._enter(receiver):  # another spelling of one that has enough to do
                self._put_off(event)
                return
            try:
                outcome = self._post(event)
            except LeaseLost:
                self._give_back(event)
            else:
                self._record(event, *outcome)
            finally:
                self._leave(receiver)

    def _enter(self, receiver: str) -> bool:
        """Take one of the places of a receiver, if it has one left."""
        with self._places:
            if self._busy[receiver] >= PER_RECEIVER:
                return False
            self._busy[receiver] += 1
            return True

    def _leave(self, receiver: str) -> None:
        with self._places:
            self._busy[receiver] -= 1
            if not self._busy[receiver]:
                del self._busy[receiver]

    def _put_off(self, event: ClaimedEvent) -> None:
        with self._engine.begin() as connection:
            now = database_now(connection)
            defer_events(connection, [event], now=now, due_at=now + timedelta(seconds=PUT_OFF_SECONDS))

    def _give_back(self, event: ClaimedEvent) -> None:
        """Give back an event that was not sent because its lease may be over."""
        with self._engine.begin() as connection:
            now = database_now(connection)
            defer_events(connection, [event], now=now, due_at=now)
        log.warning("a claim was not sure to last, no webhook was sent event_id=%s", event.event_id)

    def _record(self, event: ClaimedEvent, status: int | None, message: str | None, asked: float | None) -> None:
        message = None if message is None else plain_text(self._scrubber.text(message))
        with self._engine.begin() as connection:
            now = database_now(connection)
            ended = _ended(status, late=now - event.created_at > GIVE_UP)
            wait = timedelta(seconds=retry_delay(event.attempts, random.random(), asked))
            stood = record_delivery(
                connection, event, now=now, ended=ended, due_at=now + wait, http_status=status, message=message
            )
        if ended == "delivered":
            log.info("webhook delivered job=%s event_id=%s attempts=%s", event.job_id, event.event_id, event.attempts)
            return
        outcome = "gave up" if ended else f"again in {wait.total_seconds():.0f} s" if stood else "the claim was lost"
        log.warning(
            "webhook not delivered job=%s event_id=%s receiver=%s attempts=%s outcome=%s reason=%s",
            *(event.job_id, event.event_id, _receiver(event.url), event.attempts, outcome, message),
        )

    def _post(self, event: ClaimedEvent) -> tuple[int | None, str | None, float | None]:
        """(the status that was answered, what went wrong, seconds that the receiver asks us to wait)."""
        sent_at = int(self._ahead + self._clock())
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
                    asked = _seconds(answer.headers.get("retry-after"))
            if limit.expired:  # a head that was cut off looks like one that ended
                raise TimeoutError
        except LeaseLost:
            raise
        except RefusedTarget as refused:
            return None, f"{refused}; see WEBHOOK_ALLOWED_NETWORKS", None
        except (HTTPError, HTTPException, OSError, ValueError) as error:
            if limit.expired:
                return None, f"no answer within {TIMEOUT_SECONDS:.0f} s", None
            return None, f"the receiver can't be reached: {describe(error)}", None
        except Exception as fault:  # a claim that nobody ends would come back without any wait, and for ever
            log.error("a fault of ours event_id=%s reason=%s", event.event_id, type(fault).__name__)
            return None, f"a fault of ours: {type(fault).__name__}", None
        return status, None if 200 <= status < 300 else f"HTTP {status}", asked


def _full(under_way: int, free: int) -> bool:
    return under_way >= min(PER_RECEIVER, free)


def _ended(status: int | None, *, late: bool) -> str | None:
    if status is not None and 200 <= status < 300:
        return "delivered"
    return "failed" if late or status == GONE else None


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 7 else None
