"""One poll run: claim due jobs within the request budget, send the requests, record the answers, and repeat until idle.

Answers are recorded in small batches as they arrive, and the free places are filled with the next due jobs. Some jobs
are claimed ahead, so that no place waits for the database.
"""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial

from pydantic import SecretStr
from sqlalchemy import Connection, Engine

from worker.coordination.leases import LeaseKeeper
from worker.coordination.rate_limiter import RateLimiter, Reservation
from worker.core import circuit_breaker as breakers
from worker.core.circuit_breaker import CircuitBreaker, Scope
from worker.core.pacing.policy import Pace
from worker.core.reply import ApiDown, ApiReply, RateLimited
from worker.polling.api_client import ApiClient
from worker.polling.recorder import Recorder
from worker.polling.request_pool import PollAnswer, RequestPool
from worker.store.breakers import all_breakers, locked_breaker, save_breaker
from worker.store.claims import ClaimedJob, DueGroup, claim_jobs, due_groups, release_claimed_jobs, release_jobs
from worker.store.engine import RELAXED, database_now
from worker.store.jobs import readdress
from worker.store.late_looks import plan_looks
from worker.store.unlisted_hosts import hold_unlisted

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 128
MAX_CLAIM = 400
# Jobs claimed ahead keep the threads busy while a batch is written and the next jobs are claimed: this many seconds'
# worth, but at most a share of a second's budget, since a stalled API could get all of them at once.
AHEAD_SECONDS = 0.3
AHEAD_SHARE = 0.05
IDLE_SECONDS = 1.0
PROGRESS_SECONDS = 2.0  # least time between two progress reports of a run
RUN_SECONDS = 10.0
GATHER_SECONDS = 0.05  # answers that arrive within this time are written
MAX_GATHER_SECONDS = 0.15
BATCH = 150
BUSY_RATE = 200.0
MIN_ROOM = 32  # with fewer free places, wait for more answers before claiming: each claim has a cost
VIEW_SECONDS = 0.5  # longest time until a hold made by another process is noticed
LOOK_SECONDS = 0.05  # least time between two looks that claimed nothing
ALERT_SECONDS = 0.4  # look often after a wake-up: its sender sends no second one for a while
TAKE_OVER_SECONDS = 0.5
LATE_SECONDS = 0.1  # a claim that took longer has missed its send times
PROBE_MARGIN = timedelta(seconds=5)
UNLISTED_SECONDS = 3.0  # between two checks for jobs whose host is not on SD_API_HOSTS
REFUSED_WAIT = timedelta(seconds=60)
MOVED_WAIT = timedelta(seconds=1)


@dataclass(slots=True)
class PollReport:
    """What a run did, in numbers. Its text is the result of the task."""

    asked: int = 0
    lost: int = 0
    answers: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        if not self.asked:
            return "nothing due"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.answers.most_common())
        return f"asked {self.asked}: {kinds}"


Progress = Callable[[PollReport, int], object]  # called with the report so far and the number of requests in flight


