"""Tests of the fake API that takes orders: what it charges and refuses, and what a client sees when it cuts."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.acceptance.orders_api import Arrival, picture
from tests.acceptance.orders_process import OrdersApi, OrdersReport
from tests.waiting import wait_until
from worker.core.media.signatures import is_complete, sniff

KEY = "acceptance-key-77aa"
ORDER = "/api/v6/images/text2img"
GIVES_UP_SECONDS = 0.5
LARGE = "x" * 6_000_000


@pytest.fixture
def api() -> Iterator[OrdersApi]:
    with OrdersApi(KEY, seed=1) as api:
        api.behave(min_seconds=0.3, max_seconds=0.3, latency_seconds=0)
        yield api


def post(api: OrdersApi, path: str, **body: object) -> tuple[int, dict[str, Any]]:
    with closing(http.client.HTTPConnection(urlsplit(api.base).netloc, timeout=GIVES_UP_SECONDS)) as connection:
        connection.request("POST", path, json.dumps({"key": KEY, **body}))
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def test_an_order_is_charged_and_its_picture_is_ready_later(api: OrdersApi) -> None:
    _, answer = post(api, ORDER, order_number=7)
    fetch = urlsplit(answer["fetch_result"]).path
    early = post(api, fetch)[1]
    time.sleep(0.35)
    ready = post(api, fetch)[1]

    link = urlsplit(ready["output"][0])
    with closing(http.client.HTTPConnection(link.netloc, timeout=5)) as connection:
        connection.request("GET", link.path)
        content = connection.getresponse().read()
    (arrival,) = api.report().arrivals
    media = sniff(content)
    assert (early["status"], ready["status"], ready["id"]) == ("processing", "success", answer["id"])
    assert content == picture(str(answer["id"]))
    assert media is not None
    assert is_complete(media, content, content, len(content))
    assert (arrival.number, arrival.outcome, arrival.answer) == (7, "charged", "sent")
    assert arrival.ready_at - arrival.charged_at == pytest.approx(0.3)


def test_an_order_beyond_the_slots_is_refused_and_not_charged(api: OrdersApi) -> None:
    api.behave(slots=2, min_seconds=30, max_seconds=30)

    statuses = [post(api, ORDER, order_number=number)[0] for number in range(3)]
    report = api.report()

    assert statuses == [200, 200, 429]
    assert report.charged() == {0: 1, 1: 1}
    assert (report.count("refused"), report.most_queued) == (1, 2)


def test_an_order_without_the_key_or_a_number_is_a_stray(api: OrdersApi) -> None:
    post(api, ORDER, order_number=1, key="wrong")
    post(api, ORDER)

    assert len(api.report().strays) == 2
    assert api.report().charged() == {}


@pytest.mark.parametrize(
    ("fault", "error"), [("cut_after", (ConnectionError, http.client.RemoteDisconnected)), ("swallowed", TimeoutError)]
)
def test_a_lost_answer_is_charged_and_the_second_one_is_sent(
    api: OrdersApi, fault: str, error: type[Exception] | tuple[type[Exception], ...]
) -> None:
    api.behave(**{fault: 1.0})

    with pytest.raises(error):
        post(api, ORDER, order_number=3)
    status, _ = post(api, ORDER, order_number=3)

    assert status == 200
    wait_until(lambda: all(arrival.ended for arrival in api.report().arrivals), "the API notices that the client left")
    assert [(arrival.outcome, arrival.answer) for arrival in api.report().arrivals] == [
        ("charged", fault),
        ("charged", "sent"),
    ]


def test_a_connection_that_is_cut_before_cannot_be_written_to(api: OrdersApi) -> None:
    api.behave(cut_before=1.0)

    with socket.create_connection(("127.0.0.1", urlsplit(api.base).port or 0)) as connection:
        time.sleep(0.2)
        with pytest.raises(ConnectionError):
            connection.sendall(b"POST / HTTP/1.1\r\n")

    assert (api.report().cut_before, api.report().arrivals) == (1, ())


def test_a_large_order_that_is_cut_while_it_is_sent_cannot_be_sent_whole(api: OrdersApi) -> None:
    api.behave(cut_during=1.0)
    body = json.dumps({"key": KEY, "order_number": 5, "padding": LARGE}).encode()

    with socket.create_connection(("127.0.0.1", urlsplit(api.base).port or 0), timeout=5) as connection:
        connection.sendall(f"POST {ORDER} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        with pytest.raises(ConnectionError):
            connection.sendall(body)
    status, _ = post(api, ORDER, order_number=5, padding=LARGE)

    assert status == 200
    assert [arrival.outcome for arrival in api.report().arrivals_of(5)] == ["cut_during", "charged"]


def test_clients_that_go_away_are_recorded(api: OrdersApi) -> None:
    """One goes while it sends, the other before it is answered. Only the second is charged."""
    api.behave(latency_seconds=0.2)
    body = json.dumps({"key": KEY, "order_number": 9}).encode()
    for sent in (body[:5], body):
        with socket.create_connection(("127.0.0.1", urlsplit(api.base).port or 0)) as connection:
            connection.sendall(f"POST {ORDER} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + sent)
            time.sleep(0.05)
    wait_until(lambda: sum(arrival.ended > 0 for arrival in api.report().arrivals) == 2, "both ends are recorded")

    assert [(arrival.outcome, arrival.answer) for arrival in api.report().arrivals] == [
        ("incomplete", ""),
        ("charged", "client_gone"),
    ]


def test_the_use_of_slots_is_measured_from_the_first_charge_to_the_last() -> None:
    moments = ((0.0, 4.0), (0.0, 2.0), (2.0, 6.0), (4.0, 8.0))
    arrivals = tuple(
        Arrival(number, began, "charged", str(number), began, ready) for number, (began, ready) in enumerate(moments)
    )

    report = OrdersReport(arrivals, slots=2, most_queued=2, cut_before=0, fetches=0, strays=())

    assert report.slot_use() == 1.0
    assert OrdersReport(arrivals, slots=4, most_queued=2, cut_before=0, fetches=0, strays=()).slot_use() == 0.5
