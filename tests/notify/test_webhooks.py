"""Webhooks against real receivers: told once for each final state, until they take it, and never where they may not."""

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
from typing import Any

import pytest
from sqlalchemy import Engine, select, update
from sqlalchemy.exc import OperationalError
from standardwebhooks.webhooks import Webhook

from tests.rows import NOW, add_downloading, add_job, add_output, seconds
from tests.web import Web, drips
from worker.client import tracking
from worker.coordination.leases import LeaseKeeper, LeaseLost
from worker.core.webhook import secret_bytes
from worker.net.address_guard import Guard, guarded_adapter
from worker.notify import webhooks
from worker.notify.webhooks import MAX_DELIVERIES, PER_RECEIVER, Webhooks
from worker.store.engine import database_now
from worker.store.events import claim_events, create_events, record_delivery, release_events
from worker.store.jobs import retry
from worker.store.schema import events, jobs
from worker.system.redaction import Scrubber

SECRET = f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
LEASE = timedelta(seconds=30)


@dataclass(slots=True)
class Receiver:
    """A web app that is told. `answer` decides how; `came` has (headers, body) of each request."""

    url: str = ""
    answer: Callable[[http.server.BaseHTTPRequestHandler], None] = lambda handler: _say(handler, 204)
    came: list[tuple[dict[str, str], str]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The event ids that came, in order."""
        return [headers["webhook-id"] for headers, _ in self.came]


def _say(handler: http.server.BaseHTTPRequestHandler, status: int, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("content-length", "0")
    handler.end_headers()


@contextmanager
def receiving(host: str = "127.0.0.1") -> Iterator[Receiver]:
    """One on a port of its own, gone afterwards."""
    made = Receiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["content-length"])).decode()
            made.came.append(({name.lower(): value for name, value in self.headers.items()}, text))
            made.answer(self)

        def do_GET(self) -> None:
            made.came.append(({"webhook-id": "GET"}, ""))
            _say(self, 200)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((host, 0), Handler) as server:
        made.url = f"http://{host}:{server.server_port}/hooks"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        server.shutdown()
        thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """The app's."""
    with receiving() as made:
        yield made


@pytest.fixture
def sender(engine: Engine) -> Webhooks:
    """What one worker process has, with the loopback network allowed."""
    return _sender(engine)


def _sender(
    engine: Engine, *secret_texts: str, network: str = "127.0.0.1/32", leases: LeaseKeeper | None = None
) -> Webhooks:
    guard = Guard([ipaddress.ip_network(network)] if network else [])
    return Webhooks(
        engine=engine,
        leases=leases or LeaseKeeper(engine, lease=LEASE),
        guard=guard,
        adapter=guarded_adapter(guard, connections=MAX_DELIVERIES),
        scrubber=Scrubber(["sk-canary", SECRET]),
        secrets=[secret_bytes(text) for text in secret_texts or (SECRET,)],
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
    """The wait until the next attempt is over."""
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


def test_a_job_that_became_final_is_told_once_with_all_an_app_needs(
    engine: Engine, sender: Webhooks, receiver: Receiver
) -> None:
    """The reference library accepts it; nothing is sent again."""
    with engine.begin() as connection:
        job_id = add_downloading(connection, "11", reference="order 7", webhook_url=receiver.url)
        stored = {"status": "stored", "due_at": None, "stored_at": NOW, "sha256": "a" * 64, "size_bytes": 3}
        place = {"location": "file:///out/1/0.png", "media_type": "image/png"}
        add_output(connection, job_id, 0, **stored, **place)
    assert _deliver(sender) == 0
    with engine.begin() as connection:
        connection.execute(update(jobs).values(status="completed", completed_at=NOW))

    assert _deliver(sender) == 1
    assert _deliver(sender) == 0

    ((headers, text),) = receiver.came
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


@pytest.mark.parametrize("status", ["failed", "expired", "cancelled"])
def test_every_final_state_is_told(engine: Engine, sender: Webhooks, receiver: Receiver, status: str) -> None:
    """With its code."""
    _final(engine, receiver.url, status=status, error_code="api_failed", ready_at=None)
    _deliver(sender)
    ((_, text),) = receiver.came
    told = json.loads(text)
    assert (told["type"], told["data"]["status"], told["data"]["error_code"]) == (f"job.{status}", status, "api_failed")


def test_a_receiver_that_is_down_is_told_once_it_is_back_always_under_the_same_name(
    engine: Engine, sender: Webhooks, receiver: Receiver
) -> None:
    """With the same text; the waits grow."""
    _final(engine, receiver.url)
    receiver.answer = lambda handler: _say(handler, 503)
    waits = []
    for _ in range(4):
        _deliver(sender)
        (event,) = _events(engine)
        assert (event.status, event.http_status, event.error_message) == ("pending", 503, "HTTP 503")
        with engine.connect() as connection:
            waits.append((event.due_at - database_now(connection)).total_seconds())
        _due_now(engine)
    receiver.answer = lambda handler: _say(handler, 200)
    _deliver(sender)

    assert [5 * 2**step <= wait + 4 and wait <= 6 * 2**step for step, wait in enumerate(waits)] == [True] * 4
    assert len(set(receiver.names)) == 1
    assert len({text for _, text in receiver.came}) == 1
    assert [(event.status, event.attempts) for event in _events(engine)] == [("delivered", 5)]


def test_a_receiver_that_answers_nothing_is_tried_again(engine: Engine, sender: Webhooks) -> None:
    """Nobody listens there any more."""
    with receiving() as gone:
        url = gone.url
    _final(engine, url)
    _deliver(sender)
    (event,) = _events(engine)
    assert (event.status, event.http_status) == ("pending", None)
    assert "can't be reached" in event.error_message


def test_a_receiver_that_drips_is_given_up_in_time(
    engine: Engine, web: Web, sender: Webhooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte after byte of a header that never ends."""
    monkeypatch.setattr(webhooks, "TIMEOUT_SECONDS", 0.5)
    _final(engine, web.serves("/hooks", drips(b"HTTP/1.1 200 OK\r\n", b"x", every=0.05, seconds=10)))
    began = time.monotonic()
    _deliver(sender)
    assert time.monotonic() - began < 8
    (event,) = _events(engine)
    assert event.status == "pending"
    assert "no answer within" in event.error_message


def test_one_receiver_that_hangs_keeps_no_other_waiting(engine: Engine, sender: Webhooks, receiver: Receiver) -> None:
    """However much there is for it, and however its address is spelled."""
    let_go = threading.Event()

    def hang(handler: http.server.BaseHTTPRequestHandler) -> None:
        let_go.wait(20)
        _say(handler, 200)

    with receiving() as hanging:
        hanging.answer = hang
        for number in range(MAX_DELIVERIES * 2):
            _final(engine, hanging.url.replace("127.0.0.1", ("127.0.0.1", "127.1")[number % 2]), f"slow{number}")
        _final(engine, receiver.url, "quick", completed_at=NOW + seconds(1))
        until = time.monotonic() + 10
        while not receiver.came and time.monotonic() < until:
            sender.run()
        held = len(hanging.came)
        let_go.set()
        assert sender.wait(20)
    assert receiver.came, "it waited behind the one that hangs"
    assert held <= PER_RECEIVER


def test_many_receivers_that_hang_leave_places_to_the_others(
    engine: Engine, sender: Webhooks, receiver: Receiver
) -> None:
    """Each that hangs takes at most half of what is free, and those that wait for it are passed over."""
    let_go = threading.Event()

    def hang(handler: http.server.BaseHTTPRequestHandler) -> None:
        let_go.wait(20)
        _say(handler, 200)

    with receiving() as one, receiving() as two, receiving() as three, receiving() as four:
        for name, hanging in enumerate((one, two, three, four)):
            hanging.answer = hang
            for number in range(MAX_DELIVERIES):
                _final(engine, hanging.url, f"{name}-{number}")
        _final(engine, receiver.url, "quick", completed_at=NOW + seconds(1))
        until = time.monotonic() + 10
        while not receiver.came and time.monotonic() < until:
            sender.run()
        before = [(event.due_at, event.attempts) for event in _events(engine) if event.url != receiver.url]
        assert sender.run() == 0
        after = [(event.due_at, event.attempts) for event in _events(engine) if event.url != receiver.url]
        let_go.set()
        assert sender.wait(20)
    assert receiver.came, "it waited behind those that hang"
    assert before == after, "those that wait for one that hangs are written again and again"


def test_an_attempt_that_could_not_be_recorded_is_made_again_by_a_process_that_is_never_idle(
    engine: Engine, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its lease would be renewed for as long as there is other work."""
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
        while len(receiver.came) < 2 and time.monotonic() < until:
            _deliver(sender)
            time.sleep(0.1)
    assert len(receiver.came) == 2
    assert len(set(receiver.names)) == 1
    assert [event.status for event in _events(engine)] == ["delivered"]


def test_a_claim_that_nobody_began_with_is_given_back_and_what_is_under_way_is_not(
    engine: Engine, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database went away between the claim and the first attempt."""
    let_go = threading.Event()

    def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
        let_go.wait(20)
        _say(handler, 200)

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


def test_an_address_that_nobody_can_read_stops_no_other(engine: Engine, sender: Webhooks, receiver: Receiver) -> None:
    """A key that stood in the host was masked before it was written."""
    _final(engine, "https://[key].example/hooks")
    _final(engine, receiver.url, "2")
    assert _deliver(sender) == 2
    assert len(receiver.came) == 1
    stands = {event.url: (event.status, event.claim_token) for event in _events(engine)}
    assert stands == {"https://[key].example/hooks": ("pending", None), receiver.url: ("delivered", None)}


def test_a_redirect_is_not_followed_wherever_it_leads(engine: Engine, sender: Webhooks, receiver: Receiver) -> None:
    """It is no answer that says 'taken'; a method that keeps the body neither."""
    with receiving("127.0.0.2") as inside:
        receiver.answer = lambda handler: _say(handler, 301 if len(receiver.came) == 1 else 307, location=inside.url)
        for remote_id in ("1", "2"):
            _final(engine, receiver.url, remote_id)
            _deliver(sender)
        assert inside.came == []
    assert [(event.status, event.http_status) for event in _events(engine)] == [("pending", 301), ("pending", 307)]


def test_an_address_inside_is_never_reached_unless_it_is_allowed(engine: Engine, receiver: Receiver) -> None:
    """The event says which setting decides."""
    _final(engine, receiver.url)
    _deliver(_sender(engine, network=""))
    _due_now(engine)
    _deliver(_sender(engine, network="10.0.0.0/8"))
    assert receiver.came == []
    (event,) = _events(engine)
    assert event.status == "pending"
    assert "WEBHOOK_ALLOWED_NETWORKS" in event.error_message
    _due_now(engine)
    _deliver(_sender(engine))
    assert len(receiver.came) == 1


def test_what_is_not_taken_for_a_day_is_given_up_and_so_is_a_receiver_that_is_gone(
    engine: Engine, sender: Webhooks, receiver: Receiver
) -> None:
    """410 says that it wants nothing more."""
    receiver.answer = lambda handler: _say(handler, 500)
    _final(engine, receiver.url)
    _deliver(sender)
    with engine.begin() as connection:
        connection.execute(update(events).values(created_at=database_now(connection) - timedelta(hours=25)))
    _due_now(engine)
    _deliver(sender)
    receiver.answer = lambda handler: _say(handler, 410)
    _final(engine, receiver.url, "2")
    _deliver(sender)
    assert [(event.status, event.attempts) for event in _events(engine)] == [("failed", 2), ("failed", 1)]
    assert _deliver(sender) == 0


def test_a_receiver_may_ask_for_more_time(engine: Engine, sender: Webhooks, receiver: Receiver) -> None:
    """Retry-After, as far as an hour."""
    receiver.answer = lambda handler: _say(handler, 429, retry_after="600")
    _final(engine, receiver.url)
    _deliver(sender)
    (event,) = _events(engine)
    with engine.connect() as connection:
        assert timedelta(seconds=580) < event.due_at - database_now(connection) <= timedelta(seconds=600)


def test_a_job_that_is_taken_up_again_is_told_of_under_another_name(
    engine: Engine, sender: Webhooks, receiver: Receiver
) -> None:
    """One event for each final state."""
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


def test_a_final_state_that_is_left_before_it_was_told_is_told_all_the_same(
    engine: Engine, sender: Webhooks, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever takes the job up again announces its end first."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    job_id = _final(engine, receiver.url, status="failed", error_code="api_failed", ready_at=None)
    assert tracking.retry(job_id)
    with engine.begin() as connection:
        ended = {"status": "expired", "error_code": "expired", "due_at": None, "completed_at": NOW + seconds(20)}
        connection.execute(update(jobs).values(ended))
    _deliver(sender)
    assert sorted(json.loads(text)["type"] for _, text in receiver.came) == ["job.expired", "job.failed"]


def test_the_databases_clock_signs_and_not_the_hosts(
    engine: Engine, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Receivers refuse what is older than five minutes."""
    _final(engine, receiver.url)
    sender = _sender(engine)
    began = time.time()
    monkeypatch.setattr(time, "time", lambda: began - 3_600)
    _deliver(sender)
    monkeypatch.undo()
    ((headers, text),) = receiver.came
    assert Webhook(SECRET).verify(text, headers)["type"] == "job.completed"


def test_many_processes_make_each_event_once_and_deliver_it_once(engine: Engine, receiver: Receiver) -> None:
    """Whoever comes first."""
    for number in range(60):
        _final(engine, receiver.url, str(number))
    senders = [_sender(engine) for _ in range(4)]

    def work(sender: Webhooks) -> None:
        until = time.monotonic() + 20
        while len(receiver.came) < 60 and time.monotonic() < until:
            sender.run()
            time.sleep(0.01)
        sender.wait(10)

    threads = [threading.Thread(target=work, args=(sender,)) for sender in senders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(receiver.came) == 60
    assert len(set(receiver.names)) == 60
    assert {event.status for event in _events(engine)} == {"delivered"}


def test_who_lost_the_claim_can_no_longer_record_and_the_dead_hold_nothing(engine: Engine) -> None:
    """The lease was over, or another process took it."""
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


def test_no_secret_is_shown_anywhere(
    engine: Engine, sender: Webhooks, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in a row, a log, or a request."""
    receiver.answer = lambda handler: _say(handler, 500)
    _final(engine, receiver.url)
    with caplog.at_level("DEBUG"):
        _deliver(sender)
    whole = caplog.text + str(_events(engine)) + str(receiver.came)
    assert "webhook not delivered" in whole
    assert SECRET not in whole
    assert SECRET.removeprefix("whsec_") not in whole


def test_a_look_for_what_is_to_be_told_goes_through_no_job_that_nobody_is_told_of(
    migrated_mariadb: Engine,
) -> None:
    """It is made twice a second by each process, on MariaDB too, where no index is of some rows alone."""
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


def test_without_a_secret_nothing_is_sent_and_nothing_is_lost(engine: Engine, receiver: Receiver) -> None:
    """It was taken out of the settings; the events are made when it is back."""
    _final(engine, receiver.url)
    silent = _sender(engine)
    silent._secrets = ()
    assert _deliver(silent) == 0
    assert _events(engine) == []
    assert _deliver(_sender(engine)) == 1
    assert len(receiver.came) == 1


def test_given_a_lease_that_may_be_over_when_a_webhook_would_be_sent_then_it_is_given_back(
    engine: Engine, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped for longer than its lease: another may have sent it."""
    leases = LeaseKeeper(engine, lease=LEASE)
    sender = _sender(engine, leases=leases)
    _final(engine, receiver.url)

    def refuse(*_: object) -> None:
        raise LeaseLost

    with monkeypatch.context() as asleep:
        asleep.setattr(leases, "check", refuse)
        assert _deliver(sender) == 1
    assert receiver.came == []
    [event] = _events(engine)
    assert (event.status, event.attempts, event.claim_token) == ("pending", 0, None)
    assert _deliver(sender) == 1
    assert len(receiver.came) == 1
