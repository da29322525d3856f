"""Track jobs: `track` and `track_many`, and the checks of their arguments."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from zlib import crc32

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, scoped_session

from worker.client.connection import cached_settings, transaction
from worker.client.jobs import wake
from worker.client.pace_models import pace_model
from worker.configuration.setting_types import MAX_SECONDS
from worker.core.identity import ACCOUNT
from worker.core.numbers import positive_number
from worker.core.on_done_name import on_done_problem, task_and_queue
from worker.core.pacing.policy import SPREAD, Pace, PacedJob, PollPlan
from worker.core.webhook import checked_url
from worker.errors import ApiRefused, NotTrackable
from worker.settings import Settings
from worker.store import jobs as store
from worker.store.engine import database_now, translate_errors
from worker.system.redaction import Scrubber, shared_scrubber
from worker.vendor.families import MAX_KIND
from worker.vendor.submissions import PlannedJob, planned_job, submit_answer

log = logging.getLogger(__name__)

SOON_SECONDS = 1.0  # a poll run that waits checks for due jobs at least this often
MAX_REFERENCE = 255
PRIORITY_LIMIT = 1_000
_WAKES = "fetch-worker: this session tracked a job that is due soon"


class TrackingSession(Protocol):
    """The interface that `track(session=…)` needs. SQLAlchemy's Session and scoped_session have it."""

    def connection(self) -> Connection:
        """Return the connection of the session's transaction."""
        ...


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
    settings = cached_settings()
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
    with transaction(settings) as connection:
        tracked_jobs, due_soon = _insert(connection, settings, checked_options, plans)
    if due_soon:
        wake(settings)  # after the commit: the rows must be there
    return tracked_jobs


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
            model = pace_model(self._connection, self._account, plan.kind)
            job = PacedJob(age, eta=plan.eta, seconds_left=plan.deadline - age)
            poll = self._firsts[key] = self._pace.first(job, model, spread=0.0)
        return poll


def _moment(value: datetime | str | None) -> datetime | None:
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        raise NotTrackable(
            f"submitted_at {str(value)[:60]!r} is not an ISO 8601 time such as 2026-03-01T12:00:00Z"
        ) from None
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise NotTrackable("submitted_at needs a time zone, for example datetime.now(UTC)")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise NotTrackable(
            f"submitted_at {value!s} is out of range: omit it for a job that was submitted just now"
        ) from None


def _checked_seconds(value: object, name: str) -> float:
    number = positive_number(value)
    if number is None or number > MAX_SECONDS:
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


# ── session──────────────────────────────────────────────────────────────────────────────────────────────────────────


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
        wake(cached_settings())


def _rolled_back(session: Session) -> None:
    if not session.in_nested_transaction():
        session.info[_WAKES] = False
