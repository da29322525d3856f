"""`show` explains an order: why it is not sent, or what is known about it and what to do if its answer is lost."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

from tests import planted
from tests.planted_orders import ENDPOINT, LOST, PAYLOAD, add_at_api, add_order, add_uncertain, set_slots
from tests.rows import add_process, seconds
from worker.cli import main

KEY = "canary-key"


@pytest.fixture
def database(sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> Engine:
    """SQLite only: the queries are tested with the troubles on each database."""
    monkeypatch.setenv("DATABASE_URL", sqlite_engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("SD_API_KEY", KEY)
    return sqlite_engine


@pytest.fixture
def show(database: Engine, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that shows a job, as JSON or, with `text`, for people."""

    def show_job(job_id: int, *, text: bool = False) -> Any:
        with pytest.raises(SystemExit):
            main(["show", str(job_id), *([] if text else ["--json"])])
        printed = capsys.readouterr().out
        return printed if text else json.loads(printed)

    return show_job


def first(connection: Connection) -> int:
    add_process(connection)
    return add_order(connection, ago=2)


def behind(connection: Connection) -> int:
    for number in range(3):
        add_order(connection, f"before {number}")
    return add_order(connection, ago=2)


def without_slot(connection: Connection) -> int:
    set_slots(connection, 2)
    for number in range(2):
        add_at_api(connection, f"at the API {number}")
    add_order(connection, "before")
    return add_order(connection)


def postponed(connection: Connection) -> int:
    return add_order(connection, due_at=planted.now() + seconds(90), last_error="Failed, Try Again", attempts=2)


def of_refused_account(connection: Connection) -> int:
    planted.add_open_breaker(connection, "account", "default", "key rejected: Invalid API key")
    return add_order(connection)


def of_held_host(connection: Connection) -> int:
    planted.add_breaker(connection, "host", "api.test", paused_at=planted.now() - seconds(60))
    return add_order(connection)


def without_key(connection: Connection) -> int:
    add_process(connection)
    return add_order(connection, account="shop")


def being_sent(connection: Connection) -> int:
    at = planted.now()
    claim: dict[str, Any] = {
        "claim_token": "t",
        "claim_holder": planted.ELSEWHERE,
        "due_at": at + seconds(20),
        "takes_slot": True,
    }
    return add_order(connection, attempt_token="t", attempted_at=at, **claim)


CASES: list[tuple[Callable[[Connection], int], str, str, str]] = [
    (first, "due for ", "queue", "nothing: it is sent soon"),
    (behind, "waiting to be sent: 3 orders of its account before it, 0 of 5 slots taken", "queue", "nothing: "),
    (without_slot, "waiting for a slot at the API: 2 of 2 slots taken, 1 order of its account before it", "slots",
        "nothing: it is sent when a job of its account is ready"),
    (postponed, "postponed: it is sent again in ", "queue", "nothing: it is sent again in "),
    (of_refused_account, "held: key rejected: Invalid API key", "account",
        "put the right key of default into SD_API_KEY"),
    (of_held_host, "held: api.test held by an operator", "host", "fetch-worker resume --host api.test"),
    (without_key, "held: no key for account shop", "account", "put the key of shop into "),
    (being_sent, f"it is being sent by {planted.ELSEWHERE}", "claim", "nothing: it is being sent"),
]  # fmt: skip


@pytest.mark.parametrize(("plant", "why", "step", "advice"), CASES, ids=[case[0].__name__ for case in CASES])
def test_show_says_why_an_order_is_not_sent(
    database: Engine, show: Callable[..., Any], plant: Callable[[Connection], int], why: str, step: str, advice: str
) -> None:
    with database.begin() as connection:
        job_id = plant(connection)

    shown = show(job_id)

    assert shown["why"].startswith(why), shown["why"]
    assert shown["advice"].startswith(advice), shown["advice"]
    assert step in [finding["step"] for finding in shown["chain"]]
    assert (shown["status"], shown["remote_id"], shown["next_poll_at"]) == ("ordered", None, None)


def test_show_has_the_order_and_the_last_answer(database: Engine, show: Callable[..., Any]) -> None:
    with database.begin() as connection:
        job_id = postponed(connection)

    shown = show(job_id)

    order = shown["order"]
    assert order["endpoint"] == ENDPOINT
    assert order["payload"] == json.loads(PAYLOAD)
    assert (order["payload_bytes"], len(order["payload_sha256"])) == (len(PAYLOAD), 64)
    assert (order["attempts"], order["last_error"]) == (2, "Failed, Try Again")
    assert (order["slots"], order["place"]) == ({"taken": 0, "total": 5}, 1)
    assert shown["why"].endswith("last answer: Failed, Try Again")


def test_show_says_what_is_known_about_an_uncertain_order_and_what_to_do(
    database: Engine, show: Callable[..., Any]
) -> None:
    with database.begin() as connection:
        job_id = add_uncertain(connection)

    shown = show(job_id)

    assert shown["why"].startswith("it was sent at ")
    assert LOST in shown["why"]
    for command in (f"attach {job_id} REMOTE_ID", f"retry {job_id}", f"cancel {job_id}"):
        assert f"fetch-worker {command}" in shown["advice"]
    assert "may be paid twice" in shown["advice"]
    assert (shown["order"]["place"], shown["order"]["attempted_at"] is not None) == (None, True)


def test_people_see_the_beginning_of_a_payload_and_no_key(database: Engine, show: Callable[..., Any]) -> None:
    with database.begin() as connection:
        payload = json.dumps({"prompt": f"{KEY} " + "x" * 5_000})
        job_id = add_order(connection, payload=payload)

    text = "".join(show(job_id, text=True).split())

    assert KEY not in text
    assert KEY not in json.dumps(show(job_id))
    assert text.count("x") < 2_200
    assert "charactersmore" in text


def test_a_tracked_job_has_no_order(database: Engine, show: Callable[..., Any]) -> None:
    with database.begin() as connection:
        job_id = planted.add_waiting_job(connection, "1", due=4)

    shown = show(job_id)

    assert (shown["order"], shown["remote_id"]) == (None, "1")
    assert shown["next_poll_at"] is not None
