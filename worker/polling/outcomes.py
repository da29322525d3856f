"""Decides what follows from an answer: the next state of its job, or the time of its next poll."""

import random
import time
from collections.abc import Iterable
from datetime import datetime, timedelta

from worker.core.lifecycle import AskAgain, EndJob, JobDecision, JobFacts, after_answer, note_of
from worker.core.pacing.backlog import OrderBacklog
from worker.core.pacing.policy import Pace, PacedJob
from worker.core.reply import ApiDown, ApiError, Empty, Processing, Ready, Reply, Unread
from worker.polling.breaker_updates import Breakers
from worker.polling.duration_learner import DurationLearner
from worker.polling.request_pool import PollAnswer
from worker.store.claims import ClaimedJob
from worker.store.results import Outcome

TROUBLE_WAIT = 5.0  # least seconds until the next poll after an error of the host, so that it can recover
VAGUE_WAIT = 10.0  # seconds until the next poll after an error that does not say what is wrong
MOVED = Unread("HTTP 404: the API has no such path; SD_API_URL was corrected and is used from now on")


class Outcomes:
    """Decides about the answers of one poller, and learns from them how long jobs take. Not thread-safe."""

    def __init__(self, learner: DurationLearner, pace: Pace, backlog: OrderBacklog, rng: random.Random) -> None:
        self._learner = learner
        self._pace = pace
        self._backlog = backlog
        self._min_interval = timedelta(seconds=pace.min_wait)
        self._rng = rng
        self._unlearned: list[PollAnswer] = []
        self._delays: dict[int, float] = {}  # of ready jobs, until their answer is written

    def take(self, answers: Iterable[PollAnswer]) -> None:
        """Accept answers, from which `learn` learns."""
        self._unlearned += answers

    def learn(self, now: datetime) -> None:
        """Learn from each accepted answer once, however often its write is tried."""
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

    def forget_delays(self) -> None:
        """Forget what was learned about single jobs. All answers are written."""
        self._delays.clear()

    def outcome(self, answer: PollAnswer, now: datetime, held_breakers: Breakers | None = None) -> Outcome:
        """Return what follows from an answer. With `held_breakers`, the time of a hold does not count as job time."""
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
        plan = self._backlog.pace(self._pace, job.account).next(waiting, model, spread=self._rng.random())
        if isinstance(reply, ApiDown):
            plan = plan._replace(wait=max(plan.wait, TROUBLE_WAIT * (1 + self._rng.random())))
        elif isinstance(reply, ApiError) and reply.vague:
            plan = plan._replace(wait=max(plan.wait, VAGUE_WAIT))
        promised = _promised(reply) if _is_power_of_two(job.polls) else ()
        return Outcome(job, step, step.note, plan, not_ready, eta, promised=promised)


def expires(outcome: Outcome) -> bool:
    """Return whether the job ends because of its deadline."""
    return isinstance(outcome.step, EndJob) and outcome.step.status == "expired"


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


def _with_hold(job: ClaimedJob, breakers: Breakers, now: datetime) -> JobFacts:
    hold_ends = [
        hold_end
        for breaker in (breakers.get(("account", job.account)), breakers.get(("host", job.address.host)))
        if breaker is not None and (hold_end := breaker.last_hold_end(now)) is not None
    ]
    return job.facts._replace(last_hold_end=max(hold_ends, default=None))
