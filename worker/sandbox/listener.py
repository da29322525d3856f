"""HTTP server of the stand-in: one thread per connection, keep-alive, and answers that may be sent byte by byte."""

import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from worker.sandbox.answers import Answer, invalid_request, json_answer

if TYPE_CHECKING:
    from worker.sandbox.server import Sandbox

MAX_BODY_BYTES = 9 << 20
IDLE_SECONDS = 120.0  # an idle connection is closed after this time
CLOSING_SECONDS = 3.0
CHECK_SECONDS = 0.5  # a stop is noticed after at most this time


class Listener(ThreadingHTTPServer):
    """HTTP server with one thread per connection. It tracks open connections, so that they can be closed."""

    daemon_threads = True
    request_queue_size = 512
    timeout = CHECK_SECONDS

    def __init__(self, site: "Sandbox", host: str, port: int, *, verbose: bool = False) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.site, self.verbose = site, verbose
        self.open_connections: set[socket.socket] = set()
        self.all_closed = threading.Condition()
        self._ending = False
        super().__init__((host, port), Handler)
        self._thread = threading.Thread(target=self._serve, name="sandbox", daemon=True)

    def start(self) -> "Listener":
        """Accept connections in a thread until `stop` is called."""
        self._thread.start()
        return self

    def server_bind(self) -> None:
        """Bind without the reverse DNS lookup of the parent class."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def _serve(self) -> None:
        while not self._ending:
            self.handle_request()

    def stop(self) -> None:
        """Stop accepting connections, and shut down the open ones. A connection to itself ends the current wait."""
        self._ending = True
        with suppress(OSError):
            socket.create_connection((self.server_name, self.server_port), CHECK_SECONDS).close()
        self._thread.join()
        self.server_close()
        with self.all_closed:
            for connection in self.open_connections:
                with suppress(OSError):  # the client closed it first
                    connection.shutdown(socket.SHUT_RDWR)
            self.all_closed.wait_for(lambda: not self.open_connections, CLOSING_SECONDS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Register the connection before its thread starts."""
        with self.all_closed:
            self.open_connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Unregister the connection after it is closed."""
        super().shutdown_request(request)
        with self.all_closed:
            self.open_connections.discard(request)
            self.all_closed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of clients that disconnected."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Reads requests from a connection one by one and answers each of them."""

    protocol_version = "HTTP/1.1"
    server_version = "sandbox"
    sys_version = ""
    disable_nagle_algorithm = True
    wbufsize = -1
    timeout = IDLE_SECONDS
    server: Listener

    def do_GET(self) -> None:
        """Answer outputs, the HTML page, and API calls by GET."""
        raw = self._body()
        if raw is None:
            return
        path, _, query = self.path.partition("?")
        header = self.headers.get("Key") or self.headers.get("Authorization", "").removeprefix("Bearer ")
        self._send(self.server.site.got(path, query, raw, header))

    def do_POST(self) -> None:
        """Answer API calls by POST."""
        path = self.path.partition("?")[0]
        if self.server.site.cuts_order(path):
            self.close_connection = True
            return
        raw = self._body()
        if raw is not None:
            self._send(self.server.site.posted(path, self.headers.get("Content-Type", ""), raw))

    def _body(self) -> bytes | None:
        """Return the body of the request, or None if it is unusable. Then it was answered, or the client has gone."""
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit() and len(length) < 9):
            self.close_connection = True  # the end of the body is unknown, so no further request can be read
            self._send(invalid_request())
            return None
        if int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self._send(json_answer({"status": "error", "message": "Invalid API Request"}, status=413))
            return None
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            self.close_connection = True  # the client disconnected during its request
            return None
        return raw

    def _send(self, answer: Answer) -> None:
        if answer.lost:
            self.close_connection = True
            if answer.lost == "stalled":
                self.rfile.read()  # until the client closes the connection
            return
        headers = {name.title(): value for name, value in answer.headers.items()}
        if "Content-Length" in headers:
            self.close_connection = True
        else:
            headers["Content-Length"] = str(len(answer.body))
        if self.close_connection:
            headers["Connection"] = "close"
        if answer.drip_seconds:
            self._drip(answer, headers)
            return
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def _drip(self, answer: Answer, headers: dict[str, str]) -> None:
        self.log_request(answer.status)
        lines = [f"{self.protocol_version} {answer.status} {self.responses.get(answer.status, ('Odd', ''))[0]}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        first, dripped = (b"", head + answer.body) if answer.drip_headers else (head, answer.body)
        self.wfile.write(first)
        for position in range(len(dripped)):
            self.wfile.write(dripped[position : position + 1])
            self.wfile.flush()
            time.sleep(answer.drip_seconds)

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Log one line per request if verbose. Query, headers and body are left out because they may contain a key."""
        if self.server.verbose:
            path = ascii(getattr(self, "path", "").partition("?")[0])[1:-1]
            sys.stderr.write(f"{self.command} {path} {int(code)}\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing else."""
