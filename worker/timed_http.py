"""HTTP connections that a watchdog ends in time: no server holds a thread longer, however slowly it drips.

Read time-outs bound each single wait, not their sum. So every connection says when its call must be over, and one
thread per process shuts down the sockets of those that are late; the call then fails like any broken connection.
It works in every Celery pool, since no signal is involved.
"""

import math
import os
import socket
import threading
import time
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.cookies import RequestsCookieJar
from urllib3.connection import HTTPConnection, HTTPSConnection

CHECK_SECONDS = 0.2


class Watchdog:
    """Shuts sockets down whose deadline is over. One per process; its thread starts with the first call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[int, tuple[float, socket.socket]] = {}
        self._pid = 0

    def watch(self, sock: socket.socket, until: float) -> None:
        """Ends whatever goes on with `sock` once the monotonic clock is past `until`."""
        with self._lock:
            self._deadlines[id(sock)] = (until, sock)
            if self._pid != os.getpid():
                self._pid = os.getpid()
                threading.Thread(target=self._run, name="http-watchdog", daemon=True).start()

    def forget(self, sock: socket.socket) -> None:
        """The call with `sock` is over."""
        with self._lock:
            self._deadlines.pop(id(sock), None)

    def _run(self) -> None:
        while True:
            time.sleep(CHECK_SECONDS)
            now = time.monotonic()
            with self._lock:
                late = [key for key, (until, _) in self._deadlines.items() if now >= until]
                socks = [self._deadlines.pop(key)[1] for key in late]
            for sock in socks:
                _shut(sock)


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is closed already, which is what we wanted


watchdog = Watchdog()
_call = threading.local()


class TimeLimit:
    """All connections that this thread uses inside are given up `seconds` after it was entered."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds left, never less than a millisecond (a time-out of nothing would mean none)."""
        return max(self._until - time.monotonic(), 0.001)

    @property
    def over(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() >= self._until

    def __enter__(self) -> "TimeLimit":
        """Starts to watch this thread's connections."""
        _call.until = self._until
        _call.socks = []
        return self

    def __exit__(self, *_: object) -> None:
        """Stops watching them."""
        for sock in _call.socks:
            watchdog.forget(sock)
        _call.until = None
        _call.socks = []


def seconds_left() -> float:
    """Seconds left of the call that this thread is in, never less than a millisecond; infinite outside of one."""
    until = getattr(_call, "until", None)
    return math.inf if until is None else max(until - time.monotonic(), 0.001)


class _NoCookies(RequestsCookieJar):
    def set_cookie(self, cookie: Any, *args: Any, **kwargs: Any) -> None:
        """Drops the cookie."""


def lean_session(adapter: HTTPAdapter) -> requests.Session:
    """A session that takes nothing from the environment: no proxies, no .netrc, no cookies."""
    session = requests.Session()
    session.trust_env = False
    session.cookies = _NoCookies()
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def _watch_this_call(connection: HTTPConnection) -> None:
    until = getattr(_call, "until", None)
    if until is not None and connection.sock is not None:
        _call.socks.append(connection.sock)
        watchdog.watch(connection.sock, until)


class TimedHTTPConnection(HTTPConnection):
    """A connection that the watchdog knows while a call is under way."""

    def connect(self) -> None:
        """Connects, then tells the watchdog."""
        super().connect()
        _watch_this_call(self)

    def request(self, *args: Any, **kwargs: Any) -> None:
        """Sends a request; a connection that was open already is watched from here."""
        if self.sock is not None:
            _watch_this_call(self)
        super().request(*args, **kwargs)


class TimedHTTPSConnection(HTTPSConnection):
    """The same over TLS."""

    def connect(self) -> None:
        """Connects, then tells the watchdog."""
        super().connect()
        _watch_this_call(self)

    def request(self, *args: Any, **kwargs: Any) -> None:
        """Sends a request; a connection that was open already is watched from here."""
        if self.sock is not None:
            _watch_this_call(self)
        super().request(*args, **kwargs)
