"""A network for tests. It replaces the place where the worker connects: it records and refuses connections."""

import errno
import ipaddress
import socket
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from worker.net import deadlines


class Net:
    """Answers look-ups, and records and refuses connections. Loopback is refused, too, unless `loopback` is set."""

    def __init__(self, *, loopback: bool = False) -> None:
        self.connected: list[tuple[str, int]] = []
        self.looked_up: list[str] = []
        self.timeouts: list[float | None] = []
        self.answers: Callable[[str], Sequence[str] | None] | None = None
        self.error: type[OSError] = ConnectionRefusedError
        self.loopback = loopback
        self.only: tuple[str, int] | None = None  # if set, the only loopback address that is allowed

    @property
    def external(self) -> list[tuple[str, int]]:
        """The connections to addresses other than loopback, which were refused."""
        return [(host, port) for host, port in self.connected if not ipaddress.ip_address(host).is_loopback]

    def getaddrinfo(self, host: str, port: int, **options: Any) -> list[Any]:
        """Resolve literals as the system does, and names as the test says, without asking any server."""
        self.looked_up.append(host)
        addresses = self.answers(host) if self.answers else None
        if addresses is None:
            return socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST, **options)
        return [
            (socket.AF_INET6, 1, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, 1, 6, "", (address, port))
            for address in addresses
        ]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Net":
        """Make the worker use this network."""
        net = self

        class Socket(socket.socket):
            """A socket of this network."""

            def settimeout(self, value: float | None) -> None:
                """Record the time-out."""
                net.timeouts.append(value)
                super().settimeout(value)

            def connect(self, address: Any) -> None:
                """Record the address, and connect to loopback at most."""
                if not self._permitted(address):
                    raise net.error
                super().connect(address)

            def connect_ex(self, address: Any) -> int:
                """Do the same for a non-blocking connection."""
                if not self._permitted(address):
                    return errno.ETIMEDOUT if net.error is TimeoutError else errno.ECONNREFUSED
                return super().connect_ex(address)

            def _permitted(self, address: Any) -> bool:
                host, port = address[:2]
                net.connected.append((host, port))
                is_loopback = net.loopback and ipaddress.ip_address(host).is_loopback
                return is_loopback and net.only in (None, (host, port))

        module = SimpleNamespace(**vars(socket) | {"socket": Socket, "getaddrinfo": self.getaddrinfo})
        monkeypatch.setattr(deadlines, "socket", module)
        return self
