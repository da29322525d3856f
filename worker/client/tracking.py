"""The Python front door for web apps: hand a submit answer over, look a job up, act on it, wait for it."""

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
from worker.core.on_done import on_done_problem, task_and_queue
from worker.core.pacing.estimate import Progress, progress
from worker.core.pacing.policy import NOTHING_KNOWN, SPREAD, Pace, PacedJob, PaceModel, PollPlan
from worker.core.webhook import checked_url
from worker.errors import ApiRefused, JobNotFound, NotTrackable, OutputMissing, WaitTimeout
from worker.polling.pace_learner import FRESH_SECONDS, read_models
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

WAIT_LOOK_SECONDS = 0.5
SOON_SECONDS = 1.0  # a waiting poll run looks at least this often by itself
MAX_REFERENCE = 255
PRIORITY_LIMIT = 1_000
MODELS_MOST = 2_000
_WAKES = "fetch-worker: something is due soon that this session tracked"


class TrackingSession(Protocol):
    """What `track(session=…)` needs of a session: SQLAlchemy's Session, scoped or not, has it."""

    def connection(self) -> Connection:
        """The connection of the session's transaction."""
        ...


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a job. `location` is set once it is stored."""

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
    """One job as it stood at `read_at`, by the database's clock. Times are aware, in UTC; `eta` is in seconds.

    `not_ready_at`: when the API last said that it is not ready; `eta_at`: when its eta came, if not at submission;
    `held_at`: since when an operator holds it.
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
        """Whether the job will not change any more by itself."""
        return self.status in FINAL_STATES

    def progress(self) -> Progress:
        """How far it was as it was read: the chance that it is ready, how long it may still take, and for a bar.

        From how long its kind took before, which is looked up twice a minute at most. Raises Unavailable.
        """
        waiting = PacedJob.at(
            self.read_at,
            submitted_at=self.submitted_at,
            not_ready_at=self.not_ready_at,
            eta=self.eta,
            eta_at=self.eta_at,
            deadline_at=self.deadline_at,
        )
        return progress(self.status, waiting, self._model() if self.status == "pending" else NOTHING_KNOWN)

    def _model(self) -> PaceModel:
        settings = _settings()
        known = _known_model(settings.database, self.account, self.kind)
        if known is not None:
            return known
        with _transaction(settings) as connection:
            return _model(connection, self.account, self.kind)


def track(remote: object, *, session: TrackingSession | None = None, **options: Any) -> int:
    """Hands one job over; its id. The same job handed over again answers the same id and changes nothing.

    `remote` is the response of the submit call (of requests or httpx), the whole submit answer (mapping, or its JSON
    text), or the remote id (text or number). Options: `account`, `kind`, `endpoint` (the URL or path that the order was
    posted to: it says the family, where neither the answer nor the response does), `fetch_url`, `eta` (seconds),
    `submitted_at` (aware), `priority` (higher is asked first), `reference` (yours, for finding it again), `on_done`
    (`task` or `queue/task`), `webhook_url` (told of every final state, signed with WEBHOOK_SECRET), `deadline` (seconds
    from submission). With `session` the row commits or rolls back with the caller's transaction.

    Raises ApiRefused where the API did not take the order, NotTrackable for anything else that can't become a job
    (nothing is written either way), SchemaOutdated, Unavailable.
    """
    return track_many([remote], session=session, **options)[0]


def track_many(remotes: Sequence[object], *, session: TrackingSession | None = None, **options: Any) -> list[int]:
    """Hands many jobs over in one transaction; their ids in order. If one can't be tracked, none is."""
    return [job_id for job_id, _ in tracked(remotes, session=session, **options)]


def tracked(
    remotes: Sequence[object], *, session: TrackingSession | None = None, **options: Any
) -> list[tuple[int, bool]]:
    """As `track_many`, and for each whether it is new."""
    settings = _settings()
    scrubber = shared_scrubber(settings.secret_texts)
    options = {name: scrubber.links(value) if isinstance(value, str) else value for name, value in options.items()}
    try:
        wanted = _options(settings, scrubber, **options)
        plans = [_plan(settings, scrubber, wanted, _scrubbed(scrubber, remote)) for remote in remotes]
    except ApiRefused as refused:
        # their messages quote what was handed over, and callers log what they catch
        raise ApiRefused(
            scrubber.text(str(refused)), message=scrubber.text(refused.message), answer=refused.answer
        ) from None
    except NotTrackable as refused:
        raise type(refused)(scrubber.text(str(refused))) from None
    if session is not None:
        if hasattr(session, "sync_session"):  # an AsyncSession
            raise NotTrackable(
                "session is an AsyncSession: write `await session.run_sync(lambda plain: track(…, session=plain))`"
            )
        connection = session.connection()
        with translate_errors(connection.engine.url):
            answer, soon = _insert(connection, settings, wanted, plans)
        if soon:
            _wake_after_commit(session)
        return answer
    with _transaction(settings) as connection:
        answer, soon = _insert(connection, settings, wanted, plans)
    if soon:
        wake(settings)  # after the commit: the rows must be there
    return answer


