"""A fake hosted picture API with a picture host. Jobs are defined in advance, and all requests are recorded.

Runs as a program (`python -m tests.acceptance.api --port 0`, which prints its ports as one JSON line) or in threads
(`ApiServers`). It is independent of the product: it uses only the standard library.
"""

import argparse
import hashlib
import json
import re
import struct
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, Self
from urllib.parse import quote

FAIL_WITH = "says:"  # script entry: answer "failed" with the rest of the entry as message
TIP = "Get 20x faster image generation using enterprise plan. Click here : https://modelslab.com/enterprise"
FETCH_PATH = re.compile(r"/api/(?:v3|v6/images)/fetch/([A-Za-z0-9][A-Za-z0-9_-]{0,127})")
ORDER_PATH = "/api/v6/images/text2img"
PICTURE_PATH = re.compile(r"/generations/([A-Za-z0-9_-]+)\.(\d+)\.png")
PICTURE_TYPES = ("image/png", "text/plain", "application/octet-stream")


@dataclass(frozen=True, slots=True)
class ApiOutput:
    """One output of a job, and how the picture host answers for it."""

    trick: str = "good"  # or html, truncated, missing, late, redirect, elsewhere, echo
    target: str = ""  # the target of `redirect`, or the URL of `elsewhere`
    seconds: float = 0.0  # `late` answers 404 until this long after "ready"


@dataclass(frozen=True, slots=True)
class ApiJob:
    """A job of the API. It is ready `seconds` after `started`; `script` has the answers to its first fetch calls."""

    remote_id: str
    started: float
    seconds: float
    outputs: tuple[ApiOutput, ...] = (ApiOutput(),)
    script: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ApiOrder:
    """An order that the API expects. It names itself by its field `track_id`; if it is taken, its job is `job`.

    `answer` is `taken_echo`, `ready_echo`, `error_echo`, `gateway_echo`, `cut_echo` (the connection ends within the
    answer), or FAIL_WITH and a message.
    """

    track_id: str
    answer: str
    job: ApiJob


@dataclass(frozen=True, slots=True)
class ApiBehaviour:
    """The behaviour of the API for all jobs."""

    accept: tuple[str, ...] = ()  # the accepted keys
    rejected_status: int = 200  # HTTP status for a wrong key: 200 in the old API, 401 in the new one
    latency_seconds: float = 0.0  # duration of a fetch call
    picture_seconds: float = 0.0  # duration of a picture download
    calls_per_second: int = 0  # more calls are refused; 0 means no limit
    limit_form: str = "429 with retry_after"  # or "bare 429", "200 with retry_after"
    endless: bool = False  # every job id exists, and no job becomes ready
    echo_rejected: bool = False  # the message contains the refused key


@dataclass(frozen=True, slots=True)
class FetchCall:
    """A fetch call: its times, job, key and the name of its answer."""

    began: float
    ended: float
    remote_id: str
    key: str
    answer: str


@dataclass(frozen=True, slots=True)
class OrderCall:
    """A request with an order: its time, name, key, the name of its answer, and the fields other than the key."""

    began: float
    track_id: str
    key: str
    answer: str
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PictureGet:
    """A request for a picture. `complete` means that the whole answer was sent."""

    began: float
    remote_id: str
    position: int
    status: int
    complete: bool
    carried_key: bool


def picture(seed: int, remote_id: str, position: int) -> bytes:
    """Return a valid PNG of 20 to 200 kB with noise as pixels. It depends only on the arguments."""
    noise = hashlib.shake_256(f"{seed}/{remote_id}/{position}".encode())
    width = 64 + int.from_bytes(noise.digest(2)) % 120
    rows = (20_000 + int.from_bytes(noise.digest(6)[2:]) % 178_000) // (width * 3 + 1)
    stride = width * 3
    pixels = noise.digest(rows * stride)
    raw = b"".join(b"\0" + pixels[row * stride : (row + 1) * stride] for row in range(rows))
    header = struct.pack(">IIBBBBB", width, rows, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def spread(seed: int, name: str, minimum: float, maximum: float) -> float:
    """Return a pseudo-random number between minimum and maximum that depends only on seed and name."""
    draw = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6])
    return minimum + (maximum - minimum) * draw / 2**48


