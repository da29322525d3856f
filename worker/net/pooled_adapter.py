"""HTTP over pooled connections: an adapter of `requests` for the API, and plain calls for downloads and webhooks.

A plain `session.post` spends most of its time on merging settings, looking for proxies and cookies, on layers of pools
and responses, and on an e-mail parser for the headers. `send` writes a prepared POST in one piece to a pooled
connection, and reads the whole response, up to a limit, at once. Requests that need more (a proxy, a client
certificate, another CA bundle) are left to the parent class.

`exchange` serves downloads and webhooks: the address is sent unchanged, and the caller reads the body as it arrives.
`requests` and urllib3 would rewrite the path (`//`, `..`, percent-encoding) and decompress the body.
"""

import io
import re
import select
import socket
import ssl
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException, IncompleteRead, LineTooLong, RemoteDisconnected, UnknownProtocol
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from requests import PreparedRequest, Response, exceptions
from requests.structures import CaseInsensitiveDict
from urllib3.exceptions import ConnectTimeoutError, HTTPError
from urllib3.exceptions import SSLError as TlsError
from urllib3.response import HTTPResponse as DecodingResponse
from urllib3.util import parse_url

from worker.core.urls import split
from worker.net.deadlines import (
    MAX_HEADER_LINE,
    MAX_HEADERS,
    FinalResponse,
    TimedAdapter,
    TimedHTTPConnection,
    TimedHTTPSConnection,
    check_permit,
    seconds_left,
)

MAX_ORIGINS = 64  # hosts with pooled connections: downloads may go to any number of hosts
MAX_LENGTH_DIGITS = 19
RECEIVE_BYTES = 16_384  # more than a usual response has
MAX_RECEIVE_BYTES = 262_144
MIN_RETRY_SECONDS = 0.1  # with less time left, a request is not repeated
IDLE_SECONDS = 30.0  # an older connection may be dead without notice: a load balancer or NAT dropped it
PLAIN_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]_-]+(?:/[A-Za-z0-9._~!$&'()*+,;=:%/-]*)?")
HEX_DIGITS = b"0123456789abcdefABCDEF"
TARGET = re.compile(r"/[\x21-\x7e]*")  # the allowed request target
STATUS_LINE = re.compile(rb"HTTP/1\.1 ([2-9]\d\d)(|[ \t][^\r\n]*)(?=\r\n|\Z)")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\n]*)?\r?\n")

Connection = TimedHTTPConnection | TimedHTTPSConnection
Origin = tuple[str, str, int | None]  # scheme, host, port
T = TypeVar("T")

# Errors of a pooled connection that the server had closed, before any response. The request is sent once more (RFC
# 9110, section 9.2.2): a fetch or a download only reads, and a webhook is delivered at least once.
DEAD_CONNECTION_ERRORS = (
    RemoteDisconnected,
    ConnectionResetError,
    BrokenPipeError,
    ssl.SSLEOFError,
    ssl.SSLZeroReturnError,
)


