"""Decide about a job after an answer, and about an output after a download attempt. Pure; the store applies them.

An order:  ordered → pending | downloading | failed | cancelled | uncertain;  uncertain → pending | ordered | cancelled
A job:     pending → downloading → completed | failed | cancelled;  pending → failed | expired | cancelled
An output: pending → stored | failed
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

from worker.core.humanize import format_count
from worker.core.media.signatures import Media
from worker.core.reply import (
    AccountRefused,
    AnotherJob,
    ApiDown,
    ApiError,
    Empty,
    Failed,
    Link,
    Processing,
    RateLimited,
    Ready,
    Reply,
    UnknownId,
    Unread,
)

JobStatus = Literal["ordered", "uncertain", "pending", "downloading", "completed", "failed", "expired", "cancelled"]
JOB_STATES: tuple[JobStatus, ...] = (
    "ordered", "uncertain", "pending", "downloading", "completed", "failed", "expired", "cancelled",
)  # fmt: skip
ORDER_STATES: tuple[JobStatus, ...] = ("ordered", "uncertain")  # the API has not named the job yet
FINAL_STATES: frozenset[str] = frozenset({"completed", "failed", "expired", "cancelled"})
OUTPUT_STATES = ("pending", "stored", "failed")
EVENT_STATES = ("pending", "delivered", "failed")  # of webhook events

CRASHED = "worker_crash"  # the error code of a job or output that ended its process again and again
PRUNED = "pruned"  # the error code of an output that is being removed together with its job
ORDER_CODES = ("bad_request", "moderated", "unknown_model", "refused", "duplicate_id")  # of orders that failed
JOB_CODES = (
    "api_error", "api_failed", "expired", "no_output", "not_found", "output_failed", "unwritable", CRASHED,
    *ORDER_CODES,
)  # fmt: skip
OUTPUT_CODES = (
    "cancelled", "gone", "http_error", "not_media", PRUNED, "refused_address", "storage", "too_large", "truncated",
    "unreachable", CRASHED,
)  # fmt: skip

# How many answers of a class end a job. A single one can be a mistake of the API.
FAILED_ANSWERS = 2
UNKNOWN_ANSWERS = 3
ERROR_ANSWERS = 3
EMPTY_ANSWERS = 5
UNKNOWN_GRACE = timedelta(seconds=60)  # the API does not know a new job at once
RECOVERABLE_ANSWERS = 5  # with the time between them, "Failed, Try Again" is accepted for at least one minute
RECOVERABLE_APART = timedelta(seconds=15)
MAX_EXPECTED = 3_600.0  # seconds; an eta keeps a failed job pending no longer than this
AFTER_HOLD_GRACE = timedelta(seconds=60)  # time for a poll after a hold, before the job can expire

BAD_BODY_ATTEMPTS = 3
DEAD_LINK_PATIENCE = timedelta(seconds=60)  # a store may not have a new file yet
DEAD_LINK_ATTEMPTS = 3  # after the link was renewed and each proxy link was tried
MIN_RETRY_WAIT = 5.0  # doubled after each failed attempt, up to the next
MAX_RETRY_WAIT = 300.0
MAX_RETRY_AFTER = 3_600.0  # longer waits that a server asks for are shortened to this
STORAGE_WAIT = 15.0  # a full or missing disk is repaired by a person
PROMISE_CODES = frozenset({"not_found", "no_output", "expired"})  # promised links are tried before these final states
PROMISE_PATIENCE = timedelta(minutes=10)
PROMISE_ATTEMPTS = 5  # the minimum, because no download process may have run during the ten minutes
MIN_PROMISE_WAIT, MAX_PROMISE_WAIT = 5.0, 60.0
EARLY_CODES = frozenset({"not_media", "truncated", "gone"})  # results of attempts before the store had the file


# ── jobs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Strikes:
    """The number of answers against a job, by class. A processing answer resets them. `last` is the last strike."""

    failed: int = 0
    unknown: int = 0
    error: int = 0
    empty: int = 0
    last: datetime | None = None

    def reset(self) -> "Strikes":
        """Return the strikes with every count at zero. `last` stays."""
        has_strikes = self.failed or self.unknown or self.error or self.empty
        return Strikes(last=self.last) if has_strikes else self


class JobFacts(NamedTuple):
    """The facts for a decision about a job. `last_hold_end` is the end of the last hold of its account or host.

    This is a tuple for speed, because every request creates one.
    """

    status: JobStatus
    tracked_at: datetime
    deadline_at: datetime
    strikes: Strikes = Strikes()
    last_hold_end: datetime | None = None
    eta: float | None = None  # seconds, as the API estimated


class AskAgain(NamedTuple):
    """The job keeps its state and is polled again. `note` is a short description of the answer."""

    strikes: Strikes
    note: str


@dataclass(frozen=True, slots=True)
class StartDownloads:
    """The job is ready: download its outputs. A job without outputs is completed at once.

    `left_out` counts listed outputs beyond the limit, which are not stored.
    """

    outputs: tuple[Link, ...]
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class EndJob:
    """The job ends in this final state."""

    status: Literal["failed", "expired"]
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class RenewLinks:
    """A job in `downloading` got fresh links."""

    outputs: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class KeepLinks:
    """A job in `downloading` got no fresh links. Its present links stay."""

    note: str


def left_out_note(listed: int, missing: int) -> str:
    """Return the note for a job whose outputs are not all stored.

    >>> left_out_note(1000, 500)
    'the answer listed 1,500 outputs; only the first 1,000 are stored'
    """
    return f"the answer listed {listed + missing:,} outputs; only the first {listed:,} are stored"


JobDecision = AskAgain | StartDownloads | EndJob | RenewLinks | KeepLinks


def after_answer(job: JobFacts, reply: Reply, *, now: datetime, min_interval: timedelta) -> JobDecision:
    """Decide about a job after an answer. Two answers count as two strikes only if `min_interval` lies between them."""
    if isinstance(reply, (RateLimited, AccountRefused)) or (isinstance(reply, ApiDown) and not reply.answered):
        return AskAgain(job.strikes, note_of(reply))  # a problem of the account or host says nothing about the job
    if job.status == "downloading":
        return RenewLinks(reply.outputs) if isinstance(reply, Ready) else KeepLinks(note_of(reply))
    match reply:
        case Ready(outputs, left_out):
            return StartDownloads(outputs, left_out)
        case AnotherJob() | Unread() | ApiDown():
            return _unless_late(job, replace(job.strikes, error=0), note_of(reply), now)
        case Processing():
            return _unless_late(job, job.strikes.reset(), "processing", now)
        case _:
            return _strike(job, reply, now, min_interval)


def _strike(
    job: JobFacts, reply: Failed | UnknownId | ApiError | Empty, now: datetime, min_interval: timedelta
) -> JobDecision:
    old = job.strikes
    recoverable = isinstance(reply, Failed) and reply.may_recover
    apart = max(min_interval, RECOVERABLE_APART) if recoverable else min_interval
    counts = old.last is None or now - old.last >= apart
    strike = 1 if counts else 0
    last = now if counts else old.last
    without_errors = replace(old, error=0, last=last)  # only errors must be in a row
    match reply:
        case Failed(message):
            strikes, code = replace(without_errors, failed=old.failed + strike), "api_failed"
            reached = strikes.failed >= FAILED_ANSWERS
            if recoverable:
                expected = timedelta(seconds=min(job.eta or 0.0, MAX_EXPECTED))
                reached = strikes.failed >= RECOVERABLE_ANSWERS and now - job.tracked_at >= expected
        case UnknownId(message):
            strikes, code = replace(without_errors, unknown=old.unknown + strike), "not_found"
            reached = strikes.unknown >= UNKNOWN_ANSWERS and now - job.tracked_at >= UNKNOWN_GRACE
        case ApiError(message):
            strikes, code = replace(old, error=old.error + strike, last=last), "api_error"
            reached = strikes.error >= ERROR_ANSWERS
        case Empty():
            strikes, code = replace(without_errors, empty=old.empty + strike), "no_output"
            message = f"success without any output, {strikes.empty} times"
            reached = strikes.empty >= EMPTY_ANSWERS
    if reached:
        return EndJob("failed", code, message)
    return _unless_late(job, strikes, note_of(reply), now)


def _unless_late(job: JobFacts, strikes: Strikes, note: str, now: datetime) -> JobDecision:
    late_from = job.deadline_at
    if job.last_hold_end is not None:
        late_from = max(late_from, job.last_hold_end + AFTER_HOLD_GRACE)
    if now >= late_from:
        return EndJob(
            "expired",
            "expired",
            f"not ready by its deadline {job.deadline_at:%Y-%m-%d %H:%M:%S} UTC; last answer: {note}",
        )
    return AskAgain(strikes, note)


def note_of(reply: Reply) -> str:
    """Return a short description of the answer, for `show` and for operators."""
    match reply:
        case Processing():
            return "processing"
        case Ready(outputs, left_out):
            return f"ready, {format_count(len(outputs), 'output')}" + (
                f", {left_out} more left out" if left_out else ""
            )
        case Empty():
            return "success without output"
        case AnotherJob(echoed):
            return f"answered for another job, {echoed}"
        case RateLimited(seconds, message):
            return f"rate limited for {seconds:.0f} s: {message}"
        case AccountRefused(reason, message):
            return f"account refused ({reason}): {message}"
        case Failed(message):
            return f"failed: {message}"
        case UnknownId(message):
            return f"unknown id: {message}"
        case ApiError(message):
            return f"error: {message}"
        case ApiDown(message) | Unread(message):
            return message


# ── outputs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class OutputFacts:
    """The facts for a decision about an output.

    `attempts` includes the present attempt. `bad_bodies` and `dead_attempts` (since the link was renewed) do not.
    `renewable`: the API can return a fresh link. `ready_at`: when the output was first listed. `last_code`: the error
    code of the previous attempt. `promised`: no answer listed the output, so its link may never work.
    """

    attempts: int
    proxies: int
    ready_at: datetime
    bad_bodies: int = 0
    dead_since: datetime | None = None
    renewed: bool = False
    dead_attempts: int = 0
    renewable: bool = True
    last_code: str | None = None
    promised: bool = False

    def link_may_recover(self, now: datetime) -> bool:
        """Return whether a dead link is still in its waiting time, or can be renewed after it."""
        if self.renewed or self.dead_since is None:
            return not self.renewed
        return self.renewable or now - self.dead_since < DEAD_LINK_PATIENCE


@dataclass(frozen=True, slots=True)
class StoredFile:
    """The output is whole and stored."""

    location: str
    size_bytes: int
    sha256: str
    media: Media


@dataclass(frozen=True, slots=True)
class BadBody:
    """The body is not the media, or only a part of it.

    `early`: the body is empty, an HTML page or a part of the file. Maybe the store does not have the whole file yet.
    """

    code: Literal["not_media", "truncated"]
    message: str
    early: bool = False


@dataclass(frozen=True, slots=True)
class Unfit:
    """A retry can't help: the address is refused, or the output is too large."""

    code: Literal["refused_address", "too_large"]
    message: str