def get(job_id: int | None = None, *, remote_id: str | int | None = None, account: str | None = None) -> Job | None:
    """A job with its outputs, by id or by remote id (the newest with it), or None."""
    with _transaction(_settings()) as connection:
        if job_id is not None:
            row = store.job_row(connection, job_id)
        else:
            found = store.jobs_by_remote(connection, lookup_id(remote_id), account)
            row = found[0] if found else None
        if row is None:
            return None
        return _job(row, store.outputs_of(connection, [row.id]), database_now(connection))


def open_output(output_id: int) -> BinaryIO:
    """The bytes of a stored output, as a file to read from; close it. Raises OutputMissing, StorageTrouble."""
    location = _location(output_id)
    return storage_of(location, _settings()).open(location)


def output_url(output_id: int, seconds: float = 3_600) -> str:
    """An address of a stored output that a page can show for so many seconds.

    Signed, on S3. For files it is below STORAGE_ADDRESS, where a web server shows them; without one it is their
    `file:` URL, for programs on this host: serve `open_output` to everybody else. Raises OutputMissing, StorageTrouble.
    """
    location = _location(output_id)
    return storage_of(location, _settings()).url(location, seconds)


def _location(output_id: int) -> str:
    if isinstance(output_id, bool) or not isinstance(output_id, int):
        raise OutputMissing(f"{output_id!r} is no id of an output: those of a job are in get(job_id).outputs")
    with _transaction(_settings()) as connection:
        row = output_row(connection, output_id)
    if row is None:
        raise OutputMissing(f"there is no output {output_id}: those of a job are in get(job_id).outputs")
    if row.location is None:
        advice = "wait for its job" if row.status == "pending" else "its error_code says why, retry(job_id) tries again"
        raise OutputMissing(f"output {output_id} is not stored: it is {row.status}; {advice}")
    return str(row.location)


def cancel(job_id: int) -> bool:
    """Cancels a job that is not final; stored files stay. False where it was final. Raises JobNotFound."""
    with _transaction(_settings()) as connection:
        _existing(connection, job_id)
        tally = Tally()
        cancelled = store.cancel(connection, job_id, tally, now=database_now(connection))
        tally.write(connection)
        return cancelled


def retry(job_id: int) -> bool:
    """Takes a failed or expired job up again at once. False where it is in another state. Raises JobNotFound."""
    settings = _settings()
    with _transaction(settings) as connection:
        _existing(connection, job_id)
        create_events(connection, now=database_now(connection), of=[job_id])  # of the end that is taken back
        changed = store.retry(connection, job_id, now=database_now(connection))
    if changed:
        wake(settings)
    return changed


def nudge(remote_id: str | int, account: str | None = None) -> int:
    """A hint that jobs with this remote id may be ready; how many were brought forward. Unknown ids do nothing."""
    settings = _settings()
    with _transaction(settings) as connection:
        least = timedelta(seconds=settings.poll_min)
        moved = store.nudge(connection, lookup_id(remote_id), account, now=database_now(connection), least=least)
    if moved:
        wake(settings)
    return moved


def nudge_reference(reference: str) -> int:
    """The same hint about the jobs with this `reference`; how many were brought forward."""
    settings = _settings()
    with _transaction(settings) as connection:
        least = timedelta(seconds=settings.poll_min)
        moved = store.nudge_reference(connection, reference, now=database_now(connection), least=least)
    if moved:
        wake(settings)
    return moved


def wait(job_id: int, timeout: float | None = None) -> Job:
    """Waits until a job is final and returns it. `timeout` in seconds; raises WaitTimeout, JobNotFound."""
    until = None if timeout is None else _workers.clock() + timeout
    while True:
        job = get(job_id)
        if job is None:
            raise JobNotFound(f"there is no job {job_id}: `fetch-worker list` shows those that there are")
        if job.final:
            return job
        left = None if until is None else until - _workers.clock()
        if left is not None and left <= 0:
            raise WaitTimeout(f"job {job_id} is still {job.status} after {timeout} s; it goes on, wait again")
        _workers.pause(job, left)


