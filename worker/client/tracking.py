"""The Python API for web apps: track a submit answer, look up a job, act on it, wait for it."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO, Protocol
from zlib import crc32

from sqlalchemy import URL, Connection, Row, event
from sqlalchemy.orm import Session, scoped_session

from worker.coordination.wakeups import WakeUps
from worker.core.identity import ACCOUNT, SYNTHETIC_ID, checked_remote_id
from worker.core.lifecycle import FINAL_STATES
from worker.core.numbers import positive_number
from worker.core.on_done_name import on_done_problem, task_and_queue
from worker.core.pacing.estimate import Progress, progress
from worker.core.pacing.policy import NOTHING_KNOWN, SPREAD, Pace, PacedJob, PaceModel, PollPlan
from worker.core.webhook import checked_url
from worker.errors import ApiRefused, JobNotFound, NotTrackable, OutputMissing, WaitTimeout
from worker.polling.duration_learner import FRESH_SECONDS, read_models
from worker.settings import Settings, load
from worker.storage.select import storage_of
from worker.store import jobs as store
from worker.store.counters import Tally
from worker.store.engine import database_now, engine_for, translate_errors
from worker.store.events import create_events
from worker.store.outputs import output_row
from worker.system.locked_cache import locked_cache
from worker.system.redaction import Scrubber, shared_scrubber
from worker.vendor.families import MAX_KIND
from worker.vendor.submissions import PlannedJob, planned_job, submit_answer

log = logging.getLogger(__name__)

WAIT_POLL_SECONDS = 0.5  # the time between two reads of a job in `wait`
SOON_SECONDS = 1.0  # a poll run that waits checks for due jobs at least this often
MAX_REFERENCE = 255
PRIORITY_LIMIT = 1_000
MAX_CACHED_MODELS = 2_000
_WAKES = "fetch-worker: this session tracked a job that is due soon"


class TrackingSession(Protocol):
    """The interface that `track(session=…)` needs. SQLAlchemy's Session and scoped_session have it."""

    def connection(self) -> Connection:
        """Return the connection of the session's transaction."""
        ...


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
        paced_job = PacedJob.at(
            self.read_at,
            submitted_at=self.submitted_at,
            not_ready_at=self.not_ready_at,
            eta=self.eta,
            eta_at=self.eta_at,
            deadline_at=self.deadline_at,
        )
        return progress(self.status, paced_job, self._model() if self.status == "pending" else NOTHING_KNOWN)

    def _model(self) -> PaceModel:
        settings = _settings()
        model = _cached_model(settings.database, self.account, self.kind)
        if model is not None:
            return model
        with _transaction(settings) as connection:
            return _model(connection, self.account, self.kind)


def track(remote: object, *, session: TrackingSession | None = None, **options: Any) -> int:
    """Track one job and return its id. Tracking the same job again returns the same id and changes nothing.

    `remote` is the response of the submit call (requests or httpx), the whole submit answer (mapping or JSON text), or
    the remote id (text or number).

    Options: `account`; `kind`; `endpoint`, the URL or path that the order was posted to (needed if neither the answer
    nor the response shows the API family); `fetch_url`; `eta` in seconds; `submitted_at`, an aware datetime; `priority`
    (jobs with a higher priority are polled first); `reference`, your own name for the job; `on_done`, as `task` or
    `queue/task`; `webhook_url`, which receives every final state, signed with WEBHOOK_SECRET; `deadline`, in seconds
    from submission. With `session` the row is committed or rolled back with the caller's transaction.

    Raises ApiRefused if the API refused the order, and NotTrackable for anything else that can't become a job; nothing
    is written in both cases. Raises SchemaOutdated and Unavailable.
    """
    return track_many([remote], session=session, **options)[0]


def track_many(remotes: Sequence[object], *, session: TrackingSession | None = None, **options: Any) -> list[int]:
    """Track jobs in one transaction. Return their ids in order. If one job can't be tracked, none is."""
    return [job_id for job_id, _ in track_with_created(remotes, session=session, **options)]


