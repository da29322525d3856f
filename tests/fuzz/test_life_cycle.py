"""Walks through the whole life of jobs, on the real statements, beside a plain model of what the contract says.

The clock is told the time, and nothing else happens between two steps: after each of them every row must be as the
model has it.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine, delete, event, select

from tests.fuzz.effort import EFFORTS, QUICK, effort
from worker.core.lifecycle import (
    Attempt,
    BadBody,
    DeadLink,
    GiveUp,
    StoredFile,
    TransferTrouble,
    Unfit,
    after_attempt,
)
from worker.core.media.signatures import Media
from worker.core.pacing.policy import Pace
from worker.core.reply import Link
from worker.polling import pace_learner, recorder
from worker.polling.kept_text import KeptText
from worker.polling.recorder import Recorder
from worker.polling.request_pool import PollAnswer
from worker.store import holds
from worker.store import jobs as store
from worker.store.breakers import all_breakers
from worker.store.claims import (
    ClaimedJob,
    ClaimedOutput,
    claim_jobs,
    claim_output,
    due_groups,
    queue_due_outputs,
    release_jobs,
    release_output,
    renew_leases,
)
from worker.store.counters import Tally
from worker.store.holds import WorkLimits
from worker.store.outputs import requeue_output
from worker.store.reaper import release_crashed
from worker.store.results import record_attempt
from worker.store.schema import HELD_UNTIL, breakers, crashes, jobs, outputs, paces, promises
from worker.vendor.fetch_url import AllowedApi, fetch_address
from worker.vendor.replies import Question, parse

API = AllowedApi("https://api.test/api/v3", frozenset({"api.test"}))
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
LEASE = timedelta(seconds=30)
S = 1_000_000  # the model counts in microseconds, as the databases do
POLL_MIN = 3 * S
WAIT_LONGEST = 1_000 * S  # more than any policy waits
OUTPUT_DEADLINE = timedelta(days=1)
RENEWAL = 3_600 * S
HOLDERS = ("ada", "bob")
MEANWHILE = ["nothing", "renewal", "crash", "claim", "cancel", "hold"]
NEVER = (HELD_UNTIL - START) // timedelta(microseconds=1)  # when a held job is due
FINAL = ("completed", "failed", "expired", "cancelled")
PROMISING = "bd"  # the remote ids of jobs whose submit answer promised links
PROMISE_CODES = ("not_found", "no_output", "expired")


def at(moment: int) -> datetime:
    """A moment of the model, which begins with the walk."""
    return START + timedelta(microseconds=moment)


# ── the model: what the contract says, and nothing of how it is done ──────────────────────────────────────────────────


@dataclass
class Output:
    """One output, as it should be. Times are microseconds since the walk began."""

    url: str
    listed: int
    due: int | None
    queued: int | None
    status: str = "pending"
    code: str | None = None
    attempts: int = 0
    bad: int = 0
    dead_since: int | None = None
    dead: int = 0
    renewed: bool = False
    claim: tuple[str, str] | None = None  # token, holder
    crashes: int = 0
    tries_at_crash: int | None = None

    def end(self, status: str, code: str | None) -> None:
        """It is final."""
        self.status, self.code, self.due, self.claim = status, code, None, None

    def anew(self, now: int) -> None:
        """As if it had just been listed."""
        self.status, self.code, self.due, self.listed, self.queued = "pending", None, now, now, None
        self.bad, self.dead, self.dead_since, self.renewed = 0, 0, None, False


@dataclass
class Job:
    """One job, as it should be."""

    remote: str
    tracked: int
    lasts: int
    due: int | None
    status: str = "pending"
    code: str | None = None
    polls: int = 0
    asked: int | None = None
    strikes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("failed", "unknown", "error", "empty"), 0))
    struck: int | None = None
    claim: tuple[str, str] | None = None
    outputs: list[Output] = field(default_factory=list)
    deadline: int = 0
    crashes: int = 0
    tries_at_crash: int | None = None
    held: bool = False
    replanned: tuple[int, int] | None = None  # between which moments it may be due; None where that is known
    promised: list[str] = field(default_factory=list)
    trying: tuple[str, str] | None = None  # how it ends if its promised links bring nothing

    def end(self, status: str, code: str | None) -> None:
        """It is final."""
        self.status, self.code, self.due, self.claim, self.held = status, code, None, None, False

    def give_up(self, status: str, code: str, now: int) -> None:
        """It ends, but for links that were promised: those are tried first."""
        if self.promised and code in PROMISE_CODES:
            self.trying = (status, code)
            self.deliver(self.promised, now, queued=True)
        else:
            self.end(status, code)

    def again(self, now: int, least: int = POLL_MIN - S // 1_000) -> None:
        """It is asked again, at a moment that the pace chooses."""
        self.claim, self.asked = None, now
        self.replanned = (now + least, now + WAIT_LONGEST)

    def settle(self) -> None:
        """End once no output is left to wait for."""
        if self.status == "downloading" and all(one.status != "pending" for one in self.outputs):
            whole = all(one.status == "stored" for one in self.outputs)
            if self.trying is not None and all(one.status == "failed" for one in self.outputs):
                return self.end(*self.trying)
            self.trying = None
            self.end("completed" if whole else "failed", None if whole else "output_failed")
        return None

    def deliver(self, urls: list[str], now: int, *, queued: bool) -> None:
        """It is ready: its outputs are listed."""
        self.status, self.due, self.claim = "downloading", None, None
        self.outputs = [Output(url, now, now, now if queued else None) for url in urls]

    def answered(self, kind: str, urls: list[str], now: int, hold_end: int | None) -> None:
        """An answer came, under a claim that stands."""
        if kind in ACCOUNT_OR_HOST:
            self.again(now)
        elif self.status == "downloading":
            self.due, self.claim = None, None
            self._links_renewed(urls if kind == "success" else [], now)
        elif kind == "success":
            self.deliver(urls, now, queued=True)
        else:
            self._not_ready(kind, now, hold_end)

    def _not_ready(self, kind: str, now: int, hold_end: int | None) -> None:
        if kind in STRIKES:
            counts = self.struck is None or now - self.struck >= POLL_MIN
            if kind != "error":
                self.strikes["error"] = 0
            if counts:
                self.strikes[kind] += 1
                self.struck = now
            most, code = STRIKES[kind]
            if self.strikes[kind] >= most and (kind != "unknown" or now - self.tracked >= 60 * S):
                return self.give_up("failed", code, now)
        elif kind == "processing":
            self.strikes = dict.fromkeys(self.strikes, 0)
        else:
            self.strikes["error"] = 0
        if now >= max(self.deadline, -1 if hold_end is None else hold_end + 60 * S):
            return self.give_up("expired", "expired", now)
        return self.again(now)

    def _links_renewed(self, urls: list[str], now: int) -> None:
        for place, one in enumerate(self.outputs):
            if one.status == "pending" and one.renewed and one.claim is None:
                one.due = one.queued = now
                if place < len(urls):
                    one.url = urls[place]


STRIKES = {
    "failed": (2, "api_failed"),
    "unknown": (3, "not_found"),
    "error": (3, "api_error"),
    "empty": (5, "no_output"),
}
ACCOUNT_OR_HOST = ("limited", "refused", "down")
LIMIT = '{"status": "error", "message": "Rate limit exceeded", "retry_after": 30}'
ANSWERS: dict[str, tuple[int, str]] = {
    "processing": (200, '{"status": "processing", "message": "Try Again", "output": ""}'),
    "processing, eta": (200, '{"status": "processing", "eta": 20.5}'),
    "success": (200, ""),
    "empty": (200, '{"status": "success", "output": []}'),
    "failed": (200, '{"status": "failed", "id": "", "message": "out of paint"}'),
    "unknown": (200, '{"status": "failed", "id": "", "message": "Request not found"}'),
    "error": (200, '{"status": "error", "message": "The prompt field is required."}'),
    "odd": (200, "<html>"),
    "odd status": (200, '{"status": "complete"}'),
    "another job": (200, '{"status": "success", "id": 999, "output": ["https://h.test/wrong.png"]}'),
    "limited": (200, LIMIT),
    "refused": (200, '{"status": "error", "message": "Invalid Api Key"}'),
    "down": (503, "<html>bad gateway</html>"),
}
ATTEMPTS: dict[str, Attempt] = {
    "stored": StoredFile("file:///out/0.png", 3, "0" * 64, Media("image/png", "png")),
    "not_media": BadBody("not_media", "text"),
    "truncated": BadBody("truncated", "short"),
    "refused_address": Unfit("refused_address", "inside"),
    "too_large": Unfit("too_large", "large"),
    "gone": DeadLink("HTTP 404"),
    "http_error": TransferTrouble("http_error", "HTTP 500"),
    "unreachable": TransferTrouble("unreachable", "no answer"),
    "storage": TransferTrouble("storage", "disk full"),
}
LIKELY = st.sampled_from([*ANSWERS, "processing", "success", "failed", "failed", "unknown", "empty", "empty", "error"])
SECONDS = [0.5, 1, 3, 3.5, 6, 11, 29, 30, 31, 60, 61, 125, 950, 3_600, 3_650, 86_400, 86_401]
JUMPS = st.sampled_from([round(by * S) for by in SECONDS])


def tried_once(job: Job, one: Output, kind: str, now: int) -> tuple[int, int] | None:
    """What an attempt does to an output; between which moments it is due again, or None where it is at rest."""
    late = now >= one.listed + 86_400 * S
    one.claim = None
    if kind == "stored":
        one.end("stored", None)
        return None
    over = kind in ("refused_address", "too_large")
    least, most = S, 300 * S
    if job.trying is not None:
        least, most = 0, 60 * S
        tried = late or (now >= one.listed + 600 * S and one.attempts >= 5)
        over = over or (kind != "storage" and tried)
    elif kind in ("not_media", "truncated"):
        one.bad += 1
        over = one.bad >= 3 or late
    elif kind in ("http_error", "unreachable"):
        over = late
    elif kind == "gone":
        since = now if one.dead_since is None else one.dead_since
        one.dead_since, least = since, 0
        renewable = not job.remote.startswith("sha256:")
        if not one.renewed and not late and (now - since < 60 * S or renewable):
            if now - since >= 60 * S:
                one.renewed, one.code = True, "gone"
                if job.status == "downloading" and job.due is None:
                    job.due = now
                one.due = now + RENEWAL
                return (one.due, one.due)
        else:
            one.dead += 1
            over = one.dead >= 4 or late  # the fresh link once, and three times more
    if over:
        one.end("failed", kind)
        return None
    one.code = kind
    return (now + least, now + most)


# ── the walk ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Stage:
    """Where walks take place: a database that is emptied before each of them, and the clock."""

    engine: Engine
    now: int = 0
    tokens: Iterator[int] = field(default_factory=count)

    def clear(self) -> None:
        """Nothing is there, and the clock begins anew."""
        self.now = 0
        with self.engine.begin() as connection:
            for table in (outputs, promises, jobs, breakers, crashes, paces):
                connection.execute(delete(table))

    def recorder(self) -> Recorder:
        """One process's."""
        pace = Pace("learned", 0.5, POLL_MIN / S)
        made = Recorder(
            engine=self.engine,
            pace=pace,
            rps=lambda _: 10.0,
            queue_downloads=lambda _: None,
            notify=lambda _: None,
            kept_text=lambda raw: KeptText("", raw.body.decode()),
        )
        made._rng = random.Random(0)
        return made


