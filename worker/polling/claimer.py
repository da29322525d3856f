"""Claims due jobs that may be polled, within the request budget and the free places, and starts their requests."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from worker.coordination.rate_limiter import RateLimiter, Reservation
from worker.core.circuit_breaker import Scope
from worker.polling.answer_rate import AnswerRate
from worker.polling.api_client import ApiClient
from worker.polling.due_view import IDLE_SECONDS, LOOK_SECONDS, DueView, LookTimes, ViewReader
from worker.polling.job_claims import JobClaims
from worker.polling.options import PollOptions
from worker.polling.request_pool import RequestPool
from worker.polling.unlisted_hosts import UnlistedHosts
from worker.store.claims import ClaimedJob
from worker.store.due_groups import DueGroup

MAX_CLAIM = 400  # jobs of one account in one claim: it bounds the time of the transaction
AHEAD_SECONDS = 0.05  # how early a run is requested: a message needs some ten milliseconds
SLOW_CLAIM_SECONDS = 0.1  # a claim that took longer has missed its send times


@dataclass(frozen=True, slots=True)
class DueWork:
    """Due groups by account, and what the circuit breakers of their accounts and hosts allow."""

    groups: Mapping[str, Sequence[DueGroup]]
    accounts: Mapping[str, Literal["all", "probe", "none"]]
    hosts: Mapping[str, Literal["all", "probe", "none"]]

    @property
    def reachable(self) -> dict[str, list[DueGroup]]:
        """The groups of each account whose host is not held."""
        return {
            account: [group for group in groups if self.hosts[group.host] == "all"]
            for account, groups in self.groups.items()
        }

    @property
    def may_start(self) -> bool:
        """Whether the circuit breakers allow any request."""
        return any(
            self.accounts[account] != "none" and self.hosts[group.host] != "none"
            for account, groups in self.groups.items()
            for group in groups
        )


class Claimer:
    """Claims jobs for one poller. Not thread-safe: call it from the poll loop only.

    `waiting_answers` returns how many answers wait for the database. They take up places like requests in flight.
    """

    def __init__(
        self,
        *,
        api: ApiClient,
        budget: RateLimiter,
        claims: JobClaims,
        options: PollOptions,
        pool: RequestPool,
        rate: AnswerRate,
        unlisted: UnlistedHosts,
        views: ViewReader,
        waiting_answers: Callable[[], int],
        rng: random.Random,
    ) -> None:
        self._api = api
        self._budget = budget
        self._claims = claims
        self._options = options
        self._pool = pool
        self._rate = rate
        self._unlisted = unlisted
        self._views = views
        self._waiting_answers = waiting_answers
        self._rng = rng
        self.look_times = LookTimes()
        self.waits_for_rate = False  # whether the last look found due jobs and started none: the rate limit is used up

    def claim_due_jobs(self) -> bool:
        """Claim and start due jobs, and set the time of the next look. Return whether any were started."""
        if self._all_full():
            self.look_times.look_after(LOOK_SECONDS)
            return False
        view = self._views.current()
        work = self._due_work(view, view.time())
        reachable = work.reachable
        started, more, wait = self._claim(
            {account: groups for account, groups in reachable.items() if groups and work.accounts[account] == "all"},
            view,
        )
        for account, groups in reachable.items():
            if work.accounts[account] == "probe":
                started += self._probe(groups, [("account", account)])
        for host, state in work.hosts.items():
            if state == "probe":
                started += self._probe_host(host, work)
        self.waits_for_rate = not started and work.may_start
        empty_looks = self.look_times.empty_looks = 0 if started else self.look_times.empty_looks + 1
        pause = min(wait, view.pause(work.accounts, empty_looks)) if not started else 0.0 if more else LOOK_SECONDS
        self._views.stale = not more  # if a claim was full, more of the same jobs are due
        self.look_times.look_after(pause)
        return started > 0

    def work_ahead(self) -> bool:
        """Return whether jobs that may be polled are due, or due in a moment. Set the time of the next look."""
        view = self._views.current()
        ready = self._due_work(view, view.time() + timedelta(seconds=AHEAD_SECONDS)).may_start
        self._views.stale = True
        self.look_times.look_after(LOOK_SECONDS if ready else max(view.pause({}, 0) - AHEAD_SECONDS, 0.001))
        return ready

    def _all_full(self) -> bool:
        """Return whether no host with waiting jobs has free places, as far as a recent view shows."""
        view = self._views.recent()
        return view is not None and bool(view.groups) and not any(self._room(group.host) for group in view.groups)

    def _room(self, host: str) -> int:
        """Return how many more jobs may be claimed for a host."""
        outstanding = self._pool.outstanding_at(host) + self._waiting_answers()
        ahead = self._rate.ahead(max(map(self._options.rps, self._options.keys), default=0.0))
        room = self._options.max_in_flight + min(ahead, MAX_CLAIM) - outstanding
        return 0 if outstanding and room < self._options.min_room else room

    def _due_work(self, view: DueView, moment: datetime) -> DueWork:
        """Return the work that is due at a moment. The hosts that SD_API_HOSTS does not list are held instead."""
        due: dict[str, list[DueGroup]] = {}
        unlisted: list[DueGroup] = []
        for group in view.groups:
            if group.due_at <= moment and self._api.lists(group.host):
                due.setdefault(group.account, []).append(group)
            elif group.due_at <= view.time():
                unlisted.append(group)
        if unlisted:
            self._unlisted.hold(unlisted)
        accounts = {account: view.breaker("account", account).allows(moment) for account in due}
        hosts = {
            group.host: view.breaker("host", group.host).allows(moment) for groups in due.values() for group in groups
        }
        return DueWork(due, accounts, hosts)

    def _claim(self, due: Mapping[str, Sequence[DueGroup]], view: DueView) -> tuple[int, bool, float]:
        """Claim and start jobs of these accounts.

        Return how many were started, whether there may be more, and the seconds until the budget has more requests.
        """
        room = {group.host: self._room(group.host) for groups in due.values() for group in groups}
        if not any(room.values()):
            return 0, False, LOOK_SECONDS if due else IDLE_SECONDS
        free = sum(room.values())
        accounts = self._rng.sample(sorted(due), min(len(due), free))  # not always the same account first
        share = min(MAX_CLAIM, -(-free // len(accounts)))  # no account takes the places of another
        reservations: dict[str, Reservation] = {}
        short_accounts = set[str]()
        for account in accounts:
            requested = min(share, sum(room[host] for host in {group.host for group in due[account]}))
            reservations[account] = self._reserve(account, requested, view)
            if len(reservations[account].send_times) < requested:
                short_accounts.add(account)  # too few requests: the most urgent jobs get them
        granted = {account: len(reservation.send_times) for account, reservation in reservations.items()}
        claimed = self._claims.claim(due, granted, room, short_accounts)
        more = len(accounts) < len(due) or any(
            len(jobs) == len(reservations[account].send_times) == share for account, jobs in claimed.items()
        )
        surplus = [job for account, jobs in claimed.items() for job in self._start(jobs, reservations[account], view)]
        self._claims.release(surplus)
        started = sum(map(len, claimed.values())) - len(surplus)
        return started, more, max(LOOK_SECONDS, min(reservation.wait for reservation in reservations.values()))

    def _reserve(self, account: str, requests: int, view: DueView) -> Reservation:
        rate = view.breaker("account", account).rate(self._options.rps(account), view.time())
        return self._budget.take(account, requests, rate=rate)

    def _start(self, jobs: Sequence[ClaimedJob], reservation: Reservation, view: DueView) -> Sequence[ClaimedJob]:
        """Start the requests about these jobs of one account, each at its send time. Return the jobs without one."""
        self._budget.give_back(reservation, len(reservation.send_times) - len(jobs))
        if jobs and time.monotonic() - reservation.send_times[0] > SLOW_CLAIM_SECONDS:
            # The database was slow, so the send times have passed. Sending all requests at once would exceed the rate,
            # since other processes have taken their share. Take a new reservation.
            reservation = self._reserve(reservation.account, len(jobs), view)
        for job, moment in zip(jobs, reservation.send_times, strict=False):
            self._pool.start(job, moment)
        return jobs[len(reservation.send_times) :]

    def _probe_host(self, host: str, work: DueWork) -> int:
        """Probe a host whose breaker is half open, with one job of an account that may be polled."""
        for account, groups in work.groups.items():
            host_groups = [group for group in groups if group.host == host]
            probed: list[tuple[Scope, str]] = [("account", account)] if work.accounts[account] == "probe" else []
            if work.accounts[account] != "none" and self._probe(host_groups, [*probed, ("host", host)]):
                return 1
        return 0

    def _probe(self, groups: Sequence[DueGroup], probed: Sequence[tuple[Scope, str]]) -> int:
        """Send one request as a probe of these circuit breakers. Return whether it was started, as a number."""
        if not groups:
            return 0
        account = groups[0].account
        reservation = self._budget.take(account, 1, rate=self._options.rps(account))
        if not reservation.send_times:
            return 0
        jobs = self._claims.claim_probe(groups, probed)
        for job in jobs:
            self._pool.start(job, reservation.send_times[0], probe=True)
        self._budget.give_back(reservation, 1 - len(jobs))
        return len(jobs)
