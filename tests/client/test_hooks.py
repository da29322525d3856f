"""The webhook of the API: a valid call makes the next poll earlier; lost, forged and repeated calls do no harm."""

import base64
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
from sqlalchemy import Engine, event, select, update
from sqlalchemy.engine import make_url

import worker
from tests.apps import asgi, wsgi
from tests.django_site import configure_django
from tests.rows import read_job
from tests.servers import celery_worker
from worker.client import hooks
from worker.client.connection import cached_settings, loaded_settings
from worker.client.hooks import hook_url, received
from worker.errors import NotTrackable, SettingsError, Unavailable
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.candidates import candidates_of
from worker.store.engine import engine_for, make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs, orders
from worker.vendor.submissions import named_id

BASE = "https://shop.example/api-hook"
OLD, NEW, FOREIGN = ("whsec_" + base64.b64encode(letter * 32).decode() for letter in (b"o", b"n", b"f"))
FAR = timedelta(hours=1)


def configure(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Set environment variables and clear the cached settings."""
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    loaded_settings.cache_clear()
    hooks._keys.cache_clear()


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    configure(monkeypatch, WEBHOOK_SECRET=NEW)
    yield
    hooks._keys.cache_clear()


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that the Python API uses."""
    configure(monkeypatch, DATABASE_URL=engine.url.render_as_string(hide_password=False))
    return engine


def call(url: str, body: bytes = b"") -> bool:
    """Process a call of a URL, as a handler does."""
    reference, signature = url.rsplit("/", 2)[1:]
    return received(reference, signature, lambda: body)


def forgeries(url: str) -> list[str]:
    """Return URLs that differ slightly from a valid one."""
    head, _, signature = url.rpartition("/")
    wrong_digit = "0" if signature[-1] != "0" else "1"
    return [
        f"{head}/{signature[:-1]}{wrong_digit}",
        f"{head}/{signature[:-1]}",
        f"{head}/{signature.upper()}",
        f"{head}x/{signature}",
        f"{head}/é",
        f"{head}/",
        f"{head.rpartition('/')[0]}/~!/{signature}",
        f"{head.rpartition('/')[0]}/~/{signature}",
    ]


def track_due_later(engine: Engine, remote_id: str, reference: str | None) -> int:
    """Track a job and make it due in an hour. Return its id."""
    job_id = worker.track(remote_id, reference=reference)
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(due_at=datetime.now(UTC) + FAR))
    return job_id


def until_due(engine: Engine, job_id: int) -> float:
    """Return the seconds until a job is due."""
    return float((read_job(engine, job_id).due_at - datetime.now(UTC)).total_seconds())


