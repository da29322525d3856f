"""The types of replies: the meanings that an answer of the API can have. `worker.vendor` makes them from answers."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

RefusalReason = Literal["key", "credits", "plan", "request"]

MAX_URL = 8_192  # characters of a stored URL


@dataclass(frozen=True, slots=True)
class Link:
    """One output: its URL, alternative URLs (`proxies`), or the content itself (`body`)."""

    url: str
    proxies: tuple[str, ...] = ()
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Processing:
    """The job is not ready. `eta` is in seconds from now. `promised` are URLs at which outputs will appear."""

    eta: float | None = None
    promised: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ready:
    """The job is done. `outputs` is empty for a trained model. `left_out` counts outputs beyond the limit."""

    outputs: tuple[Link, ...]
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Empty:
    """A success without a link to an output. `promised` are URLs at which outputs will appear."""

    promised: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AnotherJob:
    """A success with the id of another job. It says nothing about this job."""

    echoed: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The API says that the job failed. `may_recover`: the message asks to try again; such jobs can become ready."""

    message: str
    may_recover: bool = False


@dataclass(frozen=True, slots=True)
class UnknownId:
    """The API does not know the job: not yet, or no longer."""

    message: str


@dataclass(frozen=True, slots=True)
class ApiError:
    """An `error` about the job. `vague`: the message does not say what is wrong, so it may be temporary."""

    message: str
    vague: bool = False


@dataclass(frozen=True, slots=True)
class Unread:
    """An answer that no rule understands, such as an unknown status or no JSON. The job is polled again."""

    message: str


@dataclass(frozen=True, slots=True)
class RateLimited:
    """Too many requests. The whole account waits `seconds`."""

    seconds: float
    message: str


@dataclass(frozen=True, slots=True)
class AccountRefused:
    """The API refuses the account and not the job. The reason is the key, the credits, the plan or the request."""

    reason: RefusalReason
    message: str


@dataclass(frozen=True, slots=True)
class ApiDown:
    """The API or the network fails: no connection, time-out, 5xx, challenge page, redirect.

    `answered`: the API reported it in a normal answer, so the job can expire by it. Otherwise it can't.
    `no_such_path`: the API does not have the requested path.
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
    """An unchanged answer: the HTTP status and the body. `worker.polling.kept_text` makes it safe to store.

    For a long body, `body` is its start and `shape` is the shape of the whole body. This is a tuple for speed, because
    every request creates one.
    """

    http_status: int
    body: bytes
    shape: str | None = None


class ApiReply(NamedTuple):
    """The reply, and the raw answer if it may be stored. `raw` is None if there was no answer or the job is ready."""

    reply: Reply
    raw: RawAnswer | None = None
