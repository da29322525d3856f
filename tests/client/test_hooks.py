"""The API's own webhook as a hint: a true one saves the wait; a lost, forged or repeated one costs next to nothing."""

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
from tests.rows import read_job
from tests.servers import celery_worker
from worker.client import hooks, tracking
from worker.client.hooks import hook_url, received
from worker.errors import NotTrackable, SettingsError, Unavailable
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.engine import engine_for, make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs

BASE = "https://shop.example/api-hook"
OLD, NEW, FOREIGN = ("whsec_" + base64.b64encode(letter * 32).decode() for letter in (b"o", b"n", b"f"))
FAR = timedelta(hours=1)


def configure(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """The settings of a process that starts now."""
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    tracking._settings.cache_clear()
    hooks._keys.cache_clear()


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    configure(monkeypatch, WEBHOOK_SECRET=NEW)
    yield
    hooks._keys.cache_clear()


@pytest.fixture
def door(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The database that the front door uses, with our tables in it."""
    configure(monkeypatch, DATABASE_URL=engine.url.render_as_string(hide_password=False))
    return engine


def called(url: str) -> bool:
    """As a handler does with the two last parts of a path."""
    return received(*url.rsplit("/", 2)[1:])


def forgeries(url: str) -> list[str]:
    """Addresses that are nearly right."""
    head, _, signature = url.rpartition("/")
    other = "0" if signature[-1] != "0" else "1"
    return [
        f"{head}/{signature[:-1]}{other}",
        f"{head}/{signature[:-1]}",
        f"{head}/{signature.upper()}",
        f"{head}x/{signature}",
        f"{head}/é",
        f"{head}/",
        f"{head.rpartition('/')[0]}/~!/{signature}",
        f"{head.rpartition('/')[0]}/~/{signature}",
    ]


def tracked_far_off(engine: Engine, remote_id: str, reference: str | None) -> int:
    """A job that is not to be asked about for an hour."""
    job_id = worker.track(remote_id, reference=reference)
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(due_at=datetime.now(UTC) + FAR))
    return job_id


def until_due(engine: Engine, job_id: int) -> float:
    """The seconds until a job is asked about."""
    return float((read_job(engine, job_id).due_at - datetime.now(UTC)).total_seconds())


# ── the address ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "reference", ["order-77", "77", "a/b", "..", "a//b", "größe 7", "~x", "x" * 255, "%2F", "a?b#c", "🦊"]
)
def test_an_address_has_two_plain_parts_that_lead_back_to_the_reference(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nudged: list[str] = []
    monkeypatch.setattr(hooks, "nudge_reference", nudged.append)

    url = hook_url(BASE + "/", reference)
    head, segment, signature = url.rsplit("/", 2)

    assert head == BASE
    assert requests.Request("POST", url).prepare().url == url, "nobody on the way writes it differently"
    assert len(signature) == 64
    assert received(segment, signature)
    assert nudged == [reference]


def test_a_number_is_the_reference_it_is_tracked_with() -> None:
    assert hook_url(BASE, 77) == hook_url(BASE, "77")


def test_while_secrets_change_the_first_signs_and_all_are_accepted(
    door: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, WEBHOOK_SECRET=OLD)
    before = hook_url(BASE, "a")
    configure(monkeypatch, WEBHOOK_SECRET=f"{NEW}, {OLD}")
    meanwhile = hook_url(BASE, "a")
    assert called(before)
    assert called(meanwhile)

    configure(monkeypatch, WEBHOOK_SECRET=NEW)

    assert called(meanwhile)
    assert not called(before)
    configure(monkeypatch, WEBHOOK_SECRET=FOREIGN)
    assert not called(meanwhile)


def test_the_key_of_addresses_is_not_the_key_that_signs_webhooks() -> None:
    import hashlib
    import hmac

    signature = hook_url(BASE, "a").rpartition("/")[2]

    assert signature != hmac.new(b"n" * 32, b"a", hashlib.sha256).hexdigest()


def test_what_is_missing_or_wrong_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert not called(url)


@pytest.mark.parametrize("wrong", ["secret", "whsec_", "whsec_!!!", NEW[:-20], f"{NEW},x", "whsec_" + "A" * 92])
def test_a_secret_that_is_none_is_refused_and_not_shown(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, WEBHOOK_SECRET=wrong)

    with pytest.raises(SettingsError, match="WEBHOOK_SECRET must be whsec_") as refused:
        hook_url(BASE, "a")
    assert wrong == "whsec_" or wrong.removeprefix("whsec_") not in str(refused.value)


# ── what a call does ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_true_call_brings_the_jobs_of_its_reference_forward_and_no_others(door: Engine) -> None:
    mine, twin = tracked_far_off(door, "1", "order-7"), tracked_far_off(door, "2", "order-7")
    references = ("order-77", "ORDER-7", "order-7 x", None)
    others = [tracked_far_off(door, str(number), name) for number, name in enumerate(references, 3)]

    assert called(hook_url(BASE, "order-7"))

    assert all(until_due(door, job_id) < 1.0 for job_id in (mine, twin))
    assert all(until_due(door, job_id) > 3_000.0 for job_id in others)


def test_a_call_about_a_reference_that_nobody_has_is_taken_and_does_nothing(door: Engine) -> None:
    job_id = tracked_far_off(door, "1", "order-7")

    assert called(hook_url(BASE, "order-8"))

    assert until_due(door, job_id) > 3_000.0


def test_a_true_call_that_is_repeated_asks_for_one_poll_of_its_job_and_that_not_too_soon(
    door: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, POLL_MIN="40")
    asked_at = datetime.now(UTC) - timedelta(seconds=10)
    mine, other = tracked_far_off(door, "1", "a"), tracked_far_off(door, "2", "b")
    with door.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == mine).values(asked_at=asked_at))

    for _ in range(50):
        assert called(hook_url(BASE, "a"))

    assert read_job(door, mine).due_at == asked_at + timedelta(seconds=40)
    assert until_due(door, other) > 3_000.0


def test_a_call_leaves_alone_what_is_being_asked_about_or_over(door: Engine) -> None:
    claimed, over = tracked_far_off(door, "1", "a"), tracked_far_off(door, "2", "a")
    worker.cancel(over)
    lease = datetime.now(UTC) + timedelta(seconds=30)
    with door.begin() as connection:
        claim = {"due_at": lease, "claim_token": "t", "claim_holder": "h"}
        connection.execute(update(jobs).where(jobs.c.id == claimed).values(claim))

    assert called(hook_url(BASE, "a"))

    assert read_job(door, claimed).due_at == lease
    assert read_job(door, over).status == "cancelled"


def test_a_forged_call_reaches_no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, DATABASE_URL="postgresql://127.0.0.1:1/none")
    url = hook_url(BASE, "order-7")

    assert [called(forged) for forged in forgeries(url)] == [False] * 8
    with pytest.raises(Unavailable):
        called(url)  # a true one does


def test_a_call_is_answered_within_milliseconds(door: Engine) -> None:
    worker.track_many([str(number) for number in range(3_000)], reference="others")
    tracked_far_off(door, "x", "mine")
    url = hook_url(BASE, "mine")

    def seconds(address: str) -> float:
        began = time.perf_counter()
        called(address)
        return time.perf_counter() - began

    true = statistics.median(seconds(url) for _ in range(30))
    forged = statistics.median(seconds(url[:-1] + "z") for _ in range(30))
    print(f"{door.dialect.name}: true {true * 1e3:.2f} ms, forged {forged * 1e6:.0f} µs")

    assert true < 0.1
    assert forged < 0.005


def test_many_jobs_of_one_reference_cost_a_bounded_call(door: Engine) -> None:
    worker.track_many([str(number) for number in range(300)], reference="all")
    with door.begin() as connection:
        connection.execute(update(jobs).values(due_at=datetime.now(UTC) + FAR))

    assert called(hook_url(BASE, "all"))

    with door.connect() as connection:
        due = connection.execute(select(jobs.c.id).where(jobs.c.due_at < datetime.now(UTC) + FAR / 2)).all()
    assert len(due) == 100


# ── the handlers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def fastapi_app() -> AbstractContextManager[str]:
    """An app that mounts the handler as the documentation says."""
    from fastapi import FastAPI

    from worker.client.hooks.fastapi import router

    app = FastAPI()
    app.mount("/api-hook", router)
    return asgi(app)


def starlette_app() -> AbstractContextManager[str]:
    """The same without FastAPI."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    from worker.client.hooks.fastapi import router

    return asgi(Starlette(routes=[Mount("/api-hook", router)]))


def flask_app() -> AbstractContextManager[str]:
    """A Flask app with the blueprint."""
    from flask import Flask

    from worker.client.hooks.flask import blueprint

    app = Flask(__name__)
    app.register_blueprint(blueprint, url_prefix="/api-hook")
    return wsgi(app)


class UrlConf:
    """A Django URLconf."""

    def __init__(self) -> None:
        from django.urls import include, path

        self.urlpatterns = [path("api-hook/", include("worker.client.hooks.django"))]


def django_app() -> AbstractContextManager[str]:
    """A Django site with the views, its protection against forged forms switched on."""
    from django.conf import settings
    from django.core.handlers.wsgi import WSGIHandler

    if not settings.configured:
        protected = ["django.middleware.common.CommonMiddleware", "django.middleware.csrf.CsrfViewMiddleware"]
        settings.configure(
            SECRET_KEY="x",
            ALLOWED_HOSTS=["127.0.0.1"],
            MIDDLEWARE=protected,
            LOGGING_CONFIG=None,
            ROOT_URLCONF=UrlConf(),
        )
    return wsgi(WSGIHandler())


APPS = [fastapi_app, starlette_app, flask_app, django_app]


@pytest.mark.parametrize("app", APPS)
def test_a_handler_takes_a_true_call_whatever_its_body_and_knows_no_other(
    app: Callable[[], AbstractContextManager[str]], door: Engine
) -> None:
    asked: list[str] = []
    with app() as address:
        mine, other = tracked_far_off(door, "1", "a/b"), tracked_far_off(door, "2", "b")
        url = hook_url(f"{address}/api-hook", "a/b")
        engine = engine_for(tracking._settings().database)
        event.listen(engine, "before_cursor_execute", lambda *now: asked.append(now[2]))

        forged = [requests.post(one, json={"status": "success"}, timeout=10).status_code for one in forgeries(url)]
        assert (set(forged), asked) == ({404}, [])
        assert requests.get(url, timeout=10).status_code == 405
        assert asked == []
        true = requests.post(url, data=b"{" * 300_000, headers={"Content-Type": "application/json"}, timeout=10)

    assert (true.status_code, true.content) == (204, b"")
    assert until_due(door, mine) < 1.0
    assert until_due(door, other) > 3_000.0


@pytest.mark.parametrize("app", APPS)
def test_a_handler_without_a_database_asks_to_be_called_again(
    app: Callable[[], AbstractContextManager[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, DATABASE_URL="postgresql://127.0.0.1:1/none")
    with app() as address:
        url = hook_url(f"{address}/api-hook", "a")

        assert requests.post(url, timeout=10).status_code == 503


# ── with a real worker ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.server
def test_a_call_saves_the_wait_and_a_lost_one_costs_no_more_than_the_next_poll(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs that take as long, polled each five seconds; the API calls about one, and the other call is lost."""
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
            time.sleep(max(submitted + 3.6 - time.time(), 0))  # the API is the one that says when: it calls then
            assert called(hook_url(BASE, "called"))
            seen = [_ready_after(engine, job_id, submitted) for job_id in ids]
            polls = [read_job(engine, job_id).polls for job_id in ids]
    engine.dispose()
    print(f"called {seen[0]:.2f} s, lost {seen[1]:.2f} s after the submission; polls {polls}")

    assert seen[0] < 5.0
    assert 6.0 < seen[1] < 2.0 * 1.1 + 5.0 * 1.1 + 2.0
    assert polls == [2, 2]


def _ready_after(engine: Engine, job_id: int, submitted: float) -> float:
    until = time.monotonic() + 20
    while (ready_at := read_job(engine, job_id).ready_at) is None:
        assert time.monotonic() < until, read_job(engine, job_id)
        time.sleep(0.05)
    return float(ready_at.timestamp()) - submitted
