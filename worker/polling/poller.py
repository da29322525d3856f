"""One poll run: claim what is due within the budget, ask the API about all of it at once, record, top up, until idle.

No barrier: as answers come they are recorded in small batches, and the free places are filled with what is due next.
Jobs are claimed a little ahead of the places, so that no place waits for the database.
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

IN_FLIGHT = 128
CLAIM_MOST = 400
AHEAD_SECONDS = 0.3  # claimed ahead: what the threads ask about while a batch is recorded and the next one claimed
AHEAD_SHARE = 0.05  # but no more than this of a second's budget, which a stalled API could get at once
IDLE_SECONDS = 1.0
PROGRESS_SECONDS = 2.0  # the least time between two words about how a run gets on
RUN_SECONDS = 10.0
GATHER_SECONDS = 0.05  # answers that come within it are written in one transaction
GATHER_MOST = 0.15
BATCH = 150
BUSY_RATE = 200.0
ROOM_LEAST = 32  # fewer free places than this can wait for the next answers: each claim has its price
VIEW_SECONDS = 0.5  # the longest that a hold made by another process goes unseen
LOOK_SECONDS = 0.05  # the least time between two looks that found nothing more
ALERT_SECONDS = 0.4  # after a wake-up it looks often: whoever sent it sends no second one for a while
TAKE_OVER_SECONDS = 0.5
LATE_SECONDS = 0.1  # a claim that took longer has missed its moments
PROBE_MARGIN = timedelta(seconds=5)
UNLISTED_SECONDS = 3.0  # between two looks at what waits for hosts that are not on SD_API_HOSTS
REFUSED_WAIT = timedelta(seconds=60)
MOVED_WAIT = timedelta(seconds=1)


@dataclass(slots=True)
class PollReport:
    """What a run did, in numbers; its text is the task's result."""

    asked: int = 0
    lost: int = 0
    answers: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        if not self.asked:
            return "nothing due"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.answers.most_common())
        return f"asked {self.asked}: {kinds}"


Progress = Callable[[PollReport, int], object]  # is told what a run did so far, and how many calls are in the air


@dataclass(frozen=True, slots=True)
class _View:
    """What was seen of the database, and when by the monotonic clock; `now` was the database's time then."""

    seen: float
    now: datetime
    breakers: dict[tuple[Scope, str], CircuitBreaker]
    levels: Sequence[DueGroup]

    def time(self) -> datetime:
        """The database's time now."""
        return self.now + timedelta(seconds=time.monotonic() - self.seen)

    def breaker(self, scope: Scope, name: str) -> CircuitBreaker:
        """The gate of an account or host; an open one where there is none yet."""
        return self.breakers.get((scope, name)) or CircuitBreaker(scope, name)