def walks(stage: Stage) -> type[RuleBasedStateMachine]:
    """The state machine on a stage."""

    class Life(RuleBasedStateMachine):
        """Any order of anything that can happen."""

        def __init__(self) -> None:
            super().__init__()
            stage.clear()
            self.recorder = stage.recorder()
            self.jobs: dict[int, Job] = {}
            self.claimed: list[ClaimedJob] = []  # all that were handed out, also those that are stale by now
            self.sent: set[tuple[int, str]] = set()  # the claims that were asked about
            self.taken: list[ClaimedOutput] = []
            self.replanned: dict[int, tuple[int, int]] = {}  # outputs, and when they may be due

        # ── helpers ───────────────────────────────────────────────────────────────────────────────────────────────

        @property
        def now(self) -> datetime:
            """The database's time."""
            return at(stage.now)

        def output(self, output_id: int) -> tuple[Job, Output]:
            """An output of the model, and its job."""
            row = self.rows[output_id]
            job = self.jobs[row.job_id]
            return job, job.outputs[row.position]

        def look(self) -> None:
            """Reads everything, and takes over what the product may choose: moments within their bounds."""
            with stage.engine.connect() as connection:
                self.job_rows = {row.id: row for row in connection.execute(select(jobs)).all()}
                self.rows = {row.id: row for row in connection.execute(select(outputs)).all()}
            for job_id, job in self.jobs.items():
                if job.replanned is not None:
                    due = micros(self.job_rows[job_id].due_at)
                    assert due is not None
                    assert job.replanned[0] <= due <= job.replanned[1]
                    job.due, job.replanned = due, None
            for output_id, (least, most) in self.replanned.items():
                due = micros(self.rows[output_id].due_at)
                assert due is not None
                assert least <= due <= most
                self.output(output_id)[1].due = due
            self.replanned.clear()

        @invariant()
        def every_row_is_as_the_model_has_it(self) -> None:
            """Status, code, counts, due or at rest, claims, outputs."""
            self.look()
            assert self.job_rows.keys() == self.jobs.keys()
            for job_id, job in self.jobs.items():
                row = self.job_rows[job_id]
                assert (row.status, row.error_code) == (job.status, job.code)
                assert same(row.due_at, job.due)
                assert (row.held_at is not None) == job.held
                assert row.polls == job.polls
                counted = (row.failed_answers, row.unknown_answers, row.error_answers, row.empty_answers)
                if job.status == "pending":
                    assert counted == tuple(job.strikes.values())
                assert (row.claim_token, row.claim_holder) == (job.claim or (None, None))
                assert (row.completed_at is not None) == (job.status in FINAL)
                assert (row.ready_at is not None) >= (job.status in ("downloading", "completed"))
                assert same(row.deadline_at, job.deadline)
                assert row.remote_id == job.remote
            known = {(row.job_id, row.position): row for row in self.rows.values()}
            assert len(known) == sum(len(job.outputs) for job in self.jobs.values())
            for job_id, job in self.jobs.items():
                for position, one in enumerate(job.outputs):
                    row = known[job_id, position]
                    assert (row.status, row.error_code, row.url) == (one.status, one.code, one.url)
                    assert same(row.due_at, one.due)
                    assert row.attempts == one.attempts
                    assert (row.claim_token, row.claim_holder) == (one.claim or (None, None))
                    assert (row.location is not None) == (one.status == "stored")

        # ── what web apps do ──────────────────────────────────────────────────────────────────────────────────────

        @initialize(remotes=st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True), lasts=st.booleans())
        def begin(self, remotes: list[str], lasts: bool) -> None:
            """A few jobs are there from the start."""
            for remote in remotes:
                self.track(remote, 3_600 if lasts else 40)
            self.look()

        @rule(remote=st.sampled_from("abcd"), lasts=st.sampled_from([40, 3_600]))
        def track(self, remote: str, lasts: int) -> None:
            """A job is handed over, maybe again."""
            urls = [f"https://h.test/promised-{remote}{place}.png" for place in (0, 1)] if remote in PROMISING else []
            job = store.NewJob(
                "default", remote, fetch_address(None, remote, API), "image", 0, None, None, None,
                self.now, self.now + timedelta(seconds=lasts), self.now + timedelta(seconds=1), promised=tuple(urls),
            )  # fmt: skip
            with stage.engine.begin() as connection:
                [(job_id, new)] = store.insert_jobs(connection, [job], now=self.now)
            known = {one.remote: number for number, one in self.jobs.items()}
            assert new == (remote not in known)
            assert known.get(remote, job_id) == job_id
            if new:
                made = Job(remote, stage.now, lasts * S, stage.now + S, deadline=stage.now + lasts * S, promised=urls)
                self.jobs[job_id] = made

        @rule(number=st.integers(1, 2), copies=st.integers(1, 2))
        def track_what_is_ready(self, number: int, copies: int) -> None:
            """A job is handed over that has no id, but its outputs: it is never asked about."""
            remote = "sha256:" + str(copies) * 32
            links = tuple(Link(f"https://h.test/{place}.png") for place in range(number))
            job = store.NewJob(
                "default", remote, fetch_address(None, remote, API), "image", 0, None, None, None,
                self.now, self.now + timedelta(seconds=60), self.now, links,
            )  # fmt: skip
            with stage.engine.begin() as connection:
                [(job_id, new)] = store.insert_jobs(connection, [job], now=self.now)
            assert new == (job_id not in self.jobs)
            if new:
                made = Job(remote, stage.now, 60 * S, None, deadline=stage.now + 60 * S)
                made.deliver([link.url for link in links], stage.now, queued=False)
                self.jobs[job_id] = made

        @rule(pick=st.integers(0, 9))
        def cancel(self, pick: int) -> None:
            """Somebody cancels a job."""
            job_id = nth(self.jobs, pick)
            with stage.engine.begin() as connection:
                changed = store.cancel(connection, job_id, Tally(), now=self.now)
            job = self.jobs[job_id]
            assert changed == (job.status not in FINAL)
            if changed:
                job.end("cancelled", job.code)
                for one in job.outputs:
                    if one.status == "pending":
                        one.end("failed", "cancelled")

        @rule(pick=st.integers(0, 9))
        def retry(self, pick: int) -> None:
            """Somebody takes a job up again."""
            job_id = nth(self.jobs, pick)
            with stage.engine.begin() as connection:
                changed = store.retry(connection, job_id, now=self.now)
            job = self.jobs[job_id]
            assert changed == (job.status in ("failed", "expired"))
            if changed:
                if job.trying is not None:  # asked afresh: the rows of its promised links are gone
                    job.trying, job.outputs = None, []
                    self.taken = [one for one in self.taken if one.job_id != job_id]
                failed = [one for one in job.outputs if one.status == "failed"]
                for one in failed:
                    one.anew(stage.now)
                job.status, job.due = ("downloading", None) if failed else ("pending", stage.now)
                job.code, job.struck, job.deadline = None, None, stage.now + job.lasts
                job.strikes = dict.fromkeys(job.strikes, 0)

        @rule(pick=st.integers(0, 9))
        def hold(self, pick: int) -> None:
            """An operator holds a job, maybe once more, maybe while it is asked about."""
            job_id = nth(self.jobs, pick)
            with stage.engine.begin() as connection:
                changed = holds.hold(connection, [job_id], now=self.now)
            job = self.jobs[job_id]
            assert changed == ({job_id} if job.status == "pending" and not job.held else set())
            if changed:
                job.due, job.claim, job.held = NEVER, None, True

        @rule(by=JUMPS)
        def resume(self, by: int) -> None:
            """Some time later an operator lets all held jobs go."""
            stage.now += by
            with stage.engine.begin() as connection:
                held_ids = [job_id for job_id, job in self.jobs.items() if job.held]
                never = WorkLimits(timedelta(microseconds=POLL_MIN), timedelta.max, timedelta.max)
                changed = holds.resume(connection, held_ids, never, now=self.now)
            held = {job_id: job for job_id, job in self.jobs.items() if job.held}
            assert changed == held.keys()
            for job in held.values():
                job.held = False
                job.due = stage.now if job.asked is None else max(stage.now, job.asked + POLL_MIN)
                job.deadline = max(job.deadline, stage.now + 60 * S)

        @rule(remote=st.sampled_from("abcde"))
        def nudge(self, remote: str) -> None:
            """A webhook came."""
            with stage.engine.begin() as connection:
                least = timedelta(microseconds=POLL_MIN)
                moved = store.nudge(connection, remote, None, now=self.now, poll_min=least)
            expected = 0
            for job in self.jobs.values():
                due = stage.now if job.asked is None else max(stage.now, job.asked + POLL_MIN)
                waits = job.status == "pending" and job.claim is None and not job.held
                if job.remote == remote and waits and (job.due or 0) > due:
                    job.due = due
                    expected += 1
            assert moved == expected

        # ── what workers do ───────────────────────────────────────────────────────────────────────────────────────

        @rule(by=JUMPS)
        def time_goes_by(self, by: int) -> None:
            """The clock moves."""
            stage.now += by

        @rule()
        def the_next_moment_comes(self) -> None:
            """The clock moves to when a job is due."""
            self.look()
            moments = [job.due for job in self.jobs.values() if job.due is not None and not job.held]
            stage.now = max(stage.now, min(moments, default=stage.now))

        def the_next_download_is_due(self) -> bool:
            """The clock moves to when an output is due; whether there is one."""
            self.look()
            moments = [one.due for job in self.jobs.values() for one in job.outputs if one.due is not None]
            stage.now = max(stage.now, min(moments, default=stage.now))
            return bool(moments)

        def claim(self, holder: str, limit: int) -> list[ClaimedJob]:
            """A worker claims what is due."""
            due = {number: job.due for number, job in self.jobs.items() if job.due is not None and job.due <= stage.now}
            token = f"t{next(stage.tokens)}"
            found: list[ClaimedJob] = []
            with stage.engine.begin() as connection:
                for level in due_groups(connection, ["default"]):
                    found += claim_jobs(
                        connection, level, limit=limit, token=token, holder=holder, lease=LEASE, now=self.now
                    )
            assert len(found) == min(limit, len(due))
            assert {one.id for one in found} <= due.keys()
            left = [moment for number, moment in due.items() if number not in {one.id for one in found}]
            assert all((due[one.id] or 0) <= min(left, default=10**18) for one in found)  # longest due first
            for one in found:
                job = self.jobs[one.id]
                job.claim, job.due, job.asked = (token, holder), stage.now + 30 * S, stage.now
                job.polls += 1
                assert one.polls == job.polls
            self.claimed += found
            return found

        @rule(holder=st.sampled_from(HOLDERS), limit=st.integers(1, 3))
        def claim_only(self, holder: str, limit: int) -> None:
            """A worker claims, and its answers take their time."""
            self.claim(holder, limit)

        @rule(holder=st.sampled_from(HOLDERS), kinds=st.lists(LIKELY, min_size=3, max_size=3), late=st.booleans())
        def poll(self, holder: str, kinds: list[str], late: bool) -> None:
            """A worker claims whatever is due, and hears about all of it."""
            if late:
                self.the_next_moment_comes()
            found = self.claim(holder, 3)
            self.record([(one, kind) for one, kind in zip(found, kinds, strict=False)])

        @rule(kind=st.sampled_from([*STRIKES, "empty", "unknown", "processing", "odd"]), times=st.integers(2, 6))
        def the_same_again_and_again(self, kind: str, times: int) -> None:
            """The API says the same, however often it is asked."""
            for _ in range(times):
                self.the_next_moment_comes()
                self.record([(one, kind) for one in self.claim("ada", 3)])

        @rule(kind=LIKELY, by=JUMPS, meanwhile=st.sampled_from(MEANWHILE))
        def an_answer_takes_its_time(self, kind: str, by: int, meanwhile: str) -> None:
            """Between the question and its answer the lease may end, and much may happen."""
            self.the_next_moment_comes()
            found = self.claim("ada", 2)
            stage.now += by
            match meanwhile:
                case "renewal":
                    self.leases_are_renewed("ada")
                case "crash":
                    self.crash("ada")
                    self.look()
                case "claim":
                    self.claim("bob", 1)
                case "cancel":
                    self.cancel(0)
                case "hold":
                    self.hold(0)
            self.record([(one, kind) for one in found])

        @rule(trouble=st.sampled_from(ACCOUNT_OR_HOST), by=st.sampled_from([31 * S, 45 * S, 95 * S, 3_600 * S]))
        def a_hold_is_over(self, trouble: str, by: int) -> None:
            """Jobs that could not be asked about in time are not late at once."""
            for kind in (trouble, "processing"):
                self.the_next_moment_comes()
                stage.now += by if kind == "processing" else 0
                self.record([(one, kind) for one in self.claim("ada", 3)])

        @rule(remote=st.sampled_from("abc"), by=JUMPS)
        def a_webhook_comes_between(self, remote: str, by: int) -> None:
            """A hint about a job that is asked about just now, or was just now."""
            self.the_next_moment_comes()
            found = self.claim("ada", 2)
            self.nudge(remote)
            self.record([(one, "processing") for one in found[:1]])
            self.look()
            self.nudge(remote)
            stage.now += by

        @rule(picks=st.lists(st.tuples(st.integers(0, 9), LIKELY), min_size=1, max_size=3))
        def an_answer_comes(self, picks: list[tuple[int, str]]) -> None:
            """Answers to claims of long ago, maybe to ones that were answered already, or taken over."""
            if self.claimed:
                chosen = {self.claimed[-1 - pick % len(self.claimed)].id: (pick, kind) for pick, kind in picks}
                self.record([(self.claimed[-1 - pick % len(self.claimed)], kind) for pick, kind in chosen.values()])

        def record(self, heard: list[tuple[ClaimedJob, str]]) -> None:
            """Answers are written, those of lost claims too."""
            asked = []
            urls: dict[int, list[str]] = {}
            self.sent |= {(one.id, one.token) for one, _ in heard}
            for one, kind in heard:
                code, body = ANSWERS[kind]
                if kind == "success":
                    urls[one.id] = [f"https://h.test/{one.remote_id}{place}-{one.polls}.png" for place in (0, 1)]
                    listed = ", ".join(f'"{url}"' for url in urls[one.id])
                    body = f'{{"status": "success", "id": "{one.remote_id}", "output": [{listed}, {listed}]}}'
                reply = parse(code, {}, body.encode(), Question(one.remote_id, 0.0))
                asked.append(PollAnswer(one, reply, False, stage.now / S))
            self.recorder.take(asked, {})
            lost = self.recorder.write({})
            with stage.engine.connect() as connection:
                ends = [breaker.last_hold_end(self.now) for breaker in all_breakers(connection).values()]
            hold_end = max((micros(end) or 0 for end in ends if end is not None), default=None)
            assert self.recorder.unwritten == 0
            missed = 0
            for one, kind in heard:
                job = self.jobs[one.id]
                stands = job.claim is not None and job.claim[0] == one.token and (job.due or 0) > stage.now
                if stands:
                    job.answered(kind.partition(",")[0], urls.get(one.id, []), stage.now, hold_end)
                missed += not stands
            assert lost == missed

        @rule(pick=st.integers(0, 9), fresh=st.booleans())
        def a_claim_is_given_back(self, pick: int, fresh: bool) -> None:
            """A worker ends before it asks."""
            if fresh:
                self.the_next_moment_comes()
                self.claim("ada", 1)
            unsent = [one for one in self.claimed if (one.id, one.token) not in self.sent]
            if unsent:
                one = unsent[-1 if fresh else -1 - pick % len(unsent)]
                self.claimed.remove(one)  # nobody will ask about it
                with stage.engine.begin() as connection:
                    release_jobs(connection, [one.id], one.token, due_at=self.now)
                job = self.jobs[one.id]
                job.polls -= 1
                if job.claim is not None and job.claim[0] == one.token:
                    job.claim, job.due = None, stage.now

        @rule(holder=st.sampled_from(HOLDERS))
        def leases_are_renewed(self, holder: str) -> None:
            """A worker is slow, and alive."""
            with stage.engine.begin() as connection:
                renewed = renew_leases(connection, holder, lease=LEASE, now=self.now)
            rows: list[Job | Output] = [*self.jobs.values()]
            rows += [one for job in self.jobs.values() for one in job.outputs]
            held = [
                one for one in rows if one.claim is not None and one.claim[1] == holder and (one.due or 0) > stage.now
            ]
            assert len(renewed) == len(held)
            for one in held:
                one.due = stage.now + 30 * S

        @rule(holder=st.sampled_from(HOLDERS), times=st.sampled_from([1, 1, 2, 9]), claims=st.booleans())
        def a_worker_dies(self, holder: str, times: int, claims: bool) -> None:
            """What it held is due again; what kills its process again and again is set aside."""
            for _ in range(times):
                if claims:
                    self.the_next_moment_comes()
                    self.claim(holder, 3)
                self.crash(holder)
                self.look()

        def crash(self, holder: str) -> None:
            """A process is gone, and a sweep finds out."""
            numbers = {(row.job_id, row.position): number for number, row in self.rows.items()}
            with stage.engine.begin() as connection:
                release_crashed(connection, [holder], now=self.now)
            for job_id, job in self.jobs.items():
                if self.crashed(job, holder, job.polls) and job.due is not None:
                    job.replanned = self.soon(job)
                for position, one in enumerate(job.outputs):
                    if self.crashed(one, holder, one.attempts) and one.due is not None:
                        self.replanned[numbers[job_id, position]] = self.soon(one)
                job.settle()

        def crashed(self, one: Job | Output, holder: str, tries: int) -> bool:
            """Whether it was held by the process that died; then that is counted, and it may be too often."""
            if one.claim is None or one.claim[1] != holder:
                return False
            one.crashes = one.crashes + 1 if one.tries_at_crash == tries - 1 else 1
            one.tries_at_crash, one.claim = tries, None
            if one.crashes >= 8 and one.status == "pending":
                one.end("failed", "worker_crash")
            return True

        def soon(self, one: Job | Output) -> tuple[int, int]:
            """When it is due after a crash: at once after the first one."""
            longest = 0 if one.crashes < 2 else min(2**one.crashes, 60) * S
            return stage.now, stage.now + longest

        # ── downloads ─────────────────────────────────────────────────────────────────────────────────────────────

        @rule(patience=st.sampled_from([5, 30]))
        def a_sweep_comes(self, patience: int) -> None:
            """Outputs whose message is lost are put on the queue again."""
            lost = self.now - timedelta(seconds=patience)
            with stage.engine.begin() as connection:
                found = queue_due_outputs(connection, now=self.now, queued_before=lost, limit=100)
            self.look()
            expected = set()
            for output_id in self.rows:
                _, one = self.output(output_id)
                unqueued = one.queued is None or one.queued < stage.now - patience * S
                if one.due is not None and one.due <= stage.now and unqueued:
                    one.queued = stage.now
                    expected.add(output_id)
            assert set(found) == expected

        def take(self, output_id: int, holder: str) -> ClaimedOutput | None:
            """A message of an output is worked off, maybe for the second time."""
            self.look()
            due = {
                number: self.output(number)[1]
                for number in self.rows
                if (moment := self.output(number)[1].due) is not None and moment <= stage.now
            }
            token = f"o{next(stage.tokens)}"
            with stage.engine.begin() as connection:
                taken = claim_output(connection, output_id, token=token, holder=holder, lease=LEASE, now=self.now)
            assert (taken is None) == (not due)
            if taken is None:
                return None
            one = due[taken.id]
            assert one.listed == min(other.listed for other in due.values())  # the oldest link first
            if output_id in due and due[output_id].listed == one.listed:
                assert taken.id == output_id
            one.claim, one.due, one.queued = (token, holder), stage.now + 30 * S, None
            one.attempts += 1
            assert taken.facts.attempts == one.attempts
            self.taken.append(taken)
            return taken

        @rule(pick=st.integers(0, 9), holder=st.sampled_from(HOLDERS))
        def take_only(self, pick: int, holder: str) -> None:
            """A download begins."""
            self.take(nth(self.rows, pick) if self.rows else 1, holder)

        @rule(kind=st.sampled_from([*ATTEMPTS, "stored", "stored", "gone", "gone"]), times=st.integers(1, 6))
        def downloads_end_alike(self, kind: str, times: int) -> None:
            """One download after the other, as they are due."""
            for _ in range(times):
                if not self.the_next_download_is_due():
                    return
                taken = self.take(0, "ada")
                assert taken is not None
                self.attempt(taken, kind)

        @rule(kind=st.sampled_from(["success", "processing", "failed", "unknown"]), times=st.integers(15, 30))
        def links_stay_dead(self, kind: str, times: int) -> None:
            """Every download finds nothing, and so says the API, or not."""
            for _ in range(times):
                self.look()
                due = [job.due for job in self.jobs.values() if job.due is not None and job.due <= stage.now]
                if due:
                    self.record([(one, kind) for one in self.claim("bob", 3)])
                if not self.the_next_download_is_due():
                    return
                taken = self.take(0, "ada")
                assert taken is not None
                self.attempt(taken, "gone")

        @rule(by=JUMPS, kind=st.sampled_from([*ATTEMPTS]))
        def a_download_takes_its_time(self, by: int, kind: str) -> None:
            """Longer than its lease, maybe."""
            if self.the_next_download_is_due():
                taken = self.take(0, "ada")
                assert taken is not None
                stage.now += by
                self.attempt(taken, kind)

        @rule(pick=st.integers(0, 9), kind=st.sampled_from([*ATTEMPTS]))
        def a_download_ends(self, pick: int, kind: str) -> None:
            """The end of a download, maybe of one that somebody else has taken over."""
            if self.taken:
                self.attempt(self.taken[-1 - pick % len(self.taken)], kind)

        def attempt(self, taken: ClaimedOutput, kind: str) -> None:
            """What came of a download is written."""
            self.look()
            job, one = self.output(taken.id)
            stands = one.claim is not None and one.claim[0] == taken.token and (one.due or 0) > stage.now
            result = after_attempt(taken.facts, ATTEMPTS[kind], now=self.now, deadline=OUTPUT_DEADLINE)
            with stage.engine.begin() as connection:
                stood, final = record_attempt(connection, taken, result, now=self.now)
            assert stood == stands
            if not stands:
                return
            moments = tried_once(job, one, kind, stage.now)
            assert isinstance(result, (StoredFile, GiveUp)) == (moments is None)
            if moments is not None:
                self.replanned[taken.id] = moments
            before = job.status
            job.settle()
            assert (final is not None) == (job.status != before)

        @rule(pick=st.integers(0, 9))
        def a_host_is_busy(self, pick: int) -> None:
            """A download is given back before it began."""
            if self.taken:
                taken = self.taken[-1 - pick % len(self.taken)]
                self.look()
                _, one = self.output(taken.id)
                with stage.engine.begin() as connection:
                    release_output(connection, taken, due_at=self.now + timedelta(seconds=3), now=self.now)
                if one.claim is not None and one.claim[0] == taken.token and (one.due or 0) > stage.now:
                    one.claim, one.due = None, stage.now + 3 * S
                    one.attempts -= 1

        @rule(pick=st.integers(0, 9))
        def a_stored_file_is_gone(self, pick: int) -> None:
            """`verify` finds out."""
            self.look()
            stored = {number: row for number, row in self.rows.items() if row.status == "stored"}
            if not stored:
                return
            output_id = nth(stored, pick)
            job, one = self.output(output_id)
            with stage.engine.begin() as connection:
                changed = requeue_output(connection, output_id, location=stored[output_id].location, now=self.now)
            assert changed == (job.status != "cancelled")
            if changed:
                one.anew(stage.now)
                if job.status != "downloading":
                    job.status, job.code = "downloading", None

    return Life


