"""Webhooks with real receivers: one event per final state, delivered until accepted, and never to refused addresses."""

import base64
import http.server
import ipaddress
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select, update
from sqlalchemy.exc import OperationalError
from standardwebhooks.webhooks import Webhook

from tests.rows import NOW, add_downloading, add_job, add_output, seconds
from tests.web import Web, drips
from worker.client import actions
from worker.coordination.leases import LeaseKeeper, LeaseLost
from worker.core.webhook import secret_bytes
from worker.errors import JobNotFound
from worker.net.address_guard import Guard, guarded_adapter
from worker.notify import webhooks
from worker.notify.webhook_sender import TIMEOUT_SECONDS, WebhookSender
from worker.notify.webhooks import MAX_DELIVERIES, PER_RECEIVER, Webhooks
from worker.settings import Settings
from worker.storage.select import public_addresses
from worker.store.audit import actions_of, latest_actions
from worker.store.engine import database_now
from worker.store.events import claim_events, create_events, record_delivery, release_events
from worker.store.jobs import retry
from worker.store.schema import events, jobs
from worker.system.redaction import Scrubber

SECRET = f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
LEASE = timedelta(seconds=30)


@dataclass(slots=True)
class Receiver:
    """A web app that receives webhooks. `answer` writes the response; `received` has headers and body of each."""

    url: str = ""
    answer: Callable[[http.server.BaseHTTPRequestHandler], None] = lambda handler: _respond(handler, 204)
    received: list[tuple[dict[str, str], str]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The received event ids, in order."""
        return [headers["webhook-id"] for headers, _ in self.received]


def _respond(handler: http.server.BaseHTTPRequestHandler, status: int, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("content-length", "0")
    handler.end_headers()


@contextmanager
def run_receiver(host: str = "127.0.0.1") -> Iterator[Receiver]:
    """Run a receiver on its own port."""
    receiver = Receiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["content-length"])).decode()
            receiver.received.append(({name.lower(): value for name, value in self.headers.items()}, text))
            receiver.answer(self)

        def do_GET(self) -> None:
            receiver.received.append(({"webhook-id": "GET"}, ""))
            _respond(self, 200)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((host, 0), Handler) as server:
        receiver.url = f"http://{host}:{server.server_port}/hooks"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield receiver
        server.shutdown()
        thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """The receiver of the app."""
    with run_receiver() as receiver_:
        yield receiver_


@pytest.fixture
def sender(engine: Engine) -> Webhooks:
    """The sender of one worker process, with the loopback network allowed."""
    return _sender(engine)


def _sender(
    engine: Engine,
    *secret_texts: str,
    network: str = "127.0.0.1/32",
    leases: LeaseKeeper | None = None,
    timeout: float = TIMEOUT_SECONDS,
    address_of: Callable[[str], str | None] | None = None,
) -> Webhooks:
    guard = Guard([ipaddress.ip_network(network)] if network else [])
    return Webhooks(
        engine=engine,
        leases=leases or LeaseKeeper(engine, lease=LEASE),
        sender=WebhookSender(
            guard=guard,
            adapter=guarded_adapter(guard, connections=MAX_DELIVERIES),
            secrets=[secret_bytes(text) for text in secret_texts or (SECRET,)],
            timeout=timeout,
            address_of=address_of,
        ),
        scrubber=Scrubber(["sk-canary", SECRET]),
    )


def _final(engine: Engine, url: str, remote_id: str = "1", **changes: Any) -> int:
    ended = {"status": "completed", "due_at": None, "ready_at": NOW, "completed_at": NOW, "webhook_url": url}
    with engine.begin() as connection:
        return add_job(connection, remote_id, **(ended | changes))


def _deliver(sender: Webhooks) -> int:
    begun = sender.run()
    assert sender.wait(20)
    return begun


def _due_now(engine: Engine) -> None:
    """Make the next attempt due now."""
    with engine.begin() as connection:
        connection.execute(
            update(events).where(events.c.status == "pending").values(due_at=database_now(connection) - LEASE)
        )


def _due_now_of(engine: Engine, event_id: int) -> None:
    with engine.begin() as connection:
        connection.execute(
            update(events).where(events.c.id == event_id).values(due_at=database_now(connection) - LEASE)
        )


def _events(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(select(events).order_by(events.c.id)))


def test_a_final_job_is_delivered_once_with_all_that_an_app_needs(
    engine: Engine, sender: Webhooks, receiver: Receiver
) -> None:
    """The reference library accepts it, and nothing is sent again."""
    with engine.begin() as connection:
        job_id = add_downloading(connection, "11", reference="order 7", webhook_url=receiver.url)
        stored = {"status": "stored", "due_at": None, "stored_at": NOW, "sha256": "a" * 64, "size_bytes": 3}
        place = {"location": "file:///out/1/0.png", "media_type": "image/png"}
        output_id = add_output(connection, job_id, 0, **stored, **place)
    assert _deliver(sender) == 0
    with engine.begin() as connection:
        connection.execute(update(jobs).values(status="completed", completed_at=NOW))

    assert _deliver(sender) == 1
    assert _deliver(sender) == 0

    ((headers, text),) = receiver.received
    assert headers["content-type"] == "application/json"
    assert Webhook(SECRET).verify(text, headers) == {
        "type": "job.completed",
        "timestamp": NOW.isoformat().replace("+00:00", "Z"),
        "data": {
            "id": job_id,
            "remote_id": "11",
            "account": "default",
            "reference": "order 7",
            "status": "completed",
            "error_code": None,
            "outputs": [
                {
                    "id": output_id,
                    "position": 0,
                    "location": "file:///out/1/0.png",
                    "sha256": "a" * 64,
                    "media_type": "image/png",
                    "size_bytes": 3,
                }
            ],
        },
    }
    (event,) = _events(engine)
    assert (event.status, event.attempts, event.http_status, event.error_message) == ("delivered", 1, 204, None)


def test_given_a_public_address_then_stored_files_below_it_have_one(
    engine: Engine, receiver: Receiver, tmp_path: Path
) -> None:
    """Not outputs in S3, whose URLs expire, nor files elsewhere, nor outputs that are not stored."""
    settings = Settings(storage_url=f"file:{tmp_path}", storage_address="https://shop.example/pictures")
    locations = [f"file://{tmp_path}/1/a%20b.png", "s3://bucket/1/0.png", "file:///elsewhere/0.png", None]
    with engine.begin() as connection:
        ended = {"status": "completed", "due_at": None, "ready_at": NOW, "completed_at": NOW}
        job_id = add_job(connection, "1", **ended, webhook_url=receiver.url)
        stored = {"status": "stored", "due_at": None, "stored_at": NOW, "sha256": "a" * 64, "size_bytes": 3}
        for position, location in enumerate(locations[:3]):
            add_output(connection, job_id, position, **stored, location=location, media_type="image/png")
        add_output(connection, job_id, 3, status="failed", due_at=None, error_code="gone")

    assert _deliver(_sender(engine, address_of=public_addresses(settings))) == 1

    ((headers, text),) = receiver.received
    outputs = Webhook(SECRET).verify(text, headers)["data"]["outputs"]
    assert [output["location"] for output in outputs] == locations
    assert [output.get("address") for output in outputs] == [
        "https://shop.example/pictures/1/a%20b.png", None, None, None,
    ]  # fmt: skip
    assert public_addresses(Settings(storage_url=f"file:{tmp_path}")) is None


@pytest.mark.parametrize("status", ["failed", "expired", "cancelled"])
def test_every_final_state_is_delivered(engine: Engine, sender: Webhooks, receiver: Receiver, status: str) -> None:
    """With its error code."""
    _final(engine, receiver.url, status=status, error_code="api_failed", ready_at=None)
    _deliver(sender)
    ((_, text),) = receiver.received
    event = json.loads(text)
    assert (event["type"], event["data"]["status"], event["data"]["error_code"]) == (
        f"job.{status}",
        status,
        "api_failed",
    )


def test_a_receiver_that_was_down_gets_the_event_later_with_the_same_id(
    engine: Engine, sender: Webhooks, receiver: Receiver
) -> None:
    """With the same body, after growing delays."""
    _final(engine, receiver.url)
    receiver.answer = lambda handler: _respond(handler, 503)
    waits = []
    for _ in range(4):
        _deliver(sender)
        (event,) = _events(engine)
        assert (event.status, event.http_status, event.error_message) == ("pending", 503, "HTTP 503")
        with engine.connect() as connection:
            waits.append((event.due_at - database_now(connection)).total_seconds())
        _due_now(engine)
    receiver.answer = lambda handler: _respond(handler, 200)
    _deliver(sender)

    assert [5 * 2**step <= wait + 4 and wait <= 6 * 2**step for step, wait in enumerate(waits)] == [True] * 4
    assert len(set(receiver.names)) == 1
    assert len({text for _, text in receiver.received}) == 1
    assert [(event.status, event.attempts) for event in _events(engine)] == [("delivered", 5)]


def test_an_unreachable_receiver_is_tried_again(engine: Engine, sender: Webhooks) -> None:
    """Nothing listens at its address any more."""
    with run_receiver() as closed:
        url = closed.url
    _final(engine, url)
    _deliver(sender)
    (event,) = _events(engine)
    assert (event.status, event.http_status) == ("pending", None)
    assert "can't be reached" in event.error_message


def test_a_request_to_a_very_slow_receiver_ends_in_time(engine: Engine, web: Web) -> None:
    """It sends an endless header, byte by byte."""
    sender = _sender(engine, timeout=0.5)
    _final(engine, web.serves("/hooks", drips(b"HTTP/1.1 200 OK\r\n", b"x", every=0.05, seconds=10)))
    began = time.monotonic()
    _deliver(sender)
    assert time.monotonic() - began < 8
    (event,) = _events(engine)
    assert event.status == "pending"
    assert "no answer within" in event.error_message


def test_a_hanging_receiver_delays_no_other(engine: Engine, sender: Webhooks, receiver: Receiver) -> None:
    """However many events it has, and however its address is spelled."""
    let_go = threading.Event()

    def hang(handler: http.server.BaseHTTPRequestHandler) -> None:
        let_go.wait(20)
        _respond(handler, 200)

    with run_receiver() as hanging:
        hanging.answer = hang
        for number in range(MAX_DELIVERIES * 2):
            _final(engine, hanging.url.replace("127.0.0.1", ("127.0.0.1", "127.1")[number % 2]), f"slow{number}")
        _final(engine, receiver.url, "quick", completed_at=NOW + seconds(1))
        until = time.monotonic() + 10
        while not receiver.received and time.monotonic() < until:
            sender.run()
        occupied = len(hanging.received)
        let_go.set()
        assert sender.wait(20)
    assert receiver.received, "it waited behind the hanging receiver"
    assert occupied <= PER_RECEIVER


def test_many_hanging_receivers_leave_places_to_others(engine: Engine, sender: Webhooks, receiver: Receiver) -> None:
    """Each hanging receiver takes at most half of the free places. Its other events are skipped."""
    let_go = threading.Event()

    def hang(handler: http.server.BaseHTTPRequestHandler) -> None:
        let_go.wait(20)
        _respond(handler, 200)

    with run_receiver() as first, run_receiver() as second, run_receiver() as third, run_receiver() as fourth:
        for name, hanging in enumerate((first, second, third, fourth)):
            hanging.answer = hang
            for number in range(MAX_DELIVERIES):
                _final(engine, hanging.url, f"{name}-{number}")
        _final(engine, receiver.url, "quick", completed_at=NOW + seconds(1))
        until = time.monotonic() + 10
        while not receiver.received and time.monotonic() < until:
            sender.run()
        before = [(event.due_at, event.attempts) for event in _events(engine) if event.url != receiver.url]
        assert sender.run() == 0
        after = [(event.due_at, event.attempts) for event in _events(engine) if event.url != receiver.url]
        let_go.set()
        assert sender.wait(20)
    assert receiver.received, "it waited behind hanging receivers"
    assert before == after, "events of hanging receivers are written repeatedly"


def test_an_attempt_that_was_not_recorded_is_repeated_by_a_process_that_is_never_idle(
    engine: Engine, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its lease would be renewed as long as there is other work."""
    leases = LeaseKeeper(engine, lease=timedelta(seconds=1))
    sender = _sender(engine, leases=leases)
    _final(engine, receiver.url)

    def away(*_: Any, **__: Any) -> bool:
        raise OperationalError("", {}, Exception("away"))

    with monkeypatch.context() as broken, leases:
        broken.setattr(webhooks, "record_delivery", away)
        _deliver(sender)
    with leases:
        until = time.monotonic() + 10
        while len(receiver.received) < 2 and time.monotonic() < until:
            _deliver(sender)
            time.sleep(0.1)
    assert len(receiver.received) == 2
    assert len(set(receiver.names)) == 1
    assert [event.status for event in _events(engine)] == ["delivered"]


def test_a_claim_without_an_attempt_is_released_and_one_in_progress_is_not(
    engine: Engine, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database was lost between the claim and the first attempt."""
    let_go = threading.Event()

    def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
        let_go.wait(20)
        _respond(handler, 200)

    receiver.answer = slow
    sender = _sender(engine, leases=LeaseKeeper(engine, lease=timedelta(seconds=60)))
    _final(engine, receiver.url, "slow")
    assert sender.run() == 1
    _final(engine, receiver.url, "lost")

    def no_thread(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as broken:
        broken.setattr(sender, "_start", no_thread)
        with pytest.raises(RuntimeError):
            sender.run()
    assert sender.run() == 0
    slow_one, lost = _events(engine)
    assert (slow_one.claim_token is not None, lost.claim_token) == (True, None)
    _due_now_of(engine, lost.id)
    assert sender.run() == 1
    let_go.set()
    assert sender.wait(20)
    assert [event.status for event in _events(engine)] == ["delivered", "delivered"]


def test_a_malformed_address_stops_no_other_event(engine: Engine, sender: Webhooks, receiver: Receiver) -> None:
    """A key in the host name was masked before it was written."""
    _final(engine, "https://[key].example/hooks")
    _final(engine, receiver.url, "2")
    assert _deliver(sender) == 2
    assert len(receiver.received) == 1
    stands = {event.url: (event.status, event.claim_token) for event in _events(engine)}
    assert stands == {"https://[key].example/hooks": ("pending", None), receiver.url: ("delivered", None)}


def test_a_redirect_is_never_followed(engine: Engine, sender: Webhooks, receiver: Receiver) -> None:
    """It does not count as accepted, not even with a status that keeps method and body."""
    with run_receiver("127.0.0.2") as inside:
        receiver.answer = lambda handler: _respond(
            handler, 301 if len(receiver.received) == 1 else 307, location=inside.url
        )
        for remote_id in ("1", "2"):
            _final(engine, receiver.url, remote_id)
            _deliver(sender)
        assert inside.received == []
    assert [(event.status, event.http_status) for event in _events(engine)] == [("pending", 301), ("pending", 307)]


def test_an_internal_address_is_reached_only_if_allowed(engine: Engine, receiver: Receiver) -> None:
    """The event's error names the setting."""
    _final(engine, receiver.url)
    _deliver(_sender(engine, network=""))
    _due_now(engine)
    _deliver(_sender(engine, network="10.0.0.0/8"))
    assert receiver.received == []
    (event,) = _events(engine)
    assert event.status == "pending"
    assert "WEBHOOK_ALLOWED_NETWORKS" in event.error_message
    _due_now(engine)
    _deliver(_sender(engine))
    assert len(receiver.received) == 1


def test_an_event_fails_after_a_day_or_at_status_410(engine: Engine, sender: Webhooks, receiver: Receiver) -> None:
    """Status 410 means that it wants no more events."""
    receiver.answer = lambda handler: _respond(handler, 500)
    _final(engine, receiver.url)
    _deliver(sender)
    with engine.begin() as connection:
        connection.execute(update(events).values(created_at=database_now(connection) - timedelta(hours=25)))
    _due_now(engine)
    _deliver(sender)
    receiver.answer = lambda handler: _respond(handler, 410)
    _final(engine, receiver.url, "2")
    _deliver(sender)
    assert [(event.status, event.attempts) for event in _events(engine)] == [("failed", 2), ("failed", 1)]
    assert _deliver(sender) == 0


def test_a_receiver_can_ask_for_more_time(engine: Engine, sender: Webhooks, receiver: Receiver) -> None:
    """By Retry-After, up to an hour."""
    receiver.answer = lambda handler: _respond(handler, 429, retry_after="600")
    _final(engine, receiver.url)
    _deliver(sender)
    (event,) = _events(engine)
    with engine.connect() as connection:
        assert timedelta(seconds=580) < event.due_at - database_now(connection) <= timedelta(seconds=600)


def test_a_retried_job_has_another_event_id(engine: Engine, sender: Webhooks, receiver: Receiver) -> None:
    """Each final state has its own event."""
    job_id = _final(engine, receiver.url, status="failed", error_code="api_failed", ready_at=None)
    _deliver(sender)
    with engine.begin() as connection:
        assert retry(connection, job_id, now=NOW + seconds(10))
    assert _deliver(sender) == 0
    with engine.begin() as connection:
        ended = {"status": "failed", "error_code": "api_failed", "due_at": None, "completed_at": NOW + seconds(20)}
        connection.execute(update(jobs).values(ended))
    _deliver(sender)
    assert len(set(receiver.names)) == 2


def test_a_final_state_that_a_retry_leaves_early_is_delivered_all_the_same(
    engine: Engine, sender: Webhooks, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry creates the event of the old final state first."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    job_id = _final(engine, receiver.url, status="failed", error_code="api_failed", ready_at=None)
    assert actions.retry(job_id)
    with engine.begin() as connection:
        ended = {"status": "expired", "error_code": "expired", "due_at": None, "completed_at": NOW + seconds(20)}
        connection.execute(update(jobs).values(ended))
    _deliver(sender)
    assert sorted(json.loads(text)["type"] for _, text in receiver.received) == ["job.expired", "job.failed"]


def test_signatures_use_the_databases_clock(
    engine: Engine, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Receivers refuse signatures that are older than five minutes."""
    _final(engine, receiver.url)
    sender = _sender(engine)
    began = time.time()
    monkeypatch.setattr(time, "time", lambda: began - 3_600)
    _deliver(sender)
    monkeypatch.undo()
    ((headers, text),) = receiver.received
    assert Webhook(SECRET).verify(text, headers)["type"] == "job.completed"


def test_many_processes_create_and_deliver_each_event_once(engine: Engine, receiver: Receiver) -> None:
    """By the process that is first."""
    for number in range(60):
        _final(engine, receiver.url, str(number))
    senders = [_sender(engine) for _ in range(4)]

    def work(sender: Webhooks) -> None:
        until = time.monotonic() + 20
        while len(receiver.received) < 60 and time.monotonic() < until:
            sender.run()
            time.sleep(0.01)
        sender.wait(10)

    threads = [threading.Thread(target=work, args=(sender,)) for sender in senders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(receiver.received) == 60
    assert len(set(receiver.names)) == 60
    assert {event.status for event in _events(engine)} == {"delivered"}


def test_a_process_that_lost_its_claim_can_not_record_and_dead_processes_hold_nothing(engine: Engine) -> None:
    """The lease had ended, or another process claimed the event."""
    _final(engine, "https://app.example/hooks")
    with engine.begin() as connection:
        create_events(connection, now=NOW, limit=10)
        (late,) = claim_events(connection, token="one", holder="h.1.1", lease=LEASE, now=NOW, limit=10)
        assert claim_events(connection, token="two", holder="h.2.2", lease=LEASE, now=NOW, limit=10) == []
        assert release_events(connection, ["h.1.1"], due_at=NOW) == 1
        (again,) = claim_events(connection, token="two", holder="h.2.2", lease=LEASE, now=NOW, limit=10)

        def record(event: Any) -> bool:
            ended: dict[str, Any] = {"ended": "delivered", "due_at": None, "http_status": 200, "message": None}
            return record_delivery(connection, event, now=NOW, **ended)

        assert not record(late)
        assert record(again)
    assert [event.attempts for event in _events(engine)] == [2]


def test_no_secret_is_shown(
    engine: Engine, sender: Webhooks, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in a row, nor in a log, nor in a request."""
    receiver.answer = lambda handler: _respond(handler, 500)
    _final(engine, receiver.url)
    with caplog.at_level("DEBUG"):
        _deliver(sender)
    whole = caplog.text + str(_events(engine)) + str(receiver.received)
    assert "webhook not delivered" in whole
    assert SECRET not in whole
    assert SECRET.removeprefix("whsec_") not in whole


def test_finding_due_events_reads_no_job_without_a_webhook(
    migrated_mariadb: Engine,
) -> None:
    """Each process runs the query twice a second, also on MariaDB, which has no partial indexes."""
    engine = migrated_mariadb
    for number in range(300):
        _final(engine, "https://app.example/hooks", str(number), **({} if number == 7 else {"webhook_url": None}))
    with engine.connect() as connection:
        connection.exec_driver_sql("ANALYZE TABLE fetch_jobs")
        connection.exec_driver_sql("FLUSH STATUS")
        assert create_events(connection, now=NOW, limit=10) == 1
        read = connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Handler_read%%'").all()
        connection.rollback()
    with engine.begin() as connection:
        connection.execute(jobs.delete())
    assert sum(int(times) for _, times in read) < 150


def test_without_a_secret_no_event_is_sent_or_lost(engine: Engine, receiver: Receiver) -> None:
    """It was removed from the settings. The events are created once it is back."""
    _final(engine, receiver.url)
    silent = _sender(engine)
    silent._sender.secrets = ()
    assert _deliver(silent) == 0
    assert _events(engine) == []
    assert _deliver(_sender(engine)) == 1
    assert len(receiver.received) == 1


def test_given_a_lease_that_may_have_ended_when_a_webhook_would_be_sent_then_it_is_released(
    engine: Engine, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process was stopped for longer than its lease. Another one may have sent the event."""
    leases = LeaseKeeper(engine, lease=LEASE)
    sender = _sender(engine, leases=leases)
    _final(engine, receiver.url)

    def refuse(*_: object) -> None:
        raise LeaseLost

    with monkeypatch.context() as asleep:
        asleep.setattr(leases, "check", refuse)
        assert _deliver(sender) == 1
    assert receiver.received == []
    [event] = _events(engine)
    assert (event.status, event.attempts, event.claim_token) == ("pending", 0, None)
    assert _deliver(sender) == 1
    assert len(receiver.received) == 1


# ── sent again by an operator ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def client(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python API on the test database."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))


@pytest.mark.usefixtures("client")
def test_given_delivered_events_when_they_are_sent_again_then_each_has_its_id_and_body(
    engine: Engine, sender: Webhooks, receiver: Receiver
) -> None:
    """A job that was retried has two events. Both are recorded as one action."""
    job_id = _final(engine, receiver.url, status="failed", error_code="api_failed", ready_at=None)
    _deliver(sender)
    with engine.begin() as connection:
        assert retry(connection, job_id, now=NOW + seconds(10))
        ended = {"status": "expired", "error_code": "expired", "due_at": None, "completed_at": NOW + seconds(20)}
        connection.execute(update(jobs).values(ended))
    _deliver(sender)

    assert actions.notify(job_id)
    assert not actions.notify(job_id)  # both are due already
    assert _deliver(sender) == 2

    first, second = receiver.received[:2], receiver.received[2:]
    assert sorted((headers["webhook-id"], body) for headers, body in second) == sorted(
        (headers["webhook-id"], body) for headers, body in first
    )
    assert [(event.status, event.attempts) for event in _events(engine)] == [("delivered", 1)] * 2
    with engine.connect() as connection:
        assert [(row.action, row.filter, row.jobs) for row in actions_of(connection, job_id)] == [
            ("notify", str(job_id), 1)
        ]


@pytest.mark.usefixtures("client")
def test_given_an_event_that_was_given_up_when_it_is_sent_again_then_it_is_tried_for_another_day(
    engine: Engine, sender: Webhooks, receiver: Receiver
) -> None:
    receiver.answer = lambda handler: _respond(handler, 500)
    job_id = _final(engine, receiver.url)
    _deliver(sender)
    with engine.begin() as connection:
        connection.execute(update(events).values(created_at=database_now(connection) - timedelta(hours=25)))
    _due_now(engine)
    _deliver(sender)
    [given_up] = _events(engine)

    assert actions.notify(job_id)
    [due] = _events(engine)
    _deliver(sender)
    [waiting] = _events(engine)
    assert actions.notify(job_id)  # at once, instead of in five seconds
    receiver.answer = lambda handler: _respond(handler, 204)
    _deliver(sender)
    [delivered] = _events(engine)

    assert (given_up.status, waiting.status, delivered.status) == ("failed", "pending", "delivered")
    assert (due.attempts, due.http_status, due.error_message, due.ended_at) == (0, None, None, None)
    assert (waiting.attempts, waiting.http_status) == (1, 500)
    assert {event.event_id for event in (given_up, due, waiting, delivered)} == {given_up.event_id}


@pytest.mark.parametrize("announced_at", [None, NOW])
@pytest.mark.usefixtures("client")
def test_given_a_final_job_without_an_event_when_it_is_notified_about_then_the_event_is_created(
    announced_at: Any, engine: Engine, sender: Webhooks, receiver: Receiver
) -> None:
    job_id = _final(engine, receiver.url, announced_at=announced_at)

    assert actions.notify(job_id)
    _deliver(sender)

    [(_, body)] = receiver.received
    assert json.loads(body)["data"]["id"] == job_id


@pytest.mark.usefixtures("client")
def test_a_job_without_an_event_to_send_does_not_change(engine: Engine, receiver: Receiver) -> None:
    """A job that is not final, one without an address, and one whose event is being sent."""
    with engine.begin() as connection:
        waiting = add_job(connection, "1", webhook_url=receiver.url, due_at=database_now(connection) + LEASE)
    silent = _final(engine, receiver.url, "2", webhook_url=None)
    sent = _final(engine, receiver.url, "3")
    with engine.begin() as connection:
        now = database_now(connection)
        create_events(connection, now=now)
        [claimed] = claim_events(connection, token="t", holder="h", lease=LEASE, now=now, limit=1)

    assert [actions.notify(job_id) for job_id in (waiting, silent, sent)] == [False] * 3
    with engine.connect() as connection:
        [event] = connection.execute(select(events)).all()
        assert (event.claim_token, event.id) == ("t", claimed.id)
        assert latest_actions(connection) == []
    with pytest.raises(JobNotFound):
        actions.notify(999_999)
