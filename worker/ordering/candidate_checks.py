"""Candidate checks: ask the API about the jobs that its calls named for uncertain orders.

A call has no signature of the API, so it is only a hint. The order gets the job if the API knows it under the account's
key, and if its answer fits the order.
"""

import logging
import time
from collections.abc import Callable
from datetime import datetime

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError

from worker.coordination.rate_limiter import RateLimiter
from worker.core.identity import FetchAddress
from worker.core.lifecycle import JobFacts
from worker.core.reply import (
    AccountRefused,
    AnotherJob,
    ApiDown,
    ApiError,
    ApiReply,
    Failed,
    Processing,
    RateLimited,
    Ready,
    Reply,
    UnknownId,
    Unread,
)
from worker.errors import NotTrackable
from worker.net.network_errors import describe
from worker.polling.answer_writer import count_answers
from worker.polling.api_client import ApiClient, WholeReply
from worker.polling.breaker_updates import Breakers, count_accepted, mark_own_path_error, update_breakers
from worker.polling.options import PollOptions
from worker.polling.request_pool import PollAnswer
from worker.polling.spare_requests import (
    AT_ONCE,
    BUSY_WAIT,
    HELD_WAIT,
    REFUSED_WAIT,
    SpareRequests,
    host_may_be_polled,
)
from worker.store.breakers import all_breakers
from worker.store.candidates import (
    ClaimedCandidate,
    DueCandidate,
    claim_candidate,
    decide_candidate,
    defer_candidate,
    defer_due_candidates,
    due_candidates,
    lock_candidate,
    other_payloads,
)
from worker.store.claims import ClaimedJob
from worker.store.counters import Tally
from worker.store.engine import database_now
from worker.store.order_results import attach
from worker.vendor.answer_fields import json_object
from worker.vendor.order_match import order_match

log = logging.getLogger(__name__)

MAX_TRIES = 5  # answers that do not decide, one `BUSY_WAIT` apart


class CandidateChecks(SpareRequests):
    """Makes the candidate checks of one process."""

    name = "candidate checks"

    def __init__(
        self,
        *,
        engine: Engine,
        api: ApiClient,
        budget: RateLimiter,
        options: PollOptions,
        attached: Callable[[], object],
    ) -> None:
        """`attached` is called after the commit when an order got its job, which is due."""
        super().__init__(engine=engine, api=api, budget=budget, options=options)
        self._attached = attached

    def _is_due(self) -> bool:
        with self._engine.connect() as connection:
            return bool(due_candidates(connection, list(self._keys), now=database_now(connection), limit=1))

    def _run(self) -> int:
        return sum(self._check(due) for due in self._checkable())

    def _checkable(self) -> list[DueCandidate]:
        """Return the due candidates of accounts and hosts that may be polled, and defer the others."""
        with self._engine.begin() as connection:
            now = database_now(connection)
            due = due_candidates(connection, list(self._keys), now=now, limit=AT_ONCE)
            breakers = all_breakers(connection) if due else {}
            free = {name: self._is_free(connection, name, breakers, now) for name in {item.account for item in due}}
            allowed = [item for item in due if free[item.account] and host_may_be_polled(breakers, item.host, now)]
            held = [item for item in due if item not in allowed]
            defer_due_candidates(connection, held, due_at=now + BUSY_WAIT)
        return allowed

    def _check(self, due: DueCandidate) -> bool:
        """Ask about one candidate if it is still due and a request is free. Return whether the API was asked."""
        key = self._keys.get(due.account)
        if self._stopping.is_set() or key is None:
            return False
        with self._engine.connect() as connection:
            breakers, now = all_breakers(connection), database_now(connection)
        reservation = self._reserve_request(due.account, breakers, now)
        if reservation is None:
            return False
        claimed = self._claim(due)
        if claimed is None:
            self._budget.give_back(reservation, 1)
            return False
        candidate, address, probe = claimed
        sent = time.monotonic()
        try:
            answer = self._api.ask_whole(address, candidate.remote_id, key)
        except Exception as error:  # a mounted adapter may raise any error
            log.exception("a candidate check failed job=%s", due.job_id)
            answer = WholeReply(ApiReply(ApiDown(f"no answer: {describe(error)}")))
        poll_answer = PollAnswer(_asked_job(candidate, address), answer.reply.reply, probe, sent)
        self._record(candidate, poll_answer, answer.body, breakers)
        return True

    def _claim(self, due: DueCandidate) -> tuple[ClaimedCandidate, FetchAddress, bool] | None:
        """Claim a candidate. Return it, the address at which the API is asked, and whether the request is a probe."""
        with self._engine.begin() as connection:
            now = database_now(connection)
            breaker = self._usable_breaker(connection, due.account, due.host, now)
            if breaker is None:
                return None
            candidate = claim_candidate(connection, due, now=now, lease=self._lease)
            if candidate is None:
                return None
            try:
                address = self._api.address_of_order(candidate.endpoint, candidate.remote_id)
            except NotTrackable as refused:
                log.error("the endpoint of an uncertain order is refused job=%s reason=%s", due.job_id, refused)
                due_at = now + REFUSED_WAIT
                defer_candidate(connection, candidate, str(refused), due_at=due_at, counts=False)
                return None
            return candidate, address, self._start_probe(connection, breaker, now)

    def _record(self, candidate: ClaimedCandidate, poll_answer: PollAnswer, body: bytes, breakers: Breakers) -> None:
        poll_answer = mark_own_path_error(poll_answer, self._api.default_address)
        accepted_rates = count_accepted(self._budget, [poll_answer])
        is_attached = False
        with self._engine.begin() as connection:
            now = database_now(connection)
            update_breakers(connection, [poll_answer], breakers, self._rps, accepted_rates, now=now)
            if lock_candidate(connection, candidate):
                is_attached = _write_result(connection, candidate, poll_answer, body, now)
            tally = Tally()
            count_answers(tally, [poll_answer])
            tally.write(connection)
        if is_attached:
            log.info("an uncertain order got its job job=%s remote_id=%s", candidate.job.id, candidate.remote_id)
            self._attached()


