"""Tests of the fake hosted API that the acceptance programs use."""

import hashlib
import http.client
import json
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from tests.acceptance.api import (
    FAIL_WITH,
    ORDER_PATH,
    ApiBehaviour,
    ApiJob,
    ApiOrder,
    ApiOutput,
    ApiServers,
    ApiState,
    picture,
)

KEY = "the right key"


@pytest.fixture
def servers() -> Iterator[ApiServers]:
    with ApiServers(ApiState(seed=7, behaviour=ApiBehaviour(accept=(KEY,)))) as servers:
        yield servers


def send(servers: ApiServers, method: str, path: str, body: str | None = None) -> tuple[int, dict[str, object]]:
    with closing(http.client.HTTPConnection("127.0.0.1", servers.port, timeout=5)) as connection:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def ask(servers: ApiServers, remote_id: str, key: str = KEY) -> tuple[int, dict[str, object]]:
    return send(servers, "POST", f"/api/v3/fetch/{remote_id}", json.dumps({"key": key}))


def get(address: str) -> tuple[int, bytes]:
    parts = urlsplit(address)
    assert parts.hostname is not None
    with closing(http.client.HTTPConnection(parts.hostname, parts.port, timeout=5)) as connection:
        connection.request("GET", f"{parts.path}?{parts.query}" if parts.query else parts.path)
        response = connection.getresponse()
        return response.status, response.read()


def links(answer: dict[str, object]) -> list[str]:
    output = answer["output"]
    return [output] if isinstance(output, str) else list(output)  # type: ignore[call-overload]  # JSON has no types


def ready(remote_id: str, *outputs: ApiOutput, script: tuple[str, ...] = ()) -> ApiJob:
    return ApiJob(remote_id, time.time() - 60, 1, outputs or (ApiOutput(),), script)


def test_a_picture_is_a_complete_png_and_reproducible() -> None:
    data = picture(1, "12", 0)

    assert 20_000 <= len(data) <= 210_000
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    kinds, offset = [], 8
    while offset < len(data):
        (length,) = struct.unpack(">I", data[offset : offset + 4])
        kind_and_data = data[offset + 4 : offset + 8 + length]
        assert struct.unpack(">I", data[offset + 8 + length : offset + 12 + length])[0] == zlib.crc32(kind_and_data)
        kinds.append(kind_and_data[:4])
        offset += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]
    assert data == picture(1, "12", 0)
    assert len({hashlib.sha256(picture(1, str(n), p)).digest() for n in range(5) for p in range(3)}) == 15


def test_a_job_is_processing_until_it_is_ready_then_a_success_with_all_outputs(servers: ApiServers) -> None:
    now = time.time()
    servers.api.register([ApiJob("5", now, 3600), ApiJob("6", now - 60, 1, (ApiOutput(), ApiOutput(), ApiOutput()))])

    _, waiting = ask(servers, "5")
    _, finished = ask(servers, "6")

    assert waiting["status"] == "processing"
    assert "id" not in waiting
    assert "eta" not in waiting
    assert finished["status"] == "success"
    assert [get(link) for link in links(finished)] == [(200, picture(7, "6", position)) for position in range(3)]


def test_every_form_of_success_names_the_same_links(servers: ApiServers) -> None:
    servers.api.register([ready(str(number)) for number in range(40)])

    answers = [ask(servers, str(number))[1] for number in range(40)]

    assert [links(answer) for answer in answers] == [
        [f"http://127.0.0.1:{servers.pictures_port}/generations/{number}.0.png"] for number in range(40)
    ]
    assert len({tuple(sorted(answer)) for answer in answers}) >= 6


def test_a_wrong_key_an_unknown_id_and_a_bad_body_get_the_answers_of_the_real_api(servers: ApiServers) -> None:
    servers.api.register([ready("1")])

    assert ask(servers, "1", "wrong")[1]["message"] == "Invalid Api Key"
    assert ask(servers, "2")[1]["message"] == "Request not found"
    assert send(servers, "POST", "/api/v3/fetch/1", "not json")[1]["message"] == "Invalid API Request"
    assert [call.answer for call in servers.api.calls] == ["wrong_key", "unknown"]
    assert servers.api.strays == ["POST /api/v3/fetch/1 without a key in a JSON body"]


def test_calls_above_the_limit_are_refused(servers: ApiServers) -> None:
    servers.api.register([ready("1")])
    servers.api.behave(calls_per_second=2)

    statuses = [ask(servers, "1")[0] for _ in range(4)]

    assert statuses == [200, 200, 429, 429]


