"""The stand-in as an HTTP server on a loopback address, with controls and counters for tests."""

import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

from worker.sandbox.answers import Answer, invalid_request, no_such_route, page_answer, parse_body
from worker.sandbox.behaviour import DEFAULT_ORDER, Behaviour, fetch_target
from worker.sandbox.calls import Calls, status_text
from worker.sandbox.families import Target, family_of
from worker.sandbox.files import OutputFile, make_output
from worker.sandbox.jobs import SandboxJob
from worker.sandbox.listener import Listener
from worker.sandbox.options import SandboxOptions
from worker.sandbox.orders import unused_ids
from worker.sandbox.page import render_page
from worker.sandbox.scenarios import ScenarioName
from worker.sandbox.webhooks import call

MAX_CACHED_FILES = 64
THUMBNAIL_SIZE = 128
PAGE_JOBS = 24
WEBHOOK_SECONDS = 0.1  # interval of checks while a webhook is waiting
FOLDERS = {"/generations": False, "/cdn2/generations": True}  # path -> whether it is the proxy


class Sandbox:
    """A running stand-in, as a context manager. It listens from construction until `close`."""

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
        self.calls_webhooks = True
        self._clock = clock
        self._behaviour = Behaviour(unused_ids(options or SandboxOptions(), time.time()))
        self._lock = threading.Lock()
        self._drawing_lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, int], OutputFile] = OrderedDict()
        self._scripts: dict[str, deque[Answer]] = {}
        self._storm: deque[Answer] = deque()
        self._succeeded: set[tuple[str, str]] = set()
        self._closed = threading.Event()
        self._webhook_thread: threading.Thread | None = None
        self._server = Listener(self, host, port)
        bound = self._server.server_address[1]
        self.root_url = f"http://[{host}]:{bound}" if ":" in host else f"http://{host}:{bound}"
        self.url = f"{self.root_url}/api/v3"
        self._thread = self._start_thread()

    def _start_thread(self) -> threading.Thread:
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
        """Stop listening and close all connections."""
        self._closed.set()
        self._end_server()

    def _end_server(self) -> None:
        self._server.end()
        self._thread.join()
        self._server.server_close()
        self._server.end_connections()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Refuse all connections inside the `with` block. Jobs and port are kept."""
        host, port = self._server.server_address[0], self._server.server_address[1]
        family = self._server.address_family
        self._end_server()
        with socket.socket(family) as reserved:  # bound but not listening
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind((host, port))
            yield
        self._server = Listener(self, str(host), port)
        self._thread = self._start_thread()

    @property
    def options(self) -> SandboxOptions:
        """The current options."""
        return self._behaviour.options

    def options_now(self, **changes: Any) -> SandboxOptions:
        """Change options while it runs, for example `key` or `rps`. Jobs that were submitted before do not change."""
        with self._lock:
            self._behaviour.options = replace(self._behaviour.options, **changes)
            return self._behaviour.options

    def script(self, target: str | int, answers: Iterable[Answer | tuple[int, dict[str, str], bytes]]) -> None:
        """Set the next answers to fetches of a job id, or to GETs of an output's name. Later ones are normal again."""
        scripted = (answer if isinstance(answer, Answer) else Answer(*answer) for answer in answers)
        with self._lock:
            self._scripts.setdefault(str(target), deque()).extend(scripted)

    def storm(self, answers: Iterable[Answer]) -> None:
        """Answer every fetch with these answers in turn, for any job. An empty list ends it. Scripts come first."""
        with self._lock:
            self._storm = deque(answers)

    def submit(
        self,
        prompt: str,
        *,
        samples: int | None = None,
        family: str = DEFAULT_ORDER,
        scenario: ScenarioName | Literal[""] = "",
        **fields: object,
    ) -> dict[str, Any]:
        """Submit a job without HTTP and return the answer that a web app would get.

        `family` is the path below `/api/` to post the order to; `fields` are further fields of the order. Raises
        ValueError for an unknown path or scenario.
        """
        now = self._clock()
        with self._lock:
            job = self._behaviour.submit(
                prompt, samples=samples, family=family, scenario=scenario, now=now, body=fields
            )
            content = self._behaviour.accepted(job, now=now, origin=self.root_url)
        self._call_webhooks()
        return content

    def adopt(self, target: Target, *, submitted_at: float, scenario: str = "") -> SandboxJob:
        """Add a job with an id that the stand-in did not issue, of the family whose fetch path is used."""
        with self._lock:
            return self._behaviour.adopt(target, submitted_at=submitted_at, scenario=scenario)

    def job(self, job_id: str | int, store: str | None = None) -> SandboxJob | None:
        """Return a job by its id. `store` is the fetch path of its family, without the id."""
        with self._lock:
            return self._behaviour.job(str(job_id), store)

    def picture(self, name: str, *, size: int | None = None) -> bytes | None:
        """Return the bytes of an output that is available now, or None."""
        with self._lock:
            file = self._behaviour.file(name, now=self._clock(), proxy=True)
        return (
            None
            if file is None or file.status != 200
            else self._output_file(name, file.job, file.position, size).content
        )

    def posted(self, path: str, content_type: str, raw: bytes) -> Answer:
        """Answer a POST and count it."""
        body = parse_body(content_type, raw)
        with self._lock:
            self.calls.by_path[path] += 1
            target = fetch_target(path, body or {})
            if target is not None:
                return self._fetch_answer(path, target, body, "POST")
            route = path.removeprefix("/api/")
            is_order = family_of(route) is not None
            self.calls.orders[route] += is_order
            answer = self._model_answer(path, body, "POST")
        if is_order:
            self._call_webhooks()
        return answer

    def got(self, path: str, query: str, raw: bytes = b"", key: str = "") -> Answer:
        """Answer a GET and count it."""
        with self._lock:
            self.calls.by_path[path] += 1
        if path == "/healthz":
            return Answer(200, {"Content-Type": "text/plain"}, b"ok\n")
        if path == "/":
            return self._page()
        folder, _, name = path.rpartition("/")
        if folder in FOLDERS:
            return self._file(name, proxy=FOLDERS[folder])
        if folder == "/thumbs":
            return self._thumbnail(name, None if query == "full" else THUMBNAIL_SIZE)
        if not path.startswith("/api/"):
            return page_answer(404, "Nothing here")
        target = fetch_target(path, {}, "GET")
        if target is not None:
            body = parse_body("application/json", raw) if raw else {"key": key}
            with self._lock:
                return self._fetch_answer(path, target, body, "GET")
        is_api_path = fetch_target(path, {}) is not None or family_of(path.removeprefix("/api/")) is not None
        return invalid_request() if is_api_path else no_such_route(path)

    def _fetch_answer(self, path: str, target: Target, body: Any, method: str) -> Answer:
        self.calls.fetches[target.id] += 1
        self.calls.fetch_moments.append((self._clock(), target.id))
        if (target.store, target.id) in self._succeeded:
            self.calls.fetches_after_success[target.id] += 1
        answer = self._scripted_answer(target.id) or self._storm_answer() or self._model_answer(path, body, method)
        status = status_text(answer.body)
        self.calls.fetch_answers[status] += 1
        if status == "success" and answer.status == 200 and target.family.shape not in ("training", "workflow"):
            self._succeeded.add((target.store, target.id))
        return answer

    def _model_answer(self, path: str, body: Any, method: str) -> Answer:
        if body is None and (fetch_target(path, {}) or family_of(path.removeprefix("/api/"))):
            return invalid_request()
        return self._behaviour.answer(path, body or {}, now=self._clock(), origin=self.root_url, method=method)

    def _scripted_answer(self, target: str) -> Answer | None:
        answers = self._scripts.get(target)
        return answers.popleft() if answers else None

    def _storm_answer(self) -> Answer | None:
        if not self._storm:
            return None
        self._storm.rotate(-1)
        return self._storm[-1]

    def _file(self, name: str, *, proxy: bool) -> Answer:
        with self._lock:
            answer = self._scripted_answer(name)
            file = self._behaviour.file(name, now=self._clock(), proxy=proxy)
        if answer is None and file is not None and file.status == 200:
            answer = _file_answer(self._output_file(name, file.job, file.position, None))
        answer = answer or page_answer(404 if file is None else file.status, "Nothing here")
        with self._lock:
            (self.calls.pictures if answer.status == 200 else self.calls.pictures_missing)[name] += 1
        return answer

    def _thumbnail(self, name: str, size: int | None) -> Answer:
        with self._lock:
            file = self._behaviour.file(name, now=self._clock(), proxy=True)
        if file is None or file.status != 200:
            return page_answer(404, "Nothing here")
        return _file_answer(self._output_file(name, file.job, file.position, size))

    def _output_file(self, name: str, job: SandboxJob, index: int, size: int | None) -> OutputFile:
        key = (name, size or job.size)
        with self._drawing_lock:  # one at a time: drawing is pure computation, so a second thread would not be faster
            content = self._cache.pop(key, None) or make_output(name, job.prompt, job.id, index, key[1])
            self._cache[key] = content
            if len(self._cache) > MAX_CACHED_FILES:
                self._cache.popitem(last=False)
        return content

    def _page(self) -> Answer:
        now = self._clock()
        with self._lock:
            jobs = self._behaviour.latest(PAGE_JOBS)
        headers = {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store"}
        return Answer(200, headers, render_page(jobs, now=now, root_url=self.root_url))

    def _call_webhooks(self) -> None:
        """Start the thread that calls webhooks if one is waiting and the thread does not run."""
        with self._lock:
            if self.calls_webhooks and self._webhook_thread is None and self._behaviour.has_webhooks:
                self._webhook_thread = threading.Thread(target=self._run_webhooks, name="sandbox-webhooks", daemon=True)
                self._webhook_thread.start()

    def _run_webhooks(self) -> None:
        while not self._closed.wait(WEBHOOK_SECONDS):
            with self._lock:
                due = self._behaviour.webhooks_due(self._clock(), self.root_url)
                if not due and not self._behaviour.has_webhooks:
                    self._webhook_thread = None
                    return
            for webhook in due:
                status = call(webhook)
                with self._lock:
                    self.calls.webhooks.append((webhook.url, status))


def _file_answer(file: OutputFile) -> Answer:
    return Answer(200, {"Content-Type": file.media_type}, file.content)
