"""Every call to the hosted API. Raises nothing: what does not lead to an answer is a reply of its own, `ApiDown`."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
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
from worker.net.pooled_adapter import PooledAdapter, as_response
from worker.polling.kept_text import RAW_BYTES, KeptText, kept_text, raw_answer
from worker.system.redaction import Scrubber
from worker.vendor.families import is_training
from worker.vendor.fetch_url import AllowedApi, call_for, fetch_address
from worker.vendor.replies import Question, parse
from worker.vendor.shapes import TOO_LARGE

MAX_ANSWER_BYTES = 32 * 1024 * 1024
CHUNK_BYTES = 64 * 1024
LARGE_ANSWER_BYTES = 1024 * 1024  # larger ones are parsed one after the other: parsed, they take several times as much
CONNECT_SECONDS = 10.0
HEADERS = {
    "Accept": "application/json",
    "Content-Type": "application/json",
}


class ApiClient:
    """The API as one process sees it: one pooled session for all its threads, without netrc or cookies.

    `session` is a plain `requests.Session`: an adapter that is mounted on it is used, as are proxies that were given.
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
        self._parsing_large = threading.Lock()  # of this process: a child would inherit it locked
        self._scrubber = scrubber
        self._timeout = timeout
        self._status_words = dict(status_words or {})
        self._headers = {"User-Agent": user_agent, **HEADERS}
        self._own_fetch = f"{allowed.url}/fetch/"
        own = adapter or PooledAdapter(limit=MAX_ANSWER_BYTES, connections=connections, ca_bundle=ca_bundle)
        self.session = lean_session(own)
        if proxy is not None:
            self.session.proxies = {"http": proxy, "https": proxy}

    def lists(self, host: str) -> bool:
        """Return whether the settings let the key go to a host, written as `host` or `host:port`."""
        return host in self._allowed.hosts

    def default_address(self, remote_id: str) -> FetchAddress:
        """Return where a job is asked about that names no address itself."""
        return fetch_address(None, remote_id, self._allowed)

    def permits(self, address: FetchAddress, remote_id: str) -> str | None:
        """Why the key may not go to this address, or None. Asked before each call, since settings change."""
        if address.url == self._own_fetch + remote_id:
            return None
        try:
            fetch_address(address.url, remote_id, self._allowed)
        except RefusedAddress as refused:
            return str(refused)
        return None

    def ask(
        self, address: FetchAddress, remote_id: str, key: SecretStr, permit: Callable[[], object] | None = None
    ) -> ApiReply:
        """Ask about one job: one request with the key in its body, never redirected, over within the time-out.

        `permit` is called right before it is sent; what it raises is raised here.
        """
        try:
            answer = self._call(address, remote_id, key, permit)
        except Unavailable as silence:
            return ApiReply(ApiDown(str(silence)))
        if len(answer.body) > MAX_ANSWER_BYTES:
            unread = Unread(f"HTTP {answer.status} with an answer of more than {MAX_ANSWER_BYTES} bytes")
            body = self._scrubber.body(answer.body[:LARGE_ANSWER_BYTES])  # far more of it than is kept
            return ApiReply(unread, raw_answer(answer.status, body, self._scrubber, TOO_LARGE))
        question = Question(remote_id, time.time(), is_training(address.base), self._status_words)
        with self._parsing_large if len(answer.body) > LARGE_ANSWER_BYTES else nullcontext():
            return read_answer(self._scrubber, answer.status, answer.headers, answer.body, question)

    def whole_answer(self, address: FetchAddress, remote_id: str, key: SecretStr) -> tuple[int, bytes]:
        """Ask about one job as `ask` does; return the HTTP status and the body, without any key in it.

        Raises RefusedAddress where the key may not go there, Unavailable where no answer comes.
        """
        if (refused := self.permits(address, remote_id)) is not None:
            raise RefusedAddress(refused)
        answer = self._call(address, remote_id, key, None)
        return answer.status, self._scrubber.body(answer.body[:MAX_ANSWER_BYTES])

    def _call(
        self, address: FetchAddress, remote_id: str, key: SecretStr, permit: Callable[[], object] | None
    ) -> "_Received":
        """Send the request about one job. Raises Unavailable where no answer comes, and whatever `permit` raises."""
        call = call_for(address)
        words = {"key": key.get_secret_value()}
        if call.id_field is not None:
            words[call.id_field] = remote_id
        limit = TimeLimit(self._timeout, permit)
        try:
            with limit:
                return self._send(call.method, address.url, json.dumps(words).encode(), limit)
        except (requests.RequestException, HTTPError, OSError, ValueError) as error:
            cause = f"none within {self._timeout:g} s" if limit.expired else describe(error)
            raise Unavailable(self._scrubber.text(f"no answer: {cause}")) from None

    def kept_text(self, raw: RawAnswer) -> KeptText:
        """Return what may be kept of an answer."""
        return kept_text(raw, self._scrubber)

    def _send(self, method: str, url: str, body: bytes, limit: TimeLimit) -> "_Received":
        """Send a request. Of an answer that is too large the body is a byte, or a chunk, longer than the limit."""
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
            # Straight to the connection: the objects of `requests` would take longer than all the rest.
            answer = adapter.post(url, self._headers | {"Content-Length": str(len(body))}, body, timeout)
            if not answer.encoded:
                return _in_time(limit, answer.status, answer.headers, answer.body)
            response = as_response(_prepared(method, url, self._headers, body), answer)
        else:
            response = adapter.send(
                _prepared(method, url, self._headers, body),
                stream=True,
                timeout=timeout,
                verify=verify,
                cert=session.cert,
                proxies=session.proxies,
            )
        try:
            received = _bounded(response, limit)
        finally:
            response.close()
        return _in_time(limit, response.status_code, response.headers, received)


