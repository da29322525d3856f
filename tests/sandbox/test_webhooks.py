"""Webhooks of the stand-in: they are called with the fields of the order, on this machine only."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from worker.sandbox import Sandbox, SandboxOptions
from worker.sandbox.webhooks import is_local


@contextmanager
def receiver(statuses: list[int]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Run a receiver that answers these statuses in turn and then repeats the last. Yields its URL and the calls."""
    calls: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(statuses[min(len(calls), len(statuses)) - 1])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/hook?a=1", calls
        server.shutdown()
        thread.join()


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SandboxOptions(min_seconds=0.2, max_seconds=0.2, size=16)) as running:
        yield running


def wait_for_calls(sandbox: Sandbox, times: int = 1) -> bool:
    deadline = time.monotonic() + 10
    while len(sandbox.calls.webhooks) < times and time.monotonic() < deadline:
        time.sleep(0.02)
    return len(sandbox.calls.webhooks) == times


def test_a_webhook_with_the_track_id_is_called_when_the_job_is_ready(sandbox: Sandbox) -> None:
    with receiver([200]) as (url, calls):
        answer = sandbox.submit("sea", samples=1, webhook=url, track_id="order-7")
        assert wait_for_calls(sandbox)

    assert [(call["status"], call["id"], call["track_id"]) for call in calls] == [("success", answer["id"], "order-7")]
    assert calls[0]["output"] == answer["future_links"]
    assert sandbox.calls.webhooks == [(url, 200)]


def test_a_failed_job_calls_its_webhook_too_and_a_failing_receiver_is_called_again(sandbox: Sandbox) -> None:
    with receiver([500, 200]) as (url, calls):
        answer = sandbox.submit("sea", scenario="failed", webhook=url, track_id=5)
        assert wait_for_calls(sandbox)

    assert [(call["status"], call["id"], call["track_id"]) for call in calls] == [("failed", answer["id"], 5)] * 2


def test_an_unreachable_receiver_is_recorded_and_has_no_other_effect(sandbox: Sandbox) -> None:
    with receiver([200]) as (url, _):
        pass
    sandbox.submit("sea", webhook=url)

    assert wait_for_calls(sandbox)
    assert sandbox.calls.webhooks == [(url, 0)]


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/hook", "http://example.org/", "http://10.0.0.5/", "http://127.0.0.1.example.org/",
        "http://localhost.example.org/", "ftp://localhost/", "file:///etc/passwd", "http://[", "http://0.0.0.0/",
        "http://127.0.0.1@example.org/", "http://2130706433/", "",
    ],
)  # fmt: skip
def test_no_url_of_another_machine_is_called(sandbox: Sandbox, url: str) -> None:
    answer = sandbox.submit("sea", webhook=url)

    assert not is_local(url)
    assert ("not called" in answer["webhook_status"]) == (url != "")
    assert sandbox._webhook_thread is None


@pytest.mark.parametrize("url", ["http://localhost:80/a", "http://127.9.9.9/", "http://[::1]:8000/hook"])
def test_urls_of_this_machine_are_called(url: str) -> None:
    assert is_local(url)


def test_webhooks_can_be_switched_off(sandbox: Sandbox) -> None:
    """The test kit does this, because a URL may belong to a server that is in use."""
    sandbox.calls_webhooks = False
    with receiver([200]) as (url, calls):
        sandbox.submit("sea", webhook=url)
        time.sleep(0.5)

    assert calls == []
