"""HTTP connections that are over in time: no server holds a thread longer, however slowly it drips.

Read time-outs bound each single wait, not their sum. So every connection says when its call must be over, and one
thread per process shuts down those that are late; the call then fails like any broken connection. Names are looked up
in a thread of their own, since a look-up can't be interrupted. It works in every Celery pool: no signal is involved.
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
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
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

CHECK_SECONDS = 0.2
ATTEMPT_DELAY_SECONDS = 0.25  # between attempts to connect to the addresses of one host: RFC 8305, section 5
MOST_INTERIM_ANSWERS = 32
LONGEST_HEADER_LINE = 65_536
MOST_HEADERS = 100
UNDER_WAY = frozenset({errno.EINPROGRESS, errno.EWOULDBLOCK})

Target = tuple[int, Any]  # an address family, and an address as `socket.connect` takes it


class SocketHandle:
    """A second handle on a connection, to end it with. The TLS layer takes the first one over while it shakes hands."""

    __slots__ = ("_handle",)

    def __init__(self, sock: socket.socket) -> None:
        # Made here: when the time is over the process may have no file descriptor left.
        self._handle = socket.socket(sock.family, sock.type, sock.proto, fileno=os.dup(sock.fileno()))

    def shut(self) -> None:
        """Ends whatever goes on with the connection, in whatever thread."""
        with suppress(OSError):
            self._handle.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        """Lets the connection go."""
        self._handle.close()


class Watchdog:
    """Shuts connections down whose time is over. One per process; its thread starts with the first call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By line and end: a line that is put by may be the next call's before this one forgets it.
        self._deadlines: dict[tuple[SocketHandle, float], None] = {}  # single operations on a dict need no lock
        self._pid = 0

    def watch(self, line: SocketHandle, until: float) -> None:
        """Ends whatever goes on with `line` once the monotonic clock is past `until`."""
        self._deadlines[line, until] = None
        if self._pid != os.getpid():
            self._start()

    def forget(self, line: SocketHandle, until: float) -> None:
        """The call with `line` that was to end then is over."""
        self._deadlines.pop((line, until), None)

    def _start(self) -> None:
        with self._lock:
            if self._pid != os.getpid():
                threading.Thread(target=self._run, name="http-watchdog", daemon=True).start()
                self._pid = os.getpid()  # once it runs: where no thread is left the next call tries again

    def _run(self) -> None:
        while True:
            time.sleep(CHECK_SECONDS)
            now = time.monotonic()
            for line, until in self._deadlines.copy():  # in one step, whatever other threads do
                if now >= until and (line, until) in self._deadlines:
                    line.shut()
                    self._deadlines.pop((line, until), None)


watchdog = Watchdog()
_call = threading.local()


def _forget_parent() -> None:
    """In a forked child: forget the parent's calls and look-ups, whose threads and sockets are not the child's."""
    global watchdog, _look_ups_lock
    watchdog = Watchdog()
    _look_ups_lock = threading.Lock()
    _look_ups.clear()


os.register_at_fork(after_in_child=_forget_parent)


