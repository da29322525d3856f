"""Look up jobs and outputs, wait for a job, and wake the worker processes."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO

from sqlalchemy import Row

from worker.client import pace_models
from worker.client.connection import cached_settings, transaction
from worker.core.identity import SYNTHETIC_ID, checked_remote_id
from worker.core.lifecycle import FINAL_STATES
from worker.core.pacing.estimate import Progress, progress
from worker.core.pacing.policy import NOTHING_KNOWN, PacedJob, PaceModel
from worker.errors import JobNotFound, OutputMissing, WaitTimeout
from worker.settings import Settings
from worker.storage.select import storage_of
from worker.store import jobs as store
from worker.store.engine import database_now
from worker.store.outputs import output_row
from worker.system.locked_cache import locked_cache

if TYPE_CHECKING:
    from worker.coordination.wakeups import WakeUps

WAIT_POLL_SECONDS = 0.5  # the time between two reads of a job in `wait`


@dataclass(frozen=True, slots=True)
class Output:
    """An output of a job. `location` is set once it is stored."""

    id: int
    job_id: int
    position: int
    url: str
    status: str
    location: str | None
    size_bytes: int | None
    sha256: str | None
    media_type: str | None
    attempts: int
    error_code: str | None
    error_message: str | None


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it was at `read_at`, a time of the database's clock. Times are aware, in UTC; `eta` is in seconds.

    `not_ready_at` is when the API last answered that the job is not ready. `eta_at` is when the eta arrived, if it came
    after the submission. `held_at` is when an operator held the job.
    """

    id: int
    account: str
    remote_id: str
    kind: str
    status: str
    priority: int
    reference: str | None
    polls: int
    eta: float | None
    submitted_at: datetime
    ready_at: datetime | None
    completed_at: datetime | None
    deadline_at: datetime
    error_code: str | None
    error_message: str | None
    not_ready_at: datetime | None
    eta_at: datetime | None
    held_at: datetime | None
    read_at: datetime
    outputs: tuple[Output, ...] = ()

    @property
    def final(self) -> bool:
        """Whether the job is in a final state."""
        return self.status in FINAL_STATES

    def progress(self) -> Progress:
        """Return the progress of the job at `read_at`: the chance that it is ready, and the expected remaining time.

        It is computed from the durations of earlier jobs of this kind. These are read at most twice a minute. Raises
        Unavailable.
        """
        paced_job = PacedJob.at(self.read_at, self)
        return progress(self.status, paced_job, self._model() if self.status == "pending" else NOTHING_KNOWN)

    def _model(self) -> PaceModel:
        settings = cached_settings()
        model = pace_models.cached_model(settings.database, self.account, self.kind)
        if model is not None:
            return model
        with transaction(settings) as connection:
            return pace_models.pace_model(connection, self.account, self.kind)


def get(job_id: int | None = None, *, remote_id: str | int | None = None, account: str | None = None) -> Job | None:
    """Return a job with its outputs, by id or by remote id (the newest such job), or `None`."""
    with transaction(cached_settings()) as connection:
        if job_id is not None:
            row = store.job_row(connection, job_id)
        else:
            rows = store.jobs_by_remote(connection, lookup_id(remote_id), account)
            row = rows[0] if rows else None
        if row is None:
            return None
        return _job(row, store.outputs_of(connection, [row.id]), database_now(connection))


def open_output(output_id: int) -> BinaryIO:
    """Open a stored output as a binary file; the caller closes it. Raises OutputMissing and StorageTrouble."""
    location = _location(output_id)
    try:
        return storage_of(location, cached_settings()).open(location)
    except OutputMissing:
        new_location = _location(output_id)  # `move-storage` may have moved the file meanwhile
        if new_location == location:
            raise
        return storage_of(new_location, cached_settings()).open(new_location)


