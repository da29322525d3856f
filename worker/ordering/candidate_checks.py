"""Candidate checks: ask the API about the jobs that its calls named for uncertain orders.

A call has no signature of the API, so it is only a hint. The order gets the job if the API says that it is ready, if no
job here has its id, and if the answer differs from this order in nothing, and from other orders of the reference in
something.
"""

import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

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
    is_twin_being_sent,
    known_remote_ids,
    lock_candidate,
    rival_payloads,
)
from worker.store.claims import ClaimedJob
from worker.store.counters import Tally
from worker.store.engine import database_now
from worker.store.order_results import attach
from worker.vendor.answer_fields import json_object
from worker.vendor.order_match import differing_field

log = logging.getLogger(__name__)

MAX_TRIES = 5  # answers that do not decide, one `BUSY_WAIT` apart
LOST_TRIES = 3  # tries beyond these that were claimed and lost: the answer may end its process
MAX_AGE = timedelta(days=1)  # since the call; then its links may have ended
TWIN_WAIT = timedelta(seconds=5)
KNOWN_ID = "another job of the account has this id"


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
            allowed, held = self._split(connection, due, now)
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
            with self._engine.begin() as connection:
                defer_due_candidates(connection, [due], due_at=now + BUSY_WAIT)
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
        fields = json_object(answer.body) if isinstance(poll_answer.reply, Ready) else None
        self._record(candidate, poll_answer, fields, breakers)
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
            if candidate.named_at < now - MAX_AGE or candidate.tries > MAX_TRIES + LOST_TRIES:
                decide_candidate(connection, candidate, "the API gave no answer that decides about it")
                return None
            try:
                address = self._api.address_of_order(candidate.endpoint, candidate.remote_id)
            except NotTrackable as refused:
                log.error("the endpoint of an uncertain order is refused job=%s reason=%s", due.job_id, refused)
                due_at = now + REFUSED_WAIT
                defer_candidate(connection, candidate, str(refused), due_at=due_at, counts=False)
                return None
            return candidate, address, self._start_probe(connection, breaker, now)

    def _record(
        self,
        candidate: ClaimedCandidate,
        poll_answer: PollAnswer,
        fields: Mapping[str, Any] | None,
        breakers: Breakers,
    ) -> None:
        poll_answer = mark_own_path_error(poll_answer, self._api.default_address)
        accepted_rates = count_accepted(self._budget, [poll_answer])
        is_attached = False
        with self._engine.begin() as connection:
            now = database_now(connection)
            update_breakers(connection, [poll_answer], breakers, self._rps, accepted_rates, now=now)
            if lock_candidate(connection, candidate):
                is_attached = _write_result(connection, candidate, poll_answer, fields, now)
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
    connection: Connection,
    candidate: ClaimedCandidate,
    answer: PollAnswer,
    fields: Mapping[str, Any] | None,
    now: datetime,
) -> bool:
    """Write what the answer says about a candidate. Return whether the order got its job."""
    reply = answer.reply
    if isinstance(reply, Ready):
        return _attach_if_it_fits(connection, candidate, answer.job.address, fields, now)
    note: str | None = _note(reply)
    counts, wait = False, BUSY_WAIT
    if isinstance(reply, (RateLimited, AccountRefused)) or (isinstance(reply, ApiDown) and not reply.answered):
        note, wait = None, HELD_WAIT if isinstance(reply, AccountRefused) else BUSY_WAIT
    elif not isinstance(reply, Processing):  # an answer about a job that is not ready may have the id of another one
        counts = True
    if isinstance(reply, AnotherJob) or (counts and candidate.tries >= MAX_TRIES):
        decide_candidate(connection, candidate, note or "")
    else:
        defer_candidate(connection, candidate, note, due_at=now + wait, counts=counts)
    return False


def _attach_if_it_fits(
    connection: Connection,
    candidate: ClaimedCandidate,
    address: FetchAddress,
    fields: Mapping[str, Any] | None,
    now: datetime,
) -> bool:
    """Attach a job that is ready, if it can only be the one of this order, or of an equal one."""
    if known_remote_ids(connection, candidate.job.account, [candidate.remote_id]):
        decide_candidate(connection, candidate, KNOWN_ID)
        return False
    if is_twin_being_sent(connection, candidate):
        defer_candidate(connection, candidate, None, due_at=now + TWIN_WAIT, counts=False)
        return False
    if field := differing_field(candidate.payload, fields):
        note = f"its {field} differs from the order's: compare it yourself before you retry"
        decide_candidate(connection, candidate, note)
        return False
    if any(differing_field(payload, fields) is None for payload in rival_payloads(connection, candidate)):
        note = "the API has it, but its answer does not tell which order of the reference it belongs to"
        decide_candidate(connection, candidate, note)
        return False
    try:
        with connection.begin_nested():
            attach(connection, candidate.job.id, candidate.remote_id, address, default=False, now=now)
    except IntegrityError:
        decide_candidate(connection, candidate, KNOWN_ID)
        return False
    decide_candidate(connection, candidate, "the answer of the API fits, so it was attached")
    return True


def _note(reply: Reply) -> str:
    match reply:
        case AnotherJob(echoed):
            return f"the API answered about another job: {echoed}"
        case Failed(message) | UnknownId(message) | ApiError(message) | Unread(message) | ApiDown(message):
            return f"the API answered: {message}"
        case Processing():
            return "the API answered that it is not ready"
        case _:
            return "the API answered without an output"
