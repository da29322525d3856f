"""One poll run: claim what is due within the budget, ask the API about all of it at once, record, top up, until idle.

No barrier: as answers come they are recorded in small batches, and the free places are filled with what is due next.
"""

import logging
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from pydantic import SecretStr
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from worker.core import gate as gates
from worker.core.gate import Gate, Scope
from worker.core.lifecycle import AskAgain, JobFacts, after_answer, note_of
from worker.core.pace import Pace, Waiting
from worker.core.reply import AccountRefused, ApiDown, Odd, RateLimited, Reply
from worker.database import database_now
from worker.hosted_api import HostedApi
from worker.leases import LeaseKeeper
from worker.shared_budget import SharedBudget
from worker.store.claims import ClaimedJob, claim_jobs, release_jobs
from worker.store.gates import all_gates, locked_gate, mark_asked, save_gate
from worker.store.jobs import next_due
from worker.store.outcomes import Outcome, Recorded, record_answers, set_aside

log = logging.getLogger(__name__)

IN_FLIGHT = 64
IDLE_SECONDS = 1.0
RUN_SECONDS = 10.0
GATHER_SECONDS = 0.05  # answers that come within it are written in one transaction
LOOK_SECONDS = 0.1  # the least time between two claims that found nothing more
TROUBLE_WAIT = 5.0
PROBE_MARGIN = timedelta(seconds=5)
REFUSED_WAIT = timedelta(seconds=60)


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


@dataclass(frozen=True, slots=True)
class _Asked:
    job: ClaimedJob
    reply: Reply
    probe: bool


@dataclass(frozen=True, slots=True)
class _InFlight:
    job: ClaimedJob
    probe: bool


