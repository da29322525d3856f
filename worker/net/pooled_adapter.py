"""HTTP over kept connections, without what we never need: for the API as an adapter of `requests`, for others plain.

A plain `session.post` spends most of its time on merging settings, looking for proxies and cookies, on layers of pools
and responses, and on a parser for e-mail that reads the headers. `send` writes a prepared POST in one piece to a
kept connection, and reads the whole bounded answer at once. What needs more (a proxy, a client certificate, another
bundle) takes the way of its parent.

`exchange` is for downloads and webhooks: the address goes out as it was given, and the body is read by the caller, as
it comes. `requests` and urllib3 would rewrite the path (`//`, `..`, percent-encoding) and unpack the body.
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
    LONGEST_HEADER_LINE,
    MOST_HEADERS,
    FinalResponse,
    TimedAdapter,
    TimedHTTPConnection,
    TimedHTTPSConnection,
    check_permit,
    seconds_left,
)

MOST_SITES = 64  # that connections are kept to: downloads may go to any number of hosts
MOST_DIGITS = 19
RECEIVE_BYTES = 16_384  # more than the usual answer has
RECEIVE_MOST = 262_144
LEAST_SECONDS = 0.1  # with less time left nothing is asked again
IDLE_SECONDS = 30.0  # an older connection may be dead without a word: a balancer or a NAT forgot it
PLAIN_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]_-]+(?:/[A-Za-z0-9._~!$&'()*+,;=:%/-]*)?")
HEX_DIGITS = b"0123456789abcdefABCDEF"
TARGET = re.compile(r"/[\x21-\x7e]*")  # what may stand in the first line of a request
STATUS_LINE = re.compile(rb"HTTP/1\.1 ([2-9]\d\d)(|[ \t][^\r\n]*)(?=\r\n|\Z)")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\n]*)?\r?\n")

Connection = TimedHTTPConnection | TimedHTTPSConnection
Origin = tuple[str, str, int | None]  # scheme, host, port
T = TypeVar("T")

# How a kept connection fails that the server had closed: before any answer, so the request is sent once more
# (RFC 9110, section 9.2.2). A fetch or a download only reads, and a webhook is delivered at least once.
DEAD = (RemoteDisconnected, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class PooledAdapter(TimedAdapter):
    """Sends over kept connections; `send` reads answers of up to `limit` bytes (and one more, to tell larger ones)."""

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
        self._keep = connections
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
        """Sends one request. `timeout` is (connect, read) in seconds. Raises the exceptions of requests."""
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
        """Send one POST to a plain address, as `send` does, and return what came. Raises the exceptions of requests."""
        if not PLAIN_URL.fullmatch(url):
            raise exceptions.InvalidURL("the address is malformed")
        scheme, _, rest = url.partition("://")
        site, _, path = rest.partition("/")
        origin = (scheme, *_host_and_port(site))
        request = _request_bytes("POST", f"/{path}", site, headers, body)
        try:
            connection, answer = self._ask(origin, request, timeout, lambda sock: _read(sock, self._limit))
        except (HTTPError, HTTPException, OSError) as error:
            raise _as_requests_says_it(error) from error
        if answer.reusable:
            self._put_by(origin, connection)
        else:
            connection.close()
        return answer

    @contextmanager
    def exchange(
        self, method: str, url: str, headers: Mapping[str, str], timeout: tuple[float, float], body: bytes = b""
    ) -> Iterator["StreamedAnswer"]:
        """Send one request and yield the answer, whose body the caller reads by `piece`.

        `url` goes out as it is: see `worker.core.urls.quoted`. `timeout` is (connect, read) in seconds. No redirect is
        followed, no proxy used, and nothing unpacked. Raises ValueError for an address that is none, HTTPError,
        HTTPException and OSError.
        """
        site, target = split(url)
        parts = parse_url(site)
        if parts.scheme not in ("http", "https") or not parts.host or parts.auth or not TARGET.fullmatch(target):
            raise ValueError("the address is malformed")
        named = parts.host if parts.port is None else f"{parts.host}:{parts.port}"
        if body:
            headers = {**headers, "Content-Length": str(len(body))}
        origin = (parts.scheme, parts.host.strip("[]"), parts.port)
        connection, answer = self._ask(
            origin,
            _request_bytes(method, target, named, headers, body),
            timeout,
            lambda sock: _begun(StreamedAnswer(sock, method)),
        )
        try:
            yield answer
        finally:
            reusable = answer.reusable
            answer.close()
            if reusable:
                self._put_by(origin, connection)
            else:
                connection.close()

    def _ask(
        self,
        origin: Origin,
        request: bytes,
        timeout: tuple[float, float],
        read: Callable[[socket.socket], T],
    ) -> tuple[Connection, T]:
        """One exchange; a second one, where the first went over a kept connection that turned out to be dead."""
        kept = self._kept(origin)
        if kept is not None:
            try:
                return kept, _exchanged(kept, request, float(timeout[1]), read)
            except BaseException as error:
                self._drop(origin)  # what ended this one may have ended them all
                if not isinstance(error, DEAD) or seconds_left() < LEAST_SECONDS:
                    raise
        connection = self._new(origin, float(timeout[0]))
        return connection, _exchanged(connection, request, float(timeout[1]), read)

    def close(self) -> None:
        """Closes every kept connection."""
        for origin in list(self._idle):
            self._drop(origin)
        super().close()

    def _kept(self, origin: Origin) -> Connection | None:
        """The connection used last, if it stands: it is the likeliest to."""
        kept = self._idle.get(origin)  # it makes no place for a site: `_put_by` counts them
        while kept is not None:
            try:
                connection, since = kept.pop()
            except IndexError:
                return None
            if connection.sock is not None and _is_quiet(connection.sock) and time.monotonic() - since < IDLE_SECONDS:
                return connection
            connection.close()
        return None

    def _put_by(self, origin: Origin, connection: Connection) -> None:
        if origin not in self._idle and len(self._idle) >= MOST_SITES:
            with suppress(RuntimeError, StopIteration):  # other threads take some out meanwhile
                self._drop(next(iter(self._idle)))
        kept, now = self._idle[origin], time.monotonic()
        kept.append((connection, now))
        with suppress(IndexError):  # other threads take some out meanwhile
            while len(kept) > self._keep or now - kept[0][1] > IDLE_SECONDS:
                kept.popleft()[0].close()

    def _drop(self, origin: Origin) -> None:
        kept = self._idle.pop(origin, None)
        with suppress(IndexError):
            while kept:
                kept.pop()[0].close()

    def _new(self, origin: Origin, timeout: float) -> Connection:
        scheme, host, port = origin
        plain, tls = self._connection_types
        if scheme == "https":
            return tls(host, port, timeout=timeout, ssl_context=self.context)
        return plain(host, port, timeout=timeout)


def _is_quiet(sock: socket.socket) -> bool:
    """Whether nothing came since the last answer: neither the end of the connection, nor what nobody asked for."""
    if isinstance(sock, ssl.SSLSocket) and sock.pending():  # taken from the connection already, with its last record
        return False
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)


def _close_all(idle: "dict[Origin, deque[tuple[Connection, float]]]") -> None:
    for kept in list(idle.values()):
        for connection, _ in list(kept):
            connection.close()


def _exchanged(connection: Connection, request: bytes, timeout: float, read: Callable[[socket.socket], T]) -> T:
    try:
        if connection.sock is None:
            connection.connect()  # with the time-out of the connecting
        else:
            connection.watch()
        sock = cast("socket.socket", connection.sock)
        # Python polls a socket that has a time-out before each operation. It needs none where the watchdog ends the
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


def _begun(raw: "StreamedAnswer") -> "StreamedAnswer":
    try:
        raw.begin()
    except BaseException:
        raw.close()
        raise
    return raw


class WholeAnswer(NamedTuple):
    """An answer that was read to its end, or a byte beyond the limit. `reusable`: the connection takes another one."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes
    reusable: bool

    @property
    def encoded(self) -> bool:
        """Whether the body is packed, although nobody asked for it."""
        return self.headers.get("content-encoding", "").lower() not in ("", "identity")


