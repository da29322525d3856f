"""A worker in this process: real polls and real downloads, one after the other, on a clock that leaps to what is due.

No broker, no process, no waiting. Whatever is due now is done; where nothing is, the clock goes to the next moment at
which something will be. `worker.wait` moves it too, so that an app's own code runs as it stands.
"""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple, Protocol

from pydantic import SecretStr
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from worker.client import tracking
from worker.client.tracking import Job, Workers
from worker.coordination.leases import LeaseKeeper
from worker.coordination.rate_limiter import RateLimiter, Reservation
from worker.core.lifecycle import PROMISE_PATIENCE
from worker.core.webhook import headers
from worker.downloads.downloader import Downloader
from worker.errors import JobNotFound, WorkerError
from worker.net.address_guard import Guard, guarded_adapter
from worker.net.pooled_adapter import PooledAdapter
from worker.notify.on_done import notify
from worker.notify.webhooks import BATCH
from worker.operations.overview import why
from worker.polling.api_client import MAX_ANSWER_BYTES, ApiClient
from worker.polling.poller import Poller
from worker.settings import Settings
from worker.storage.select import storage_for
from worker.store.due import due_outputs, next_download, next_request, unfinished_jobs, waiting_jobs
from worker.store.engine import database_now, error_kind
from worker.store.events import claim_events, create_events, record_delivery
from worker.store.jobs import job_row, outputs_of
from worker.system.redaction import Scrubber, shared_scrubber
from worker.testing.clock import Clock
from worker.testing.stand_in import KEY, FetchApi

LEASE = timedelta(days=365)  # nobody else works here, and the clock leaps
GRACE = timedelta(minutes=10) + PROMISE_PATIENCE  # how long after its last deadline a job may go on
STEPS_MOST = 20_000
SAME_MOMENT_MOST = 1_000


class KitError(WorkerError):
    """The test kit can't go on; the text says what to do."""


class NeverEnds(KitError):
    """A job came to no end, long after its deadline. The text says why; have the stand-in answer otherwise."""


class Told(NamedTuple):
    """An `on_done` task as it would have been sent."""

    task: str
    queue: str
    job_id: int


class Sent(NamedTuple):
    """A webhook as it would have been posted: signed, with the real time, so that a receiver of yours takes it."""

    url: str
    headers: dict[str, str]
    body: str


class Work(Protocol):
    """One kind of work that worker processes do."""

    def do(self) -> bool:
        """Does what is due now; whether there was anything."""
        ...

    def next(self, after: datetime) -> datetime | None:
        """When there is something to do next; None where nothing is to come."""
        ...


