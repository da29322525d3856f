"""Which webhook addresses lead to one receiver: limits hold per server, however its address is spelled."""

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from worker.net.address_guard import written_address
from worker.net.deadlines import look_up

PORTS = {"http": 80, "https": 443}
KNOWN_MOST = 10_000  # hosts
KNOWN_SECONDS = 60.0  # how long an answer of the name server is believed; only limits depend on it


def receiver_name(url: str) -> str:
    """Return the host and port of a URL in one spelling, without asking a name server.

    >>> receiver_name("https://APP.example.:443/x"), receiver_name("http://[0:0::1]:80/")
    ('app.example:443', '127.0.0.1:80')
    """
    host, port = _host_and_port(url)
    return f"{host}:{port}"


def prefix(url: str) -> str:
    """Return what a URL begins with, as it is spelled, down to its host and port."""
    scheme, _, rest = url.partition("://")
    end = min((index for mark in "/?#" if (index := rest.find(mark)) >= 0), default=len(rest))
    return f"{scheme}://{rest[:end]}"


class Receivers:
    """Which receiver each URL leads to, by the addresses that its host resolves to. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def known(self, url: str) -> str:
        """Return the receiver as far as it is known by now; never waits."""
        name = receiver_name(url)
        with self._lock:
            receiver, until = self._known.get(name, (name, 0.0))
        return receiver if self._clock() < until else name

    def look_up(self, url: str, seconds: float) -> str:
        """Return the receiver, and ask the name server for it. Where it does not answer, names are compared."""
        receiver = self.known(url)
        host, port = _host_and_port(url)
        if receiver != f"{host}:{port}":
            return receiver
        try:
            receiver = f"{_first(str(answer[0]) for _, answer in look_up(host, port, seconds))}:{port}"
        except (OSError, ValueError):
            return receiver
        with self._lock:
            self._known[f"{host}:{port}"] = (receiver, self._clock() + KNOWN_SECONDS)
            while len(self._known) > KNOWN_MOST:
                self._known.popitem(last=False)
        return receiver


def _host_and_port(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or PORTS.get(parts.scheme, 0)
        host = host if host.isascii() else host.encode("idna").decode("ascii")
    except (ValueError, UnicodeError):
        return prefix(url), 0
    address = written_address(host)
    return (host.lower(), port) if address is None else (_first([str(address)]), port)


def _first(addresses: Iterable[str]) -> str:
    """Return the one address by which a receiver is known that has several. Loopback is one in both families."""
    found = []
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        if address == ipaddress.IPv6Address("::1"):
            address = ipaddress.IPv4Address("127.0.0.1")
        found.append((address.version, int(address), str(address)))
    return min(found)[2]
