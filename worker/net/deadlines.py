"""HTTP connections with one deadline for the whole call, also against servers that send very slowly.

Read time-outs limit each single wait, not their sum. So each connection registers the deadline of its call, and one
thread per process shuts down connections that are late. The call then fails like any broken connection. Names are
resolved in separate threads, since a look-up can't be interrupted. No signals are used, so this works in every Celery
pool.
"""

import errno
import ipaddress
import math
import os
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, cast

import requests
from requests.adapters import HTTPAdapter
from requests.cookies import RequestsCookieJar
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util.ssl_ import create_urllib3_context

from worker.net.http_answers import FinalResponse

CHECK_SECONDS = 0.2
ATTEMPT_DELAY_SECONDS = 0.25  # between attempts to connect to the addresses of one host: RFC 8305, section 5
CONNECTING = frozenset({errno.EINPROGRESS, errno.EWOULDBLOCK})

Target = tuple[int, Any]  # an address family, and an address as `socket.connect` takes it


class SocketHandle:
    """A second handle on a connection, to shut it down with. The TLS layer owns the first during its handshake."""

    __slots__ = ("_handle",)

    def __init__(self, sock: socket.socket) -> None:
        # Duplicated here: at the deadline the process may have no file descriptor left.
        self._handle = socket.socket(sock.family, sock.type, sock.proto, fileno=os.dup(sock.fileno()))

    def shut(self) -> None:
        """Shut the connection down. Operations on it end, in any thread."""
        with suppress(OSError):
            self._handle.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        """Close the handle."""
        self._handle.close()


class DeadlineWatchdog:
    """Shuts down connections at their deadlines. One per process; its thread starts with the first call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By handle and deadline: the next call may use a pooled connection before the last one forgets its deadline.
        self._deadlines: dict[tuple[SocketHandle, float], None] = {}  # single dict operations need no lock
        self._pid = 0

    def watch(self, handle: SocketHandle, until: float) -> None:
        """Shut a connection down once the monotonic clock is past `until`."""
        self._deadlines[handle, until] = None
        if self._pid != os.getpid():
            self._start()

    def forget(self, handle: SocketHandle, until: float) -> None:
        """Remove the deadline of a call that has ended."""
        self._deadlines.pop((handle, until), None)

    def _start(self) -> None:
        with self._lock:
            if self._pid != os.getpid():
                threading.Thread(target=self._run, name="http-watchdog", daemon=True).start()
                self._pid = os.getpid()  # set once the thread runs: if none can be started, the next call tries again

    def _run(self) -> None:
        while True:
            time.sleep(CHECK_SECONDS)
            self._shut_late()

    def _shut_late(self) -> None:
        # A method of its own: a local variable that outlives it would keep a closed connection open.
        now = time.monotonic()
        for handle, until in self._deadlines.copy():  # a single step, safe beside other threads
            if now >= until and (handle, until) in self._deadlines:
                handle.shut()
                self._deadlines.pop((handle, until), None)


watchdog = DeadlineWatchdog()
_call = threading.local()


def _forget_parent() -> None:
    """Forget the parent's calls and look-ups in a forked child: their threads and sockets are not the child's."""
    global watchdog, _look_ups_lock
    watchdog = DeadlineWatchdog()
    _look_ups_lock = threading.Lock()
    _look_ups.clear()


os.register_at_fork(after_in_child=_forget_parent)


class TimeLimit:
    """Context manager that shuts down all connections of this thread `seconds` after the limit was made.

    `permit` is called right before each request is sent, also for redirects and second attempts. Its exceptions end the
    call.
    """

    __slots__ = ("_permit", "_until")

    def __init__(self, seconds: float, permit: Callable[[], object] | None = None) -> None:
        self._until = time.monotonic() + seconds
        self._permit = permit

    @property
    def remaining(self) -> float:
        """The seconds left, at least a millisecond (a time-out of zero would mean "no time-out")."""
        return max(self._until - time.monotonic(), 0.001)

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self._until

    def __enter__(self) -> "TimeLimit":
        """Start to watch the connections of this thread."""
        _call.until = self._until
        _call.permit = self._permit
        _call.handles = []
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching them."""
        for handle in _call.handles:
            watchdog.forget(handle, self._until)
        _call.until = _call.permit = None
        _call.handles = []


def seconds_left() -> float:
    """Return the seconds left of this thread's call, at least a millisecond; infinite outside of a call."""
    until = getattr(_call, "until", None)
    return math.inf if until is None else max(until - time.monotonic(), 0.001)


def check_permit() -> None:
    """Call the `permit` of this thread's call. Call this right before sending."""
    permit = getattr(_call, "permit", None)
    if permit is not None:
        permit()


