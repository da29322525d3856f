"""A TCP proxy that does what networks do: passes, refuses, swallows, and cuts at the worst moment."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

CHUNK = 65_536

Mode = Literal["pass", "refuse", "swallow"]


class Proxy:
    """In front of one server. `mode` may be changed at any time; `cut_at` cuts connections whose client sends that."""

    def __init__(self, host: str, port: int) -> None:
        self.mode: Mode = "pass"
        self.cut_at: bytes | None = None
        self.cut_before = True  # before the bytes are passed on, or after
        self.cuts = 0
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        self._half_open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_all(self) -> None:
        """Ends all connections there are, as a restart of the server does."""
        with self._lock:
            for one in self._open:
                _end(one)

    def forget_all(self) -> int:
        """Leaves all connections there are half-open, as a router that lost its table does; how many.

        Neither side hears of it: what it sends comes to nothing. New connections pass.
        """
        with self._lock:
            self._half_open |= self._open
            return len(self._open) // 2

    def close(self) -> None:
        """Ends it."""
        _end(self._listener)
        self.cut_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.mode == "refuse":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                client.close()
                continue
            try:
                server = socket.create_connection(self._target, timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                self._open |= {client, server}
            for source, sink, from_client in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pump, args=(source, sink, from_client), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, from_client: bool) -> None:
        with suppress(OSError):
            while chunk := source.recv(CHUNK):
                if self.mode == "swallow" or source in self._half_open:
                    continue
                cut = from_client and self.cut_at is not None and self.cut_at in chunk
                if not (cut and self.cut_before):
                    sink.sendall(chunk)
                if cut:
                    self.cuts += 1
                    break
        for one in (source, sink):
            _end(one)
        with self._lock:
            self._open -= {source, sink}


def _end(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@contextmanager
def proxy(host: str, port: int) -> Iterator[Proxy]:
    """One, gone afterwards."""
    made = Proxy(host, port)
    try:
        yield made
    finally:
        made.close()