@dataclass(frozen=True, slots=True)
class _View:
    """Circuit breakers and due groups as they were read at `read_at`, by the monotonic clock.

    `now` is the database's time at that moment.
    """

    read_at: float
    now: datetime
    breakers: dict[tuple[Scope, str], CircuitBreaker]
    groups: Sequence[DueGroup]

    def time(self) -> datetime:
        """Return the database's current time."""
        return self.now + timedelta(seconds=time.monotonic() - self.read_at)

    def breaker(self, scope: Scope, name: str) -> CircuitBreaker:
        """Return the circuit breaker of an account or host. Without a row it is closed."""
        return self.breakers.get((scope, name)) or CircuitBreaker(scope, name)


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
        keys: Mapping[str, SecretStr],
        rps: Callable[[str], float],
        pace: Pace,
        api_timeout: float,
        queue_downloads: Callable[[Sequence[int]], None],
        notify: Callable[[Sequence[int]], None],
        late_looks: Sequence[float] = (),
        threads: int = MAX_IN_FLIGHT,
        rng: random.Random | None = None,
    ) -> None:
        self._engine = engine
        self._claims = engine.execution_options(**{RELAXED: True})  # a claim that is rolled back is made again
        self._api = api
        self._budget = budget
        self._leases = leases
        self._keys = keys  # can change at any time
        self._keys_before = dict(keys)
        self._rps = rps
        self._probe_lease = timedelta(seconds=api_timeout) + PROBE_MARGIN
        self._recorder = Recorder(
            default_address=api.default_address,
            engine=engine,
            pace=pace,
            rps=rps,
            queue_downloads=queue_downloads,
            notify=notify,
            kept_text=api.kept_text,
            late_looks=late_looks,
            rng=rng,
        )
        self._pool = RequestPool(self._call, threads=threads)
        self._rng = rng or random.Random()  # spreads accounts; not used for security
        self._running = threading.Lock()
        self._stopping = threading.Event()
        self._next_run_waiting = threading.Event()
        self._preemptible = False
        self._notify = notify
        self._late_looks = tuple(late_looks)
        self._unlisted_at = 0.0
        self._view: _View | None = None
        self._view_stale = False
        self._look_at = 0.0
        self._alert_until = 0.0
        self._empty_looks = 0
        self._unconfirmed_tokens: list[str] = []
        self._renewing_leases = False
        self._answers_per_second = 0.0
        self._recorded_at = time.monotonic()
        self.last_run = time.monotonic()
        self._run_thread: int | None = None

    def stop(self) -> None:
        """Stop claiming jobs. Requests that have started are finished."""
        self._stopping.set()
        self._pool.wake()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    @property
    def run_progress(self) -> tuple[float, int] | None:
        """The time of the current run's last loop, by the monotonic clock, and its thread; None outside of a run."""
        thread = self._run_thread
        return None if thread is None else (self.last_run, thread)

    @property
    def busy(self) -> bool:
        """Whether answers are outstanding, or waiting to be written."""
        return bool(self._pool.outstanding or self._recorder.waiting)

    def wake(self) -> None:
        """Look for due jobs at once. May be called from any thread."""
        self._alert_until = time.monotonic() + ALERT_SECONDS
        self._view_stale = True
        self._pool.wake()

    @property
    def unwritten(self) -> int:
        """How many answers are not written yet, including those of locked rows."""
        return self._recorder.unwritten

    def close(self) -> None:
        """End the threads of this poller, for a process that continues without it. It can't be used afterwards."""
        self._pool.close()

    def poll_once(self) -> PollReport:
        """Poll the jobs that are due now and record the answers. For callers that control the clock."""
        report = PollReport()
        with self._running:
            self._view_stale = True  # the clock may have jumped
            self._claim_due_jobs()
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
        preemptible: bool = False,
        finish: bool = False,
        progress: Progress | None = None,
    ) -> PollReport | None:
        """Poll until nothing was due for a second, or for `seconds`. Return None if another run is active.

        A `preemptible` run ends as soon as another run wants to start. With `finish` the run waits for the last answer,
        since no other run follows it in this process. `progress` is called from time to time.
        """
        if not self._running.acquire(blocking=False) and not self._take_over():
            return None
        self._preemptible = preemptible
        self.last_run, self._run_thread = time.monotonic(), threading.get_ident()
        try:
            report = self._run(time.monotonic() + seconds, finish, progress)
            self._recorder.share_models()
            return report
        finally:
            self._preemptible = False
            self.last_run, self._run_thread = time.monotonic(), None
            self._running.release()

    def _take_over(self) -> bool:
        """Return whether the active run ended in favour of this one."""
        if not self._preemptible:
            return False
        self._next_run_waiting.set()
        self._pool.wake()
        try:
            return self._running.acquire(timeout=TAKE_OVER_SECONDS)
        finally:
            self._next_run_waiting.clear()

    def _run(self, until: float, finish: bool, progress: Progress | None) -> PollReport:
        report = PollReport()
        progress_at = time.monotonic() + PROGRESS_SECONDS
        if self._recorder.waiting:
            self._record((), report)  # if the database is still away, nothing more is claimed
        self._release_unconfirmed()
        idle_until = time.monotonic() + IDLE_SECONDS
        while True:
            self._release_lost_claims()
            self.last_run = now = time.monotonic()
            over = now >= until or (self._preemptible and self._next_run_waiting.is_set())
            if self.stopped:
                self._release_unstarted()
            elif over and not (finish and self.busy):
                return report
            elif not over and (now >= self._look_at or now < self._alert_until) and self._claim_due_jobs():
                idle_until = time.monotonic() + IDLE_SECONDS
            self._keep_leases()
            busy = self.busy
            if not busy and (self.stopped or now >= idle_until):
                return report
            answers = self._pool.answers(self._wait(until, idle_until, busy), gather=self._gather())
            if answers or self._recorder.unwritten:
                self._record(answers, report)
            if progress is not None and now >= progress_at:
                progress_at = now + PROGRESS_SECONDS
                progress(report, self._pool.outstanding)

    def _wait(self, until: float, idle_until: float, busy: bool) -> float:
        """Return the seconds until the next thing to do, unless an answer comes first."""
        now = time.monotonic()
        if self.stopped or now >= until:
            return IDLE_SECONDS
        if now < self._alert_until:
            return LOOK_SECONDS
        return min(self._look_at, until, *(() if busy else (idle_until,))) - now

    def _gather(self) -> float:
        """Return the seconds to wait for more answers after the first: the busier, the larger the batches may grow."""
        rate = self._answers_per_second
        return GATHER_SECONDS if rate < BUSY_RATE else min(max(GATHER_SECONDS, BATCH / rate), MAX_GATHER_SECONDS)

    def _keep_leases(self) -> None:
        """Have the leases renewed while jobs are claimed, also between two runs."""
        holds = bool(self._pool.outstanding or self._recorder.unwritten)
        if holds != self._renewing_leases:
            if holds:
                self._leases.hold()
            else:
                self._leases.drop()
            self._renewing_leases = holds

    # ── claiming ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _claim_due_jobs(self) -> bool:
        """Claim and start due jobs, and set the time of the next look. Return whether any were started."""
        if self._all_full():
            self._look_at = time.monotonic() + LOOK_SECONDS
            return False
        view = self._current_view()
        now = view.time()
        due: dict[str, list[DueGroup]] = {}
        unlisted: list[DueGroup] = []
        for group in view.groups:
            if group.due_at <= now and self._api.lists(group.host):
                due.setdefault(group.account, []).append(group)
            elif group.due_at <= now:
                unlisted.append(group)
        if unlisted:
            self._hold_unlisted(unlisted)
        account_states = {account: view.breaker("account", account).allows(now) for account in due}
        host_states = {
            group.host: view.breaker("host", group.host).allows(now) for groups in due.values() for group in groups
        }
        reachable = {
            account: [group for group in groups if host_states[group.host] == "all"] for account, groups in due.items()
        }
        started, more, wait = self._claim(
            {account: groups for account, groups in reachable.items() if groups and account_states[account] == "all"},
            view,
        )
        for account, groups in reachable.items():
            if account_states[account] == "probe":
                started += self._probe(groups, [("account", account)])
        for host, state in host_states.items():
            if state == "probe":
                started += self._probe_host(host, due, account_states)
        self._empty_looks = 0 if started else self._empty_looks + 1
        pause = min(wait, self._until_due(view, account_states)) if not started else 0.0 if more else LOOK_SECONDS
        self._view_stale = not more  # if a claim was full, more of the same jobs are due
        self._look_at = time.monotonic() + pause
        return started > 0

    def _hold_unlisted(self, groups: Sequence[DueGroup]) -> None:
        """Hold the hosts that SD_API_HOSTS does not list, every few seconds. Notify the apps of jobs that end by it."""
        if time.monotonic() < self._unlisted_at:
            return
        self._unlisted_at = time.monotonic() + UNLISTED_SECONDS
        with self._engine.begin() as connection:
            now = database_now(connection)
            ended = hold_unlisted(connection, groups, now=now)
            plan_looks(connection, ended, self._late_looks, now=now)
        self._notify(ended)

    def _all_full(self) -> bool:
        """Return whether no host with waiting jobs has free places, as far as a recent view shows."""
        view = self._view
        if view is None or not view.groups or time.monotonic() - view.read_at >= VIEW_SECONDS:
            return False
        return not any(self._room(group.host) for group in view.groups)

    def _room(self, host: str) -> int:
        """Return how many more jobs may be claimed for a host."""
        outstanding = self._pool.outstanding_at(host) + self._recorder.waiting  # answers of locked rows take no place
        room = MAX_IN_FLIGHT + self._ahead() - outstanding
        return 0 if outstanding and room < MIN_ROOM else room

    def _current_view(self) -> _View:
        view = self._view
        if view is None or self._view_stale or time.monotonic() - view.read_at >= VIEW_SECONDS:
            with self._engine.connect() as connection:
                current_breakers = all_breakers(connection)
                self._keys_before |= self._keys
                groups = due_groups(connection, self._keys)
                view = self._view = _View(time.monotonic(), database_now(connection), current_breakers, groups)
        return view

    def _ahead(self) -> int:
        return min(
            MAX_CLAIM,
            int(self._answers_per_second * AHEAD_SECONDS),
            int(max(map(self._rps, self._keys), default=0.0) * AHEAD_SHARE),
        )

    def _until_due(self, view: _View, account_states: Mapping[str, str]) -> float:
        """Return the seconds until the next job is due or a breaker allows more requests.

        If nothing could be claimed, look less and less often.
        """
        now = view.time()
        moments = [group.due_at for group in view.groups if group.due_at > now]
        moments += [
            moment
            for breaker in view.breakers.values()
            for moment in (breaker.until, breaker.probe_at)
            if moment and moment > now
        ]
        seconds = min((moment - now).total_seconds() for moment in moments) if moments else IDLE_SECONDS
        if "all" in account_states.values():  # another process claims it, or its host's breaker is open
            seconds = min(seconds, LOOK_SECONDS * 2 ** min(self._empty_looks, 5))
        return min(max(seconds, 0.001), IDLE_SECONDS)

    def _claim(self, due: Mapping[str, Sequence[DueGroup]], view: _View) -> tuple[int, bool, float]:
        """Claim and start jobs of these accounts.

        Return how many were started, whether there may be more, and the seconds until the budget has more requests.
        """
        room = {group.host: self._room(group.host) for groups in due.values() for group in groups}
        if not any(room.values()):
            return 0, False, LOOK_SECONDS if due else IDLE_SECONDS
        free = sum(room.values())
        accounts = self._rng.sample(sorted(due), min(len(due), free))  # not always the same account first
        share = min(MAX_CLAIM, -(-free // len(accounts)))  # no account takes the places of another
        now = view.time()
        reservations: dict[str, Reservation] = {}
        short_accounts = set[str]()
        for account in accounts:
            requested = min(share, sum(room[host] for host in {group.host for group in due[account]}))
            rate = view.breaker("account", account).rate(self._rps(account), now)
            reservations[account] = self._budget.take(account, requested, rate=rate)
            if len(reservations[account].send_times) < requested:
                short_accounts.add(account)  # too few requests: the most urgent jobs get them
        granted = {account: len(reservation.send_times) for account, reservation in reservations.items()}
        claimed = self._claim_granted(due, granted, room, short_accounts)
        more = len(accounts) < len(due) or any(
            len(jobs) == len(reservations[account].send_times) == share for account, jobs in claimed.items()
        )
        started = sum(self._start(jobs, reservations[account], view) for account, jobs in claimed.items())
        self._unconfirmed_tokens.clear()
        return started, more, max(LOOK_SECONDS, min(reservation.wait for reservation in reservations.values()))

    def _start(self, jobs: Sequence[ClaimedJob], reservation: Reservation, view: _View) -> int:
        """Start the requests about these jobs of one account, each at its send time. Return how many were started."""
        self._budget.give_back(reservation, len(reservation.send_times) - len(jobs))
        if jobs and time.monotonic() - reservation.send_times[0] > LATE_SECONDS:
            # The database was slow, so the send times have passed. Sending all requests at once would exceed the rate,
            # since other processes have taken their share. Take a new reservation.
            rate = view.breaker("account", reservation.account).rate(self._rps(reservation.account), view.time())
            reservation = self._budget.take(reservation.account, len(jobs), rate=rate)
            self._release(jobs[len(reservation.send_times) :])
        for job, moment in zip(jobs, reservation.send_times, strict=False):
            self._pool.start(job, moment)
        return min(len(jobs), len(reservation.send_times))

    def _claim_granted(
        self,
        due: Mapping[str, Sequence[DueGroup]],
        granted: Mapping[str, int],
        room: dict[str, int],
        short_accounts: Container[str],
    ) -> dict[str, list[ClaimedJob]]:
        claimed: dict[str, list[ClaimedJob]] = {account: [] for account, count in granted.items() if count}
        if not claimed:
            return claimed
        began = time.monotonic()
        token = self._new_token()
        with self._claims.begin() as connection:
            now = database_now(connection)
            for account in claimed:
                for group in due[account]:
                    limit = min(granted[account] - len(claimed[account]), room[group.host])
                    if limit > 0:
                        group_jobs = self._claim_group(
                            connection, group, limit, now, token, urgent=account in short_accounts
                        )
                        room[group.host] -= len(group_jobs)
                        claimed[account] += self._permitted(connection, group_jobs, now)
        log.debug("claimed jobs=%s ms=%.1f", sum(map(len, claimed.values())), 1e3 * (time.monotonic() - began))
        return claimed

    def _new_token(self) -> str:
        """Return a token for a claim. It counts as unconfirmed until the claim's transaction is committed."""
        token = self._leases.new_token()
        self._unconfirmed_tokens.append(token)
        return token

    def _release_unconfirmed(self) -> None:
        """Release the claims of a transaction of which it is unknown whether it was committed."""
        if self._unconfirmed_tokens:
            with self._engine.begin() as connection:
                released = release_claimed_jobs(
                    connection, self._leases.holder, self._unconfirmed_tokens, now=database_now(connection)
                )
            self._unconfirmed_tokens.clear()
            if released:
                log.warning("claims whose commit was interrupted are released jobs=%s", released)

    def _claim_group(
        self, connection: Connection, group: DueGroup, limit: int, now: datetime, token: str, *, urgent: bool = False
    ) -> list[ClaimedJob]:
        late = max(now - group.due_at, timedelta(0))
        around = [now - late * self._rng.random() for _ in range(2)] if urgent else ()
        return claim_jobs(
            connection,
            group,
            limit=limit,
            token=token,
            holder=self._leases.holder,
            lease=self._leases.lease,
            now=now,
            around=around,
        )

    def _probe_host(self, host: str, due: Mapping[str, Sequence[DueGroup]], account_states: Mapping[str, str]) -> int:
        """Probe a host whose breaker is half open, with one job of an account that may be polled."""
        for account, groups in due.items():
            host_groups = [group for group in groups if group.host == host]
            scope: list[tuple[Scope, str]] = [("account", account)] if account_states[account] == "probe" else []
            if account_states[account] != "none" and self._probe(host_groups, [*scope, ("host", host)]):
                return 1
        return 0

    def _probe(self, groups: Sequence[DueGroup], scope: Sequence[tuple[Scope, str]]) -> int:
        """Send one request as a probe, if no other process does and a job is due for it."""
        if not groups:
            return 0
        reservation = self._budget.take(groups[0].account, 1, rate=self._rps(groups[0].account))
        if not reservation.send_times:
            return 0
        token = self._new_token()
        with self._engine.begin() as connection:
            now = database_now(connection)
            locked_breakers = [locked_breaker(connection, kind, name) for kind, name in scope]
            jobs: list[ClaimedJob] = []
            if all(breaker.allows(now) == "probe" for breaker in locked_breakers):
                for group in groups:
                    if not jobs:
                        jobs = self._permitted(connection, self._claim_group(connection, group, 1, now, token), now)
            if jobs:
                for breaker in locked_breakers:
                    save_breaker(connection, breakers.with_probe_started(breaker, now=now, lease=self._probe_lease))
        self._unconfirmed_tokens.clear()
        for job in jobs:
            self._pool.start(job, reservation.send_times[0], probe=True)
        self._budget.give_back(reservation, 1 - len(jobs))
        return len(jobs)

    def _permitted(self, connection: Connection, jobs: Sequence[ClaimedJob], now: datetime) -> list[ClaimedJob]:
        """Return the jobs whose address may still get the key. The others are released without a request."""
        allowed = []
        for job in jobs:
            refusal = self._api.permits(job.address, job.remote_id)
            if refusal is None:
                allowed.append(job)
                continue
            default = self._api.default_address(job.remote_id)
            moved = default.host == job.address.host and default.base != job.address.base
            if moved and readdress(connection, [job.id], default.base, default.host):
                release_jobs(connection, [job.id], job.token, due_at=now + MOVED_WAIT)
                continue
            log.error("a job's fetch address is refused job=%s reason=%s", job.id, refusal)
            release_jobs(connection, [job.id], job.token, due_at=now + REFUSED_WAIT)
        return allowed

    def _call(self, job: ClaimedJob) -> ApiReply:
        permit = partial(self._leases.check, job.id, job.token)
        return self._api.ask(job.address, job.remote_id, self._key(job.account), permit)

    def _key(self, account: str) -> SecretStr:
        """Return the account's key, or the one it had when its jobs were claimed if it was removed since."""
        return self._keys.get(account) or self._keys_before[account]

    def _release_unstarted(self) -> None:
        """Release the jobs whose request has not started: they are due again at once."""
        self._release(self._pool.take_back())

    def _release_lost_claims(self) -> None:
        """Release the jobs that were not polled because their lease may have ended. They are kept if this fails."""
        if self._pool.lost_claims:
            self._release(self._pool.lost_claims)
            log.warning("leases may have ended, no request was sent jobs=%s", len(self._pool.lost_claims))
            self._pool.lost_claims.clear()

    def _release(self, jobs: Sequence[ClaimedJob]) -> None:
        by_token: dict[str, list[int]] = {}
        for job in jobs:
            by_token.setdefault(job.token, []).append(job.id)
        if by_token:
            with self._engine.begin() as connection:
                now = database_now(connection)
                for token, ids in by_token.items():
                    release_jobs(connection, ids, token, due_at=now)

    # ── recording ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _record(self, answers: Sequence[PollAnswer], report: PollReport) -> None:
        report.asked += len(answers)
        report.answers.update(type(answer.reply).__name__.lower() for answer in answers)
        self._measure(len(answers))
        self._recorder.take(answers, self._count_accepted(answers))
        if any(answer.probe for answer in answers):
            self._look_at = 0.0  # it may have closed a breaker
        lost = self._recorder.write({} if self._view is None else self._view.breakers)
        if lost:
            log.warning("answers came too late, their jobs have a new claim or have ended count=%s", lost)
        report.lost += lost

    def _measure(self, answers: int) -> None:
        now = time.monotonic()
        rate = answers / max(now - self._recorded_at, GATHER_SECONDS)
        self._answers_per_second += (rate - self._answers_per_second) / 4
        self._recorded_at = now

    def _count_accepted(self, answers: Sequence[PollAnswer]) -> dict[str, float]:
        """Count the requests that the API accepted. Return how many per second it accepts of each account."""
        accepted: Counter[str] = Counter()
        for answer in answers:
            accepted[answer.job.account] += not isinstance(answer.reply, (RateLimited, ApiDown))
        return {account: self._budget.count_accepted(account, count) for account, count in accepted.items()}
