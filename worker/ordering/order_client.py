"""HTTP client for orders. Each order is sent over its own connection, and never twice by itself."""

import json
import time
from collections.abc import Callable
from dataclasses import replace

import requests
from pydantic import SecretStr
from urllib3.exceptions import HTTPError

from worker.core.order_reply import AnswerLost, OrderNotSent, OrderReply, OrderTaken
from worker.net.deadlines import TimeLimit
from worker.net.network_errors import describe
from worker.net.pooled_adapter import NothingSent, PooledAdapter
from worker.ordering.options import OrderOptions
from worker.polling.api_client import CONNECT_SECONDS, HEADERS, MAX_ANSWER_BYTES
from worker.store.orders import ClaimedOrder
from worker.system.redaction import Scrubber
from worker.vendor.order_answers import read_order_answer
from worker.vendor.order_endpoint import OrderTarget, order_target


class OrderClient:
    """Sends the orders of one process. `send` raises no network error: what happened is in its reply."""

    def __init__(self, options: OrderOptions, scrubber: Scrubber, adapter: PooledAdapter) -> None:
        self._options = options
        self._scrubber = scrubber
        self._adapter = adapter

    def target(self, order: ClaimedOrder) -> OrderTarget:
        """Return where an order is posted. Raises NotTrackable if the key may not be sent there."""
        return order_target(order.endpoint, self._options.api)

    def send(self, order: ClaimedOrder, key: SecretStr, permit: Callable[[], object]) -> OrderReply:
        """Send an order with the key in its body, and return what the answer means. Raises the errors of `target`.

        `permit` is called when the connection is open, right before the first byte. Its exceptions are raised here, and
        nothing is sent then.
        """
        target = self.target(order)
        body = with_key(order.payload, key)
        headers = {**HEADERS, "User-Agent": self._options.user_agent, "Content-Length": str(len(body))}
        seconds = self._options.timeout
        limit = TimeLimit(seconds, permit)
        try:
            with limit:
                answer = self._adapter.post_once(
                    target.url, headers, body, (min(CONNECT_SECONDS, seconds), seconds), self._options.proxy
                )
        except NothingSent as error:
            return OrderNotSent(self._scrubber.text(f"not sent: {describe(error.reason)}"))
        except (requests.RequestException, HTTPError, OSError, ValueError) as error:
            cause = f"no answer within {seconds:g} s" if limit.expired else f"no answer: {describe(error)}"
            return AnswerLost(self._scrubber.text(f"sent whole ({len(body):,} bytes), {cause}"))
        if len(answer.body) > MAX_ANSWER_BYTES:
            return AnswerLost(f"HTTP {answer.status} with an answer of more than {MAX_ANSWER_BYTES} bytes")
        reply = read_order_answer(
            answer.status,
            answer.headers,
            self._scrubber.body(answer.body),
            target,
            self._options.api,
            now=time.time(),
            status_words=self._options.status_words,
        )
        return self._scrubbed(reply)

    def _scrubbed(self, reply: OrderReply) -> OrderReply:
        """Return the reply, its message without shortened keys either: APIs quote the beginning of a key."""
        if isinstance(reply, OrderTaken):
            return reply if reply.warning is None else replace(reply, warning=self._scrubber.text(reply.warning))
        message = self._scrubber.text(reply.message)
        return reply if message == reply.message else replace(reply, message=message)


def with_key(payload: str, key: SecretStr) -> bytes:
    """Return the request body of an order: its payload, a JSON object, with the key as its first field."""
    field = f'{{"key":{json.dumps(key.get_secret_value())}'
    rest = payload[1:]
    return (field + ("" if rest == "}" else ",") + rest).encode()
