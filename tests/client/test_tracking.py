"""The Python API on real databases: accepted and refused arguments, and transactions."""

import asyncio
import copy
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier
from typing import Any
from uuid import UUID

import pytest
from celery import Celery
from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import worker
from tests.rows import read_job, update_job
from worker import TrackedJob, aio, track
from worker.client import pace_models
from worker.client.connection import loaded_settings
from worker.coordination.wakeups import WakeUps
from worker.core.pacing.policy import PacedJob
from worker.errors import (
    NotTrackable,
    RefusedAddress,
    SchemaOutdated,
    Unavailable,
    WorkerError,
)
from worker.polling.duration_learner import DurationLearner
from worker.store.schema import bodies, jobs, outputs

KEY = "sk-canary/7f3a+9"
PROCESSING = {
    "status": "processing",
    "eta": 20.94,
    "messege": "Try to fetch request after seconds estimated",
    "fetch_result": "https://stablediffusionapi.com/api/v3/dreambooth/fetch/32798037",
    "id": 32798037,
    "output": [],
    "meta": {"model_id": "midjourney"},
}
READY = {
    "status": "success",
    "id": 41147071,
    "output": ["https://cdn/1.png", "https://cdn/2.png"],
    "proxy_links": ["https://proxy/1.png", "https://proxy/2.png"],
}


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that the Python API uses."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("SD_API_KEY", KEY)
    return engine


def _count(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(jobs)).scalar_one()


# ── track ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_remote_id_is_tracked_with_the_defaults(database: Engine) -> None:
    """The id is text or a number. The job is polled at SD_API_URL/fetch/{id} for the account `default`."""
    before = datetime.now(UTC) - timedelta(seconds=5)
    job = worker.get(worker.track(12202888))
    assert job is not None
    assert (job.remote_id, job.account, job.kind, job.status, job.polls) == (
        "12202888",
        "default",
        "image",
        "pending",
        0,
    )
    assert (job.priority, job.reference, job.eta, job.outputs, job.final) == (0, None, None, (), False)
    assert before < job.submitted_at < datetime.now(UTC) + timedelta(seconds=5)
    assert job.deadline_at - job.submitted_at == timedelta(seconds=3_600)
    with database.connect() as connection:
        row = connection.execute(select(jobs)).one()
    assert row.fetch_url == "https://stablediffusionapi.com/api/v3/fetch/12202888"


@pytest.mark.parametrize("shape", [dict, json.dumps], ids=["mapping", "text"])
def test_a_whole_submit_answer_is_tracked(database: Engine, shape: Callable[[dict[str, Any]], Any]) -> None:
    """The id, eta and fetch_result come from the answer."""
    job = worker.get(worker.track(shape(PROCESSING), reference="order 7", on_done="shop/pictures.ready", priority=3))
    assert job is not None
    assert (job.remote_id, job.eta, job.reference, job.priority) == ("32798037", 20.94, "order 7", 3)
    assert job.kind == "dreambooth/midjourney"
    with database.connect() as connection:
        row = connection.execute(select(jobs)).one()
    assert row.fetch_url == PROCESSING["fetch_result"]
    assert row.on_done == "shop/pictures.ready"


def test_a_ready_answer_is_downloaded_and_never_polled(database: Engine) -> None:
    """The job starts as downloading, with a row for each output and no poll due."""
    job = worker.get(worker.track(READY))
    assert job is not None
    assert (job.status, [output.url for output in job.outputs]) == ("downloading", READY["output"])
    assert [output.position for output in job.outputs] == [0, 1]
    assert job.ready_at is not None
    with database.connect() as connection:
        assert connection.execute(select(jobs.c.due_at)).scalar_one() is None


def test_a_ready_answer_without_an_id_is_identified_by_its_outputs(database: Engine) -> None:
    """Equal outputs are the same job; different outputs are another job."""
    answer = {"status": "success", "output": ["https://cdn/1.png"]}
    first = worker.track(answer)
    assert worker.track(json.dumps(answer)) == first
    assert worker.track({"status": "success", "output": ["https://cdn/2.png"]}) != first
    job = worker.get(first)
    assert job is not None
    assert job.remote_id.startswith("sha256:")
    assert len(job.remote_id) == len("sha256:") + 32
    job_by_remote_id = worker.get(remote_id=job.remote_id)
    assert job_by_remote_id is not None
    assert job_by_remote_id.id == first