# ── looking up and connecting ─────────────────────────────────────────────────────────────────────────────────────────


class LookUpTimeout(TimeoutError):
    """The look-up of a name took too long."""


_look_ups: dict[tuple[str, int], Future[list[Target]]] = {}  # any number of calls can wait for one
_look_ups_lock = threading.Lock()


def look_up(host: str, port: int, seconds: float) -> list[Target]:
    """Return the addresses of a host name or address literal. Raises OSError, or LookUpTimeout after `seconds`."""
    with suppress(ValueError):
        ipaddress.ip_address(host)
        return _resolve(host, port)
    with _look_ups_lock:
        result = _look_ups.get((host, port))
        if result is None:
            result = Future()
            threading.Thread(target=_run_look_up, args=(host, port, result), name="look-up", daemon=True).start()
            _look_ups[host, port] = result  # registered once its thread runs, which needs the lock to remove it
    if not wait([result], None if math.isinf(seconds) else seconds).done:
        raise LookUpTimeout(f"the look-up of {host} took too long")
    return result.result()


def _run_look_up(host: str, port: int, result: Future[list[Target]]) -> None:
    targets, failure = list[Target](), None
    try:
        targets = _resolve(host, port)
    except BaseException as error:  # raised in the calls that wait
        failure = error
    with _look_ups_lock:
        _look_ups.pop((host, port), None)
    if failure is None:
        result.set_result(targets)
    else:
        result.set_exception(failure)


def _resolve(host: str, port: int) -> list[Target]:
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from None
    return [(family, address) for family, _, _, _, address in answers]


def connect_first(connection: HTTPConnection, targets: Sequence[Target]) -> socket.socket:
    """Return a socket that is connected to the first address that answers.

    A single address is simply connected to. Several are tried as in RFC 8305 ("Happy Eyeballs"): the next attempt
    begins 250 ms after the one before, or as soon as that one fails, and the first connection wins. All attempts
    together have the connection's own time-out. Raises urllib3's errors if none answers; their cause is the system's
    error.
    """
    seconds = min(float(connection.timeout or math.inf), seconds_left())
    try:
        if len(targets) == 1:
            return _connect(targets[0], seconds)
        return _connect_to_fastest(_interleaved(targets), seconds)
    except TimeoutError as error:
        raise ConnectTimeoutError(connection, "the connection timed out") from error
    except OSError as error:
        raise NewConnectionError(connection, f"no connection: {error}") from error


def _connect(target: Target, seconds: float) -> socket.socket:
    family, address = target
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(None if math.isinf(seconds) else seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect_to_fastest(targets: Sequence[Target], seconds: float) -> socket.socket:
    """Return the first connection that succeeds. Raises OSError: TimeoutError, or the error of the last address."""
    pending, last_error = deque(targets), OSError(errno.EADDRNOTAVAIL, "the host has no address")
    now = time.monotonic()
    end, next_attempt_at = now + seconds, now
    attempts: set[socket.socket] = set()
    with selectors.DefaultSelector() as selector:
        try:
            while pending or attempts:
                now = time.monotonic()
                if now >= end:
                    raise TimeoutError("the connection timed out")
                if pending and (now >= next_attempt_at or not attempts):
                    next_attempt_at = now + ATTEMPT_DELAY_SECONDS
                    try:
                        attempt = _start_connecting(pending.popleft())
                    except OSError as error:
                        last_error, next_attempt_at = error, now
                        continue
                    attempts.add(attempt)
                    selector.register(attempt, selectors.EVENT_WRITE, attempt)
                until = min(end, next_attempt_at) if pending else end
                for key, _ in selector.select(None if math.isinf(until) else max(until - time.monotonic(), 0.0)):
                    attempt = cast("socket.socket", key.data)
                    selector.unregister(attempt)
                    attempts.remove(attempt)
                    error_number = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not error_number:
                        attempt.settimeout(None if math.isinf(seconds) else max(end - time.monotonic(), 0.001))
                        return attempt
                    attempt.close()
                    last_error, next_attempt_at = OSError(error_number, os.strerror(error_number)), time.monotonic()
        finally:
            for attempt in attempts:
                attempt.close()
    raise last_error


def _start_connecting(target: Target) -> socket.socket:
    family, address = target
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error_number = sock.connect_ex(address)
        if error_number and error_number not in CONNECTING:
            raise OSError(error_number, os.strerror(error_number))
    except BaseException:
        sock.close()
        raise
    return sock


def _interleaved(targets: Sequence[Target]) -> list[Target]:
    """Return the unique addresses, alternating between families: an unreachable family costs only one delay."""
    unique = list(dict.fromkeys(targets))
    first_family = [target for target in unique if target[0] == unique[0][0]] if unique else []
    other_families = [target for target in unique if target not in first_family]
    return [target for target in chain.from_iterable(zip_longest(first_family, other_families)) if target is not None]


# ── connections ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _WatchedConnection(HTTPConnection):
    """The common part of both connection classes: the watchdog watches the connection during a call."""

    response_class = FinalResponse
    handle: SocketHandle | None = None

    def addresses(self) -> list[Target]:
        """Return the addresses of the host. Raises urllib3's errors."""
        host = self._dns_host.strip("[]")
        try:
            return look_up(host, int(self.port), seconds_left())
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"the look-up of {host} took too long") from error
        except OSError as error:
            raise NameResolutionError(host, self, socket.gaierror(str(error))) from error

    def dial(self) -> socket.socket:
        """Return a new connected socket to the host. Raises urllib3's errors."""
        return connect_first(self, self.addresses())

    def _new_conn(self) -> socket.socket:
        sock = self.dial()
        self.handle = SocketHandle(sock)
        self.watch()
        return sock

    def watch(self) -> None:
        """Watch the connection for this thread's call, until the deadline of the call."""
        until = getattr(_call, "until", None)
        if until is not None and self.handle is not None:
            _call.handles.append(self.handle)
            watchdog.watch(self.handle, until)

    def request(self, *args: Any, **kwargs: Any) -> None:
        """Send a request once it is permitted. A connection that was open already is watched from now on."""
        if self.sock is None:
            self.connect()  # otherwise the parent would connect after the permission check
        else:
            self.watch()
        check_permit()
        super().request(*args, **kwargs)

    def close(self) -> None:
        """Close the connection. A call that still reads the last response keeps the handle."""
        super().close()
        self.handle = None