def output_url(output_id: int, seconds: float = 3_600) -> str:
    """Return a URL of a stored output that is valid for at least `seconds`.

    On S3 the URL is signed. For files it is below STORAGE_ADDRESS, the base URL of your web server for them. Without
    STORAGE_ADDRESS it is a `file:` URL for programs on this host; send other clients the bytes of `open_output`. Raises
    OutputMissing and StorageTrouble.
    """
    location = _location(output_id)
    return storage_of(location, cached_settings()).url(location, seconds)


def _location(output_id: int) -> str:
    if isinstance(output_id, bool) or not isinstance(output_id, int):
        raise OutputMissing(f"{output_id!r} is not an output id: get(job_id).outputs lists the outputs of a job")
    with transaction(cached_settings()) as connection:
        row = output_row(connection, output_id)
    if row is None:
        raise OutputMissing(f"there is no output {output_id}: get(job_id).outputs lists the outputs of a job")
    if row.location is None:
        advice = (
            "wait for its job" if row.status == "pending" else "see its error_code, and call retry(job_id) to try again"
        )
        raise OutputMissing(f"output {output_id} is not stored, it is {row.status}: {advice}")
    return str(row.location)


def wait(job_id: int, timeout: float | None = None) -> Job:
    """Wait until a job is final and return it. `timeout` is in seconds. Raises WaitTimeout and JobNotFound."""
    deadline = None if timeout is None else _workers.clock() + timeout
    while True:
        job = get(job_id)
        if job is None:
            raise JobNotFound(f"there is no job {job_id}: `fetch-worker list` shows the jobs")
        if job.final:
            return job
        remaining = None if deadline is None else deadline - _workers.clock()
        if remaining is not None and remaining <= 0:
            raise WaitTimeout(
                f"job {job_id} is still {job.status} after {timeout} s: it continues, so you can wait again"
            )
        _workers.pause(job, remaining)


class Workers:
    """The worker processes as a web app sees them: woken over Redis pub/sub; `wait` polls the database."""

    def wake(self, settings: Settings) -> None:
        """Wake the worker processes, because a job is due earlier than they know. Call it after the commit."""
        _wake_ups(settings.redis).send()

    def clock(self) -> float:
        """Return the time in seconds, for time-outs."""
        return time.monotonic()

    def pause(self, job: Job, max_seconds: float | None) -> None:
        """Wait a moment for the job to change, at most `max_seconds`."""
        time.sleep(WAIT_POLL_SECONDS if max_seconds is None else min(WAIT_POLL_SECONDS, max_seconds))


_workers = Workers()


def wake(settings: Settings) -> None:
    """Wake the worker processes, because a job is due earlier than they know. Call it after the commit."""
    _workers.wake(settings)


@contextmanager
def workers_in_place(workers: Workers) -> Iterator[None]:
    """Replace the workers of this process, for tests. Cached settings and models are cleared before and after."""
    global _workers
    replaced, _workers = _workers, workers
    _clear_caches()
    try:
        yield
    finally:
        _workers = replaced
        _clear_caches()


def _clear_caches() -> None:
    cached_settings.cache_clear()
    pace_models.clear_cache()


@locked_cache
def _wake_ups(redis_url: str) -> "WakeUps":
    from worker.coordination.wakeups import WakeUps  # only here: redis is slow to import, and reading needs none

    return WakeUps(redis_url)


def lookup_id(remote_id: object) -> str:
    """Return a valid remote id, from the API or made by `track`. Raises NotTrackable."""
    is_synthetic = isinstance(remote_id, str) and SYNTHETIC_ID.fullmatch(remote_id)
    return str(remote_id) if is_synthetic else checked_remote_id(remote_id)


def _job(row: Row[Any], outputs: Sequence[Row[Any]], now: datetime) -> Job:
    values = row._mapping
    fields = {name: values[name] for name in Job.__dataclass_fields__ if name not in ("outputs", "read_at")}
    return Job(**fields, read_at=now, outputs=tuple(_output(output) for output in outputs))


def _output(row: Row[Any]) -> Output:
    values = row._mapping
    return Output(**{name: values[name] for name in Output.__dataclass_fields__})