def test_bytes_in_an_answer_are_stored_with_its_output(database: Engine) -> None:
    """The `url` of the output contains their hash."""
    worker.track({"status": "success", "id": "1", "output": ["data:image/png;base64,aGVsbG8="]})
    with database.connect() as connection:
        assert connection.execute(select(bodies.c.body)).scalars().all() == [b"hello"]
        url = connection.execute(select(outputs.c.url)).scalar_one()
    assert url.startswith("data:image/png;sha256=2cf24dba")


def test_tracking_the_same_job_again_returns_its_id_and_changes_nothing(database: Engine) -> None:
    """The options of the second call are ignored."""
    first = worker.track("7", reference="first", priority=1)
    again = worker.track("7", reference="second", priority=9)
    assert (first.created, again, again.created) == (True, first, False)
    assert worker.track(READY | {"id": "7"}, fetch_url="https://stablediffusionapi.com/api/v3/fetch/7") == first
    job = worker.get(first)
    assert job is not None
    assert (job.reference, job.priority, job.status, job.outputs) == ("first", 1, "pending", ())


def test_another_account_or_family_is_another_job(database: Engine) -> None:
    """A job is identified by account, fetch host and path without the id, and remote id."""
    video = "https://modelslab.com/api/v6/video/fetch/7"
    ids = [worker.track("7"), worker.track("7", account="shop"), worker.track("7", fetch_url=video)]
    assert len(set(ids)) == 3
    newest = worker.get(remote_id="7")
    assert newest is not None
    assert newest.id == ids[2]
    shop_job = worker.get(remote_id=7, account="shop")
    assert shop_job is not None
    assert shop_job.id == ids[1]


def test_many_jobs_are_tracked_in_order_and_duplicates_share_an_id(database: Engine) -> None:
    """Also for more jobs than one statement inserts."""
    ids = worker.track_many([str(number) for number in range(1, 1_201)] + ["1"])
    assert len(ids) == 1_201
    assert len(set(ids)) == 1_200
    assert ids[-1] == ids[0]
    job = worker.get(ids[700])
    assert job is not None
    assert job.remote_id == "701"
    assert worker.track_many([]) == []
    assert [tracked.created for tracked in worker.track_many(["1200", "1201", "1201"])] == [False, True, False]


def test_if_one_job_is_refused_none_is_tracked(database: Engine) -> None:
    with pytest.raises(NotTrackable, match="'no good'"):
        worker.track_many(["1", "no good", "2"])
    assert _count(database) == 0


def test_concurrent_batches_in_opposite_order_cause_no_deadlock(database: Engine) -> None:
    """All batches of the same jobs succeed, with the same ids."""
    names = [str(number) for number in range(1, 201)]
    barrier = Barrier(4)

    def track_all(backwards: bool) -> dict[str, int]:
        batch = names[::-1] if backwards else names
        barrier.wait(10)
        return dict(zip(batch, worker.track_many(batch), strict=True))

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(track_all, [False, True, False, True]))
    assert all(ids == results[0] for ids in results)
    assert _count(database) == 200


TRACKERS = """
import multiprocessing
from worker.client.tracking import track
fork = multiprocessing.get_context("fork")
together = fork.Barrier(8)
with fork.Pool(8, together.wait, (30,)) as processes:
    print(*processes.map(track, ["4711"] * 104, chunksize=13))
"""