class Workers:
    """The worker processes as a web app knows them: elsewhere, woken by a word over Redis, waited for by looking."""

    def wake(self, settings: Settings) -> None:
        """Something is due that they don't know of. After the commit."""
        _wake_ups(settings.redis).send()

    def clock(self) -> float:
        """Seconds, to measure a time-out by."""
        return time.monotonic()

    def pause(self, job: Job, most: float | None) -> None:
        """Leaves them some time for a job, but not more than `most` seconds."""
        time.sleep(WAIT_LOOK_SECONDS if most is None else min(WAIT_LOOK_SECONDS, most))


_workers = Workers()


def wake(settings: Settings) -> None:
    """Tells the worker processes that something is due that they don't know of. After the commit."""
    _workers.wake(settings)


@contextmanager
def workers_in_place(workers: Workers) -> Iterator[None]:
    """Has this process work with other workers, in a world of their own: nothing read or learned before is kept."""
    global _workers
    before, _workers = _workers, workers
    _forget()
    try:
        yield
    finally:
        _workers = before
        _forget()


def _forget() -> None:
    _settings.cache_clear()
    _models.clear()


# ── planning ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Options:
    """What was asked for, checked once for all jobs of a call."""

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
        raise NotTrackable(f"{account!r} can't be an account: letters, digits, '.', '_' and '-', at most 64")
    if fetch_url is not None and not isinstance(fetch_url, str):
        raise NotTrackable(f"fetch_url is text, not {type(fetch_url).__name__}")
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
    chosen = options.kind or job.kind
    if not isinstance(chosen, str) or len(chosen) > MAX_KIND:
        raise NotTrackable(f"kind is text of at most {MAX_KIND} characters")
    deadline = settings.deadline_for(chosen) if options.deadline is None else options.deadline
    eta = job.submission.eta if options.eta is None else options.eta
    return _Plan(
        job=job,
        kind=scrubber.text(_plain(chosen, "kind")),
        eta=None if eta is None or eta > deadline else eta,  # beyond the deadline it says nothing
        deadline=deadline,
    )


def _scrubbed(scrubber: Scrubber, remote: object) -> object:
    """Return what was handed over without any key in it."""
    answer = submit_answer(remote)
    if answer is None:
        return scrubber.links(remote)
    fields: Any = scrubber.links(dict(answer.fields))
    return answer._replace(fields=fields, url=None if answer.url is None else scrubber.link(answer.url))


def _insert(
    connection: Connection, settings: Settings, options: _Options, plans: Sequence[_Plan]
) -> tuple[list[tuple[int, bool]], bool]:
    """Puts the jobs in: (id and whether it is new, for each; whether any is due before a poll run would look)."""
    now = database_now(connection)
    paced = _Paced(connection, settings.pace, options)
    new = [_new_job(plan, options, paced, now) for plan in plans]
    soon = now + timedelta(seconds=SOON_SECONDS)
    return store.insert_jobs(connection, new, now=now), any(job.due_at < soon and not job.outputs for job in new)


def _new_job(plan: _Plan, options: _Options, paced: "_Paced", now: datetime) -> store.NewJob:
    submission = plan.job.submission
    submitted_at = min(options.submitted_at or now, now)
    first = paced.first(plan, (now - submitted_at).total_seconds())
    spread = crc32(submission.remote_id.encode()) % 1_000  # handed over together is not asked together
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
    """When jobs of one call are asked about first: worked out once for those that are alike."""

    def __init__(self, connection: Connection, pace: Pace, options: _Options) -> None:
        self._connection, self._pace, self._account = connection, pace, options.account
        self._firsts: dict[tuple[str, float | None, float], PollPlan] = {}

    def first(self, plan: _Plan, age: float) -> PollPlan:
        """The plan of a job of this age in seconds, in the middle of its spread."""
        alike = (plan.kind, plan.eta, plan.deadline)
        found = self._firsts.get(alike)
        if found is None:
            model = _model(self._connection, self._account, plan.kind)
            job = PacedJob(age, eta=plan.eta, seconds_left=plan.deadline - age)
            found = self._firsts[alike] = self._pace.first(job, model, spread=0.0)
        return found


_models: dict[tuple[str, str, str], tuple[PaceModel, float]] = {}


