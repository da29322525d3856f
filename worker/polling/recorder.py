"""Records answers: one transaction writes a batch, and updates the circuit breakers that it affects.

Answers are held in memory until they are written. If the database is away, all of them wait. If another transaction
has locked a job's row, only that answer waits. An answer that can't be written by any statement ends its job as
`unwritable`.
"""

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from worker.core import circuit_breaker
from worker.core.circuit_breaker import BreakerInput, CircuitBreaker, RateMeasurement, Scope
from worker.core.histograms import COUNTED_AS
from worker.core.identity import FetchAddress
from worker.core.lifecycle import AskAgain, EndJob, JobDecision, JobFacts, after_answer, note_of
from worker.core.pacing.policy import Pace, PacedJob
from worker.core.reply import ApiDown, ApiError, Empty, Processing, RawAnswer, Ready, Reply, Unread
from worker.polling.duration_learner import DurationLearner
from worker.polling.kept_answers import kept_answers
from worker.polling.kept_text import KeptText
from worker.polling.request_pool import PollAnswer
from worker.store.breakers import all_breakers, locked_breaker, mark_asked, save_breaker
from worker.store.claims import ClaimedJob
from worker.store.counters import ANSWERS, Tally
from worker.store.engine import LOCK_WAIT, database_now, error_kind, is_server_error
from worker.store.jobs import readdress
from worker.store.kept_answers import keep_answers
from worker.store.late_looks import plan_looks
from worker.store.results import Outcome, Recorded, jobs_locked_elsewhere, quarantine, record_answers

log = logging.getLogger(__name__)

MAX_BATCH = 500
BATCH_PATIENCE, SINGLE_PATIENCE = 2.0, 0.1  # seconds to wait for a row that another transaction has locked
LOCKED_SECONDS = 2.0
MARK_SECONDS = 5.0
TROUBLE_WAIT = 5.0
VAGUE_WAIT = 10.0  # seconds until the next poll after an error that does not say what is wrong
MOVED = Unread("HTTP 404: the API has no such path; SD_API_URL was corrected and is used from now on")

Breakers = dict[tuple[Scope, str], CircuitBreaker]


@dataclass(frozen=True, slots=True)
class _Written:
    recorded: Recorded
    changed_breakers: Mapping[tuple[Scope, str], CircuitBreaker]


