"""Messages that are rejected before Celery reads them, and messages that are not."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from kombu.transport.virtual.base import Channel, Message

from tests.faults.malformed import ELEMENTS, MALFORMED, MISSING, RawMessage, redis_element
from worker import tasks
from worker.process.message_guard import MalformedMessage, check_eta, control_problem, read_task
from worker.process.transport_guard import envelope_problem

pytestmark = pytest.mark.every_python

TASKS = tasks.download.app.tasks


def received(raw: RawMessage) -> Any:
    """Return the message as a worker on Redis receives it."""
    element = redis_element(raw, "fetch-worker")
    channel = Channel.__new__(Channel)
    message = Message(element, channel=channel)
    message.accept = {"application/json"}
    return message


@pytest.mark.parametrize("raw", [pytest.param(raw, id=name) for name, raw in MALFORMED.items()])
def test_a_message_that_is_no_task_is_rejected(raw: RawMessage) -> None:
    message = received(raw)
    if message.errors:  # kombu's own check, whose result Celery's consumer gets
        return
    with pytest.raises(MalformedMessage) as refused:
        check_eta(message, read_task(message, TASKS))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 200


VALID = {
    "as Celery sends it": RawMessage(),
    "no embed": RawMessage(b'[["1"], {}, null]'),
    "an empty embed": RawMessage(b'[["1"], {}, {}]'),
    "an embed of a later Celery": RawMessage(b'[["1"], {}, {"future": 5}]'),
    "a callback": RawMessage(
        json.dumps(
            [["1"], {}, {"callbacks": [{"task": "shop.tracked", "args": [], "kwargs": {}, "options": {}}]}]
        ).encode()
    ),
    "a chain": RawMessage(
        json.dumps([["1"], {}, {"chain": [{"task": "a", "args": [], "subtask_type": "group"}]}]).encode()
    ),
    "no optional header": RawMessage(
        headers=dict.fromkeys(
            (*("lang", "root_id", "parent_id", "group", "argsrepr", "retries", "timelimit", "expires", "eta"),),
            MISSING,
        )
    ),
    "a custom header": RawMessage(headers={"sentry-trace": "00-1", "traceparent": "a"}),
    "expires": RawMessage(headers={"expires": "2099-01-01T00:00:00+00:00"}),
    "an id of the client's own": RawMessage(headers={"id": "order 17 / picture 3"}),
    "a shadow": RawMessage(headers={"shadow": "track order 17"}),
    "protocol 1": RawMessage(
        json.dumps({"task": "worker.track", "id": "a", "args": ["1"], "kwargs": {}}).encode(), {"task": MISSING}
    ),
    "both protocols at once": RawMessage(json.dumps({"task": "worker.track", "id": "a", "args": ["1"]}).encode()),
}


@pytest.mark.parametrize("raw", [pytest.param(raw, id=name) for name, raw in VALID.items()])
def test_a_message_that_celery_can_run_is_accepted(raw: RawMessage) -> None:
    assert read_task(received(raw), TASKS).name == "worker.track"


@pytest.mark.parametrize("element", [pytest.param(element, id=name) for name, element in ELEMENTS.items()])
def test_an_element_that_kombu_can_not_read_is_rejected_or_fails_as_json(element: bytes) -> None:
    try:
        raw = json.loads(element)
    except (ValueError, RecursionError):
        return
    problem = envelope_problem(raw, Channel.codecs)
    assert problem is None or "\n" not in problem


COMMAND: dict[str, Any] = {"method": "ping", "arguments": {}, "destination": None, "pattern": None, "matcher": None}


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        *((body, {}) for body in (None, 5, "x", [], [1], {}, COMMAND | {"method": 5}, COMMAND | {"method": "zzz"})),
        *((COMMAND | {"arguments": 5}, {}), (COMMAND | {"destination": 5}, {}), (COMMAND | {"pattern": 5}, {})),
        *(
            (COMMAND | {"reply_to": 5}, {}),
            (COMMAND | {"reply_to": {"exchange": []}}, {}),
            (COMMAND | {"ticket": 5}, {}),
        ),
        *((COMMAND, {"clock": "x"}), (COMMAND, {"clock": float("nan")}), (COMMAND, {"clock": 1 << 80})),
    ],
)
def test_a_malformed_command_is_rejected(body: object, headers: object) -> None:
    assert control_problem(body, headers, {"ping": print}) is not None


def test_a_command_of_celery_is_accepted() -> None:
    reply_to = {"exchange": "reply.celery.pidbox", "routing_key": "a"}
    call = COMMAND | {"reply_to": reply_to, "ticket": "a", "destination": ["worker@a"]}
    assert control_problem(call, {"clock": 5, "expires": 0}, {"ping": print}) is None


def test_a_track_message_with_an_eta_in_an_hour_runs_at_once() -> None:
    """Celery would keep the message in memory, and Redis would redeliver it every minute."""
    eta = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    message = received(RawMessage(headers={"eta": eta}))
    check_eta(message, read_task(message, TASKS))
    assert message.headers["eta"] is None


def test_a_cancel_message_with_an_eta_in_an_hour_is_rejected() -> None:
    eta = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    message = received(RawMessage(b"[[1], {}, {}]", {"task": "worker.cancel", "eta": eta}))
    with pytest.raises(MalformedMessage, match=r"its eta is 3\d\d\d s away, and 30 s is the most that is waited"):
        check_eta(message, read_task(message, TASKS))
