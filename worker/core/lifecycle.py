"""What becomes of a job after an answer, and of an output after an attempt. Pure decisions; the store carries them out.

A job:     pending → downloading → completed | failed | cancelled;  pending → failed | expired | cancelled
An output: pending → stored | failed
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

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

JobStatus = Literal["pending", "downloading", "completed", "failed", "expired", "cancelled"]
JOB_STATES: tuple[JobStatus, ...] = ("pending", "downloading", "completed", "failed", "expired", "cancelled")
FINAL_STATES: frozenset[str] = frozenset({"completed", "failed", "expired", "cancelled"})
PRUNED = "pruned"  # the code of an output whose file is about to be removed, and its job with it
OUTPUT_STATES = ("pending", "stored", "failed")

FAILED_ANSWERS = 2
UNKNOWN_ANSWERS = 3
ERROR_ANSWERS = 3
EMPTY_ANSWERS = 5
UNKNOWN_GRACE = timedelta(seconds=60)
RECOVERABLE_ANSWERS, RECOVERABLE_APART = 5, timedelta(seconds=15)  # "Failed, Try Again" gets a minute at least
MAX_EXPECTED = 3_600.0  # seconds that an eta may make a failed job wait
AFTER_HOLD_GRACE = timedelta(seconds=60)

BAD_BODY_ATTEMPTS = 3
DEAD_LINK_PATIENCE = timedelta(seconds=60)
DEAD_LINK_ATTEMPTS = 3
TROUBLE_WAIT_LEAST = 5.0
TROUBLE_WAIT_MOST = 300.0
RETRY_AFTER_MOST = 3_600.0  # a server that asks for more is asked again all the same
STORAGE_WAIT = 15.0
PROMISE_CODES = frozenset({"not_found", "no_output", "expired"})  # of ends before which promised links are tried
PROMISE_PATIENCE = timedelta(minutes=10)
PROMISE_ATTEMPTS = 5  # at least: the processes that download may have been away for all of the ten minutes
PROMISE_WAIT_LEAST, PROMISE_WAIT_MOST = 5.0, 60.0
EARLY_CODES = frozenset({"not_media", "truncated", "gone"})  # of an attempt before, while the store lagged


# ── jobs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Strikes:
    """How often the API has spoken against a job; a processing answer forgives all. `last` is when it last counted."""

    failed: int = 0
    unknown: int = 0
    error: int = 0
    empty: int = 0
    last: datetime | None = None

    def forgiven(self) -> "Strikes":
        """Return these strikes with every count at zero; `last` stays."""
        counted = self.failed or self.unknown or self.error or self.empty
        return Strikes(last=self.last) if counted else self


class JobFacts(NamedTuple):
    """What a decision about a job needs to know. `last_hold_end`: when its account or host was last let go.

    A tuple, since one is made for every single request.
    """

    status: JobStatus
    tracked_at: datetime
    deadline_at: datetime
    strikes: Strikes = Strikes()
    last_hold_end: datetime | None = None
    eta: float | None = None  # seconds, as the API estimated


class AskAgain(NamedTuple):
    """The job stays as it is and is asked again. `note` says in a word what the answer was."""

    strikes: Strikes
    note: str


@dataclass(frozen=True, slots=True)
class StartDownloads:
    """The job is ready: its outputs are to be downloaded. None at all completes it at once.

    `left_out`: how many more the answer listed, which are not stored.
    """

    outputs: tuple[Link, ...]
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class EndJob:
    """The job ends here."""

    status: Literal["failed", "expired"]
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class RenewLinks:
    """A job that is being downloaded got its links afresh."""

    outputs: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class KeepLinks:
    """A job that is being downloaded got no fresh links: go on with what there is."""

    note: str


def left_out_note(listed: int, missing: int) -> str:
    """Return the note for a job of whose outputs some are not stored.

    >>> left_out_note(1000, 500)
    'the answer listed 1,500 outputs; only the first 1,000 are stored'
    """
    return f"the answer listed {listed + missing:,} outputs; only the first {listed:,} are stored"


JobDecision = AskAgain | StartDownloads | EndJob | RenewLinks | KeepLinks


def after_answer(job: JobFacts, reply: Reply, *, now: datetime, min_interval: timedelta) -> JobDecision:
    """What becomes of a job. `least` is the time that two answers must be apart for both to count against it."""
    if isinstance(reply, (RateLimited, AccountRefused)) or (isinstance(reply, ApiDown) and not reply.answered):
        return AskAgain(job.strikes, note_of(reply))  # trouble of the account or the host is not the job's
    if job.status == "downloading":
        return RenewLinks(reply.outputs) if isinstance(reply, Ready) else KeepLinks(note_of(reply))
    match reply:
        case Ready(outputs, left_out):
            return StartDownloads(outputs, left_out)
        case AnotherJob() | Unread() | ApiDown():
            return _unless_late(job, replace(job.strikes, error=0), note_of(reply), now)
        case Processing():
            return _unless_late(job, job.strikes.forgiven(), "processing", now)
        case _:
            return _strike(job, reply, now, min_interval)


def _strike(
    job: JobFacts, reply: Failed | UnknownId | ApiError | Empty, now: datetime, min_interval: timedelta
) -> JobDecision:
    old = job.strikes
    counts = old.last is None or now - old.last >= max(min_interval, _apart(reply))
    one = 1 if counts else 0
    last = now if counts else old.last
    others = replace(old, error=0, last=last)  # only errors count "in a row"
    match reply:
        case Failed(message):
            strikes, code = replace(others, failed=old.failed + one), "api_failed"
            reached = strikes.failed >= FAILED_ANSWERS
            if reply.may_recover:
                expected = timedelta(seconds=min(job.eta or 0.0, MAX_EXPECTED))
                reached = strikes.failed >= RECOVERABLE_ANSWERS and now - job.tracked_at >= expected
        case UnknownId(message):
            strikes, code = replace(others, unknown=old.unknown + one), "not_found"
            reached = strikes.unknown >= UNKNOWN_ANSWERS and now - job.tracked_at >= UNKNOWN_GRACE
        case ApiError(message):
            strikes, code = replace(old, error=old.error + one, last=last), "api_error"
            reached = strikes.error >= ERROR_ANSWERS
        case Empty():
            strikes, code = replace(others, empty=old.empty + one), "no_output"
            message = f"success without any output, {strikes.empty} times"
            reached = strikes.empty >= EMPTY_ANSWERS
    if reached:
        return EndJob("failed", code, message)
    return _unless_late(job, strikes, note_of(reply), now)


def _apart(reply: Failed | UnknownId | ApiError | Empty) -> timedelta:
    """Return the time that two answers must be apart for both to count, beside the least between two requests."""
    match reply:
        case Failed(may_recover=True):
            return RECOVERABLE_APART
        case _:
            return timedelta(0)


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
    """The answer in a few words, for `show` and for operators."""
    match reply:
        case Processing():
            return "processing"
        case Ready(outputs, left_out):
            return f"ready, {len(outputs)} outputs" + (f", {left_out} more left out" if left_out else "")
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
    """What a decision about an output needs to know.

    `attempts` counts this attempt too; `bad_bodies` and `dead_attempts` (since the renewal) do not. `renewable` says
    whether the API can be asked for a fresh link; `ready_at` is when the output was first seen; `last_code` is the
    trouble of the attempt before. `promised`: no answer listed the output, so there may never be one at its link.
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

    def patient(self, now: datetime) -> bool:
        """Whether a dead link still has its time to come alive, or to be renewed after it."""
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
    """Bytes came, but not the media: something else, or a part of it.

    `early` says that it may be because the store does not have the file yet: nothing, a page, or a part of the file.
    """

    code: Literal["not_media", "truncated"]
    message: str
    early: bool = False


