"""Writes answers: a batch in one transaction, with the gates that it moves. What can't be written spoils no batch.

Answers are kept until they are written. Where the database is away they wait for it; where somebody has locked a job's
row, that one answer waits; an answer that no statement can write ends its job as `unwritable`.
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

from worker.core import circuit_breaker as breakers
from worker.core.circuit_breaker import BreakerInput, CircuitBreaker, RateMeasurement, Scope
from worker.core.histograms import COUNTED_AS
from worker.core.identity import FetchAddress
from worker.core.lifecycle import AskAgain, EndJob, JobDecision, JobFacts, after_answer, note_of
from worker.core.pacing.policy import Pace, PacedJob
from worker.core.reply import ApiDown, ApiError, Empty, Processing, RawAnswer, Ready, Reply, Unread
from worker.polling.kept_answers import kept_answers
from worker.polling.kept_text import KeptText
from worker.polling.pace_learner import PaceLearner
from worker.polling.request_pool import PollAnswer
from worker.store.breakers import all_breakers, locked_breaker, mark_asked, save_breaker
from worker.store.claims import ClaimedJob
from worker.store.counters import ANSWERS, Tally
from worker.store.engine import LOCK_WAIT, database_now, error_kind, is_server_error
from worker.store.jobs import readdress
from worker.store.kept_answers import keep_answers
from worker.store.late_looks import plan_looks
from worker.store.results import Outcome, Recorded, locked_jobs, quarantine, record_answers

log = logging.getLogger(__name__)

WRITE_MOST = 500
BATCH_PATIENCE, SINGLE_PATIENCE = 2.0, 0.1  # seconds that a row which somebody else has locked is waited for
LOCKED_SECONDS = 2.0
MARK_SECONDS = 5.0
TROUBLE_WAIT = 5.0
VAGUE_WAIT = 10.0  # seconds until a job is asked about again after an error that does not say what is wrong
MOVED = Unread("HTTP 404: the API has no such path; SD_API_URL was corrected, and is asked from now on")

Breakers = dict[tuple[Scope, str], CircuitBreaker]


@dataclass(frozen=True, slots=True)
class _Written:
    recorded: Recorded
    moved: Mapping[tuple[Scope, str], CircuitBreaker]


class Recorder:
    """Writes for one poller. All of it is for the one thread that runs the show."""

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
        dice: random.Random | None = None,
        default_address: Callable[[str], FetchAddress] | None = None,
    ) -> None:
        self._engine = engine
        self._default_address = default_address
        self._batches = engine.execution_options(**{LOCK_WAIT: BATCH_PATIENCE})
        self._single = engine.execution_options(**{LOCK_WAIT: SINGLE_PATIENCE})
        self._pace = pace
        self._learner = PaceLearner(engine)
        self._least = timedelta(seconds=pace.min_wait)
        self._rps = rps
        self._queue_downloads = queue_downloads
        self._tell = notify
        self._kept_text = kept_text
        self._late_looks = tuple(late_looks)
        self._random = dice or random.Random()  # spreads polls in time, guards nothing
        self._waiting: list[PollAnswer] = []
        self._unlearned: list[PollAnswer] = []
        self._delays: dict[int, float] = {}  # of jobs that were found ready, until that is written
        self._locked: list[PollAnswer] = []
        self._unlock_at = 0.0
        self._taken: dict[str, float] = {}
        self._marked_at = 0.0

    @property
    def waiting(self) -> int:
        """Answers that are to be written as soon as the database lets us."""
        return len(self._waiting)

    @property
    def kept(self) -> int:
        """All answers that are not written yet, those of locked rows too."""
        return len(self._waiting) + len(self._locked)

    def take(self, answers: Sequence[PollAnswer], taken: Mapping[str, float]) -> None:
        """Keeps answers. `taken` is how many requests per second the API took of each account just now."""
        self._waiting += answers
        self._unlearned += answers
        self._taken.update(taken)

    def write(self, known: Breakers) -> int:
        """Writes what was taken, and moves the gates in `known` with it; how many claims had been lost.

        Raises what the database raises where it is away; what is not written yet is kept.
        """
        self._learner.prepare({(one.job.account, one.job.kind) for one in (*self._waiting, *self._locked)})
        if self._locked and time.monotonic() >= self._unlock_at:
            self._unlock_at = time.monotonic() + LOCKED_SECONDS
            self._waiting, self._locked = self._locked + self._waiting, []
            self._put_locked_aside(len(self._waiting))
        lost = 0
        while self._waiting:
            batch = self._waiting[:WRITE_MOST]
            try:
                done = self._write(self._batches, batch, known)
            except Exception as error:  # whatever a row can do to a statement; only its own answer may suffer
                if is_server_error(error):
                    raise
                if error_kind(error) == "locked" and self._put_locked_aside(len(batch)):
                    continue
                log.error("a batch of answers could not be written, writing them singly reason=%s", _reason(error))
                lost += self._write_singly(len(batch), known)
            else:
                del self._waiting[: len(batch)]
                lost += self._finish(done, known)
        try:
            self._learner.share_if_due()
        except DBAPIError as error:
            if error_kind(error) != "locked":
                raise
            log.warning("what was learned is shared later reason=%s", _reason(error))
        return lost

    def rest(self) -> None:
        """Before a pause: shares what was learned. Where the database is away it is shared later."""
        try:
            self._learner.share()
        except SQLAlchemyError as error:
            log.warning("what was learned is shared later reason=%s", _reason(error))

    def _put_locked_aside(self, count: int) -> bool:
        """Move the answers whose rows somebody has locked out of the first `count`; return whether there were any.

        One statement finds them, so that a hundred locked rows cost no more time than one.
        """
        answers = self._waiting[:count]
        with self._single.begin() as connection:
            locked = locked_jobs(connection, [answer.job.id for answer in answers])
        if not locked:
            return False
        self._locked += [answer for answer in answers if answer.job.id in locked]
        self._waiting[:count] = [answer for answer in answers if answer.job.id not in locked]
        log.warning("rows are locked by somebody else, their answers wait count=%s", len(self._locked))
        return True

    def _write_singly(self, count: int, known: Breakers) -> int:
        lost = 0
        for _ in range(count):
            one = self._waiting[0]
            try:
                done = self._write(self._single, [one], known)
            except Exception as error:  # as above
                if is_server_error(error):
                    raise
                if not isinstance(error, (SQLAlchemyError, ValueError)):
                    log.exception("a fault of ours, the answer waits job=%s", one.job.id)
                    self._locked.append(one)
                elif error_kind(error) == "locked" or not self._quarantine(one, error):
                    self._locked.append(one)
                del self._waiting[0]
            else:
                del self._waiting[0]
                lost += self._finish(done, known)
        if self._locked:
            log.warning("rows are locked by somebody else, their answers wait count=%s", len(self._locked))
        return lost

    def _finish(self, done: _Written, known: Breakers) -> int:
        known.update(done.moved)
        if not self._waiting and not self._locked:
            self._delays.clear()
        self._queue_downloads(done.recorded.outputs)  # after the commit: the rows must be there
        self._tell(done.recorded.finished)
        return done.recorded.lost

    def _quarantine(self, one: PollAnswer, error: Exception) -> bool:
        log.error("an answer can't be written, its job is set aside job=%s reason=%s", one.job.id, _reason(error))
        try:
            with self._single.begin() as connection:
                now = database_now(connection)
                ended = quarantine(connection, one.job, f"its answer could not be written: {_reason(error)}", now=now)
        except Exception as again:  # nothing is lost: its answer waits
            if is_server_error(again):
                raise
            return False
        if ended:
            self._tell([one.job.id])
        return True

    # ── one transaction ───────────────────────────────────────────────────────────────────────────────────────────────

    def _write(self, engine: Engine, asked: Sequence[PollAnswer], known: Breakers) -> _Written:
        # Made before the transaction, which holds locks. Of the other answers hardly any is kept.
        texts = {
            one.raw: self._kept_text(one.raw) for one in asked if type(one.reply) is Unread and one.raw is not None
        }
        with engine.begin() as connection:
            now = database_now(connection)
            self._learn(now)
            if time.monotonic() - self._marked_at >= MARK_SECONDS:
                self._marked_at = time.monotonic()
                mark_asked(connection, {one.job.account for one in asked}, now=now)
            asked = self._readdressed(connection, asked)
            moved = update_breakers(connection, asked, known, self._limit, now=now)
            outcomes = [self._outcome(one, now) for one in asked]
            if any(_expires(outcome) for outcome in outcomes):
                held = all_breakers(connection)  # unasked means not expired, and a hold may have kept it unasked
                outcomes = [
                    self._outcome(one, now, held) if _expires(outcome) else outcome
                    for one, outcome in zip(asked, outcomes, strict=True)
                ]
            tally = Tally()
            recorded = record_answers(connection, outcomes, tally, now=now)
            kept = kept_answers(asked, outcomes, lambda raw: texts[raw] if raw in texts else self._kept_text(raw))
            if kept:
                keep_answers(connection, kept, now=now)
            expired = [outcome.job.id for outcome in outcomes if _expires(outcome)]
            plan_looks(connection, expired, self._late_looks, now=now)
            count_answers(tally, asked)
            tally.write(connection)
            return _Written(recorded, moved)

    def _readdressed(self, connection: Connection, asked: Sequence[PollAnswer]) -> Sequence[PollAnswer]:
        """Move jobs that were tracked under a mistyped SD_API_URL to the present one; their answers become `MOVED`.

        Of a job that has an address of its own, such an answer is about the job: its deadline counts.
        """
        if self._default_address is None:
            return asked
        asked = [mark_own_path_error(answer, self._default_address) for answer in asked]
        lost: dict[int, FetchAddress] = {}
        for answer in asked:
            if isinstance(answer.reply, ApiDown) and answer.reply.no_such_path:
                home = self._default_address(answer.job.remote_id)
                if home.host == answer.job.address.host and home.base != answer.job.address.base:
                    lost[answer.job.id] = home
        if not lost:
            return asked
        home = next(iter(lost.values()))
        moved = readdress(connection, list(lost), home.base, home.host)
        if moved:
            log.warning("the API has not the path of jobs that named none: they go to SD_API_URL jobs=%s", len(moved))
        return [answer._replace(reply=MOVED, raw=None) if answer.job.id in moved else answer for answer in asked]

    def _learn(self, now: datetime) -> None:
        """Each answer teaches once, however often it takes to write it."""
        for one in self._unlearned:
            job, ready = one.job, isinstance(one.reply, Ready)
            if (ready or isinstance(one.reply, Processing)) and job.facts.status == "pending":
                age = (now - job.submitted_at).total_seconds() - (time.monotonic() - one.sent)
                asked = _waiting(job, age)
                planned = (
                    age if job.pace_scale is None else asked.not_ready_age + max(job.pace_scale, self._pace.min_wait)
                )
                self._learner.observe(job.account, job.kind, asked, ready=ready, planned=planned)
                if ready:
                    self._delays[job.id] = self._learner.model(job.account, job.kind).by_age.delay
        self._unlearned = []

    def _outcome(
        self, one: PollAnswer, now: datetime, held: Mapping[tuple[Scope, str], CircuitBreaker] | None = None
    ) -> Outcome:
        job, reply = one.job, one.reply
        facts = job.facts if held is None else _with_hold(job, held, now)
        step: JobDecision
        if reply is MOVED:  # nobody has asked for the job at its right address yet, so nothing can end it
            step = AskAgain(facts.strikes, MOVED.message)
        else:
            step = after_answer(facts, reply, now=now, min_interval=self._least)
        if not isinstance(step, AskAgain):
            return Outcome(job, step, note_of(reply), delay=self._delays.get(job.id), promised=_promised(reply))
        not_ready = isinstance(reply, Processing)
        eta = _new_eta(job, reply)
        waiting = _waiting(job, (now - job.submitted_at).total_seconds(), not_ready=not_ready, eta=eta, now=now)
        model = self._learner.model(job.account, job.kind)
        plan = self._pace.next(waiting, model, spread=self._random.random())
        if isinstance(reply, ApiDown):
            plan = plan._replace(wait=max(plan.wait, TROUBLE_WAIT * (1 + self._random.random())))
        elif isinstance(reply, ApiError) and reply.vague:
            plan = plan._replace(wait=max(plan.wait, VAGUE_WAIT))
        promised = _promised(reply) if _is_power_of_two(job.polls) else ()
        return Outcome(job, step, step.note, plan, not_ready, eta, promised=promised)

    def _limit(self, account: str) -> RateMeasurement:
        return RateMeasurement(self._rps(account), self._taken.get(account, 0.0))


def mark_own_path_error(answer: PollAnswer, default_address: Callable[[str], FetchAddress]) -> PollAnswer:
    """Mark an answer about a path that only its job names as one about the job: its host is well.

    Where the API has said at that path that the job is not ready, the path is right, and the host is in trouble.
    """
    reply, job = answer.reply, answer.job
    if not isinstance(reply, ApiDown) or not reply.no_such_path or job.not_ready_at is not None:
        return answer
    if job.address.base == default_address(job.remote_id).base:
        return answer
    return answer._replace(reply=replace(reply, answered=True))


def update_breakers(
    connection: Connection,
    asked: Sequence[PollAnswer],
    known: Mapping[tuple[Scope, str], CircuitBreaker],
    limit: Callable[[str], RateMeasurement],
    *,
    now: datetime,
) -> Breakers:
    """Let answers move the gates they concern, and return those moved. A lock is taken only where one really changes.

    `known` are the gates as they were seen last, `limit` returns the limit of an account.
    """
    moved: Breakers = {}
    for (scope, name), mine in sorted(_by_breaker(asked).items()):
        heard = [
            BreakerInput(one.reply, now - timedelta(seconds=time.monotonic() - one.sent), one.probe) for one in mine
        ]
        breaker = known.get((scope, name))
        if breaker is None or breakers.after_replies(breaker, heard, limit(name), now=now) != breaker:
            locked = locked_breaker(connection, scope, name)
            breaker = breakers.after_replies(locked, heard, limit(name), now=now)
            save_breaker(connection, breaker)
            _tell_of_hold(locked, breaker, now)
            moved[scope, name] = breaker
    return moved


def count_answers(tally: Tally, asked: Sequence[PollAnswer]) -> None:
    """Count answers by account and class."""
    for (account, reply), times in Counter((one.job.account, type(one.reply)) for one in asked).items():
        label = reply.__name__.lower()
        tally.add(ANSWERS, COUNTED_AS.get(label, label), account=account, times=times)


def _waiting(
    job: ClaimedJob, age: float, *, not_ready: bool = False, eta: float | None = None, now: datetime | None = None
) -> PacedJob:
    """A job as pacing sees it at `age`, where it was `not_ready` just now, and a new `eta` may have come."""
    since = job.submitted_at
    seen = 0.0 if job.not_ready_at is None else (job.not_ready_at - since).total_seconds()
    eta_at = now if eta is not None else job.eta_at
    return PacedJob(
        age,
        age if not_ready else min(seen, age),
        job.eta if eta is None else eta,
        0.0 if eta_at is None else (eta_at - since).total_seconds(),
        job.polls,
        (job.facts.deadline_at - since).total_seconds() - age,
    )


def _new_eta(job: ClaimedJob, reply: Reply) -> float | None:
    """The eta of an answer, where it is another one: the same again does not start its clock anew."""
    eta = reply.eta if isinstance(reply, Processing) else None
    if eta is not None and eta > (job.facts.deadline_at - job.submitted_at).total_seconds():
        return None  # beyond the deadline it says nothing
    return None if eta is None or (job.eta is not None and abs(eta - job.eta) < 0.01 * job.eta) else eta


def _promised(reply: Reply) -> tuple[str, ...]:
    """Return the links at which an answer promised outputs."""
    return reply.promised if isinstance(reply, Processing | Empty) else ()


def _is_power_of_two(polls: int) -> bool:
    """Return whether an answer to this request has its promises kept: every answer repeats them, a few are enough."""
    return polls & (polls - 1) == 0


def _by_breaker(asked: Sequence[PollAnswer]) -> dict[tuple[Scope, str], list[PollAnswer]]:
    """Which answers concern which gate. Of those that say the same one after the other the first is enough."""
    found: dict[tuple[Scope, str], list[PollAnswer]] = {}
    for one in asked:
        concerned: tuple[tuple[Scope, str], ...] = (("account", one.job.account), ("host", one.job.address.host))
        for breaker in concerned:
            mine = found.setdefault(breaker, [])
            same = mine and not one.probe and type(mine[-1].reply) is type(one.reply) is Processing
            if not same:
                mine.append(one)
    return found


def _expires(outcome: Outcome) -> bool:
    return isinstance(outcome.step, EndJob) and outcome.step.status == "expired"


def _with_hold(job: ClaimedJob, held: Mapping[tuple[Scope, str], CircuitBreaker], now: datetime) -> JobFacts:
    ends = [
        ended
        for breaker in (held.get(("account", job.account)), held.get(("host", job.address.host)))
        if breaker is not None and (ended := breaker.last_hold_end(now)) is not None
    ]
    return job.facts._replace(last_hold_end=max(ends, default=None))


def _tell_of_hold(before: CircuitBreaker, after: CircuitBreaker, now: datetime) -> None:
    if after.held(now) and not before.held(now):
        log.warning("held scope=%s name=%s reason=%s", after.scope, after.name, after.why)
        if after.ceiling is not None and after.ceiling != before.ceiling:
            log.warning("slowed account=%s ceiling_per_second=%.1f", after.name, after.ceiling)
    elif before.held(now) and not after.held(now):
        log.warning("resumed scope=%s name=%s", after.scope, after.name)


def _reason(error: Exception) -> str:
    """What went wrong, by the class of the driver's error: its text may quote the row."""
    return type(getattr(error, "orig", None) or error).__name__
