"""In-process worker for tests: runs due polls and downloads one by one and moves the test clock to the next due time.

There is no broker, no second process and no real waiting. When nothing is due, the clock jumps to the next due time.
`worker.wait` drives the worker too, so the app's own code runs unchanged.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import OperationalError

from worker.client import jobs as client_jobs
from worker.client.jobs import Job
from worker.client.workers import Workers
from worker.configuration.server_urls import same_database
from worker.core.lifecycle import PROMISE_PATIENCE
from worker.core.webhook import headers, with_addresses
from worker.errors import JobNotFound
from worker.notify.on_done import notify
from worker.notify.webhooks import BATCH
from worker.operations.explain import why
from worker.operations.job_context import read_context
from worker.settings import Settings
from worker.storage.select import public_addresses
from worker.store.due_work import unfinished_jobs
from worker.store.engine import database_now, error_kind
from worker.store.events import claim_events, create_events, record_delivery
from worker.store.jobs import job_row, outputs_of
from worker.testing.clock import Clock
from worker.testing.stand_in import FetchApi
from worker.testing.works import LEASE, CandidateWork, DownloadWork, KitError, OrderWork, PollWork, Work, adapters

GRACE = timedelta(minutes=10) + PROMISE_PATIENCE  # how long a job may run past its last deadline
ORDER_GRACE = timedelta(hours=6)  # how much longer an order may wait to be sent: it does not expire
MAX_STEPS = 20_000
MAX_STEPS_PER_MOMENT = 1_000


class NeverEnds(KitError):
    """A job did not reach a final state long after its deadline. The message says why. Change the answers."""


class Told(NamedTuple):
    """An `on_done` task that would have been sent."""

    task: str
    queue: str
    job_id: int


class Sent(NamedTuple):
    """A webhook that would have been posted. It is signed with the real time, so your receiver accepts it."""

    url: str
    headers: dict[str, str]
    body: str


class FetchWorker(Workers):
    """In-process worker that runs tracked jobs to a final state. Thread-safe.

    `told` lists the `on_done` tasks of final jobs, in order. `webhooks` lists the webhooks that would have been posted.
    Set `celery` to your Celery app to run the `on_done` tasks at once in this process. `works` lists the kinds of work
    that the worker does, in order; append your own if a test needs more.
    """

    in_steps = True

    def __init__(self, engine: Engine, settings: Settings, api: FetchApi, clock: Clock) -> None:
        self.engine = engine
        self.settings = settings
        self.told: list[Told] = []
        self.webhooks: list[Sent] = []
        self.celery: Any = None
        self._clock = clock
        self._lock = threading.RLock()
        self._waited_since: dict[int, datetime] = {}
        self._polls = PollWork(engine, settings, api)
        self._orders = OrderWork(engine, settings)
        self.works: list[Work] = [
            self._orders,
            self._polls,
            CandidateWork(engine, settings),
            DownloadWork(engine, settings),
            _OnDoneWork(self),
            _WebhookWork(self),
        ]

    @property
    def now(self) -> datetime:
        """The current time for the app and the worker."""
        return self._clock.now()

    def run(self, job_id: int) -> Job:
        """Run until this job is final and return it. Other work that is due in the meantime is done too.

        An uncertain order is returned as well, because it does not go on by itself: call `worker.attach` or
        `worker.retry`, then run it again. Raises JobNotFound, and NeverEnds if the job goes on long after its deadline.
        """
        with self._lock:
            started_at = self.now
            for _ in self._steps():
                job = client_jobs.get(job_id)
                if job is None:
                    raise JobNotFound(f"there is no job {job_id}: was the transaction that tracked it committed?")
                if job.final or job.status == "uncertain":
                    self._finish_due_work()
                    if job.final or self._stays_uncertain(job_id):
                        return job
                    continue
                self._check_deadline(job, started_at)
                if not self._step(None):
                    self._check_stuck(job.id)
        raise AssertionError("unreachable")

    def _stays_uncertain(self, job_id: int) -> bool:
        """Return whether an uncertain order still is, after the due work: a call may have named its job."""
        job = client_jobs.get(job_id)
        return job is not None and job.status == "uncertain"

    def run_all(self) -> list[Job]:
        """Run until all jobs are final, including jobs tracked meanwhile. Return the jobs that it ran, by id.

        Orders that are uncertain, or become so, stay uncertain.
        """
        ended: set[int] = set()
        with self._lock:
            while waiting := self._unfinished():
                ended.update(waiting)
                self.run(waiting[0])
            self._finish_due_work()
        jobs = [client_jobs.get(job_id) for job_id in sorted(ended)]
        return [job for job in jobs if job is not None]

    def advance(self, seconds: float = 0.0) -> None:
        """Let this many seconds pass and do all work that is due in them."""
        with self._lock:
            until = self.now + timedelta(seconds=seconds)
            for _ in self._steps():
                if not self._step(until):
                    break
            self._clock.move_to(until)

    def close(self) -> None:
        """Close the HTTP connections and end the threads."""
        self._polls.close()
        self._orders.close()
        for adapter in adapters():
            adapter.close()

    # ── the `Workers` interface, used by `worker.wait` and `worker.nudge` ─────────────────────────────────────────────

    def wake(self, settings: Settings) -> None:
        """Do nothing: this worker looks for due jobs itself."""

    def check_database(self, connection: Connection) -> None:
        """Raise KitError if a job would be tracked in another database than the kit's."""
        engine = connection.engine
        in_memory = engine.dialect.name == "sqlite" and engine.url.database in (None, "", ":memory:")
        own = getattr(self.engine, "real_engine", self.engine)
        if engine is own if in_memory else same_database(engine.url, self.engine.url):
            return
        raise KitError(
            f"this job would be tracked in {engine.url.render_as_string()}, but the test kit uses"
            f" {self.engine.url.render_as_string()}: let a fixture `fetch_database` return your test's database"
        )

    def clock(self) -> float:
        """Return the seconds of the test clock."""
        return self._clock.timestamp()

    def pause(self, job: Job, most: float | None) -> None:
        """Do the next due work instead of sleeping."""
        with self._lock:
            until = None if most is None else self.now + timedelta(seconds=most)
            self._check_deadline(job, self._waited_since.setdefault(job.id, self.now))
            if not self._step(until):
                if until is None:
                    self._check_stuck(job.id)
                else:
                    self._clock.move_to(until)

    # ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _step(self, until: datetime | None) -> bool:
        """Do what is due, or else move the clock to the next due time, at most to `until`. False if it did neither."""
        with _explain_locks():
            results = [work.do() for work in self.works]
            if any(results):
                return True
            moments = [moment for work in self.works if (moment := work.next(self.now)) is not None]
        if not moments or (until is not None and min(moments) > until):
            return False
        self._clock.move_to(min(moments))
        return True

    def _finish_due_work(self) -> None:
        """Do the work that follows a final state at once, such as its `on_done` call."""
        for _ in self._steps():
            if not self._step(self.now):
                return

    def _steps(self) -> Iterator[int]:
        """Count steps. Raises NeverEnds when there are more of them than a test can need."""
        moment, since = self.now, 0
        for number in range(MAX_STEPS):
            yield number
            if self.now != moment:
                moment, since = self.now, number
            if number - since >= MAX_STEPS_PER_MOMENT:
                raise NeverEnds(f"{MAX_STEPS_PER_MOMENT} steps at the same time did not finish the work")
        raise NeverEnds(f"{MAX_STEPS} steps did not finish the work: is POLL_MIN very small?")

    def _check_deadline(self, job: Job, started_at: datetime) -> None:
        """Raises NeverEnds if the job should have ended long ago."""
        latest = max(job.deadline_at, started_at)
        if job.status == "ordered":
            latest += ORDER_GRACE
        if job.ready_at is not None:
            latest = max(latest, job.ready_at + timedelta(seconds=self.settings.output_deadline))
        if self.now > latest + GRACE:
            raise NeverEnds(
                f"job {job.id} is still {job.status} at {self.now:%Y-%m-%d %H:%M:%S} UTC, long after its deadline"
                f" ({self._why(job)}): change the stand-in's answers, or use `advance` to look at intermediate states"
            )

    def _check_stuck(self, job_id: int) -> None:
        """Raises NeverEnds if the job is not final although no work is left. Another thread may have finished it."""
        job = client_jobs.get(job_id)
        if job is not None and job.status == "uncertain":
            raise NeverEnds(
                f"job {job_id} is uncertain: it was sent and its answer is lost, so it does not go on by itself. Call"
                " worker.attach or worker.retry"
            )
        if job is not None and not job.final:
            raise NeverEnds(
                f"job {job_id} is {job.status}, and no work is left that could change it ({self._why(job)})"
            )

    def _why(self, job: Job) -> str:
        with self.engine.connect() as connection:
            row = job_row(connection, job.id)
            return (
                "it was deleted"
                if row is None
                else why(read_context(connection, row, outputs_of(connection, [job.id]), [], self.settings))
            )

    def _unfinished(self) -> list[int]:
        with self.engine.connect() as connection:
            return unfinished_jobs(connection)


