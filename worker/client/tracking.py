"""Track jobs: `track` and `track_many`."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID
from zlib import crc32

from sqlalchemy import Connection

from worker.client.connection import cached_settings, transaction
from worker.client.job_options import CeleryTask, JobOptions, TrackOptions, checked_kind, checked_options
from worker.client.pace_models import pace_model
from worker.client.sessions import TrackingSession, session_connection, wake_after_commit
from worker.client.workers import current_workers, wake
from worker.configuration.server_urls import same_database
from worker.core.pacing.policy import SPREAD, Pace, PacedJob, PollPlan
from worker.errors import ApiRefused, NotTrackable, SchemaOutdated
from worker.settings import Settings
from worker.store import jobs as store
from worker.store.engine import database_now, shown_url, translate_errors
from worker.system.redaction import Scrubber, shared_scrubber
from worker.vendor.submissions import PlannedJob, planned_job, submit_answer

log = logging.getLogger(__name__)

T = TypeVar("T")

SOON_SECONDS = 1.0  # a poll run that waits checks for due jobs at least this often


class TrackedJob(int):
    """The id of a tracked job. `created` is False if the job was tracked before, and this call changed nothing."""

    __slots__ = ()  # without attributes of its own, it costs hardly more than an int: a call can return ten thousand
    created = False


class CreatedJob(TrackedJob):
    """The id of a job that this call created."""

    __slots__ = ()
    created = True


def track(
    remote: object,
    *,
    session: TrackingSession | Connection | None = None,
    account: str = "default",
    kind: str | None = None,
    endpoint: str | None = None,
    fetch_url: str | None = None,
    eta: float | timedelta | None = None,
    submitted_at: datetime | str | None = None,
    priority: int = 0,
    reference: str | int | UUID | None = None,
    on_done: str | CeleryTask | None = None,
    webhook_url: str | None = None,
    deadline: float | timedelta | None = None,
) -> TrackedJob:
    """Track one job: from now on the workers ask the API about it and store its outputs.

    Return the id of the job, a `TrackedJob`: an int whose `created` says whether the job is new. Tracking the same job
    again returns the same id and changes nothing, so a call can always be repeated.

        job_id = track(response)                          # what the submit call returned
        job_id = track(answer, endpoint="v6/video/text2video")
        job_id = track(response, session=session)         # committed or rolled back with your transaction

    Arguments:

    remote
        The response of the submit call (requests or httpx), its whole answer (a mapping or JSON text), or the remote id
        alone (text or a number).
    session
        A SQLAlchemy Session, scoped_session or Connection. The job is written in its transaction. Without it, the job
        is committed at once. For an AsyncSession use `worker.aio.track`.
    account
        The account whose API key is used.
    kind
        A name for jobs that take about equally long. Default: from the fetch address and the model.
    endpoint
        The URL or path that the order was posted to, such as "v6/video/text2video". Needed if neither the answer nor
        the response shows the API family.
    fetch_url
        The `fetch_result` of the submit answer, for a bare remote id.
    eta
        The expected duration: seconds or a timedelta. Default: the `eta` of the submit answer.
    submitted_at
        When the order was submitted: an aware datetime, or ISO 8601 with a time zone. Default: now.
    priority
        From -1000 to 1000. Jobs with a higher priority are polled first.
    reference
        Your own name for the job, to find it by: text, a number or a UUID.
    on_done
        The Celery task to call with the job's id for every final state: the task itself, "task.name", or
        "queue/task.name".
    webhook_url
        The URL that receives every final state, signed with WEBHOOK_SECRET.
    deadline
        The time from submission after which the job may expire: seconds or a timedelta. Default: by kind.

    Raises ApiRefused if the API refused the order, NotTrackable for anything else that can't become a job, and
    SchemaOutdated and Unavailable. Nothing is written then.
    """
    (tracked,) = track_many(
        [remote],
        session=session,
        account=account,
        kind=kind,
        endpoint=endpoint,
        fetch_url=fetch_url,
        eta=eta,
        submitted_at=submitted_at,
        priority=priority,
        reference=reference,
        on_done=on_done,
        webhook_url=webhook_url,
        deadline=deadline,
    )
    return tracked


def track_many(
    remotes: Iterable[object],
    *,
    session: TrackingSession | Connection | None = None,
    account: str = "default",
    kind: str | None = None,
    endpoint: str | None = None,
    fetch_url: str | None = None,
    eta: float | timedelta | None = None,
    submitted_at: datetime | str | None = None,
    priority: int = 0,
    reference: str | int | UUID | None = None,
    on_done: str | CeleryTask | None = None,
    webhook_url: str | None = None,
    deadline: float | timedelta | None = None,
) -> list[TrackedJob]:
    """Track jobs in one transaction and return their ids in order. If one of them can't be tracked, none is.

    `remotes` is a list, or any other iterable, of what `track` takes. The keywords, which hold for all of the jobs, and
    the errors are those of `track`.
    """
    options: TrackOptions = {
        "account": account,
        "kind": kind,
        "endpoint": endpoint,
        "fetch_url": fetch_url,
        "eta": eta,
        "submitted_at": submitted_at,
        "priority": priority,
        "reference": reference,
        "on_done": on_done,
        "webhook_url": webhook_url,
        "deadline": deadline,
    }
    settings = cached_settings()
    planned = plan_jobs(settings, remotes, options)
    return commit_planned(settings, planned) if session is None else insert_planned(session, settings, planned)


# ── planning ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Plan:
    job: PlannedJob
    kind: str
    eta: float | None
    deadline: float


@dataclass(frozen=True, slots=True)
class PlannedJobs:
    """Checked jobs that are not written yet."""

    options: JobOptions
    plans: Sequence[_Plan]

    @property
    def in_lock_order(self) -> list[int]:
        """The positions of the jobs in the order in which every transaction inserts jobs, so that none can deadlock."""
        places = [(plan.job.address.base, plan.job.submission.remote_id) for plan in self.plans]
        return sorted(range(len(places)), key=places.__getitem__)

    def part(self, positions: Iterable[int]) -> "PlannedJobs":
        """Return the jobs at these positions."""
        return PlannedJobs(self.options, [self.plans[position] for position in positions])


def plan_jobs(settings: Settings, remotes: Iterable[object], options: TrackOptions) -> PlannedJobs:
    """Check what an app passed, without a database. Raises NotTrackable and ApiRefused."""
    scrubber = shared_scrubber(settings.secret_texts)
    try:
        checked = checked_options(settings, scrubber, options)
        plans = [_plan(settings, scrubber, checked, _scrubbed(scrubber, remote)) for remote in _listed(remotes)]
    except ApiRefused as refused:
        # the messages quote the arguments, and callers log the errors they catch
        raise ApiRefused(
            scrubber.text(str(refused)), message=scrubber.text(refused.message), answer=refused.answer
        ) from None
    except NotTrackable as refused:
        raise type(refused)(scrubber.text(str(refused))) from None
    return PlannedJobs(checked, plans)


def _listed(remotes: object) -> list[object]:
    """Return several jobs as a list. Raises NotTrackable for one job, or for what is no collection."""
    if isinstance(remotes, (str, bytes, Mapping)) or submit_answer(remotes) is not None:
        raise NotTrackable("track_many needs a list of jobs, this is one job: call track, or write `track_many([…])`")
    if not isinstance(remotes, Iterable):
        raise NotTrackable(f"track_many needs a list of jobs, not {type(remotes).__name__}")
    return list(remotes)


def _plan(settings: Settings, scrubber: Scrubber, options: JobOptions, remote: object) -> _Plan:
    job = planned_job(
        remote,
        settings.api,
        fetch_url=options.fetch_url,
        endpoint=options.endpoint,
        status_words=settings.status_words,
    )
    if job.warning is not None:
        log.warning("%s", scrubber.text(job.warning))
    kind = checked_kind(options.kind or job.kind)
    deadline = settings.deadline_for(kind) if options.deadline is None else options.deadline
    eta = job.submission.eta if options.eta is None else options.eta
    return _Plan(
        job=job,
        kind=scrubber.text(kind),
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


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def commit_planned(settings: Settings, planned: PlannedJobs) -> list[TrackedJob]:
    """Insert jobs in a transaction of their own, and wake the workers if one is due soon."""
    return commit(settings, lambda connection: _insert(connection, settings, planned))


def insert_planned(session: TrackingSession | Connection, settings: Settings, planned: PlannedJobs) -> list[TrackedJob]:
    """Insert jobs in the transaction of a session, and wake the workers after its commit if one is due soon."""
    return insert_in_session(session, settings, lambda connection: _insert(connection, settings, planned))


def commit(settings: Settings, write: Callable[[Connection], tuple[T, bool]]) -> T:
    """Write in a transaction of its own. `write` returns its result, and whether the workers are woken afterwards."""
    with transaction(settings) as connection:
        result, due_soon = write(connection)
    if due_soon:
        wake(settings)  # after the commit: the rows must be there
    return result


def insert_in_session(
    session: TrackingSession | Connection,
    settings: Settings,
    write: Callable[[Connection], tuple[T, bool]],
    *,
    call: str = "track",
) -> T:
    """Write in the transaction of a session. If `write` says so, the workers are woken after its commit.

    `call` is the function that the app called, for error messages.
    """
    connection = session_connection(session, call)
    current_workers().check_database(connection)
    try:
        with translate_errors(connection.engine.url):
            result, due_soon = write(connection)
    except SchemaOutdated:
        if same_database(connection.engine.url, settings.database):
            raise
        raise SchemaOutdated(
            f"the session's database {shown_url(connection.engine.url)} has no tables of fetch-worker, or old ones, and"
            f" DATABASE_URL names another: {shown_url(settings.database)}. Let both name the same database, then run"
            " `fetch-worker migrate`"
        ) from None
    if due_soon:
        wake_after_commit(session)
    return result


def _insert(connection: Connection, settings: Settings, planned: PlannedJobs) -> tuple[list[TrackedJob], bool]:
    """Insert the jobs. Return their ids, and whether any is due within SOON_SECONDS."""
    now = database_now(connection)
    paced = _Paced(connection, settings.pace, planned.options)
    new = [_new_job(plan, planned.options, paced, now) for plan in planned.plans]
    inserted = store.insert_jobs(connection, new, now=now)
    tracked = [CreatedJob(job_id) if created else TrackedJob(job_id) for job_id, created in inserted]
    due_soon_at = now + timedelta(seconds=SOON_SECONDS)
    return tracked, any(job.due_at < due_soon_at and not job.outputs for job in new)


def _new_job(plan: _Plan, options: JobOptions, paced: "_Paced", now: datetime) -> store.NewJob:
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

    def __init__(self, connection: Connection, pace: Pace, options: JobOptions) -> None:
        self._connection, self._pace, self._account = connection, pace, options.account
        self._firsts: dict[tuple[str, float | None, float], PollPlan] = {}

    def first(self, plan: _Plan, age: float) -> PollPlan:
        """Return the plan of the first poll of a job of this age in seconds, in the middle of its spread."""
        key = (plan.kind, plan.eta, plan.deadline)
        poll = self._firsts.get(key)
        if poll is None:
            model = pace_model(self._connection, self._account, plan.kind)
            job = PacedJob(age, eta=plan.eta, seconds_left=plan.deadline - age)
            poll = self._firsts[key] = self._pace.first(job, model, spread=0.0)
        return poll