class Poller:
    """Polls for one process. `run` is the task; one run at a time, more would only compete.

    Runs end while calls are in the air: the next one records their answers.
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
        threads: int = IN_FLIGHT,
        dice: random.Random | None = None,
    ) -> None:
        self._engine = engine
        self._claims = engine.execution_options(**{RELAXED: True})  # a claim that is undone is made again
        self._api = api
        self._budget = budget
        self._leases = leases
        self._keys = keys  # may change at any time
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
            dice=dice,
        )
        self._calls = RequestPool(self._call, threads=threads)
        self._random = dice or random.Random()  # spreads accounts, guards nothing
        self._running = threading.Lock()
        self._stopping = threading.Event()
        self._wanted = threading.Event()
        self._preemptible = False
        self._tell = notify
        self._late_looks = tuple(late_looks)
        self._unlisted_at = 0.0
        self._view: _View | None = None
        self._stale = False
        self._look_at = 0.0
        self._alert_until = 0.0
        self._found_nothing = 0
        self._unsure: list[str] = []
        self._holding = False
        self._answers_per_second = 0.0
        self._recorded_at = time.monotonic()
        self.last_run = time.monotonic()
        self._run_thread: int | None = None

    def stop(self) -> None:
        """Claims nothing more; what is under way is finished."""
        self._stopping.set()
        self._calls.wake()

    @property
    def stopped(self) -> bool:
        """Whether it claims nothing more."""
        return self._stopping.is_set()

    @property
    def run_progress(self) -> tuple[float, int] | None:
        """When the run that is on last went round, by the monotonic clock, and its thread; None where none is on."""
        thread = self._run_thread
        return None if thread is None else (self.last_run, thread)

    @property
    def busy(self) -> bool:
        """Whether answers are still to come, or to be written."""
        return bool(self._calls.outstanding or self._recorder.waiting)

    def wake(self) -> None:
        """Something may be due right now that was not known."""
        self._alert_until = time.monotonic() + ALERT_SECONDS
        self._stale = True
        self._calls.wake()

    @property
    def kept(self) -> int:
        """Answers that could not be written yet, those of locked rows too."""
        return self._recorder.kept

    def close(self) -> None:
        """Ends its threads, for a process that goes on without it. It can't be used afterwards."""
        self._calls.close()

    def poll_once(self) -> PollReport:
        """Asks about what is due right now, records the answers, and is done: for whoever moves the clock himself."""
        report = PollReport()
        with self._running:
            self._stale = True  # the clock may have leapt
            self._look()
            self._keep_leases()
            while self.busy:
                answers = self._calls.answers(IDLE_SECONDS, gather=0.0)
                if answers:
                    self._record(answers, report)
            self._give_back_lost()
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
        """Polls until nothing was due for a second, or for `seconds`; None where a run is on already.

        A run that gives way ends as soon as another one wants to begin. One that is to finish waits for the last
        answer, since no other run may follow it in this process. `progress` is told now and then how it gets on.
        """
        if not self._running.acquire(blocking=False) and not self._taken_over():
            return None
        self._preemptible = preemptible
        self.last_run, self._run_thread = time.monotonic(), threading.get_ident()
        try:
            report = self._run(time.monotonic() + seconds, finish, progress)
            self._recorder.rest()
            return report
        finally:
            self._preemptible = False
            self.last_run, self._run_thread = time.monotonic(), None
            self._running.release()

    def _taken_over(self) -> bool:
        """Whether the run that is on has given way to this one."""
        if not self._preemptible:
            return False
        self._wanted.set()
        self._calls.wake()
        try:
            return self._running.acquire(timeout=TAKE_OVER_SECONDS)
        finally:
            self._wanted.clear()

    def _run(self, until: float, finish: bool, progress: Progress | None) -> PollReport:
        report = PollReport()
        tell_at = time.monotonic() + PROGRESS_SECONDS
        if self._recorder.waiting:
            self._record((), report)  # where the database is still away nothing more is asked
        self._release_unsure()
        idle_until = time.monotonic() + IDLE_SECONDS
        while True:
            self._give_back_lost()
            self.last_run = now = time.monotonic()
            over = now >= until or (self._preemptible and self._wanted.is_set())
            if self.stopped:
                self._give_back()
            elif over and not (finish and self.busy):
                return report
            elif not over and (now >= self._look_at or now < self._alert_until) and self._look():
                idle_until = time.monotonic() + IDLE_SECONDS
            self._keep_leases()
            busy = self.busy
            if not busy and (self.stopped or now >= idle_until):
                return report
            answers = self._calls.answers(self._wait(until, idle_until, busy), gather=self._gather())
            if answers or self._recorder.kept:
                self._record(answers, report)
            if progress is not None and now >= tell_at:
                tell_at = now + PROGRESS_SECONDS
                progress(report, self._calls.outstanding)

    def _wait(self, until: float, idle_until: float, busy: bool) -> float:
        """Seconds until there is something to do, unless an answer comes first."""
        now = time.monotonic()
        if self.stopped or now >= until:
            return IDLE_SECONDS
        if now < self._alert_until:
            return LOOK_SECONDS
        return min(self._look_at, until, *(() if busy else (idle_until,))) - now

    def _gather(self) -> float:
        """Seconds that the first answer waits for company: the busier, the larger the batches may grow."""
        rate = self._answers_per_second
        return GATHER_SECONDS if rate < BUSY_RATE else min(max(GATHER_SECONDS, BATCH / rate), GATHER_MOST)

    def _keep_leases(self) -> None:
        """Leases are renewed while something is claimed, also between two runs."""
        holds = bool(self._calls.outstanding or self._recorder.kept)
        if holds != self._holding:
            if holds:
                self._leases.__enter__()
            else:
                self._leases.__exit__()
            self._holding = holds

    # ── claiming ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _look(self) -> bool:
        """Claims and starts what is due, and sets when to look again; whether it found something."""
        if self._no_room():
            self._look_at = time.monotonic() + LOOK_SECONDS
            return False
        view = self._current_view()
        now = view.time()
        due: dict[str, list[DueGroup]] = {}
        unlisted: list[DueGroup] = []
        for level in view.levels:
            if level.due_at <= now and self._api.lists(level.host):
                due.setdefault(level.account, []).append(level)
            elif level.due_at <= now:
                unlisted.append(level)
        if unlisted:
            self._hold_unlisted(unlisted)
        allowed = {account: view.breaker("account", account).allows(now) for account in due}
        hosts = {
            level.host: view.breaker("host", level.host).allows(now) for levels in due.values() for level in levels
        }
        open_levels = {
            account: [level for level in levels if hosts[level.host] == "all"] for account, levels in due.items()
        }
        started, more, wait = self._claim(
            {account: levels for account, levels in open_levels.items() if levels and allowed[account] == "all"}, view
        )
        for account, levels in open_levels.items():
            if allowed[account] == "probe":
                started += self._probe(levels, [("account", account)])
        for host, may in hosts.items():
            if may == "probe":
                started += self._probe_host(host, due, allowed)
        self._found_nothing = 0 if started else self._found_nothing + 1
        pause = min(wait, self._until_due(view, allowed)) if not started else 0.0 if more else LOOK_SECONDS
        self._stale = not more  # where a claim came back full, what was due still is
        self._look_at = time.monotonic() + pause
        return started > 0

    def _hold_unlisted(self, levels: Sequence[DueGroup]) -> None:
        """Hold the hosts that SD_API_HOSTS does not list, now and then; tell of jobs that end by it."""
        if time.monotonic() < self._unlisted_at:
            return
        self._unlisted_at = time.monotonic() + UNLISTED_SECONDS
        with self._engine.begin() as connection:
            now = database_now(connection)
            ended = hold_unlisted(connection, levels, now=now)
            plan_looks(connection, ended, self._late_looks, now=now)
        self._tell(ended)

    def _no_room(self) -> bool:
        """Whether every host that anything waits for has enough to do, as far as is known from a recent look."""
        view = self._view
        if view is None or not view.levels or time.monotonic() - view.seen >= VIEW_SECONDS:
            return False
        return not any(self._room(level.host) for level in view.levels)

    def _room(self, host: str) -> int:
        """How many more jobs may be claimed for a host."""
        outstanding = self._calls.outstanding_at(host) + self._recorder.waiting  # answers of locked rows keep nobody
        room = IN_FLIGHT + self._ahead() - outstanding
        return 0 if outstanding and room < ROOM_LEAST else room

    def _current_view(self) -> _View:
        view = self._view
        if view is None or self._stale or time.monotonic() - view.seen >= VIEW_SECONDS:
            with self._engine.connect() as connection:
                known = all_breakers(connection)
                self._keys_before |= self._keys
                levels = due_groups(connection, self._keys)
                view = self._view = _View(time.monotonic(), database_now(connection), known, levels)
        return view

    def _ahead(self) -> int:
        return min(
            CLAIM_MOST,
            int(self._answers_per_second * AHEAD_SECONDS),
            int(max(map(self._rps, self._keys), default=0.0) * AHEAD_SHARE),
        )

    def _until_due(self, view: _View, allowed: Mapping[str, str]) -> float:
        """Seconds until something is due that is not yet, or a gate opens; nothing due is looked at ever less often."""
        now = view.time()
        moments = [level.due_at for level in view.levels if level.due_at > now]
        moments += [
            at for breaker in view.breakers.values() for at in (breaker.until, breaker.probe_at) if at and at > now
        ]
        soon = min((moment - now).total_seconds() for moment in moments) if moments else IDLE_SECONDS
        if "all" in allowed.values():  # others are taking it, or its host is shut
            soon = min(soon, LOOK_SECONDS * 2 ** min(self._found_nothing, 5))
        return min(max(soon, 0.001), IDLE_SECONDS)

    def _claim(self, due: Mapping[str, Sequence[DueGroup]], view: _View) -> tuple[int, bool, float]:
        """Takes jobs of these accounts: (how many, whether there may be more, seconds until the budget has more)."""
        room = {level.host: self._room(level.host) for levels in due.values() for level in levels}
        if not any(room.values()):
            return 0, False, LOOK_SECONDS if due else IDLE_SECONDS
        free = sum(room.values())
        accounts = self._random.sample(sorted(due), min(len(due), free))  # not always the same one first
        share = min(CLAIM_MOST, -(-free // len(accounts)))  # and none takes the places of another
        now = view.time()
        grants: dict[str, Reservation] = {}
        short = set[str]()
        for account in accounts:
            wanted = min(share, sum(room[host] for host in {level.host for level in due[account]}))
            rate = view.breaker("account", account).rate(self._rps(account), now)
            grants[account] = self._budget.take(account, wanted, rate=rate)
            if len(grants[account].send_times) < wanted:
                short.add(account)  # requests are short: the most urgent jobs get them
        granted = {account: len(one.send_times) for account, one in grants.items()}
        claimed = self._claim_granted(due, granted, room, short)
        more = len(accounts) < len(due) or any(
            len(jobs) == len(grants[account].send_times) == share for account, jobs in claimed.items()
        )
        started = sum(self._start(jobs, grants[account], view) for account, jobs in claimed.items())
        self._unsure.clear()
        return started, more, max(LOOK_SECONDS, min(grant.wait for grant in grants.values()))

    def _start(self, jobs: Sequence[ClaimedJob], grant: Reservation, view: _View) -> int:
        """Has these jobs of one account asked about, each at its moment; how many."""
        self._budget.give_back(grant, len(grant.send_times) - len(jobs))
        if jobs and time.monotonic() - grant.send_times[0] > LATE_SECONDS:
            # The database kept us waiting. All at once would be more than the API takes: the others took their share.
            rate = view.breaker("account", grant.account).rate(self._rps(grant.account), view.time())
            grant = self._budget.take(grant.account, len(jobs), rate=rate)
            self._release(jobs[len(grant.send_times) :])
        for job, moment in zip(jobs, grant.send_times, strict=False):
            self._calls.start(job, moment)
        return min(len(jobs), len(grant.send_times))

    def _claim_granted(
        self,
        due: Mapping[str, Sequence[DueGroup]],
        granted: Mapping[str, int],
        room: dict[str, int],
        short: Container[str],
    ) -> dict[str, list[ClaimedJob]]:
        claimed: dict[str, list[ClaimedJob]] = {account: [] for account, count in granted.items() if count}
        if not claimed:
            return claimed
        began = time.monotonic()
        token = self._new_token()
        with self._claims.begin() as connection:
            now = database_now(connection)
            for account in claimed:
                for level in due[account]:
                    most = min(granted[account] - len(claimed[account]), room[level.host])
                    if most > 0:
                        found = self._take(connection, level, most, now, token, urgent=account in short)
                        room[level.host] -= len(found)
                        claimed[account] += self._permitted(connection, found, now)
        log.debug("claimed jobs=%s ms=%.1f", sum(map(len, claimed.values())), 1e3 * (time.monotonic() - began))
        return claimed

    def _new_token(self) -> str:
        """A token for a claim. Until the claim is known to have come about, so is that it may have."""
        token = self._leases.new_token()
        self._unsure.append(token)
        return token

    def _release_unsure(self) -> None:
        """Gives back what was claimed by a transaction of which nobody knows if it was committed."""
        if self._unsure:
            with self._engine.begin() as connection:
                released = release_claimed_jobs(
                    connection, self._leases.holder, self._unsure, now=database_now(connection)
                )
            self._unsure.clear()
            if released:
                log.warning("claims whose commit was cut off are given back jobs=%s", released)

    def _take(
        self, connection: Connection, level: DueGroup, limit: int, now: datetime, token: str, *, urgent: bool = False
    ) -> list[ClaimedJob]:
        late = max(now - level.due_at, timedelta(0))
        around = [now - late * self._random.random() for _ in range(2)] if urgent else ()
        return claim_jobs(
            connection,
            level,
            limit=limit,
            token=token,
            holder=self._leases.holder,
            lease=self._leases.lease,
            now=now,
            around=around,
        )

    def _probe_host(self, host: str, due: Mapping[str, Sequence[DueGroup]], allowed: Mapping[str, str]) -> int:
        """Asks a shut host about one job, of an account that may be asked with."""
        for account, levels in due.items():
            mine = [level for level in levels if level.host == host]
            scope: list[tuple[Scope, str]] = [("account", account)] if allowed[account] == "probe" else []
            if allowed[account] != "none" and self._probe(mine, [*scope, ("host", host)]):
                return 1
        return 0

    def _probe(self, levels: Sequence[DueGroup], scope: Sequence[tuple[Scope, str]]) -> int:
        """Makes one call alone, if no other process does and a job is due for it."""
        if not levels:
            return 0
        grant = self._budget.take(levels[0].account, 1, rate=self._rps(levels[0].account))
        if not grant.send_times:
            return 0
        token = self._new_token()
        with self._engine.begin() as connection:
            now = database_now(connection)
            taken = [locked_breaker(connection, kind, name) for kind, name in scope]
            jobs: list[ClaimedJob] = []
            if all(breaker.allows(now) == "probe" for breaker in taken):
                for level in levels:
                    if not jobs:
                        jobs = self._permitted(connection, self._take(connection, level, 1, now, token), now)
            if jobs:
                for breaker in taken:
                    save_breaker(connection, breakers.with_probe_started(breaker, now=now, lease=self._probe_lease))
        self._unsure.clear()
        for job in jobs:
            self._calls.start(job, grant.send_times[0], probe=True)
        self._budget.give_back(grant, 1 - len(jobs))
        return len(jobs)

    def _permitted(self, connection: Connection, jobs: Sequence[ClaimedJob], now: datetime) -> list[ClaimedJob]:
        """The jobs whose address the settings still allow the key to go to; the others wait, unasked."""
        allowed = []
        for job in jobs:
            refused = self._api.permits(job.address, job.remote_id)
            if refused is None:
                allowed.append(job)
                continue
            home = self._api.default_address(job.remote_id)
            elsewhere = home.host == job.address.host and home.base != job.address.base
            if elsewhere and readdress(connection, [job.id], home.base, home.host):
                release_jobs(connection, [job.id], job.token, due_at=now + MOVED_WAIT)
                continue
            log.error("a job's fetch address is refused job=%s reason=%s", job.id, refused)
            release_jobs(connection, [job.id], job.token, due_at=now + REFUSED_WAIT)
        return allowed

    def _call(self, job: ClaimedJob) -> ApiReply:
        permit = partial(self._leases.check, job.id, job.token)
        return self._api.ask(job.address, job.remote_id, self._key(job.account), permit)

    def _key(self, account: str) -> SecretStr:
        """The account's key; the one it had when its jobs were looked for, where it was taken away since."""
        return self._keys.get(account) or self._keys_before[account]

    def _give_back(self) -> None:
        """Whatever was not asked yet is due again at once."""
        self._release(self._calls.take_back())

    def _give_back_lost(self) -> None:
        """Give back what was not asked about because its lease may be over; again, where the database was away."""
        if self._calls.not_asked:
            self._release(self._calls.not_asked)
            log.warning("claims were not sure to last, nothing was asked jobs=%s", len(self._calls.not_asked))
            self._calls.not_asked.clear()

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
        report.answers.update(type(one.reply).__name__.lower() for one in answers)
        self._measure(len(answers))
        self._recorder.take(answers, self._count_taken(answers))
        if any(one.probe for one in answers):
            self._look_at = 0.0  # it may have opened a gate
        lost = self._recorder.write({} if self._view is None else self._view.breakers)
        if lost:
            log.warning("answers came too late, their jobs were taken up by others or have ended count=%s", lost)
        report.lost += lost

    def _measure(self, answers: int) -> None:
        now = time.monotonic()
        rate = answers / max(now - self._recorded_at, GATHER_SECONDS)
        self._answers_per_second += (rate - self._answers_per_second) / 4
        self._recorded_at = now

    def _count_taken(self, asked: Sequence[PollAnswer]) -> dict[str, float]:
        """Counts what the API took; how many requests per second it takes of each account."""
        counted: Counter[str] = Counter()
        for one in asked:
            counted[one.job.account] += not isinstance(one.reply, (RateLimited, ApiDown))
        return {account: self._budget.taken(account, count) for account, count in counted.items()}