class Recorder:
    """Writes the answers of one poller. Not thread-safe: call it from the poll loop only."""

    def __init__(
        self,
        *,
        engine: Engine,
        pace: Pace,
        rps: Callable[[str], float],
        queue_downloads: Callable[[Sequence[int]], None],
        notify: Callable[[Sequence[int]], None],
        kept_text: Callable[[RawAnswer], KeptText],
        late_looks: Sequence[float] = (),
        rng: random.Random | None = None,
        default_address: Callable[[str], FetchAddress] | None = None,
    ) -> None:
        self._engine = engine
        self._default_address = default_address
        self._batches = engine.execution_options(**{LOCK_WAIT: BATCH_PATIENCE})
        self._single = engine.execution_options(**{LOCK_WAIT: SINGLE_PATIENCE})
        self._pace = pace
        self._learner = DurationLearner(engine)
        self._min_interval = timedelta(seconds=pace.min_wait)
        self._rps = rps
        self._queue_downloads = queue_downloads
        self._notify = notify
        self._kept_text = kept_text
        self._late_looks = tuple(late_looks)
        self._rng = rng or random.Random()  # spreads polls in time; not used for security
        self._waiting: list[PollAnswer] = []
        self._unlearned: list[PollAnswer] = []
        self._delays: dict[int, float] = {}  # of ready jobs, until their answer is written
        self._locked: list[PollAnswer] = []
        self._unlock_at = 0.0
        self._accepted_rates: dict[str, float] = {}
        self._marked_at = 0.0

    @property
    def waiting(self) -> int:
        """How many answers are written as soon as the database is available."""
        return len(self._waiting)

    @property
    def unwritten(self) -> int:
        """How many answers are not written yet, including those of locked rows."""
        return len(self._waiting) + len(self._locked)

    def take(self, answers: Sequence[PollAnswer], accepted_rates: Mapping[str, float]) -> None:
        """Accept answers for writing. `accepted_rates` has the requests per second that the API accepts, by account."""
        self._waiting += answers
        self._unlearned += answers
        self._accepted_rates.update(accepted_rates)

    def write(self, breakers: Breakers) -> int:
        """Write the accepted answers and update the circuit breakers. Return how many claims were lost.

        Raises the errors of a database that is away. Unwritten answers are kept.
        """
        self._learner.prepare({(answer.job.account, answer.job.kind) for answer in (*self._waiting, *self._locked)})
        if self._locked and time.monotonic() >= self._unlock_at:
            self._unlock_at = time.monotonic() + LOCKED_SECONDS
            self._waiting, self._locked = self._locked + self._waiting, []
            self._set_aside_locked(len(self._waiting))
        lost = 0
        while self._waiting:
            batch = self._waiting[:MAX_BATCH]
            try:
                written = self._write(self._batches, batch, breakers)
            except Exception as error:  # an answer may cause any error in a statement; it must not affect the others
                if is_server_error(error):
                    raise
                if error_kind(error) == "locked" and self._set_aside_locked(len(batch)):
                    continue
                log.error("a batch of answers could not be written, each is written alone reason=%s", _reason(error))
                lost += self._write_each(len(batch), breakers)
            else:
                del self._waiting[: len(batch)]
                lost += self._finish(written, breakers)
        try:
            self._learner.share_if_due()
        except DBAPIError as error:
            if error_kind(error) != "locked":
                raise
            log.warning("pace models are shared later reason=%s", _reason(error))
        return lost

    def share_models(self) -> None:
        """Share what was learned, before a pause. If the database is away, it is shared later."""
        try:
            self._learner.share()
        except SQLAlchemyError as error:
            log.warning("pace models are shared later reason=%s", _reason(error))

    def _set_aside_locked(self, count: int) -> bool:
        """Set aside the answers among the first `count` whose rows are locked. Return whether there were any.

        One statement finds the locked rows, so that a hundred of them take no more time than one.
        """
        answers = self._waiting[:count]
        with self._single.begin() as connection:
            locked = jobs_locked_elsewhere(connection, [answer.job.id for answer in answers])
        if not locked:
            return False
        self._locked += [answer for answer in answers if answer.job.id in locked]
        self._waiting[:count] = [answer for answer in answers if answer.job.id not in locked]
        log.warning("rows are locked by another transaction, their answers wait count=%s", len(self._locked))
        return True

    def _write_each(self, count: int, breakers: Breakers) -> int:
        lost = 0
        for _ in range(count):
            answer = self._waiting[0]
            try:
                written = self._write(self._single, [answer], breakers)
            except Exception as error:  # see `write`
                if is_server_error(error):
                    raise
                if not isinstance(error, (SQLAlchemyError, ValueError)):
                    log.exception("internal error, the answer waits job=%s", answer.job.id)
                    self._locked.append(answer)
                elif error_kind(error) == "locked" or not self._quarantine(answer, error):
                    self._locked.append(answer)
                del self._waiting[0]
            else:
                del self._waiting[0]
                lost += self._finish(written, breakers)
        if self._locked:
            log.warning("rows are locked by another transaction, their answers wait count=%s", len(self._locked))
        return lost

    def _finish(self, written: _Written, breakers: Breakers) -> int:
        breakers.update(written.changed_breakers)
        if not self._waiting and not self._locked:
            self._delays.clear()
        self._queue_downloads(written.recorded.outputs)  # after the commit: the rows must be there
        self._notify(written.recorded.finished)
        return written.recorded.lost

    def _quarantine(self, answer: PollAnswer, error: Exception) -> bool:
        log.error("an answer can't be written, its job ends job=%s reason=%s", answer.job.id, _reason(error))
        try:
            with self._single.begin() as connection:
                now = database_now(connection)
                ended = quarantine(
                    connection, answer.job, f"its answer could not be written: {_reason(error)}", now=now
                )
        except Exception as second_error:  # nothing is lost: the answer is kept
            if is_server_error(second_error):
                raise
            return False
        if ended:
            self._notify([answer.job.id])
        return True

    # ── one transaction ───────────────────────────────────────────────────────────────────────────────────────────────

    def _write(self, engine: Engine, answers: Sequence[PollAnswer], known_breakers: Breakers) -> _Written:
        # Prepare texts before the transaction, which holds locks. Of other answers, few are stored.
        texts = {
            answer.raw: self._kept_text(answer.raw)
            for answer in answers
            if type(answer.reply) is Unread and answer.raw is not None
        }
        with engine.begin() as connection:
            now = database_now(connection)
            self._learn(now)
            if time.monotonic() - self._marked_at >= MARK_SECONDS:
                self._marked_at = time.monotonic()
                mark_asked(connection, {answer.job.account for answer in answers}, now=now)
            answers = self._move_to_default_address(connection, answers)
            changed = update_breakers(connection, answers, known_breakers, self._limit, now=now)
            outcomes = [self._outcome(answer, now) for answer in answers]
            if any(_expires(outcome) for outcome in outcomes):
                # A job that was not polled has not expired, and a hold may have prevented polls.
                held_breakers = all_breakers(connection)
                outcomes = [
                    self._outcome(answer, now, held_breakers) if _expires(outcome) else outcome
                    for answer, outcome in zip(answers, outcomes, strict=True)
                ]
            tally = Tally()
            recorded = record_answers(connection, outcomes, tally, now=now)
            kept_rows = kept_answers(
                answers, outcomes, lambda raw: texts[raw] if raw in texts else self._kept_text(raw)
            )
            if kept_rows:
                keep_answers(connection, kept_rows, now=now)
            expired = [outcome.job.id for outcome in outcomes if _expires(outcome)]
            plan_looks(connection, expired, self._late_looks, now=now)
            count_answers(tally, answers)
            tally.write(connection)
            return _Written(recorded, changed)

    def _move_to_default_address(self, connection: Connection, answers: Sequence[PollAnswer]) -> Sequence[PollAnswer]:
        """Move jobs that were tracked under a wrong SD_API_URL to the current one. Their answers become `MOVED`.

        If the job has an address of its own, such an answer is about the job, and its deadline counts.
        """
        if self._default_address is None:
            return answers
        answers = [mark_own_path_error(answer, self._default_address) for answer in answers]
        new_addresses: dict[int, FetchAddress] = {}
        for answer in answers:
            if isinstance(answer.reply, ApiDown) and answer.reply.no_such_path:
                default = self._default_address(answer.job.remote_id)
                if default.host == answer.job.address.host and default.base != answer.job.address.base:
                    new_addresses[answer.job.id] = default
        if not new_addresses:
            return answers
        default = next(iter(new_addresses.values()))
        moved = readdress(connection, list(new_addresses), default.base, default.host)
        if moved:
            log.warning("the API has no such path, jobs without an address move to SD_API_URL jobs=%s", len(moved))
        return [answer._replace(reply=MOVED, raw=None) if answer.job.id in moved else answer for answer in answers]

    def _learn(self, now: datetime) -> None:
        """Learn from each answer once, however often its write is tried."""
        for answer in self._unlearned:
            job, ready = answer.job, isinstance(answer.reply, Ready)
            if (ready or isinstance(answer.reply, Processing)) and job.facts.status == "pending":
                age = (now - job.submitted_at).total_seconds() - (time.monotonic() - answer.sent)
                paced_job = _paced_job(job, age)
                planned = (
                    age
                    if job.pace_scale is None
                    else paced_job.not_ready_age + max(job.pace_scale, self._pace.min_wait)
                )
                self._learner.observe(job.account, job.kind, paced_job, ready=ready, planned=planned)
                if ready:
                    self._delays[job.id] = self._learner.model(job.account, job.kind).by_age.delay
        self._unlearned = []

    def _outcome(
        self, answer: PollAnswer, now: datetime, held_breakers: Mapping[tuple[Scope, str], CircuitBreaker] | None = None
    ) -> Outcome:
        job, reply = answer.job, answer.reply
        facts = job.facts if held_breakers is None else _with_hold(job, held_breakers, now)
        step: JobDecision
        if reply is MOVED:  # the job was not polled at its right address yet, so nothing can end it
            step = AskAgain(facts.strikes, MOVED.message)
        else:
            step = after_answer(facts, reply, now=now, min_interval=self._min_interval)
        if not isinstance(step, AskAgain):
            return Outcome(job, step, note_of(reply), delay=self._delays.get(job.id), promised=_promised(reply))
        not_ready = isinstance(reply, Processing)
        eta = _changed_eta(job, reply)
        waiting = _paced_job(job, (now - job.submitted_at).total_seconds(), not_ready=not_ready, eta=eta, now=now)
        model = self._learner.model(job.account, job.kind)
        plan = self._pace.next(waiting, model, spread=self._rng.random())
        if isinstance(reply, ApiDown):
            plan = plan._replace(wait=max(plan.wait, TROUBLE_WAIT * (1 + self._rng.random())))
        elif isinstance(reply, ApiError) and reply.vague:
            plan = plan._replace(wait=max(plan.wait, VAGUE_WAIT))
        promised = _promised(reply) if _is_power_of_two(job.polls) else ()
        return Outcome(job, step, step.note, plan, not_ready, eta, promised=promised)

    def _limit(self, account: str) -> RateMeasurement:
        return RateMeasurement(self._rps(account), self._accepted_rates.get(account, 0.0))


