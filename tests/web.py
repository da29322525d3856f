"""A small HTTP server for tests. It can misbehave byte by byte: cut off, send slowly, declare wrong lengths, hang."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

Answer = Callable[[socket.socket], None]


@dataclass(frozen=True, slots=True)
class Request:
    """A received request. Header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    raw: bytes


@dataclass(slots=True)
class Web:
    """The server: `answers` by path, and all received requests. One request per connection."""

    port: int
    host: str = "127.0.0.1"
    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    connections: int = 0

    @property
    def url(self) -> str:
        """The server's URL, without a slash at the end."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    def serves(self, path: str, answer: Answer) -> str:
        """Set the answer for `path`. Return the full URL."""
        self.answers[path] = answer
        return self.url + path


@contextmanager
def web_server(host: str = "127.0.0.1") -> Iterator[Web]:
    """Run a server on a free port of a loopback address."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        web = Web(listener.getsockname()[1], host)
        thread = threading.Thread(target=_accept, args=(listener, web), daemon=True)
        thread.start()
        yield web
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def _accept(listener: socket.socket, web: Web) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        web.connections += 1
        threading.Thread(target=_serve, args=(client, web), daemon=True).start()


def _serve(client: socket.socket, web: Web) -> None:
    with client, suppress(OSError):  # a client may hang up at any time
        client.settimeout(10)
        request = _read(client)
        if request is None:
            return
        web.requests.append(request)
        web.answers.get(request.path.partition("?")[0], page(404, b"nothing here"))(client)


def _read(client: socket.socket) -> Request | None:
    raw = b""
    while b"\r\n\r\n" not in raw:
        chunk = client.recv(65_536)
        if not chunk:
            return None
        raw += chunk
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", "0")):
        chunk = client.recv(65_536)
        body += chunk
        raw += chunk
    method, path, _ = first.split(" ", 2)
    return Request(method, path, headers, body, raw)


def page(status: int, body: bytes, **headers: str) -> Answer:
    """Return an ordinary answer. Header names are written with `_` for `-`."""
    named = {"Content-Length": str(len(body))} | {name.replace("_", "-"): value for name, value in headers.items()}
    return sends(head(status, **named) + body)


def head(status: int, **headers: str) -> bytes:
    """Return a status line and headers."""
    lines = [f"HTTP/1.1 {status} Status", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def sends(*parts: bytes) -> Answer:
    """Return an answer that sends these bytes unchanged, and hangs up."""

    def answer(client: socket.socket) -> None:
        for part in parts:
            client.sendall(part)

    return answer


def drips(first: bytes, drop: bytes, *, every: float, seconds: float) -> Answer:
    """Return an answer that sends `first`, then `drop` repeatedly, for longer than any client should wait."""

    def answer(client: socket.socket) -> None:
        client.sendall(first)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(every)
            client.sendall(drop)

    return answer


def floods(first: bytes, block: bytes, *, times: int) -> Answer:
    """Return an answer that sends `first`, then `block` this many times, or until the client stops reading."""

    def answer(client: socket.socket) -> None:
        client.sendall(first)
        for _ in range(times):
            client.sendall(block)

    return answer


def resets(client: socket.socket) -> None:
    """Reset the connection."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


@dataclass
class Picture:
    """A file on a server whose transfers break. `cuts` has the bytes after which each transfer is cut, in order."""

    web: Web
    body: bytes
    cuts: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"v1"'})
    ranges: bool = True
    sent: int = 0
    spans: list[str] = field(default_factory=list)

    def __call__(self, client: socket.socket) -> None:
        request_headers = self.web.requests[-1].headers
        span = request_headers.get("range", "")
        self.spans.append(span)
        start = 0
        if self.ranges and span and request_headers.get("if-range") in self.headers.values():
            start = int(span.removeprefix("bytes=").removesuffix("-"))
        remaining = self.body[start:]
        response_headers = self.headers | {"Content-Length": str(len(remaining))}
        if start:
            response_headers["Content-Range"] = f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"
        client.sendall(head(206 if start else 200, **response_headers))
        if self.cuts:
            remaining = remaining[: self.cuts.pop(0)]
        client.sendall(remaining)
        self.sent += len(remaining)


class Always(dict[str, Answer]):
    """The same answer for every path, for `Web.answers`."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    def get(self, *_: Any) -> Any:
        """Return the answer."""
        return self._answer
