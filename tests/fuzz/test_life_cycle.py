"""Random sequences of events in the life of jobs, with the real SQL statements, compared with a simple model.

The model implements the contract. The clock is controlled by the test. After each step every row must equal the model.
"""

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
from tests.recorders import make_recorder
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
from worker.polling import answer_writer, breaker_updates, duration_learner, outcomes, recorder
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
    queue_due_outputs,
    release_jobs,
    release_output,
    renew_leases,
)
from worker.store.counters import Tally
from worker.store.due_groups import due_groups
from worker.store.holds import WorkLimits
from worker.store.outputs import requeue_output
from worker.store.reaper import release_crashed
from worker.store.results import record_attempt
from worker.store.schema import HELD_UNTIL, breakers, crashes, jobs, outputs, paces, promises
from worker.system.redaction import Scrubber
from worker.vendor.fetch_url import AllowedApi, fetch_address
from worker.vendor.replies import Question, parse

API = AllowedApi("https://api.test/api/v3", frozenset({"api.test"}))
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
LEASE = timedelta(seconds=30)
S = 1_000_000  # the model counts in microseconds, as the databases do
POLL_MIN = 3 * S
WAIT_LONGEST = 1_000 * S  # longer than the waits of all policies
OUTPUT_DEADLINE = timedelta(days=1)
RENEWAL = 3_600 * S
HOLDERS = ("ada", "bob")
EVENTS_BETWEEN = ["no event", "renewal", "crash", "claim", "cancel", "hold"]
NEVER = (HELD_UNTIL - START) // timedelta(microseconds=1)  # the due time of a held job
FINAL = ("completed", "failed", "expired", "cancelled")
PROMISING = "bd"  # the remote ids of jobs whose submit answer promised links
PROMISE_CODES = ("not_found", "no_output", "expired")


def at(moment: int) -> datetime:
    """Return the time of `moment`, in microseconds since the start."""
    return START + timedelta(microseconds=moment)


# ── the model: the contract, independent of the implementation ────────────────────────────────────────────────────────


@dataclass
class Output:
    """The expected state of one output. Times are microseconds since the start."""

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
    tries_at_last_crash: int | None = None

    def end(self, status: str, code: str | None) -> None:
        """Set a final state."""
        self.status, self.code, self.due, self.claim = status, code, None, None

    def reset(self, now: int) -> None:
        """Reset the output as if it had just been listed."""
        self.status, self.code, self.due, self.listed, self.queued = "pending", None, now, now, None
        self.bad, self.dead, self.dead_since, self.renewed = 0, 0, None, False


