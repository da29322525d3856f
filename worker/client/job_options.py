"""The options of `track`: their types, and the checks that turn what an app passes into what a job row holds."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypedDict
from uuid import UUID

from worker.configuration.setting_types import MAX_SECONDS
from worker.core.identity import ACCOUNT
from worker.core.numbers import positive_number
from worker.core.on_done_name import DEFAULT_QUEUE, on_done_problem, task_and_queue
from worker.core.webhook import checked_url
from worker.errors import NotTrackable
from worker.settings import Settings
from worker.system.redaction import Scrubber
from worker.vendor.families import MAX_KIND

MAX_REFERENCE = 255
PRIORITY_LIMIT = 1_000


class CeleryTask(Protocol):
    """A task of the app, as `@app.task` and `@shared_task` make it."""

    name: str
    app: Any


class TrackOptions(TypedDict):
    """The options as they were passed."""

    account: str
    kind: str | None
    endpoint: str | None
    fetch_url: str | None
    eta: float | timedelta | None
    submitted_at: datetime | str | None
    priority: int
    reference: str | int | UUID | None
    on_done: str | CeleryTask | None
    webhook_url: str | None
    deadline: float | timedelta | None


@dataclass(frozen=True, slots=True)
class JobOptions:
    """The checked options of a call, for all its jobs. Times are aware, `eta` and `deadline` are in seconds."""

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


def checked_options(settings: Settings, scrubber: Scrubber, options: TrackOptions) -> JobOptions:
    """Check the options, and remove API keys from them. Raises NotTrackable; the message may quote an option."""
    texts: dict[str, Any] = {
        name: scrubber.links(value) if isinstance(value, str) else value for name, value in options.items()
    }
    webhook_url, reference, on_done = texts["webhook_url"], texts["reference"], texts["on_done"]
    return JobOptions(
        account=checked_account(texts["account"]),
        kind=_text_or_none(texts["kind"], "kind"),
        endpoint=_text_or_none(texts["endpoint"], "endpoint"),
        fetch_url=_text_or_none(texts["fetch_url"], "fetch_url"),
        eta=None if texts["eta"] in (None, 0, "") else _seconds(texts["eta"], "eta"),
        submitted_at=_moment(texts["submitted_at"]),
        priority=_priority(texts["priority"]),
        reference=None if reference is None else scrubber.text(checked_reference(reference)),
        on_done=None if on_done is None else scrubber.text(_on_done(on_done, settings)),
        webhook_url=None if not webhook_url else scrubber.link(_webhook(webhook_url, settings)),
        deadline=None if texts["deadline"] is None else _seconds(texts["deadline"], "deadline"),
    )


def checked_account(value: object) -> str:
    """Return a valid account name. Raises NotTrackable."""
    if not isinstance(value, str) or not ACCOUNT.fullmatch(value):
        raise NotTrackable(f"{value!r} is not a valid account name: use at most 64 letters, digits, '.', '_' and '-'")
    return value


def checked_reference(value: object) -> str:
    """Return a valid reference as text. A number or a UUID is written as text. Raises NotTrackable."""
    is_id = isinstance(value, (int, UUID)) and not isinstance(value, bool)
    return _short(str(value) if is_id else value, "reference")


def checked_kind(value: object) -> str:
    """Return a valid kind. Raises NotTrackable."""
    if not isinstance(value, str) or len(value) > MAX_KIND:
        raise NotTrackable(f"kind must be text of at most {MAX_KIND} characters")
    return _plain(value, "kind")


def _text_or_none(value: object, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise NotTrackable(f"{name} must be text, not {type(value).__name__}")
    return value or None


def _moment(value: object) -> datetime | None:
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


def _seconds(value: object, name: str) -> float:
    number = positive_number(value.total_seconds() if isinstance(value, timedelta) else value)
    if number is None or number > MAX_SECONDS:
        raise NotTrackable(f"{name} must be a positive number of seconds, not {value!r}")
    return number


def _priority(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > PRIORITY_LIMIT:
        raise NotTrackable(f"priority must be a whole number from -{PRIORITY_LIMIT} to {PRIORITY_LIMIT}, not {value!r}")
    return value


def _short(value: object, name: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_REFERENCE:
        raise NotTrackable(f"{name} must be text of at most {MAX_REFERENCE} characters")
    return _plain(value, name)


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


def _on_done(value: object, settings: Settings) -> str:
    checked = _short(value if isinstance(value, str) else _task_address(value), "on_done")
    task, _ = task_and_queue(checked)
    problem = on_done_problem(checked)
    if problem is not None:
        raise NotTrackable(f"on_done is refused: {problem}")
    if settings.allowed_tasks is not None and task not in settings.allowed_tasks:
        raise NotTrackable(
            f"on_done must not name {task!r}: ON_DONE_TASKS allows only {', '.join(sorted(settings.allowed_tasks))}"
        )
    return checked


def _task_address(value: object) -> str:
    """Return `queue/task` for a Celery task, with the queue that its app would send it to. Raises NotTrackable."""
    from celery.app.task import Task  # imported here: an app that names its tasks as text need not load Celery

    if not isinstance(value, Task):
        raise NotTrackable(f"on_done must be a Celery task or the name of one, not {type(value).__name__}")
    options = {"queue": value.queue} if getattr(value, "queue", None) else {}
    queue = value.app.amqp.router.route(options, value.name).get("queue") or DEFAULT_QUEUE
    return f"{getattr(queue, 'name', queue)}/{value.name}"