def micros(moment: datetime | None) -> int | None:
    """A moment as the model has it."""
    return None if moment is None else (moment - START) // timedelta(microseconds=1)


def same(moment: datetime | None, expected: int | None) -> bool:
    """Whether a moment is the one expected."""
    return micros(moment) == expected


def nth(found: dict[int, Any], pick: int) -> int:
    """One of several, in the order of their ids."""
    return sorted(found)[pick % len(found)]


@contextmanager
def staged(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """A stage on a database, whose clock it is. On SQLite nothing has to outlive a crash of the machine."""
    stage = Stage(engine)
    clock: Callable[..., datetime] = lambda _: at(stage.now)  # noqa: E731
    for module in (recorder, pace_learner):
        monkeypatch.setattr(module, "database_now", clock)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: stage.now / S))
        monkeypatch.setattr(module.log, "disabled", True)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    yield stage


@EFFORTS
def test_whatever_happens_in_whatever_order_every_job_is_as_the_contract_says(
    engine: Engine, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with staged(engine, monkeypatch) as stage:
        share = 1 if engine.dialect.name == "sqlite" else 50
        steps = 10 if examples <= QUICK else 6  # a step is a whole story; the long run tells more of them
        run_state_machine_as_test(walks(stage), settings=effort(examples, of=share, steps=steps))