class TimeLimit:
    """All connections that this thread uses inside are given up `seconds` after it was made.

    `permit` is called right before each request is sent, redirects and second attempts included. What it raises stops
    the call.
    """

    __slots__ = ("_permit", "_until")

    def __init__(self, seconds: float, permit: Callable[[], object] | None = None) -> None:
        self._until = time.monotonic() + seconds
        self._permit = permit

    @property
    def remaining(self) -> float:
        """Seconds left, never less than a millisecond (a time-out of nothing would mean none)."""
        return max(self._until - time.monotonic(), 0.001)

    @property
    def expired(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() >= self._until

    def __enter__(self) -> "TimeLimit":
        """Starts to watch this thread's connections."""
        _call.until = self._until
        _call.permit = self._permit
        _call.lines = []
        return self

    def __exit__(self, *_: object) -> None:
        """Stops watching them."""
        for line in _call.lines:
            watchdog.forget(line, self._until)
        _call.until = _call.permit = None
        _call.lines = []


def seconds_left() -> float:
    """Seconds left of the call that this thread is in, never less than a millisecond; infinite outside of one."""
    until = getattr(_call, "until", None)
    return math.inf if until is None else max(until - time.monotonic(), 0.001)


def check_permit() -> None:
    """Call the `permit` of the call that this thread is in. To be called with nothing left to do but to send."""
    permit = getattr(_call, "permit", None)
    if permit is not None:
        permit()


# ── looking up and connecting ─────────────────────────────────────────────────────────────────────────────────────────


class LookUpTimeout(TimeoutError):
    """The look-up of a name took too long."""


class _LookUp:
    """One look-up of a name, under way in a thread of its own; any number of calls can wait for it."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.over = threading.Event()
        self.found: list[Target] = []
        self.trouble: OSError | None = None

    def run(self) -> None:
        try:
            self.found = _targets(self.host, self.port)
        except (OSError, UnicodeError) as error:
            self.trouble = error if isinstance(error, OSError) else socket.gaierror(socket.EAI_NONAME, str(error))
        finally:
            with _look_ups_lock:
                _look_ups.pop((self.host, self.port), None)
            self.over.set()


_look_ups: dict[tuple[str, int], _LookUp] = {}
_look_ups_lock = threading.Lock()


def look_up(host: str, port: int, seconds: float) -> list[Target]:
    """The addresses of a host, or of an address literal. Raises OSError, LookUpTimeout after so many seconds."""
    with suppress(ValueError):
        ipaddress.ip_address(host)
        return _targets(host, port)
    with _look_ups_lock:
        under_way = _look_ups.get((host, port))
        if under_way is None:
            under_way = _LookUp(host, port)
            threading.Thread(target=under_way.run, name="look-up", daemon=True).start()
            _look_ups[host, port] = under_way  # once it is sure to end; it takes the lock to take it out again
    if not under_way.over.wait(None if math.isinf(seconds) else seconds):
        raise LookUpTimeout(f"the look-up of {host} took too long")
    if under_way.trouble is not None:
        raise under_way.trouble
    return under_way.found


def _targets(host: str, port: int) -> list[Target]:
    return [(family, answer) for family, _, _, _, answer in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def connect_first(connection: HTTPConnection, targets: Sequence[Target]) -> socket.socket:
    """Return a socket that is connected to the first of the addresses that answers.

    One address is simply connected to. Several are tried as RFC 8305 ("Happy Eyeballs") has it: the next one begins
    250 ms after the one before it, or as soon as that one fails, and the first connection wins. All of them together
    have the connection's own time-out. Raises urllib3's errors where none answers; their cause is the system's error.
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
    """Return the first connection that comes about. Raises OSError: TimeoutError, or the last address's error."""
    waiting, failure = deque(targets), OSError(errno.EADDRNOTAVAIL, "the host has no address")
    now = time.monotonic()
    end, next_at = now + seconds, now
    attempts: set[socket.socket] = set()
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or attempts:
                now = time.monotonic()
                if now >= end:
                    raise TimeoutError("the connection timed out")
                if waiting and (now >= next_at or not attempts):
                    next_at = now + ATTEMPT_DELAY_SECONDS
                    try:
                        attempt = _begin_to_connect(waiting.popleft())
                    except OSError as error:
                        failure, next_at = error, now
                        continue
                    attempts.add(attempt)
                    selector.register(attempt, selectors.EVENT_WRITE, attempt)
                until = min(end, next_at) if waiting else end
                for key, _ in selector.select(None if math.isinf(until) else max(until - time.monotonic(), 0.0)):
                    attempt = cast("socket.socket", key.data)
                    selector.unregister(attempt)
                    attempts.remove(attempt)
                    number = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not number:
                        attempt.settimeout(None if math.isinf(seconds) else max(end - time.monotonic(), 0.001))
                        return attempt
                    attempt.close()
                    failure, next_at = OSError(number, os.strerror(number)), time.monotonic()
        finally:
            for attempt in attempts:
                attempt.close()
    raise failure


def _begin_to_connect(target: Target) -> socket.socket:
    family, address = target
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        number = sock.connect_ex(address)
        if number and number not in UNDER_WAY:
            raise OSError(number, os.strerror(number))
    except BaseException:
        sock.close()
        raise
    return sock


def _interleaved(targets: Sequence[Target]) -> list[Target]:
    """The addresses, none twice, with the families taking turns: a family that leads nowhere costs one delay."""
    unique = list(dict.fromkeys(targets))
    first = [target for target in unique if target[0] == unique[0][0]] if unique else []
    others = [target for target in unique if target not in first]
    return [target for target in chain.from_iterable(zip_longest(first, others)) if target is not None]


# ── connections ───────────────────────────────────────────────────────────────────────────────────────────────────────


class FinalResponse(HTTPResponse):
    """An answer that may be preceded by interim ones (1xx), which are read past.

    `http.client` reads past "100 Continue" alone and takes "102 Processing" or "103 Early Hints" for the answer.
    "101 Switching Protocols" is an answer: what follows it is no HTTP.
    """

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(MOST_INTERIM_ANSWERS):
            line: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]  # not in the stubs
            if not 100 <= line[1] < 200 or line[1] == 101:
                return line
            self._skip_headers()
        raise HTTPException(f"more than {MOST_INTERIM_ANSWERS} interim answers")

    def _skip_headers(self) -> None:
        for _ in range(MOST_HEADERS + 1):
            line = self.fp.readline(LONGEST_HEADER_LINE + 1)
            if line in (b"\r\n", b"\n", b""):
                return
            if len(line) > LONGEST_HEADER_LINE:
                break
        raise HTTPException("an interim answer with too many or too long headers")


