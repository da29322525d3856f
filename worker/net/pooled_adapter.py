"""HTTP over pooled connections: an adapter of `requests` for the API, and plain calls for downloads and webhooks.

A plain `session.post` spends most of its time on merging settings, looking for proxies and cookies, on layers of pools
and responses, and on an e-mail parser for the headers. `post` writes a POST in one piece to a pooled connection, and
reads the whole response, up to a limit, at once. Requests that need more (a proxy, a client certificate, another CA
bundle) are sent by `send` of the parent class.

`exchange` serves downloads and webhooks: the address is sent unchanged, and the caller reads the body as it arrives.
`requests` and urllib3 would rewrite the path (`//`, `..`, percent-encoding) and decompress the body.
"""

import re
import select
import socket
import ssl
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException, RemoteDisconnected
from typing import TypeVar, cast

from requests import exceptions
from urllib3.exceptions import ConnectTimeoutError, HTTPError
from urllib3.exceptions import SSLError as TlsError
from urllib3.util import make_headers, parse_url

from worker.core.urls import split
from worker.net.deadlines import (
    TimedAdapter,
    TimedHTTPConnection,
    TimedHTTPSConnection,
    check_permit,
    seconds_left,
)
from worker.net.http_answers import StreamedAnswer, WholeAnswer, begun, read_whole

MAX_ORIGINS = 64  # hosts with pooled connections: downloads may go to any number of hosts
MIN_RETRY_SECONDS = 0.1  # with less time left, a request is not repeated
IDLE_SECONDS = 30.0  # an older connection may be dead without notice: a load balancer or NAT dropped it
PLAIN_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]_-]+(?:/[A-Za-z0-9._~!$&'()*+,;=:%/-]*)?")
TARGET = re.compile(r"/[\x21-\x7e]*")  # the allowed request target

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


class NothingSent(Exception):
    """No whole request reached the server. `reason` is the error of the connection."""

    def __init__(self, reason: exceptions.RequestException) -> None:
        super().__init__(str(reason))
        self.reason = reason


class PooledAdapter(TimedAdapter):
    """Sends over pooled connections. `post` reads up to `limit` bytes, plus one to detect larger responses."""

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

    def post(
        self, url: str, headers: Mapping[str, str], body: bytes | str, timeout: tuple[float, float]
    ) -> WholeAnswer:
        """Send one POST to a plain address and return the whole response. Raises the exceptions of requests."""
        if not PLAIN_URL.fullmatch(url):
            raise exceptions.InvalidURL("the address is malformed")
        scheme, _, after_scheme = url.partition("://")
        site, _, path = after_scheme.partition("/")
        origin = (scheme, *_host_and_port(site))
        request = _request_bytes("POST", f"/{path}", site, headers, body)
        try:
            connection, answer = self._exchange(origin, request, timeout, lambda sock: read_whole(sock, self._limit))
        except (HTTPError, HTTPException, OSError) as error:
            raise _as_requests_error(error) from error
        if answer.reusable:
            self._store(origin, connection)
        else:
            connection.close()
        return answer

    def post_once(
        self, url: str, headers: Mapping[str, str], body: bytes, timeout: tuple[float, float], proxy: str | None = None
    ) -> WholeAnswer:
        """Send one POST over a new connection, never twice, and return the whole response.

        Raises NothingSent if no whole request reached the server: the caller may repeat it. Raises the errors of
        `post` if the request was sent whole, so that the server may have acted on it. A pooled connection is not used:
        if the server closes it meanwhile, the two cases look the same.
        """
        if not PLAIN_URL.fullmatch(url):
            raise exceptions.InvalidURL("the address is malformed")
        scheme, _, after_scheme = url.partition("://")
        site, _, path = after_scheme.partition("/")
        request = _request_bytes("POST", f"/{path}", site, {**headers, "Connection": "close"}, body)
        connection = self._connection_to((scheme, *_host_and_port(site)), float(timeout[0]), proxy)
        try:
            try:
                connection.connect()
                check_permit()
            except (HTTPError, HTTPException, OSError, ValueError) as error:
                raise NothingSent(_as_requests_error(error)) from error
            sock = cast("socket.socket", connection.sock)
            sock.settimeout(float(timeout[1]))
            failure: OSError | None = None
            try:
                sock.sendall(request)
            except OSError as error:  # the server may have answered before it read the whole request
                failure = error
            try:
                return read_whole(sock, self._limit)
            except (HTTPException, OSError, ValueError) as error:
                if failure is not None:
                    raise NothingSent(_as_requests_error(failure)) from failure
                raise _as_requests_error(error) from error
        finally:
            connection.close()

    @contextmanager
    def exchange(
        self, method: str, url: str, headers: Mapping[str, str], timeout: tuple[float, float], body: bytes = b""
    ) -> Iterator[StreamedAnswer]:
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
            lambda sock: begun(StreamedAnswer(sock, method)),
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

    def _connection_to(self, origin: Origin, timeout: float, proxy: str | None) -> Connection:
        """Return a new connection to a server, through a tunnel of the proxy if there is one."""
        if proxy is None:
            return self._new_connection(origin, timeout)
        scheme, host, port = origin
        parts = parse_url(proxy)
        own_scheme = "https" if scheme == "https" else "http"
        connection = self._new_connection((own_scheme, (parts.host or "").strip("[]"), parts.port or 80), timeout)
        credentials = make_headers(proxy_basic_auth=parts.auth) if parts.auth else {}
        connection.set_tunnel(host, port or (443 if scheme == "https" else 80), headers=credentials, scheme="http")
        return connection

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


def _request_bytes(method: str, target: str, site: str, headers: Mapping[str, str], body: bytes | str) -> bytes:
    """Return the bytes of a request."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if lines.count("\r") != len(headers) or lines.count("\n") != len(headers):
        raise exceptions.InvalidHeader("a header with a line break in it")
    head = f"{method} {target} HTTP/1.1\r\nHost: {site}\r\nAccept-Encoding: identity\r\n{lines}\r\n"
    return head.encode("latin-1") + (body.encode() if isinstance(body, str) else body)


def _host_and_port(site: str) -> tuple[str, int | None]:
    host, colon, port = site.rpartition(":")
    if colon and port.isdecimal():
        return host.strip("[]"), int(port)
    return site.strip("[]"), None


def _as_requests_error(error: Exception) -> exceptions.RequestException:
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, (ssl.SSLError, TlsError)):
        return exceptions.SSLError(message)
    if isinstance(error, ConnectTimeoutError) and "NewConnection" not in message:
        return exceptions.ConnectTimeout(message)
    if isinstance(error, TimeoutError):
        return exceptions.ReadTimeout(message)
    return exceptions.ConnectionError(message)