def track_with_created(
    remotes: Sequence[object], *, session: TrackingSession | None = None, **options: Any
) -> list[tuple[int, bool]]:
    """Track jobs like `track_many`. Return for each its id and whether it is new."""
    settings = _settings()
    scrubber = shared_scrubber(settings.secret_texts)
    options = {name: scrubber.links(value) if isinstance(value, str) else value for name, value in options.items()}
    try:
        checked_options = _options(settings, scrubber, **options)
        plans = [_plan(settings, scrubber, checked_options, _scrubbed(scrubber, remote)) for remote in remotes]
    except ApiRefused as refused:
        # the messages quote the arguments, and callers log the errors they catch
        raise ApiRefused(
            scrubber.text(str(refused)), message=scrubber.text(refused.message), answer=refused.answer
        ) from None
    except NotTrackable as refused:
        raise type(refused)(scrubber.text(str(refused))) from None
    if session is not None:
        if hasattr(session, "sync_session"):  # an AsyncSession
            raise NotTrackable(
                "session is an AsyncSession: use `await session.run_sync(lambda sync: track(…, session=sync))`"
            )
        connection = session.connection()
        with translate_errors(connection.engine.url):
            tracked_jobs, due_soon = _insert(connection, settings, checked_options, plans)
        if due_soon:
            _wake_after_commit(session)
        return tracked_jobs
    with _transaction(settings) as connection:
        tracked_jobs, due_soon = _insert(connection, settings, checked_options, plans)
    if due_soon:
        wake(settings)  # after the commit: the rows must be there
    return tracked_jobs


def get(job_id: int | None = None, *, remote_id: str | int | None = None, account: str | None = None) -> Job | None:
    """Return a job with its outputs, by id or by remote id (the newest such job), or `None`."""
    with _transaction(_settings()) as connection:
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
    return storage_of(location, _settings()).open(location)


def output_url(output_id: int, seconds: float = 3_600) -> str:
    """Return a URL of a stored output that is valid for at least `seconds`.

    On S3 the URL is signed. For files it is below STORAGE_ADDRESS, the base URL of your web server for them. Without
    STORAGE_ADDRESS it is a `file:` URL for programs on this host; send other clients the bytes of `open_output`. Raises
    OutputMissing and StorageTrouble.
    """
    location = _location(output_id)
    return storage_of(location, _settings()).url(location, seconds)


def _location(output_id: int) -> str:
    if isinstance(output_id, bool) or not isinstance(output_id, int):
        raise OutputMissing(f"{output_id!r} is not an output id: get(job_id).outputs lists the outputs of a job")
    with _transaction(_settings()) as connection:
        row = output_row(connection, output_id)
    if row is None:
        raise OutputMissing(f"there is no output {output_id}: get(job_id).outputs lists the outputs of a job")
    if row.location is None:
        advice = (
            "wait for its job" if row.status == "pending" else "see its error_code, and call retry(job_id) to try again"
        )
        raise OutputMissing(f"output {output_id} is not stored, it is {row.status}: {advice}")
    return str(row.location)


def cancel(job_id: int) -> bool:
    """Cancel a job; stored files stay. Return False if the job was already final. Raises JobNotFound."""
    with _transaction(_settings()) as connection:
        _existing(connection, job_id)
        tally = Tally()
        cancelled = store.cancel(connection, job_id, tally, now=database_now(connection))
        tally.write(connection)
        return cancelled


def retry(job_id: int) -> bool:
    """Retry a failed or expired job at once. Return False if it is in another state. Raises JobNotFound."""
    settings = _settings()
    with _transaction(settings) as connection:
        _existing(connection, job_id)
        create_events(
            connection, now=database_now(connection), of=[job_id]
        )  # the event of the final state, before leaving it
        changed = store.retry(connection, job_id, now=database_now(connection))
    if changed:
        wake(settings)
    return changed