class PooledAdapter(TimedAdapter):
    """Sends over pooled connections. `send` reads up to `limit` bytes, plus one to detect larger responses."""

    def __init__(
        self,
        *,
        connections: int,
        limit: int = 0,
        ca_bundle: str | None = None,
        plain: type[TimedHTTPConnection] = TimedHTTPConnection,
        tls: type[TimedHTTPSConnection] = TimedHTTPSConnection,
    ) -> None:
        super().__init__(connections=connections, ca_bundle=ca_bundle, plain=plain, tls=tls)
        self._connection_types = plain, tls
        self._limit = limit
        self._max_idle = connections
        self._idle: defaultdict[Origin, deque[tuple[Connection, float]]] = defaultdict(deque)
        weakref.finalize(self, _close_all, self._idle)

    def send(
        self,
        request: PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Mapping[str, str] | None = None,
    ) -> Response:
        """Send one request. `timeout` is (connect, read) in seconds. Raises the exceptions of requests."""
        url = request.url or ""
        plain = request.method == "POST" and PLAIN_URL.fullmatch(url) and isinstance(timeout, tuple)
        if not plain or proxies or cert or verify is not True:
            return super().send(
                request, stream=stream, timeout=timeout, verify=verify, cert=cert, proxies=dict(proxies or {})
            )
        try:
            return as_response(request, self.post(url, request.headers, request.body or b"", timeout))
        except exceptions.RequestException as error:
            error.request = request
            raise

    def post(
        self, url: str, headers: Mapping[str, str], body: bytes | str, timeout: tuple[float, float]
    ) -> "WholeAnswer":
        """Send one POST to a plain address and return the whole response. Raises the exceptions of requests."""
        if not PLAIN_URL.fullmatch(url):
            raise exceptions.InvalidURL("the address is malformed")
        scheme, _, after_scheme = url.partition("://")
        site, _, path = after_scheme.partition("/")
        origin = (scheme, *_host_and_port(site))
        request = _request_bytes("POST", f"/{path}", site, headers, body)
        try:
            connection, answer = self._exchange(origin, request, timeout, lambda sock: _read(sock, self._limit))
        except (HTTPError, HTTPException, OSError) as error:
            raise _as_requests_error(error) from error
        if answer.reusable:
            self._store(origin, connection)
        else:
            connection.close()
        return answer

    @contextmanager
    def exchange(
        self, method: str, url: str, headers: Mapping[str, str], timeout: tuple[float, float], body: bytes = b""
    ) -> Iterator["StreamedAnswer"]:
        """Send one request and yield the response. The caller reads its body with `read_piece`.

        `url` is sent unchanged: see `worker.core.urls.percent_encoded`. `timeout` is (connect, read) in seconds.
        Redirects are not followed, no proxy is used, and the body is not decompressed. Raises ValueError for a
        malformed address, and HTTPError, HTTPException and OSError.
        """
        site, target = split(url)
        parts = parse_url(site)
        if parts.scheme not in ("http", "https") or not parts.host or parts.auth or not TARGET.fullmatch(target):
            raise ValueError("the address is malformed")
        host_header = parts.host if parts.port is None else f"{parts.host}:{parts.port}"
        if body:
            headers = {**headers, "Content-Length": str(len(body))}
        origin = (parts.scheme, parts.host.strip("[]"), parts.port)
        connection, answer = self._exchange(
            origin,
            _request_bytes(method, target, host_header, headers, body),
            timeout,
            lambda sock: _with_headers_read(StreamedAnswer(sock, method)),
        )
        try:
            yield answer
        finally:
            reusable = answer.reusable
            answer.close()
            if reusable:
                self._store(origin, connection)
            else:
                connection.close()

    def _exchange(
        self,
        origin: Origin,
        request: bytes,
        timeout: tuple[float, float],
        read: Callable[[socket.socket], T],
    ) -> tuple[Connection, T]:
        """Send a request and read the response. Retry once if a pooled connection was dead."""
        pooled = self._take_pooled(origin)
        if pooled is not None:
            try:
                return pooled, _send_and_read(pooled, request, float(timeout[1]), read)
            except BaseException as error:
                self._close_pooled(origin)  # the other pooled connections may be dead, too
                if not isinstance(error, DEAD_CONNECTION_ERRORS) or seconds_left() < MIN_RETRY_SECONDS:
                    raise
        connection = self._new_connection(origin, float(timeout[0]))
        return connection, _send_and_read(connection, request, float(timeout[1]), read)

    def close(self) -> None:
        """Close every pooled connection."""
        for origin in list(self._idle):
            self._close_pooled(origin)
        super().close()

    def _take_pooled(self, origin: Origin) -> Connection | None:
        """Return a usable pooled connection, starting with the one used last, or None."""
        connections = self._idle.get(origin)  # does not add the origin: `_store` limits their number
        while connections is not None:
            try:
                connection, since = connections.pop()
            except IndexError:
                return None
            if connection.sock is not None and _is_quiet(connection.sock) and time.monotonic() - since < IDLE_SECONDS:
                return connection
            connection.close()
        return None

    def _store(self, origin: Origin, connection: Connection) -> None:
        if origin not in self._idle and len(self._idle) >= MAX_ORIGINS:
            with suppress(RuntimeError, StopIteration):  # other threads take some out meanwhile
                self._close_pooled(next(iter(self._idle)))
        connections, now = self._idle[origin], time.monotonic()
        connections.append((connection, now))
        with suppress(IndexError):  # other threads take some out meanwhile
            while len(connections) > self._max_idle or now - connections[0][1] > IDLE_SECONDS:
                connections.popleft()[0].close()

    def _close_pooled(self, origin: Origin) -> None:
        connections = self._idle.pop(origin, None)
        with suppress(IndexError):
            while connections:
                connections.pop()[0].close()

    def _new_connection(self, origin: Origin, timeout: float) -> Connection:
        scheme, host, port = origin
        plain, tls = self._connection_types
        if scheme == "https":
            return tls(host, port, timeout=timeout, ssl_context=self.context)
        return plain(host, port, timeout=timeout)


