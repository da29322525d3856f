"""HTTP client for the hosted API. `ask` raises no network error: a request without an answer returns `ApiDown`."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import NamedTuple

import requests
from pydantic import SecretStr
from requests import PreparedRequest
from requests.structures import CaseInsensitiveDict
from urllib3.exceptions import HTTPError

from worker.core.identity import FetchAddress
from worker.core.reply import AnotherJob, ApiDown, ApiReply, Empty, Processing, RawAnswer, Ready, Reply, Unread
from worker.errors import RefusedAddress, Unavailable
from worker.net.deadlines import TimeLimit, lean_session
from worker.net.network_errors import describe
from worker.net.pooled_adapter import PooledAdapter
from worker.polling.kept_text import RAW_BYTES, KeptText, kept_text, raw_answer
from worker.system.redaction import Scrubber
from worker.vendor.families import is_training
from worker.vendor.fetch_url import AllowedApi, call_for, fetch_address
from worker.vendor.order_endpoint import address_of_order
from worker.vendor.recent_outputs import (
    ListPage,
    ListRefused,
    ListReply,
    ListRequest,
    list_fields,
    list_url,
    read_recent_outputs,
)
from worker.vendor.replies import Question, parse
from worker.vendor.shapes import TOO_LARGE

MAX_ANSWER_BYTES = 32 * 1024 * 1024
CHUNK_BYTES = 64 * 1024
LARGE_ANSWER_BYTES = 1024 * 1024  # parsed one at a time, since parsing takes several times their size in memory
CONNECT_SECONDS = 10.0
HEADERS = {
    "Accept": "application/json",
    "Content-Type": "application/json",
}


class ApiClient:
    """The API client of one process: one pooled session for all threads, without netrc or cookies.

    `session` is a plain `requests.Session`. It uses the adapter that is mounted on it, and its proxies.
    """

    def __init__(
        self,
        allowed: AllowedApi,
        scrubber: Scrubber,
        *,
        timeout: float,
        connections: int,
        ca_bundle: str | None = None,
        proxy: str | None = None,
        adapter: PooledAdapter | None = None,
        user_agent: str = "fetch-worker",
        status_words: Mapping[str, str] | None = None,
    ) -> None:
        self._allowed = allowed
        self._parsing_large = threading.Lock()  # one per process: a forked child could inherit it locked
        self._scrubber = scrubber
        self._timeout = timeout
        self._status_words = dict(status_words or {})
        self._headers = {"User-Agent": user_agent, **HEADERS}
        self._default_fetch_url = f"{allowed.url}/fetch/"
        default_adapter = adapter or PooledAdapter(limit=MAX_ANSWER_BYTES, connections=connections, ca_bundle=ca_bundle)
        self.session = lean_session(default_adapter)
        if proxy is not None:
            self.session.proxies = {"http": proxy, "https": proxy}

    def lists(self, host: str) -> bool:
        """Return whether the key may be sent to a host, given as `host` or `host:port`."""
        return host in self._allowed.hosts

    def default_address(self, remote_id: str) -> FetchAddress:
        """Return the fetch address of a job that has no address of its own."""
        return fetch_address(None, remote_id, self._allowed)

    def corrected_address(self, address: FetchAddress, remote_id: str) -> FetchAddress | None:
        """Return the default address if it has the host of `address`, but another path: SD_API_URL was corrected."""
        default = self.default_address(remote_id)
        return default if default.host == address.host and default.base != address.base else None

    def address_of_order(self, endpoint: str, remote_id: str) -> FetchAddress:
        """Return the fetch address of the job that an order created. Raises NotTrackable and RefusedAddress."""
        return address_of_order(endpoint, remote_id, self._allowed)

    def permits(self, address: FetchAddress, remote_id: str) -> str | None:
        """Return why the key may not be sent to this address, or None if it may.

        Called before each request, since settings can change.
        """
        if address.url == self._default_fetch_url + remote_id:
            return None
        try:
            fetch_address(address.url, remote_id, self._allowed)
        except RefusedAddress as error:
            return str(error)
        return None

    def ask(
        self, address: FetchAddress, remote_id: str, key: SecretStr, permit: Callable[[], object] | None = None
    ) -> ApiReply:
        """Poll one job: send one request with the key in its body. It follows no redirect and ends within the time-out.

        `permit` is called right before the request is sent. Its exceptions are raised here.
        """
        return self._ask(address, remote_id, key, permit)[0]

    def ask_whole(self, address: FetchAddress, remote_id: str, key: SecretStr) -> "WholeReply":
        """Poll one job as `ask` does. Return the reply, and the body without keys. It is empty if it was too large."""
        reply, answer = self._ask(address, remote_id, key, None)
        return WholeReply(reply, b"" if answer is None else self._scrubber.body(answer.body))

    def _ask(
        self, address: FetchAddress, remote_id: str, key: SecretStr, permit: Callable[[], object] | None
    ) -> "tuple[ApiReply, _RawResponse | None]":
        try:
            answer = self._call(address, remote_id, key, permit)
        except Unavailable as error:
            return ApiReply(ApiDown(str(error))), None
        if len(answer.body) > MAX_ANSWER_BYTES:
            unread = Unread(f"HTTP {answer.status} with an answer of more than {MAX_ANSWER_BYTES} bytes")
            body = self._scrubber.body(answer.body[:LARGE_ANSWER_BYTES])  # much more than is stored
            return ApiReply(unread, raw_answer(answer.status, body, self._scrubber, TOO_LARGE)), None
        question = Question(remote_id, time.time(), is_training(address.base), self._status_words)
        with self._parsing(answer.body):
            return read_answer(self._scrubber, answer.status, answer.headers, answer.body, question), answer

    def whole_answer(self, address: FetchAddress, remote_id: str, key: SecretStr) -> tuple[int, bytes]:
        """Poll one job as `ask` does. Return the HTTP status and the body, with every key removed.

        Raises RefusedAddress if the key may not be sent to the address, and Unavailable if no answer comes.
        """
        if (refusal := self.permits(address, remote_id)) is not None:
            raise RefusedAddress(refusal)
        answer = self._call(address, remote_id, key, None)
        return answer.status, self._scrubber.body(answer.body[:MAX_ANSWER_BYTES])

    def recent_outputs(self, request: ListRequest, key: SecretStr) -> ListReply:
        """Ask for one page of the API's list of recent outputs. The limits are those of `ask`.

        Raises RefusedAddress if the key may not be sent there, and Unavailable if no answer comes.
        """
        answer = self._request("POST", list_url(request, self._allowed), list_fields(request), key)
        if len(answer.body) > MAX_ANSWER_BYTES:
            return ListRefused(f"HTTP {answer.status} with an answer of more than {MAX_ANSWER_BYTES} bytes")
        with self._parsing(answer.body):
            body = self._scrubber.body(answer.body)
            reply = read_recent_outputs(answer.status, answer.headers, body, request, now=time.time())
        return reply if isinstance(reply, ListPage) else replace(reply, message=self._scrubber.text(reply.message))

    def _parsing(self, body: bytes) -> AbstractContextManager[object]:
        """Return the context in which an answer is parsed: large ones one at a time."""
        return self._parsing_large if len(body) > LARGE_ANSWER_BYTES else nullcontext()

    def _call(
        self, address: FetchAddress, remote_id: str, key: SecretStr, permit: Callable[[], object] | None
    ) -> "_RawResponse":
        """Send the request about one job. Raises Unavailable if no answer comes, and whatever `permit` raises."""
        fetch_call = call_for(address)
        fields = {} if fetch_call.id_field is None else {fetch_call.id_field: remote_id}
        return self._request(fetch_call.method, address.url, fields, key, permit)

    def _request(
        self,
        method: str,
        url: str,
        fields: Mapping[str, object],
        key: SecretStr,
        permit: Callable[[], object] | None = None,
    ) -> "_RawResponse":
        """Send one request with the key in its body. Raises Unavailable without an answer, and what `permit` raises."""
        body = json.dumps({"key": key.get_secret_value(), **fields}).encode()
        limit = TimeLimit(self._timeout, permit)
        try:
            with limit:
                return self._send(method, url, body, limit)
        except (requests.RequestException, HTTPError, OSError, ValueError) as error:
            cause = f"none within {self._timeout:g} s" if limit.expired else describe(error)
            raise Unavailable(self._scrubber.text(f"no answer: {cause}")) from None

    def kept_text(self, raw: RawAnswer) -> KeptText:
        """Return the part of an answer that may be stored."""
        return kept_text(raw, self._scrubber)

    def _send(self, method: str, url: str, body: bytes, limit: TimeLimit) -> "_RawResponse":
        """Send a request and return the answer. The body of a too large answer exceeds the limit by up to one chunk."""
        session = self.session
        adapter = session.get_adapter(url)
        timeout = min(CONNECT_SECONDS, self._timeout), self._timeout
        verify = True if session.verify is None else session.verify
        if (
            type(adapter) is PooledAdapter
            and method == "POST"
            and verify is True
            and not (session.proxies or session.cert)
        ):
            # Call the adapter directly. Building the objects of `requests` would take longer than the rest of the call.
            answer = adapter.post(url, self._headers | {"Content-Length": str(len(body))}, body, timeout)
            content = _joined(answer.decompressed(CHUNK_BYTES), limit) if answer.encoded else answer.body
            return _checked_answer(limit, answer.status, answer.headers, content)
        response = adapter.send(
            _prepare_request(method, url, self._headers, body),
            stream=True,
            timeout=timeout,
            verify=verify,
            cert=session.cert,
            proxies=session.proxies,
        )
        with closing(response):
            content = _joined(response.iter_content(CHUNK_BYTES), limit)
        return _checked_answer(limit, response.status_code, response.headers, content)


class WholeReply(NamedTuple):
    """A reply, and the body of the answer, from which every key is removed."""

    reply: ApiReply
    body: bytes = b""


def read_answer(
    scrubber: Scrubber, status: int, headers: Mapping[str, str], body: bytes, question: Question
) -> ApiReply:
    """Parse an answer. Return the reply, and the raw answer if it may be stored, both without any key."""
    scrubbed = scrubber.body(body)
    reply = parse(status, headers, scrubbed, question)
    if isinstance(reply, Ready):
        return ApiReply(_scrubbed(reply, scrubber))
    # Answers of jobs that are not ready are rarely stored, so a long one is not searched again for its shape.
    shape = TOO_LARGE if isinstance(reply, Processing) and len(scrubbed) > RAW_BYTES else None
    raw = raw_answer(status, scrubbed, scrubber, shape)
    return ApiReply(_scrubbed(reply, scrubber), raw)


class _RawResponse(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


def _checked_answer(limit: TimeLimit, status: int, headers: Mapping[str, str], body: bytes) -> _RawResponse:
    if limit.expired:  # without a declared length, a connection closed by the watchdog looks like the end
        raise requests.Timeout("the whole call took too long")
    return _RawResponse(status, headers, body)


def _scrubbed(reply: Reply, scrubber: Scrubber) -> Reply:
    """Return the reply, its message without shortened keys either: APIs quote the beginning of a key."""
    if isinstance(reply, Processing | Ready | Empty):
        return reply
    if isinstance(reply, AnotherJob):
        return replace(reply, echoed=scrubber.text(reply.echoed))
    message = scrubber.text(reply.message)
    return reply if message is reply.message else replace(reply, message=message)


def _prepare_request(method: str, url: str, headers: Mapping[str, str], body: bytes) -> PreparedRequest:
    """Return a request as `Session.prepare_request` would, without the steps that this client does not need."""
    request = PreparedRequest()
    request.method = method
    request.url = url
    request.headers = CaseInsensitiveDict(headers)
    request.headers["Content-Length"] = str(len(body))
    request.body = body
    return request


def _joined(chunks: Iterable[bytes], limit: TimeLimit) -> bytes:
    """Return the body. Stop reading once it is larger than the limit."""
    pieces = list[bytes]()
    size = 0
    for chunk in chunks:
        pieces.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES or limit.expired:
            break
    return b"".join(pieces)
