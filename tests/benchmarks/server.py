"""A server that is not the bottleneck: it says `processing` to every call, after a while if told so.

`python -m tests.benchmarks.server` prints its ports as one JSON line and runs until it is ended (`GET /count` on the
second one, always plain http, says how many calls there were). A protocol on uvloop (libuv, compiled): it looks for the
end of a request and writes a ready-made answer.
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


def response(body: bytes) -> bytes:
    """A whole response, with headers as a hosted API behind a CDN sends them."""
    head = (
        "HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: Mon, 23 Nov 2026 02:00:00 GMT\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: keep-alive\r\n"
        "X-RateLimit-Limit: 100\r\nCF-Cache-Status: DYNAMIC\r\n"
    )
    return head.encode() + b"\r\n" + body


PROCESSING = response(ANSWER)


class Tally:
    """How many calls came, and how many were waited for at once."""

    def __init__(self) -> None:
        self.requests = 0
        self.waiting = 0
        self.most_waiting = 0


class Conversation(asyncio.Protocol):
    """One connection."""

    def __init__(self, tally: Tally, latency: float, loop: asyncio.AbstractEventLoop) -> None:
        self._tally, self._latency, self._loop = tally, latency, loop
        self._read = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody connects."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own are not derived from it

    def data_received(self, data: bytes) -> None:
        """Answers each whole request."""
        self._read += data
        while (end := self._read.find(b"\r\n\r\n")) >= 0:
            head = self._read[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._read) < end + 4 + length:
                return
            self._read = self._read[end + 4 + length :]
            self._answer(head)

    def _answer(self, head: bytes) -> None:
        tally = self._tally
        if head.startswith(b"get /count"):
            self._write(response(json.dumps({"requests": tally.requests, "most": tally.most_waiting}).encode()))
            return
        tally.requests += 1
        if not self._latency:
            self._write(PROCESSING)
            return
        tally.waiting += 1
        tally.most_waiting = max(tally.most_waiting, tally.waiting)
        self._loop.call_later(self._latency, self._late)

    def _late(self) -> None:
        self._tally.waiting -= 1
        self._write(PROCESSING)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


async def serve(latency: float, certificate: Path | None) -> None:
    """Serves for as long as the process lives."""
    loop, tally = asyncio.get_running_loop(), Tally()
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    server = await loop.create_server(
        lambda: Conversation(tally, latency, loop), "127.0.0.1", 0, ssl=context, backlog=1024
    )
    counting = await loop.create_server(lambda: Conversation(tally, 0.0, loop), "127.0.0.1", 0)
    ports = [made.sockets[0].getsockname()[1] for made in (server, counting)]
    print(json.dumps({"port": ports[0], "count_port": ports[1]}), flush=True)
    await server.serve_forever()


def main() -> None:
    """Reads the options and serves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--certificate", type=Path, help="a file with key and certificate: serves https")
    options = parser.parse_args()
    uvloop.run(serve(options.latency, options.certificate))


if __name__ == "__main__":
    main()