def _is_quiet(sock: socket.socket) -> bool:
    """Return whether nothing arrived since the last response: no unexpected bytes, and no end of the connection."""
    if isinstance(sock, ssl.SSLSocket) and sock.pending():  # read from the connection already, with its last record
        return False
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)


def _close_all(idle: "dict[Origin, deque[tuple[Connection, float]]]") -> None:
    for connections in list(idle.values()):
        for connection, _ in list(connections):
            connection.close()


def _send_and_read(connection: Connection, request: bytes, timeout: float, read: Callable[[socket.socket], T]) -> T:
    try:
        if connection.sock is None:
            connection.connect()  # with the connect time-out
        else:
            connection.watch()
        sock = cast("socket.socket", connection.sock)
        # Python polls a socket with a time-out before each operation. No time-out is needed if the watchdog ends the
        # whole call no later.
        wait = None if seconds_left() <= timeout else timeout
        if sock.gettimeout() != wait:
            sock.settimeout(wait)
        check_permit()
        sock.sendall(request)
        return read(sock)
    except BaseException:
        connection.close()
        raise


def _with_headers_read(raw: "StreamedAnswer") -> "StreamedAnswer":
    try:
        raw.begin()
    except BaseException:
        raw.close()
        raise
    return raw


class WholeAnswer(NamedTuple):
    """A response that was read completely, or up to one byte over the limit.

    `reusable` tells whether the connection can take another request.
    """

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes
    reusable: bool

    @property
    def encoded(self) -> bool:
        """Whether the body is compressed, although that was not requested."""
        return self.headers.get("content-encoding", "").lower() not in ("", "identity")


def _read(sock: socket.socket, limit: int) -> WholeAnswer:
    start = sock.recv(RECEIVE_BYTES)
    return _read_usual(start, sock, limit) or _read_any(start, sock, limit)


def _read_usual(start: bytes, sock: socket.socket, limit: int) -> WholeAnswer | None:
    """Read a usual HTTP/1.1 response: headers in one piece, with a declared length. Return None for any other.

    Other responses are left to `HttpAnswer`. It could read these, too, but takes five times as long.
    """
    head, end, body = start.partition(b"\r\n\r\n")
    first = STATUS_LINE.match(head)
    if not end or first is None or first[1] in (b"204", b"304"):
        return None
    lines = head[first.end() :].decode("latin-1").split("\r\n")[1:]
    if head.count(b"\n") != len(lines) or len(lines) > MAX_HEADERS:
        return None
    headers = dict[str, str]()
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            return None
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if "transfer-encoding" in headers:
        return None
    length = _length(headers.get("content-length"))
    if length is None or length > limit:
        return None
    if len(body) < length:
        body = _read_on(body, sock, length)
    reusable = len(body) == length and "close" not in headers.get("connection", "").lower()
    return WholeAnswer(int(first[1]), first[2].strip().decode("latin-1"), headers, body[:length], reusable)


def _read_on(start: bytes, sock: socket.socket, length: int) -> bytes:
    pieces, size = [start], len(start)
    while size < length:
        piece = sock.recv(min(length - size, MAX_RECEIVE_BYTES))
        if not piece:
            raise IncompleteRead(b"".join(pieces), length - size)
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def _read_any(start: bytes, sock: socket.socket, limit: int) -> WholeAnswer:
    raw = HttpAnswer(cast("socket.socket", _PartlyReadSocket(start, sock)), method="POST")
    try:
        raw.begin()
        body = raw.read(limit + 1)
    except BaseException:
        raw.close()
        raise
    if raw.length and len(body) <= limit:
        raise IncompleteRead(body, raw.length)
    return WholeAnswer(raw.status, raw.reason, raw.headers, body, raw.isclosed() and not raw.will_close)