def mark_own_path_error(answer: PollAnswer, default_address: Callable[[str], FetchAddress]) -> PollAnswer:
    """Mark a 404 about a path that only this job uses as an answer about the job: the host itself works.

    If the API has answered "not ready" at that path before, the path is right and the host has a problem.
    """
    reply, job = answer.reply, answer.job
    if not isinstance(reply, ApiDown) or not reply.no_such_path or job.not_ready_at is not None:
        return answer
    if job.address.base == default_address(job.remote_id).base:
        return answer
    return answer._replace(reply=replace(reply, answered=True))


def update_breakers(
    connection: Connection,
    answers: Sequence[PollAnswer],
    known_breakers: Mapping[tuple[Scope, str], CircuitBreaker],
    limit: Callable[[str], RateMeasurement],
    *,
    now: datetime,
) -> Breakers:
    """Update the circuit breakers with these answers. Return the changed ones. A row is locked only if it changes.

    `known_breakers` has the breakers as they were read last. `limit` returns the rate measurement of an account.
    """
    changed: Breakers = {}
    for (scope, name), breaker_answers in sorted(_answers_by_breaker(answers).items()):
        inputs = [
            BreakerInput(answer.reply, now - timedelta(seconds=time.monotonic() - answer.sent), answer.probe)
            for answer in breaker_answers
        ]
        breaker = known_breakers.get((scope, name))
        if breaker is None or circuit_breaker.after_replies(breaker, inputs, limit(name), now=now) != breaker:
            locked = locked_breaker(connection, scope, name)
            breaker = circuit_breaker.after_replies(locked, inputs, limit(name), now=now)
            save_breaker(connection, breaker)
            _log_hold(locked, breaker, now)
            changed[scope, name] = breaker
    return changed