def nudge(remote_id: str | int, account: str | None = None) -> int:
    """Poll the jobs with this remote id earlier, because they may be ready. Return how many; 0 for an unknown id."""
    settings = _settings()
    with _transaction(settings) as connection:
        interval = timedelta(seconds=settings.poll_min)
        count = store.nudge(connection, lookup_id(remote_id), account, now=database_now(connection), poll_min=interval)
    if count:
        wake(settings)
    return count


def nudge_reference(reference: str) -> int:
    """Poll the jobs with this reference earlier, because they may be ready. Return how many."""
    settings = _settings()
    with _transaction(settings) as connection:
        interval = timedelta(seconds=settings.poll_min)
        count = store.nudge_reference(connection, reference, now=database_now(connection), poll_min=interval)
    if count:
        wake(settings)
    return count


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
    _settings.cache_clear()
    _models.clear()


# ── planning ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Options:
    """The validated options of a call, for all its jobs."""

    account: str
    kind: str | None
    endpoint: str | None
    fetch_url: str | None
    eta: float | None
    submitted_at: datetime | None
    priority: int
    reference: str | None
    on_done: str | None
    webhook_url: str | None
    deadline: float | None


@dataclass(frozen=True, slots=True)
class _Plan:
    job: PlannedJob
    kind: str
    eta: float | None
    deadline: float


def _options(
    settings: Settings,
    scrubber: Scrubber,
    *,
    account: str = "default",
    kind: str | None = None,
    endpoint: str | None = None,
    fetch_url: str | None = None,
    eta: float | None = None,
    submitted_at: datetime | str | None = None,
    priority: int = 0,
    reference: str | None = None,
    on_done: str | None = None,
    webhook_url: str | None = None,
    deadline: float | None = None,
) -> _Options:
    if not isinstance(account, str) or not ACCOUNT.fullmatch(account):
        raise NotTrackable(f"{account!r} is not a valid account name: use at most 64 letters, digits, '.', '_' and '-'")
    if fetch_url is not None and not isinstance(fetch_url, str):
        raise NotTrackable(f"fetch_url must be text, not {type(fetch_url).__name__}")
    return _Options(
        account=account,
        kind=kind or None,
        endpoint=endpoint or None,
        fetch_url=fetch_url,
        eta=None if eta in (None, 0, "") else _checked_seconds(eta, "eta"),
        submitted_at=_moment(submitted_at),
        priority=_priority(priority),
        reference=None if reference is None else scrubber.text(checked_reference(reference)),
        on_done=None if on_done is None else scrubber.text(_on_done(on_done, settings)),
        webhook_url=None if not webhook_url else scrubber.link(_webhook(webhook_url, settings)),
        deadline=None if deadline is None else _checked_seconds(deadline, "deadline"),
    )


def _plan(settings: Settings, scrubber: Scrubber, options: _Options, remote: object) -> _Plan:
    job = planned_job(
        remote,
        settings.api,
        fetch_url=options.fetch_url,
        endpoint=options.endpoint,
        status_words=settings.status_words,
    )
    if job.warning is not None:
        log.warning("%s", scrubber.text(job.warning))
    kind = options.kind or job.kind
    if not isinstance(kind, str) or len(kind) > MAX_KIND:
        raise NotTrackable(f"kind must be text of at most {MAX_KIND} characters")
    deadline = settings.deadline_for(kind) if options.deadline is None else options.deadline
    eta = job.submission.eta if options.eta is None else options.eta
    return _Plan(
        job=job,
        kind=scrubber.text(_plain(kind, "kind")),
        eta=None if eta is None or eta > deadline else eta,  # an eta beyond the deadline is ignored
        deadline=deadline,
    )


def _scrubbed(scrubber: Scrubber, remote: object) -> object:
    """Return the argument of `track` with all API keys removed."""
    answer = submit_answer(remote)
    if answer is None:
        return scrubber.links(remote)
    fields: Any = scrubber.links(dict(answer.fields))
    return answer._replace(fields=fields, url=None if answer.url is None else scrubber.link(answer.url))