# ── the URL ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "reference", ["order-77", "77", "a/b", "..", "a//b", "größe 7", "~x", "x" * 255, "%2F", "a?b#c", "🦊"]
)
def test_a_url_ends_with_two_plain_segments_that_encode_the_reference(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nudged: list[str] = []
    monkeypatch.setattr(hooks, "nudge_reference", lambda text, remote_id: nudged.append(text))

    url = hook_url(BASE + "/", reference)
    head, segment, signature = url.rsplit("/", 2)

    assert head == BASE
    assert requests.Request("POST", url).prepare().url == url, "HTTP clients must not change the URL"
    assert len(signature) == 64
    assert received(segment, signature)
    assert nudged == [reference]


def test_a_number_and_its_text_are_the_same_reference() -> None:
    assert hook_url(BASE, 77) == hook_url(BASE, "77")


def test_the_first_secret_signs_and_every_secret_is_accepted(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, WEBHOOK_SECRET=OLD)
    before = hook_url(BASE, "a")
    configure(monkeypatch, WEBHOOK_SECRET=f"{NEW}, {OLD}")
    meanwhile = hook_url(BASE, "a")
    assert call(before)
    assert call(meanwhile)

    configure(monkeypatch, WEBHOOK_SECRET=NEW)

    assert call(meanwhile)
    assert not call(before)
    configure(monkeypatch, WEBHOOK_SECRET=FOREIGN)
    assert not call(meanwhile)


def test_urls_and_webhooks_are_signed_with_different_keys() -> None:
    import hashlib
    import hmac

    signature = hook_url(BASE, "a").rpartition("/")[2]

    assert signature != hmac.new(b"n" * 32, b"a", hashlib.sha256).hexdigest()


def test_wrong_arguments_and_a_missing_secret_are_reported_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    for base in ("shop.example", "/hook", "ftp://shop.example", "https://shop.example/?a=b", "https:// x"):
        with pytest.raises(NotTrackable, match="such as https://"):
            hook_url(base, "a")
    for reference in ("", "x" * 256, "a\nb"):
        with pytest.raises(NotTrackable, match="reference"):
            hook_url(BASE, reference)
    url = hook_url(BASE, "a")
    monkeypatch.delenv("WEBHOOK_SECRET")
    configure(monkeypatch)
    with pytest.raises(SettingsError, match="WEBHOOK_SECRET is not set: set it to"):
        hook_url(BASE, "a")
    assert not call(url)


@pytest.mark.parametrize("wrong", ["secret", "whsec_", "whsec_!!!", NEW[:-20], f"{NEW},x", "whsec_" + "A" * 92])
def test_an_invalid_secret_is_refused_and_not_shown(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, WEBHOOK_SECRET=wrong)

    with pytest.raises(SettingsError, match="WEBHOOK_SECRET must be whsec_") as refused:
        hook_url(BASE, "a")
    assert wrong == "whsec_" or wrong.removeprefix("whsec_") not in str(refused.value)


# ── what a call does ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_valid_call_makes_only_the_jobs_of_its_reference_due(database: Engine) -> None:
    first, second = track_due_later(database, "1", "order-7"), track_due_later(database, "2", "order-7")
    references = ("order-77", "ORDER-7", "order-7 x", None)
    other_ids = [track_due_later(database, str(number), name) for number, name in enumerate(references, 3)]

    assert call(hook_url(BASE, "order-7"))

    assert all(until_due(database, job_id) < 1.0 for job_id in (first, second))
    assert all(until_due(database, job_id) > 3_000.0 for job_id in other_ids)


def test_a_valid_call_for_an_unknown_reference_changes_nothing(database: Engine) -> None:
    job_id = track_due_later(database, "1", "order-7")

    assert call(hook_url(BASE, "order-8"))

    assert until_due(database, job_id) > 3_000.0


def test_repeated_calls_cause_one_poll_and_respect_poll_min(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, POLL_MIN="40")
    asked_at = datetime.now(UTC) - timedelta(seconds=10)
    job_id, other_id = track_due_later(database, "1", "a"), track_due_later(database, "2", "b")
    with database.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(asked_at=asked_at))

    for _ in range(50):
        assert call(hook_url(BASE, "a"))

    assert read_job(database, job_id).due_at == asked_at + timedelta(seconds=40)
    assert until_due(database, other_id) > 3_000.0


def test_a_call_does_not_change_claimed_or_final_jobs(database: Engine) -> None:
    claimed, final = track_due_later(database, "1", "a"), track_due_later(database, "2", "a")
    worker.cancel(final)
    lease = datetime.now(UTC) + timedelta(seconds=30)
    with database.begin() as connection:
        claim = {"due_at": lease, "claim_token": "t", "claim_holder": "h"}
        connection.execute(update(jobs).where(jobs.c.id == claimed).values(claim))

    assert call(hook_url(BASE, "a"))

    assert read_job(database, claimed).due_at == lease
    assert read_job(database, final).status == "cancelled"


def test_a_forged_call_makes_no_query(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, DATABASE_URL="postgresql://127.0.0.1:1/none")
    url = hook_url(BASE, "order-7")

    assert [call(forged) for forged in forgeries(url)] == [False] * 8
    with pytest.raises(Unavailable):
        call(url)  # a valid call queries the database


def test_a_call_takes_milliseconds(database: Engine) -> None:
    worker.track_many([str(number) for number in range(1, 3_001)], reference="others")
    track_due_later(database, "x", "mine")
    url = hook_url(BASE, "mine")

    def seconds(address: str) -> float:
        started = time.perf_counter()
        call(address)
        return time.perf_counter() - started

    valid = statistics.median(seconds(url) for _ in range(30))
    forged = statistics.median(seconds(url[:-1] + "z") for _ in range(30))
    print(f"{database.dialect.name}: true {valid * 1e3:.2f} ms, forged {forged * 1e6:.0f} µs")

    assert valid < 0.1
    assert forged < 0.005


