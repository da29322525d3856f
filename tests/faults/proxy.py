"""TCP proxy for fault injection: it forwards data, refuses connections, drops data or cuts connections."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

CHUNK = 65_536

Mode = Literal["pass", "refuse", "swallow"]


class Proxy:
    """Proxy in front of one server.

    `mode` may change at any time. When a client sends the bytes `cut_at`, its connection is cut.
    """

    def __init__(self, host: str, port: int) -> None:
        self.mode: Mode = "pass"
        self.cut_at: bytes | None = None
        self.cut_before = True  # whether to cut before or after these bytes are forwarded
        self.cuts = 0
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        self._half_open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_all(self) -> None:
        """Close all open connections, as a restart of the server does."""
        with self._lock:
            for connection in self._open:
                _close(connection)

    def forget_all(self) -> int:
        """Make all open connections half-open, as a router that lost its state does. Return how many.

        Neither side is notified; the data that it sends is dropped. New connections work.
        """
        with self._lock:
            self._half_open |= self._open
            return len(self._open) // 2

    def close(self) -> None:
        """Stop the proxy and close all connections."""
        _close(self._listener)
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
        for connection in (source, sink):
            _close(connection)
        with self._lock:
            self._open -= {source, sink}


def _close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextmanager
def running_proxy(host: str, port: int) -> Iterator[Proxy]:
    """Run a proxy in front of a server."""
    proxy = Proxy(host, port)
    try:
        yield proxy
    finally:
        proxy.close()
