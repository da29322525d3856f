"""Look up jobs and outputs."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, BinaryIO
from uuid import UUID

from sqlalchemy import Connection, Row

from worker.client import pace_models
from worker.client.connection import cached_settings, transaction
from worker.client.ids import checked_job_id, checked_output_id, quoted
from worker.client.job_options import checked_account, checked_reference
from worker.core.humanize import iso_time
from worker.core.identity import SYNTHETIC_ID, checked_remote_id
from worker.core.lifecycle import FINAL_STATES, JOB_STATES
from worker.core.pacing.estimate import OrderQueue, Progress, progress
from worker.core.pacing.policy import NOTHING_KNOWN, PacedJob, PaceModel
from worker.core.slots import SlotLimit
from worker.errors import NotTrackable, OutputMissing
from worker.storage.select import storage_of
from worker.store import jobs as store
from worker.store.engine import database_now
from worker.store.orders import place_of_job
from worker.store.outputs import output_row
from worker.store.reports.search import JobFilter, find_jobs
from worker.store.slots import all_slots

FOUND_MOST = 10_000  # jobs that `find` returns
BATCH = 500  # jobs whose outputs are read with one query


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

    Two jobs are equal if nothing changed between their reads.

    `remote_id` is "" as long as the API has not named the job: it is ordered or uncertain. `not_ready_at` is when the
    API last answered that the job is not ready. `eta_at` is when the eta arrived, if it came after the submission.
    `held_at` is when an operator held the job.
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
    read_at: datetime = field(compare=False)
    outputs: tuple[Output, ...] = ()

    @property
    def final(self) -> bool:
        """Whether the job is in a final state."""
        return self.status in FINAL_STATES

    def as_json(self) -> dict[str, Any]:
        """Return the job and its outputs as JSON values. Times are ISO 8601 in UTC.

        `remote_id` is `None` as long as the API has not named the job.
        """
        values = (asdict(self) | {"remote_id": self.remote_id or None}).items()
        return {name: iso_time(value) if isinstance(value, datetime) else value for name, value in values}

    def progress(self) -> Progress:
        """Return the progress of the job at `read_at`: the chance that it is ready, and the expected remaining time.

        It is computed from the durations of earlier jobs of this kind. These are read at most twice a minute. For an
        order that is not sent yet, the place in the queue of its account is read each time. Raises Unavailable.
        """
        paced_job = PacedJob.at(self.read_at, self)
        model = self._model() if self.status in ("pending", "ordered") else NOTHING_KNOWN
        return progress(self.status, paced_job, model, self._order_queue() if self.status == "ordered" else None)

    def _order_queue(self) -> OrderQueue:
        settings = cached_settings()
        with transaction(settings) as connection:
            place = place_of_job(connection, self.id, now=self.read_at)
            limit = all_slots(connection).get(self.account, SlotLimit(self.account))
        total = limit.total(settings.slots(self.account))
        return OrderQueue(0, 0, total) if place is None else OrderQueue(place.before, place.taken, total)

    def _model(self) -> PaceModel:
        settings = cached_settings()
        model = pace_models.cached_model(settings.database, self.account, self.kind)
        if model is not None:
            return model
        with transaction(settings) as connection:
            return pace_models.pace_model(connection, self.account, self.kind)


def get(
    job_id: int | None = None,
    *,
    remote_id: str | int | None = None,
    reference: str | int | UUID | None = None,
    account: str | None = None,
) -> Job | None:
    """Return a job with its outputs, or `None` if there is none.

    Look it up by its id, by the API's remote id, or by the reference that it was tracked with; the last two return the
    newest such job, with `account` only one of this account. Raises NotTrackable for an argument that can't be right,
    and Unavailable.
    """
    names = {"job_id": job_id, "remote_id": remote_id, "reference": reference}
    lookups = [name for name, value in names.items() if value is not None]
    if not lookups:
        raise NotTrackable("get needs the id of a job, or remote_id= or reference=: it got None")
    if len(lookups) > 1:
        raise NotTrackable(f"give only one of {', '.join(lookups)}")
    with transaction(cached_settings()) as connection:
        if job_id is not None:
            row = store.job_row(connection, checked_job_id(job_id))
            rows = [] if row is None else [row]
        elif reference is not None:
            rows = list(find_jobs(connection, _filter(reference, None, account), limit=1))
        else:
            rows = list(store.jobs_by_remote(connection, lookup_id(remote_id), account)[:1])
        return next(iter(_with_outputs(connection, rows)), None)


def find(
    *,
    reference: str | int | UUID | None = None,
    status: str | Iterable[str] | None = None,
    account: str | None = None,
    limit: int = 50,
) -> list[Job]:
    """Return up to `limit` jobs with their outputs, newest first: all, or those that match.

    `status` is a state or several of them. Raises NotTrackable for an argument that can't be right, and Unavailable.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or not 0 < limit <= FOUND_MOST:
        raise NotTrackable(f"limit must be a whole number from 1 to {FOUND_MOST:,}, not {limit!r}")
    job_filter = _filter(reference, status, account)
    with transaction(cached_settings()) as connection:
        return _with_outputs(connection, find_jobs(connection, job_filter, limit=limit))