@dataclass(frozen=True, slots=True)
class DeadLink:
    """The link answers with 403, 404 or 410: the file is not there yet, or no longer."""

    message: str


@dataclass(frozen=True, slots=True)
class TransferTrouble:
    """A temporary failure of the network, of the server or of the worker's own storage."""

    code: Literal["http_error", "unreachable", "storage"]
    message: str
    retry_after: float | None = None  # seconds, if the server sent Retry-After


Attempt = StoredFile | BadBody | Unfit | DeadLink | TransferTrouble


@dataclass(frozen=True, slots=True)
class TryAgain:
    """The output stays pending and is tried again after `wait` seconds. `renew`: get a fresh link from the API first.

    `counts`: a bad body counts towards the limit of bad bodies.
    """

    wait: float
    code: str
    message: str
    renew: bool = False
    counts: bool = True


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The output fails with this error code."""

    code: str
    message: str


def after_attempt(
    output: OutputFacts, attempt: Attempt, *, now: datetime, deadline: timedelta
) -> StoredFile | TryAgain | GiveUp:
    """Decide about an output after an attempt. `deadline` is the time after `ready_at` at which retries end."""
    if output.promised:
        return _after_promised(output, attempt, now=now, deadline=deadline)
    late = now >= output.ready_at + deadline
    match _about_the_output(output, attempt):
        case StoredFile() as stored:
            return stored
        case Unfit(code, message):
            return GiveUp(code, message)
        case BadBody() as bad:
            return _after_bad_body(output, bad, now=now, late=late)
        case DeadLink(message):
            return _after_dead_link(output, message, now=now, late=late)
        case TransferTrouble("storage", message):
            return TryAgain(STORAGE_WAIT, "storage", message)
        case TransferTrouble(code, message, retry_after):
            if late:
                return GiveUp(code, message)
            min_wait = min(retry_after or 0.0, MAX_RETRY_AFTER)
            return TryAgain(max(_trouble_wait(output.attempts), min_wait), code, message)


def _after_promised(
    output: OutputFacts, attempt: Attempt, *, now: datetime, deadline: timedelta
) -> StoredFile | TryAgain | GiveUp:
    """Decide about a promised link. It is tried with growing waits until it returns a file.

    It fails after 10 minutes and 5 attempts, or at the deadline of outputs if that is earlier.
    """
    match attempt:
        case StoredFile():
            return attempt
        case Unfit():
            return GiveUp(attempt.code, attempt.message)
        case TransferTrouble("storage", message):
            return TryAgain(STORAGE_WAIT, "storage", message)
    code = "gone" if isinstance(attempt, DeadLink) else attempt.code
    age = now - output.ready_at
    if age >= deadline or (age >= PROMISE_PATIENCE and output.attempts >= PROMISE_ATTEMPTS):
        return GiveUp(code, f"{attempt.message}; a promised link, tried for {age.total_seconds():.0f} s")
    wait = min(MIN_PROMISE_WAIT * 2 ** min(output.attempts - 1, 10), MAX_PROMISE_WAIT)
    min_wait = (attempt.retry_after or 0.0) if isinstance(attempt, TransferTrouble) else 0.0
    late = age >= PROMISE_PATIENCE
    max_wait = timedelta(seconds=MAX_PROMISE_WAIT) if late else PROMISE_PATIENCE - age
    wait = min(max(wait, min_wait), max_wait.total_seconds(), (deadline - age).total_seconds())
    return TryAgain(wait, code, attempt.message, counts=False)


def _about_the_output(output: OutputFacts, attempt: Attempt) -> Attempt:
    """Return the attempt as it counts for the output: a dead or refused proxy link says nothing about the main link."""
    match attempt:
        case DeadLink(message) | Unfit("refused_address", message) if address_index(output) > 0:
            return DeadLink(message) if output.last_code == "gone" else TransferTrouble("unreachable", message)
        case _:
            return attempt


def _after_bad_body(output: OutputFacts, bad: BadBody, *, now: datetime, late: bool) -> TryAgain | GiveUp:
    """Decide about a bad body. In the first minute it may be incomplete in the store: wait, then get a fresh link."""
    code, message = bad.code, bad.message
    if bad.early and not (output.renewed or output.bad_bodies or late):
        age = now - output.ready_at
        if age < DEAD_LINK_PATIENCE:
            return TryAgain(_patient_wait(age), code, message, counts=False)
        if output.renewable and output.last_code in EARLY_CODES:
            return TryAgain(0.0, code, message, renew=True, counts=False)
    if output.bad_bodies + 1 >= BAD_BODY_ATTEMPTS or late:
        return GiveUp(code, message)
    return TryAgain(2.0 * (output.bad_bodies + 1), code, message)


def _patient_wait(waited: timedelta) -> float:
    return 5.0 if waited < timedelta(seconds=20) else 10.0


def _after_dead_link(output: OutputFacts, message: str, *, now: datetime, late: bool) -> TryAgain | GiveUp:
    since = output.dead_since or now
    if not output.renewed and not late:
        if now - since < DEAD_LINK_PATIENCE:
            return TryAgain(_patient_wait(now - since), "gone", message)
        if output.renewable:
            return TryAgain(0.0, "gone", message, renew=True)
    tried = output.dead_attempts + 1
    if tried >= 1 + output.proxies + DEAD_LINK_ATTEMPTS or late:
        return GiveUp(
            "gone",
            f"{message}; dead for {(now - since).total_seconds():.0f} s and {format_count(output.attempts, 'attempt')}",
        )
    return TryAgain(0.0 if tried <= output.proxies else 5.0, "gone", message)


def address_index(output: OutputFacts) -> int:
    """Return the index of the URL to try now. 0 is the main link, higher numbers are its proxy links.

    After temporary failures the URLs take turns. A dead main link is retried and renewed first; then all are tried in
    order, once each.
    """
    if output.last_code == "gone":
        if not output.renewed and (output.renewable or output.dead_attempts == 0):
            return 0
        if output.dead_attempts <= output.proxies:
            return output.dead_attempts
    if output.last_code is None:
        return 0  # an attempt that a crash interrupted says nothing about the link
    return (output.attempts - 1) % (1 + output.proxies)


def _trouble_wait(attempts: int) -> float:
    return float(min(MIN_RETRY_WAIT * 2 ** min(attempts - 1, 10), MAX_RETRY_WAIT))
