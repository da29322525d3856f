"""Responses of real HTTP clients after a submit call."""

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import requests

from worker.errors import ApiRefused, NotTrackable
from worker.vendor.fetch_url import AllowedApi
from worker.vendor.submissions import planned_job, submission

ANSWER = {"status": "processing", "id": 7, "eta": 5}
WALL = "<!DOCTYPE html><title>Just a moment...</title>"
# the answers by the end of the path: status and body
ANSWERS: dict[str, tuple[int, str]] = {
    "/text2video": (200, json.dumps(ANSWER)),
    "/accepted": (202, json.dumps(ANSWER)),
    "/bom": (200, "\ufeff" + json.dumps(ANSWER)),
    "/no-credits": (402, '{"status": "error", "message": "Insufficient credits"}'),
    "/refused": (200, '{"status": "error", "messege": "Your monthly limit exceeded"}'),
    "/validator": (422, '{"message": "The prompt field is required.", "errors": {"prompt": ["required"]}}'),
    "/wall": (403, WALL),
    "/page": (200, WALL),
    "/empty": (200, ""),
    "/list": (200, f"[{json.dumps(ANSWER)}]"),
    "/text": (200, '"7"'),
    "/number": (200, "7"),
    "/deep": (200, '{"a":' * 100_000),
    "/latin": (200, '{"status": "processing", "id": 7, "tip": "\\ud800"}'),
}


class Server(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/moved"):
            self.send_response(307)
            self.send_header("Location", "/api/v6/voice/text2video")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        status, text = next(answer for end, answer in ANSWERS.items() if self.path.partition("?")[0].endswith(end))
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def post_requests(url: str) -> object:
    return requests.post(url, json={"key": "k"}, timeout=10)


def post_requests_session(url: str) -> object:
    with requests.Session() as session:
        return session.post(url, json={"key": "k"}, timeout=10, stream=True)


def post_httpx(url: str) -> object:
    return httpx.post(url, json={"key": "k"}, timeout=10, follow_redirects=True)


def post_httpx_async(url: str) -> object:

    async def post() -> object:
        async with httpx.AsyncClient(follow_redirects=True) as client:
            return await client.post(url, json={"key": "k"}, timeout=10)

    return asyncio.run(post())


CLIENTS = [post_requests, post_requests_session, post_httpx, post_httpx_async]


def api(site: str) -> AllowedApi:
    return AllowedApi(f"{site}/api/v6", frozenset({site.removeprefix("http://")}))


@pytest.mark.parametrize("post", CLIENTS)
@pytest.mark.parametrize(
    ("path", "fetch_path", "kind"),
    [
        ("/api/v6/video/text2video", "/api/v6/video/fetch/7", "video"),
        ("/api/v6/video/text2video?trace=1", "/api/v6/video/fetch/7", "video"),
        ("/api/v7/images/accepted", "/api/v7/images/fetch/7", "images"),
        ("/api/v6/images/bom", "/api/v6/images/fetch/7", "images"),
        ("/api/v6/images/latin", "/api/v6/images/fetch/7", "images"),
        ("/gateway/api/v6/3d/text2video", "/api/v6/3d/fetch/7", "3d"),
        ("/generate/text2video", "/api/v6/fetch/7", "image"),
        ("/api/v6/images/moved", "/api/v6/voice/fetch/7", "voice"),  # the final URL after a redirect
    ],
)
def test_the_url_of_a_response_determines_the_fetch_url(
    post: Any, path: str, fetch_path: str, kind: str, site: str
) -> None:
    job = planned_job(post(f"{site}{path}"), api(site))

    assert (job.address.url, job.kind) == (f"{site}{fetch_path}", kind)
    assert job.submission.remote_id == "7"


@pytest.mark.parametrize("post", CLIENTS)
@pytest.mark.parametrize("path", ["/no-credits", "/refused", "/validator", "/wall"])
def test_a_response_that_refuses_the_order_raises_api_refused(post: Any, path: str, site: str) -> None:
    with pytest.raises(ApiRefused) as refused:
        planned_job(post(f"{site}/api/v6/images{path}"), api(site))

    assert refused.value.message


@pytest.mark.parametrize("post", CLIENTS)
@pytest.mark.parametrize("path", ["/page", "/empty", "/list", "/text", "/number", "/deep"])
def test_a_response_without_a_json_object_raises_not_trackable(post: Any, path: str, site: str) -> None:
    with pytest.raises(NotTrackable, match="without a JSON object"):
        planned_job(post(f"{site}/api/v6/images{path}"), api(site))


def test_a_response_with_a_consumed_body_raises_not_trackable(site: str) -> None:
    with requests.Session() as session:
        response = session.post(f"{site}/api/v6/images/text2video", stream=True, timeout=10)
        list(response.iter_content(1))

        with pytest.raises(NotTrackable, match="without a JSON object"):
            planned_job(response, api(site))


def test_an_httpx_response_without_a_request_is_read() -> None:

    assert submission(httpx.Response(200, json=ANSWER)).remote_id == "7"


def test_a_handmade_response_is_read() -> None:
    response = requests.Response()
    response.status_code = 200
    response._content = json.dumps(ANSWER).encode()

    assert submission(response).remote_id == "7"


def test_the_error_for_an_asynchronous_response_says_what_to_pass() -> None:
    async def json_later() -> dict[str, object]:
        return dict(ANSWER)

    response = SimpleNamespace(url="https://modelslab.com/api/v6/images/text2img", status=200, json=json_later)

    with pytest.raises(NotTrackable, match=r"await response\.json"):
        submission(response)


class Hostile:
    """A response in which one attribute raises an error."""

    status_code: object = 200
    url: object = "https://modelslab.com/api/v6/images/text2img"

    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)

    def json(self) -> object:
        return dict(ANSWER)