class _PartlyReadSocket(io.RawIOBase):
    """A connection whose first bytes were read already: they are returned first."""

    def __init__(self, start: bytes, sock: socket.socket) -> None:
        self._start = start
        self._sock = sock

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the available bytes."""
        if not self._start:
            return self._sock.recv_into(buffer)
        size = min(len(self._start), len(buffer))
        buffer[:size], self._start = self._start[:size], self._start[size:]
        return size

    def settimeout(self, seconds: float) -> None:
        """Set the time-out of the connection."""
        self._sock.settimeout(seconds)

    def makefile(self, _: str) -> io.BufferedReader:
        """Return a buffered reader, as `HTTPResponse` expects."""
        return io.BufferedReader(self)


def _request_bytes(method: str, target: str, site: str, headers: Mapping[str, str], body: bytes | str) -> bytes:
    """Return the bytes of a request."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if lines.count("\r") != len(headers) or lines.count("\n") != len(headers):
        raise exceptions.InvalidHeader("a header with a line break in it")
    head = f"{method} {target} HTTP/1.1\r\nHost: {site}\r\nAccept-Encoding: identity\r\n{lines}\r\n"
    return head.encode("latin-1") + (body.encode() if isinstance(body, str) else body)


class HttpAnswer(FinalResponse):
    """A response whose headers are read line by line, without `http.client`'s e-mail parser."""

    headers: CaseInsensitiveDict[str]  # type: ignore[assignment]  # has the same read methods

    def __init__(self, sock: socket.socket, method: str) -> None:
        super().__init__(sock, method=method)
        self._sock = sock

    def _close_conn(self) -> None:
        self.will_close = self.will_close or self._has_extra_bytes()
        super()._close_conn()  # type: ignore[misc]  # not in the stubs

    def _has_extra_bytes(self) -> bool:
        """Return whether bytes after this response have arrived. The buffer with them is lost with the response."""
        try:
            self._sock.settimeout(0)
            return bool(self.fp.peek(1))
        except (OSError, ValueError):
            return False

    def begin(self) -> None:
        """Read up to the body. Raises the exceptions of `http.client`."""
        version, status, reason = self._read_status()
        if not version.startswith("HTTP/1."):
            raise UnknownProtocol(version)
        self.version = 10 if version == "HTTP/1.0" else 11
        self.code = self.status = status
        self.reason = reason.strip()
        self.headers = _read_headers(self.fp)
        empty = status in (204, 304)
        self.chunked = not empty and self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        self.chunk_left = None
        self.length = 0 if empty else None if self.chunked else self._declared_length()
        # Without a length, the end of the connection is the end of the response.
        self.will_close = self._check_close() or (not self.chunked and self.length is None)  # type: ignore[attr-defined]
        if "Transfer-Encoding" in self.headers and (not self.chunked or "Content-Length" in self.headers):
            self.will_close = True  # its end is ambiguous (RFC 9112, section 6.3)

    def _declared_length(self) -> int | None:
        return _length(self.headers.get("Content-Length"))

    def _read_next_chunk_size(self) -> int:
        """Read a chunk size more strictly than the parent: only hexadecimal digits, and the line must be complete.

        The size in a truncated line is unknown. `-1`, which Python accepts as a number, would be a chunk without an
        end.
        """
        line = self.fp.readline(MAX_HEADER_LINE + 1)
        size = CHUNK_SIZE.fullmatch(line) if len(line) <= MAX_HEADER_LINE else None
        if size is None:
            raise ValueError("a chunk without a size")
        return int(size[1], 16)