def test_a_call_for_a_reference_with_many_jobs_is_bounded(database: Engine) -> None:
    worker.track_many([str(number) for number in range(1, 301)], reference="all")
    with database.begin() as connection:
        connection.execute(update(jobs).values(due_at=datetime.now(UTC) + FAR))

    assert call(hook_url(BASE, "all"))

    with database.connect() as connection:
        due = connection.execute(select(jobs.c.id).where(jobs.c.due_at < datetime.now(UTC) + FAR / 2)).all()
    assert len(due) == 100


# ── the handlers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def fastapi_app() -> AbstractContextManager[str]:
    """Serve a FastAPI app that mounts the handler as documented."""
    from fastapi import FastAPI

    from worker.client.hooks.fastapi import router

    app = FastAPI()
    app.mount("/api-hook", router)
    return asgi(app)


def starlette_app() -> AbstractContextManager[str]:
    """Serve a Starlette app that mounts the handler."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    from worker.client.hooks.fastapi import router

    return asgi(Starlette(routes=[Mount("/api-hook", router)]))


def flask_app() -> AbstractContextManager[str]:
    """Serve a Flask app with the blueprint."""
    from flask import Flask

    from worker.client.hooks.flask import blueprint

    app = Flask(__name__)
    app.register_blueprint(blueprint, url_prefix="/api-hook")
    return wsgi(app)


def django_app() -> AbstractContextManager[str]:
    """Serve a Django site with the handler and with CSRF protection."""
    from django.core.handlers.wsgi import WSGIHandler

    configure_django()
    return wsgi(WSGIHandler())


APPS = [fastapi_app, starlette_app, flask_app, django_app]


@pytest.mark.parametrize("app", APPS)
def test_a_handler_accepts_valid_calls_with_any_body_and_refuses_others(
    app: Callable[[], AbstractContextManager[str]], database: Engine
) -> None:
    queries: list[str] = []
    with app() as address:
        due_id, other_id = track_due_later(database, "1", "a/b"), track_due_later(database, "2", "b")
        url = hook_url(f"{address}/api-hook", "a/b")
        engine = engine_for(cached_settings().database)
        event.listen(engine, "before_cursor_execute", lambda *arguments: queries.append(arguments[2]))

        forged = [
            requests.post(forgery, json={"status": "success"}, timeout=10).status_code for forgery in forgeries(url)
        ]
        assert (set(forged), queries) == ({404}, [])
        assert requests.get(url, timeout=10).status_code == 405
        assert queries == []
        answer = requests.post(url, data=b"{" * 300_000, headers={"Content-Type": "application/json"}, timeout=10)

    assert (answer.status_code, answer.content) == (204, b"")
    assert until_due(database, due_id) < 1.0
    assert until_due(database, other_id) > 3_000.0


@pytest.mark.parametrize("app", APPS)
def test_a_handler_notes_the_job_that_the_body_names_for_an_order_whose_answer_is_lost(
    app: Callable[[], AbstractContextManager[str]], database: Engine
) -> None:
    job_id = lose_order(database, "a/b")
    with app() as address:
        url = hook_url(f"{address}/api-hook", "a/b")
        for body in ({"status": "success", "id": 41, "output": []}, {"id": "x" * 200}, {"id": None}, [1], "no JSON"):
            assert requests.post(url, json=body, timeout=10).status_code == 204
        assert requests.post(forgeries(url)[0], json={"id": 42}, timeout=10).status_code == 404

    assert candidate_ids(database, job_id) == ["41"]


@pytest.mark.parametrize(
    ("body", "remote_id"),
    [
        (b'{"id": 41}', "41"),
        (b'{"status": "success", "id": "abc123-def456", "output": [], "track_id": "x"}', "abc123-def456"),
        (b'{"status": "success", "training_status": "model_ready", "model_id": "m-1", "training_id": "m-1"}', "m-1"),
        (b'{"request_id": 41, "id": null}', "41"),
        (b'{"taskId": "a3525188-a894"}', "a3525188-a894"),
        (b'{"id": 0}', None),
        (b'{"id": "../../etc"}', None),
        (b'{"id": {"a": 1}}', None),
        (b'{"id": 41', None),
        (b"[" * 60_000, None),
        (b"\xff\x00", None),
        (b"", None),
    ],
)
def test_the_id_in_a_body_is_read_as_in_all_answers(body: bytes, remote_id: str | None) -> None:
    assert named_id(body) == remote_id


@pytest.mark.parametrize("app", APPS)
def test_a_handler_answers_503_without_a_database(
    app: Callable[[], AbstractContextManager[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, DATABASE_URL="postgresql://127.0.0.1:1/none")
    with app() as address:
        url = hook_url(f"{address}/api-hook", "a")

        assert requests.post(url, timeout=10).status_code == 503


def lose_order(engine: Engine, reference: str) -> int:
    """Order a picture whose answer is lost. Return the id of the job."""
    job_id = worker.order("v6/images/text2img", {"prompt": "a lake"}, reference=reference)
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(status="uncertain"))
        sent = {"attempted_at": datetime.now(UTC), "due_at": None, "takes_slot": True}
        connection.execute(update(orders).where(orders.c.id == job_id).values(sent))
    return job_id


def candidate_ids(engine: Engine, job_id: int) -> list[str]:
    """Return the remote ids that calls named for an order."""
    with engine.connect() as connection:
        return [row.remote_id for row in candidates_of(connection, job_id)]


# ── with a real worker ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.server
def test_a_call_makes_the_job_ready_earlier_and_after_a_lost_call_the_next_poll_finds_it(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two equal jobs are polled every five seconds. The API calls for one of them; the other call is lost."""
    url = f"sqlite:///{tmp_path}/hook.db"
    engine = make_engine(make_url(url))
    migrate(engine)
    with Sandbox(SandboxOptions(key="k", min_seconds=3.5, max_seconds=3.5, size=16)) as api:
        environment: dict[str, Any] = {
            "DATABASE_URL": url,
            "REDIS_URL": redis_url,
            "SD_API_URL": api.url,
            "SD_API_KEY": "k",
            "POLL_POLICY": "fixed",
            "POLL_MIN": "1",
            "OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8",
        }
        configure(monkeypatch, **environment)
        with celery_worker(tmp_path, "--queues", "fetch-worker,fetch-worker.polls"):
            submitted = time.time()
            ids = [
                worker.track(api.submit(name, samples=1) | {"eta": None}, reference=name, eta=2.0)
                for name in ("called", "lost")
            ]
            time.sleep(max(submitted + 3.6 - time.time(), 0))  # the time at which the API calls
            assert call(hook_url(BASE, "called"))
            delays = [_ready_after(engine, job_id, submitted) for job_id in ids]
            polls = [read_job(engine, job_id).polls for job_id in ids]
    engine.dispose()
    print(f"called {delays[0]:.2f} s, lost {delays[1]:.2f} s after the submission; polls {polls}")

    assert delays[0] < 5.0
    assert 6.0 < delays[1] < 2.0 * 1.1 + 5.0 * 1.1 + 2.0
    assert polls == [2, 2]


