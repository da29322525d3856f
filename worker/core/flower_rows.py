"""Jobs as rows in Flower, in the form of Celery tasks, and the selection of the jobs that are shown. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from worker.core.answer_history import parse_history
from worker.core.display import display_text
from worker.core.humanize import format_count
from worker.core.lifecycle import FINAL_STATES
from worker.core.redaction.masking import mask_personal_data

NAME = "fetch-worker.job"
PREFIX = "job-"
STATES: Mapping[str, str] = {
    "ordered": "ORDERED",
    "uncertain": "UNCERTAIN",
    "downloading": "DOWNLOADING",
    "completed": "SUCCESS",
    "failed": "FAILURE",
    "expired": "FAILURE",
    "cancelled": "REVOKED",
}
ORDER_NOTES: Mapping[str, str] = {
    "ordered": "the order is not taken yet",
    "uncertain": "the order was sent and its answer is lost: attach, retry or cancel it",
}
TIME_FIELD: Mapping[str, str] = {"SUCCESS": "succeeded", "FAILURE": "failed", "REVOKED": "revoked"}
SHOWN_AFTER_END = timedelta(seconds=60)  # an old job stays visible for this time after its end
MAX_REFERENCE_LENGTH, MAX_NOTE_LENGTH, MAX_MESSAGE_LENGTH = 40, 80, 300  # characters


class Outputs(NamedTuple):
    """The outputs of a job: the number listed, the number stored, and the stored bytes."""

    listed: int = 0
    stored: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class FlowerJob:
    """The fields of a job that its row needs."""

    id: int
    account: str
    remote_id: str
    kind: str
    reference: str | None
    status: str
    polls: int
    last_answer: str | None
    submitted_at: datetime
    asked_at: datetime | None
    ready_at: datetime | None
    completed_at: datetime | None
    held_at: datetime | None
    error_code: str | None
    error_message: str | None
    outputs: Outputs = Outputs()  # noqa: RUF009  # a tuple

    @property
    def final(self) -> bool:
        """Whether the job is in a final state."""
        return self.status in FINAL_STATES

    def is_current(self, now: datetime) -> bool:
        """Return whether the job has not ended, or has ended just now."""
        return self.completed_at is None or now - self.completed_at < SHOWN_AFTER_END


def task_id(job_id: int) -> str:
    """Return the task id of a job's row.

    >>> task_id(7)
    'job-7'
    """
    return f"{PREFIX}{job_id}"


def job_id_of(uuid: str) -> int | None:
    """Return the job id of a row, or None for other tasks.

    >>> job_id_of("job-7"), job_id_of("job-x"), job_id_of("0a611538-674c-4d69")
    (7, None, None)
    """
    digits = uuid.removeprefix(PREFIX)
    return int(digits) if uuid.startswith(PREFIX) and digits.isascii() and digits.isdecimal() else None


def job_ids_to_show(newest: Sequence[int], shown: Iterable[FlowerJob], limit: int, *, now: datetime) -> list[int]:
    """Return at most `limit` job ids: at least half of them the newest, then shown jobs that are still current.

    `newest` are the newest job ids, newest first.
    """
    head = newest[: limit - limit // 2]
    selected = set(head)
    staying = sorted((job.id for job in shown if job.id not in selected and job.is_current(now)), reverse=True)
    selected.update(staying)
    candidates = [*staying, *(job_id for job_id in newest[len(head) :] if job_id not in selected)]
    return [*head, *candidates[: limit // 2]]


def task_fields(job: FlowerJob) -> dict[str, object]:
    """Return all attributes of the task. A job that was retried must not keep attributes of its former end."""
    is_polled = job.polls > 0
    state = STATES.get(job.status) or ("STARTED" if is_polled else "RECEIVED")
    ended = None if job.completed_at is None else job.completed_at.timestamp()
    moments = (job.submitted_at, job.asked_at, job.ready_at, job.completed_at)
    return {
        "state": state,
        "args": repr(_arguments(job)),
        "kwargs": repr(_search_terms(job)),
        "sent": None,  # the same time as `received`
        "received": job.submitted_at.timestamp(),
        "started": job.asked_at.timestamp() if is_polled and job.asked_at else None,
        **{name: ended if TIME_FIELD.get(state) == name else None for name in TIME_FIELD.values()},
        "timestamp": max(moment.timestamp() for moment in moments if moment),
        "runtime": None if ended is None else max(0.0, ended - job.submitted_at.timestamp()),
        "result": display_text(_result(job)) or None,
        "exception": _trouble(job),
    }


def _search_terms(job: FlowerJob) -> dict[str, object]:
    """Return what operators find the job by. Flower compares whole values, so none is shortened.

    Flower before 2.1 finds the first place of a name in this text: `id` comes before `remote_id`, and free text last.
    """
    remote = {"remote_id": job.remote_id} if job.remote_id else {}
    terms = {"id": job.id, **remote, "account": job.account, "kind": job.kind}
    return terms if job.reference is None else terms | {"reference": job.reference}


def _arguments(job: FlowerJob) -> tuple[str, ...]:
    """Return what operators know the job by, short enough for a column of the table.

    An order has no remote id until the API has taken it, so its kind is shown.
    """
    name = job.remote_id or job.kind
    if job.reference is None:
        return (name,)
    reference = job.reference
    is_long = len(reference) > MAX_REFERENCE_LENGTH
    return (name, f"{reference[: MAX_REFERENCE_LENGTH - 1]}…" if is_long else reference)


def _trouble(job: FlowerJob) -> str | None:
    if job.status not in ("failed", "expired"):
        return None
    message = job.error_message or ""
    if len(message) >= MAX_MESSAGE_LENGTH:  # it was cut: the last word may be a part of an address
        message = f"{message.rpartition(' ')[0]} …"
    return display_text(f"{job.error_code}: {mask_personal_data(message)}".rstrip(": "))


def _result(job: FlowerJob) -> str:
    """Return the progress of the job or its result in a few words."""
    listed, stored, size = job.outputs
    if job.status == "completed":
        return f"{format_count(stored, 'output')} stored, {size:,} bytes"
    if job.status in ORDER_NOTES:
        return ORDER_NOTES[job.status]
    progress = f"{stored} of {format_count(listed, 'output')} stored, {size:,} bytes" if listed else ""
    code = job.error_code if job.status in ("failed", "expired") else None
    hold = "" if job.held_at is None or job.final else f"held by an operator since {job.held_at:%Y-%m-%d %H:%M} UTC"
    return ", ".join(part for part in (code, hold, progress, _polls(job)) if part)


def _polls(job: FlowerJob) -> str:
    if job.status != "pending" or not job.polls:
        return ""
    last = parse_history(job.last_answer)[:1]
    times = "polled once" if job.polls == 1 else f"polled {job.polls:,} times"
    return f"{times}: {mask_personal_data(last[0].note)[:MAX_NOTE_LENGTH]}" if last else times
