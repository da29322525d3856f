"""A fake of the hosted API that takes orders, charges each one, and loses connections on purpose.

An order names itself by the field `order_number` of its body. It is charged once its body was read whole and a slot is
free, whatever happens to the answer. Runs as a program (`python tests/acceptance/orders_api.py --key KEY`, which prints
its ports as one JSON line) until standard input closes. It is independent of the product: it uses only the standard
library. Control, report and pictures have a port of their own, whose connections are never cut.
"""

import argparse
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from heapq import heappop, heappush
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any, ClassVar

FIRST_ID = 134_700_000
LARGE_BYTES = 1 << 20  # an order from this size on is cut while it is sent, as it does not fit into socket buffers
HEAD_BYTES = 1 << 16  # of a body: the order's number is in it
RECEIVE_BUFFER_BYTES = 1 << 17
FETCH_PATH = re.compile(r"/api/v6/images/fetch/([0-9]+)")
ORDER_PATH = re.compile(r"/api/v[0-9]+/[a-z0-9_/-]+")
PICTURE_PATH = re.compile(r"/pictures/([0-9]+)\.png")
ORDER_NUMBER = re.compile(rb'"order_number"\s*:\s*([0-9]+)')


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the API behaves. Shares are probabilities from 0 to 1; seconds are of real time."""

    slots: int = 5
    min_seconds: float = 1.0
    max_seconds: float = 4.0
    latency_seconds: float = 0.02
    cut_before: float = 0.0  # of all connections: reset before anything was received
    cut_during: float = 0.0  # of large orders: reset while the body is received, the first time
    cut_after: float = 0.0  # of orders: charged, and the connection is reset, the first time
    swallowed: float = 0.0  # of orders: charged, and never answered, the first time


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request with an order.

    `outcome`: `charged`, `refused` (no free slot), `cut_during` (by the API) or `incomplete` (the client closed the
    connection while it sent). `answer`, of charged orders: `sent`, `cut_after`, `swallowed` or `client_gone`.
    """

    number: int  # of the order; -1 if too little arrived
    began: float
    outcome: str
    remote_id: str = ""
    charged_at: float = 0.0
    ready_at: float = 0.0
    answer: str = ""
    ended: float = 0.0  # when the answer was sent, or the connection was closed


@dataclass(slots=True)
class OrdersState:
    """The state of the API: all arrivals and the jobs, guarded by `lock`."""

    seed: int
    key: str
    behaviour: Behaviour = field(default_factory=Behaviour)
    base: str = ""
    pictures_base: str = ""
    arrivals: list[Arrival] = field(default_factory=list)
    jobs: dict[str, float] = field(default_factory=dict)  # remote id -> when it is ready
    queue: list[float] = field(default_factory=list)  # ready times of jobs that take a slot
    most_queued: int = 0
    cut_before: int = 0
    fetches: int = 0
    strays: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def charge(self, number: int, began: float) -> int:
        """Charge an order, or refuse it if no slot is free. Return the index of its arrival."""
        with self.lock:
            now, behaviour = time.time(), self.behaviour
            while self.queue and self.queue[0] <= now:
                heappop(self.queue)
            if len(self.queue) >= behaviour.slots:
                self.arrivals.append(Arrival(number, began, "refused", ended=now))
                return len(self.arrivals) - 1
            first = not any(arrival.number == number and arrival.remote_id for arrival in self.arrivals)
            ready_at = now + self._draw(f"{number}/seconds", behaviour.min_seconds, behaviour.max_seconds)
            remote_id = str(FIRST_ID + len(self.jobs))
            self.jobs[remote_id] = ready_at
            heappush(self.queue, ready_at)
            self.most_queued = max(self.most_queued, len(self.queue))
            answer = self._fate(number) if first else "sent"
            self.arrivals.append(Arrival(number, began, "charged", remote_id, now, ready_at, answer))
            return len(self.arrivals) - 1

    def cuts_during(self, number: int) -> bool:
        """Return whether to cut a large order while it is received."""
        with self.lock:
            is_first = all(arrival.number != number for arrival in self.arrivals)
            return is_first and self._draw(f"{number}/during", 0, 1) < self.behaviour.cut_during

    def close(self, index: int, **changes: Any) -> None:
        """Record how an arrival ended."""
        with self.lock:
            self.arrivals[index] = replace(self.arrivals[index], ended=time.time(), **changes)

    def record(self, arrival: Arrival) -> None:
        """Record an arrival that was not read whole."""
        with self.lock:
            self.arrivals.append(arrival)

    def stray(self, request: str) -> None:
        """Record a request that no client should send."""
        with self.lock:
            self.strays.append(request)

    def report(self) -> dict[str, Any]:
        """Return everything so far as JSON."""
        with self.lock:
            return {
                "arrivals": [asdict(arrival) for arrival in self.arrivals],
                "slots": self.behaviour.slots,
                "most_queued": self.most_queued,
                "cut_before": self.cut_before,
                "fetches": self.fetches,
                "strays": self.strays,
            }

    def _fate(self, number: int) -> str:
        drawn, behaviour = self._draw(f"{number}/answer", 0, 1), self.behaviour
        if drawn < behaviour.cut_after:
            return "cut_after"
        return "swallowed" if drawn < behaviour.cut_after + behaviour.swallowed else "sent"

    def _draw(self, name: str, low: float, high: float) -> float:
        return Random(f"{self.seed}/{name}").uniform(low, high)