@dataclass(slots=True)
class ApiState:
    """The state of both servers: jobs, behaviour and recorded requests."""

    seed: int = 1
    behaviour: ApiBehaviour = field(default_factory=ApiBehaviour)
    pictures_address: str = ""
    jobs: dict[str, ApiJob] = field(default_factory=dict)
    orders: dict[str, ApiOrder] = field(default_factory=dict)
    calls: list[FetchCall] = field(default_factory=list)
    order_calls: list[OrderCall] = field(default_factory=list)
    gets: list[PictureGet] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _calls_per_job: dict[str, int] = field(default_factory=dict)
    _recent: deque[float] = field(default_factory=deque)

    def register(self, jobs: Sequence[ApiJob]) -> None:
        """Add jobs."""
        with self.lock:
            self.jobs.update({job.remote_id: job for job in jobs})

    def expect(self, orders: Sequence[ApiOrder]) -> None:
        """Add orders that may come."""
        with self.lock:
            self.orders.update({order.track_id: order for order in orders})

    def behave(self, **changes: Any) -> None:
        """Change the behaviour from the next request on."""
        with self.lock:
            self.behaviour = replace(self.behaviour, **changes)

    def ledger(self) -> dict[str, Any]:
        """Return all requests so far as plain lists."""
        with self.lock:
            return {
                "calls": [asdict(call) for call in self.calls],
                "orders": [asdict(call) for call in self.order_calls],
                "gets": [asdict(get) for get in self.gets],
                "strays": list(self.strays),
            }

    def address(self, job: ApiJob, position: int, key: str) -> str:
        """Return the URL of an output for the success answer."""
        output = job.outputs[position]
        if output.trick == "elsewhere":
            return output.target
        query = f"?key={quote(key, safe='')}" if output.trick == "echo" else ""
        return f"{self.pictures_address}/generations/{job.remote_id}.{position}.png{query}"

    def answer(self, remote_id: str, key: str, now: float) -> tuple[str, int, object]:
        """Return the name, HTTP status and body of the answer to a fetch call."""
        with self.lock:
            if key not in self.behaviour.accept:
                return self._rejected(key)
            self._recent.append(now)
            while self._recent[0] <= now - 1.0:
                self._recent.popleft()
            if 0 < self.behaviour.calls_per_second < len(self._recent):
                wait = {} if self.behaviour.limit_form == "bare 429" else {"retry_after": 2}
                status = 200 if self.behaviour.limit_form.startswith("200") else 429
                return "rate_limited", status, _error("Rate limit exceeded.", TIP) | wait
            if self.behaviour.endless:
                return "processing", 200, _processing(0)
            job = self.jobs.get(remote_id)
            if job is None:
                return "unknown", 200, {"status": "failed", "id": "", "message": "Request not found", "output": ""}
            previous_calls = self._calls_per_job.get(remote_id, 0)
            self._calls_per_job[remote_id] = previous_calls + 1
        if previous_calls < len(job.script):
            return self._scripted(job, job.script[previous_calls], key)
        if now < job.started + job.seconds:
            return "processing", 200, _processing(previous_calls)
        return "success", 200, self._success(job, key)

    def order_answer(self, track_id: str, key: str, payload: Mapping[str, Any]) -> tuple[str, int, object]:
        """Return the name, HTTP status and body of the answer to an order. A job begins if it is taken."""
        with self.lock:
            if key not in self.behaviour.accept:
                return self._rejected(key)
            order = self.orders.get(track_id)
            if order is None:
                return "unexpected", 200, _error("Invalid API Request", "the program expects no such order")
            echo = {"tip": f"thanks, {key}", "meta": {"key": key, "quoted": quote(key, safe=""), **payload}}
            if order.answer in ("taken_echo", "ready_echo", "cut_echo"):
                self.jobs[order.job.remote_id] = order.job
        match order.answer:
            case "ready_echo":
                return order.answer, 200, self._success(order.job, key) | echo
            case "taken_echo" | "cut_echo":
                return order.answer, 200, _taken(order.job.remote_id, key) | echo
            case "error_echo":
                return order.answer, 200, _error(f"The order of key {key} ({quote(key, safe='')}) is refused", key)
            case "gateway_echo":
                return order.answer, 502, f"<html><body>Bad gateway. Request: {json.dumps({'key': key})}</body></html>"
            case _:
                return "failed", 200, {"status": "failed", "message": order.answer[len(FAIL_WITH) :], "output": ""}

    def _rejected(self, key: str) -> tuple[str, int, object]:
        text = "Invalid Api Key" + (f": {key}" if self.behaviour.echo_rejected else "")
        return "wrong_key", self.behaviour.rejected_status, _error(text, "4. Make sure you have valid API key.")

    def _scripted(self, job: ApiJob, name: str, key: str) -> tuple[str, int, object]:
        match name:
            case "failed":
                return (
                    name,
                    200,
                    {
                        "status": "failed",
                        "id": "",
                        "message": "Processing failed: Invalid input dimensions",
                        "output": "",
                    },
                )
            case "failed_echo":
                return name, 200, {"status": "failed", "id": "", "message": f"Failed for key {key}", "output": ""}
            case "error_echo":
                return name, 200, _error(f"The worker of key {key} ({quote(key, safe='')}) gave up", key)
            case "crash_echo":
                return name, 500, f"<html><body>Whoops: request body was {json.dumps({'key': key})}</body></html>"
            case "rate_limited":
                return name, 429, _error("Rate limit exceeded.", TIP) | {"retry_after": 1}
            case "success_echo":
                return name, 200, self._success(job, key) | {"tip": f"thanks, {key}", "meta": {"key": key}}
            case _ if name.startswith(FAIL_WITH):
                return "failed", 200, {"status": "failed", "id": "", "message": name[len(FAIL_WITH) :], "output": ""}
            case _:
                return "processing", 200, _processing(0)

    def _success(self, job: ApiJob, key: str) -> dict[str, object]:
        links = [self.address(job, position, key) for position in range(len(job.outputs))]
        number: object = int(job.remote_id) if job.remote_id.isdecimal() else job.remote_id
        # Texts inside a success answer must not be read as errors.
        meta = {"prompt": "rate limit exceeded, invalid api key, request not found", "seed": 3166507472, "W": 512}
        all_good = all(output.trick == "good" for output in job.outputs)  # otherwise no proxy links are given
        proxies = [
            f"{self.pictures_address}/proxy/{job.remote_id}.{position}.png" for position in range(len(links) * all_good)
        ]
        forms: tuple[dict[str, object], ...] = (
            {"status": "success", "id": number, "output": links},
            {"status": "success", "id": number, "output": links, "tip": ""},
            {"status": "success", "id": str(number), "output": links, "proxy_links": None, "meta": meta},
            {"status": "success", "generationTime": 1.96, "id": number, "output": links, "proxy_links": proxies},
            {"status": "success", "id": None, "output": links, "warning": "", "proxy_links": ""},
            {"status": "success", "generationTime": 6.9, "id": number, "output": links[0]},
            {"status": "success", "output": links, "nsfw_content_detected": False, "webhook_status": ""},
        )
        shape = int(spread(self.seed, f"{job.remote_id}/form", 0, len(forms)))
        return forms[shape] if len(links) == 1 or shape != 5 else forms[0]


