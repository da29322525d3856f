"""How a job looks to those who watch Celery's tasks: a state, times and a few words; and which jobs are shown. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from worker.core.answer_history import parse_history
from worker.core.display import display_text
from worker.core.lifecycle import FINAL_STATES

NAME = "fetch-worker.job"
PREFIX = "job-"
STATES: Mapping[str, str] = {
    "downloading": "DOWNLOADING",
    "completed": "SUCCESS",
    "failed": "FAILURE",
    "expired": "FAILURE",
    "cancelled": "REVOKED",
}
TIME_FIELD: Mapping[str, str] = {"SUCCESS": "succeeded", "FAILURE": "failed", "REVOKED": "revoked"}
SHOWN_AFTER_END = timedelta(seconds=60)  # how long an old job stays that has ended: else nobody would see how
NOTE_MOST, REFERENCE_MOST, MESSAGE_MOST = 80, 80, 300  # characters


class Outputs(NamedTuple):
    """A job's outputs: how many there are, how many of them are stored, with how many bytes."""

    listed: int = 0
    stored: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class FlowerJob:
    """What is seen of a job."""

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
        """Whether it has ended."""
        return self.status in FINAL_STATES

    def interests(self, now: datetime) -> bool:
        """Whether it is on its way, or has just ended."""
        return self.completed_at is None or now - self.completed_at < SHOWN_AFTER_END


def task_id(job_id: int) -> str:
    """What a job's row is known by.

    >>> task_id(7)
    'job-7'
    """
    return f"{PREFIX}{job_id}"


def job_id_of(uuid: str) -> int | None:
    """The job that a row is about; None for tasks of other kinds.

    >>> job_id_of("job-7"), job_id_of("job-x"), job_id_of("0a611538-674c-4d69")
    (7, None, None)
    """
    digits = uuid.removeprefix(PREFIX)
    return int(digits) if uuid.startswith(PREFIX) and digits.isascii() and digits.isdecimal() else None


def job_ids_to_show(newest: Sequence[int], shown: Iterable[FlowerJob], most: int, *, now: datetime) -> list[int]:
    """The jobs to look at, `most` at most: the newest, half of it at least, and those shown that are not over yet.

    `newest` are the newest ids there are, newest first.
    """
    head = newest[: most - most // 2]
    known = set(head)
    staying = sorted((job.id for job in shown if job.id not in known and job.interests(now)), reverse=True)
    known.update(staying)
    rest = [*staying, *(job_id for job_id in newest[len(head) :] if job_id not in known)]
    return [*head, *rest[: most // 2]]


def task_fields(job: FlowerJob) -> dict[str, object]:
    """The attributes of a task. All are there: nothing is left of the end of a job that is taken up again."""
    asked = job.polls > 0
    state = STATES.get(job.status) or ("STARTED" if asked else "RECEIVED")
    ended = None if job.completed_at is None else job.completed_at.timestamp()
    moments = (job.submitted_at, job.asked_at, job.ready_at, job.completed_at)
    return {
        "state": state,
        "args": repr((job.remote_id,)),
        "kwargs": repr(_kwargs(job)),
        "sent": None,  # it is the same moment
        "received": job.submitted_at.timestamp(),
        "started": job.asked_at.timestamp() if asked and job.asked_at else None,
        **{name: ended if TIME_FIELD.get(state) == name else None for name in TIME_FIELD.values()},
        "timestamp": max(moment.timestamp() for moment in moments if moment),
        "runtime": None if job.completed_at is None else (job.completed_at - job.submitted_at).total_seconds(),
        "result": display_text(_words(job)) or None,
        "exception": _trouble(job),
    }


def _kwargs(job: FlowerJob) -> dict[str, object]:
    short: dict[str, object] = {"id": job.id, "account": job.account, "kind": job.kind}
    return short if job.reference is None else short | {"reference": job.reference[:REFERENCE_MOST]}


def _trouble(job: FlowerJob) -> str | None:
    if job.status not in ("failed", "expired"):
        return None
    return display_text(f"{job.error_code}: {job.error_message or ''}".rstrip(": ")[:MESSAGE_MOST])


def _words(job: FlowerJob) -> str:
    """How it stands, or how it ended."""
    listed, stored, size = job.outputs
    if job.status == "completed":
        return f"{_outputs(stored)} stored, {size:,} bytes"
    partly = f"{stored} of {_outputs(listed)} stored, {size:,} bytes" if listed else ""
    code = job.error_code if job.status in ("failed", "expired") else None
    held = "" if job.held_at is None or job.final else f"held by an operator since {job.held_at:%Y-%m-%d %H:%M} UTC"
    return ", ".join(words for words in (code, held, partly, _asked(job)) if words)


def _asked(job: FlowerJob) -> str:
    if job.status != "pending" or not job.polls:
        return ""
    last = parse_history(job.last_answer)[:1]
    times = "asked once" if job.polls == 1 else f"asked {job.polls:,} times"
    return f"{times}: {last[0].note[:NOTE_MOST]}" if last else times


def _outputs(count: int) -> str:
    return f"{count} output" if count == 1 else f"{count} outputs"