class TimedHTTPConnection(_WatchedConnection):
    """An HTTP connection that the watchdog watches during a call."""


class TimedHTTPSConnection(_WatchedConnection, HTTPSConnection):
    """An HTTPS connection that the watchdog watches during a call."""


# ── sessions ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class TimedAdapter(HTTPAdapter):
    """An adapter with watched connections, also through a proxy, and one TLS context for all of them.

    By default, requests reads the CA bundle for every new connection, which takes some 30 ms of processor time.
    """

    def __init__(
        self,
        *,
        connections: int,
        ca_bundle: str | None = None,
        plain: type[TimedHTTPConnection] = TimedHTTPConnection,
        tls: type[TimedHTTPSConnection] = TimedHTTPSConnection,
    ) -> None:
        self.context = tls_context(ca_bundle)
        pool = type("Pool", (HTTPConnectionPool,), {"ConnectionCls": plain})
        tls_pool = type("TlsPool", (HTTPSConnectionPool,), {"ConnectionCls": tls})
        self._pool_classes = {"http": pool, "https": tls_pool}
        super().__init__(pool_connections=32, pool_maxsize=connections)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: Any) -> None:
        """Create the connection pools, with watched connections."""
        super().init_poolmanager(connections, maxsize, block, ssl_context=self.context, **pool_kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pool_classes

    def proxy_manager_for(self, proxy: str, **proxy_kwargs: Any) -> Any:
        """Return the pools of a proxy, with watched connections."""
        manager = super().proxy_manager_for(proxy, ssl_context=self.context, **proxy_kwargs)
        manager.pool_classes_by_scheme = self._pool_classes
        return manager

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Leave the TLS context as it is, unless the caller overrides its verification."""
        if verify is not True or cert:
            super().cert_verify(conn, url, verify, cert)  # type: ignore[no-untyped-call]  # requests' stubs


def tls_context(ca_bundle: str | None) -> ssl.SSLContext:
    """Return a TLS context that trusts a bundle (file or folder), or public authorities. Raises OSError, SSLError."""
    context = create_urllib3_context()
    bundle = ca_bundle or DEFAULT_CA_BUNDLE_PATH
    if Path(bundle).is_dir():
        context.load_verify_locations(capath=bundle)
    else:
        context.load_verify_locations(cafile=bundle)
    return context


class _NoCookies(RequestsCookieJar):
    def set_cookie(self, cookie: Any, *args: Any, **kwargs: Any) -> None:
        """Drop the cookie."""


class _LeanSession(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Leave redirects to the caller. requests would read their whole body even if it does not follow them."""
        return None


def lean_session(adapter: HTTPAdapter) -> requests.Session:
    """Return a session that follows no redirects and ignores proxies, .netrc and cookies of the environment."""
    session = _LeanSession()
    session.trust_env = False
    session.cookies = _NoCookies()
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session