class _OnDoneWork(Work):
    """Collect `on_done` calls, and run their tasks if a Celery app is set."""

    def __init__(self, worker: FetchWorker) -> None:
        self._worker = worker

    def do(self) -> bool:
        new: list[Told] = []
        notify(self._worker.engine, lambda *fields: new.append(Told(*fields)))
        self._worker.told += new
        if self._worker.celery is not None:
            for call in new:
                _run_task(self._worker.celery, call)
        return bool(new)


class _WebhookWork(Work):
    """Collect the webhooks that would be posted."""

    def __init__(self, worker: FetchWorker) -> None:
        self._worker = worker

    def do(self) -> bool:
        with self._worker.engine.begin() as connection:
            now = database_now(connection)
            create_events(connection, now=now, limit=BATCH)
            due = claim_events(connection, token="kit", holder="kit", lease=LEASE, now=now, limit=BATCH)  # noqa: S106
            for event in due:
                record_delivery(
                    connection, event, now=now, ended="delivered", due_at=None, http_status=200, message=None
                )
        settings, at = self._worker.settings, int(time.time())
        for event in due:
            body = with_addresses(event.body, public_addresses(settings))
            signed = headers(settings.webhook_secrets, event.event_id, at, body)
            self._worker.webhooks.append(Sent(event.url, signed, body))
        return bool(due)


def _run_task(app: Any, call: Told) -> None:
    if call.task not in app.tasks:
        app.loader.import_default_modules()  # what `autodiscover_tasks` names is imported only now, as in a worker
    task = app.tasks.get(call.task)
    if task is None:
        names = ", ".join(sorted(name for name in app.tasks if not name.startswith("celery."))) or "none"
        raise KitError(f"on_done names {call.task!r}, which is not a task of your Celery app. Its tasks: {names}")
    task.apply((call.job_id,), throw=True)


@contextmanager
def _explain_locks() -> Iterator[None]:
    """Raise KitError with advice if an open transaction of the app locks the database."""
    try:
        yield
    except OperationalError as error:
        if error_kind(error) == "locked" or "locked" in str(error.orig):
            raise KitError(
                "an open transaction of your test locks the database: commit it or roll it back first"
            ) from error
        raise
