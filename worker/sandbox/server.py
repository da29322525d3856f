"""The stand-in as an HTTP server on a loopback address, with knobs and counters for tests."""

import json
import socket
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from worker.sandbox.behaviour import (
    Answer,
    Behaviour,
    Family,
    Job,
    SandboxOptions,
    fetch_target,
    invalid_request,
    json_answer,
    parse_body,
)
from worker.sandbox.page import page
from worker.sandbox.pictures import draw

LARGEST_BODY = 1 << 20
PICTURES_KEPT = 64  # drawn pictures held in memory
THUMB_SIZE = 128
JOBS_SHOWN = 24
IDLE_SECONDS = 120.0  # a kept connection that says nothing is closed
CLOSING_SECONDS = 3.0
MOMENTS_KEPT = 100_000
LOOK_SECONDS = 0.5  # the longest that an end goes unseen which could not be called out


@dataclass(slots=True)
class Calls:
    """What was asked of the stand-in so far."""

    by_path: Counter[str] = field(default_factory=Counter)
    fetches: Counter[str] = field(default_factory=Counter)  # by job id, whatever was answered
    fetches_after_success: Counter[str] = field(default_factory=Counter)  # by job id, after a success was answered
    fetch_answers: Counter[str] = field(default_factory=Counter)  # by status text of the answer
    fetch_moments: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=MOMENTS_KEPT))
    """When each fetch came, by the clock of the stand-in, and the job id."""
    pictures: Counter[str] = field(default_factory=Counter)  # GETs that had the picture, by name
    pictures_missing: Counter[str] = field(default_factory=Counter)  # GETs that had not, by name


