"""The shortest way for a request to the API that is still `requests`: an adapter that leaves out what we never need.

A plain `session.post` spends most of its time on merging settings, looking for proxies and cookies, and on layers of
pools and responses. This adapter hands a prepared request straight to a kept connection, and reads the whole bounded
answer at once. Requests that need more (a proxy, a client certificate, another bundle) take the way of its parent.
"""

import io
import ssl
from collections import defaultdict, deque
from collections.abc import Mapping
from http.client import HTTPConnection as PlainHTTP
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import Any, cast

from requests import PreparedRequest, Response, exceptions
from requests.structures import CaseInsensitiveDict
from urllib3.exceptions import ConnectTimeoutError, HTTPError
from urllib3.exceptions import SSLError as TlsError
from urllib3.response import HTTPResponse as DecodingResponse

from worker.timed_http import TimedAdapter, TimedHTTPConnection, TimedHTTPSConnection

Connection = TimedHTTPConnection | TimedHTTPSConnection


class LeanAdapter(TimedAdapter):
    """Sends over kept connections, and reads answers of up to `limit` bytes (and one more, to tell larger ones)."""

    def __init__(self, *, limit: int, connections: int, ca_bundle: str | None = None) -> None:
        super().__init__(connections=connections, ca_bundle=ca_bundle)
        self._limit = limit
        self._keep = connections
        self._idle: defaultdict[str, deque[Connection]] = defaultdict(deque)

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
        if proxies or cert or verify is not True or not isinstance(timeout, tuple) or {"?", "#", "@"} & set(url):
            return super().send(
                request, stream=stream, timeout=timeout, verify=verify, cert=cert, proxies=dict(proxies or {})
            )
        scheme, _, rest = url.partition("://")
        site, _, path = rest.partition("/")
        origin = f"{scheme}://{site}"
        connection = self._kept(origin) or self._new(scheme, site, float(timeout[0]))
        try:
            raw, body = self._exchange(connection, request, f"/{path}", float(timeout[1]))
        except (HTTPError, HTTPException, OSError) as error:
            connection.close()
            raise _as_requests_says_it(error, request) from None
        if raw.will_close or not raw.isclosed():
            connection.close()
        elif len(self._idle[origin]) < self._keep:
            self._idle[origin].append(connection)
        else:
            connection.close()
        return _response(request, raw, body)

    def close(self) -> None:
        """Closes every kept connection."""
        for kept in self._idle.values():
            while kept:
                kept.pop().close()
        super().close()

    def _kept(self, origin: str) -> Connection | None:
        kept = self._idle[origin]
        while True:
            try:
                connection = kept.pop()  # the last one used is the likeliest to stand
            except IndexError:
                return None
            if connection.is_connected:
                return connection
            connection.close()

    def _new(self, scheme: str, site: str, timeout: float) -> Connection:
        host, port = _host_and_port(site)
        if scheme == "https":
            return TimedHTTPSConnection(host, port, timeout=timeout, ssl_context=self.context)
        return TimedHTTPConnection(host, port, timeout=timeout)

    def _exchange(
        self, connection: Connection, request: PreparedRequest, path: str, timeout: float
    ) -> tuple[HTTPResponse, bytes]:
        # The methods of http.client, past those of urllib3, which build a response object that nobody would look at.
        is_new = connection.sock is None
        if not is_new:
            connection.watch()
        PlainHTTP.request(connection, request.method or "GET", path, request.body, request.headers)
        if is_new and connection.sock is not None:
            connection.sock.settimeout(timeout)  # until now it had the time-out of the connecting
        raw = PlainHTTP.getresponse(connection)
        body = raw.read(self._limit + 1)
        if raw.length and len(body) <= self._limit:
            raise IncompleteRead(body, raw.length)
        return raw, body


def _host_and_port(site: str) -> tuple[str, int | None]:
    host, colon, port = site.rpartition(":")
    if colon and port.isdecimal():
        return host.strip("[]"), int(port)
    return site.strip("[]"), None


def _response(request: PreparedRequest, raw: HTTPResponse, body: bytes) -> Response:
    response = Response()
    response.status_code = raw.status
    response.reason = raw.reason
    response.url = request.url or ""
    response.request = request
    response.headers = cast("CaseInsensitiveDict[str]", raw.headers)  # reads the same, and need not be built anew
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
