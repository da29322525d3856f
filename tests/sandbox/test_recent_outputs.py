"""The stand-in's list of recent outputs."""

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import pytest

from worker.sandbox import Sandbox, SandboxOptions
from worker.sandbox.recent_outputs import PER_PAGE

PATH = "/api/v6/assets_generated"
READY_SECONDS = 5.0


class Clock:
    """A clock that the test sets."""

    now = 1_777_629_600.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sandbox(clock: Clock) -> Iterator[Sandbox]:
    options = SandboxOptions(seed=0, min_seconds=READY_SECONDS, max_seconds=READY_SECONDS, size=32)
    with Sandbox(options, clock=clock) as running:
        yield running


def ask(sandbox: Sandbox, path: str = PATH, **fields: object) -> tuple[int, Any]:
    with closing(http.client.HTTPConnection(urlsplit(sandbox.root_url).netloc, timeout=5)) as client:
        body = {"key": "sandbox-key", "type": "image", **fields}
        client.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = client.getresponse()
        return response.status, json.loads(response.read())


def test_given_jobs_then_the_ready_ones_of_the_type_are_listed_newest_first(sandbox: Sandbox, clock: Clock) -> None:
    first = sandbox.submit("a lake", samples=2)
    film = sandbox.submit("a film", family="v6/video/text2video")
    sandbox.submit("a song", family="v6/voice/text_to_audio")
    second = sandbox.submit("a hill", family="v6/images/text2img", samples=1)
    early = ask(sandbox)[1]["data"]
    clock.now += READY_SECONDS
    sandbox.submit("not ready")

    status, answer = ask(sandbox)

    assert (status, answer["status"], answer["total"], early) == (200, "success", 2, [])
    assert [entry["id"] for entry in answer["data"]] == [second["id"], first["id"]]
    assert answer["data"][1] == {
        **{"id": first["id"], "output": first["future_links"]},
        "created_at": "2026-05-01T10:00:00+00:00",
    }
    assert [entry["id"] for entry in ask(sandbox, type="video")[1]["data"]] == [film["id"]]
    assert ask(sandbox, type="audio")[1]["total"] == 1


def test_given_many_jobs_then_the_list_has_pages(sandbox: Sandbox, clock: Clock) -> None:
    submitted = [sandbox.submit("a lake")["id"] for _ in range(PER_PAGE + 1)]
    clock.now += READY_SECONDS

    pages = [ask(sandbox, page=page)[1] for page in (1, 2, 3)]

    assert [[entry["id"] for entry in page["data"]] for page in pages] == [submitted[:0:-1], submitted[:1], []]
    assert [(page["current_page"], page["last_page"], page["total"]) for page in pages] == [
        (number, 2, PER_PAGE + 1) for number in (1, 2, 3)
    ]


def test_given_a_wrong_request_then_it_is_refused(sandbox: Sandbox) -> None:
    assert ask(sandbox, key="wrong")[1]["message"] == "Invalid Api Key"
    assert "type" in ask(sandbox, type="model")[1]["message"]
    assert "type" in ask(sandbox, type=["image"])[1]["message"]
    for page in (0, "1", True, None):
        assert "page" in ask(sandbox, page=page)[1]["message"]
    assert ask(sandbox, "/api/assets_generated")[0] == 404