def picture(remote_id: str) -> bytes:
    """Return the picture of a job: a valid PNG of two by two pixels that depends on the id."""
    noise = hashlib.sha256(remote_id.encode()).digest()
    rows = b"".join(b"\0" + noise[row * 6 : row * 6 + 6] for row in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def reset(connection: socket.socket) -> None:
    """Close a connection with a reset, so that the client's next send fails too."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(connection.detach())  # files of this connection do not keep it open


def is_open(connection: socket.socket) -> bool:
    """Return whether the client still holds its end of the connection open."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    api: ClassVar[OrdersState]

    def log_message(self, *_: object) -> None:
        """Do not log requests; the report has them."""

    def reply(self, status: int, body: Mapping[str, object] | bytes, media_type: str = "application/json") -> None:
        """Send an answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()


class OrdersHandler(_Handler):
    """Takes orders, and answers fetches at /api/v6/images/fetch/{id}."""

    def do_POST(self) -> None:
        """Answer an order or a fetch."""
        began, length = time.time(), self.headers.get("Content-Length") or ""
        fetch = FETCH_PATH.fullmatch(self.path)
        if not length.isdigit() or not (fetch or ORDER_PATH.fullmatch(self.path)):
            self._refuse(f"POST {self.path} with length {length!r}")
        elif fetch:
            self._fetch(fetch[1], self.rfile.read(int(length)))
        else:
            self._order(began, int(length))

    def do_GET(self) -> None:
        """Refuse it: no call of this API is a GET."""
        self._refuse(f"GET {self.path}")

    def _order(self, began: float, length: int) -> None:
        head = self._received(min(length, HEAD_BYTES))
        match = ORDER_NUMBER.search(head)
        number = int(match[1]) if match else -1
        if len(head) == HEAD_BYTES and length >= LARGE_BYTES and self.api.cuts_during(number):
            self._cut()
            self.api.record(Arrival(number, began, "cut_during", ended=time.time()))
            return
        body = head + self._received(length - len(head))
        if len(body) < length:
            self.close_connection = True
            self.api.record(Arrival(number, began, "incomplete", ended=time.time()))
            return
        if match is None or not self._has_key(body):
            self._refuse(f"POST {self.path} without a number or the key")
            return
        self._answer(self.api.charge(number, began))

    def _answer(self, index: int) -> None:
        """Answer an order that was charged or refused."""
        arrival, limit = self.api.arrivals[index], self.api.behaviour.slots
        time.sleep(self.api.behaviour.latency_seconds)
        if arrival.answer == "cut_after":
            self._cut()
            self.api.close(index)
        elif arrival.answer == "swallowed":
            self.close_connection = True
            with suppress(OSError):
                self.rfile.read()  # until the client gives up
            self.api.close(index)
        elif not is_open(self.connection):
            self.close_connection = True
            self.api.close(index, answer="client_gone" if arrival.remote_id else "")
        elif arrival.remote_id:
            self.api.close(index)  # before it is sent, so that the report is never behind
            self.reply(200, self._processing(arrival))
        else:
            text = f"Rate limit exceeded. Maximum {limit} queued requests allowed."
            self.reply(429, {"status": "error", "message": text, "retry_after": 30})

    def _processing(self, arrival: Arrival) -> dict[str, object]:
        return {
            "status": "processing",
            "tip": "",
            "eta": round(arrival.ready_at - arrival.charged_at),
            "message": "Try to fetch request after seconds estimated",
            "webhook_status": "",
            "fetch_result": f"{self.api.base}/api/v6/images/fetch/{arrival.remote_id}",
            "id": int(arrival.remote_id),
            "output": [],
            "meta": {"prompt": "a lighthouse"},
        }

    def _fetch(self, remote_id: str, body: bytes) -> None:
        if not self._has_key(body):
            self._refuse(f"POST {self.path} without the key")
            return
        with self.api.lock:
            self.api.fetches += 1
            ready_at = self.api.jobs.get(remote_id)
        if ready_at is None:
            self.reply(200, {"status": "failed", "id": "", "message": "Request not found", "output": ""})
        elif time.time() < ready_at:
            self.reply(200, {"status": "processing", "message": "try again later.", "output": ""})
        else:
            link = f"{self.api.pictures_base}/pictures/{remote_id}.png"
            self.reply(200, {"status": "success", "id": int(remote_id), "output": [link]})

    def _has_key(self, body: bytes) -> bool:
        try:
            return bool(json.loads(body)["key"] == self.api.key)
        except (ValueError, TypeError, KeyError):
            return False

    def _received(self, length: int) -> bytes:
        """Read this many bytes, or fewer if the client closes the connection."""
        received = bytearray()
        with suppress(OSError):
            while len(received) < length and (part := self.rfile.read1(length - len(received))):
                received += part
        return bytes(received)

    def _cut(self) -> None:
        self.close_connection = True
        reset(self.connection)

    def _refuse(self, request: str) -> None:
        self.api.stray(request)
        self.close_connection = True
        self.reply(200, {"status": "error", "message": "Invalid API Request"})


class ControlHandler(_Handler):
    """Serves /report, /behaviour and the pictures. Its connections are never cut."""

    def do_GET(self) -> None:
        """Return the report or a picture."""
        match = PICTURE_PATH.fullmatch(self.path)
        if self.path == "/report":
            self.reply(200, self.api.report())
        elif match and self.api.jobs.get(match[1], float("inf")) <= time.time():
            self.reply(200, picture(match[1]), "image/png")
        else:
            self.api.stray(f"GET {self.path}")
            self.reply(404, b"<html><body>404</body></html>", "text/html")

    def do_POST(self) -> None:
        """Change the behaviour from now on."""
        changes = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.api.lock:
            self.api.behaviour = replace(self.api.behaviour, **changes)
        self.reply(200, asdict(self.api.behaviour))


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def __init__(self, handler: type[_Handler], api: OrdersState) -> None:
        self.api, self._random = api, Random(f"{api.seed}/connections")
        super().__init__(("127.0.0.1", 0), type(f"Bound{handler.__name__}", (handler,), {"api": api}))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore connection errors: a killed client closes its connections."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # the stub names its socket types


class _CuttingServer(_Server):
    def verify_request(self, request: Any, client_address: object) -> bool:
        """Reset some connections at once. One whose client has already sent something is not cut before sending."""
        if self._random.random() >= self.api.behaviour.cut_before:
            return True
        with suppress(BlockingIOError):
            request.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            return True
        reset(request)
        with self.api.lock:
            self.api.cut_before += 1
        return False


def main() -> None:
    """Serve until standard input closes, so that the servers stop with the program that started them."""
    parser = argparse.ArgumentParser(description="A fake hosted API that takes orders and charges them.")
    parser.add_argument("--key", required=True)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    api = OrdersState(options.seed, options.key)
    orders, control = _CuttingServer(OrdersHandler, api), _Server(ControlHandler, api)
    api.base, api.pictures_base = orders.address, control.address
    for server in (orders, control):
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 1.0}, daemon=True).start()
    print(json.dumps({"base": orders.address, "control": control.address}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
