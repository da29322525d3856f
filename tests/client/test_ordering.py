"""`worker.order` and `worker.attach` on real databases: accepted and refused arguments, and transactions."""

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, Row, func, select
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import worker
from tests.rows import update_job
from worker import NotTrackable, RefusedAddress, TrackedJob, aio, attach, order
from worker.client.ordering import MAX_PAYLOAD, OPTIONS, order_once
from worker.coordination.wakeups import WakeUps
from worker.store.audit import latest_actions
from worker.store.engine import database_now
from worker.store.orders import order_row
from worker.store.schema import jobs, orders

KEY = "sk-canary/7f3a+9"
WEBHOOK_SECRET = "whsec_" + "c2VjcmV0" * 4
ENDPOINT = "v6/images/text2img"
PAYLOAD: dict[str, Any] = {"prompt": "a lake at dawn – größer", "samples": 2}


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that the Python API uses."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("SD_API_KEY", KEY)
    monkeypatch.setenv("SD_API_URL", "https://modelslab.com/api/v3")
    return engine


def _count(engine: Engine) -> int:
    """Return the number of jobs, which is also the number of orders."""
    with engine.connect() as connection:
        counts = {connection.execute(select(func.count()).select_from(table)).scalar_one() for table in (jobs, orders)}
    (count,) = counts
    return count


def _order(engine: Engine, job_id: int) -> Row[Any]:
    with engine.connect() as connection:
        row = order_row(connection, job_id)
    assert row is not None
    return row


def _job(engine: Engine, job_id: int) -> Row[Any]:
    with engine.connect() as connection:
        return connection.execute(select(jobs).where(jobs.c.id == job_id)).one()


# ── order ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_order_is_a_row_with_its_payload_that_no_poll_sees(database: Engine) -> None:
    job_id = order(ENDPOINT, PAYLOAD)

    assert isinstance(job_id, TrackedJob)
    assert job_id.created
    job, row = _job(database, job_id), _order(database, job_id)
    assert (job.status, job.remote_id, job.fetch_url, job.due_at, job.polls) == ("ordered", "", "", None, 0)
    assert (job.account, job.fetch_host) == ("default", "modelslab.com")
    assert (row.endpoint, row.host, row.queue, row.attempts) == (ENDPOINT, "modelslab.com", "default", 0)
    assert json.loads(row.payload) == PAYLOAD
    assert row.payload_sha256 == hashlib.sha256(row.payload.encode()).hexdigest()


def test_the_job_of_an_order_can_be_looked_up_and_has_no_remote_id_yet(database: Engine) -> None:
    job_id = order(ENDPOINT, PAYLOAD, reference=UUID(int=7))

    job = worker.get(reference=UUID(int=7))

    assert job is not None
    assert (job.id, job.status, job.final, job.remote_id) == (job_id, "ordered", False, "")
    assert job.as_json()["remote_id"] is None
    assert [found.id for found in worker.find(status="ordered")] == [job_id]


def test_each_call_is_an_order_of_its_own(database: Engine) -> None:
    assert order(ENDPOINT, PAYLOAD) != order(ENDPOINT, PAYLOAD)
    assert _count(database) == 2


