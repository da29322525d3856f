"""The shortest way for a request to the API that is still `requests`: an adapter that leaves out what we never need.

A plain `session.post` spends most of its time on merging settings, looking for proxies and cookies, on layers of pools
and responses, and on a parser for e-mail that reads the headers. This adapter writes a prepared POST in one piece to a
kept connection, and reads the whole bounded answer at once. What needs more (a proxy, a client certificate, another
bundle) takes the way of its parent.
"""

import io
import re
import socket
import ssl
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException, HTTPResponse, IncompleteRead, LineTooLong, RemoteDisconnected, UnknownProtocol
from typing import Any, BinaryIO, cast

from requests import PreparedRequest, Response, exceptions
from requests.structures import CaseInsensitiveDict
from urllib3.exceptions import ConnectTimeoutError, HTTPError
from urllib3.exceptions import SSLError as TlsError
from urllib3.response import HTTPResponse as DecodingResponse

from worker.timed_http import TimedAdapter, TimedHTTPConnection, TimedHTTPSConnection, ask_permission, seconds_left

MOST_HEADERS = 100
LONGEST_LINE = 65_536
MOST_DIGITS = 19
LEAST_SECONDS = 0.1  # with less time left nothing is asked again
IDLE_SECONDS = 30.0  # an older connection may be dead without a word: a balancer or a NAT forgot it
PLAIN_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]_-]+(?:/[A-Za-z0-9._~!$&'()*+,;=:%/-]*)?")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\n]*)?\r?\n")

Connection = TimedHTTPConnection | TimedHTTPSConnection

# How a kept connection fails that the server had closed. Asking again is safe: a fetch only reads.
DEAD = (RemoteDisconnected, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class LeanAdapter(TimedAdapter):
    """Sends over kept connections, and reads answers of up to `limit` bytes (and one more, to tell larger ones)."""

    def __init__(self, *, limit: int, connections: int, ca_bundle: str | None = None) -> None:
        super().__init__(connections=connections, ca_bundle=ca_bundle)
        self._limit = limit
        self._keep = connections
        self._idle: defaultdict[str, deque[tuple[Connection, float]]] = defaultdict(deque)

    def send(
        self,
        request: PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Mapping[str, str] | None = None,
    ) -> Response:
        """Sends one request. `timeout` is (connect, read) in seconds. Raises the exceptions of requests."""
        url = request.url or ""
        plain = request.method == "POST" and PLAIN_URL.fullmatch(url) and isinstance(timeout, tuple)
        if not plain or proxies or cert or verify is not True:
            return super().send(
                request, stream=stream, timeout=timeout, verify=verify, cert=cert, proxies=dict(proxies or {})
            )
        scheme, _, rest = url.partition("://")
        site, _, path = rest.partition("/")
        words = _written(request, site, f"/{path}")
        try:
            connection, raw, body = self._ask(scheme, site, words, timeout)
        except (HTTPError, HTTPException, OSError) as error:
            raise _as_requests_says_it(error, request) from None
        if raw.will_close or not raw.isclosed():
            connection.close()
        else:
            self._put_by(f"{scheme}://{site}", connection)
        return _response(request, raw, body)

    def _ask(
        self, scheme: str, site: str, words: bytes, timeout: tuple[float, float]
    ) -> tuple[Connection, "Answer", bytes]:
        """One exchange; a second one, where the first went over a kept connection that turned out to be dead."""
        origin = f"{scheme}://{site}"
        kept = self._kept(origin)
        if kept is not None:
            try:
                return kept, *self._exchange(kept, words, float(timeout[1]))
            except BaseException as error:
                self._drop(origin)  # what ended this one may have ended them all
                if not isinstance(error, DEAD) or seconds_left() < LEAST_SECONDS:
                    raise
        connection = self._new(scheme, site, float(timeout[0]))
        return connection, *self._exchange(connection, words, float(timeout[1]))

    def close(self) -> None:
        """Closes every kept connection."""
        for origin in list(self._idle):
            self._drop(origin)
        super().close()

    def _kept(self, origin: str) -> Connection | None:
        """The connection used last, if it stands: it is the likeliest to."""
        kept = self._idle[origin]
        while True:
            try:
                connection, since = kept.pop()
            except IndexError:
                return None
            if connection.is_connected and time.monotonic() - since < IDLE_SECONDS:
                return connection
            connection.close()

    def _put_by(self, origin: str, connection: Connection) -> None:
        kept, now = self._idle[origin], time.monotonic()
        kept.append((connection, now))
        with suppress(IndexError):  # other threads take some out meanwhile
            while len(kept) > self._keep or now - kept[0][1] > IDLE_SECONDS:
                kept.popleft()[0].close()

    def _drop(self, origin: str) -> None:
        kept = self._idle[origin]
        with suppress(IndexError):
            while True:
                kept.pop()[0].close()

    def _new(self, scheme: str, site: str, timeout: float) -> Connection:
        host, port = _host_and_port(site)
        if scheme == "https":
            return TimedHTTPSConnection(host, port, timeout=timeout, ssl_context=self.context)
        return TimedHTTPConnection(host, port, timeout=timeout)

    def _exchange(self, connection: Connection, request: bytes, timeout: float) -> tuple["Answer", bytes]:
        try:
            if connection.sock is None:
                connection.connect()
                sock = cast("socket.socket", connection.sock)
                sock.settimeout(timeout)  # until now it had the time-out of the connecting
            else:
                connection.watch()
                sock = connection.sock
            ask_permission()
            sock.sendall(request)
            return _read(Answer(sock, method="POST"), self._limit)
        except BaseException:
            connection.close()
            raise


def _read(raw: "Answer", limit: int) -> tuple["Answer", bytes]:
    try:
        raw.begin()
        body = raw.read(limit + 1)
    except BaseException:
        raw.close()
        raise
    if raw.length and len(body) <= limit:
        raise IncompleteRead(body, raw.length)
    return raw, body


def _written(request: PreparedRequest, site: str, path: str) -> bytes:
    """A request as it goes over the line."""
    headers = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    if headers.count("\r") != len(request.headers) or headers.count("\n") != len(request.headers):
        raise exceptions.InvalidHeader("a header with a line break in it", request=request)
    head = f"{request.method} {path} HTTP/1.1\r\nHost: {site}\r\nAccept-Encoding: identity\r\n{headers}\r\n"
    body = request.body or b""
    return head.encode("latin-1") + (body.encode() if isinstance(body, str) else body)


class Answer(HTTPResponse):
    """An answer whose headers are read line by line, without `http.client`'s parser for e-mail."""

    headers: CaseInsensitiveDict[str]  # type: ignore[assignment]  # reads the same

    def begin(self) -> None:
        """Reads up to the body. Raises the exceptions of `http.client`."""
        version, status, reason = self._read_status()  # type: ignore[attr-defined]  # the stubs leave it out
        while 100 <= status < 200:  # a word in between
            _read_headers(self.fp)
            version, status, reason = self._read_status()  # type: ignore[attr-defined]
        if not version.startswith("HTTP/1."):
            raise UnknownProtocol(version)
        self.version = 10 if version == "HTTP/1.0" else 11
        self.code = self.status = status
        self.reason = reason.strip()
        self.headers = _read_headers(self.fp)
        empty = status in (204, 304)
        self.chunked = not empty and self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        self.chunk_left = None
        self.length = 0 if empty else None if self.chunked else _length(self.headers.get("Content-Length"))
        # Without a length the end of the connection is the end of the answer.
        self.will_close = self._check_close() or (not self.chunked and self.length is None)  # type: ignore[attr-defined]

    def _read_next_chunk_size(self) -> int:
        """As the parent reads it, but a size is hexadecimal digits and its line has an end.

        Of a line that is cut off nobody knows the size; and `-1`, a number to Python, would be a chunk without an end.
        """
        line = self.fp.readline(LONGEST_LINE + 1)
        size = CHUNK_SIZE.fullmatch(line) if len(line) <= LONGEST_LINE else None
        if size is None:
            raise ValueError("a chunk without a size")
        return int(size[1], 16)


def _read_headers(file: BinaryIO) -> CaseInsensitiveDict[str]:
    found = CaseInsensitiveDict[str]()
    for _ in range(MOST_HEADERS + 1):
        line = file.readline(LONGEST_LINE + 1)
        if len(line) > LONGEST_LINE:
            raise LineTooLong("header line")
        if line in (b"\r\n", b"\n"):
            return found
        if not line:
            raise HTTPException("an answer that ends within its headers")
        name, _, value = line.decode("latin-1").partition(":")
        found[name] = f"{found[name]}, {value.strip()}" if name in found else value.strip()
    raise HTTPException(f"more than {MOST_HEADERS} headers")


def _length(said: str | None) -> int | None:
    if said is None:
        return None
    lengths = {one.strip() for one in said.split(",")}  # the same length twice is a length
    one = lengths.pop()
    if lengths or not (one.isascii() and one.isdecimal() and len(one) < MOST_DIGITS):
        raise HTTPException("a length that is none")
    return int(one)


def _host_and_port(site: str) -> tuple[str, int | None]:
    host, colon, port = site.rpartition(":")
    if colon and port.isdecimal():
        return host.strip("[]"), int(port)
    return site.strip("[]"), None


def _response(request: PreparedRequest, raw: Answer, body: bytes) -> Response:
    response = Response()
    response.status_code = raw.status
    response.reason = raw.reason
    response.url = request.url or ""
    response.request = request
    response.headers = raw.headers
    encoding = raw.headers.get("Content-Encoding")
    if encoding and encoding.lower() != "identity":
        response.raw = DecodingResponse(
            io.BytesIO(body), headers=dict(raw.headers.items()), status=raw.status, preload_content=False
        )
    else:
        vars(response).update(_content=body, _content_consumed=True)  # read already, as after `response.content`
    return response


def _as_requests_says_it(error: Exception, request: PreparedRequest) -> exceptions.RequestException:
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, (ssl.SSLError, TlsError)):
        return exceptions.SSLError(said, request=request)
    if isinstance(error, ConnectTimeoutError) and "NewConnection" not in said:
        return exceptions.ConnectTimeout(said, request=request)
    if isinstance(error, TimeoutError):
        return exceptions.ReadTimeout(said, request=request)
    return exceptions.ConnectionError(said, request=request)