def _known_model(url: URL, account: str, kind: str) -> PaceModel | None:
    """What was looked up a short while ago of a class of jobs."""
    model, until = _models.get((str(url), account, kind), (None, 0.0))
    return model if time.monotonic() < until else None


def _model(connection: Connection, account: str, kind: str) -> PaceModel:
    """What is known of a class of jobs, looked up now and then."""
    url = connection.engine.url
    model = _known_model(url, account, kind)
    if model is None:
        if len(_models) >= MODELS_MOST:
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
                f"submitted_at {value[:60]!r} is no ISO 8601 time, such as 2026-03-01T12:00:00Z"
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
            f"submitted_at {value!s} is out of range: leave it out for a job that was submitted just now"
        ) from None


def _checked_seconds(value: object, name: str) -> float:
    number = positive_number(value)
    if number is None or number > 10 * 365 * 86_400:
        raise NotTrackable(f"{name} is a positive number of seconds, not {value!r}")
    return number


def _priority(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > PRIORITY_LIMIT:
        raise NotTrackable(f"priority is a whole number from -{PRIORITY_LIMIT} to {PRIORITY_LIMIT}, not {value!r}")
    return value


def checked_reference(value: object) -> str:
    """A reference as `track` takes it. Raises NotTrackable."""
    return _short(value, "reference")


def _short(value: object, name: str) -> str:
    text = str(value) if isinstance(value, int) else value
    if not isinstance(text, str) or len(text) > MAX_REFERENCE:
        raise NotTrackable(f"{name} is text of at most {MAX_REFERENCE} characters")
    return _plain(text, name)


def _plain(text: str, name: str) -> str:
    if "\x00" in text or not text.isprintable():
        raise NotTrackable(f"{name} has characters that can't be printed: take them out")
    return text


def _webhook(url: object, settings: Settings) -> str:
    from worker.net.address_guard import Guard, RefusedTarget  # most apps have no webhooks, and need no HTTP library

    checked = checked_url(url)
    if not settings.webhook_secrets:
        raise NotTrackable(
            "webhook_url is refused: there is no secret to sign webhooks with; set WEBHOOK_SECRET to whsec_ and the"
            " base64 of 24 to 64 random bytes, here and where the worker runs"
        )
    try:
        Guard(settings.webhook_networks).check_url(checked)
    except RefusedTarget as refused:
        raise NotTrackable(f"webhook_url is refused: {refused} (see WEBHOOK_ALLOWED_NETWORKS)") from None
    return checked


def _on_done(value: str, settings: Settings) -> str:
    text = _short(value, "on_done")
    task, _ = task_and_queue(text)
    problem = on_done_problem(text)
    if problem is not None:
        raise NotTrackable(f"on_done is refused: {problem}")
    if settings.allowed_tasks is not None and task not in settings.allowed_tasks:
        raise NotTrackable(
            f"on_done may not name {task!r}: ON_DONE_TASKS lists {', '.join(sorted(settings.allowed_tasks))}"
        )
    return text


# ── helpers of the door itself ────────────────────────────────────────────────────────────────────────────────────────


@locked_cache
def _settings() -> Settings:
    return load()


@locked_cache
def _wake_ups(redis_url: str) -> WakeUps:
    return WakeUps(redis_url)


def _wake_after_commit(session: TrackingSession) -> None:
    """Wakes once the rows are there for everybody. Other sessions than SQLAlchemy's wait for the next look."""
    own = session() if isinstance(session, scoped_session) else session
    if isinstance(own, Session):
        if _WAKES not in own.info:
            event.listen(own, "after_commit", _committed)
            event.listen(own, "after_rollback", _rolled_back)
        own.info[_WAKES] = True


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
        raise JobNotFound(f"there is no job {job_id}: `fetch-worker list` shows those that there are")
    return row


def lookup_id(remote_id: object) -> str:
    """A remote id to look jobs up by, made up by us or not. Raises NotTrackable for what can't be one."""
    made_up = isinstance(remote_id, str) and SYNTHETIC_ID.fullmatch(remote_id)
    return str(remote_id) if made_up else checked_remote_id(remote_id)


def _job(row: Row[Any], outputs: Sequence[Row[Any]], now: datetime) -> Job:
    values = row._mapping
    own = {name: values[name] for name in Job.__dataclass_fields__ if name not in ("outputs", "read_at")}
    return Job(**own, read_at=now, outputs=tuple(_output(output) for output in outputs))


def _output(row: Row[Any]) -> Output:
    values = row._mapping
    return Output(**{name: values[name] for name in Output.__dataclass_fields__})
