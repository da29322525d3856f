"""Orders at the stand-in: what is charged and refused, the queue of a plan, and answers that are lost on purpose."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import pytest

from worker.sandbox import Sandbox, SandboxOptions

ORDER, VIDEO = "/api/v3/text2img", "/api/v6/video/text2video"
KEYED = {"key": "sandbox-key", "prompt": "sea"}
GIVES_UP_SECONDS = 0.3


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SandboxOptions(seed=0, min_seconds=60, max_seconds=60, size=32)) as running:
        yield running


def order(sandbox: Sandbox, path: str = ORDER, **fields: object) -> tuple[int, bytes]:
    """Post an order over a new connection. Return the HTTP status and the body."""
    with closing(http.client.HTTPConnection(urlsplit(sandbox.root_url).netloc, timeout=GIVES_UP_SECONDS)) as client:
        client.request("POST", path, json.dumps({**KEYED, **fields}), {"Content-Type": "application/json"})
        response = client.getresponse()
        return response.status, response.read()


def counts(sandbox: Sandbox) -> tuple[int, int, int]:
    return sandbox.charges.charged, sandbox.charges.refused, sandbox.charges.double


# ── the queue ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("slots", [5, 10, 15])
def test_given_all_slots_are_taken_when_another_order_comes_then_it_is_refused_as_documented(
    sandbox: Sandbox, slots: int
) -> None:
    sandbox.options_now(slots=slots)
    taken = [order(sandbox, prompt=f"picture {number}")[0] for number in range(slots)]

    status, body = order(sandbox, VIDEO)

    message = f"Rate limit exceeded. Maximum {slots} queued requests allowed."
    assert taken == [200] * slots
    assert status == 429
    assert json.loads(body) == {"status": "error", "message": message, "retry_after": 30}
    assert counts(sandbox) == (slots, 1, 0)
    assert sandbox.charges.most_queued == slots


def test_given_a_job_is_ready_when_another_order_comes_then_its_slot_is_free() -> None:
    now = [1_000.0]
    with Sandbox(SandboxOptions(slots=1, min_seconds=5, max_seconds=5, size=32), clock=lambda: now[0]) as sandbox:
        statuses = [order(sandbox)[0], order(sandbox)[0]]
        now[0] += 5
        statuses.append(order(sandbox)[0])

    assert statuses == [200, 429, 200]
    assert sandbox.charges.most_queued == 1


@pytest.mark.parametrize(
    ("options", "limit"),
    [({}, 0), ({"plan": "standard"}, 10), ({"slots": 3}, 3), ({"plan": "standard", "slots": 0}, 0)],
)
def test_without_slots_the_plan_limits_the_queue_and_by_default_nothing_does(
    options: dict[str, Any], limit: int
) -> None:
    assert SandboxOptions(**options).queue_limit == limit


# ── what is charged ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_order_is_double_if_only_its_key_track_id_or_webhook_differ(sandbox: Sandbox) -> None:
    first = "http://127.0.0.1:9/first"
    order(sandbox, track_id="1", webhook=first)
    order(sandbox, track_id="2")
    order(sandbox, VIDEO)
    order(sandbox, prompt="lake")

    assert counts(sandbox) == (4, 0, 1)


def test_refused_orders_are_counted_and_not_charged(sandbox: Sandbox) -> None:
    order(sandbox, key="wrong")
    order(sandbox, prompt="")
    order(sandbox, scenario="not-taken")

    assert counts(sandbox) == (0, 3, 0)


def test_jobs_ordered_without_http_are_charged_too(sandbox: Sandbox) -> None:
    sandbox.submit("sea")
    sandbox.submit("sea")

    assert counts(sandbox) == (2, 0, 1)


def test_the_page_shows_the_counts(sandbox: Sandbox) -> None:
    order(sandbox)
    order(sandbox)
    order(sandbox, prompt="")

    page = sandbox.got("/", "").body.decode()

    assert "Orders: 2 charged, 1 refused, 1 double; at most\n2 queued at once." in page


def test_an_order_of_eight_mebibytes_is_read(sandbox: Sandbox) -> None:
    body = json.dumps({**KEYED, "init_image": "x" * (8 << 20)}).encode()

    with closing(http.client.HTTPConnection(urlsplit(sandbox.root_url).netloc, timeout=5)) as client:
        client.request("POST", ORDER, body, {"Content-Type": "application/json"})

        assert client.getresponse().status == 200


# ── answers that are lost ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("scenario", "error"),
    [
        ("lost-closed", http.client.RemoteDisconnected),
        ("lost-silent", TimeoutError),
        ("lost-cut", http.client.IncompleteRead),
    ],
)
@pytest.mark.parametrize("by_field", [True, False])
def test_an_order_whose_answer_is_lost_is_charged_and_its_job_exists(
    sandbox: Sandbox, scenario: str, error: type[Exception], by_field: bool
) -> None:
    fields = {"scenario": scenario} if by_field else {}
    if not by_field:
        sandbox.options_now(scenarios=(scenario,))

    with pytest.raises(error):
        order(sandbox, **fields)

    job = sandbox.job("12202888")
    assert job is not None
    assert job.prompt == "sea"
    assert counts(sandbox) == (1, 0, 0)


@pytest.mark.parametrize(("scenario", "status"), [("lost-502", 502), ("lost-504", 504)])
def test_an_order_that_a_gateway_answers_with_a_page_is_charged(sandbox: Sandbox, scenario: str, status: int) -> None:
    answered, body = order(sandbox, scenario=scenario)

    assert (answered, body.startswith(b"<!doctype html>")) == (status, True)
    assert counts(sandbox) == (1, 0, 0)


def test_the_job_of_a_lost_answer_is_fetched_as_usual(sandbox: Sandbox) -> None:
    order(sandbox, scenario="lost-502")

    assert json.loads(order(sandbox, "/api/v3/fetch/12202888")[1])["status"] == "processing"


def test_given_an_order_is_cut_early_then_it_is_not_taken_and_the_next_one_is(sandbox: Sandbox) -> None:
    """The connection is closed as soon as the head is read: the rest of the body is never awaited."""
    sandbox.options_now(scenarios=("order-cut-early", "never"))
    address = urlsplit(sandbox.root_url)
    head = f"POST {ORDER} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"

    with socket.create_connection((address.hostname or "", address.port or 0), timeout=2) as connection:
        connection.sendall(head.encode())
        received = connection.recv(100)

    assert received == b""
    assert order(sandbox)[0] == 200
    assert counts(sandbox) == (1, 0, 0)


def test_an_order_that_names_the_early_cut_itself_is_not_taken(sandbox: Sandbox) -> None:
    with pytest.raises(http.client.RemoteDisconnected):
        order(sandbox, scenario="order-cut-early")

    assert sandbox.charges.charged == 0


def test_a_stand_in_with_a_silent_connection_stops_at_once() -> None:
    with Sandbox(SandboxOptions(size=32)) as sandbox:
        address = urlsplit(sandbox.root_url)
        client = http.client.HTTPConnection(address.netloc, timeout=5)
        body = json.dumps({**KEYED, "scenario": "lost-silent"})
        client.request("POST", ORDER, body, {"Content-Type": "application/json"})
        time.sleep(0.1)
        stopped_at = time.monotonic()
    seconds = time.monotonic() - stopped_at
    client.close()

    assert seconds < 2
