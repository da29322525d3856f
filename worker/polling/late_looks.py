"""Late looks: polls expired jobs again, one at a time, in a thread of its own.

A job that was not ready by its deadline may become ready later, and its links live for a while. A look is delayed while
its account or host is held, while the account's request budget is short, and while other jobs of the account are due.
"""

import logging
import threading
import time
from datetime import datetime, timedelta
from functools import partial

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from worker.coordination.leases import boot_seconds
from worker.coordination.rate_limiter import RateLimiter, Reservation
from worker.core import circuit_breaker
from worker.core.reply import AccountRefused, ApiDown, ApiReply, RateLimited, Ready
from worker.net.network_errors import describe
from worker.polling.answer_writer import count_answers
from worker.polling.api_client import ApiClient
from worker.polling.breaker_updates import Breakers, count_accepted, mark_own_path_error, update_breakers
from worker.polling.kept_answers import kept_answer
from worker.polling.options import AfterCommit, PollOptions
from worker.polling.request_pool import PollAnswer
from worker.store.breakers import all_breakers, locked_breaker, save_breaker
from worker.store.counters import Tally
from worker.store.due_groups import due_groups
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

AT_ONCE = 100  # due looks per run
LEASE_MARGIN = timedelta(seconds=30)  # beyond the request's time-out; then another process may make the look
BUSY_WAIT = timedelta(seconds=60)  # until the next try of a look that got no answer
HELD_WAIT = timedelta(minutes=10)  # until the next try if the account or host is held, or has no free requests
REFUSED_WAIT = timedelta(hours=1)  # until the next try if the settings do not let the key be sent to the address
OVERDUE_SECONDS = 2.0  # a job that is overdue by more shows that the account's requests are short
SOON_SECONDS = 0.05  # a request that may be sent within this time needs no wait