def _read(sock: socket.socket, limit: int) -> WholeAnswer:
    start = sock.recv(RECEIVE_BYTES)
    return _read_usual(start, sock, limit) or _read_any(start, sock, limit)


def _read_usual(start: bytes, sock: socket.socket, limit: int) -> WholeAnswer | None:
    """Read an answer of HTTP/1.1 whose headers came in one piece and whose length was declared; None: it is another.

    All others are left to `HttpAnswer`, which reads these, too, at five times the price.
    """
    head, end, body = start.partition(b"\r\n\r\n")
    first = STATUS_LINE.match(head)
    if not end or first is None or first[1] in (b"204", b"304"):
        return None
    lines = head[first.end() :].decode("latin-1").split("\r\n")[1:]
    if head.count(b"\n") != len(lines) or len(lines) > MOST_HEADERS:
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
    whole = len(body) == length and "close" not in headers.get("connection", "").lower()
    return WholeAnswer(int(first[1]), first[2].strip().decode("latin-1"), headers, body[:length], whole)


def _read_on(start: bytes, sock: socket.socket, length: int) -> bytes:
    pieces, size = [start], len(start)
    while size < length:
        piece = sock.recv(min(length - size, RECEIVE_MOST))
        if not piece:
            raise IncompleteRead(b"".join(pieces), length - size)
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def _read_any(start: bytes, sock: socket.socket, limit: int) -> WholeAnswer:
    raw = HttpAnswer(cast("socket.socket", _Begun(start, sock)), method="POST")
    try:
        raw.begin()
        body = raw.read(limit + 1)
    except BaseException:
        raw.close()
        raise
    if raw.length and len(body) <= limit:
        raise IncompleteRead(body, raw.length)
    return WholeAnswer(raw.status, raw.reason, raw.headers, body, raw.isclosed() and not raw.will_close)