def read_answer(
    scrubber: Scrubber, status: int, headers: Mapping[str, str], body: bytes, question: Question
) -> ApiReply:
    """Return what an answer means, and the answer where it may be kept, both without any key."""
    scrubbed = scrubber.body(body)
    reply = parse(status, headers, scrubbed, question)
    if isinstance(reply, Ready):
        return ApiReply(_scrubbed(reply, scrubber))
    # Hardly any answer of a job that is not ready is kept, so a long one is not searched again for its shape.
    shape = TOO_LARGE if isinstance(reply, Processing) and len(scrubbed) > RAW_BYTES else None
    raw = raw_answer(status, scrubbed, scrubber, shape)
    return ApiReply(_scrubbed(reply, scrubber), raw)


class _Received(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


def _in_time(limit: TimeLimit, status: int, headers: Mapping[str, str], body: bytes) -> _Received:
    if limit.expired:  # where no length was declared, a connection that the watchdog ended looks like the end
        raise requests.Timeout("the whole call took too long")
    return _Received(status, headers, body)


def _scrubbed(reply: Reply, scrubber: Scrubber) -> Reply:
    """The reply, its message without the beginning of a key either: APIs shorten keys that they quote."""
    if isinstance(reply, Processing | Ready | Empty):
        return reply
    if isinstance(reply, AnotherJob):
        return replace(reply, echoed=scrubber.text(reply.echoed))
    message = scrubber.text(reply.message)
    return reply if message is reply.message else replace(reply, message=message)


def _prepared(method: str, url: str, headers: Mapping[str, str], body: bytes) -> PreparedRequest:
    """A request as `Session.prepare_request` would make it, without going through all that we never use."""
    request = PreparedRequest()
    request.method = method
    request.url = url
    request.headers = CaseInsensitiveDict(headers)
    request.headers["Content-Length"] = str(len(body))
    request.body = body
    return request


def _bounded(response: requests.Response, limit: TimeLimit) -> bytes:
    """Return the body, of one that is too large as much as shows that it is."""
    chunks = list[bytes]()
    size = 0
    for chunk in response.iter_content(CHUNK_BYTES):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES or limit.expired:
            break
    return b"".join(chunks)
