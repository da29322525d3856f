"""One poll run: claim due jobs within the request budget, send the requests, record the answers, and repeat until idle.

Answers are recorded in small batches as they arrive, and the free places are filled with the next due jobs. Some jobs
are claimed ahead, so that no place waits for the database.
"""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from sqlalchemy import Engine

from worker.coordination.leases import LeaseKeeper
from worker.coordination.rate_limiter import RateLimiter
from worker.core.answer_names import describe_answers
from worker.core.pacing.backlog import OrderBacklog
from worker.core.reply import ApiReply, Reply
from worker.polling.answer_rate import AnswerRate
from worker.polling.api_client import ApiClient
from worker.polling.breaker_updates import count_accepted
from worker.polling.claimer import Claimer
from worker.polling.due_view import IDLE_SECONDS, ViewReader
from worker.polling.job_claims import JobClaims
from worker.polling.options import AfterCommit, PollOptions
from worker.polling.recorder import Recorder
from worker.polling.request_pool import PollAnswer, RequestPool
from worker.polling.run_lock import RunLock
from worker.polling.unlisted_hosts import UnlistedHosts
from worker.store.claims import ClaimedJob

log = logging.getLogger(__name__)

BACKLOG_GATHER_SECONDS = 0.01  # a job that is ready lets the next order start
REQUEST_SECONDS = 2.0  # between two requests for the same work
RUN_SECONDS = 10.0  # a task should end soon, so that monitors show what it did and its worker can stop


@dataclass(slots=True)
class PollReport:
    """What a run did, in numbers. Its text is the result of the task."""

    asked: int = 0
    lost: int = 0
    answers: Counter[type[Reply]] = field(default_factory=Counter)
    more: bool = False  # whether the run ended by its time limit, and more is due or in flight

    def __str__(self) -> str:
        return f"asked {self.asked:,}: {describe_answers(self.answers)}" if self.asked else "nothing due"


Progress = Callable[[PollReport, int], object]  # called with the report so far and the number of requests in flight