class StreamedAnswer(HttpAnswer):
    """A response whose body is read in pieces, even if its headers describe the body wrongly.

    An invalid length, or several different ones, counts as no length. A body that does not begin like a chunk is not
    chunked, whatever the header says. Bytes after the declared end can be read, too.
    """

    def __init__(self, sock: socket.socket, method: str) -> None:
        super().__init__(sock, method=method)
        self.remaining: int | None = None  # bytes of the body still to be read, if its length was declared
        self._started = False
        self._read_beyond = False

    def begin(self) -> None:
        """Read up to the body. Raises the exceptions of `http.client`."""
        super().begin()
        self.remaining, self.length = self.length, None  # counted here: http.client would close the response at the end

    def _declared_length(self) -> int | None:
        with suppress(HTTPException):
            return super()._declared_length()
        return None

    @property
    def reusable(self) -> bool:
        """Whether the connection can take another request: exactly the whole response was read."""
        whole = self.remaining == 0 or (self.chunked and self.isclosed())
        return (
            whole
            and not self._read_beyond
            and not (self.fp is not None and self._has_extra_bytes())
            and not self.will_close
        )

    def read_piece(self, size: int) -> bytes:
        """Return up to `size` bytes of the body, as soon as any arrive, or no bytes at its end.

        Raises OSError, HTTPException.
        """
        if self.isclosed() or self.remaining == 0:
            return b""
        if not self._started and self.chunked and self.fp.peek(1)[:1].strip(HEX_DIGITS):
            self.chunked, self.will_close = False, True
        self._started = True
        piece = self.read1(size if self.remaining is None else min(size, self.remaining))
        if self.remaining is not None:
            self.remaining -= len(piece)
        return piece

    def read_start(self, size: int, seconds: float) -> bytes:
        """Return up to `size` bytes of the body that arrive within `seconds`. Raises nothing."""
        until, start = time.monotonic() + seconds, b""
        with suppress(OSError, HTTPException):
            self._sock.settimeout(seconds)
            while time.monotonic() < until and len(start) < size and (piece := self.read_piece(size - len(start))):
                start += piece
        return start

    def read_beyond_end(self, size: int, seconds: float) -> bytes:
        """Return up to `size` bytes after the declared end, if any arrive within `seconds`."""
        self._read_beyond = True
        if self.isclosed():
            return b""
        with suppress(OSError):
            self._sock.settimeout(seconds)
            return self.fp.read1(size)
        return b""


def _read_headers(file: BinaryIO) -> CaseInsensitiveDict[str]:
    headers = CaseInsensitiveDict[str]()
    for _ in range(MAX_HEADERS + 1):
        line = file.readline(MAX_HEADER_LINE + 1)
        if len(line) > MAX_HEADER_LINE:
            raise LineTooLong("header line")
        if line in (b"\r\n", b"\n"):
            return headers
        if not line:
            raise HTTPException("a response that ends within its headers")
        name, _, value = line.decode("latin-1").partition(":")
        headers[name] = f"{headers[name]}, {value.strip()}" if name in headers else value.strip()
    raise HTTPException(f"more than {MAX_HEADERS} headers")


def _length(value: str | None) -> int | None:
    if value is None:
        return None
    lengths = {length.strip() for length in value.split(",")}  # the same length twice is valid
    length = lengths.pop()
    if lengths or not (length.isascii() and length.isdecimal() and len(length) < MAX_LENGTH_DIGITS):
        raise HTTPException("an invalid length")
    return int(length)


def _host_and_port(site: str) -> tuple[str, int | None]:
    host, colon, port = site.rpartition(":")
    if colon and port.isdecimal():
        return host.strip("[]"), int(port)
    return site.strip("[]"), None


def as_response(request: PreparedRequest, answer: WholeAnswer) -> Response:
    """Return an answer as a response of `requests`. A compressed body is decompressed when it is read."""
    response = Response()
    response.status_code = answer.status
    response.reason = answer.reason
    response.url = request.url or ""
    response.request = request
    response.headers = CaseInsensitiveDict(answer.headers)
    if answer.encoded:
        response.raw = DecodingResponse(
            io.BytesIO(answer.body), headers=dict(answer.headers), status=answer.status, preload_content=False
        )
    else:  # marked as read, as after `response.content`
        vars(response).update(_content=answer.body, _content_consumed=True)
    return response


def _as_requests_error(error: Exception) -> exceptions.RequestException:
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, (ssl.SSLError, TlsError)):
        return exceptions.SSLError(message)
    if isinstance(error, ConnectTimeoutError) and "NewConnection" not in message:
        return exceptions.ConnectTimeout(message)
    if isinstance(error, TimeoutError):
        return exceptions.ReadTimeout(message)
    return exceptions.ConnectionError(message)
