"""The types of replies to an order: what the answer of the API, or its absence, says about the order that was sent.

`worker.vendor.order_answers` makes them from answers; the sender makes `OrderNotSent` and `AnswerLost` for requests
without an answer. Messages are not scrubbed.
"""

from dataclasses import dataclass
from typing import Literal

from worker.core.identity import FetchAddress
from worker.core.reply import AccountRefused, Link, RateLimited

OrderRefusalCode = Literal["bad_request", "moderated", "unknown_model", "refused"]


@dataclass(frozen=True, slots=True)
class OrderTaken:
    """The API took the order. `outputs` is filled if it was ready at once; `left_out` counts outputs beyond the limit.

    `eta` is in seconds from now. `promised` are URLs at which outputs will appear. `default_address`: the address is
    SD_API_URL, because nothing else was known. `warning` is for the log.
    """

    remote_id: str
    address: FetchAddress
    kind: str
    eta: float | None = None
    outputs: tuple[Link, ...] = ()
    left_out: int = 0
    promised: tuple[str, ...] = ()
    default_address: bool = False
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class OrderRefused:
    """The API refuses this order, or the worker refuses to send it. The refusal is final.

    `payload` replaces the stored one if it must not stay there.
    """

    code: OrderRefusalCode
    message: str
    payload: str | None = None


@dataclass(frozen=True, slots=True)
class OrderPostponed:
    """The API says that it did not take the order now. The order is sent again after `seconds`."""

    message: str
    seconds: float


@dataclass(frozen=True, slots=True)
class QueueFull:
    """The account has as many orders at the API as it may have. `limit` is their number, if the API names it."""

    message: str
    seconds: float
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class OrderNotSent:
    """The order did not reach the API: no whole request was sent, or something in front of the API answered."""

    message: str


@dataclass(frozen=True, slots=True)
class AnswerLost:
    """The request was sent, and no answer says whether the API took the order. It must not be sent again by itself."""

    message: str


OrderReply = (
    OrderTaken | OrderRefused | OrderPostponed | QueueFull | RateLimited | AccountRefused | OrderNotSent | AnswerLost
)