class _Begun(io.RawIOBase):
    """A connection of which something was read already: that comes first."""

    def __init__(self, start: bytes, sock: socket.socket) -> None:
        self._start = start
        self._sock = sock

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what is there."""
        if not self._start:
            return self._sock.recv_into(buffer)
        size = min(len(self._start), len(buffer))
        buffer[:size], self._start = self._start[:size], self._start[size:]
        return size

    def settimeout(self, seconds: float) -> None:
        """Have the connection wait no longer."""
        self._sock.settimeout(seconds)

    def makefile(self, _: str) -> io.BufferedReader:
        """Return it as `HTTPResponse` wants it."""
        return io.BufferedReader(self)


def _request_bytes(method: str, target: str, site: str, headers: Mapping[str, str], body: bytes | str) -> bytes:
    """A request as it goes over the line."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if lines.count("\r") != len(headers) or lines.count("\n") != len(headers):
        raise exceptions.InvalidHeader("a header with a line break in it")
    head = f"{method} {target} HTTP/1.1\r\nHost: {site}\r\nAccept-Encoding: identity\r\n{lines}\r\n"
    return head.encode("latin-1") + (body.encode() if isinstance(body, str) else body)


class HttpAnswer(FinalResponse):
    """An answer whose headers are read line by line, without `http.client`'s parser for e-mail."""

    headers: CaseInsensitiveDict[str]  # type: ignore[assignment]  # reads the same

    def __init__(self, sock: socket.socket, method: str) -> None:
        super().__init__(sock, method=method)
        self._sock = sock

    def _close_conn(self) -> None:
        self.will_close = self.will_close or self._more_came()
        super()._close_conn()  # type: ignore[misc]  # not in the stubs

    def _more_came(self) -> bool:
        """Whether bytes came that are none of this answer's: the buffer that holds them goes with it."""
        try:
            self._sock.settimeout(0)
            return bool(self.fp.peek(1))
        except (OSError, ValueError):
            return False  # nothing did

    def begin(self) -> None:
        """Reads up to the body. Raises the exceptions of `http.client`."""
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
        # Without a length the end of the connection is the end of the answer.
        self.will_close = self._check_close() or (not self.chunked and self.length is None)  # type: ignore[attr-defined]
        if "Transfer-Encoding" in self.headers and (not self.chunked or "Content-Length" in self.headers):
            self.will_close = True  # nobody knows for sure where it ends (RFC 9112, section 6.3)

    def _declared_length(self) -> int | None:
        return _length(self.headers.get("Content-Length"))

    def _read_next_chunk_size(self) -> int:
        """As the parent reads it, but a size is hexadecimal digits and its line has an end.

        Of a line that is cut off nobody knows the size; and `-1`, a number to Python, would be a chunk without an end.
        """
        line = self.fp.readline(LONGEST_HEADER_LINE + 1)
        size = CHUNK_SIZE.fullmatch(line) if len(line) <= LONGEST_HEADER_LINE else None
        if size is None:
            raise ValueError("a chunk without a size")
        return int(size[1], 16)