class Poller:
    """Polls for one process. `run` is the task; one run at a time, more would only compete."""

    def __init__(
        self,
        *,
        engine: Engine,
        api: HostedApi,
        budget: SharedBudget,
        leases: LeaseKeeper,
        keys: Mapping[str, SecretStr],
        pace: Pace,
        api_timeout: float,
        queue_downloads: Callable[[Sequence[int]], None],
        tell: Callable[[Sequence[int]], None],
    ) -> None:
        self._engine = engine
        self._api = api
        self._budget = budget
        self._leases = leases
        self._keys = keys
        self._pace = pace
        self._probe_lease = timedelta(seconds=api_timeout) + PROBE_MARGIN
        self._queue_downloads = queue_downloads
        self._tell = tell
        self._threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="ask")
        self._random = random.Random()  # spreads polls in time, guards nothing
        self._running = threading.Lock()
        self._stopping = threading.Event()
        self.last_run = time.monotonic()

    def stop(self) -> None:
        """Claims nothing more; what is under way is finished."""
        self._stopping.set()

    @property
    def stopped(self) -> bool:
        """Whether it claims nothing more."""
        return self._stopping.is_set()

    def run(self, *, seconds: float = RUN_SECONDS) -> PollReport | None:
        """Polls until nothing was due for a second, or for `seconds`; None where a run is on already."""
        if not self._running.acquire(blocking=False):
            return None
        try:
            with self._leases:
                return self._run(time.monotonic() + seconds)
        finally:
            self.last_run = time.monotonic()
            self._running.release()

    def _run(self, until: float) -> PollReport:
        report = PollReport()
        flying: dict[Future[Reply], _InFlight] = {}
        idle_until = time.monotonic() + IDLE_SECONDS
        look_at = 0.0
        try:
            while True:
                self.last_run = now = time.monotonic()
                over = now >= until or self._stopping.is_set()
                if not over and now >= look_at and len(flying) < IN_FLIGHT:
                    started, pause = self._start(flying)
                    look_at = time.monotonic() + pause
                    if started:
                        idle_until = time.monotonic() + IDLE_SECONDS
                if not flying:
                    if over or time.monotonic() >= idle_until:
                        return report
                    self._stopping.wait(max(0.0, min(look_at, idle_until, until) - time.monotonic()))
                    continue
                done = _finished(flying, timeout=max(GATHER_SECONDS, min(look_at - time.monotonic(), LOOK_SECONDS)))
                if done:
                    self._record([_Asked(one.job, reply, one.probe) for one, reply in done], report)
        finally:
            self._give_back(flying)

    # ── claiming ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, flying: dict[Future[Reply], _InFlight]) -> tuple[int, float]:
        """Claims and starts what is due; (how many, seconds until it is worth looking again)."""
        with self._engine.connect() as connection:
            known = all_gates(connection)
            now = database_now(connection)
        shut_hosts = [gate.name for gate in known.values() if gate.scope == "host" and gate.allows(now) != "all"]
        started, pause = 0, IDLE_SECONDS
        for account in self._fairly():
            gate = known.get(("account", account), Gate("account", account))
            match gate.allows(now):
                case "all":
                    count, wait_seconds = self._claim(account, shut_hosts, IN_FLIGHT - len(flying), flying)
                    started += count
                    pause = min(pause, wait_seconds)
                case "one":
                    started += self._probe(account, [("account", account)], flying, shut_hosts=shut_hosts)
        for name in shut_hosts:
            if known["host", name].allows(now) == "one":
                started += self._probe_host(name, known, now, flying)
        return started, LOOK_SECONDS if started else self._until_due(now, pause)

    def _fairly(self) -> list[str]:
        accounts = list(self._keys)
        self._random.shuffle(accounts)  # no account is always first at the places that are free
        return accounts

    def _claim(
        self, account: str, shut_hosts: list[str], places: int, flying: dict[Future[Reply], _InFlight]
    ) -> tuple[int, float]:
        grant = self._budget.take(account, places)
        if not grant.requests:
            return 0, max(LOOK_SECONDS, grant.wait)
        try:
            with self._engine.begin() as connection:
                now = database_now(connection)
                taken = self._take(connection, account, shut_hosts, grant.requests, now)
                jobs = self._permitted(connection, taken, now)
        except SQLAlchemyError:
            self._budget.give_back(account, grant.requests)
            raise
        self._budget.give_back(account, grant.requests - len(jobs))
        self._ask(jobs, flying, probe=False)
        return len(jobs), IDLE_SECONDS

    def _take(
        self,
        connection: Connection,
        account: str,
        shut_hosts: Sequence[str],
        limit: int,
        now: datetime,
        *,
        host: str | None = None,
    ) -> list[ClaimedJob]:
        return claim_jobs(
            connection,
            account=account,
            shut_hosts=shut_hosts,
            host=host,
            limit=limit,
            token=secrets.token_hex(8),
            holder=self._leases.holder,
            lease=self._leases.lease,
            now=now,
        )

    def _probe_host(
        self,
        host: str,
        known: Mapping[tuple[Scope, str], Gate],
        now: datetime,
        flying: dict[Future[Reply], _InFlight],
    ) -> int:
        """Asks a shut host about one job, of an account that may be asked with."""
        for account in self._fairly():
            allowed = known.get(("account", account), Gate("account", account)).allows(now)
            scope: list[tuple[Scope, str]] = [("account", account)] if allowed == "one" else []
            if allowed != "none" and self._probe(account, [*scope, ("host", host)], flying, host=host):
                return 1
        return 0

    def _probe(
        self,
        account: str,
        scope: Sequence[tuple[Scope, str]],
        flying: dict[Future[Reply], _InFlight],
        *,
        shut_hosts: Sequence[str] = (),
        host: str | None = None,
    ) -> int:
        """Makes one call alone, if no other process does and a job is due for it."""
        with self._engine.begin() as connection:
            now = database_now(connection)
            taken = [locked_gate(connection, kind, name) for kind, name in scope]
            if any(gate.allows(now) != "one" for gate in taken):
                return 0
            jobs = self._permitted(connection, self._take(connection, account, shut_hosts, 1, now, host=host), now)
            if not jobs:
                return 0
            for gate in taken:
                save_gate(connection, gates.probing(gate, now=now, lease=self._probe_lease))
        self._ask(jobs, flying, probe=True)
        return 1

    def _until_due(self, now: datetime, pause: float) -> float:
        with self._engine.connect() as connection:
            due = next_due(connection, self._keys)
        if due is None:
            return pause
        return min(max((due - now).total_seconds(), LOOK_SECONDS), pause)

    def _permitted(self, connection: Connection, jobs: Sequence[ClaimedJob], now: datetime) -> list[ClaimedJob]:
        """The jobs whose address the settings still allow the key to go to; the others wait, unasked."""
        allowed = []
        for job in jobs:
            refused = self._api.permits(job.address, job.remote_id)
            if refused is None:
                allowed.append(job)
                continue
            log.error("a job's fetch address is refused job=%s reason=%s", job.id, refused)
            release_jobs(connection, [job.id], job.token, due_at=now + REFUSED_WAIT)
        return allowed

    # ── asking ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _ask(self, jobs: Iterable[ClaimedJob], flying: dict[Future[Reply], _InFlight], *, probe: bool) -> None:
        for job in jobs:
            future = self._threads.submit(self._api.ask, job.address, job.remote_id, self._keys[job.account])
            flying[future] = _InFlight(job, probe)

    def _give_back(self, flying: dict[Future[Reply], _InFlight]) -> None:
        """After trouble of our own: whatever was not asked yet goes back at once, the rest when its lease is over."""
        by_token: dict[str, list[int]] = {}
        for future, one in flying.items():
            if future.cancel():
                by_token.setdefault(one.job.token, []).append(one.job.id)
        flying.clear()
        if by_token:
            with self._engine.begin() as connection:
                now = database_now(connection)
                for token, ids in by_token.items():
                    release_jobs(connection, ids, token, due_at=now)

    # ── recording ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _record(self, asked: Sequence[_Asked], report: PollReport) -> None:
        report.asked += len(asked)
        report.answers.update(type(one.reply).__name__.lower() for one in asked)
        try:
            recorded = self._write(asked)
        except OperationalError:
            raise  # the database is in trouble, not a row
        except DBAPIError as error:
            log.error("a batch of answers could not be written, writing them singly reason=%s", type(error).__name__)
            recorded = self._write_singly(asked)
        report.lost += recorded.lost
        self._queue_downloads(recorded.outputs)  # after the commit: the rows must be there
        self._tell(recorded.finished)

    def _write(self, asked: Sequence[_Asked]) -> Recorded:
        with self._engine.begin() as connection:
            now = database_now(connection)
            known = self._move_gates(connection, asked, now)
            mark_asked(connection, {one.job.account for one in asked}, now=now)
            return record_answers(connection, [self._outcome(one, known, now) for one in asked], now=now)

    def _write_singly(self, asked: Sequence[_Asked]) -> Recorded:
        outputs: list[int] = []
        finished: list[int] = []
        lost = 0
        for one in asked:
            try:
                recorded = self._write([one])
            except DBAPIError as error:
                log.error("an answer can't be written, its job is set aside job=%s", one.job.id)
                reason = f"its answer could not be written: {type(error.orig).__name__}"
                with self._engine.begin() as connection:
                    if set_aside(connection, one.job, reason, now=database_now(connection)):
                        finished.append(one.job.id)
                continue
            outputs += recorded.outputs
            finished += recorded.finished
            lost += recorded.lost
        return Recorded(tuple(outputs), tuple(finished), lost)

    def _outcome(self, one: _Asked, known: Mapping[tuple[Scope, str], Gate], now: datetime) -> Outcome:
        holds = [
            ended
            for gate in (known.get(("account", one.job.account)), known.get(("host", one.job.address.host)))
            if gate is not None and (ended := gate.last_hold_end(now)) is not None
        ]
        facts = one.job.facts
        if holds:
            facts = _with_hold(facts, max(holds))
        step = after_answer(facts, one.reply, now=now, least=timedelta(seconds=self._pace.least))
        age = (now - one.job.submitted_at).total_seconds()
        wait_seconds = self._pace.next_poll(
            Waiting(age=age, eta=one.job.eta, polls=one.job.polls), spread=self._random.random()
        )
        if isinstance(one.reply, ApiDown) and isinstance(step, AskAgain):
            wait_seconds = max(wait_seconds, TROUBLE_WAIT * (1 + self._random.random()))
        return Outcome(one.job, step, wait_seconds, note_of(one.reply))

    def _move_gates(
        self, connection: Connection, asked: Sequence[_Asked], now: datetime
    ) -> Mapping[tuple[Scope, str], Gate]:
        """Lets the batch move the gates it concerns; a lock is taken only where one really changes."""
        known = all_gates(connection)
        names: set[tuple[Scope, str]] = {("account", one.job.account) for one in asked}
        names |= {("host", one.job.address.host) for one in asked}
        for scope, name in sorted(names):
            gate = known.get((scope, name), Gate(scope, name))
            mine = [one for one in asked if name == (one.job.account if scope == "account" else one.job.address.host)]
            if _moved(gate, mine, now) != gate or (scope, name) not in known:
                locked = locked_gate(connection, scope, name)
                gate = _moved(locked, mine, now)
                save_gate(connection, gate)
                _tell_of_hold(locked, gate, now)
            known[scope, name] = gate
        return known


