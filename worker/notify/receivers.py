"""Finds the receiver (server) of a webhook URL. Limits apply per receiver, however its address is spelled."""

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from worker.net.address_guard import written_address
from worker.net.deadlines import look_up

PORTS = {"http": 80, "https": 443}
MAX_CACHED = 10_000  # hosts
CACHE_SECONDS = 60.0  # how long a DNS answer is used; only limits depend on it


def receiver_name(url: str) -> str:
    """Return the host and port of a URL in one spelling, without a DNS request.

    >>> receiver_name("https://APP.example.:443/x"), receiver_name("http://[0:0::1]:80/")
    ('app.example:443', '127.0.0.1:80')
    """
    host, port = _host_and_port(url)
    return f"{host}:{port}"


def url_prefix(url: str) -> str:
    """Return the beginning of a URL, as it is spelled, up to its host and port."""
    scheme, _, after_scheme = url.partition("://")
    end = min((index for mark in "/?#" if (index := after_scheme.find(mark)) >= 0), default=len(after_scheme))
    return f"{scheme}://{after_scheme[:end]}"


class Receivers:
    """Maps URLs to receivers, by the addresses that their hosts resolve to. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def cached(self, url: str) -> str:
        """Return the receiver as currently known. Never blocks."""
        name = receiver_name(url)
        with self._lock:
            receiver, until = self._cache.get(name, (name, 0.0))
        return receiver if self._clock() < until else name

    def look_up(self, url: str, seconds: float) -> str:
        """Return the receiver, resolving its host if needed. If that fails, the receiver is its host name."""
        receiver = self.cached(url)
        host, port = _host_and_port(url)
        if receiver != f"{host}:{port}":
            return receiver
        try:
            receiver = f"{_canonical_address(str(answer[0]) for _, answer in look_up(host, port, seconds))}:{port}"
        except (OSError, ValueError):
            return receiver
        with self._lock:
            self._cache[f"{host}:{port}"] = (receiver, self._clock() + CACHE_SECONDS)
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return receiver


def _host_and_port(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or PORTS.get(parts.scheme, 0)
        host = host if host.isascii() else host.encode("idna").decode("ascii")
    except (ValueError, UnicodeError):
        return url_prefix(url), 0
    address = written_address(host)
    return (host.lower(), port) if address is None else (_canonical_address([str(address)]), port)


def _canonical_address(addresses: Iterable[str]) -> str:
    """Return one address to identify a receiver with several. IPv4 and IPv6 loopback count as the same."""
    candidates = []
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        if address == ipaddress.IPv6Address("::1"):
            address = ipaddress.IPv4Address("127.0.0.1")
        candidates.append((address.version, int(address), str(address)))
    return min(candidates)[2]