class Gone(Exception):
    """An exception that only one HTTP client raises."""


ODD = [Gone("x"), ArithmeticError("x"), MemoryError("x"), StopIteration("x"), AssertionError("x")]


@pytest.mark.parametrize("name", ["url", "status_code", "json"])
@pytest.mark.parametrize("error", ODD, ids=lambda error: type(error).__name__)
def test_a_response_whose_attribute_raises_is_refused(name: str, error: Exception) -> None:
    class Broken(Hostile):
        pass

    setattr(Broken, name, property(lambda response: _raise(error)))

    with pytest.raises(NotTrackable, match=type(error).__name__):
        submission(Broken())


@pytest.mark.parametrize("name", ["url", "json"])
def test_exceptions_that_stop_the_process_are_not_caught(name: str) -> None:
    class Stopped(Hostile):
        pass

    setattr(Stopped, name, property(lambda response: _raise(KeyboardInterrupt())))

    with pytest.raises(KeyboardInterrupt):
        submission(Stopped())


def _raise(error: BaseException) -> object:
    raise error


@pytest.mark.parametrize(
    "response",
    [
        Hostile(status_code="200"),
        Hostile(status_code=True),
        Hostile(status_code=None),
        Hostile(url=None),
        Hostile(url=""),
        Hostile(url=5),
        Hostile(url="https://[::1"),
        Hostile(url="https://h/" + "x" * 100_000),
        Hostile(url=SimpleNamespace()),
    ],
)
def test_a_response_with_unusual_attributes_is_read(response: Hostile) -> None:
    assert planned_job(response, AllowedApi("https://modelslab.com/api/v6", {"modelslab.com"})).submission.eta == 5.0


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), TypeError("x"), RuntimeError("x"), OSError("x"), RecursionError("x"), KeyError("x"), *ODD],
)
def test_a_response_whose_body_can_t_be_read_is_refused(error: Exception) -> None:
    with pytest.raises(NotTrackable):
        submission(Hostile(json=lambda: _raise(error)))


@pytest.mark.parametrize("shape", [bytes, bytearray])
def test_the_bytes_of_an_answer_are_read_like_its_text(shape: Any) -> None:
    body = json.dumps(ANSWER).encode()

    assert submission(shape(body)) == submission(ANSWER)
    assert submission(shape(b"\xef\xbb\xbf" + body)) == submission(ANSWER)
    with pytest.raises(NotTrackable):
        submission(shape(b"7"))
    with pytest.raises(NotTrackable):
        submission(shape(b'\xff\xfe{"id": 7}'))
    with pytest.raises(NotTrackable):
        submission(shape(b'{"id": 7'))