def get_output(output_id: int) -> Output | None:
    """Return an output, stored or not, or `None` if there is none. Raises NotTrackable and Unavailable."""
    checked = checked_output_id(output_id)
    with transaction(cached_settings()) as connection:
        row = output_row(connection, checked)
    return None if row is None else _output(row)


def read_jobs(job_ids: Collection[int]) -> dict[int, Job]:
    """Return the jobs with these ids that exist, with their outputs, read at one time."""
    with transaction(cached_settings()) as connection:
        return {job.id: job for job in _with_outputs(connection, store.job_rows(connection, sorted(job_ids)))}


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
    try:
        row = get_output(output_id)
    except NotTrackable as wrong:
        raise OutputMissing(str(wrong)) from None
    if row is None:
        raise OutputMissing(f"there is no output {output_id}: get(job_id).outputs lists the outputs of a job")
    if row.location is None:
        advice = (
            "wait for its job" if row.status == "pending" else "see its error_code, and call retry(job_id) to try again"
        )
        raise OutputMissing(f"output {output_id} is not stored, it is {row.status}: {advice}")
    return row.location


def lookup_id(remote_id: object) -> str:
    """Return a valid remote id, from the API or made by `track`. Raises NotTrackable."""
    is_synthetic = isinstance(remote_id, str) and SYNTHETIC_ID.fullmatch(remote_id)
    return str(remote_id) if is_synthetic else checked_remote_id(remote_id)


def _filter(reference: object, status: str | Iterable[str] | None, account: object) -> JobFilter:
    statuses = (status,) if isinstance(status, str) else tuple(status or ())
    unknown = next((name for name in statuses if name not in JOB_STATES), None)
    if unknown is not None:
        raise NotTrackable(f"{quoted(unknown)} is not a state of a job: use {', '.join(JOB_STATES)}")
    return JobFilter(
        statuses=statuses,
        references=() if reference is None else (checked_reference(reference),),
        accounts=() if account is None else (checked_account(account),),
    )


def _with_outputs(connection: Connection, rows: Sequence[Row[Any]]) -> list[Job]:
    """Return jobs, in the order of their rows."""
    if not rows:
        return []
    outputs: dict[int, list[Output]] = {}
    for start in range(0, len(rows), BATCH):
        for output in store.outputs_of(connection, [row.id for row in rows[start : start + BATCH]]):
            outputs.setdefault(output.job_id, []).append(_output(output))
    now = database_now(connection)
    return [_job(row, outputs.get(row.id, ()), now) for row in rows]


def _job(row: Row[Any], outputs: Sequence[Output], now: datetime) -> Job:
    values = row._mapping
    fields = {name: values[name] for name in Job.__dataclass_fields__ if name not in ("outputs", "read_at")}
    return Job(**fields, read_at=now, outputs=tuple(outputs))


def _output(row: Row[Any]) -> Output:
    values = row._mapping
    return Output(**{name: values[name] for name in Output.__dataclass_fields__})
