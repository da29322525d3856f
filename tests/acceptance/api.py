"""A hosted picture API with its picture host, told beforehand what each job does; it counts every call it gets.

Runs alone (`python -m tests.acceptance.api --port 0`, prints its ports as one JSON line) or in threads (`Running`).
It knows nothing of the product: standard library only, no import from this repository.
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

SAYS = "says:"  # an answer of a script that is a failure with what follows as its message
TIP = "Get 20x faster image generation using enterprise plan. Click here : https://modelslab.com/enterprise"
FETCH_PATH = re.compile(r"/api/v3/fetch/([A-Za-z0-9][A-Za-z0-9_-]{0,127})")
PICTURE_PATH = re.compile(r"/generations/([A-Za-z0-9_-]+)\.(\d+)\.png")
PICTURE_TYPES = ("image/png", "text/plain", "application/octet-stream")


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a job and what its address does when asked."""

    trick: str = "good"  # or html, truncated, missing, late, redirect, elsewhere, echo
    target: str = ""  # where `redirect` points; the whole address of `elsewhere`
    seconds: float = 0.0  # how long after ready `late` answers 404


@dataclass(frozen=True, slots=True)
class Job:
    """One job as the API knows it: ready `seconds` after `started`; `script` names the answers to the first calls."""

    remote_id: str
    started: float
    seconds: float
    outputs: tuple[Output, ...] = (Output(),)
    script: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the whole API does, whatever the job."""

    accept: tuple[str, ...] = ()  # the keys it takes
    rejected_status: int = 200  # HTTP status of a wrong key: the old API answers 200, the new one 401
    latency_seconds: float = 0.0  # every fetch call takes this long
    picture_seconds: float = 0.0  # every picture takes this long
    calls_per_second: int = 0  # above it calls are refused; 0 is no limit
    limit_form: str = "429 with retry_after"  # or "bare 429", "200 with retry_after"
    endless: bool = False  # every job there could be exists, and is never ready
    echo_rejected: bool = False  # a refused key is repeated in the message


@dataclass(frozen=True, slots=True)
class Call:
    """One fetch call: when, about which job, with which key, answered how."""

    began: float
    ended: float
    remote_id: str
    key: str
    answer: str


@dataclass(frozen=True, slots=True)
class Get:
    """One request for a picture; `complete` when a 200 was sent to its last byte."""

    began: float
    remote_id: str
    position: int
    status: int
    complete: bool
    carried_key: bool


def picture(seed: int, remote_id: str, position: int) -> bytes:
    """A valid PNG of 20 to 200 kB whose pixels are noise: another one for every output and seed, the same each time."""
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


def spread(seed: int, name: str, least: float, most: float) -> float:
    """A number between the two that looks random and is always the same for this seed and name."""
    draw = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6])
    return least + (most - least) * draw / 2**48


@dataclass(slots=True)
class ApiClient:
    """The state behind both servers: the jobs, the behaviour, and the record of all that was asked."""

    seed: int = 1
    behaviour: Behaviour = field(default_factory=Behaviour)
    pictures_address: str = ""
    jobs: dict[str, Job] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    gets: list[Get] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _asked: dict[str, int] = field(default_factory=dict)
    _recent: deque[float] = field(default_factory=deque)

    def register(self, jobs: Sequence[Job]) -> None:
        """Know these jobs from now on."""
        with self.lock:
            self.jobs.update({job.remote_id: job for job in jobs})

    def behave(self, **changes: Any) -> None:
        """Change what the API does from the next request on."""
        with self.lock:
            self.behaviour = replace(self.behaviour, **changes)

    def ledger(self) -> dict[str, Any]:
        """All that was asked so far, as plain lists."""
        with self.lock:
            return {
                "calls": [asdict(call) for call in self.calls],
                "gets": [asdict(get) for get in self.gets],
                "strays": list(self.strays),
            }

    def address(self, job: Job, position: int, key: str) -> str:
        """Where this output is, as the success answer says it."""
        output = job.outputs[position]
        if output.trick == "elsewhere":
            return output.target
        tail = f"?key={quote(key, safe='')}" if output.trick == "echo" else ""
        return f"{self.pictures_address}/generations/{job.remote_id}.{position}.png{tail}"

    def answer(self, remote_id: str, key: str, now: float) -> tuple[str, int, object]:
        """Name, HTTP status and body of the answer to one fetch call."""
        with self.lock:
            if key not in self.behaviour.accept:
                text = "Invalid Api Key" + (f": {key}" if self.behaviour.echo_rejected else "")
                return "wrong_key", self.behaviour.rejected_status, _error(text, "4. Make sure you have valid API key.")
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
            asked = self._asked.get(remote_id, 0)
            self._asked[remote_id] = asked + 1
        if asked < len(job.script):
            return self._scripted(job, job.script[asked], key)
        if now < job.started + job.seconds:
            return "processing", 200, _processing(asked)
        return "success", 200, self._success(job, key)

    def _scripted(self, job: Job, name: str, key: str) -> tuple[str, int, object]:
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
            case _ if name.startswith(SAYS):
                return "failed", 200, {"status": "failed", "id": "", "message": name[len(SAYS) :], "output": ""}
            case _:
                return "processing", 200, _processing(0)

    def _success(self, job: Job, key: str) -> dict[str, object]:
        links = [self.address(job, position, key) for position in range(len(job.outputs))]
        number: object = int(job.remote_id) if job.remote_id.isdecimal() else job.remote_id
        # Texts inside a success mean nothing, whatever words they have.
        meta = {"prompt": "rate limit exceeded, invalid api key, request not found", "seed": 3166507472, "W": 512}
        all_good = all(output.trick == "good" for output in job.outputs)  # then nobody needs the other addresses
        proxies = [
            f"{self.pictures_address}/proxy/{job.remote_id}.{place}.png" for place in range(len(links) * all_good)
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


def _processing(asked: int) -> dict[str, object]:
    """The real ones have no id and no eta, and do not agree about the rest."""
    forms: tuple[dict[str, object], ...] = (
        {"status": "processing", "message": "try again later.", "output": "", "tip": TIP},
        {"status": "processing", "messege": "try again later.", "output": ""},
        {"status": "processing", "message": "Try Again", "output": ""},
        {"status": "processing", "output": [], "future_links": ["https://192.0.2.1/not-yet.png"]},
    )
    return forms[asked % len(forms)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    api: ClassVar[ApiClient]

    def log_message(self, *_: object) -> None:
        """Say nothing: the ledger is the record."""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, body: object, **headers: str) -> None:
        """Send head and body in one piece; a text goes as HTML, the rest as JSON."""
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


class ApiHandler(_Handler):
    """POST /api/v3/fetch/{id} for the product, /control/ for the program that watches."""

    def do_POST(self) -> None:
        """Answer a fetch call or take an order."""
        began, body = time.time(), self.body()
        if self.path.startswith("/control/"):
            self._control(body)
            return
        asked = FETCH_PATH.fullmatch(self.path)
        if asked is None:
            self._stray(f"POST {self.path}")
            return
        try:
            parsed = json.loads(body)
            key = parsed["key"]
        except (ValueError, TypeError, KeyError):
            self.api.strays.append(f"POST {self.path} without a key in a JSON body")
            self.reply(200, _error("Invalid API Request", "1. Make sure you are passing Content-Type."))
            return
        name, status, answer = self.api.answer(asked[1], str(key), began)
        time.sleep(self.api.behaviour.latency_seconds)
        with self.api.lock:  # before the bytes go out: who has the answer finds the call in the ledger
            self.api.calls.append(Call(began, time.time(), asked[1], str(key), name))
        self.reply(status, answer)

    def do_GET(self) -> None:
        """Show the ledger; whatever else is asked by GET is a mistake of the caller."""
        if self.path == "/control/ledger":
            self.reply(200, self.api.ledger())
        else:
            self._stray(f"GET {self.path}")

    def _control(self, body: bytes) -> None:
        order: Mapping[str, Any] = json.loads(body)
        self.api.register([_job(entry) for entry in order.get("jobs", ())])
        changes = dict(order.get("behaviour", {}))
        if "accept" in changes:
            changes["accept"] = tuple(changes["accept"])
        self.api.behave(**changes)
        self.reply(200, {"jobs": len(self.api.jobs)})

    def _stray(self, what: str) -> None:
        self.api.strays.append(what)
        self.reply(200, _error("Invalid API Request", "1. Make sure you are doing POST request."))


def _job(entry: Mapping[str, Any]) -> Job:
    outputs = tuple(Output(**output) for output in entry["outputs"])
    return Job(entry["remote_id"], entry["started"], entry["seconds"], outputs, tuple(entry["script"]))


class PictureHandler(_Handler):
    """GET /generations/{id}.{position}.png, and what the output's trick makes of it."""

    def do_GET(self) -> None:
        """Serve one picture, or the trouble that was ordered instead."""
        began, (path, _, query) = time.time(), self.path.partition("?")
        asked = PICTURE_PATH.fullmatch(path)
        job = self.api.jobs.get(asked[1]) if asked else None
        if asked is None or job is None or int(asked[2]) >= len(job.outputs):
            self.api.strays.append(f"GET {self.path}")
            self.reply(404, "<html><body>404: no such object</body></html>")
            return
        output, position = job.outputs[int(asked[2])], int(asked[2])
        sent = json.dumps(list(self.headers.items())) + ("" if output.trick == "echo" else query)
        carried_key = any(key in sent or quote(key, safe="") in sent for key in self.api.behaviour.accept)
        entry = Get(began, job.remote_id, position, 0, complete=False, carried_key=carried_key)
        with self.api.lock:
            place = len(self.api.gets)
            self.api.gets.append(entry)
        status, complete = self._serve(job, position, output, began)
        with self.api.lock:
            self.api.gets[place] = replace(entry, status=status, complete=complete)

    def _serve(self, job: Job, position: int, output: Output, now: float) -> tuple[int, bool]:
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
        shown = data[: len(data) // 2] if output.trick == "truncated" else data
        kind = PICTURE_TYPES[int(spread(self.api.seed, f"{job.remote_id}/{position}", 0, len(PICTURE_TYPES)))]
        self.head(200, len(data), kind)
        complete = self._send(shown) and len(shown) == len(data)
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


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A caller that was killed hangs up in the middle; that is no news here."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # the stub names its socket types


class Running:
    """Both servers in threads of this process; leaving the block closes them."""

    def __init__(self, api: ApiClient, port: int = 0, pictures_port: int = 0) -> None:
        self.api = api
        bound = {"api": api}
        self._servers = (
            _Server(("127.0.0.1", port), type("BoundApiHandler", (ApiHandler,), bound)),
            _Server(("127.0.0.1", pictures_port), type("BoundPictureHandler", (PictureHandler,), bound)),
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
    """Serve until standard input closes, so that no server outlives the program that started it."""
    parser = argparse.ArgumentParser(description="A hosted picture API that keeps a ledger of all that is asked.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--pictures-port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--key", action="append", default=[], help="a key to accept; may be given several times")
    options = parser.parse_args()
    api = ApiClient(seed=options.seed, behaviour=Behaviour(accept=tuple(options.key)))
    with Running(api, options.port, options.pictures_port) as running:
        print(json.dumps({"port": running.port, "pictures_port": running.pictures_port}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