def _insert(
    connection: Connection, settings: Settings, options: _Options, plans: Sequence[_Plan]
) -> tuple[list[tuple[int, bool]], bool]:
    """Insert the jobs. Return for each its id and whether it is new, and whether any is due within SOON_SECONDS."""
    now = database_now(connection)
    paced = _Paced(connection, settings.pace, options)
    new = [_new_job(plan, options, paced, now) for plan in plans]
    due_soon_at = now + timedelta(seconds=SOON_SECONDS)
    return store.insert_jobs(connection, new, now=now), any(job.due_at < due_soon_at and not job.outputs for job in new)


def _new_job(plan: _Plan, options: _Options, paced: "_Paced", now: datetime) -> store.NewJob:
    submission = plan.job.submission
    submitted_at = min(options.submitted_at or now, now)
    first = paced.first(plan, (now - submitted_at).total_seconds())
    spread = crc32(submission.remote_id.encode()) % 1_000  # jobs tracked together are not polled at the same moment
    wait = first.wait * (1 + SPREAD * spread / 1_000)
    return store.NewJob(
        account=options.account,
        remote_id=submission.remote_id,
        address=plan.job.address,
        kind=plan.kind,
        priority=options.priority,
        reference=options.reference,
        on_done=options.on_done,
        webhook_url=options.webhook_url,
        eta=plan.eta,
        submitted_at=submitted_at,
        deadline_at=submitted_at + timedelta(seconds=plan.deadline),
        due_at=now + timedelta(seconds=wait),
        outputs=submission.outputs,
        left_out=submission.left_out,
        promised=submission.promised,
        plan=first,
        default_address=plan.job.by_default,
    )


class _Paced:
    """Plans the first polls of the jobs of a call, once for all jobs with equal kind, eta and deadline."""

    def __init__(self, connection: Connection, pace: Pace, options: _Options) -> None:
        self._connection, self._pace, self._account = connection, pace, options.account
        self._firsts: dict[tuple[str, float | None, float], PollPlan] = {}

    def first(self, plan: _Plan, age: float) -> PollPlan:
        """Return the plan of the first poll of a job of this age in seconds, in the middle of its spread."""
        key = (plan.kind, plan.eta, plan.deadline)
        poll = self._firsts.get(key)
        if poll is None:
            model = _model(self._connection, self._account, plan.kind)
            job = PacedJob(age, eta=plan.eta, seconds_left=plan.deadline - age)
            poll = self._firsts[key] = self._pace.first(job, model, spread=0.0)
        return poll


_models: dict[tuple[str, str, str], tuple[PaceModel, float]] = {}


def _cached_model(url: URL, account: str, kind: str) -> PaceModel | None:
    """Return the cached pace model of a class of jobs, or `None` if it is not cached or too old."""
    model, until = _models.get((str(url), account, kind), (None, 0.0))
    return model if time.monotonic() < until else None


def _model(connection: Connection, account: str, kind: str) -> PaceModel:
    """Return the pace model of a class of jobs, read from the database at most every FRESH_SECONDS."""
    url = connection.engine.url
    model = _cached_model(url, account, kind)
    if model is None:
        if len(_models) >= MAX_CACHED_MODELS:
            _models.clear()
        model, _ = read_models(connection, [(account, kind)])[account, kind]
        _models[str(url), account, kind] = (model, time.monotonic() + FRESH_SECONDS)
    return model


def _moment(value: datetime | str | None) -> datetime | None:
    if isinstance(value, str):
        try:
            parsed: object = datetime.fromisoformat(value)
        except ValueError:
            raise NotTrackable(
                f"submitted_at {value[:60]!r} is not an ISO 8601 time such as 2026-03-01T12:00:00Z"
            ) from None
    else:
        parsed = value
    if parsed is None:
        return None
    if not isinstance(parsed, datetime) or parsed.tzinfo is None:
        raise NotTrackable("submitted_at needs a time zone, for example datetime.now(UTC)")
    try:
        return parsed.astimezone(UTC)
    except OverflowError:
        raise NotTrackable(
            f"submitted_at {value!s} is out of range: omit it for a job that was submitted just now"
        ) from None