@dataclass
class Job:
    """The expected state of one job."""

    remote: str
    tracked: int
    deadline_seconds: int
    due: int | None
    status: str = "pending"
    code: str | None = None
    polls: int = 0
    last_polled: int | None = None
    strikes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("failed", "unknown", "error", "empty"), 0))
    last_strike: int | None = None
    claim: tuple[str, str] | None = None
    outputs: list[Output] = field(default_factory=list)
    deadline: int = 0
    crashes: int = 0
    tries_at_last_crash: int | None = None
    held: bool = False
    due_between: tuple[int, int] | None = None  # earliest and latest due time; None if it is known
    promised: list[str] = field(default_factory=list)
    trying: tuple[str, str] | None = None  # its final state if its promised links fail

    def end(self, status: str, code: str | None) -> None:
        """Set a final state."""
        self.status, self.code, self.due, self.claim, self.held = status, code, None, None, False

    def give_up(self, status: str, code: str, now: int) -> None:
        """End the job, or try its promised links first."""
        if self.promised and code in PROMISE_CODES:
            self.trying = (status, code)
            self.start_downloads(self.promised, now, queued=True)
        else:
            self.end(status, code)

    def poll_again(self, now: int, min_wait: int = POLL_MIN - S // 1_000) -> None:
        """Poll the job again, at a time that the pace chooses."""
        self.claim, self.last_polled = None, now
        self.due_between = (now + min_wait, now + WAIT_LONGEST)

    def finish_if_done(self) -> None:
        """End the job if all its outputs are final."""
        if self.status == "downloading" and all(output.status != "pending" for output in self.outputs):
            whole = all(output.status == "stored" for output in self.outputs)
            if self.trying is not None and all(output.status == "failed" for output in self.outputs):
                return self.end(*self.trying)
            self.trying = None
            self.end("completed" if whole else "failed", None if whole else "output_failed")
        return None

    def start_downloads(self, urls: list[str], now: int, *, queued: bool) -> None:
        """The job is ready: add its outputs."""
        self.status, self.due, self.claim = "downloading", None, None
        self.outputs = [Output(url, now, now, now if queued else None) for url in urls]

    def apply_answer(self, kind: str, urls: list[str], now: int, hold_end: int | None) -> None:
        """Apply an answer under a valid claim."""
        if kind in ACCOUNT_OR_HOST:
            self.poll_again(now)
        elif self.status == "downloading":
            self.due, self.claim = None, None
            self._links_renewed(urls if kind == "success" else [], now)
        elif kind == "success":
            self.start_downloads(urls, now, queued=True)
        else:
            self._not_ready(kind, now, hold_end)

    def _not_ready(self, kind: str, now: int, hold_end: int | None) -> None:
        if kind in STRIKES:
            counts = self.last_strike is None or now - self.last_strike >= POLL_MIN
            if kind != "error":
                self.strikes["error"] = 0
            if counts:
                self.strikes[kind] += 1
                self.last_strike = now
            limit, code = STRIKES[kind]
            if self.strikes[kind] >= limit and (kind != "unknown" or now - self.tracked >= 60 * S):
                return self.give_up("failed", code, now)
        elif kind == "processing":
            self.strikes = dict.fromkeys(self.strikes, 0)
        else:
            self.strikes["error"] = 0
        if now >= max(self.deadline, -1 if hold_end is None else hold_end + 60 * S):
            return self.give_up("expired", "expired", now)
        return self.poll_again(now)

    def _links_renewed(self, urls: list[str], now: int) -> None:
        for position, output in enumerate(self.outputs):
            if output.status == "pending" and output.renewed and output.claim is None:
                output.due = output.queued = now
                if position < len(urls):
                    output.url = urls[position]


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


def after_one_attempt(job: Job, output: Output, kind: str, now: int) -> tuple[int, int] | None:
    """Apply an attempt. Return the earliest and latest time of the next attempt, or None if the output is final."""
    late = now >= output.listed + 86_400 * S
    output.claim = None
    if kind == "stored":
        output.end("stored", None)
        return None
    is_final = kind in ("refused_address", "too_large")
    min_wait, max_wait = S, 300 * S
    if job.trying is not None:
        min_wait, max_wait = 0, 60 * S
        is_exhausted = late or (now >= output.listed + 600 * S and output.attempts >= 5)
        is_final = is_final or (kind != "storage" and is_exhausted)
    elif kind in ("not_media", "truncated"):
        output.bad += 1
        is_final = output.bad >= 3 or late
    elif kind in ("http_error", "unreachable"):
        is_final = late
    elif kind == "gone":
        since = now if output.dead_since is None else output.dead_since
        output.dead_since, min_wait = since, 0
        renewable = not job.remote.startswith("sha256:")
        if not output.renewed and not late and (now - since < 60 * S or renewable):
            if now - since >= 60 * S:
                output.renewed, output.code = True, "gone"
                if job.status == "downloading" and job.due is None:
                    job.due = now
                output.due = now + RENEWAL
                return (output.due, output.due)
        else:
            output.dead += 1
            is_final = output.dead >= 4 or late  # the fresh link once, and three more attempts
    if is_final:
        output.end("failed", kind)
        return None
    output.code = kind
    return (now + min_wait, now + max_wait)


# ── the state machine ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Stage:
    """The database, which is emptied before each run, and the clock."""

    engine: Engine
    now: int = 0
    tokens: Iterator[int] = field(default_factory=count)

    def clear(self) -> None:
        """Empty the database and reset the clock."""
        self.now = 0
        with self.engine.begin() as connection:
            for table in (outputs, promises, jobs, breakers, crashes, paces):
                connection.execute(delete(table))

    def recorder(self) -> Recorder:
        """Return the recorder of one process."""
        return make_recorder(self.engine, Scrubber([]), pace=Pace("learned", 0.5, POLL_MIN / S))


def state_machine(stage: Stage) -> type[RuleBasedStateMachine]:
    """Return the state machine for a stage."""

    class Life(RuleBasedStateMachine):
        """Any sequence of events."""

        def __init__(self) -> None:
            super().__init__()
            stage.clear()
            self.recorder = stage.recorder()
            self.jobs: dict[int, Job] = {}
            self.claimed: list[ClaimedJob] = []  # all claims, including stale ones
            self.sent: set[tuple[int, str]] = set()  # the claims that were polled
            self.claimed_outputs: list[ClaimedOutput] = []
            self.due_between: dict[int, tuple[int, int]] = {}  # outputs with their earliest and latest due times

        # ── helpers ───────────────────────────────────────────────────────────────────────────────────────────────────

        @property
        def now(self) -> datetime:
            """The time of the database."""
            return at(stage.now)

        def output(self, output_id: int) -> tuple[Job, Output]:
            """Return an output of the model and its job."""
            row = self.rows[output_id]
            job = self.jobs[row.job_id]
            return job, job.outputs[row.position]

        def look(self) -> None:
            """Read all rows, and copy due times that the product may choose, after a check of their bounds."""
            with stage.engine.connect() as connection:
                self.job_rows = {row.id: row for row in connection.execute(select(jobs)).all()}
                self.rows = {row.id: row for row in connection.execute(select(outputs)).all()}
            for job_id, job in self.jobs.items():
                if job.due_between is not None:
                    due = micros(self.job_rows[job_id].due_at)
                    assert due is not None
                    assert job.due_between[0] <= due <= job.due_between[1]
                    job.due, job.due_between = due, None
            for output_id, (earliest, latest) in self.due_between.items():
                due = micros(self.rows[output_id].due_at)
                assert due is not None
                assert earliest <= due <= latest
                self.output(output_id)[1].due = due
            self.due_between.clear()

        @invariant()
        def every_row_equals_the_model(self) -> None:
            """Compare status, code, counts, due times, claims and outputs."""
            self.look()
            assert self.job_rows.keys() == self.jobs.keys()
            for job_id, job in self.jobs.items():
                row = self.job_rows[job_id]
                assert (row.status, row.error_code) == (job.status, job.code)
                assert same(row.due_at, job.due)
                assert (row.held_at is not None) == job.held
                assert row.polls == job.polls
                strikes = (row.failed_answers, row.unknown_answers, row.error_answers, row.empty_answers)
                if job.status == "pending":
                    assert strikes == tuple(job.strikes.values())
                assert (row.claim_token, row.claim_holder) == (job.claim or (None, None))
                assert (row.completed_at is not None) == (job.status in FINAL)
                assert (row.ready_at is not None) >= (job.status in ("downloading", "completed"))
                assert same(row.deadline_at, job.deadline)
                assert row.remote_id == job.remote
            rows_by_position = {(row.job_id, row.position): row for row in self.rows.values()}
            assert len(rows_by_position) == sum(len(job.outputs) for job in self.jobs.values())
            for job_id, job in self.jobs.items():
                for position, output in enumerate(job.outputs):
                    row = rows_by_position[job_id, position]
                    assert (row.status, row.error_code, row.url) == (output.status, output.code, output.url)
                    assert same(row.due_at, output.due)
                    assert row.attempts == output.attempts
                    assert (row.claim_token, row.claim_holder) == (output.claim or (None, None))
                    assert (row.location is not None) == (output.status == "stored")

        # ── events of web apps ────────────────────────────────────────────────────────────────────────────────────────

        @initialize(
            remotes=st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True),
            deadline_seconds=st.booleans(),
        )
        def begin(self, remotes: list[str], deadline_seconds: bool) -> None:
            """Start with a few jobs."""
            for remote in remotes:
                self.track(remote, 3_600 if deadline_seconds else 40)
            self.look()

        @rule(remote=st.sampled_from("abcd"), deadline_seconds=st.sampled_from([40, 3_600]))
        def track(self, remote: str, deadline_seconds: int) -> None:
            """Track a job, maybe a second time."""
            urls = [f"https://h.test/promised-{remote}{place}.png" for place in (0, 1)] if remote in PROMISING else []
            job = store.NewJob(
                "default", remote, fetch_address(None, remote, API), "image", 0, None, None, None,
                self.now, self.now + timedelta(seconds=deadline_seconds), self.now + timedelta(seconds=1),
                promised=tuple(urls),
            )  # fmt: skip
            with stage.engine.begin() as connection:
                [(job_id, new)] = store.insert_jobs(connection, [job], now=self.now)
            ids_by_remote = {tracked.remote: number for number, tracked in self.jobs.items()}
            assert new == (remote not in ids_by_remote)
            assert ids_by_remote.get(remote, job_id) == job_id
            if new:
                model_job = Job(
                    remote,
                    stage.now,
                    deadline_seconds * S,
                    stage.now + S,
                    deadline=stage.now + deadline_seconds * S,
                    promised=urls,
                )
                self.jobs[job_id] = model_job

        @rule(number=st.integers(1, 2), copies=st.integers(1, 2))
        def track_ready_outputs(self, number: int, copies: int) -> None:
            """Track a job without an id but with outputs. It is never polled."""
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
                model_job = Job(remote, stage.now, 60 * S, None, deadline=stage.now + 60 * S)
                model_job.start_downloads([link.url for link in links], stage.now, queued=False)
                self.jobs[job_id] = model_job

        @rule(pick=st.integers(0, 9))
        def cancel(self, pick: int) -> None:
            """Cancel a job."""
            job_id = nth(self.jobs, pick)
            with stage.engine.begin() as connection:
                changed = store.cancel(connection, job_id, Tally(), now=self.now)
            job = self.jobs[job_id]
            assert changed == (job.status not in FINAL)
            if changed:
                job.end("cancelled", job.code)
                for output in job.outputs:
                    if output.status == "pending":
                        output.end("failed", "cancelled")

        @rule(pick=st.integers(0, 9))
        def retry(self, pick: int) -> None:
            """Retry a job."""
            job_id = nth(self.jobs, pick)
            with stage.engine.begin() as connection:
                changed = store.retry(connection, job_id, now=self.now)
            job = self.jobs[job_id]
            assert changed == (job.status in ("failed", "expired"))
            if changed:
                if job.trying is not None:  # the rows of its promised links are deleted
                    job.trying, job.outputs = None, []
                    self.claimed_outputs = [output for output in self.claimed_outputs if output.job_id != job_id]
                failed = [output for output in job.outputs if output.status == "failed"]
                for output in failed:
                    output.reset(stage.now)
                job.status, job.due = ("downloading", None) if failed else ("pending", stage.now)
                job.code, job.last_strike, job.deadline = None, None, stage.now + job.deadline_seconds
                job.strikes = dict.fromkeys(job.strikes, 0)

        @rule(pick=st.integers(0, 9))
        def hold(self, pick: int) -> None:
            """Hold a job, maybe a second time, maybe during a poll."""
            job_id = nth(self.jobs, pick)
            with stage.engine.begin() as connection:
                changed = holds.hold(connection, [job_id], now=self.now)
            job = self.jobs[job_id]
            assert changed == ({job_id} if job.status == "pending" and not job.held else set())
            if changed:
                job.due, job.claim, job.held = NEVER, None, True

        @rule(by=JUMPS)
        def resume(self, by: int) -> None:
            """Resume all held jobs after some time."""
            stage.now += by
            with stage.engine.begin() as connection:
                held_ids = [job_id for job_id, job in self.jobs.items() if job.held]
                limits = WorkLimits(timedelta(microseconds=POLL_MIN), timedelta.max, timedelta.max)
                changed = holds.resume(connection, held_ids, limits, now=self.now)
            held_jobs = {job_id: job for job_id, job in self.jobs.items() if job.held}
            assert changed == held_jobs.keys()
            for job in held_jobs.values():
                job.held = False
                job.due = stage.now if job.last_polled is None else max(stage.now, job.last_polled + POLL_MIN)
                job.deadline = max(job.deadline, stage.now + 60 * S)

        @rule(remote=st.sampled_from("abcde"))
        def nudge(self, remote: str) -> None:
            """Nudge a job, as after a webhook."""
            with stage.engine.begin() as connection:
                poll_min = timedelta(microseconds=POLL_MIN)
                moved = store.nudge(connection, remote, None, now=self.now, poll_min=poll_min)
            expected = 0
            for job in self.jobs.values():
                due = stage.now if job.last_polled is None else max(stage.now, job.last_polled + POLL_MIN)
                waits = job.status == "pending" and job.claim is None and not job.held
                if job.remote == remote and waits and (job.due or 0) > due:
                    job.due = due
                    expected += 1
            assert moved == expected

        # ── events of workers ─────────────────────────────────────────────────────────────────────────────────────────

        @rule(by=JUMPS)
        def advance_clock(self, by: int) -> None:
            """Advance the clock."""
            stage.now += by

        @rule()
        def advance_to_next_due_job(self) -> None:
            """Advance the clock until a job is due."""
            self.look()
            moments = [job.due for job in self.jobs.values() if job.due is not None and not job.held]
            stage.now = max(stage.now, min(moments, default=stage.now))

        def advance_to_next_due_output(self) -> bool:
            """Advance the clock until an output is due. Return whether there is one."""
            self.look()
            moments = [output.due for job in self.jobs.values() for output in job.outputs if output.due is not None]
            stage.now = max(stage.now, min(moments, default=stage.now))
            return bool(moments)

        def claim(self, holder: str, limit: int) -> list[ClaimedJob]:
            """Claim due jobs."""
            due = {number: job.due for number, job in self.jobs.items() if job.due is not None and job.due <= stage.now}
            token = f"t{next(stage.tokens)}"
            claimed: list[ClaimedJob] = []
            with stage.engine.begin() as connection:
                for level in due_groups(connection, ["default"]):
                    claimed += claim_jobs(
                        connection, level, limit=limit, token=token, holder=holder, lease=LEASE, now=self.now
                    )
            assert len(claimed) == min(limit, len(due))
            assert {claimed_job.id for claimed_job in claimed} <= due.keys()
            remaining = [
                moment for number, moment in due.items() if number not in {claimed_job.id for claimed_job in claimed}
            ]
            assert all(
                (due[claimed_job.id] or 0) <= min(remaining, default=10**18) for claimed_job in claimed
            )  # the longest due come first
            for claimed_job in claimed:
                job = self.jobs[claimed_job.id]
                job.claim, job.due, job.last_polled = (token, holder), stage.now + 30 * S, stage.now
                job.polls += 1
                assert claimed_job.polls == job.polls
            self.claimed += claimed
            return claimed

        @rule(holder=st.sampled_from(HOLDERS), limit=st.integers(1, 3))
        def claim_without_answer(self, holder: str, limit: int) -> None:
            """Claim jobs without recording answers."""
            self.claim(holder, limit)

        @rule(holder=st.sampled_from(HOLDERS), kinds=st.lists(LIKELY, min_size=3, max_size=3), late=st.booleans())
        def poll(self, holder: str, kinds: list[str], late: bool) -> None:
            """Claim all due jobs and record an answer for each."""
            if late:
                self.advance_to_next_due_job()
            claimed = self.claim(holder, 3)
            self.record([(claimed_job, kind) for claimed_job, kind in zip(claimed, kinds, strict=False)])

        @rule(kind=st.sampled_from([*STRIKES, "empty", "unknown", "processing", "odd"]), times=st.integers(2, 6))
        def repeat_one_answer(self, kind: str, times: int) -> None:
            """Record the same answer several times."""
            for _ in range(times):
                self.advance_to_next_due_job()
                self.record([(claimed_job, kind) for claimed_job in self.claim("ada", 3)])

        @rule(kind=LIKELY, by=JUMPS, between=st.sampled_from(EVENTS_BETWEEN))
        def answer_late(self, kind: str, by: int, between: str) -> None:
            """Record an answer after some time. The lease may have ended, and other events may have happened."""
            self.advance_to_next_due_job()
            claimed = self.claim("ada", 2)
            stage.now += by
            match between:
                case "renewal":
                    self.renew_leases_of("ada")
                case "crash":
                    self.crash("ada")
                    self.look()
                case "claim":
                    self.claim("bob", 1)
                case "cancel":
                    self.cancel(0)
                case "hold":
                    self.hold(0)
            self.record([(claimed_job, kind) for claimed_job in claimed])

        @rule(trouble=st.sampled_from(ACCOUNT_OR_HOST), by=st.sampled_from([31 * S, 45 * S, 95 * S, 3_600 * S]))
        def poll_after_a_hold(self, trouble: str, by: int) -> None:
            """Jobs that could not be polled during a hold must not expire at once."""
            for kind in (trouble, "processing"):
                self.advance_to_next_due_job()
                stage.now += by if kind == "processing" else 0
                self.record([(claimed_job, kind) for claimed_job in self.claim("ada", 3)])

        @rule(remote=st.sampled_from("abc"), by=JUMPS)
        def nudge_during_a_poll(self, remote: str, by: int) -> None:
            """Nudge a job during a poll and just after it."""
            self.advance_to_next_due_job()
            claimed = self.claim("ada", 2)
            self.nudge(remote)
            self.record([(claimed_job, "processing") for claimed_job in claimed[:1]])
            self.look()
            self.nudge(remote)
            stage.now += by

        @rule(picks=st.lists(st.tuples(st.integers(0, 9), LIKELY), min_size=1, max_size=3))
        def record_old_answers(self, picks: list[tuple[int, str]]) -> None:
            """Record answers to old claims, which may have been answered already or claimed by another worker."""
            if self.claimed:
                chosen = {self.claimed[-1 - pick % len(self.claimed)].id: (pick, kind) for pick, kind in picks}
                self.record([(self.claimed[-1 - pick % len(self.claimed)], kind) for pick, kind in chosen.values()])

        def record(self, answers: list[tuple[ClaimedJob, str]]) -> None:
            """Record answers, including those of lost claims."""
            poll_answers = []
            urls: dict[int, list[str]] = {}
            self.sent |= {(claimed_job.id, claimed_job.token) for claimed_job, _ in answers}
            for claimed_job, kind in answers:
                code, body = ANSWERS[kind]
                if kind == "success":
                    urls[claimed_job.id] = [
                        f"https://h.test/{claimed_job.remote_id}{place}-{claimed_job.polls}.png" for place in (0, 1)
                    ]
                    listed = ", ".join(f'"{url}"' for url in urls[claimed_job.id])
                    body = f'{{"status": "success", "id": "{claimed_job.remote_id}", "output": [{listed}, {listed}]}}'
                reply = parse(code, {}, body.encode(), Question(claimed_job.remote_id, 0.0))
                poll_answers.append(PollAnswer(claimed_job, reply, False, stage.now / S))
            self.recorder.take(poll_answers, {})
            lost = self.recorder.write({})
            with stage.engine.connect() as connection:
                ends = [breaker.last_hold_end(self.now) for breaker in all_breakers(connection).values()]
            hold_end = max((micros(end) or 0 for end in ends if end is not None), default=None)
            assert self.recorder.unwritten == 0
            missed = 0
            for claimed_job, kind in answers:
                job = self.jobs[claimed_job.id]
                is_valid = job.claim is not None and job.claim[0] == claimed_job.token and (job.due or 0) > stage.now
                if is_valid:
                    job.apply_answer(kind.partition(",")[0], urls.get(claimed_job.id, []), stage.now, hold_end)
                missed += not is_valid
            assert lost == missed

        @rule(pick=st.integers(0, 9), fresh=st.booleans())
        def release_a_claim(self, pick: int, fresh: bool) -> None:
            """Release a claim that was not polled."""
            if fresh:
                self.advance_to_next_due_job()
                self.claim("ada", 1)
            unsent = [
                claimed_job for claimed_job in self.claimed if (claimed_job.id, claimed_job.token) not in self.sent
            ]
            if unsent:
                claimed_job = unsent[-1 if fresh else -1 - pick % len(unsent)]
                self.claimed.remove(claimed_job)  # it will not be polled
                with stage.engine.begin() as connection:
                    release_jobs(connection, [claimed_job.id], claimed_job.token, due_at=self.now)
                job = self.jobs[claimed_job.id]
                job.polls -= 1
                if job.claim is not None and job.claim[0] == claimed_job.token:
                    job.claim, job.due = None, stage.now

        @rule(holder=st.sampled_from(HOLDERS))
        def renew_leases_of(self, holder: str) -> None:
            """Renew the leases of a slow worker."""
            with stage.engine.begin() as connection:
                renewed = renew_leases(connection, holder, lease=LEASE, now=self.now)
            rows: list[Job | Output] = [*self.jobs.values()]
            rows += [row for job in self.jobs.values() for row in job.outputs]
            expected = [
                row for row in rows if row.claim is not None and row.claim[1] == holder and (row.due or 0) > stage.now
            ]
            assert len(renewed) == len(expected)
            for row in expected:
                row.due = stage.now + 30 * S

        @rule(holder=st.sampled_from(HOLDERS), times=st.sampled_from([1, 1, 2, 9]), claims=st.booleans())
        def crash_a_worker(self, holder: str, times: int, claims: bool) -> None:
            """Its claims are due again. Jobs that crash their process repeatedly fail."""
            for _ in range(times):
                if claims:
                    self.advance_to_next_due_job()
                    self.claim(holder, 3)
                self.crash(holder)
                self.look()

        def crash(self, holder: str) -> None:
            """End a process, and release its claims."""
            numbers = {(row.job_id, row.position): number for number, row in self.rows.items()}
            with stage.engine.begin() as connection:
                release_crashed(connection, [holder], now=self.now)
            for job_id, job in self.jobs.items():
                if self.count_crash(job, holder, job.polls) and job.due is not None:
                    job.due_between = self.retry_window(job)
                for position, output in enumerate(job.outputs):
                    if self.count_crash(output, holder, output.attempts) and output.due is not None:
                        self.due_between[numbers[job_id, position]] = self.retry_window(output)
                job.finish_if_done()

        def count_crash(self, row: Job | Output, holder: str, tries: int) -> bool:
            """Return whether the crashed process had claimed the row. If so, count the crash; too many end the row."""
            if row.claim is None or row.claim[1] != holder:
                return False
            row.crashes = row.crashes + 1 if row.tries_at_last_crash == tries - 1 else 1
            row.tries_at_last_crash, row.claim = tries, None
            if row.crashes >= 8 and row.status == "pending":
                row.end("failed", "worker_crash")
            return True

        def retry_window(self, row: Job | Output) -> tuple[int, int]:
            """Return the earliest and latest due time after a crash. After the first crash it is due at once."""
            longest = 0 if row.crashes < 2 else min(2**row.crashes, 60) * S
            return stage.now, stage.now + longest

        # ── downloads ─────────────────────────────────────────────────────────────────────────────────────────────────

        @rule(patience=st.sampled_from([5, 30]))
        def sweep(self, patience: int) -> None:
            """Queue outputs again whose message was lost."""
            lost = self.now - timedelta(seconds=patience)
            with stage.engine.begin() as connection:
                queued = queue_due_outputs(connection, now=self.now, queued_before=lost, limit=100)
            self.look()
            expected = set()
            for output_id in self.rows:
                _, output = self.output(output_id)
                unqueued = output.queued is None or output.queued < stage.now - patience * S
                if output.due is not None and output.due <= stage.now and unqueued:
                    output.queued = stage.now
                    expected.add(output_id)
            assert set(queued) == expected

        def claim_one_output(self, output_id: int, holder: str) -> ClaimedOutput | None:
            """Process the message of an output, maybe a second time."""
            self.look()
            due = {
                number: self.output(number)[1]
                for number in self.rows
                if (moment := self.output(number)[1].due) is not None and moment <= stage.now
            }
            token = f"o{next(stage.tokens)}"
            with stage.engine.begin() as connection:
                claimed = claim_output(connection, output_id, token=token, holder=holder, lease=LEASE, now=self.now)
            assert (claimed is None) == (not due)
            if claimed is None:
                return None
            output = due[claimed.id]
            assert output.listed == min(candidate.listed for candidate in due.values())  # the oldest link comes first
            if output_id in due and due[output_id].listed == output.listed:
                assert claimed.id == output_id
            output.claim, output.due, output.queued = (token, holder), stage.now + 30 * S, None
            output.attempts += 1
            assert claimed.facts.attempts == output.attempts
            self.claimed_outputs.append(claimed)
            return claimed

        @rule(pick=st.integers(0, 9), holder=st.sampled_from(HOLDERS))
        def start_a_download(self, pick: int, holder: str) -> None:
            """Start a download."""
            self.claim_one_output(nth(self.rows, pick) if self.rows else 1, holder)

        @rule(kind=st.sampled_from([*ATTEMPTS, "stored", "stored", "gone", "gone"]), times=st.integers(1, 6))
        def repeat_one_attempt(self, kind: str, times: int) -> None:
            """Finish due downloads one after the other with the same result."""
            for _ in range(times):
                if not self.advance_to_next_due_output():
                    return
                claimed = self.claim_one_output(0, "ada")
                assert claimed is not None
                self.record_download(claimed, kind)

        @rule(kind=st.sampled_from(["success", "processing", "failed", "unknown"]), times=st.integers(15, 30))
        def keep_links_dead(self, kind: str, times: int) -> None:
            """All downloads find dead links, while the API gives the same answer."""
            for _ in range(times):
                self.look()
                due = [job.due for job in self.jobs.values() if job.due is not None and job.due <= stage.now]
                if due:
                    self.record([(claimed_job, kind) for claimed_job in self.claim("bob", 3)])
                if not self.advance_to_next_due_output():
                    return
                claimed = self.claim_one_output(0, "ada")
                assert claimed is not None
                self.record_download(claimed, "gone")

        @rule(by=JUMPS, kind=st.sampled_from([*ATTEMPTS]))
        def finish_a_download_late(self, by: int, kind: str) -> None:
            """It may take longer than its lease."""
            if self.advance_to_next_due_output():
                claimed = self.claim_one_output(0, "ada")
                assert claimed is not None
                stage.now += by
                self.record_download(claimed, kind)

        @rule(pick=st.integers(0, 9), kind=st.sampled_from([*ATTEMPTS]))
        def finish_an_old_download(self, pick: int, kind: str) -> None:
            """Finish a download, which another worker may have claimed meanwhile."""
            if self.claimed_outputs:
                self.record_download(self.claimed_outputs[-1 - pick % len(self.claimed_outputs)], kind)

        def record_download(self, claimed: ClaimedOutput, kind: str) -> None:
            """Record the result of a download."""
            self.look()
            job, output = self.output(claimed.id)
            is_valid = output.claim is not None and output.claim[0] == claimed.token and (output.due or 0) > stage.now
            result = after_attempt(claimed.facts, ATTEMPTS[kind], now=self.now, deadline=OUTPUT_DEADLINE)
            with stage.engine.begin() as connection:
                was_valid, final = record_attempt(connection, claimed, result, now=self.now)
            assert was_valid == is_valid
            if not is_valid:
                return
            moments = after_one_attempt(job, output, kind, stage.now)
            assert isinstance(result, (StoredFile, GiveUp)) == (moments is None)
            if moments is not None:
                self.due_between[claimed.id] = moments
            before = job.status
            job.finish_if_done()
            assert (final is not None) == (job.status != before)

        @rule(pick=st.integers(0, 9))
        def release_a_download(self, pick: int) -> None:
            """Release a download before it starts."""
            if self.claimed_outputs:
                claimed = self.claimed_outputs[-1 - pick % len(self.claimed_outputs)]
                self.look()
                _, output = self.output(claimed.id)
                with stage.engine.begin() as connection:
                    release_output(connection, claimed, due_at=self.now + timedelta(seconds=3), now=self.now)
                if output.claim is not None and output.claim[0] == claimed.token and (output.due or 0) > stage.now:
                    output.claim, output.due = None, stage.now + 3 * S
                    output.attempts -= 1

        @rule(pick=st.integers(0, 9))
        def lose_a_stored_file(self, pick: int) -> None:
            """`verify` detects a missing file."""
            self.look()
            stored = {number: row for number, row in self.rows.items() if row.status == "stored"}
            if not stored:
                return
            output_id = nth(stored, pick)
            job, output = self.output(output_id)
            with stage.engine.begin() as connection:
                changed = requeue_output(connection, output_id, location=stored[output_id].location, now=self.now)
            assert changed == (job.status != "cancelled")
            if changed:
                output.reset(stage.now)
                if job.status != "downloading":
                    job.status, job.code = "downloading", None

    return Life


