"""Serves the metrics over HTTP: `/metrics` for Prometheus, `/healthz` for whoever looks after the process."""

import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.registry import CollectorRegistry

log = logging.getLogger(__name__)

PLAIN = "text/plain; charset=utf-8"
CLIENT_SECONDS = 10.0  # a client that sends or takes nothing for so long is let go
SCRAPES_MOST = 16  # at once; more are turned away


class MetricsServer(ThreadingHTTPServer):
    """Listens once it is made; `serve_forever` answers until `shutdown`. Raises OSError where it can't listen."""

    daemon_threads = True

    def __init__(self, host: str, port: int, metrics: CollectorRegistry) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.metrics = metrics
        self.places = threading.BoundedSemaphore(SCRAPES_MOST)
        super().__init__((host, port), _Answer)

    @property
    def address(self) -> str:
        """Where it listens, as a URL writes it."""
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes) else str(host)
        return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"

    def server_bind(self) -> None:
        """As the base does, but without asking anybody for this machine's full name."""
        socket.socket.bind(self.socket, self.server_address)
        self.server_address = self.socket.getsockname()


class _Answer(BaseHTTPRequestHandler):
    timeout = CLIENT_SECONDS
    server: MetricsServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._send(200, PLAIN, b"ok\n")
        elif path != "/metrics":
            self._send(404, PLAIN, b"look at /metrics\n")
        elif not self.server.places.acquire(blocking=False):
            self._send(503, PLAIN, b"too many scrapes at once\n")
        else:
            self._scrape()

    def _scrape(self) -> None:
        try:
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            body = encode(self.server.metrics)
        except Exception:  # whatever it is, whoever scrapes must learn that there is nothing, and the log why
            log.exception("a fault of ours, nothing is told")
            self._send(500, PLAIN, b"a fault of ours, see the log\n")
        else:
            self._send(200, content_type, body)
        finally:
            self.server.places.release()

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        """Not which Python this is."""
        return "fetch-worker"

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes come every few seconds; nobody wants to read of them."""


def exposition(metrics: CollectorRegistry) -> str:
    """All metrics as text, once."""
    return generate_latest(metrics).decode()