def count_answers(tally: Tally, answers: Sequence[PollAnswer]) -> None:
    """Count answers by account and class."""
    for (account, reply), times in Counter((answer.job.account, type(answer.reply)) for answer in answers).items():
        label = reply.__name__.lower()
        tally.add(ANSWERS, COUNTED_AS.get(label, label), account=account, times=times)


def _paced_job(
    job: ClaimedJob, age: float, *, not_ready: bool = False, eta: float | None = None, now: datetime | None = None
) -> PacedJob:
    """Return a job as pacing sees it at `age`. `not_ready`: the answer just said so. `eta`: a new estimate, if any."""
    since = job.submitted_at
    not_ready_age = 0.0 if job.not_ready_at is None else (job.not_ready_at - since).total_seconds()
    eta_at = now if eta is not None else job.eta_at
    return PacedJob(
        age,
        age if not_ready else min(not_ready_age, age),
        job.eta if eta is None else eta,
        0.0 if eta_at is None else (eta_at - since).total_seconds(),
        job.polls,
        (job.facts.deadline_at - since).total_seconds() - age,
    )


def _changed_eta(job: ClaimedJob, reply: Reply) -> float | None:
    """Return the ETA of an answer if it differs from the known one. The same ETA does not restart its clock."""
    eta = reply.eta if isinstance(reply, Processing) else None
    if eta is not None and eta > (job.facts.deadline_at - job.submitted_at).total_seconds():
        return None  # an ETA beyond the deadline is ignored
    return None if eta is None or (job.eta is not None and abs(eta - job.eta) < 0.01 * job.eta) else eta


