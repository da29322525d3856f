"""A network for tests that nothing leaves: it stands where connections are made, and notes and refuses them."""

import errno
import ipaddress
import socket
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from worker.net import deadlines


class Net:
    """Answers look-ups, notes where sockets are connected to, and lets none beyond loopback; by default none at all."""

    def __init__(self, *, loopback: bool = False) -> None:
        self.connected: list[tuple[str, int]] = []
        self.looked_up: list[str] = []
        self.timeouts: list[float | None] = []
        self.answers: Callable[[str], Sequence[str] | None] | None = None
        self.error: type[OSError] = ConnectionRefusedError
        self.loopback = loopback
        self.only: tuple[str, int] | None = None  # of loopback, too, where it is set

    @property
    def beyond(self) -> list[tuple[str, int]]:
        """The connections that were refused for not being to loopback."""
        return [(host, port) for host, port in self.connected if not ipaddress.ip_address(host).is_loopback]

    def getaddrinfo(self, host: str, port: int, **options: Any) -> list[Any]:
        """Literals as the system reads them; names as the test says, never asking any server."""
        self.looked_up.append(host)
        found = self.answers(host) if self.answers else None
        if found is None:
            return socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST, **options)
        return [
            (socket.AF_INET6, 1, 6, "", (one, port, 0, 0)) if ":" in one else (socket.AF_INET, 1, 6, "", (one, port))
            for one in found
        ]

    def put_into(self, monkeypatch: pytest.MonkeyPatch) -> "Net":
        """From now on connections of the worker are made here."""
        net = self

        class Socket(socket.socket):
            """A socket of this network."""

            def settimeout(self, value: float | None) -> None:
                """Notes it."""
                net.timeouts.append(value)
                super().settimeout(value)

            def connect(self, address: Any) -> None:
                """Notes where to, and goes to loopback at most."""
                if not self._permitted(address):
                    raise net.error
                super().connect(address)

            def connect_ex(self, address: Any) -> int:
                """The same, for a connection that is waited for elsewhere."""
                if not self._permitted(address):
                    return errno.ETIMEDOUT if net.error is TimeoutError else errno.ECONNREFUSED
                return super().connect_ex(address)

            def _permitted(self, address: Any) -> bool:
                host, port = address[:2]
                net.connected.append((host, port))
                near = net.loopback and ipaddress.ip_address(host).is_loopback
                return near and net.only in (None, (host, port))

        module = SimpleNamespace(**vars(socket) | {"socket": Socket, "getaddrinfo": self.getaddrinfo})
        monkeypatch.setattr(deadlines, "socket", module)
        return self