@dataclass(frozen=True, slots=True)
class Unfit:
    """Nothing that trying again could change: the address is refused, or the output too large."""

    code: Literal["refused_address", "too_large"]
    message: str


@dataclass(frozen=True, slots=True)
class DeadLink:
    """The link answers 403, 404 or 410: not there yet, or not there any more."""

    message: str


@dataclass(frozen=True, slots=True)
class TransferTrouble:
    """The way to the output is in trouble, or our own storage is."""

    code: Literal["http_error", "unreachable", "storage"]
    message: str
    retry_after: float | None = None  # seconds, where the server said when to come again


Attempt = StoredFile | BadBody | Unfit | DeadLink | TransferTrouble


@dataclass(frozen=True, slots=True)
class TryAgain:
    """The output stays pending and is tried again after `wait` seconds; `renew` asks the API for a fresh link first.

    `counts` says whether a bad body brings the output nearer to its end.
    """

    wait: float
    code: str
    message: str
    renew: bool = False
    counts: bool = True


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The output ends here."""

    code: str
    message: str


def after_attempt(
    output: OutputFacts, attempt: Attempt, *, now: datetime, deadline: timedelta
) -> StoredFile | TryAgain | GiveUp:
    """What becomes of an output. `deadline` is how long after `ready_at` one in trouble is still tried."""
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
            least = min(retry_after or 0.0, RETRY_AFTER_MOST)
            return TryAgain(max(_trouble_wait(output.attempts), least), code, message)


def _after_promised(
    output: OutputFacts, attempt: Attempt, *, now: datetime, deadline: timedelta
) -> StoredFile | TryAgain | GiveUp:
    """Return what becomes of a promised link: it is tried until it brings a file, with pauses that grow.

    It ends after 10 minutes and 5 attempts, or at the deadline of outputs if that is earlier.
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
    wait = min(PROMISE_WAIT_LEAST * 2 ** min(output.attempts - 1, 10), PROMISE_WAIT_MOST)
    least = (attempt.retry_after or 0.0) if isinstance(attempt, TransferTrouble) else 0.0
    late = age >= PROMISE_PATIENCE
    left = timedelta(seconds=PROMISE_WAIT_MOST) if late else PROMISE_PATIENCE - age
    wait = min(max(wait, least), left.total_seconds(), (deadline - age).total_seconds())
    return TryAgain(wait, code, attempt.message, counts=False)