def test_the_keywords_are_kept(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_SECRET", WEBHOOK_SECRET)

    job_id = order(
        "https://modelslab.com/api/v6/video/text2video",
        PAYLOAD,
        account="shop",
        kind="clips",
        eta=timedelta(minutes=1),
        priority=7,
        reference=77,
        on_done="shop/shop.ready",
        webhook_url="https://shop.test/hook",
        deadline=timedelta(hours=3),
    )

    job, row = _job(database, job_id), _order(database, job_id)
    assert (job.account, job.kind, job.eta, job.priority) == ("shop", "clips", 60.0, 7)
    assert (job.reference, job.on_done, job.webhook_url) == ("77", "shop/shop.ready", "https://shop.test/hook")
    assert job.deadline_seconds == 3 * 3_600
    assert (row.queue, row.order_rank, row.host) == ("shop", -7, "modelslab.com")


def test_without_a_kind_it_is_that_of_the_endpoint_and_model_with_its_deadline(database: Engine) -> None:
    job = _job(database, order("v6/video/text2video", {"prompt": "waves", "model_id": "zeroscope"}))

    assert job.kind.startswith("video/")
    assert job.deadline_seconds == 7_200


@pytest.mark.parametrize("payload", [{}, {"key": "", "prompt": "a"}, {"key": None}, {"prompt": "\ud800 \x00"}])
def test_unusual_payloads_are_taken_without_a_key(database: Engine, payload: dict[str, Any]) -> None:
    stored = json.loads(_order(database, order(ENDPOINT, payload)).payload)

    assert stored == {name: value for name, value in payload.items() if name != "key"}


def test_a_prompt_may_contain_the_key_of_a_test_environment(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_API_KEY", "lake")

    assert json.loads(_order(database, order(ENDPOINT, PAYLOAD)).payload) == PAYLOAD


def test_a_payload_of_the_greatest_size_is_taken(database: Engine) -> None:
    payload = {"image": "x" * (MAX_PAYLOAD - len('{"image":""}'))}

    assert len(_order(database, order(ENDPOINT, payload)).payload) == MAX_PAYLOAD


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


class Endless(dict[str, Any]):
    """A payload that contains itself."""

    def __init__(self) -> None:
        self["self"] = self


def _deep(levels: int) -> dict[str, Any]:
    payload: dict[str, Any] = {}
    for _ in range(levels):
        payload = {"a": payload}
    return payload


REFUSED: list[tuple[object, object, dict[str, Any], str]] = [
    (ENDPOINT, None, {}, "payload must be a mapping with the fields of the order, not NoneType"),
    (ENDPOINT, "{}", {}, "payload must be a mapping with the fields of the order, not str"),
    (ENDPOINT, [("prompt", "a")], {}, "payload must be a mapping with the fields of the order, not list"),
    (ENDPOINT, {"key": "k"}, {}, "must not contain the key: the worker adds the key of the account"),
    (ENDPOINT, {"prompt": f"the key is {KEY}"}, {}, "contains an API key or a secret of this installation"),
    (ENDPOINT, {"webhook": [{"url": f"https://x/{KEY}"}]}, {}, "contains an API key or a secret of this installation"),
    (ENDPOINT, {"prompt": WEBHOOK_SECRET}, {}, "contains an API key or a secret of this installation"),
    (ENDPOINT, {"scale": float("nan")}, {}, "can't be written as JSON"),
    (ENDPOINT, {"scale": float("inf")}, {}, "can't be written as JSON"),
    (ENDPOINT, {"image": b"png"}, {}, "can't be written as JSON"),
    (ENDPOINT, {"images": {1, 2}}, {}, "can't be written as JSON"),
    (ENDPOINT, {5: "five"}, {}, "must have text as names of its fields"),
    (ENDPOINT, Endless(), {}, "can't be written as JSON"),
    (ENDPOINT, _deep(100_000), {}, "can't be written as JSON"),
    (ENDPOINT, {"image": "x" * (MAX_PAYLOAD - 11)}, {}, "has 8,388,609 bytes as JSON, 8,388,608 at most"),
    (ENDPOINT, {"prompt": "é" * (MAX_PAYLOAD // 6)}, {}, "8,388,608 at most: pass files as URLs"),
    (None, {}, {}, "endpoint"),
    ("", {}, {}, "endpoint"),
    ("v6/images/fetch/12", {}, {}, "fetches a job and orders nothing"),
    ("v6/wallet_balance", {}, {}, "creates no job"),
    ("v1/enterprise/clear_queue", {}, {}, "creates no job"),
    ("v6/images/text2img?key=1", {}, {}, "it contains '?'"),
    ("v6/../images", {}, {}, "endpoint"),
    (ENDPOINT, {}, {"account": "a b"}, "is not a valid account name"),
    (ENDPOINT, {}, {"kind": "x" * 300}, "kind"),
    (ENDPOINT, {}, {"eta": "soon"}, "eta"),
    (ENDPOINT, {}, {"priority": 1_001}, "priority"),
    (ENDPOINT, {}, {"reference": ["a"]}, "reference"),
    (ENDPOINT, {}, {"on_done": "worker.track"}, "on_done is refused"),
    (ENDPOINT, {}, {"webhook_url": "http://10.0.0.1/"}, "webhook_url is refused"),
    (ENDPOINT, {}, {"deadline": -1}, "deadline"),
]


@pytest.mark.parametrize(("endpoint", "payload", "options", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_a_wrong_argument_is_refused_with_a_reason_and_nothing_is_written(
    endpoint: Any, payload: Any, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No query is made: this database does not exist."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/none")
    monkeypatch.setenv("SD_API_KEY", KEY)
    monkeypatch.setenv("WEBHOOK_SECRET", WEBHOOK_SECRET)

    with pytest.raises(NotTrackable) as refused:
        order(endpoint, payload, **options)

    message = str(refused.value)
    assert reason in message
    assert KEY not in message
    assert WEBHOOK_SECRET not in message
    assert "\n" not in message
    assert len(message) < 800


@pytest.mark.parametrize(
    "endpoint",
    ["https://evil.test/api/v6/images/text2img", "http://modelslab.com/api/v6/images/text2img", "v6/images/%74ext2img"],
)
def test_the_key_is_sent_to_no_other_address(database: Engine, endpoint: str) -> None:
    with pytest.raises(RefusedAddress):
        order(endpoint, PAYLOAD)
    assert _count(database) == 0


def test_no_row_contains_a_key(database: Engine) -> None:
    job_id = order(ENDPOINT, PAYLOAD, reference=f"ref {KEY}", kind=KEY)

    assert KEY not in f"{_job(database, job_id)} {_order(database, job_id)}"


# ── transactions ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_order_is_committed_or_rolled_back_with_the_callers_session(database: Engine) -> None:
    """Also in a savepoint of it."""
    with Session(database) as session:
        order(ENDPOINT, PAYLOAD, session=session)
        session.rollback()
    assert _count(database) == 0

    with Session(database) as session, session.begin():
        order(ENDPOINT, PAYLOAD, session=session, reference="kept")
        savepoint = session.begin_nested()
        order(ENDPOINT, PAYLOAD, session=session, reference="undone")
        savepoint.rollback()
    scoped = scoped_session(sessionmaker(database))
    order(ENDPOINT, PAYLOAD, session=scoped, reference="scoped")
    scoped.commit()
    scoped.remove()
    assert _count(database) == 2
    assert [job.reference for job in worker.find()] == ["scoped", "kept"]


def test_the_order_is_committed_or_rolled_back_with_a_connection(database: Engine) -> None:
    with database.connect() as connection:
        order(ENDPOINT, PAYLOAD, session=connection)
        connection.rollback()
        order(ENDPOINT, PAYLOAD, session=connection, reference="kept")
        connection.commit()
    assert _count(database) == 1
    assert [job.reference for job in worker.find()] == ["kept"]


def test_workers_are_woken_after_the_commit(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr(WakeUps, "send", lambda _: counts.append(_count(database)))

    order(ENDPOINT, PAYLOAD)
    with Session(database) as session:
        order(ENDPOINT, PAYLOAD, session=session)
        session.rollback()
    with Session(database) as session, session.begin():
        order(ENDPOINT, PAYLOAD, session=session)
        assert counts == [1]

    assert counts == [1, 2]


@pytest.mark.parametrize(
    ("session", "advice"),
    [
        ("session", "write `order(…, session=session)` with the session of your transaction"),
        (Session, "session.begin(): order(…, session=session)`"),
    ],
)
def test_what_is_no_session_is_refused_with_the_line_to_write(
    configured_sqlite: Engine, session: Any, advice: str
) -> None:
    with pytest.raises(NotTrackable) as refused:
        order(ENDPOINT, PAYLOAD, session=session)
    assert advice in str(refused.value)


# ── the keywords ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _keywords(call: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameters of a call after its first ones, each with its default."""
    parameters = inspect.signature(call).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def test_order_takes_the_keywords_of_track_that_make_sense_and_describes_each() -> None:
    text = inspect.getdoc(order) or ""

    assert _keywords(order) == {**OPTIONS, "session": None}
    assert list(_keywords(worker.track)) == [
        name
        for name in _keywords(worker.track)
        if name in _keywords(order) or name in ("endpoint", "fetch_url", "submitted_at")
    ]
    described = re.sub(r"^([a-z_]+(?:, [a-z_]+)+)$", lambda line: line[1].replace(", ", "\n"), text, flags=re.MULTILINE)
    for name in inspect.signature(order).parameters:
        assert re.search(rf"^{name}$", described, re.MULTILINE), name


def test_the_coroutine_has_the_same_arguments() -> None:
    assert _keywords(aio.order) == _keywords(order)
    assert list(inspect.signature(aio.order).parameters) == list(inspect.signature(order).parameters)
    assert inspect.signature(aio.attach).parameters == inspect.signature(attach).parameters


# ── the same message twice ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_message_that_is_delivered_again_is_one_order(database: Engine) -> None:
    first = order_once("task:1", ENDPOINT, PAYLOAD, {"reference": "r"})
    again = order_once("task:1", ENDPOINT, PAYLOAD, {"reference": "r"})

    assert (first, first.created, again.created) == (again, True, False)
    assert order_once("task:2", ENDPOINT, PAYLOAD, {}) != first
    assert _count(database) == 2


def test_a_message_that_is_delivered_to_several_workers_at_once_is_one_order(database: Engine) -> None:
    barrier = Barrier(6)

    def deliver(_: int) -> TrackedJob:
        barrier.wait()
        return order_once("task:1", ENDPOINT, PAYLOAD, {})

    with ThreadPoolExecutor(6) as threads:
        tracked = list(threads.map(deliver, range(6)))

    assert len(set(tracked)) == 1
    assert sum(job.created for job in tracked) == 1
    assert _count(database) == 1


def test_a_message_with_an_unknown_keyword_is_refused(database: Engine) -> None:
    with pytest.raises(NotTrackable, match="order has no argument 'fetch_url': it takes account, kind, eta"):
        order_once("task:1", ENDPOINT, PAYLOAD, {"fetch_url": "x"})
    assert _count(database) == 0


# ── attach ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _uncertain(engine: Engine, **options: Any) -> int:
    """Return an order whose answer is lost."""
    job_id = int(order(ENDPOINT, PAYLOAD, **options))
    update_job(engine, job_id, status="uncertain")
    return job_id


def test_an_uncertain_order_that_is_attached_is_polled_at_once(database: Engine) -> None:
    job_id = _uncertain(database)

    assert attach(job_id, 12202888)

    job = _job(database, job_id)
    assert (job.status, job.remote_id) == ("pending", "12202888")
    assert job.fetch_url == "https://modelslab.com/api/v6/images/fetch/12202888"
    with database.connect() as connection:
        assert job.due_at <= database_now(connection)
        assert latest_actions(connection)[0].action == "attach"


def test_only_an_uncertain_order_can_be_attached(database: Engine) -> None:
    ordered, tracked = order(ENDPOINT, PAYLOAD), worker.track("1")

    assert not attach(ordered, "12")
    assert not attach(tracked, "12")
    with pytest.raises(worker.JobNotFound):
        attach(4_711, "12")
    assert _job(database, ordered).status == "ordered"


def test_a_remote_id_of_another_job_is_refused(database: Engine) -> None:
    worker.track("12", endpoint=ENDPOINT)
    job_id = _uncertain(database)

    with pytest.raises(NotTrackable, match="remote id 12 belongs to another job: `fetch-worker show --remote 12`"):
        attach(job_id, "12")
    with pytest.raises(NotTrackable, match="can't be a remote id"):
        attach(job_id, "../12")
    assert _job(database, job_id).status == "uncertain"


def test_an_uncertain_order_that_is_retried_is_ordered_again(database: Engine) -> None:
    job_id = _uncertain(database)

    assert worker.retry(job_id)

    assert _job(database, job_id).status == "ordered"
    assert _order(database, job_id).queue == "default"
