"""The stand-in as an HTTP server on a loopback address, with controls and counters for tests."""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

from worker.sandbox.answers import Answer, invalid_request, no_such_route, page_answer, parse_body
from worker.sandbox.behaviour import DEFAULT_ORDER, Behaviour
from worker.sandbox.calls import Calls
from worker.sandbox.charges import Charges
from worker.sandbox.families import API, Family, Target, request_of
from worker.sandbox.files import OutputCache, OutputFile
from worker.sandbox.jobs import SandboxJob
from worker.sandbox.listener import Listener
from worker.sandbox.options import SandboxOptions
from worker.sandbox.orders import unused_ids
from worker.sandbox.page import render_page
from worker.sandbox.scenarios import Scenario, ScenarioName
from worker.sandbox.webhooks import call

THUMBNAIL_SIZE = 128
PAGE_JOBS = 24
STORM = " "  # the key of the answers to any fetch; no id and no name is a blank
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
        self.calls_webhooks = True
        self._clock = clock
        self._behaviour = Behaviour(unused_ids(options or SandboxOptions(), time.time()))
        self._lock = threading.RLock()
        self._outputs = OutputCache()
        self._scripts: dict[str, deque[Answer]] = {}
        self._closed = threading.Event()
        self._webhook_thread: threading.Thread | None = None
        self._server = Listener(self, host, port, verbose=verbose)
        bound = self._server.server_address[1]
        self.root_url = f"http://[{host}]:{bound}" if ":" in host else f"http://{host}:{bound}"
        self.url = f"{self.root_url}/api/v3"
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and close all connections."""
        self._closed.set()
        self._server.stop()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Refuse all connections inside the `with` block. Jobs and port are kept."""
        stopped = self._server
        host, port = str(stopped.server_address[0]), stopped.server_address[1]
        stopped.stop()
        with socket.socket(stopped.address_family) as reserved:  # bound but not listening
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind((host, port))
            yield
        self._server = Listener(self, host, port, verbose=stopped.verbose).start()

    @property
    def options(self) -> SandboxOptions:
        """The current options."""
        return self._behaviour.options

    @property
    def charges(self) -> Charges:
        """Counts of the orders that were taken and refused."""
        return self._behaviour.charges

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
            self._scripts[STORM] = deque(answers)

    def next_orders(self, scenario: Scenario, times: int) -> None:
        """Use the parts `order` and `sent` of a scenario for this many of the next orders by HTTP."""
        with self._lock:
            self._behaviour.next_orders.extend([scenario] * times)

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

    def newest_job(self) -> SandboxJob | None:
        """Return the job that was submitted last, if there is any."""
        with self._lock:
            return next(iter(self._behaviour.latest(1)), None)

    def picture(self, name: str, *, size: int | None = None) -> bytes | None:
        """Return the bytes of an output that is available now, or None."""
        file = self._output(name, size, proxy=True)
        return file.content if isinstance(file, OutputFile) else None

    def posted(self, path: str, content_type: str, raw: bytes) -> Answer:
        """Answer a POST and count it."""
        body = parse_body(content_type, raw)
        with self._lock:
            self.calls.by_path[path] += 1
            request = request_of(path, body or {})
            if isinstance(request, Target):
                return self._fetch_answer(path, request, body, "POST")
            if isinstance(request, Family):
                self.calls.orders[path.removeprefix(API)] += 1
                self._count_order(body or {})
            answer = self._model_answer(path, body, "POST")
        self._call_webhooks()
        return answer

    def cuts_order(self, path: str) -> bool:
        """Return whether to close the connection of an order instead of reading its body."""
        if not isinstance(request_of(path, {}), Family):
            return False
        with self._lock:
            return self._behaviour.cuts_next_order()

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
            return _file_answer(self._output(name, None if query == "full" else THUMBNAIL_SIZE, proxy=True))
        if not path.startswith(API):
            return page_answer(404, "Nothing here")
        target = request_of(path, {}, "GET")
        if isinstance(target, Target):
            body = parse_body("application/json", raw) if raw else {"key": key}
            with self._lock:
                return self._fetch_answer(path, target, body, "GET")
        is_post_path = isinstance(request_of(path, {}), Target | Family)
        return invalid_request() if is_post_path else no_such_route(path)

    def _count_order(self, body: Mapping[str, Any]) -> None:
        """Called before each order is answered."""

    def _fetch_answer(self, path: str, target: Target, body: Any, method: str) -> Answer:
        answer = self._scripted_fetch(target) or self._model_answer(path, body, method)
        self.calls.count_fetch(target, self._clock(), answer)
        return answer

    def _model_answer(self, path: str, body: Any, method: str) -> Answer:
        if body is None and isinstance(request_of(path, {}), Target | Family):
            return invalid_request()
        return self._behaviour.answer(path, body or {}, now=self._clock(), origin=self.root_url, method=method)

    def _scripted_fetch(self, target: Target) -> Answer | None:
        """Return the scripted answer to a fetch, if there is one."""
        answer, storm = self._scripted(target.id), self._scripts.get(STORM)
        if answer is None and storm:
            storm.rotate(-1)
            answer = storm[-1]
        return answer

    def _scripted(self, target: str) -> Answer | None:
        answers = self._scripts.get(target)
        return answers.popleft() if answers else None

    def _file(self, name: str, *, proxy: bool) -> Answer:
        with self._lock:
            scripted = self._scripted(name)
        answer = scripted or _file_answer(self._output(name, None, proxy=proxy))
        with self._lock:
            (self.calls.pictures if answer.status == 200 else self.calls.pictures_missing)[name] += 1
        return answer

    def _output(self, name: str, size: int | None, *, proxy: bool) -> OutputFile | int:
        """Return an output, or the HTTP status of its URL if it can't be downloaded now."""
        with self._lock:
            entry = self._behaviour.file(name, now=self._clock(), proxy=proxy)
        if entry is None or entry.status != 200:
            return 404 if entry is None else entry.status
        job = entry.job
        return self._outputs.get(name, job.prompt, job.id, entry.position, size or job.size)

    def _page(self) -> Answer:
        now = self._clock()
        with self._lock:
            jobs = self._behaviour.latest(PAGE_JOBS)
        headers = {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store"}
        return Answer(200, headers, render_page(jobs, self.charges, now=now, root_url=self.root_url))

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


def _file_answer(file: OutputFile | int) -> Answer:
    if isinstance(file, int):
        return page_answer(file, "Nothing here")
    return Answer(200, {"Content-Type": file.media_type}, file.content)