def _about_the_output(output: OutputFacts, attempt: Attempt) -> Attempt:
    """What an attempt says of the output: a proxy link that is dead or refused says nothing about the link itself."""
    match attempt:
        case DeadLink(message) | Unfit("refused_address", message) if address_index(output) > 0:
            return DeadLink(message) if output.last_code == "gone" else TransferTrouble("unreachable", message)
        case _:
            return attempt


def _after_bad_body(output: OutputFacts, bad: BadBody, *, now: datetime, late: bool) -> TryAgain | GiveUp:
    """A store may lag: what is not whole in the first minute gets the patience of a dead link, then a fresh link."""
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
            "gone", f"{message}; dead for {(now - since).total_seconds():.0f} s and {output.attempts} attempts"
        )
    return TryAgain(0.0 if tried <= output.proxies else 5.0, "gone", message)


def address_index(output: OutputFacts) -> int:
    """Which address to try now: 0 is the link, 1 and up its proxy links.

    They take turns while there is trouble. A dead link is waited for and renewed; then all are tried in order once.
    """
    if output.last_code == "gone":
        if not output.renewed and (output.renewable or output.dead_attempts == 0):
            return 0
        if output.dead_attempts <= output.proxies:
            return output.dead_attempts
    if output.last_code is None:
        return 0  # an attempt that a crash cut short says nothing against the link
    return (output.attempts - 1) % (1 + output.proxies)


def _trouble_wait(attempts: int) -> float:
    return float(min(TROUBLE_WAIT_LEAST * 2 ** min(attempts - 1, 10), TROUBLE_WAIT_MOST))