def _error(message: str, tip: str) -> dict[str, object]:
    return {"status": "error", "message": message, "tip": tip}


def _taken(remote_id: str, key: str) -> dict[str, object]:
    """Return the answer to an order that was taken. It quotes the key where software on its way would."""
    return {
        "status": "processing",
        "id": int(remote_id),
        "eta": 1,
        "message": f"The order of key {key} is processed",
        "webhook_status": f"called with {key}",
        "output": [],
    }


def _processing(previous_calls: int) -> dict[str, object]:
    """Return a "processing" answer. As in the real API it has no id and no eta, and its form varies."""
    forms: tuple[dict[str, object], ...] = (
        {"status": "processing", "message": "try again later.", "output": "", "tip": TIP},
        {"status": "processing", "messege": "try again later.", "output": ""},
        {"status": "processing", "message": "Try Again", "output": ""},
        {"status": "processing", "output": [], "future_links": ["https://192.0.2.1/not-yet.png"]},
    )
    return forms[previous_calls % len(forms)]


class _RecordingHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    api: ClassVar[ApiState]

    def log_message(self, *_: object) -> None:
        """Do not log requests; the ledger records them."""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, body: object, **headers: str) -> None:
        """Send an answer: a string as HTML, other bodies as JSON."""
        is_page = isinstance(body, str)
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.head(status, len(data), "text/html; charset=utf-8" if is_page else "application/json", **headers)
        self.wfile.write(data)

    def head(self, status: int, length: int, media_type: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


class ApiHandler(_RecordingHandler):
    """Handles fetch calls and orders for the product, and /control/ for the test program."""

    def do_POST(self) -> None:
        """Answer a fetch call, an order or a control request."""
        began, body = time.time(), self.body()
        if self.path.startswith("/control/"):
            self._control(body)
            return
        match = FETCH_PATH.fullmatch(self.path)
        if match is None and self.path != ORDER_PATH:
            self._stray(f"POST {self.path}")
            return
        try:
            parsed = json.loads(body)
            key = parsed.pop("key")
        except (ValueError, TypeError, KeyError, AttributeError):
            self.api.strays.append(f"POST {self.path} without a key in a JSON body")
            self.reply(200, _error("Invalid API Request", "1. Make sure you are passing Content-Type."))
            return
        if match is None:
            self._order(began, str(key), parsed)
            return
        name, status, answer = self.api.answer(match[1], str(key), began)
        time.sleep(self.api.behaviour.latency_seconds)
        with self.api.lock:  # before the answer is sent, so that the ledger is never behind
            self.api.calls.append(FetchCall(began, time.time(), match[1], str(key), name))
        self.reply(status, answer)

    def _order(self, began: float, key: str, payload: dict[str, Any]) -> None:
        track_id = str(payload.get("track_id"))
        name, status, answer = self.api.order_answer(track_id, key, payload)
        with self.api.lock:  # before the answer is sent, so that the ledger is never behind
            self.api.order_calls.append(OrderCall(began, track_id, key, name, payload))
        if name != "cut_echo":
            self.reply(status, answer)
            return
        data = json.dumps(answer).encode()
        self.close_connection = True
        self.head(status, len(data), "application/json")
        self.wfile.write(data[:-1])

    def do_GET(self) -> None:
        """Return the ledger. Any other GET request is recorded as a stray."""
        if self.path == "/control/ledger":
            self.reply(200, self.api.ledger())
        else:
            self._stray(f"GET {self.path}")

    def _control(self, body: bytes) -> None:
        request: Mapping[str, Any] = json.loads(body)
        self.api.register([_job(entry) for entry in request.get("jobs", ())])
        orders = request.get("orders", ())
        self.api.expect([ApiOrder(order["track_id"], order["answer"], _job(order["job"])) for order in orders])
        changes = dict(request.get("behaviour", {}))
        if "accept" in changes:
            changes["accept"] = tuple(changes["accept"])
        self.api.behave(**changes)
        self.reply(200, {"jobs": len(self.api.jobs)})

    def _stray(self, request: str) -> None:
        self.api.strays.append(request)
        self.reply(200, _error("Invalid API Request", "1. Make sure you are doing POST request."))


def _job(entry: Mapping[str, Any]) -> ApiJob:
    outputs = tuple(ApiOutput(**output) for output in entry["outputs"])
    return ApiJob(entry["remote_id"], entry["started"], entry["seconds"], outputs, tuple(entry["script"]))


class PictureHandler(_RecordingHandler):
    """Handles GET /generations/{id}.{position}.png, with the output's trick."""

    def do_GET(self) -> None:
        """Send the picture, or the answer of the output's trick."""
        began, (path, _, query) = time.time(), self.path.partition("?")
        match = PICTURE_PATH.fullmatch(path)
        job = self.api.jobs.get(match[1]) if match else None
        if match is None or job is None or int(match[2]) >= len(job.outputs):
            self.api.strays.append(f"GET {self.path}")
            self.reply(404, "<html><body>404: no such object</body></html>")
            return
        output, position = job.outputs[int(match[2])], int(match[2])
        request = json.dumps(list(self.headers.items())) + ("" if output.trick == "echo" else query)
        carried_key = any(key in request or quote(key, safe="") in request for key in self.api.behaviour.accept)
        entry = PictureGet(began, job.remote_id, position, 0, complete=False, carried_key=carried_key)
        with self.api.lock:
            index = len(self.api.gets)
            self.api.gets.append(entry)
        status, complete = self._serve(job, position, output, began)
        with self.api.lock:
            self.api.gets[index] = replace(entry, status=status, complete=complete)

    def _serve(self, job: ApiJob, position: int, output: ApiOutput, now: float) -> tuple[int, bool]:
        late = output.trick == "late" and now < job.started + job.seconds + output.seconds
        match output.trick:
            case "html":
                self.reply(200, "<!doctype html><html><body>Just a moment...</body></html>")
                return 200, True
            case "redirect":
                self.reply(302, "", Location=output.target)
                return 302, True
            case "missing" | "late" if late or output.trick == "missing":
                self.reply(404, "<html><body>404: object not found</body></html>")
                return 404, True
        data = picture(self.api.seed, job.remote_id, position)
        content = data[: len(data) // 2] if output.trick == "truncated" else data
        kind = PICTURE_TYPES[int(spread(self.api.seed, f"{job.remote_id}/{position}", 0, len(PICTURE_TYPES)))]
        self.head(200, len(data), kind)
        complete = self._send(content) and len(content) == len(data)
        self.close_connection = self.close_connection or not complete
        return 200, complete

    def _send(self, data: bytes) -> bool:
        pieces = 8 if self.api.behaviour.picture_seconds else 1
        size = -(-len(data) // pieces)
        try:
            for start in range(0, len(data), size):
                time.sleep(self.api.behaviour.picture_seconds / pieces)
                self.wfile.write(data[start : start + size])
        except OSError:
            return False
        return True


class _QuietServer(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore connection errors: a killed client closes its connections."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # the stub names its socket types


class ApiServers:
    """Both servers in threads of this process. Leaving the block closes them."""

    def __init__(self, api: ApiState, port: int = 0, pictures_port: int = 0) -> None:
        self.api = api
        bound = {"api": api}
        self._servers = (
            _QuietServer(("127.0.0.1", port), type("BoundApiHandler", (ApiHandler,), bound)),
            _QuietServer(("127.0.0.1", pictures_port), type("BoundPictureHandler", (PictureHandler,), bound)),
        )
        self.port, self.pictures_port = (int(server.server_address[1]) for server in self._servers)
        api.pictures_address = f"http://127.0.0.1:{self.pictures_port}"

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


def main() -> None:
    """Serve until standard input closes, so that the servers stop with the program that started them."""
    parser = argparse.ArgumentParser(description="A fake hosted picture API that records all requests.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--pictures-port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--key", action="append", default=[], help="a key to accept; may be given several times")
    options = parser.parse_args()
    api = ApiState(seed=options.seed, behaviour=ApiBehaviour(accept=tuple(options.key)))
    with ApiServers(api, options.port, options.pictures_port) as servers:
        print(json.dumps({"port": servers.port, "pictures_port": servers.pictures_port}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
