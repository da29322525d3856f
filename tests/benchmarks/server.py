"""A fake API that is never the bottleneck. It answers `processing` to every call, optionally with latency.

An order gets an id of its own.

`python -m tests.benchmarks.server` prints its ports as one JSON line and runs until it is killed. `GET /count` on the
second port, which is always plain http, returns the number of calls. It is an asyncio protocol on uvloop that finds the
end of a request and writes a constant answer.
"""

import argparse
import asyncio
import json
import ssl
from pathlib import Path
from typing import cast

import uvloop

ANSWER = json.dumps(
    {
        "status": "processing",
        "message": "try again later.",
        "output": "",
        "tip": "Get 20x faster image generation using enterprise plan. Click here : https://modelslab.com/enterprise",
    }
).encode()


ORDER = b"post /api/v6/images/text2img "
TAKEN = {"status": "processing", "eta": 3_000, "messege": "Try to fetch request after seconds estimated", "output": []}


def response(body: bytes) -> bytes:
    """Return a complete response with the headers of a hosted API behind a CDN."""
    head = (
        "HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: Mon, 23 Nov 2026 02:00:00 GMT\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: keep-alive\r\n"
        "X-RateLimit-Limit: 100\r\nCF-Cache-Status: DYNAMIC\r\n"
    )
    return head.encode() + b"\r\n" + body


PROCESSING = response(ANSWER)


class RequestCounts:
    """The number of requests, and of requests in flight."""

    def __init__(self) -> None:
        self.requests = 0
        self.waiting = 0
        self.most_waiting = 0


class ApiProtocol(asyncio.Protocol):
    """A connection of a client."""

    def __init__(self, counts: RequestCounts, latency: float, loop: asyncio.AbstractEventLoop) -> None:
        self._counts, self._latency, self._loop = counts, latency, loop
        self._read = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport of the new connection."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are not subclasses of it

    def data_received(self, data: bytes) -> None:
        """Answer each complete request."""
        self._read += data
        while (end := self._read.find(b"\r\n\r\n")) >= 0:
            head = self._read[:end].lower()
            start = head.find(b"content-length:")
            length = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            if len(self._read) < end + 4 + length:
                return
            self._read = self._read[end + 4 + length :]
            self._answer(head)

    def _answer(self, head: bytes) -> None:
        counts = self._counts
        if head.startswith(b"get /count"):
            self._write(response(json.dumps({"requests": counts.requests, "most": counts.most_waiting}).encode()))
            return
        counts.requests += 1
        if head.startswith(ORDER):
            self._write(response(json.dumps({**TAKEN, "id": counts.requests}).encode()))
            return
        if not self._latency:
            self._write(PROCESSING)
            return
        counts.waiting += 1
        counts.most_waiting = max(counts.most_waiting, counts.waiting)
        self._loop.call_later(self._latency, self._answer_late)

    def _answer_late(self) -> None:
        self._counts.waiting -= 1
        self._write(PROCESSING)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


async def serve(latency: float, certificate: Path | None) -> None:
    """Serve until the process is killed."""
    loop, counts = asyncio.get_running_loop(), RequestCounts()
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    server = await loop.create_server(
        lambda: ApiProtocol(counts, latency, loop), "127.0.0.1", 0, ssl=context, backlog=1024
    )
    count_server = await loop.create_server(lambda: ApiProtocol(counts, 0.0, loop), "127.0.0.1", 0)
    ports = [item.sockets[0].getsockname()[1] for item in (server, count_server)]
    print(json.dumps({"port": ports[0], "count_port": ports[1]}), flush=True)
    await server.serve_forever()


def main() -> None:
    """Parse the options and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--certificate", type=Path, help="serve https with this file of key and certificate")
    options = parser.parse_args()
    uvloop.run(serve(options.latency, options.certificate))


if __name__ == "__main__":
    main()