class Sandbox:
    """The running stand-in; a context manager. It is there when the constructor returns and gone after `close`."""

    def __init__(
        self,
        options: SandboxOptions | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Callable[[], float] = time.time,
        *,
        verbose: bool = False,
    ) -> None:
        self.calls = Calls()
        self.verbose = verbose
        self._clock = clock
        self._behaviour = Behaviour(options or SandboxOptions())
        self._lock = threading.Lock()
        self._drawing = threading.Lock()
        self._drawn: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._scripts: dict[str, deque[Answer]] = {}
        self._storm: deque[Answer] = deque()
        self._succeeded: set[str] = set()
        self._server = _Server(self, host, port)
        bound = self._server.server_address[1]
        self.root_url = f"http://[{host}]:{bound}" if ":" in host else f"http://{host}:{bound}"
        self.url = f"{self.root_url}/api/v3"
        self._thread = self._serving()

    def _serving(self) -> threading.Thread:
        thread = threading.Thread(target=self._server.serve, name="sandbox", daemon=True)
        thread.start()
        return thread

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and end every kept connection."""
        self._server.end()
        self._thread.join()
        self._server.server_close()
        self._server.end_connections()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Refuses every connection inside its block; the jobs, and the port, are kept."""
        host, port = self._server.server_address[0], self._server.server_address[1]
        family = self._server.address_family
        self.close()
        with socket.socket(family) as reserved:  # bound, but nobody listens
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind((host, port))
            yield
        self._server = _Server(self, str(host), port)
        self._thread = self._serving()

    @property
    def options(self) -> SandboxOptions:
        """The options in force."""
        return self._behaviour.options

    def options_now(self, **changes: Any) -> SandboxOptions:
        """Change options while it runs, for example `key` or `rps`; jobs already submitted stay as they are."""
        with self._lock:
            self._behaviour.options = replace(self._behaviour.options, **changes)
            return self._behaviour.options

    def script(self, target: str | int, answers: Iterable[Answer | tuple[int, dict[str, str], bytes]]) -> None:
        """Fix the next answers to fetches of a job id, or to GETs of a picture name; after them all is as usual."""
        fixed = (each if isinstance(each, Answer) else Answer(*each) for each in answers)
        with self._lock:
            self._scripts.setdefault(str(target), deque()).extend(fixed)

    def storm(self, answers: Iterable[Answer]) -> None:
        """Answer every fetch with these in turns, whatever it is about; none at all ends it. Scripts come first."""
        with self._lock:
            self._storm = deque(answers)

    def submit(self, prompt: str, *, samples: int | None = None, family: Family | str = Family.V3) -> dict[str, Any]:
        """Submit without HTTP; the answer is the one a web app would have got."""
        now = self._clock()
        with self._lock:
            job = self._behaviour.submit(prompt, samples=samples, family=Family(family), now=now)
            return self._behaviour.accepted(job, now=now, origin=self.root_url)

    def job(self, job_id: str | int) -> Job | None:
        """What the stand-in knows about a job."""
        with self._lock:
            return self._behaviour.job(str(job_id))

    def picture(self, name: str, *, size: int | None = None) -> bytes | None:
        """The bytes of a picture that can be had now; None for any other."""
        with self._lock:
            found = self._behaviour.picture(name, now=self._clock())
        if found is None:
            return None
        job, index = found
        place = (name, size or job.size)
        with self._drawing:  # one at a time: drawing is all computation, and a second one would only slow both
            png = self._drawn.pop(place, None) or draw(job.prompt, job.id, index, place[1])
            self._drawn[place] = png
            if len(self._drawn) > PICTURES_KEPT:
                self._drawn.popitem(last=False)
        return png

    def posted(self, path: str, content_type: str, raw: bytes) -> Answer:
        """Answer a POST, and count it."""
        body = parse_body(content_type, raw)
        with self._lock:
            self.calls.by_path[path] += 1
            target = fetch_target(path, body or {})
            if target is None:
                return self._answered(path, body)
            job_id = target[1]
            self.calls.fetches[job_id] += 1
            self.calls.fetch_moments.append((self._clock(), job_id))
            if job_id in self._succeeded:
                self.calls.fetches_after_success[job_id] += 1
            answer = self._scripted(job_id) or self._of_the_storm() or self._answered(path, body)
            status = _status_text(answer.body)
            self.calls.fetch_answers[status] += 1
            if status == "success" and answer.status == 200:
                self._succeeded.add(job_id)
            return answer

    def got(self, path: str, query: str) -> Answer:
        """Answer a GET, and count it."""
        with self._lock:
            self.calls.by_path[path] += 1
        if path == "/healthz":
            return Answer(200, {"Content-Type": "text/plain"}, b"ok\n")
        if path == "/":
            return self._page()
        folder, _, name = path.rpartition("/")
        if folder in ("/generations", "/cdn2/generations"):
            return self._picture(name)
        if folder == "/thumbs":
            png = self.picture(name, size=None if query == "full" else THUMB_SIZE)
            return _missing() if png is None else _png(png)
        return invalid_request() if path.startswith("/api/") else _missing()

    def _answered(self, path: str, body: Any) -> Answer:
        if body is None:
            return invalid_request()
        return self._behaviour.answer(path, body, now=self._clock(), origin=self.root_url)

    def _scripted(self, target: str) -> Answer | None:
        waiting = self._scripts.get(target)
        return waiting.popleft() if waiting else None

    def _of_the_storm(self) -> Answer | None:
        if not self._storm:
            return None
        self._storm.rotate(-1)
        return self._storm[-1]

    def _picture(self, name: str) -> Answer:
        with self._lock:
            answer = self._scripted(name)
        if answer is None:
            png = self.picture(name)
            answer = _missing() if png is None else _png(png)
        with self._lock:
            (self.calls.pictures if answer.status == 200 else self.calls.pictures_missing)[name] += 1
        return answer

    def _page(self) -> Answer:
        now = self._clock()
        with self._lock:
            jobs = self._behaviour.latest(JOBS_SHOWN)
        headers = {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store"}
        return Answer(200, headers, page(jobs, now=now, root_url=self.root_url))


def _png(content: bytes) -> Answer:
    return Answer(200, {"Content-Type": "image/png"}, content)


def _missing() -> Answer:
    return Answer(404, {"Content-Type": "text/html"}, b"<!doctype html><title>404</title><h1>Nothing here</h1>\n")


def _status_text(body: bytes) -> str:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return "unreadable"
    return str(content.get("status")) if isinstance(content, dict) else "unreadable"


class _Server(ThreadingHTTPServer):
    """One thread per connection, and a list of the open ones so that they can be ended."""

    daemon_threads = True
    request_queue_size = 512
    timeout = LOOK_SECONDS

    def __init__(self, sandbox: Sandbox, host: str, port: int) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.sandbox = sandbox
        self.open_connections: set[socket.socket] = set()
        self.all_closed = threading.Condition()
        self._ending = False
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Bind without the look-up of the host's own name that the parent does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def serve(self) -> None:
        """Takes connections until `end` is called."""
        while not self._ending:
            self.handle_request()

    def end(self) -> None:
        """Takes no more connections; one of its own ends the wait for the next."""
        self._ending = True
        with suppress(OSError):
            socket.create_connection((self.server_name, self.server_port), LOOK_SECONDS).close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Note the connection before its thread starts."""
        with self.all_closed:
            self.open_connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget the connection once it is closed."""
        super().shutdown_request(request)
        with self.all_closed:
            self.open_connections.discard(request)
            self.all_closed.notify_all()

    def end_connections(self) -> None:
        """Shut every connection and wait, within a bound, until their threads have let go."""
        with self.all_closed:
            for connection in self.open_connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # the other side was faster
            self.all_closed.wait_for(lambda: not self.open_connections, CLOSING_SECONDS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Reads one call after the other from a kept connection and writes each answer in one piece."""

    protocol_version = "HTTP/1.1"
    server_version = "sandbox"
    sys_version = ""
    disable_nagle_algorithm = True
    wbufsize = -1
    timeout = IDLE_SECONDS
    server: _Server

    def do_GET(self) -> None:
        """Pictures, the page, and the refusal of anything that wants POST."""
        path, _, query = self.path.partition("?")
        self._send(self.server.sandbox.got(path, query))

    def do_POST(self) -> None:
        """The API."""
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit() and len(length) < 9):
            self.close_connection = True  # what follows can't be told apart from the next call
            self._send(invalid_request())
            return
        if int(length) > LARGEST_BODY:
            self.close_connection = True
            self._send(json_answer({"status": "error", "message": "Invalid API Request"}, status=413))
            return
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            self.close_connection = True  # the caller went away in the middle of its request
            return
        path = self.path.partition("?")[0]
        self._send(self.server.sandbox.posted(path, self.headers.get("Content-Type", ""), raw))

    def _send(self, answer: Answer) -> None:
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
        at_once, slowly = (b"", head + answer.body) if answer.drip_headers else (head, answer.body)
        self.wfile.write(at_once)
        for place in range(len(slowly)):
            self.wfile.write(slowly[place : place + 1])
            self.wfile.flush()
            time.sleep(answer.drip_seconds)

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """One line per call where it was asked for: never a query, a header or a body, where a key could be."""
        if self.server.sandbox.verbose:
            path = ascii(getattr(self, "path", "").partition("?")[0])[1:-1]
            sys.stderr.write(f"{self.command} {path} {int(code)}\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing else."""