class FetchWorker(Workers):
    """Runs tracked jobs to their end in this process. All its methods may be called from any thread.

    `told` has the `on_done` tasks of final jobs, in order, and `webhooks` what would have been posted. Give `celery` an
    app of yours, and the tasks are run too, at once and in this process. `works` is all that it does, in this order;
    append what else a test wants done.
    """

    def __init__(self, engine: Engine, settings: Settings, api: FetchApi, clock: Clock) -> None:
        self.engine = engine
        self.settings = settings
        self.told: list[Told] = []
        self.webhooks: list[Sent] = []
        self.celery: Any = None
        self._clock = clock
        self._turn = threading.RLock()
        self._waited_since: dict[int, datetime] = {}
        self._polls = _Polls(engine, settings, api)
        self.works: list[Work] = [self._polls, _Downloads(engine, settings), _OnDone(self), _Webhooks(self)]

    @property
    def now(self) -> datetime:
        """What time it is for the app and the worker."""
        return self._clock.now()

    def run(self, job_id: int) -> Job:
        """Runs until this job is final; the job. What else is due until then is done too.

        Raises JobNotFound, and NeverEnds where it goes on long after its deadline.
        """
        with self._turn:
            began = self.now
            for _ in self._steps():
                job = tracking.get(job_id)
                if job is None:
                    raise JobNotFound(f"there is no job {job_id}: was the transaction that tracked it committed?")
                if job.final:
                    self._finish()
                    return job
                self._check(job, began)
                if not self._step(None):
                    self._check_rest(job.id)
        raise AssertionError("unreachable")

    def run_all(self) -> list[Job]:
        """Runs until all jobs are final, those too that are tracked meanwhile; those that it ended, by id."""
        ended: set[int] = set()
        with self._turn:
            while waiting := self._unfinished():
                ended.update(waiting)
                self.run(waiting[0])
            self._finish()
        found = [tracking.get(job_id) for job_id in sorted(ended)]
        return [job for job in found if job is not None]

    def advance(self, seconds: float = 0.0) -> None:
        """Lets so many seconds pass, and does all that is due until then."""
        with self._turn:
            until = self.now + timedelta(seconds=seconds)
            for _ in self._steps():
                if not self._step(until):
                    break
            self._clock.move_to(until)

    def close(self) -> None:
        """Ends its threads."""
        self._polls.close()
        for adapter in _adapters():
            adapter.close()

    # ── for `worker.wait`, and whoever wakes workers ──────────────────────────────────────────────────────────────────

    def wake(self, settings: Settings) -> None:
        """Nothing: it looks by itself."""

    def clock(self) -> float:
        """Seconds of the test's clock."""
        return self._clock.timestamp()

    def pause(self, job: Job, most: float | None) -> None:
        """Works on instead of waiting."""
        with self._turn:
            until = None if most is None else self.now + timedelta(seconds=most)
            self._check(job, self._waited_since.setdefault(job.id, self.now))
            if not self._step(until):
                if until is None:
                    self._check_rest(job.id)
                else:
                    self._clock.move_to(until)

    # ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _step(self, until: datetime | None) -> bool:
        """Does what is due, or else moves the clock to what is due next, not beyond `until`; whether it could."""
        with _explained():
            done = [work.do() for work in self.works]
            if any(done):
                return True
            moments = [moment for work in self.works if (moment := work.next(self.now)) is not None]
        if not moments or (until is not None and min(moments) > until):
            return False
        self._clock.move_to(min(moments))
        return True

    def _finish(self) -> None:
        """What follows from a final state at once, such as its `on_done`."""
        for _ in self._steps():
            if not self._step(self.now):
                return

    def _steps(self) -> Iterator[int]:
        """Counts steps. Raises NeverEnds where there are more than any test can mean."""
        seen, since = self.now, 0
        for number in range(STEPS_MOST):
            yield number
            if self.now != seen:
                seen, since = self.now, number
            if number - since >= SAME_MOMENT_MOST:
                raise NeverEnds(f"{SAME_MOMENT_MOST} things were done at the same moment, and there is always one more")
        raise NeverEnds(f"more than {STEPS_MOST} steps, and it goes on: is POLL_MIN very small?")

    def _check(self, job: Job, began: datetime) -> None:
        """Raises NeverEnds where a job should have ended long ago, or nothing would ever be done about it."""
        last = max(job.deadline_at, began)
        if job.ready_at is not None:
            last = max(last, job.ready_at + timedelta(seconds=self.settings.output_deadline))
        if self.now > last + GRACE:
            raise NeverEnds(
                f"job {job.id} is still {job.status} at {self.now:%Y-%m-%d %H:%M:%S} UTC, long after its deadline"
                f" ({self._why(job)}): have the stand-in answer otherwise, or look at half-way states by `advance`"
            )

    def _check_rest(self, job_id: int) -> None:
        """Raises NeverEnds where nothing is to come, and the job is not final; another thread may have seen to it."""
        job = tracking.get(job_id)
        if job is not None and not job.final:
            raise NeverEnds(f"job {job_id} is {job.status}, and nothing is to come ({self._why(job)})")

    def _why(self, job: Job) -> str:
        with self.engine.connect() as connection:
            row = job_row(connection, job.id)
            return (
                "it is gone" if row is None else why(connection, row, outputs_of(connection, [job.id]), self.settings)
            )

    def _unfinished(self) -> list[int]:
        with self.engine.connect() as connection:
            return unfinished_jobs(connection)


class _Polls:
    """The work of `worker.poll`: one call at a time, so that a test's calls come in the same order each time."""

    def __init__(self, engine: Engine, settings: Settings, api: FetchApi) -> None:
        self._engine = engine
        self._api = api
        self._keys: dict[str, SecretStr] = {}
        self._poller = Poller(
            engine=engine,
            api=ApiClient(
                settings.api,
                _scrubber(settings),
                timeout=settings.sd_api_timeout,
                connections=1,
                adapter=_adapters()[0],
                status_words=settings.status_words,
            ),
            budget=_NoBudget(),
            leases=_Leases(engine, lease=LEASE),
            keys=self._keys,
            rps=settings.rps,
            pace=settings.pace,
            api_timeout=settings.sd_api_timeout,
            queue_downloads=_nothing,
            notify=_nothing,
            threads=1,
            dice=random.Random(0),  # the same polls in every run of a test
        )

    def do(self) -> bool:
        with self._engine.connect() as connection:
            now = database_now(connection)
            waiting = waiting_jobs(connection)
        if all(job.due_at > now for job in waiting):
            return False
        self._api.expect((job.remote_id, job.submitted_at) for job in waiting)
        self._keys.update({job.account: SecretStr(KEY) for job in waiting})  # every account that a test names has one
        asked = self._poller.poll_once().asked
        if self._poller.kept:
            raise KitError("a job's row is locked by a transaction of yours: commit it or roll it back first")
        return asked > 0

    def next(self, after: datetime) -> datetime | None:
        with self._engine.connect() as connection:
            return next_request(connection, after=after)

    def close(self) -> None:
        """Ends its thread."""
        self._poller.close()