class LateLooks:
    """Makes the late looks of one process. `run` may be called from any thread; one run at a time."""

    def __init__(
        self,
        *,
        engine: Engine,
        api: ApiClient,
        budget: RateLimiter,
        options: PollOptions,
        after_commit: AfterCommit,
    ) -> None:
        self._engine = engine
        self._api = api
        self._budget = budget
        self._keys = options.keys  # can change at any time
        self._rps = options.rps
        self._after = options.late_looks
        self._lease = timedelta(seconds=options.api_timeout) + LEASE_MARGIN
        self._after_commit = after_commit
        self._running = threading.Lock()
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Stop making looks. The current one is finished."""
        self._stopping.set()

    def start(self) -> None:
        """Make the due looks in a thread, unless such a thread is running or nothing is due."""
        if not self._after or self._stopping.is_set() or self._running.locked() or not self._due(1):
            return
        threading.Thread(target=self._run_in_thread, name="late-looks", daemon=True).start()

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except SQLAlchemyError as error:
            log.warning("late looks wait for the database reason=%s", type(error).__name__)
        except Exception:
            log.exception("late looks failed, the next sweep continues")

    def run(self) -> int:
        """Make the looks that are due now. Return how many requests were sent. Raises the errors of the database."""
        if not self._after or not self._running.acquire(blocking=False):
            return 0
        try:
            with self._engine.begin() as connection:
                delete_stale_looks(connection, self._after, now=database_now(connection), limit=AT_ONCE)
            return sum(self._make_look(due) for due in self._pollable_looks())
        finally:
            self._running.release()

    def _due(self, limit: int) -> list[DueLook]:
        with self._engine.connect() as connection:
            return due_looks(connection, list(self._keys), now=database_now(connection), limit=limit)

    def _pollable_looks(self) -> list[DueLook]:
        """Return the due looks of accounts and hosts that may be polled, and defer the others.

        Accounts without a key in this process are left to the processes that have it.
        """
        with self._engine.begin() as connection:
            now = database_now(connection)
            due = due_looks(connection, list(self._keys), now=now, limit=AT_ONCE)
            if not due:
                return []
            breakers = all_breakers(connection)
            free_accounts = {
                account: self._is_free(connection, account, breakers, now) for account in {look.account for look in due}
            }
            allowed = [
                look for look in due if free_accounts[look.account] and _host_may_be_polled(breakers, look.host, now)
            ]
            deferred = {look.job_id for look in due}.difference(look.job_id for look in allowed)
            defer_due_looks(connection, list(deferred), now=now, due_at=now + HELD_WAIT)
            return allowed

    def _is_free(self, connection: Connection, account: str, breakers: Breakers, now: datetime) -> bool:
        """Return whether an account has a key, is not held, and has no overdue job."""
        breaker = breakers.get(("account", account))
        if account not in self._keys or (breaker is not None and breaker.held(now)):
            return False
        late = now - timedelta(seconds=OVERDUE_SECONDS)
        return not any(
            group.due_at < late and _host_may_be_polled(breakers, group.host, now)
            for group in due_groups(connection, [account])
        )

    def _make_look(self, due_look: DueLook) -> bool:
        """Make one look if it is still due and a request is free. Return whether it was made."""
        key = self._keys.get(due_look.account)
        if self._stopping.is_set() or key is None:
            return False
        with self._engine.connect() as connection:
            breakers, now = all_breakers(connection), database_now(connection)
        reservation = self._reserve_request(due_look.account, breakers, now)
        if reservation is None:
            return False
        claimed_at = boot_seconds()
        claimed = self._claim(due_look)
        if claimed is None:
            self._budget.give_back(reservation, 1)
            return False
        look, probe = claimed
        sent = time.monotonic()
        try:
            answer = self._api.ask(look.job.address, look.job.remote_id, key, partial(_check_claim, look, claimed_at))
        except LookClaimLost as error:
            log.warning("%s, no request was sent", error)
            self._defer_unsent(look, BUSY_WAIT)
            return False
        except Exception as error:  # a mounted adapter may raise any error
            log.exception("a late look failed job=%s", look.job.id)
            answer = ApiReply(ApiDown(f"no answer: {describe(error)}"))
        self._record(look, answer, probe, sent, breakers)
        return True

    def _reserve_request(self, account: str, breakers: Breakers, now: datetime) -> Reservation | None:
        """Reserve a request of the account's budget if it may be sent at once."""
        full_rate = self._rps(account)
        breaker = breakers.get(("account", account))
        reservation = self._budget.take(account, 1, rate=full_rate if breaker is None else breaker.rate(full_rate, now))
        if reservation.send_times and reservation.send_times[0] - time.monotonic() <= SOON_SECONDS:
            return reservation
        self._budget.give_back(reservation, len(reservation.send_times))
        return None

    def _claim(self, due_look: DueLook) -> tuple[ClaimedLook, bool] | None:
        """Claim a look. Return it, and whether its request is a probe: the one request that tries an unproven key."""
        with self._engine.begin() as connection:
            now = database_now(connection)
            breaker = locked_breaker(connection, "account", due_look.account)
            host = all_breakers(connection).get(("host", due_look.host))
            state = breaker.allows(now)
            if breaker.held(now) or state == "none" or (host is not None and host.allows(now) != "all"):
                return None
            look = claim_look(connection, due_look.job_id, now=now, lease=self._lease)
            if look is None:
                return None
            refusal = self._api.permits(look.job.address, look.job.remote_id)
            if refusal is not None:
                log.error("the fetch address of an expired job is refused job=%s reason=%s", due_look.job_id, refusal)
                defer_look(connection, look, due_at=now + REFUSED_WAIT, sent=False)
                return None
            if state == "probe":
                save_breaker(connection, circuit_breaker.with_probe_started(breaker, now=now, lease=self._lease))
            return look, state == "probe"

    def _defer_unsent(self, look: ClaimedLook, wait: timedelta) -> None:
        """Defer a look whose request was not sent."""
        with self._engine.begin() as connection:
            if lock_look(connection, look):
                defer_look(connection, look, due_at=database_now(connection) + wait, sent=False)

    def _record(
        self,
        look: ClaimedLook,
        answer: ApiReply,
        probe: bool,
        sent: float,
        breakers: Breakers,
    ) -> None:
        poll_answer = PollAnswer(look.job, answer.reply, probe, sent, raw=answer.raw)
        poll_answer = mark_own_path_error(poll_answer, self._api.default_address)
        accepted_rates = count_accepted(self._budget, [poll_answer])
        revived = Revived({}, ())
        with self._engine.begin() as connection:
            now = database_now(connection)
            update_breakers(connection, [poll_answer], breakers, self._rps, accepted_rates, now=now)
            tally = Tally()
            if lock_look(connection, look):
                revived = self._write_result(connection, look, poll_answer, tally, now)
            count_answers(tally, [poll_answer])
            tally.write(connection)
        if revived.jobs:
            log.info("an expired job became ready job=%s looks=%s", look.job.id, look.looks)
        self._after_commit.queue_downloads(revived.outputs)  # after the commit: the rows must exist
        self._after_commit.notify(revived.completed)

    def _write_result(
        self, connection: Connection, look: ClaimedLook, answer: PollAnswer, tally: Tally, now: datetime
    ) -> Revived:
        """Write the result of a look, in the caller's transaction."""
        reply = answer.reply
        if isinstance(reply, Ready):
            replies = {look.job.id: reply}
            revived = revive(connection, replies, tally, now=now, why="after it had expired", queued=True)
            if not revived.jobs:  # the job has outputs already
                plan_next_look(connection, look, self._after, now=now)
            return revived
        if isinstance(reply, (RateLimited, AccountRefused)) or (isinstance(reply, ApiDown) and answer.raw is None):
            defer_look(connection, look, due_at=now + BUSY_WAIT, sent=True)  # the answer is not about the job
            return Revived({}, ())
        plan_next_look(connection, look, self._after, now=now)
        about_the_job = not isinstance(reply, ApiDown) or reply.answered
        if answer.raw is not None and about_the_job:
            keep_answers(connection, [kept_answer(answer, answer.raw, self._api.kept_text)], now=now)
        return Revived({}, ())


class LookClaimLost(Exception):
    """The claim of a look may have passed to another process."""


def _host_may_be_polled(breakers: Breakers, host: str, now: datetime) -> bool:
    breaker = breakers.get(("host", host))
    return breaker is None or breaker.allows(now) == "all"


def _check_claim(look: ClaimedLook, claimed_at: float) -> None:
    """Raise LookClaimLost if the claim is so old that another process may be about to make the look."""
    if boot_seconds() - claimed_at >= LEASE_MARGIN.total_seconds():
        raise LookClaimLost(f"the look at job {look.job.id} was claimed too long ago")