def _ready_after(engine: Engine, job_id: int, submitted: float) -> float:
    deadline = time.monotonic() + 20
    while (ready_at := read_job(engine, job_id).ready_at) is None:
        assert time.monotonic() < deadline, read_job(engine, job_id)
        time.sleep(0.05)
    return float(ready_at.timestamp()) - submitted


@pytest.mark.server
@pytest.mark.parametrize("lost", ["lost-closed", "lost-silent"])
def test_given_an_order_whose_answer_is_lost_when_the_api_calls_then_its_picture_is_stored(
    lost: str, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API may call before the answer counts as lost. The picture is paid for once."""
    url = f"sqlite:///{tmp_path}/hook.db"
    engine = make_engine(make_url(url))
    migrate(engine)
    options = SandboxOptions(key="k", min_seconds=1.0, max_seconds=1.0, size=16, max_outputs=1, scenarios=(lost,))
    with Sandbox(options) as api, flask_app() as address:
        environment: dict[str, Any] = {
            "DATABASE_URL": url,
            "REDIS_URL": redis_url,
            "SD_API_URL": api.url,
            "SD_API_KEY": "k",
            "SD_API_ORDER_TIMEOUT": "4",
            "OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8",
            "STORAGE_URL": f"file:{tmp_path}/outputs",
        }
        configure(monkeypatch, **environment)
        payload = {"prompt": "a lake", "webhook": hook_url(f"{address}/api-hook", "order-7")}
        with celery_worker(tmp_path):
            job_id = worker.order("v3/text2img", payload, reference="order-7")
            job = worker.wait(job_id, timeout=60)
        charged = api.charges.charged
    engine.dispose()

    assert (job.status, len(job.outputs), job.outputs[0].status) == ("completed", 1, "stored")
    assert charged == 1