class _Downloads:
    """The work of `worker.download`."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._downloader = Downloader(
            engine=engine,
            leases=_Leases(engine, lease=LEASE),
            storage=storage_for(settings),
            guard=Guard(settings.allowed_networks),
            adapter=_adapters()[1],
            scrubber=_scrubber(settings),
            max_bytes=settings.output_max_bytes,
            max_pixels=settings.output_max_pixels,
            timeout=settings.output_timeout,
            deadline=settings.output_deadline,
            notify=_nothing,
            pause=_nothing,
        )

    def do(self) -> bool:
        with self._engine.connect() as connection:
            due = due_outputs(connection, now=database_now(connection))
        for output_id in due:
            self._downloader.run(output_id)
        return bool(due)

    def next(self, after: datetime) -> datetime | None:
        with self._engine.connect() as connection:
            return next_download(connection, after=after)


class _OnDone:
    """The telling of web apps, and their tasks where there is a Celery app to run them."""

    def __init__(self, worker: FetchWorker) -> None:
        self._worker = worker

    def do(self) -> bool:
        new: list[Told] = []
        notify(self._worker.engine, lambda *told: new.append(Told(*told)))
        self._worker.told += new
        if self._worker.celery is not None:
            for one in new:
                _run_task(self._worker.celery, one)
        return bool(new)

    def next(self, after: datetime) -> datetime | None:
        return None


class _Webhooks:
    """The telling of receivers: what would be posted is kept."""

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
        secrets, at = self._worker.settings.webhook_secrets, int(time.time())
        self._worker.webhooks += [
            Sent(event.url, headers(secrets, event.event_id, at, event.body), event.body) for event in due
        ]
        return bool(due)

    def next(self, after: datetime) -> datetime | None:
        return None


def _run_task(app: Any, told: Told) -> None:
    task = app.tasks.get(told.task)
    if task is None:
        known = ", ".join(sorted(name for name in app.tasks if not name.startswith("celery."))) or "none"
        raise KitError(f"on_done names {told.task!r}, which is no task of your Celery app; it has: {known}")
    task.apply((told.job_id,), throw=True)


class _Leases(LeaseKeeper):
    """Leases that need no renewal, and so no thread."""

    def __enter__(self) -> "_Leases":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _NoBudget(RateLimiter):
    """As many requests as are wanted: seconds cost nothing here. What the API refuses holds the account as ever."""

    def __init__(self) -> None:
        pass

    def take(self, account: str, wanted: int, *, rate: float) -> Reservation:
        return Reservation((0.0,) * wanted, 0.0, account)

    def give_back(self, grant: Reservation, unused: int) -> None:
        pass

    def taken(self, account: str, requests: int) -> float:
        return float(requests)


@cache
def _adapters() -> tuple[PooledAdapter, PooledAdapter]:
    """For the API and for downloads, once per process: reading the public authorities takes longer than a test."""
    loopback = Settings(output_allowed_networks="127.0.0.0/8").allowed_networks
    return PooledAdapter(limit=MAX_ANSWER_BYTES, connections=1), guarded_adapter(Guard(loopback), connections=1)


def _scrubber(settings: Settings) -> Scrubber:
    return shared_scrubber(settings.secret_texts)


def _nothing(_: object) -> None:
    """Where a worker process would send a message, or wait."""


@contextmanager
def _explained() -> Iterator[None]:
    """Says what to do where an app's own open transaction stands in the way."""
    try:
        yield
    except OperationalError as error:
        if error_kind(error) == "locked" or "locked" in str(error.orig):
            raise KitError("a transaction of yours holds the database: commit it or roll it back first") from error
        raise
