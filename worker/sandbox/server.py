"""The stand-in as an HTTP server on a loopback address, with knobs and counters for tests."""

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
from worker.sandbox.files import Made, made
from worker.sandbox.jobs import Job
from worker.sandbox.listener import Listener
from worker.sandbox.options import SandboxOptions
from worker.sandbox.orders import unused_ids
from worker.sandbox.page import page
from worker.sandbox.scenarios import ScenarioName
from worker.sandbox.webhooks import call

FILES_KEPT = 64  # outputs held in memory
THUMB_SIZE = 128
JOBS_SHOWN = 24
WEBHOOK_SECONDS = 0.1  # how often the clock is looked at while a webhook waits
FOLDERS = {"/generations": False, "/cdn2/generations": True}  # and whether it is the proxy


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
        self.calls_webhooks = True
        self._clock = clock
        self._behaviour = Behaviour(unused_ids(options or SandboxOptions(), time.time()))
        self._lock = threading.Lock()
        self._drawing = threading.Lock()
        self._drawn: OrderedDict[tuple[str, int], Made] = OrderedDict()
        self._scripts: dict[str, deque[Answer]] = {}
        self._storm: deque[Answer] = deque()
        self._succeeded: set[tuple[str, str]] = set()
        self._closed = threading.Event()
        self._calling: threading.Thread | None = None
        self._server = Listener(self, host, port)
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
        self._closed.set()
        self._end_server()

    def _end_server(self) -> None:
        self._server.end()
        self._thread.join()
        self._server.server_close()
        self._server.end_connections()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Refuses every connection inside its block; the jobs, and the port, are kept."""
        host, port = self._server.server_address[0], self._server.server_address[1]
        family = self._server.address_family
        self._end_server()
        with socket.socket(family) as reserved:  # bound, but nobody listens
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind((host, port))
            yield
        self._server = Listener(self, str(host), port)
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
        """Fix the next answers to fetches of a job id, or to GETs of an output's name; after them all is as usual."""
        fixed = (each if isinstance(each, Answer) else Answer(*each) for each in answers)
        with self._lock:
            self._scripts.setdefault(str(target), deque()).extend(fixed)

    def storm(self, answers: Iterable[Answer]) -> None:
        """Answer every fetch with these in turns, whatever it is about; none at all ends it. Scripts come first."""
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
        """Submit without HTTP; the answer is the one a web app would have got.

        `family` is the path below `/api/` that the order would be posted to, `fields` what else would be in it. Raises
        ValueError for a path or scenario that there is not.
        """
        now = self._clock()
        with self._lock:
            job = self._behaviour.submit(
                prompt, samples=samples, family=family, scenario=scenario, now=now, body=fields
            )
            content = self._behaviour.accepted(job, now=now, origin=self.root_url)
        self._call_webhooks()
        return content

    def adopt(self, target: Target, *, submitted_at: float, scenario: str = "") -> Job:
        """Take in a job under an id that the stand-in did not give out, of the family that it is fetched at."""
        with self._lock:
            return self._behaviour.adopt(target, submitted_at=submitted_at, scenario=scenario)

    def job(self, job_id: str | int, store: str | None = None) -> Job | None:
        """Return what the stand-in knows about a job; `store` is the fetch path of its family, without the id."""
        with self._lock:
            return self._behaviour.job(str(job_id), store)

    def picture(self, name: str, *, size: int | None = None) -> bytes | None:
        """Return the bytes of an output that can be had now; None for any other."""
        with self._lock:
            file = self._behaviour.file(name, now=self._clock(), proxy=True)
        return None if file is None or file.status != 200 else self._made(name, file.job, file.position, size).content

    def posted(self, path: str, content_type: str, raw: bytes) -> Answer:
        """Answer a POST, and count it."""
        body = parse_body(content_type, raw)
        with self._lock:
            self.calls.by_path[path] += 1
            target = fetch_target(path, body or {})
            if target is not None:
                return self._fetched(path, target, body, "POST")
            route = path.removeprefix("/api/")
            is_order = family_of(route) is not None
            self.calls.orders[route] += is_order
            answer = self._answered(path, body, "POST")
        if is_order:
            self._call_webhooks()
        return answer

    def got(self, path: str, query: str, raw: bytes = b"", key: str = "") -> Answer:
        """Answer a GET, and count it."""
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
            return self._thumb(name, None if query == "full" else THUMB_SIZE)
        if not path.startswith("/api/"):
            return page_answer(404, "Nothing here")
        target = fetch_target(path, {}, "GET")
        if target is not None:
            body = parse_body("application/json", raw) if raw else {"key": key}
            with self._lock:
                return self._fetched(path, target, body, "GET")
        known = fetch_target(path, {}) is not None or family_of(path.removeprefix("/api/")) is not None
        return invalid_request() if known else no_such_route(path)

    def _fetched(self, path: str, target: Target, body: Any, method: str) -> Answer:
        self.calls.fetches[target.id] += 1
        self.calls.fetch_moments.append((self._clock(), target.id))
        if (target.store, target.id) in self._succeeded:
            self.calls.fetches_after_success[target.id] += 1
        answer = self._scripted(target.id) or self._of_the_storm() or self._answered(path, body, method)
        status = status_text(answer.body)
        self.calls.fetch_answers[status] += 1
        if status == "success" and answer.status == 200 and target.family.shape not in ("training", "workflow"):
            self._succeeded.add((target.store, target.id))
        return answer

    def _answered(self, path: str, body: Any, method: str) -> Answer:
        if body is None and (fetch_target(path, {}) or family_of(path.removeprefix("/api/"))):
            return invalid_request()
        return self._behaviour.answer(path, body or {}, now=self._clock(), origin=self.root_url, method=method)

    def _scripted(self, target: str) -> Answer | None:
        waiting = self._scripts.get(target)
        return waiting.popleft() if waiting else None

    def _of_the_storm(self) -> Answer | None:
        if not self._storm:
            return None
        self._storm.rotate(-1)
        return self._storm[-1]

    def _file(self, name: str, *, proxy: bool) -> Answer:
        with self._lock:
            answer = self._scripted(name)
            file = self._behaviour.file(name, now=self._clock(), proxy=proxy)
        if answer is None and file is not None and file.status == 200:
            answer = _sent(self._made(name, file.job, file.position, None))
        answer = answer or page_answer(404 if file is None else file.status, "Nothing here")
        with self._lock:
            (self.calls.pictures if answer.status == 200 else self.calls.pictures_missing)[name] += 1
        return answer

    def _thumb(self, name: str, size: int | None) -> Answer:
        with self._lock:
            file = self._behaviour.file(name, now=self._clock(), proxy=True)
        if file is None or file.status != 200:
            return page_answer(404, "Nothing here")
        return _sent(self._made(name, file.job, file.position, size))

    def _made(self, name: str, job: Job, index: int, size: int | None) -> Made:
        place = (name, size or job.size)
        with self._drawing:  # one at a time: drawing is all computation, and a second one would only slow both
            content = self._drawn.pop(place, None) or made(name, job.prompt, job.id, index, place[1])
            self._drawn[place] = content
            if len(self._drawn) > FILES_KEPT:
                self._drawn.popitem(last=False)
        return content

    def _page(self) -> Answer:
        now = self._clock()
        with self._lock:
            jobs = self._behaviour.latest(JOBS_SHOWN)
        headers = {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store"}
        return Answer(200, headers, page(jobs, now=now, root_url=self.root_url))

    def _call_webhooks(self) -> None:
        """Start the thread that calls webhooks, where one waits and there is no such thread."""
        with self._lock:
            if self.calls_webhooks and self._calling is None and self._behaviour.webhooks_wait:
                self._calling = threading.Thread(target=self._keep_calling, name="sandbox-webhooks", daemon=True)
                self._calling.start()

    def _keep_calling(self) -> None:
        while not self._closed.wait(WEBHOOK_SECONDS):
            with self._lock:
                due = self._behaviour.webhooks_due(self._clock(), self.root_url)
                if not due and not self._behaviour.webhooks_wait:
                    self._calling = None
                    return
            for webhook in due:
                status = call(webhook)
                with self._lock:
                    self.calls.webhooks.append((webhook.url, status))


def _sent(file: Made) -> Answer:
    return Answer(200, {"Content-Type": file.media_type}, file.content)