def _finished(flying: dict[Future[Reply], _InFlight], *, timeout: float) -> list[tuple[_InFlight, Reply]]:
    """The calls that are over, taken out of `flying`; those that end within a moment of the first come along."""
    done, _ = wait(flying, timeout=timeout, return_when=FIRST_COMPLETED)
    if done and len(done) < len(flying):
        done |= wait([future for future in flying if future not in done], timeout=GATHER_SECONDS).done
    return [(flying.pop(future), future.result()) for future in done]


def _moved(gate: Gate, asked: Sequence[_Asked], now: datetime) -> Gate:
    for one in asked:
        gate = _moved_by(gate, one, now)
    return gate


def _moved_by(gate: Gate, one: _Asked, now: datetime) -> Gate:
    if gate.scope == "host":
        if isinstance(one.reply, ApiDown):
            return gates.troubled(gate, f"unreachable: {one.reply.message}", 1, now=now, probe=one.probe)
        return gates.answered(gate, now=now, probe=one.probe)
    match one.reply:
        case AccountRefused(reason, message):
            words = {"key": "key rejected", "credits": "no credits", "plan": "plan", "request": "request refused"}
            return gates.refused(gate, f"{words[reason]}: {message}", now=now, probe=one.probe)
        case RateLimited(seconds, _):
            return gates.limited(gate, seconds, now=now)
        case ApiDown() | Odd():  # neither says whether the key is accepted
            return gates.undecided(gate, now=now) if one.probe else gate
        case _:
            return gates.answered(gate, now=now, probe=one.probe)


def _tell_of_hold(before: Gate, after: Gate, now: datetime) -> None:
    if after.held(now) and not before.held(now):
        log.warning("held scope=%s name=%s reason=%s", after.scope, after.name, after.reason)
    elif before.held(now) and not after.held(now):
        log.warning("resumed scope=%s name=%s", after.scope, after.name)


def _with_hold(facts: JobFacts, ended: datetime) -> JobFacts:
    return replace(facts, last_hold_end=ended)