def _promised(reply: Reply) -> tuple[str, ...]:
    """Return the links at which an answer promised outputs."""
    return reply.promised if isinstance(reply, Processing | Empty) else ()


def _is_power_of_two(polls: int) -> bool:
    """Return whether the promised links of this answer are stored. Every answer repeats them, so a few are enough."""
    return polls & (polls - 1) == 0


def _answers_by_breaker(answers: Sequence[PollAnswer]) -> dict[tuple[Scope, str], list[PollAnswer]]:
    """Return the answers that concern each circuit breaker. Of equal consecutive "not ready" answers one is enough."""
    by_breaker: dict[tuple[Scope, str], list[PollAnswer]] = {}
    for answer in answers:
        keys: tuple[tuple[Scope, str], ...] = (("account", answer.job.account), ("host", answer.job.address.host))
        for key in keys:
            breaker_answers = by_breaker.setdefault(key, [])
            repeated = (
                breaker_answers
                and not answer.probe
                and type(breaker_answers[-1].reply) is type(answer.reply) is Processing
            )
            if not repeated:
                breaker_answers.append(answer)
    return by_breaker


def _expires(outcome: Outcome) -> bool:
    return isinstance(outcome.step, EndJob) and outcome.step.status == "expired"


def _with_hold(job: ClaimedJob, breakers: Mapping[tuple[Scope, str], CircuitBreaker], now: datetime) -> JobFacts:
    hold_ends = [
        hold_end
        for breaker in (breakers.get(("account", job.account)), breakers.get(("host", job.address.host)))
        if breaker is not None and (hold_end := breaker.last_hold_end(now)) is not None
    ]
    return job.facts._replace(last_hold_end=max(hold_ends, default=None))


def _log_hold(before: CircuitBreaker, after: CircuitBreaker, now: datetime) -> None:
    if after.held(now) and not before.held(now):
        log.warning("held scope=%s name=%s reason=%s", after.scope, after.name, after.why)
        if after.ceiling is not None and after.ceiling != before.ceiling:
            log.warning("slowed account=%s ceiling_per_second=%.1f", after.name, after.ceiling)
    elif before.held(now) and not after.held(now):
        log.warning("resumed scope=%s name=%s", after.scope, after.name)


def _reason(error: Exception) -> str:
    """Return the class of the driver's error. The error's text is not used, since it may quote the row."""
    return type(getattr(error, "orig", None) or error).__name__
