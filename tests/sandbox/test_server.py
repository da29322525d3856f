"""The stand-in over real HTTP: endpoints, kept connections, counters and the knobs that tests turn."""

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
    """A clock that is told the time."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Client:
    """One kept connection to a stand-in."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.link = http.client.HTTPConnection(urlsplit(sandbox.root_url).netloc, timeout=5)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str, bytes]:
        self.link.request(method, path, body=body, headers=headers or {})
        answer = self.link.getresponse()
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
    asking = Client(sandbox)
    yield asking
    asking.link.close()


def test_a_job_goes_from_submission_to_its_pictures_over_one_connection(
    sandbox: Sandbox, client: Client, clock: Clock
) -> None:
    """Submit, wait, fetch, download: and every call is counted."""
    job = client.post("/api/v3/text2img", prompt="mountain lake", samples=2)
    first = job["future_links"][0].removeprefix(sandbox.root_url)
    waiting = client.post(f"/api/v3/fetch/{job['id']}")
    early, _, _ = client.ask("GET", first)
    clock.now += 5
    done = client.post(f"/api/v3/fetch/{job['id']}")
    status, kind, png = client.ask("GET", first)
    client.post(f"/api/v3/fetch/{job['id']}")

    assert job["fetch_result"] == f"{sandbox.url}/fetch/{job['id']}"
    assert (waiting["status"], early, done["status"]) == ("processing", 404, "success")
    assert done["output"] == job["future_links"]
    assert (status, kind, png) == (200, "image/png", draw("mountain lake", str(job["id"]), 0, 32))
    name, calls, job_id = first.rpartition("/")[2], sandbox.calls, str(job["id"])
    assert (calls.fetches[job_id], calls.fetches_after_success[job_id]) == (3, 1)
    assert (calls.pictures[name], calls.pictures_missing[name]) == (1, 1)
    assert calls.fetch_answers == {"processing": 1, "success": 2}
    assert calls.by_path["/api/v3/text2img"] == 1


def test_a_second_link_shows_the_same_picture(sandbox: Sandbox, client: Client, clock: Clock) -> None:
    """`proxy_links` lead to the same bytes as `output`."""
    jobs = [sandbox.submit("sea", samples=1) for _ in range(20)]
    clock.now += 5
    answers = [client.post(f"/api/v3/fetch/{job['id']}") for job in jobs]
    proxied = next(answer for answer in answers if "proxy_links" in answer)

    pair = [proxied["output"][0], proxied["proxy_links"][0]]
    pictures = [client.ask("GET", link.removeprefix(sandbox.root_url))[2] for link in pair]

    assert pair[0] != pair[1]
    assert pictures[0] == pictures[1]