def micros(moment: datetime | None) -> int | None:
    """Return a time in the unit of the model."""
    return None if moment is None else (moment - START) // timedelta(microseconds=1)


def same(moment: datetime | None, expected: int | None) -> bool:
    """Return whether a time equals the expected one."""
    return micros(moment) == expected


def nth(rows: dict[int, Any], pick: int) -> int:
    """Return one of the ids, which are sorted."""
    return sorted(rows)[pick % len(rows)]


@contextmanager
def open_stage(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """Open a stage that controls the clock. On SQLite durability is switched off for speed."""
    stage = Stage(engine)
    clock: Callable[..., datetime] = lambda _: at(stage.now)  # noqa: E731
    for module in (recorder, answer_writer, duration_learner):
        monkeypatch.setattr(module, "database_now", clock)
    for module in (recorder, answer_writer, breaker_updates, duration_learner, outcomes):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: stage.now / S))
    for module in (recorder, answer_writer, breaker_updates, duration_learner):
        monkeypatch.setattr(module.log, "disabled", True)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    yield stage


@EFFORTS
def test_any_sequence_of_events_leaves_every_job_as_the_contract_says(
    engine: Engine, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_stage(engine, monkeypatch) as stage:
        share = 1 if engine.dialect.name == "sqlite" else 50
        steps = 10 if examples <= QUICK else 6  # a step has several events; the long run has more examples
        run_state_machine_as_test(state_machine(stage), settings=effort(examples, of=share, steps=steps))