def _checked_seconds(value: object, name: str) -> float:
    number = positive_number(value)
    if number is None or number > 10 * 365 * 86_400:
        raise NotTrackable(f"{name} must be a positive number of seconds, not {value!r}")
    return number


def _priority(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > PRIORITY_LIMIT:
        raise NotTrackable(f"priority must be a whole number from -{PRIORITY_LIMIT} to {PRIORITY_LIMIT}, not {value!r}")
    return value


def checked_reference(value: object) -> str:
    """Return a valid reference as text. Raises NotTrackable."""
    return _short(value, "reference")


def _short(value: object, name: str) -> str:
    text = str(value) if isinstance(value, int) else value
    if not isinstance(text, str) or len(text) > MAX_REFERENCE:
        raise NotTrackable(f"{name} must be text of at most {MAX_REFERENCE} characters")
    return _plain(text, name)


def _plain(text: str, name: str) -> str:
    if "\x00" in text or not text.isprintable():
        raise NotTrackable(f"{name} contains unprintable characters: remove them")
    return text


def _webhook(url: object, settings: Settings) -> str:
    from worker.net.address_guard import (  # imported here: most apps use no webhooks and need no HTTP library
        Guard,
        RefusedTarget,
    )

    webhook_url = checked_url(url)
    if not settings.webhook_secrets:
        raise NotTrackable(
            "webhook_url is refused because there is no secret to sign webhooks with: set WEBHOOK_SECRET to whsec_ and"
            " the base64 of 24 to 64 random bytes, in the app and in the worker"
        )
    try:
        Guard(settings.webhook_networks).check_url(webhook_url)
    except RefusedTarget as refused:
        raise NotTrackable(f"webhook_url is refused: {refused} (see WEBHOOK_ALLOWED_NETWORKS)") from None
    return webhook_url


def _on_done(value: str, settings: Settings) -> str:
    checked = _short(value, "on_done")
    task, _ = task_and_queue(checked)
    problem = on_done_problem(checked)
    if problem is not None:
        raise NotTrackable(f"on_done is refused: {problem}")
    if settings.allowed_tasks is not None and task not in settings.allowed_tasks:
        raise NotTrackable(
            f"on_done must not name {task!r}: ON_DONE_TASKS allows only {', '.join(sorted(settings.allowed_tasks))}"
        )
    return checked


# ── helpers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@locked_cache
def _settings() -> Settings:
    return load()


@locked_cache
def _wake_ups(redis_url: str) -> WakeUps:
    return WakeUps(redis_url)


def _wake_after_commit(session: TrackingSession) -> None:
    """Wake the workers after the commit of a session. For other session types the next poll run finds the jobs."""
    real_session = session() if isinstance(session, scoped_session) else session
    if isinstance(real_session, Session):
        if _WAKES not in real_session.info:
            event.listen(real_session, "after_commit", _committed)
            event.listen(real_session, "after_rollback", _rolled_back)
        real_session.info[_WAKES] = True


def _committed(session: Session) -> None:
    if session.info[_WAKES] and not session.in_nested_transaction():
        session.info[_WAKES] = False
        wake(_settings())


def _rolled_back(session: Session) -> None:
    if not session.in_nested_transaction():
        session.info[_WAKES] = False


@contextmanager
def _transaction(settings: Settings) -> Iterator[Connection]:
    engine = engine_for(settings.database)
    with translate_errors(settings.database), engine.begin() as connection:
        yield connection


def _existing(connection: Connection, job_id: int) -> Row[Any]:
    row = store.job_row(connection, job_id)
    if row is None:
        raise JobNotFound(f"there is no job {job_id}: `fetch-worker list` shows the jobs")
    return row


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