def test_submitting_in_process_is_the_same_as_over_http(sandbox: Sandbox, client: Client, clock: Clock) -> None:
    """The short cut answers what a web app would have got, and the pictures are at hand."""
    job = sandbox.submit("desert", samples=3, family="v6/images/text2img")
    clock.now += 5

    assert job["fetch_result"] == f"{sandbox.root_url}/api/v6/images/fetch/{job['id']}"
    assert client.post("/api/v6/images/fetch", request_id=job["id"])["output"] == job["future_links"]
    known = sandbox.job(job["id"])
    assert known is not None
    assert [sandbox.picture(name) for name in known.files] == [
        draw("desert", known.id, index, 32) for index in range(3)
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
def test_what_is_not_a_post_of_json_is_an_invalid_request(
    client: Client, method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> None:
    """In HTTP 200, with a tip."""
    status, kind, answer = client.ask(method, path, body, headers)

    content = json.loads(answer)
    assert (status, kind) == (200, "application/json")
    assert (content["status"], content["message"]) == ("error", "Invalid API Request")
    assert content["tip"]


@pytest.mark.parametrize(
    "path",
    ["/generations/none.png", "/generations/", "/generations/../x.png", "/thumbs/none.png", "/favicon.ico", "//["],
)
def test_unknown_addresses_are_404(client: Client, path: str) -> None:
    """As a store of files answers: with HTML."""
    status, kind, _ = client.ask("GET", path)

    assert (status, kind) == (404, "text/html")


def test_an_unknown_call_of_the_api_is_404_in_json(client: Client) -> None:
    """Not every path of the real one is stood in for."""
    status, kind, _ = client.ask("POST", "/api/v5/no-such-call", b'{"key": "sandbox-key"}', JSON)

    assert (status, kind) == (404, "application/json")


def test_a_body_beyond_all_measure_is_refused_unread(client: Client) -> None:
    """The connection is closed after it, since its body was not read."""
    status, _, _ = client.ask("POST", "/api/v3/fetch/1", b"", {**JSON, "Content-Length": "99999999"})

    assert status == 413


def test_options_can_change_while_it_runs(sandbox: Sandbox, client: Client) -> None:
    """The key is rejected and accepted again, and a limit comes and goes."""
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
    """For a fetch, known id or not: status, headers and bytes as given, then all is as usual."""
    html = Answer(502, {"Content-Type": "text/html"}, b"<h1>Bad gateway</h1>")
    sandbox.script(77, [html, (429, {"content-type": "text/plain", "Retry-After": "7"}, b"")])

    asked = [client.ask("POST", "/api/v3/fetch/77", b'{"key": "sandbox-key"}', JSON) for _ in range(3)]

    assert asked[0] == (502, "text/html", b"<h1>Bad gateway</h1>")
    assert asked[1] == (429, "text/plain", b"")
    assert json.loads(asked[2][2])["message"] == "Request not found"
    assert sandbox.calls.fetches["77"] == 3
    assert sandbox.calls.fetch_answers == {"unreadable": 2, "failed": 1}


def test_a_scripted_picture_can_break_off(sandbox: Sandbox, client: Client, clock: Clock) -> None:
    """A Content-Length that promises more than there is ends the connection early; the next try is whole."""
    job = sandbox.submit("city", samples=1)
    path = job["future_links"][0].removeprefix(sandbox.root_url)
    sandbox.script(path.rpartition("/")[2], [(200, {"Content-Type": "image/png", "Content-Length": "900"}, b"\x89PNG")])
    clock.now += 5

    with pytest.raises(http.client.IncompleteRead):
        client.ask("GET", path)
    client.link.close()
    assert client.ask("GET", path)[2] == draw("city", str(job["id"]), 0, 32)


def test_a_storm_answers_every_fetch_in_turns_until_it_is_over(sandbox: Sandbox, client: Client) -> None:
    """Scripted answers come first; the moments of all calls are noted by the clock."""
    sandbox.storm([Answer(502, {}, b""), Answer(429, {"Retry-After": "-1"}, b"")])
    sandbox.script(77, [(418, {"Content-Type": "text/plain"}, b"")])

    asked = [client.ask("POST", f"/api/v3/fetch/{job}", b'{"key": "k"}', JSON)[0] for job in (7, 77, 8, 9)]
    sandbox.storm([])

    assert asked == [502, 418, 429, 502]
    assert client.post("/api/v3/fetch/7")["message"] == "Request not found"
    assert list(sandbox.calls.fetch_moments) == [(1_000_000.0, job) for job in ("7", "77", "8", "9", "7")]


@pytest.mark.parametrize("headers_too", [False, True])
def test_an_answer_can_drip(sandbox: Sandbox, client: Client, headers_too: bool) -> None:
    """Byte by byte; it is the same answer at last."""
    sandbox.script(77, [Answer(200, {"Content-Type": "text/plain"}, b"slow", 0.001, headers_too)])

    began = time.monotonic()
    answer = client.ask("POST", "/api/v3/fetch/77", b'{"key": "sandbox-key"}', JSON)

    assert answer == (200, "text/plain", b"slow")
    assert time.monotonic() - began >= (0.07 if headers_too else 0.003)


def test_while_it_is_away_connections_are_refused_and_afterwards_it_knows_its_jobs(
    sandbox: Sandbox, client: Client
) -> None:
    """At the same address."""
    job = sandbox.submit("city")["id"]
    client.post(f"/api/v3/fetch/{job}")

    with sandbox.away(), pytest.raises((ConnectionError, http.client.HTTPException)):
        client.post(f"/api/v3/fetch/{job}")
    with sandbox.away(), pytest.raises(ConnectionRefusedError):
        Client(sandbox).post(f"/api/v3/fetch/{job}")
    client.link.close()

    assert client.post(f"/api/v3/fetch/{job}")["status"] == "processing"
    assert sandbox.calls.fetches[str(job)] == 2


def test_many_kept_connections_are_served_at_once(sandbox: Sandbox) -> None:
    """Eighty connections stay open and each is answered again and again."""
    clients = [Client(sandbox) for _ in range(80)]

    def ask(client: Client) -> None:
        for _ in range(3):
            client.post("/api/v3/fetch/5")

    threads = [threading.Thread(target=ask, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = [client.link.sock is not None for client in clients]
    for client in clients:
        client.link.close()

    assert sandbox.calls.fetches["5"] == 240
    assert all(kept)


def test_the_page_shows_jobs_and_small_pictures_that_do_not_count_as_downloads(
    sandbox: Sandbox, client: Client, clock: Clock
) -> None:
    """Prompts are shown as text, whatever is in them, and the key is not on the page."""
    sandbox.submit("<script>alert(1)</script> & forest \ud800", samples=1)
    clock.now += 5
    waiting = sandbox.submit("late", samples=1)

    status, kind, html = client.ask("GET", "/")
    job = sandbox.job(waiting["id"] - 1)
    assert job is not None
    thumb = client.ask("GET", f"/thumbs/{job.files[0]}")

    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert b"<script>" not in html
    assert b"&lt;script&gt;" in html
    assert b"5 s to go" in html
    assert b"sandbox-key" not in html
    assert thumb == (200, "image/png", draw(job.prompt, job.id, 0, 128))
    assert not sandbox.calls.pictures


def test_health_is_answered(client: Client) -> None:
    """For those who wait until it is up."""
    assert client.ask("GET", "/healthz") == (200, "text/plain", b"ok\n")


def test_closing_ends_kept_connections_and_frees_the_port(clock: Clock) -> None:
    """Nothing is left behind: the open connection sees its end, and a new one is refused."""
    with Sandbox(clock=clock) as sandbox:
        client = Client(sandbox)
        client.ask("GET", "/healthz")
        kept = client.link.sock
        port = urlsplit(sandbox.root_url).port
    assert kept is not None

    assert kept.recv(1) == b""
    client.link.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port or 0), timeout=1)


def test_it_listens_on_ipv6_loopback_too(clock: Clock) -> None:
    """The address is written as URLs want it."""
    with Sandbox(host="::1", clock=clock) as sandbox:
        client = Client(sandbox)
        status, _, _ = client.ask("GET", "/healthz")
        client.link.close()

    assert status == 200
    assert sandbox.url.startswith("http://[::1]:")


def test_closing_is_not_put_off_until_its_next_look() -> None:
    began = time.monotonic()

    for _ in range(20):
        Sandbox().close()

    assert time.monotonic() - began < 20 * CHECK_SECONDS / 2
