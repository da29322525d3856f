"""The types of replies: what an answer of the API means to this worker. `worker.vendor` reads answers into them."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

RefusalReason = Literal["key", "credits", "plan", "request"]

MAX_URL = 8_192  # characters of an address that is stored


@dataclass(frozen=True, slots=True)
class Link:
    """One output: where it is (`url`), where else it may be (`proxies`), or the bytes themselves (`body`)."""

    url: str
    proxies: tuple[str, ...] = ()
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Processing:
    """The job is not ready. `eta` is in seconds from now; `promised` are addresses where outputs are to appear."""

    eta: float | None = None
    promised: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ready:
    """The job is done: `outputs` is what was made (empty for a trained model), but for the `left_out` last of many."""

    outputs: tuple[Link, ...]
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Empty:
    """A success without a link to an output. `promised` are addresses where outputs are to appear."""

    promised: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AnotherJob:
    """A success that names another job's id. It says nothing about this job."""

    echoed: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The API says that the job failed. `may_recover`: its words ask to try again, and such jobs do get ready."""

    message: str
    may_recover: bool = False


@dataclass(frozen=True, slots=True)
class UnknownId:
    """The API does not know the job, not yet or not any more."""

    message: str


@dataclass(frozen=True, slots=True)
class ApiError:
    """An `error` about the job. `vague`: it does not say what is wrong with the order, so it may pass."""

    message: str
    vague: bool = False


@dataclass(frozen=True, slots=True)
class Unread:
    """An answer that no rule reads, such as an unknown status or no JSON. The job is asked about again."""

    message: str


@dataclass(frozen=True, slots=True)
class RateLimited:
    """Too many requests. The whole account waits `seconds`."""

    seconds: float
    message: str


@dataclass(frozen=True, slots=True)
class AccountRefused:
    """The API refuses the account, not the job: its key, its credits, its plan, or the form of the request."""

    reason: RefusalReason
    message: str


@dataclass(frozen=True, slots=True)
class ApiDown:
    """The API, or the way to it, is in trouble: no connection, time-out, 5xx, challenge page, redirect.

    `answered`: the API itself said so in an ordinary answer. Then the job's deadline counts, else it does not.
    `no_such_path`: the API does not have the path that was asked.
    """

    message: str
    answered: bool = False
    no_such_path: bool = field(default=False, compare=False)


Reply = (
    Processing
    | Ready
    | Empty
    | AnotherJob
    | Failed
    | UnknownId
    | ApiError
    | Unread
    | RateLimited
    | AccountRefused
    | ApiDown
)


class RawAnswer(NamedTuple):
    """An answer as it came: the HTTP status and the body. `worker.polling.kept_text` makes of it what may be stored.

    Of a long body it is the beginning, with the `shape` of the whole. A tuple, since one is made for every request.
    """

    http_status: int
    body: bytes
    shape: str | None = None


class ApiReply(NamedTuple):
    """What an answer means, and the answer itself where it may be kept. None: there was no answer, or it is ready."""

    reply: Reply
    raw: RawAnswer | None = None


CLASSES: dict[type[Reply], str] = {
    Processing: "processing",
    Ready: "ready",
    Empty: "empty",
    AnotherJob: "another_job",
    Failed: "failed",
    UnknownId: "unknown_id",
    ApiError: "api_error",
    Unread: "unread",
    RateLimited: "rate_limited",
    AccountRefused: "account_refused",
    ApiDown: "api_down",
}