class StreamedAnswer(HttpAnswer):
    """An answer whose body is read piece by piece, also where its headers say something wrong about it.

    A length that is no number, or several of them, counts as none. A body that does not begin like a chunk is not
    chunked, whatever the header says. What follows the declared end can be read, too.
    """

    def __init__(self, sock: socket.socket, method: str) -> None:
        super().__init__(sock, method=method)
        self.left: int | None = None  # bytes of the body that are still to come, where its length was declared
        self._started = False
        self._went_beyond = False

    def begin(self) -> None:
        """Read up to the body. Raises the exceptions of `http.client`."""
        super().begin()
        self.left, self.length = self.length, None  # we count ourselves: http.client would close at the end

    def _declared_length(self) -> int | None:
        with suppress(HTTPException):
            return super()._declared_length()
        return None

    @property
    def reusable(self) -> bool:
        """Whether the connection can take another request: the whole answer was read, and no more than that."""
        whole = self.left == 0 or (self.chunked and self.isclosed())
        return (
            whole and not self._went_beyond and not (self.fp is not None and self._more_came()) and not self.will_close
        )

    def piece(self, most: int) -> bytes:
        """Return up to `most` bytes of the body, as soon as there are any; none at its end.

        Raises OSError, HTTPException.
        """
        if self.isclosed() or self.left == 0:
            return b""
        if not self._started and self.chunked and self.fp.peek(1)[:1].strip(HEX_DIGITS):
            self.chunked, self.will_close = False, True
        self._started = True
        piece = self.read1(most if self.left is None else min(most, self.left))
        if self.left is not None:
            self.left -= len(piece)
        return piece

    def beginning(self, most: int, seconds: float) -> bytes:
        """Return up to `most` bytes of the body, of what comes within some `seconds`. Raises nothing."""
        until, start = time.monotonic() + seconds, b""
        with suppress(OSError, HTTPException):
            self._sock.settimeout(seconds)
            while time.monotonic() < until and len(start) < most and (piece := self.piece(most - len(start))):
                start += piece
        return start

    def piece_beyond(self, most: int, seconds: float) -> bytes:
        """Return up to `most` bytes that follow the declared end, if any come within `seconds`."""
        self._went_beyond = True
        if self.isclosed():
            return b""
        with suppress(OSError):
            self._sock.settimeout(seconds)
            return self.fp.read1(most)
        return b""


def _read_headers(file: BinaryIO) -> CaseInsensitiveDict[str]:
    found = CaseInsensitiveDict[str]()
    for _ in range(MOST_HEADERS + 1):
        line = file.readline(LONGEST_HEADER_LINE + 1)
        if len(line) > LONGEST_HEADER_LINE:
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


def as_response(request: PreparedRequest, answer: WholeAnswer) -> Response:
    """Return an answer as `requests` has them; a packed body is unpacked as it is read."""
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
    else:  # read already, as after `response.content`
        vars(response).update(_content=answer.body, _content_consumed=True)
    return response


def _as_requests_says_it(error: Exception) -> exceptions.RequestException:
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, (ssl.SSLError, TlsError)):
        return exceptions.SSLError(said)
    if isinstance(error, ConnectTimeoutError) and "NewConnection" not in said:
        return exceptions.ConnectTimeout(said)
    if isinstance(error, TimeoutError):
        return exceptions.ReadTimeout(said)
    return exceptions.ConnectionError(said)