class _Timed(HTTPConnection):
    """What both kinds of connections do to be watched during a call."""

    response_class = FinalResponse
    line: SocketHandle | None = None

    def addresses(self) -> list[Target]:
        """Where the host is. Raises urllib3's errors."""
        host = self._dns_host.strip("[]")
        try:
            return look_up(host, int(self.port), seconds_left())
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"the look-up of {host} took too long") from error
        except OSError as error:
            raise NameResolutionError(host, self, socket.gaierror(str(error))) from error

    def dial(self) -> socket.socket:
        """A new socket to the host, connected. Raises urllib3's errors."""
        return connect_first(self, self.addresses())

    def _new_conn(self) -> socket.socket:
        sock = self.dial()
        self.line = SocketHandle(sock)
        self.watch()
        return sock

    def watch(self) -> None:
        """From here on the connection belongs to the call that this thread is in, and ends with its time."""
        until = getattr(_call, "until", None)
        if until is not None and self.line is not None:
            _call.lines.append(self.line)
            watchdog.watch(self.line, until)

    def request(self, *args: Any, **kwargs: Any) -> None:
        """Send a request, once it is permitted; a connection that was open already is watched from here."""
        if self.sock is None:
            self.connect()  # the sending would do it, after the permission
        else:
            self.watch()
        check_permit()
        super().request(*args, **kwargs)

    def close(self) -> None:
        """Closes it; while a call still reads the last answer, the call keeps the line."""
        super().close()
        self.line = None


class TimedHTTPConnection(_Timed):
    """A connection that the watchdog knows while a call is under way."""


class TimedHTTPSConnection(_Timed, HTTPSConnection):
    """The same over TLS."""


# ── sessions ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class TimedAdapter(HTTPAdapter):
    """An adapter with timed connections, also through a proxy, and with one TLS context for all of them.

    Left to itself requests has the CA bundle read again for every new connection: some 30 ms of processor time.
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
        """Makes the pools: ours."""
        super().init_poolmanager(connections, maxsize, block, ssl_context=self.context, **pool_kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pool_classes

    def proxy_manager_for(self, proxy: str, **proxy_kwargs: Any) -> Any:
        """The pools of a proxy: ours too."""
        made = super().proxy_manager_for(proxy, ssl_context=self.context, **proxy_kwargs)
        made.pool_classes_by_scheme = self._pool_classes
        return made

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Leaves the context alone, which knows whom to trust, unless the caller says otherwise."""
        if verify is not True or cert:
            super().cert_verify(conn, url, verify, cert)  # type: ignore[no-untyped-call]  # requests' stubs


def tls_context(ca_bundle: str | None) -> ssl.SSLContext:
    """A context that trusts a bundle (a file or a folder), or the public authorities. Raises OSError, SSLError."""
    context = create_urllib3_context()
    bundle = ca_bundle or DEFAULT_CA_BUNDLE_PATH
    if Path(bundle).is_dir():
        context.load_verify_locations(capath=bundle)
    else:
        context.load_verify_locations(cafile=bundle)
    return context


class _NoCookies(RequestsCookieJar):
    def set_cookie(self, cookie: Any, *args: Any, **kwargs: Any) -> None:
        """Drops the cookie."""


class _LeanSession(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Leaves redirects to the caller; requests would read their whole body, however long, even to not follow."""
        return None


def lean_session(adapter: HTTPAdapter) -> requests.Session:
    """A session that follows no redirect and takes nothing from the environment: no proxies, no .netrc, no cookies."""
    session = _LeanSession()
    session.trust_env = False
    session.cookies = _NoCookies()
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session
