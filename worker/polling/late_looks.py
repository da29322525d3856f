"""Late looks: asks about expired jobs again, one after the other in a thread of its own, where nothing else needs it.

A job that was not ready by its deadline may get ready later, and its links live for a while. A look waits where its
account or host is held, where the account's requests are short, and where jobs of the account wait already.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial

from pydantic import SecretStr
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from worker.coordination.leases import boot_seconds
from worker.coordination.rate_limiter import RateLimiter, Reservation
from worker.core import circuit_breaker as breakers
from worker.core.circuit_breaker import CircuitBreaker, RateMeasurement, Scope
from worker.core.reply import AccountRefused, ApiDown, ApiReply, RateLimited, Ready
from worker.net.network_errors import describe
from worker.polling.api_client import ApiClient
from worker.polling.kept_answers import kept_answer
from worker.polling.recorder import count_answers, mark_own_path_error, update_breakers
from worker.polling.request_pool import PollAnswer
from worker.store.breakers import all_breakers, locked_breaker, save_breaker
from worker.store.claims import due_groups
from worker.store.counters import Tally
from worker.store.engine import database_now
from worker.store.kept_answers import keep_answers
from worker.store.late_looks import (
    ClaimedLook,
    DueLook,
    claim_look,
    defer_due_looks,
    defer_look,
    delete_stale_looks,
    due_looks,
    lock_look,
    plan_next_look,
)
from worker.store.revival import Revived, revive

log = logging.getLogger(__name__)

AT_ONCE = 100  # due looks of one run
LEASE_MARGIN = timedelta(seconds=30)  # beyond the time of a call: a look of a process that died is made after it
BUSY_WAIT = timedelta(seconds=60)  # until a look is tried again that led to no answer
SHUT_WAIT = timedelta(minutes=10)  # the same where its account or host may not be asked now, or has no time
REFUSED_WAIT = timedelta(hours=1)  # the same where the settings keep the key from its address
LATE_SECONDS = 2.0  # a job of the account that is due for longer shows that its requests are short
SOON_SECONDS = 0.05  # a request that may go out within it needs no waiting


class LateLooks:
    """Makes the late looks of one process. `run` may be called by any thread; one run at a time."""

    def __init__(
        self,
        *,
        engine: Engine,
        api: ApiClient,
        budget: RateLimiter,
        keys: Mapping[str, SecretStr],
        rps: Callable[[str], float],
        after: Sequence[float],
        api_timeout: float,
        queue_downloads: Callable[[Sequence[int]], None],
        notify: Callable[[Sequence[int]], None],
    ) -> None:
        self._engine = engine
        self._api = api
        self._budget = budget
        self._keys = keys  # may change at any time
        self._rps = rps
        self._after = tuple(after)
        self._lease = timedelta(seconds=api_timeout) + LEASE_MARGIN
        self._queue_downloads = queue_downloads
        self._tell = notify
        self._running = threading.Lock()
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Make no more looks; the one that is under way is finished."""
        self._stopping.set()

    def start(self) -> None:
        """Make the looks that are due in a thread, unless one is at it or nothing is due."""
        if not self._after or self._stopping.is_set() or self._running.locked() or not self._due(1):
            return
        threading.Thread(target=self._run_in_thread, name="late-looks", daemon=True).start()

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except SQLAlchemyError as error:
            log.warning("late looks wait for the database reason=%s", type(error).__name__)
        except Exception:
            log.exception("late looks failed, the next sweep goes on with them")

    def run(self) -> int:
        """Make the looks that are due now, and return how many requests that were. Raises what the database raises."""
        if not self._after or not self._running.acquire(blocking=False):
            return 0
        try:
            with self._engine.begin() as connection:
                delete_stale_looks(connection, self._after, now=database_now(connection), limit=AT_ONCE)
            return sum(self._look(due) for due in self._open())
        finally:
            self._running.release()

    def _due(self, limit: int) -> list[DueLook]:
        with self._engine.connect() as connection:
            return due_looks(connection, list(self._keys), now=database_now(connection), limit=limit)

    def _open(self) -> list[DueLook]:
        """Return the due looks of accounts and hosts that may be asked, and put the others off.

        Those of accounts whose key this process does not have are left to the processes that have it.
        """
        with self._engine.begin() as connection:
            now = database_now(connection)
            due = due_looks(connection, list(self._keys), now=now, limit=AT_ONCE)
            if not due:
                return []
            known = all_breakers(connection)
            free = {account: self._is_free(connection, account, known, now) for account in {one.account for one in due}}
            may = [one for one in due if free[one.account] and _host_is_open(known, one.host, now)]
            shut = {one.job_id for one in due}.difference(one.job_id for one in may)
            defer_due_looks(connection, list(shut), now=now, due_at=now + SHUT_WAIT)
            return may

    def _is_free(
        self, connection: Connection, account: str, known: Mapping[tuple[Scope, str], CircuitBreaker], now: datetime
    ) -> bool:
        """Return whether an account has a key, is not held, and has no job that waits for a request."""
        breaker = known.get(("account", account))
        if account not in self._keys or (breaker is not None and breaker.held(now)):
            return False
        late = now - timedelta(seconds=LATE_SECONDS)
        return not any(
            level.due_at < late and _host_is_open(known, level.host, now) for level in due_groups(connection, [account])
        )

    def _look(self, due: DueLook) -> bool:
        """Make one look if it is still due and the budget has a request to spare; return whether it was made."""
        key = self._keys.get(due.account)
        if self._stopping.is_set() or key is None:
            return False
        with self._engine.connect() as connection:
            known, now = all_breakers(connection), database_now(connection)
        grant = self._request(due.account, known, now)
        if grant is None:
            return False  # the next sweep tries again
        claimed_at = boot_seconds()
        claim = self._claim(due)
        if claim is None:
            self._budget.give_back(grant, 1)
            return False
        look, probe = claim
        sent = time.monotonic()
        try:
            answer = self._api.ask(look.job.address, look.job.remote_id, key, partial(_check_claim, look, claimed_at))
        except LookClaimLost as lost:
            log.warning("%s, it was not asked about", lost)
            self._give_back(look, BUSY_WAIT)
            return False
        except Exception as error:  # an adapter that somebody mounted may raise anything
            log.exception("a late look failed job=%s", look.job.id)
            answer = ApiReply(ApiDown(f"no answer: {describe(error)}"))
        self._record(look, answer, probe, sent, known)
        return True

    def _request(
        self, account: str, known: Mapping[tuple[Scope, str], CircuitBreaker], now: datetime
    ) -> Reservation | None:
        """Take a request of the account's budget, if one may go out at once."""
        full = self._rps(account)
        breaker = known.get(("account", account))
        grant = self._budget.take(account, 1, rate=full if breaker is None else breaker.rate(full, now))
        if grant.send_times and grant.send_times[0] - time.monotonic() <= SOON_SECONDS:
            return grant
        self._budget.give_back(grant, len(grant.send_times))
        return None

    def _claim(self, due: DueLook) -> tuple[ClaimedLook, bool] | None:
        """Claim a look, and return whether it is the one call that proves a key that was not accepted yet."""
        with self._engine.begin() as connection:
            now = database_now(connection)
            breaker = locked_breaker(connection, "account", due.account)
            host = all_breakers(connection).get(("host", due.host))
            may = breaker.allows(now)
            if breaker.held(now) or may == "none" or (host is not None and host.allows(now) != "all"):
                return None
            look = claim_look(connection, due.job_id, now=now, lease=self._lease)
            if look is None:
                return None
            refused = self._api.permits(look.job.address, look.job.remote_id)
            if refused is not None:
                log.error("an expired job's fetch address is refused job=%s reason=%s", due.job_id, refused)
                defer_look(connection, look, due_at=now + REFUSED_WAIT, sent=False)
                return None
            if may == "probe":
                save_breaker(connection, breakers.with_probe_started(breaker, now=now, lease=self._lease))
            return look, may == "probe"

    def _give_back(self, look: ClaimedLook, wait: timedelta) -> None:
        """Put off a look whose request was not sent."""
        with self._engine.begin() as connection:
            if lock_look(connection, look):
                defer_look(connection, look, due_at=database_now(connection) + wait, sent=False)

    def _record(
        self,
        look: ClaimedLook,
        answer: ApiReply,
        probe: bool,
        sent: float,
        known: Mapping[tuple[Scope, str], CircuitBreaker],
    ) -> None:
        asked = PollAnswer(look.job, answer.reply, probe, sent, raw=answer.raw)
        asked = mark_own_path_error(asked, self._api.default_address)
        account = look.job.account
        refused = isinstance(answer.reply, (RateLimited, ApiDown))
        limit = RateMeasurement(self._rps(account), self._budget.taken(account, 0 if refused else 1))
        revived = Revived({}, ())
        with self._engine.begin() as connection:
            now = database_now(connection)
            update_breakers(connection, [asked], known, lambda _: limit, now=now)
            tally = Tally()
            if lock_look(connection, look):
                revived = self._settle(connection, look, asked, tally, now)
            count_answers(tally, [asked])
            tally.write(connection)
        if revived.jobs:
            log.info("an expired job got ready job=%s looks=%s", look.job.id, look.looks)
        self._queue_downloads(revived.outputs)  # after the commit: the rows must be there
        self._tell(revived.completed)

    def _settle(
        self, connection: Connection, look: ClaimedLook, asked: PollAnswer, tally: Tally, now: datetime
    ) -> Revived:
        """Write what a look led to, in the caller's transaction."""
        reply = asked.reply
        if isinstance(reply, Ready):
            found = {look.job.id: reply}
            revived = revive(connection, found, tally, now=now, why="after it had expired", queued=True)
            if not revived.jobs:  # it has outputs already
                plan_next_look(connection, look, self._after, now=now)
            return revived
        if isinstance(reply, (RateLimited, AccountRefused)) or (isinstance(reply, ApiDown) and asked.raw is None):
            defer_look(connection, look, due_at=now + BUSY_WAIT, sent=True)  # nobody was asked about the job
            return Revived({}, ())
        plan_next_look(connection, look, self._after, now=now)
        about_the_job = not isinstance(reply, ApiDown) or reply.answered
        if asked.raw is not None and about_the_job:
            keep_answers(connection, [kept_answer(asked, asked.raw, self._api.kept_text)], now=now)
        return Revived({}, ())


class LookClaimLost(Exception):
    """A look is not ours any more."""


def _host_is_open(known: Mapping[tuple[Scope, str], CircuitBreaker], host: str, now: datetime) -> bool:
    breaker = known.get(("host", host))
    return breaker is None or breaker.allows(now) == "all"


def _check_claim(look: ClaimedLook, since: float) -> None:
    """Raise LookClaimLost where the claim is so old that another process may be about to make the look."""
    if boot_seconds() - since >= LEASE_MARGIN.total_seconds():
        raise LookClaimLost(f"the look at job {look.job.id} was claimed too long ago")