class Poller:
    """Polls for one process. `run` does the work of the task; only one run at a time is useful.

    A run can end while requests are in flight. The next run records their answers.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        api: ApiClient,
        budget: RateLimiter,
        leases: LeaseKeeper,
        options: PollOptions,
        after_commit: AfterCommit,
        backlog: OrderBacklog | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._backlog = backlog = backlog or OrderBacklog()
        rng = rng or random.Random()  # spreads polls in time and places over accounts; not used for security
        self._api = api
        self._budget = budget
        self._leases = leases
        self._progress_seconds = options.progress_seconds
        self._hand_over_seconds = options.hand_over_seconds
        self._run_lock = RunLock()
        self._requested_at: float | None = None  # when this process first requested a run for the work that is due
        self._last_request_at = 0.0
        self._stopping = threading.Event()
        self._rate = AnswerRate()
        self._views = ViewReader(engine, options.keys)
        self._pool = RequestPool(self._ask, threads=options.threads)
        self._claims = JobClaims(engine, api, leases, api_timeout=options.api_timeout, rng=rng)
        self._recorder = Recorder(
            engine=engine, api=api, options=options, after_commit=after_commit, backlog=backlog, rng=rng
        )
        self._claimer = Claimer(
            api=api,
            budget=budget,
            claims=self._claims,
            options=options,
            pool=self._pool,
            rate=self._rate,
            unlisted=UnlistedHosts(engine, options, after_commit),
            views=self._views,
            waiting_answers=lambda: self._recorder.waiting,
            rng=rng,
        )

    def stop(self) -> None:
        """Stop claiming jobs. Requests that have started are finished."""
        self._stopping.set()
        self._pool.wake()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    @property
    def last_run(self) -> float:
        """When a run was last active, by the monotonic clock."""
        return self._run_lock.last_pass

    @property
    def run_progress(self) -> tuple[float, int] | None:
        """The time of the current run's last loop, by the monotonic clock, and its thread; None outside of a run."""
        return self._run_lock.progress

    @property
    def busy(self) -> bool:
        """Whether answers are outstanding, or waiting to be written."""
        return bool(self._pool.outstanding or self._recorder.waiting)

    @property
    def unwritten(self) -> int:
        """How many answers are not written yet, including those of locked rows."""
        return self._recorder.unwritten

    def wake(self) -> None:
        """Look for due jobs at once. May be called from any thread."""
        self._claimer.look_times.alert()
        self._views.stale = True
        self._pool.wake()

    def close(self) -> None:
        """End the threads of this poller, for a process that continues without it. It can't be used afterwards."""
        self._pool.close()

    def poll_once(self) -> PollReport:
        """Poll the jobs that are due now and record the answers. For callers that control the clock."""
        report = PollReport()
        with self._run_lock.lock:
            self._views.stale = True  # the clock may have jumped
            self._claimer.claim_due_jobs()
            self._keep_leases()
            while self.busy:
                answers = self._pool.answers(IDLE_SECONDS, gather=0.0)
                if answers:
                    self._record(answers, report)
            self._release_lost_claims()
            self._keep_leases()
        return report

    def run(
        self,
        *,
        seconds: float = RUN_SECONDS,
        request_run: Callable[[], None] | None = None,
        finish: bool = False,
        progress: Progress | None = None,
    ) -> PollReport | None:
        """Poll until nothing was due for a second, or for `seconds`. Return None if another run is active.

        With `request_run` the run only watches: it calls the function when jobs are about to be due, and ends as soon
        as another run wants to start. If none does, it polls itself. With `finish` the run waits for the last answer,
        since no other run follows it in this process. `progress` is called from time to time.
        """
        if not self._run_lock.acquire(preemptible=request_run is not None, wake=self._pool.wake):
            return None
        try:
            report = self._run(time.monotonic() + seconds, request_run, finish, progress)
            self._recorder.share_models()
            return report
        finally:
            self._run_lock.release()

    def _run(
        self, until: float, request_run: Callable[[], None] | None, finish: bool, progress: Progress | None
    ) -> PollReport:
        report = PollReport()
        progress_at = time.monotonic() + self._progress_seconds
        if self._recorder.waiting:
            self._record((), report)  # if the database is still away, nothing more is claimed
        self._claims.release_unconfirmed()
        idle_until = time.monotonic() + IDLE_SECONDS
        look_times = self._claimer.look_times
        while True:
            self._release_lost_claims()
            self._run_lock.last_pass = now = time.monotonic()
            over = now >= until or self._run_lock.preempted
            if self.stopped:
                self._claims.release(self._pool.take_back())
            elif over and not (finish and self.busy):
                report.more = True
                return report
            elif (
                not over
                and look_times.due(now)
                and self._may_claim(request_run, now)
                and (self._claimer.claim_due_jobs() or self._claimer.waits_for_rate)
            ):
                idle_until = time.monotonic() + IDLE_SECONDS
            self._keep_leases()
            busy = self.busy
            if not busy and (self.stopped or (now >= idle_until and request_run is None)):
                return report
            answers = self._pool.answers(self._wait(until, idle_until, busy), gather=self._gather_seconds)
            if answers or self._recorder.unwritten:
                self._record(answers, report)
            if progress is not None and now >= progress_at:
                progress_at = now + self._progress_seconds
                progress(report, self._pool.outstanding)

    @property
    def _gather_seconds(self) -> float:
        """The seconds to wait for more answers after the first. While orders wait for a slot, hardly any."""
        seconds = self._rate.gather_seconds
        return min(seconds, BACKLOG_GATHER_SECONDS) if self._backlog.accounts else seconds

    def _may_claim(self, request_run: Callable[[], None] | None, now: float) -> bool:
        """Return whether this run may claim jobs. A run that watches gives another run the chance to do it first."""
        if request_run is None:
            self._requested_at = None
            return True
        if not self._claimer.work_ahead():
            self._requested_at = None
            return False
        if self._requested_at is None or now - self._last_request_at > REQUEST_SECONDS:
            self._requested_at, self._last_request_at = self._requested_at or now, now
            request_run()
        return now - self._requested_at > self._hand_over_seconds

    def _wait(self, until: float, idle_until: float, busy: bool) -> float:
        """Return the seconds until the next thing to do, unless an answer comes first."""
        now = time.monotonic()
        if self.stopped or now >= until:
            return IDLE_SECONDS
        return self._claimer.look_times.wait(now, until, *(() if busy or now >= idle_until else (idle_until,)))

    def _keep_leases(self) -> None:
        """Have the leases renewed while jobs are claimed, also between two runs."""
        self._claims.keep_leases(bool(self._pool.outstanding or self._recorder.unwritten))

    def _release_lost_claims(self) -> None:
        """Release the jobs that were not polled because their lease may have ended."""
        lost = self._pool.take_lost()
        if lost:
            log.warning("leases may have ended, no request was sent jobs=%s", len(lost))
        self._claims.release(lost)

    def _ask(self, job: ClaimedJob) -> ApiReply:
        permit = partial(self._leases.check, job.id, job.token)
        return self._api.ask(job.address, job.remote_id, self._views.key(job.account), permit)

    def _record(self, answers: Sequence[PollAnswer], report: PollReport) -> None:
        report.asked += len(answers)
        report.answers.update(type(answer.reply) for answer in answers)
        self._rate.count(len(answers))
        self._recorder.take(answers, count_accepted(self._budget, answers))
        if any(answer.probe for answer in answers):
            self._claimer.look_times.look_after(0.0)  # it may have closed a breaker
        lost = self._recorder.write(self._views.breakers)
        if self._backlog.accounts:  # polls may be due again before the view is read anew
            self._views.stale = True
            self._claimer.look_times.look_after(0.0)
        if lost:
            log.warning("answers came too late, their jobs have a new claim or have ended count=%s", lost)
        report.lost += lost