def test_the_same_job_a_hundred_times_from_eight_processes_is_one_row(database: Engine) -> None:
    """There is one row and one id."""
    process = subprocess.run(
        [sys.executable, "-c", TRACKERS],
        cwd=Path(__file__).parents[2],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    ids = process.stdout.split()
    assert len(ids) == 104
    assert len(set(ids)) == 1
    assert _count(database) == 1


def test_the_job_is_committed_or_rolled_back_with_the_callers_session(database: Engine) -> None:
    """A rollback removes the job, a commit keeps it."""
    with Session(database) as session:
        assert worker.track("1", session=session) > 0
        worker.track(READY, session=session)
        session.rollback()
    assert _count(database) == 0

    with Session(database) as session, session.begin():
        job_id = worker.track("1", session=session)
        assert worker.track("1", session=session) == job_id
    assert _count(database) == 1
    assert worker.track("1") == job_id

    scoped = scoped_session(sessionmaker(database))
    worker.track_many(["2", "3"], session=scoped)
    scoped.commit()
    scoped.remove()
    assert _count(database) == 3


def test_workers_are_woken_after_the_commit_and_only_for_jobs_due_soon(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wake-up before the commit would find no job, and one for a later job would be useless."""
    job_counts: list[int] = []  # the number of committed jobs at each wake-up
    monkeypatch.setattr(WakeUps, "send", lambda _: job_counts.append(_count(database)))
    long_ago: dict[str, Any] = {"submitted_at": datetime.now(UTC) - timedelta(hours=1), "deadline": 86_400}

    worker.track("1")  # due in some seconds: the waiting poll run finds it by then
    worker.track(READY)  # never polled
    assert job_counts == []
    job_id = worker.track("2", **long_ago)
    assert job_counts == [3]
    worker.track_many(["3", "4"], **long_ago)
    assert job_counts == [3, 5]
    with Session(database) as session:
        worker.track("5", session=session, **long_ago)
        session.rollback()
    assert job_counts == [3, 5]
    with Session(database) as session:
        for number in ("5", "6"):  # the second round is independent of the first
            with session.begin_nested():
                worker.track(number, session=session, **long_ago)
            assert len(job_counts) == int(number) - 3
            session.commit()
            assert job_counts[-1] == int(number) + 1
    assert job_counts == [3, 5, 6, 7]
    update_job(database, job_id, due_at=datetime.now(UTC) + timedelta(hours=1))
    assert worker.nudge("2") == 1
    assert worker.nudge("unknown") == 0
    assert job_counts == [3, 5, 6, 7, 7]
    update_job(database, job_id, status="expired", due_at=None, completed_at=datetime.now(UTC), error_code="expired")
    assert worker.retry(job_id)
    assert not worker.retry(job_id)
    assert job_counts == [3, 5, 6, 7, 7, 7]


def test_a_refused_job_leaves_the_transaction_of_the_caller_usable(database: Engine) -> None:
    """The refused call sends nothing to the database."""
    with Session(database) as session, session.begin():
        worker.track("1", session=session)
        with pytest.raises(NotTrackable):
            worker.track("../2", session=session)
        worker.track("3", session=session)
    assert _count(database) == 2


def test_times_are_kept_in_utc_and_one_in_the_future_is_now(database: Engine) -> None:
    """The clocks of web servers differ; a submission can't be in the future."""
    now = datetime.now(UTC)
    old = worker.get(worker.track("1", submitted_at=now - timedelta(seconds=90), deadline=100))
    text = worker.get(worker.track("2", submitted_at="2026-01-01T12:00:00+05:00"))
    future = worker.get(worker.track("3", submitted_at=now + timedelta(hours=3)))
    assert old is not None
    assert text is not None
    assert future is not None
    assert abs((now - old.submitted_at).total_seconds() - 90) < 0.001
    assert old.deadline_at - old.submitted_at == timedelta(seconds=100)
    assert text.submitted_at == datetime(2026, 1, 1, 7, tzinfo=UTC)
    assert abs((future.submitted_at - now).total_seconds()) < 10


@pytest.mark.parametrize(
    ("kind", "seconds"), [("text2video", 7_200), ("training", 14_400), ("image", 3_600), ("video/x", 7_200)]
)
def test_slow_kinds_have_later_deadlines(database: Engine, kind: str, seconds: int) -> None:
    """Two hours for video and four hours for training."""
    job = worker.get(worker.track("1", kind=kind))
    assert job is not None
    assert (job.deadline_at - job.submitted_at).total_seconds() == seconds


WHAT_TO_PASS = "pass the response of the submit call, its JSON, or the remote id"
NO_REMOTES: list[tuple[Any, str]] = [
    (None, f"{WHAT_TO_PASS} (text or a whole number), not None: the submit call returned nothing"),
    ("", f"the remote id is empty: {WHAT_TO_PASS}"),
    (" \n", f"the remote id is empty: {WHAT_TO_PASS}"),
    (True, f"{WHAT_TO_PASS} (text or a whole number), not bool"),
    (False, f"{WHAT_TO_PASS} (text or a whole number), not bool"),
    ({"status": "processing", "id": 0}, "neither an id nor outputs"),
    ("None", "'None' is not an id of the API"),
    ("null", "'null' is not an id of the API"),
    ("undefined", "'undefined' is not an id of the API"),
    ("NaN", "'NaN' is not an id of the API"),
    ({"status": "processing", "id": "null"}, "'null' is not an id of the API"),
    (-5, "'-5' can't be a remote id"),
    ("-1", "'-1' can't be a remote id"),
    ({"status": "processing", "id": -7}, "'-7' can't be a remote id"),
    (0.0, f"{WHAT_TO_PASS} (text or a whole number), not float"),
    (7.0, "not float"),
    (1.5, "not float"),
    (float("nan"), "not float"),
    (1j, "not complex"),
    (b"12", "not bytes: an id in bytes must be decoded"),
    (b"", "not bytes: an id in bytes must be decoded"),
    (bytearray(b"12"), "not bytearray: an id in bytes must be decoded"),
    (memoryview(b"12"), "not memoryview: an answer in a memoryview must be converted to bytes"),
    (memoryview(b'{"id": 7}'), "not memoryview: an answer in a memoryview must be converted to bytes"),
    (UUID(int=7), "not UUID: write str() around it"),
    (["12"], "not list: call track_many for several jobs"),
    (("12", "13"), "call track_many for several jobs"),
    (object(), f"{WHAT_TO_PASS} (text or a whole number), not object"),
    (dict, "not type"),
]


@pytest.mark.parametrize(("remote", "reason"), NO_REMOTES, ids=range(len(NO_REMOTES)))
def test_a_value_that_is_no_answer_and_no_id_is_refused_by_each_call(
    remote: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`track` and `track_many`, also of `worker.aio`. No query is made: this database does not exist."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/none")
    calls: list[Callable[[], object]] = [
        lambda: worker.track(remote),
        lambda: worker.track_many([remote]),
        lambda: worker.track_many(["1", remote]),
        lambda: asyncio.run(aio.track(remote)),
        lambda: asyncio.run(aio.track_many([remote])),
    ]
    for call in calls:
        with pytest.raises(NotTrackable) as refused:
            call()
        assert reason in str(refused.value)
        assert "\n" not in str(refused.value)


OVERLONG = "x" * 300
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ("../../v1/enterprise/flux/clear_queue", {}, "can't be a remote id"),
    ("1/2", {}, "can't be a remote id"),
    ("1\n", {"fetch_url": "https://modelslab.com/api/v3/fetch/1\n"}, "refused"),
    ("१२", {}, "can't be a remote id"),
    ("1" * 129, {}, "can't be a remote id"),
    (10**5_000, {}, "remote id"),
    ("{", {}, "not a JSON object"),
    ("{}", {}, "there is no job to track"),
    ({}, {}, "there is no job to track"),
    ({"status": "processing", "id": None, "output": []}, {}, "there is no job to track"),
    ({"status": "success", "output": []}, {}, "there is no job to track"),
    ({"status": "error", "message": "Invalid prompt"}, {}, "Invalid prompt"),
    ({"status": "failed", "id": 5, "messege": "NSFW"}, {}, "NSFW"),
    ({"status": "processing", "id": {"a": 1}}, {}, "not dict"),
    ({"status": "processing", "id": "1", "fetch_result": 5}, {}, "fetch_result"),
    ({"status": "processing", "id": "1", "fetch_result": "https://evil.test/api/v3/fetch/1"}, {}, "SD_API_HOSTS"),
    ("1", {"fetch_url": "https://evil.test/api/v3/fetch/1"}, "SD_API_HOSTS"),
    ("1", {"fetch_url": "http://modelslab.com/api/v3/fetch/1"}, "https"),
    ("1", {"fetch_url": "https://modelslab.com:444/api/v3/fetch/1"}, "SD_API_HOSTS"),
    ("1", {"fetch_url": "https://u:p@modelslab.com/api/v3/fetch/1"}, "refused"),
    ("1", {"fetch_url": "https://modelslab.com/api/v3/fetch/1?x=1"}, "refused"),
    ("1", {"fetch_url": "https://modelslab.com/api/v3/fetch/1#x"}, "refused"),
    ("1", {"fetch_url": "https://modelslab.com/api/v3/../fetch/1"}, "refused"),
    ("1", {"fetch_url": "https://modelslab.com/api/v3/%66etch/1"}, "refused"),
    ("1", {"fetch_url": "https://modelslab.com/api/v3/fetch/2"}, "it has the id"),
    ("1", {"fetch_url": "https://modelslab.com/api/v1/enterprise/flux/clear_queue"}, "is not a fetch path"),
    ("1", {"fetch_url": 123}, "fetch_url"),
    ("1", {"account": ""}, "is not a valid account name"),
    ("1", {"account": "a b"}, "is not a valid account name"),
    ("1", {"account": None}, "is not a valid account name"),
    ("1", {"account": "x" * 65}, "is not a valid account name"),
    ("1", {"kind": OVERLONG}, "kind"),
    ("1", {"kind": 5}, "kind"),
    ("1", {"kind": "a\x00b"}, "kind"),
    ("1", {"reference": OVERLONG}, "reference"),
    ("1", {"reference": "a\x00b"}, "reference"),
    ("1", {"reference": "\ud800"}, "reference"),
    ("1", {"reference": ["a"]}, "reference"),
    ("1", {"on_done": ""}, "on_done"),
    ("1", {"on_done": "queue/"}, "on_done"),
    ("1", {"on_done": "/task"}, "on_done"),
    ("1", {"on_done": OVERLONG}, "on_done"),
    ("1", {"webhook_url": "https://shop.test/hook"}, "set WEBHOOK_SECRET"),
    ("1", {"webhook_url": "shop.test/hook"}, "webhook_url must be an https: URL"),
    ("1", {"priority": 1_001}, "priority"),
    ("1", {"priority": "high"}, "priority"),
    ("1", {"priority": True}, "priority"),
    ("1", {"deadline": 0}, "deadline"),
    ("1", {"deadline": -5}, "deadline"),
    ("1", {"deadline": float("nan")}, "deadline"),
    ("1", {"deadline": float("inf")}, "deadline"),
    ("1", {"deadline": 1e30}, "deadline"),
    ("1", {"deadline": "1h"}, "deadline"),
    ("1", {"eta": float("nan")}, "eta"),
    ("1", {"submitted_at": datetime(2026, 1, 1)}, "time zone"),
    ("1", {"submitted_at": "2026-01-01T00:00:00"}, "time zone"),
    ("1", {"submitted_at": "yesterday"}, "ISO 8601"),
    ("1", {"submitted_at": "0001-01-01T00:00:00+14:00"}, "submitted_at"),
    ("1", {"submitted_at": 1_700_000_000}, "time zone"),
]


@pytest.mark.parametrize(("remote", "options", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_an_invalid_job_is_refused_with_a_reason_and_nothing_is_written(
    remote: object,
    options: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No query is made: this database does not exist."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/none")
    with pytest.raises(NotTrackable) as refused:
        worker.track(remote, **options)
    message = str(refused.value)
    assert reason in message
    assert "\n" not in message
    assert len(message) < 800


def test_a_foreign_fetch_url_raises_refused_address(database: Engine) -> None:
    """RefusedAddress is a NotTrackable, a ValueError and a WorkerError."""
    with pytest.raises(RefusedAddress) as refused:
        worker.track("1", fetch_url="https://evil.test/api/v3/fetch/1")
    assert isinstance(refused.value, (NotTrackable, ValueError, WorkerError))
    assert _count(database) == 0


def test_webhook_urls_need_a_secret_and_plain_http_needs_an_allowed_network(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The secret is never stored."""
    secret = "whsec_" + "c2VjcmV0" * 4
    monkeypatch.setenv("WEBHOOK_SECRET", f"{secret}, {secret}")
    loaded_settings.cache_clear()
    track("1", webhook_url="https://shop.test/hook")
    for refused_url in ("http://shop.test/hook", "https://shop.test:8443/hook", "https://10.0.0.1/hook"):
        with pytest.raises(NotTrackable, match="WEBHOOK_ALLOWED_NETWORKS"):
            track("2", webhook_url=refused_url)
    with pytest.raises(NotTrackable) as refused:
        track("2", webhook_url=f"https://user:{secret}@shop.test/hook")
    assert secret not in str(refused.value)
    monkeypatch.setenv("WEBHOOK_ALLOWED_NETWORKS", "10.0.0.0/8")
    loaded_settings.cache_clear()
    track("3", webhook_url=f"http://10.0.0.1/{secret}")
    with database.connect() as connection:
        urls = list(connection.execute(select(jobs.c.webhook_url).order_by(jobs.c.id)).scalars())
    assert urls[0] == "https://shop.test/hook"
    assert secret not in urls[1]


def test_on_done_accepts_only_the_listed_tasks(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With or without a queue. Without ON_DONE_TASKS every task is accepted."""
    monkeypatch.setenv("ON_DONE_TASKS", "shop.ready, , shop.failed")
    worker.track("1", on_done="shop.ready")
    worker.track("2", on_done="some-queue/shop.failed")
    with pytest.raises(NotTrackable, match=r"ON_DONE_TASKS allows only shop\.failed, shop\.ready"):
        worker.track("3", on_done="os.system")


@pytest.mark.parametrize(
    ("remote", "options"),
    [
        ({"status": "error", "message": f"the key {KEY} is bad"}, {}),
        (KEY, {}),
        ("1", {"fetch_url": f"https://modelslab.com/api/v3/fetch/1?key={KEY}"}),
        ("1", {"account": KEY}),
        ("1", {"submitted_at": KEY}),
        ("1", {"on_done": f"/{KEY}"}),
        ("1", {"eta": KEY}),
    ],
)
def test_no_error_message_contains_a_key(database: Engine, remote: object, options: dict[str, Any]) -> None:
    """Callers log the errors that they catch."""
    with pytest.raises(NotTrackable) as refused:
        worker.track(remote, **options)
    assert KEY not in str(refused.value)


def test_no_row_contains_a_key(database: Engine) -> None:
    """Keys are removed from every text, also from submit answers."""
    answer = {
        "status": "success",
        "id": "1",
        "output": [f"https://cdn/a.png?key={KEY}"],
        "proxy_links": [f"https://proxy/a.png?key={KEY}"],
        "model_id": KEY,
    }
    worker.track(answer, reference=f"ref {KEY}")
    worker.track("2", kind=KEY, on_done=f"task.{KEY}".replace("/", "."))
    with database.connect() as connection:
        rows = [*connection.execute(select(jobs)), *connection.execute(select(outputs))]
    assert KEY not in "\n".join(map(repr, rows))


# ── no database, no tables ────────────────────────────────────────────────────────────────────────────────────────────


def test_missing_tables_raise_schema_outdated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names `fetch-worker migrate`, also with the session of the caller."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    with pytest.raises(SchemaOutdated, match="fetch-worker migrate"):
        worker.track("1")
    with pytest.raises(SchemaOutdated, match="fetch-worker migrate"):
        worker.get(1)
    engine = create_engine(f"sqlite:///{tmp_path}/app.db")
    with Session(engine) as session, pytest.raises(SchemaOutdated, match="fetch-worker migrate") as missing:
        worker.track("1", session=session)
    assert f"{tmp_path}/app.db has no tables" in str(missing.value)
    assert f"DATABASE_URL names another: sqlite:///{tmp_path}/new.db" in str(missing.value)
    engine.dispose()


def test_an_unreachable_database_raises_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is one line with the address and without the password."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://app:hidden-word@127.0.0.1:1/shop")
    with pytest.raises(Unavailable) as unavailable:
        worker.track("1")
    message = str(unavailable.value)
    assert "127.0.0.1" in message
    assert "hidden-word" not in message
    assert "\n" not in message


# ── the first poll ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_poll_is_planned_from_earlier_jobs_of_the_kind(database: Engine) -> None:
    learner = DurationLearner(database)
    learner.prepare([("default", "slow")])
    for _ in range(60):
        learner.observe("default", "slow", PacedJob(100.0, 95.0), ready=True, planned=100.0)
    learner.share()
    pace_models.clear_cache()

    before = datetime.now(UTC)
    learned, new_kind = track("1", kind="slow"), track("2", kind="slow", account="another")
    late = track("3", kind="slow", submitted_at=before - timedelta(seconds=200))

    assert 60.0 < (read_job(database, learned).due_at - before).total_seconds() < 110.0
    assert (read_job(database, new_kind).due_at - before).total_seconds() < 5.0
    assert (read_job(database, late).due_at - before).total_seconds() < 5.0


# ── sessions ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_job_is_committed_or_rolled_back_with_a_connection(database: Engine) -> None:
    """Also in a savepoint of it."""
    with database.connect() as connection:
        track("1", session=connection)
        connection.rollback()
        track("2", session=connection)
        savepoint = connection.begin_nested()
        track("3", session=connection)
        savepoint.rollback()
        with connection.begin_nested():
            track("4", session=connection)
        connection.commit()
    assert [job.remote_id for job in worker.find()] == ["4", "2"]


def test_workers_are_woken_by_the_commit_of_a_connection_once(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[str] = []
    monkeypatch.setattr(WakeUps, "send", lambda _: woken.append("woken"))
    long_ago: dict[str, Any] = {"submitted_at": datetime.now(UTC) - timedelta(hours=1), "deadline": 86_400}

    with database.connect() as connection:
        track("1", session=connection, **long_ago)
        track("2", session=connection, **long_ago)
        assert woken == []
        connection.commit()

    assert woken == ["woken"]


class Database:
    """Like Flask-SQLAlchemy's `db`."""

    session = scoped_session(sessionmaker())


class Strange:
    """Has a `connection`, but not one of SQLAlchemy's."""

    def connection(self) -> str:
        return "none"


@pytest.mark.parametrize(
    ("session", "advice"),
    [
        (
            create_engine("sqlite://"),
            "this is of type Engine, write `with Session(engine) as session, session.begin(): ",
        ),
        (sessionmaker(), "this is of type sessionmaker, write `with Session(engine) as session, session.begin(): "),
        (Session, "this is the class Session itself, write `with Session(engine) as session, session.begin(): "),
        (Database(), "this is of type Database, write `track(…, session=db.session)`"),
        (Strange(), "write `track(…, session=session)` with the session of your transaction, or leave it out"),
        ("session", "this is of type str, write `track(…, session=session)`"),
        (5, "this is of type int, write "),
        (Session(), "session has no engine of its own: write `track(…, session=session.connection(bind_arguments="),
    ],
)
def test_what_is_no_session_is_refused_with_the_line_to_write(database: Engine, session: Any, advice: str) -> None:
    with pytest.raises(NotTrackable) as refused:
        track("1", session=session)
    assert advice in str(refused.value)
    assert _count(database) == 0


def test_a_closed_connection_is_refused(database: Engine) -> None:
    connection = database.connect()
    connection.close()
    with pytest.raises(NotTrackable, match="session is a closed Connection"):
        track("1", session=connection)


# ── what people pass ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_references_tasks_and_durations_of_other_types_are_taken(database: Engine) -> None:
    app = Celery("shop", broker="memory://")
    app.conf.task_routes = {"shop.routed": {"queue": "orders"}}

    @app.task(name="shop.ready", shared=False)  # type: ignore[untyped-decorator]  # celery has no types
    def ready(job_id: int) -> None: ...

    @app.task(name="shop.routed", shared=False)  # type: ignore[untyped-decorator]  # the same
    def routed(job_id: int) -> None: ...

    @app.task(name="shop.late", shared=False, lazy=True)  # type: ignore[untyped-decorator]  # the same
    def late(job_id: int) -> None: ...

    order = UUID("12345678-1234-5678-1234-567812345678")
    first = track("1", reference=order, on_done=ready, deadline=timedelta(minutes=2), eta=timedelta(seconds=9))
    track("2", reference=77, on_done=routed)
    track("3", on_done=late)

    job = worker.get(first)
    assert job is not None
    assert (job.reference, job.eta) == (str(order), 9.0)
    assert job.deadline_at - job.submitted_at == timedelta(minutes=2)
    with database.connect() as connection:
        tasks = list(connection.execute(select(jobs.c.on_done).order_by(jobs.c.id)).scalars())
    assert tasks == ["celery/shop.ready", "orders/shop.routed", "celery/shop.late"]


@pytest.mark.parametrize(
    ("remotes", "message"),
    [
        ("12345", "this is one job: call track, or write `track_many([…])`"),
        (b"12345", "this is one job"),
        (READY, "this is one job"),
        (json.dumps(READY), "this is one job"),
        (5, "track_many needs a list of jobs, not int"),
        (None, "track_many needs a list of jobs, not NoneType"),
    ],
)
def test_one_job_instead_of_a_list_is_refused(database: Engine, remotes: Any, message: str) -> None:
    with pytest.raises(NotTrackable) as refused:
        worker.track_many(remotes)
    assert message in str(refused.value)
    assert _count(database) == 0


def test_a_coroutine_that_was_not_awaited_is_refused_with_advice(database: Engine) -> None:
    async def submit() -> str:
        return "1"

    coroutine = submit()
    with pytest.raises(NotTrackable, match="not coroutine: write `await` before the call that returns it"):
        track(coroutine)
    coroutine.close()


def test_any_iterable_of_jobs_is_taken(database: Engine) -> None:
    assert len(worker.track_many(str(number) for number in range(1, 4))) == 3
    assert len(worker.track_many({"7", "8"})) == 2
    assert len(worker.track_many(("9",))) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("account", 5), ("account", ["a"]), ("kind", ["a"]), ("kind", 5), ("endpoint", 5), ("endpoint", b"v3"),
        ("fetch_url", b"x"), ("eta", "soon"), ("eta", []), ("eta", timedelta(-1)), ("submitted_at", 5),
        ("submitted_at", []), ("priority", 1.5), ("priority", None), ("reference", b"a"), ("reference", True),
        ("reference", 1.5), ("on_done", 5), ("on_done", print), ("on_done", object()), ("webhook_url", 5),
        ("webhook_url", ["https://a.test"]), ("deadline", []), ("deadline", timedelta(0)), ("deadline", object()),
    ],
)  # fmt: skip
def test_a_wrong_type_is_never_a_type_error(database: Engine, option: str, value: Any) -> None:
    options: Any = {option: value}
    with pytest.raises(NotTrackable, match=option):
        track("1", **options)
    assert _count(database) == 0


def test_a_tracked_job_is_an_int_that_survives_copies_and_json(database: Engine) -> None:
    tracked = track("1")
    for copied in (copy.copy(tracked), copy.deepcopy(tracked), pickle.loads(pickle.dumps(tracked))):  # noqa: S301
        assert isinstance(copied, TrackedJob)
        assert (copied, copied.created) == (tracked, True)
    assert json.dumps({"id": tracked}) == f'{{"id": {int(tracked)}}}'
    assert f"{tracked} {tracked!r}" == f"{int(tracked)} {int(tracked)}"


def test_a_tracked_job_is_a_value_for_each_database_driver(database: Engine) -> None:
    """An app stores it in a column of its own."""
    tracked = track("1")
    with database.connect() as connection:
        assert connection.execute(select(jobs.c.id).where(jobs.c.id == tracked)).scalar_one() == tracked
        assert connection.execute(select(jobs.c.id).where(jobs.c.id.in_([tracked]))).scalar_one() == tracked


def test_the_help_of_track_describes_each_keyword() -> None:
    signature = inspect.signature(track)
    text = inspect.getdoc(track) or ""
    for name, parameter in signature.parameters.items():
        assert parameter.kind is not inspect.Parameter.VAR_KEYWORD
        assert parameter.annotation is not inspect.Parameter.empty
        assert re.search(rf"^{name}$", text, re.MULTILINE), name
    assert list(signature.parameters)[1:] == list(inspect.signature(worker.track_many).parameters)[1:]
