"""Serve the metrics over HTTP: `/metrics` for Prometheus, `/healthz` for health checks of the process."""

import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.registry import CollectorRegistry

log = logging.getLogger(__name__)

PLAIN = "text/plain; charset=utf-8"
CLIENT_SECONDS = 10.0  # a connection without traffic for longer is closed
MAX_SCRAPES = 16  # concurrent scrapes; more are answered with 503


class MetricsServer(ThreadingHTTPServer):
    """Listens from its creation; `serve_forever` answers until `shutdown`. Raises OSError if it can't listen."""

    daemon_threads = True

    def __init__(self, host: str, port: int, metrics: CollectorRegistry) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.metrics = metrics
        self.scrape_slots = threading.BoundedSemaphore(MAX_SCRAPES)
        super().__init__((host, port), _Handler)

    @property
    def address(self) -> str:
        """The host and port, as in a URL."""
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes) else str(host)
        return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"

    def server_bind(self) -> None:
        """Bind the socket without a DNS query for the name of this machine, which the base class makes."""
        socket.socket.bind(self.socket, self.server_address)
        self.server_address = self.socket.getsockname()


class _Handler(BaseHTTPRequestHandler):
    timeout = CLIENT_SECONDS
    server: MetricsServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._send(200, PLAIN, b"ok\n")
        elif path != "/metrics":
            self._send(404, PLAIN, b"see /metrics\n")
        elif not self.server.scrape_slots.acquire(blocking=False):
            self._send(503, PLAIN, b"too many concurrent scrapes\n")
        else:
            self._scrape()

    def _scrape(self) -> None:
        try:
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            body = encode(self.server.metrics)
        except Exception:  # answer 500 for any error, and log it
            log.exception("internal error, no metrics are sent")
            self._send(500, PLAIN, b"internal error, see the log\n")
        else:
            self._send(200, content_type, body)
        finally:
            self.server.scrape_slots.release()

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        """Return a Server header without the Python version."""
        return "fetch-worker"

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: scrapes come every few seconds."""


def exposition(metrics: CollectorRegistry) -> str:
    """Return all metrics as text."""
    return generate_latest(metrics).decode()
