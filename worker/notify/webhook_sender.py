"""Posts one webhook: signs it and sends it.

Receivers are not trusted: their addresses are guarded like those of downloads, redirects are not followed, and no
answer body is read.
"""

import logging
from collections.abc import Callable, Sequence
from http.client import HTTPException
from typing import NamedTuple

from urllib3.exceptions import HTTPError

from worker.coordination.leases import LeaseLost
from worker.core.urls import percent_encoded
from worker.core.webhook import headers, with_addresses
from worker.net.address_guard import Guard, RefusedTarget
from worker.net.deadlines import TimeLimit
from worker.net.network_errors import describe
from worker.net.pooled_adapter import PooledAdapter
from worker.store.events import ClaimedEvent

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 15.0  # Standard Webhooks: receivers should answer within 15 to 30 s
CONNECT_SECONDS = 5.0


class ReceiverAnswer(NamedTuple):
    """What a receiver answered. `status` is None without an answer, `error` is None if the webhook was accepted."""

    status: int | None
    error: str | None
    retry_after: float | None = None  # seconds that the receiver asks us to wait


class WebhookSender:
    """Posts events to their receivers. Thread-safe."""

    def __init__(
        self,
        *,
        guard: Guard,
        adapter: PooledAdapter,
        secrets: Sequence[bytes],
        user_agent: str = "fetch-worker",
        timeout: float = TIMEOUT_SECONDS,
        address_of: Callable[[str], str | None] | None = None,
    ) -> None:
        """`address_of` returns the public address of a stored output, if it has one."""
        self.secrets = tuple(secrets)
        self._guard = guard
        self._adapter = adapter
        self._user_agent = user_agent
        self._timeout = timeout
        self._address_of = address_of

    def post(self, event: ClaimedEvent, sent_at: int, check_lease: Callable[[], None]) -> ReceiverAnswer:
        """Post an event, signed for the time `sent_at` (Unix seconds).

        `check_lease` is called right before a request is sent, and may raise LeaseLost.
        """
        body = with_addresses(event.body, self._address_of)
        signed = headers(self.secrets, event.event_id, sent_at, body) | {"User-Agent": self._user_agent}
        url, limit = percent_encoded(event.url), TimeLimit(self._timeout, check_lease)
        try:
            with limit:
                self._guard.check_url(url)
                timeout = (min(CONNECT_SECONDS, limit.remaining), limit.remaining)
                with self._adapter.exchange("POST", url, signed, timeout, body.encode()) as answer:
                    status = answer.status
                    retry_after = _seconds(answer.headers.get("retry-after"))
            if limit.expired:  # truncated headers look like complete ones
                raise TimeoutError
        except LeaseLost:
            raise
        except RefusedTarget as refused:
            return ReceiverAnswer(None, f"{refused}; see WEBHOOK_ALLOWED_NETWORKS")
        except (HTTPError, HTTPException, OSError, ValueError) as error:
            if limit.expired:
                return ReceiverAnswer(None, f"no answer within {self._timeout:.0f} s")
            return ReceiverAnswer(None, f"the receiver can't be reached: {describe(error)}")
        except Exception as error:  # a claim without an end would be retried forever and without delay
            log.error("internal error in a delivery event_id=%s reason=%s", event.event_id, type(error).__name__)
            return ReceiverAnswer(None, f"internal error: {type(error).__name__}")
        return ReceiverAnswer(status, None if 200 <= status < 300 else f"HTTP {status}", retry_after)


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 7 else None
