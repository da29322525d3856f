"""The stand-in over real HTTP: endpoints, kept connections, counters, and controls for tests."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest

from worker.sandbox import Answer, Sandbox, SandboxOptions
from worker.sandbox.listener import CHECK_SECONDS
from worker.sandbox.pictures import draw

JSON = {"Content-Type": "application/json"}


@dataclass
class Clock:
    """A clock that the test sets."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Client:
    """A client with one persistent connection to a stand-in."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(sandbox.root_url).netloc, timeout=5)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str, bytes]:
        self.connection.request(method, path, body=body, headers=headers or {})
        answer = self.connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()

    def post(self, path: str, **body: object) -> dict[str, Any]:
        raw = json.dumps({"key": "sandbox-key", **body}).encode()
        content = json.loads(self.ask("POST", path, raw, JSON)[2])
        assert isinstance(content, dict)
        return content


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sandbox(clock: Clock) -> Iterator[Sandbox]:
    with Sandbox(SandboxOptions(seed=0, min_seconds=5, max_seconds=5, size=32), clock=clock) as running:
        yield running


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[Client]:
    new_client = Client(sandbox)
    yield new_client
    new_client.connection.close()


def test_a_job_can_be_submitted_fetched_and_downloaded_over_one_connection(
    sandbox: Sandbox, client: Client, clock: Clock
) -> None:
    """Every request is counted."""
    job = client.post("/api/v3/text2img", prompt="mountain lake", samples=2)
    first = job["future_links"][0].removeprefix(sandbox.root_url)
    early_answer = client.post(f"/api/v3/fetch/{job['id']}")
    early_status, _, _ = client.ask("GET", first)
    clock.now += 5
    ready_answer = client.post(f"/api/v3/fetch/{job['id']}")
    status, media_type, png = client.ask("GET", first)
    client.post(f"/api/v3/fetch/{job['id']}")

    assert job["fetch_result"] == f"{sandbox.url}/fetch/{job['id']}"
    assert (early_answer["status"], early_status, ready_answer["status"]) == ("processing", 404, "success")
    assert ready_answer["output"] == job["future_links"]
    assert (status, media_type, png) == (200, "image/png", draw("mountain lake", str(job["id"]), 0, 32))
    name, calls, job_id = first.rpartition("/")[2], sandbox.calls, str(job["id"])
    assert (calls.fetches[job_id], calls.fetches_after_success[job_id]) == (3, 1)
    assert (calls.pictures[name], calls.pictures_missing[name]) == (1, 1)
    assert calls.fetch_answers == {"processing": 1, "success": 2}
    assert calls.by_path["/api/v3/text2img"] == 1


def test_a_proxy_link_has_the_same_picture(sandbox: Sandbox, client: Client, clock: Clock) -> None:
    """Links in `proxy_links` return the same bytes as those in `output`."""
    jobs = [sandbox.submit("sea", samples=1) for _ in range(20)]
    clock.now += 5
    answers = [client.post(f"/api/v3/fetch/{job['id']}") for job in jobs]
    proxied = next(answer for answer in answers if "proxy_links" in answer)

    pair = [proxied["output"][0], proxied["proxy_links"][0]]
    pictures = [client.ask("GET", connection.removeprefix(sandbox.root_url))[2] for connection in pair]

    assert pair[0] != pair[1]
    assert pictures[0] == pictures[1]


def test_submitting_in_process_is_the_same_as_over_http(sandbox: Sandbox, client: Client, clock: Clock) -> None:
    """It returns the answer that a web app would get, and the pictures can be read directly."""
    job = sandbox.submit("desert", samples=3, family="v6/images/text2img")
    clock.now += 5

    assert job["fetch_result"] == f"{sandbox.root_url}/api/v6/images/fetch/{job['id']}"
    assert client.post("/api/v6/images/fetch", request_id=job["id"])["output"] == job["future_links"]
    submitted = sandbox.job(job["id"])
    assert submitted is not None
    assert [sandbox.picture(name) for name in submitted.files] == [
        draw("desert", submitted.id, index, 32) for index in range(3)
    ]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers"),
    [
        ("GET", "/api/v3/fetch/12202888", None, {}),
        ("GET", "/api/v3/text2img", None, {}),
        ("POST", "/api/v3/fetch/12202888", None, {}),
        ("POST", "/api/v3/fetch/12202888", b"", JSON),
        ("POST", "/api/v3/fetch/12202888", b"{", JSON),
        ("POST", "/api/v3/fetch/12202888", b'["sandbox-key"]', JSON),
        ("POST", "/api/v3/fetch/12202888", b"key=sandbox-key", {"Content-Type": "application/x-www-form-urlencoded"}),
        ("POST", "/api/v3/fetch/12202888", b'{"key": "sandbox-key"}', {}),
        ("POST", "/api/v3/fetch/12202888", b"{}", {**JSON, "Content-Length": "-1"}),
        ("POST", "/api/v3/fetch/12202888", b"{}", {**JSON, "Content-Length": "1" * 30}),
    ],
)
def test_a_request_that_is_not_a_post_of_json_is_invalid(
    client: Client, method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> None:
    """The answer has HTTP 200 and a tip."""
    status, media_type, answer = client.ask(method, path, body, headers)

    content = json.loads(answer)
    assert (status, media_type) == (200, "application/json")
    assert (content["status"], content["message"]) == ("error", "Invalid API Request")
    assert content["tip"]


@pytest.mark.parametrize(
    "path",
    ["/generations/none.png", "/generations/", "/generations/../x.png", "/thumbs/none.png", "/favicon.ico", "//["],
)
def test_unknown_urls_are_404(client: Client, path: str) -> None:
    """The answer is HTML, as from a file store."""
    status, media_type, _ = client.ask("GET", path)

    assert (status, media_type) == (404, "text/html")


def test_an_unknown_api_call_is_404_in_json(client: Client) -> None:
    """The stand-in does not have every path of the real API."""
    status, media_type, _ = client.ask("POST", "/api/v5/no-such-call", b'{"key": "sandbox-key"}', JSON)

    assert (status, media_type) == (404, "application/json")


def test_an_oversized_body_is_refused_without_reading_it(client: Client) -> None:
    """The connection is closed afterwards because the body was not read."""
    status, _, _ = client.ask("POST", "/api/v3/fetch/1", b"", {**JSON, "Content-Length": "99999999"})

    assert status == 413


def test_options_can_be_changed_while_it_runs(sandbox: Sandbox, client: Client) -> None:
    """The key is rejected and accepted again, and a rate limit is switched on and off."""
    sandbox.options_now(key="another")
    refused = client.post("/api/v3/fetch/1")
    sandbox.options_now(key="sandbox-key", rps=1, limit_style="http200")
    limited = [client.post("/api/v3/fetch/1")["message"] for _ in range(2)]
    sandbox.options_now(rps=0)

    assert refused["message"] == "Invalid Api Key"
    assert limited == ["Request not found", "Rate limit exceeded"]
    assert client.post("/api/v3/fetch/1")["message"] == "Request not found"
    assert sandbox.calls.fetches["1"] == 4
    with pytest.raises(ValueError, match="rps must"):
        sandbox.options_now(rps=-1)


def test_scripted_answers_come_first_and_once_each(sandbox: Sandbox, client: Client) -> None:
    """Status, headers and bytes are sent as given, for known and unknown ids. Later fetches are normal again."""
    html = Answer(502, {"Content-Type": "text/html"}, b"<h1>Bad gateway</h1>")
    sandbox.script(77, [html, (429, {"content-type": "text/plain", "Retry-After": "7"}, b"")])

    answers = [client.ask("POST", "/api/v3/fetch/77", b'{"key": "sandbox-key"}', JSON) for _ in range(3)]

    assert answers[0] == (502, "text/html", b"<h1>Bad gateway</h1>")
    assert answers[1] == (429, "text/plain", b"")
    assert json.loads(answers[2][2])["message"] == "Request not found"
    assert sandbox.calls.fetches["77"] == 3
    assert sandbox.calls.fetch_answers == {"unreadable": 2, "failed": 1}


def test_a_scripted_picture_can_be_truncated(sandbox: Sandbox, client: Client, clock: Clock) -> None:
    """A Content-Length that is too large makes the connection end early. The next download is complete."""
    job = sandbox.submit("city", samples=1)
    path = job["future_links"][0].removeprefix(sandbox.root_url)
    sandbox.script(path.rpartition("/")[2], [(200, {"Content-Type": "image/png", "Content-Length": "900"}, b"\x89PNG")])
    clock.now += 5

    with pytest.raises(http.client.IncompleteRead):
        client.ask("GET", path)
    client.connection.close()
    assert client.ask("GET", path)[2] == draw("city", str(job["id"]), 0, 32)


def test_a_storm_answers_every_fetch_in_turn_until_it_is_ended(sandbox: Sandbox, client: Client) -> None:
    """Scripted answers come first. The times of all fetches are recorded."""
    sandbox.storm([Answer(502, {}, b""), Answer(429, {"Retry-After": "-1"}, b"")])
    sandbox.script(77, [(418, {"Content-Type": "text/plain"}, b"")])

    answers = [client.ask("POST", f"/api/v3/fetch/{job}", b'{"key": "k"}', JSON)[0] for job in (7, 77, 8, 9)]
    sandbox.storm([])

    assert answers == [502, 418, 429, 502]
    assert client.post("/api/v3/fetch/7")["message"] == "Request not found"
    assert list(sandbox.calls.fetch_moments) == [(1_000_000.0, job) for job in ("7", "77", "8", "9", "7")]


@pytest.mark.parametrize("headers_too", [False, True])
def test_an_answer_can_be_sent_byte_by_byte(sandbox: Sandbox, client: Client, headers_too: bool) -> None:
    """The complete answer is the same."""
    sandbox.script(77, [Answer(200, {"Content-Type": "text/plain"}, b"slow", 0.001, headers_too)])

    started_at = time.monotonic()
    answer = client.ask("POST", "/api/v3/fetch/77", b'{"key": "sandbox-key"}', JSON)

    assert answer == (200, "text/plain", b"slow")
    assert time.monotonic() - started_at >= (0.07 if headers_too else 0.003)


def test_while_it_is_away_connections_are_refused_and_afterwards_it_still_has_its_jobs(
    sandbox: Sandbox, client: Client
) -> None:
    """The address stays the same."""
    job = sandbox.submit("city")["id"]
    client.post(f"/api/v3/fetch/{job}")

    with sandbox.away(), pytest.raises((ConnectionError, http.client.HTTPException)):
        client.post(f"/api/v3/fetch/{job}")
    with sandbox.away(), pytest.raises(ConnectionRefusedError):
        Client(sandbox).post(f"/api/v3/fetch/{job}")
    client.connection.close()

    assert client.post(f"/api/v3/fetch/{job}")["status"] == "processing"
    assert sandbox.calls.fetches[str(job)] == 2


def test_many_persistent_connections_are_served_at_the_same_time(sandbox: Sandbox) -> None:
    """Eighty connections stay open, and each is used several times."""
    clients = [Client(sandbox) for _ in range(80)]

    def ask(client: Client) -> None:
        for _ in range(3):
            client.post("/api/v3/fetch/5")

    threads = [threading.Thread(target=ask, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    still_open = [client.connection.sock is not None for client in clients]
    for client in clients:
        client.connection.close()

    assert sandbox.calls.fetches["5"] == 240
    assert all(still_open)


def test_the_page_shows_jobs_and_thumbnails_that_do_not_count_as_downloads(
    sandbox: Sandbox, client: Client, clock: Clock
) -> None:
    """Prompts are escaped, and the page does not contain the key."""
    sandbox.submit("<script>alert(1)</script> & forest \ud800", samples=1)
    clock.now += 5
    unfinished = sandbox.submit("late", samples=1)

    status, media_type, html = client.ask("GET", "/")
    job = sandbox.job(unfinished["id"] - 1)
    assert job is not None
    thumbnail = client.ask("GET", f"/thumbs/{job.files[0]}")

    assert (status, media_type) == (200, "text/html; charset=utf-8")
    assert b"<script>" not in html
    assert b"&lt;script&gt;" in html
    assert b"5 s to go" in html
    assert b"sandbox-key" not in html
    assert thumbnail == (200, "image/png", draw(job.prompt, job.id, 0, 128))
    assert not sandbox.calls.pictures


def test_the_health_check_answers(client: Client) -> None:
    """Other programs can wait for it."""
    assert client.ask("GET", "/healthz") == (200, "text/plain", b"ok\n")


def test_closing_ends_persistent_connections_and_frees_the_port(clock: Clock) -> None:
    """The open connection is closed, and a new one is refused."""
    with Sandbox(clock=clock) as sandbox:
        client = Client(sandbox)
        client.ask("GET", "/healthz")
        open_socket = client.connection.sock
        port = urlsplit(sandbox.root_url).port
    assert open_socket is not None

    assert open_socket.recv(1) == b""
    client.connection.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port or 0), timeout=1)


def test_it_can_listen_on_ipv6_loopback(clock: Clock) -> None:
    """The address is in brackets, as in URLs."""
    with Sandbox(host="::1", clock=clock) as sandbox:
        client = Client(sandbox)
        status, _, _ = client.ask("GET", "/healthz")
        client.connection.close()

    assert status == 200
    assert sandbox.url.startswith("http://[::1]:")


def test_closing_does_not_wait_for_the_next_check() -> None:
    started_at = time.monotonic()

    for _ in range(20):
        Sandbox().close()

    assert time.monotonic() - started_at < 20 * CHECK_SECONDS / 2