def _asked_job(candidate: ClaimedCandidate, address: FetchAddress) -> ClaimedJob:
    """Return the job that the answer is about, as the circuit breakers and the counters know it."""
    job = candidate.job
    facts = JobFacts(job.status, job.tracked_at, job.deadline_at, eta=job.eta)
    return ClaimedJob(
        *(job.id, "", job.account, candidate.remote_id, job.kind, address, job.eta, 1, job.submitted_at, facts)
    )


def _write_result(
    connection: Connection, candidate: ClaimedCandidate, answer: PollAnswer, body: bytes, now: datetime
) -> bool:
    """Write what the answer says about a candidate. Return whether the order got its job."""
    reply = answer.reply
    if isinstance(reply, (RateLimited, AccountRefused)) or (isinstance(reply, ApiDown) and not reply.answered):
        due_at = now + (HELD_WAIT if isinstance(reply, AccountRefused) else BUSY_WAIT)
        defer_candidate(connection, candidate, None, due_at=due_at, counts=False)
        return False
    if isinstance(reply, (Processing, Ready)):
        match = order_match(candidate.payload, json_object(body))
        if match.differs is not None:
            decide_candidate(connection, candidate, f"it is another job: its {match.differs} differs")
            return False
        others = 0 if match.is_proven else other_payloads(connection, candidate)
        if others:
            note = f"the API knows it, but its answer does not tell which of {others + 1} different orders it is"
            decide_candidate(connection, candidate, note)
            return False
        return _attach(connection, candidate, answer.job.address, now)
    note = _note(reply)
    if isinstance(reply, AnotherJob) or candidate.tries >= MAX_TRIES:
        decide_candidate(connection, candidate, note)
    else:
        defer_candidate(connection, candidate, note, due_at=now + BUSY_WAIT, counts=True)
    return False


def _attach(connection: Connection, candidate: ClaimedCandidate, address: FetchAddress, now: datetime) -> bool:
    try:
        with connection.begin_nested():
            attach(connection, candidate.job.id, candidate.remote_id, address, default=False, now=now)
    except IntegrityError:
        decide_candidate(connection, candidate, "another job of the account has this id")
        return False
    decide_candidate(connection, candidate, "the answer of the API fits, so it was attached")
    return True


def _note(reply: Reply) -> str:
    match reply:
        case AnotherJob(echoed):
            return f"the API answered about another job: {echoed}"
        case Failed(message) | UnknownId(message) | ApiError(message) | Unread(message) | ApiDown(message):
            return f"the API answered: {message}"
        case _:
            return "the API answered without an output"
