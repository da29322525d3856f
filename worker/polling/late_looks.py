"""Late looks: polls expired jobs again.

A job that was not ready by its deadline may become ready later, and its links live for a while.
"""

import logging
import time
from datetime import datetime, timedelta
from functools import partial

from sqlalchemy import Connection, Engine

from worker.coordination.leases import boot_seconds
from worker.coordination.rate_limiter import RateLimiter
from worker.core.reply import AccountRefused, ApiDown, ApiReply, RateLimited, Ready
from worker.net.network_errors import describe
from worker.polling.answer_writer import count_answers
from worker.polling.api_client import ApiClient
from worker.polling.breaker_updates import Breakers, count_accepted, mark_own_path_error, update_breakers
from worker.polling.kept_answers import kept_answer
from worker.polling.options import AfterCommit, PollOptions
from worker.polling.request_pool import PollAnswer
from worker.polling.spare_requests import (
    AT_ONCE,
    BUSY_WAIT,
    HELD_WAIT,
    LEASE_MARGIN,
    REFUSED_WAIT,
    SpareRequests,
)
from worker.store.breakers import all_breakers
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


class LateLooks(SpareRequests):
    """Makes the late looks of one process."""

    name = "late looks"

    def __init__(
        self,
        *,
        engine: Engine,
        api: ApiClient,
        budget: RateLimiter,
        options: PollOptions,
        after_commit: AfterCommit,
    ) -> None:
        super().__init__(engine=engine, api=api, budget=budget, options=options)
        self._after = options.late_looks
        self._after_commit = after_commit

    def _is_due(self) -> bool:
        return bool(self._after and self._due(1))

    def _run(self) -> int:
        if not self._after:
            return 0
        with self._engine.begin() as connection:
            delete_stale_looks(connection, self._after, now=database_now(connection), limit=AT_ONCE)
        return sum(self._make_look(due) for due in self._pollable_looks())

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
            allowed, held = self._split(connection, due, now)
            defer_due_looks(connection, [look.job_id for look in held], now=now, due_at=now + HELD_WAIT)
            return allowed

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

    def _claim(self, due_look: DueLook) -> tuple[ClaimedLook, bool] | None:
        """Claim a look. Return it, and whether its request is a probe: the one request that tries an unproven key."""
        with self._engine.begin() as connection:
            now = database_now(connection)
            breaker = self._usable_breaker(connection, due_look.account, due_look.host, now)
            if breaker is None:
                return None
            look = claim_look(connection, due_look.job_id, now=now, lease=self._lease)
            if look is None:
                return None
            refusal = self._api.permits(look.job.address, look.job.remote_id)
            if refusal is not None:
                log.error("the fetch address of an expired job is refused job=%s reason=%s", due_look.job_id, refusal)
                defer_look(connection, look, due_at=now + REFUSED_WAIT, sent=False)
                return None
            return look, self._start_probe(connection, breaker, now)

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


def _check_claim(look: ClaimedLook, claimed_at: float) -> None:
    """Raise LookClaimLost if the claim is so old that another process may be about to make the look."""
    if boot_seconds() - claimed_at >= LEASE_MARGIN.total_seconds():
        raise LookClaimLost(f"the look at job {look.job.id} was claimed too long ago")