@pytest.mark.parametrize(
    ("output", "status", "complete"),
    [
        (ApiOutput("html"), 200, True),
        (ApiOutput("missing"), 404, True),
        (ApiOutput("late", seconds=3600), 404, True),
        (ApiOutput("late", seconds=1), 200, True),
        (ApiOutput("redirect", "http://127.0.0.2/"), 302, True),
        (ApiOutput("truncated"), 200, False),
    ],
)
def test_an_output_is_answered_according_to_its_trick(
    servers: ApiServers, output: ApiOutput, status: int, complete: bool
) -> None:
    servers.api.register([ready("9", output)])
    (link,) = links(ask(servers, "9")[1])

    if complete:
        assert get(link)[0] == status
    else:
        with pytest.raises(http.client.IncompleteRead):
            get(link)

    deadline = time.monotonic() + 5
    while not servers.api.gets[0].status and time.monotonic() < deadline:
        time.sleep(0.01)  # the server completes the entry after the last byte
    assert servers.api.gets[0].status == status
    assert servers.api.gets[0].complete is complete


def test_a_script_answers_first_and_can_echo_the_key(servers: ApiServers) -> None:
    servers.api.register([ready("3", script=("error_echo", "processing"))])

    answers = [ask(servers, "3")[1] for _ in range(3)]

    assert KEY in str(answers[0]["message"])
    assert [answer["status"] for answer in answers] == ["error", "processing", "success"]


def place(servers: ApiServers, track_id: str, key: str = KEY) -> tuple[int, dict[str, object]]:
    return send(servers, "POST", ORDER_PATH, json.dumps({"key": key, "track_id": track_id}))


def test_an_order_is_answered_as_expected_and_its_job_can_be_fetched(servers: ApiServers) -> None:
    servers.api.expect(
        [
            ApiOrder("a", "taken_echo", ready("7")),
            ApiOrder("b", f"{FAIL_WITH}no, {KEY}", ready("8")),
        ]
    )

    _, taken = place(servers, "a")
    _, refused = place(servers, "b")

    assert (taken["status"], taken["id"]) == ("processing", 7)
    assert KEY in str(taken["tip"])
    assert (refused["status"], refused["message"]) == ("failed", f"no, {KEY}")
    assert send(servers, "POST", "/api/v6/images/fetch/7", json.dumps({"key": KEY}))[1]["status"] == "success"
    assert ask(servers, "8")[1]["message"] == "Request not found"
    assert [(call.track_id, call.key, call.payload) for call in servers.api.order_calls] == [
        ("a", KEY, {"track_id": "a"}),
        ("b", KEY, {"track_id": "b"}),
    ]


def test_an_order_with_a_wrong_key_or_of_another_program_is_refused(servers: ApiServers) -> None:
    servers.api.expect([ApiOrder("a", "taken_echo", ready("7"))])
    servers.api.behave(echo_rejected=True)

    assert place(servers, "a", "wrong")[1]["message"] == "Invalid Api Key: wrong"
    assert place(servers, "b")[1]["message"] == "Invalid API Request"
    assert [call.answer for call in servers.api.order_calls] == ["wrong_key", "unexpected"]
    assert not servers.api.jobs


def test_an_answer_to_an_order_can_be_cut_after_the_job_began(servers: ApiServers) -> None:
    servers.api.expect([ApiOrder("a", "cut_echo", ready("7"))])

    with pytest.raises(http.client.IncompleteRead) as cut:
        place(servers, "a")

    assert KEY.encode() in cut.value.partial
    assert ask(servers, "7")[1]["status"] == "success"


def test_control_requests_set_jobs_and_return_the_ledger(servers: ApiServers) -> None:
    job = {"remote_id": "44", "started": 0, "seconds": 1, "outputs": [{"trick": "good"}], "script": []}
    send(servers, "POST", "/control/", json.dumps({"jobs": [job], "behaviour": {"accept": ["new"]}}))

    assert ask(servers, "44", KEY)[1]["status"] == "error"
    assert ask(servers, "44", "new")[1]["status"] == "success"
    calls = send(servers, "GET", "/control/ledger")[1]["calls"]
    assert isinstance(calls, list)
    assert [(call["key"], call["answer"]) for call in calls] == [(KEY, "wrong_key"), ("new", "success")]
