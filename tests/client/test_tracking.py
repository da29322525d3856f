"""The Python front door on real databases: what is taken, what is refused, and that nothing is half done."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, func, insert, select, update
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import worker
from tests.rows import add_downloading, add_output
from worker import track
from worker.client import tracking
from worker.client.tracking import track_with_created
from worker.coordination.wakeups import WakeUps
from worker.core.pacing.policy import PacedJob
from worker.errors import (
    JobNotFound,
    NotTrackable,
    RefusedAddress,
    SchemaOutdated,
    Unavailable,
    WaitTimeout,
    WorkerError,
)
from worker.polling.pace_learner import PaceLearner
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
def door(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The database that the front door uses, with our tables in it."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("SD_API_KEY", KEY)
    return engine


def _count(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(jobs)).scalar_one()


def _set(engine: Engine, job_id: int, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))


# ── track ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_bare_id_is_tracked_with_the_defaults(door: Engine) -> None:
    """Text or number; asked at SD_API_URL/fetch/{id} for the account `default`."""
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
    with door.connect() as connection:
        row = connection.execute(select(jobs)).one()
    assert row.fetch_url == "https://stablediffusionapi.com/api/v3/fetch/12202888"


@pytest.mark.parametrize("shape", [dict, json.dumps], ids=["mapping", "text"])
def test_a_submit_answer_is_taken_whole(door: Engine, shape: Callable[[dict[str, Any]], Any]) -> None:
    """id, eta and fetch_result come from the answer."""
    job = worker.get(worker.track(shape(PROCESSING), reference="order 7", on_done="shop/pictures.ready", priority=3))
    assert job is not None
    assert (job.remote_id, job.eta, job.reference, job.priority) == ("32798037", 20.94, "order 7", 3)
    assert job.kind == "dreambooth/midjourney"
    with door.connect() as connection:
        row = connection.execute(select(jobs)).one()
    assert row.fetch_url == PROCESSING["fetch_result"]
    assert row.on_done == "shop/pictures.ready"


def test_an_answer_that_is_ready_is_never_polled_only_downloaded(door: Engine) -> None:
    """Downloading from the start, with an output row for each, and nothing due for a poll."""
    job = worker.get(worker.track(READY))
    assert job is not None
    assert (job.status, [output.url for output in job.outputs]) == ("downloading", READY["output"])
    assert [output.position for output in job.outputs] == [0, 1]
    assert job.ready_at is not None
    with door.connect() as connection:
        assert connection.execute(select(jobs.c.due_at)).scalar_one() is None


def test_a_ready_answer_without_an_id_is_known_by_its_outputs(door: Engine) -> None:
    """The same outputs are the same job; others are another one."""
    answer = {"status": "success", "output": ["https://cdn/1.png"]}
    first = worker.track(answer)
    assert worker.track(json.dumps(answer)) == first
    assert worker.track({"status": "success", "output": ["https://cdn/2.png"]}) != first
    job = worker.get(first)
    assert job is not None
    assert job.remote_id.startswith("sha256:")
    assert len(job.remote_id) == len("sha256:") + 32
    found = worker.get(remote_id=job.remote_id)
    assert found is not None
    assert found.id == first


def test_bytes_that_an_answer_carries_are_kept_beside_its_output(door: Engine) -> None:
    """`url` then holds their hash."""
    worker.track({"status": "success", "id": "1", "output": ["data:image/png;base64,aGVsbG8="]})
    with door.connect() as connection:
        assert connection.execute(select(bodies.c.body)).scalars().all() == [b"hello"]
        url = connection.execute(select(outputs.c.url)).scalar_one()
    assert url.startswith("data:image/png;sha256=2cf24dba")


def test_the_same_job_again_answers_its_id_and_changes_nothing(door: Engine) -> None:
    """Whatever the second call says."""
    first = worker.track("7", reference="first", priority=1)
    assert track_with_created(["7"], reference="second", priority=9) == [(first, False)]
    assert worker.track(READY | {"id": "7"}, fetch_url="https://stablediffusionapi.com/api/v3/fetch/7") == first
    job = worker.get(first)
    assert job is not None
    assert (job.reference, job.priority, job.status, job.outputs) == ("first", 1, "pending", ())


def test_another_account_or_family_is_another_job(door: Engine) -> None:
    """Identity is account, fetch host and path without the id, remote id."""
    video = "https://modelslab.com/api/v6/video/fetch/7"
    ids = [worker.track("7"), worker.track("7", account="shop"), worker.track("7", fetch_url=video)]
    assert len(set(ids)) == 3
    found = worker.get(remote_id="7")
    assert found is not None
    assert found.id == ids[2]
    mine = worker.get(remote_id=7, account="shop")
    assert mine is not None
    assert mine.id == ids[1]


def test_many_are_tracked_in_order_and_twins_share_an_id(door: Engine) -> None:
    """Also more than one statement takes."""
    ids = worker.track_many([str(number) for number in range(1, 1_201)] + ["1"])
    assert len(ids) == 1_201
    assert len(set(ids)) == 1_200
    assert ids[-1] == ids[0]
    job = worker.get(ids[700])
    assert job is not None
    assert job.remote_id == "701"
    assert worker.track_many([]) == []
    assert [created for _, created in track_with_created(["1200", "1201"])] == [False, True]


def test_one_that_cant_be_tracked_keeps_all_others_out(door: Engine) -> None:
    """All or none."""
    with pytest.raises(NotTrackable, match="'no good'"):
        worker.track_many(["1", "no good", "2"])
    assert _count(door) == 0


def test_many_at_once_in_opposite_order_never_block_each_other(door: Engine) -> None:
    """Two batches of the same jobs from two sides: both succeed, with the same ids."""
    names = [str(number) for number in range(200)]
    barrier = Barrier(4)

    def track_all(backwards: bool) -> dict[str, int]:
        chosen = names[::-1] if backwards else names
        barrier.wait(10)
        return dict(zip(chosen, worker.track_many(chosen), strict=True))

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(track_all, [False, True, False, True]))
    assert all(one == found[0] for one in found)
    assert _count(door) == 200


TRACKERS = """
import multiprocessing
from worker.client.tracking import track
fork = multiprocessing.get_context("fork")
together = fork.Barrier(8)
with fork.Pool(8, together.wait, (30,)) as processes:
    print(*processes.map(track, ["4711"] * 104, chunksize=13))
"""


def test_the_same_job_a_hundred_times_from_eight_processes_is_one_row(door: Engine) -> None:
    """One row, one id, whoever was first."""
    done = subprocess.run(
        [sys.executable, "-c", TRACKERS],
        cwd=Path(__file__).parents[2],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ids = done.stdout.split()
    assert len(ids) == 104
    assert len(set(ids)) == 1
    assert _count(door) == 1


def test_a_callers_session_decides_whether_the_job_stays(door: Engine) -> None:
    """Roll-back leaves nothing, commit keeps, and until then nobody else sees it."""
    with Session(door) as session:
        assert worker.track("1", session=session) > 0
        worker.track(READY, session=session)
        session.rollback()
    assert _count(door) == 0

    with Session(door) as session, session.begin():
        job_id = worker.track("1", session=session)
        assert worker.track("1", session=session) == job_id
    assert _count(door) == 1
    assert worker.track("1") == job_id

    scoped = scoped_session(sessionmaker(door))
    worker.track_many(["2", "3"], session=scoped)
    scoped.commit()
    scoped.remove()
    assert _count(door) == 3


def test_who_waits_for_work_is_woken_after_the_commit_and_only_for_what_is_due_soon(
    door: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wake-up before the commit would find nothing; one for later work would cost a look for nothing."""
    seen: list[int] = []  # how many jobs are there for everybody as a wake-up is sent
    monkeypatch.setattr(WakeUps, "send", lambda _: seen.append(_count(door)))
    long_ago: dict[str, Any] = {"submitted_at": datetime.now(UTC) - timedelta(hours=1), "deadline": 86_400}

    worker.track("1")  # asked about in some seconds: the waiting run knows by then
    worker.track(READY)  # not asked about at all
    assert seen == []
    job_id = worker.track("2", **long_ago)
    assert seen == [3]
    worker.track_many(["3", "4"], **long_ago)
    assert seen == [3, 5]
    with Session(door) as session:
        worker.track("5", session=session, **long_ago)
        session.rollback()
    assert seen == [3, 5]
    with Session(door) as session:
        for number in ("5", "6"):  # the second time round nothing is left of the first
            with session.begin_nested():
                worker.track(number, session=session, **long_ago)
            assert len(seen) == int(number) - 3
            session.commit()
            assert seen[-1] == int(number) + 1
    assert seen == [3, 5, 6, 7]
    _set(door, job_id, due_at=datetime.now(UTC) + timedelta(hours=1))
    assert worker.nudge("2") == 1
    assert worker.nudge("nobody") == 0
    assert seen == [3, 5, 6, 7, 7]
    _set(door, job_id, status="expired", due_at=None, completed_at=datetime.now(UTC), error_code="expired")
    assert worker.retry(job_id)
    assert not worker.retry(job_id)
    assert seen == [3, 5, 6, 7, 7, 7]


def test_a_refused_job_leaves_the_callers_transaction_usable(door: Engine) -> None:
    """Nothing was sent to the database when the call was refused."""
    with Session(door) as session, session.begin():
        worker.track("1", session=session)
        with pytest.raises(NotTrackable):
            worker.track("../2", session=session)
        worker.track("3", session=session)
    assert _count(door) == 2


def test_times_are_kept_in_utc_and_one_in_the_future_is_now(door: Engine) -> None:
    """Clocks of web servers differ; a job can't have been submitted later than now."""
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
def test_long_kinds_have_long_deadlines(door: Engine, kind: str, seconds: int) -> None:
    """Video two hours, training four."""
    job = worker.get(worker.track("1", kind=kind))
    assert job is not None
    assert (job.deadline_at - job.submitted_at).total_seconds() == seconds


OVERLONG = "x" * 300
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "can't be a remote id"),
    ("../../v1/enterprise/flux/clear_queue", {}, "can't be a remote id"),
    ("1/2", {}, "can't be a remote id"),
    ("-1", {}, "can't be a remote id"),
    (-5, {}, "can't be a remote id"),
    ("1\n", {"fetch_url": "https://modelslab.com/api/v3/fetch/1\n"}, "refused"),
    ("१२", {}, "can't be a remote id"),
    ("1" * 129, {}, "can't be a remote id"),
    (10**5_000, {}, "remote id"),
    (True, {}, "not bool"),
    (None, {}, "not NoneType"),
    (1.5, {}, "not float"),
    (b"12", {}, "not bytes"),
    (["12"], {}, "not list"),
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
    ("1", {"account": ""}, "can't be an account"),
    ("1", {"account": "a b"}, "can't be an account"),
    ("1", {"account": None}, "can't be an account"),
    ("1", {"account": "x" * 65}, "can't be an account"),
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


@pytest.mark.parametrize(("remote", "options", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_cant_be_a_job_is_refused_with_a_reason_before_anything_is_written(
    remote: object,
    options: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No database is asked at all: there is none here."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/none")
    with pytest.raises(NotTrackable) as refused:
        worker.track(remote, **options)
    said = str(refused.value)
    assert words in said
    assert "\n" not in said
    assert len(said) < 800


def test_a_foreign_address_is_refused_by_its_own_error(door: Engine) -> None:
    """RefusedAddress is a NotTrackable, a ValueError and a WorkerError."""
    with pytest.raises(RefusedAddress) as refused:
        worker.track("1", fetch_url="https://evil.test/api/v3/fetch/1")
    assert isinstance(refused.value, (NotTrackable, ValueError, WorkerError))
    assert _count(door) == 0


def test_with_a_secret_a_webhook_address_is_kept_and_plain_http_is_for_networks_of_ones_own(
    door: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The secret itself is nowhere."""
    secret = "whsec_" + "c2VjcmV0" * 4
    monkeypatch.setenv("WEBHOOK_SECRET", f"{secret}, {secret}")
    tracking._settings.cache_clear()
    track("1", webhook_url="https://shop.test/hook")
    for wrong in ("http://shop.test/hook", "https://shop.test:8443/hook", "https://10.0.0.1/hook"):
        with pytest.raises(NotTrackable, match="WEBHOOK_ALLOWED_NETWORKS"):
            track("2", webhook_url=wrong)
    with pytest.raises(NotTrackable) as refused:
        track("2", webhook_url=f"https://user:{secret}@shop.test/hook")
    assert secret not in str(refused.value)
    monkeypatch.setenv("WEBHOOK_ALLOWED_NETWORKS", "10.0.0.0/8")
    tracking._settings.cache_clear()
    track("3", webhook_url=f"http://10.0.0.1/{secret}")
    with door.connect() as connection:
        kept = list(connection.execute(select(jobs.c.webhook_url).order_by(jobs.c.id)).scalars())
    assert kept[0] == "https://shop.test/hook"
    assert secret not in kept[1]


def test_only_listed_tasks_may_be_called_when_done(door: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With or without a queue; without ON_DONE_TASKS any."""
    monkeypatch.setenv("ON_DONE_TASKS", "shop.ready, , shop.failed")
    worker.track("1", on_done="shop.ready")
    worker.track("2", on_done="some-queue/shop.failed")
    with pytest.raises(NotTrackable, match=r"ON_DONE_TASKS lists shop\.failed, shop\.ready"):
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
def test_no_message_shows_a_key(door: Engine, remote: object, options: dict[str, Any]) -> None:
    """Callers log what they catch."""
    with pytest.raises(NotTrackable) as refused:
        worker.track(remote, **options)
    assert KEY not in str(refused.value)


def test_no_row_keeps_a_key(door: Engine) -> None:
    """Every text from outside passes the scrubber, also what a submit answer carries."""
    answer = {
        "status": "success",
        "id": "1",
        "output": [f"https://cdn/a.png?key={KEY}"],
        "proxy_links": [f"https://proxy/a.png?key={KEY}"],
        "model_id": KEY,
    }
    worker.track(answer, reference=f"ref {KEY}")
    worker.track("2", kind=KEY, on_done=f"task.{KEY}".replace("/", "."))
    with door.connect() as connection:
        rows = [*connection.execute(select(jobs)), *connection.execute(select(outputs))]
    assert KEY not in "\n".join(map(repr, rows))


# ── get, cancel, retry, nudge, wait ───────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_there_is_none_or_an_error_that_says_so(door: Engine) -> None:
    """Looking up answers None; acting on it raises. However large the number is."""
    for job_id in (4_711, 0, -1, 2**63, 10**30):
        assert worker.get(job_id) is None
        for act in (worker.cancel, worker.retry, worker.wait):
            with pytest.raises(JobNotFound, match=f"no job {job_id}"):
                act(job_id)
    assert worker.get(remote_id="4711") is None
    assert worker.nudge("4711") == 0
    assert worker.nudge("sha256:" + "0" * 32) == 0


@pytest.mark.parametrize("remote_id", ["", "a/b", "sha256:\x00", "sha256:short", "x" * 200, None, "\ud800"])
def test_a_remote_id_that_cant_be_one_is_refused(door: Engine, remote_id: Any) -> None:
    """By each door, before the database is asked."""
    with pytest.raises(NotTrackable):
        worker.get(remote_id=remote_id)
    with pytest.raises(NotTrackable):
        worker.nudge(remote_id)


def test_cancel_and_retry_say_whether_they_changed_anything(door: Engine) -> None:
    """Cancel ends what is not final; retry takes up what failed."""
    job_id = worker.track("1")
    assert worker.retry(job_id) is False
    assert worker.cancel(job_id) is True
    assert worker.cancel(job_id) is False
    assert worker.retry(job_id) is False
    other = worker.track("2", deadline=60)
    _set(door, other, status="expired", due_at=None, completed_at=datetime.now(UTC), error_code="expired")
    assert worker.retry(other) is True
    job = worker.get(other)
    assert job is not None
    assert (job.status, job.error_code, job.completed_at) == ("pending", None, None)
    assert job.deadline_at > datetime.now(UTC) + timedelta(seconds=50)


def test_a_nudge_brings_all_jobs_with_that_id_forward_but_not_too_soon(
    door: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Due now, or POLL_MIN after the last request; never later than it was."""
    monkeypatch.setenv("POLL_MIN", "40")
    now = datetime.now(UTC)
    ids = [worker.track("7"), worker.track("7", account="shop"), worker.track("8"), worker.track("7", account="done")]
    far = now + timedelta(hours=1)
    _set(door, ids[0], due_at=far)
    _set(door, ids[1], due_at=far, asked_at=now - timedelta(seconds=10))
    _set(door, ids[2], due_at=far)
    worker.cancel(ids[3])

    assert worker.nudge(7) == 2
    assert worker.nudge("7") == 0 or _due(door, ids[0]) <= datetime.now(UTC)
    assert abs((_due(door, ids[0]) - now).total_seconds()) < 10
    assert abs((_due(door, ids[1]) - now).total_seconds() - 30) < 1
    assert _due(door, ids[2]) == far
    assert worker.nudge("8", account="nobody") == 0
    assert worker.nudge("8", account="default") == 1


def _due(engine: Engine, job_id: int) -> datetime:
    with engine.connect() as connection:
        due: datetime = connection.execute(select(jobs.c.due_at).where(jobs.c.id == job_id)).scalar_one()
        return due


def test_a_nudge_leaves_a_job_alone_that_is_being_asked_about(door: Engine) -> None:
    """Its due time is its lease; to move it would hand the row to another."""
    job_id = worker.track("1")
    lease = datetime.now(UTC) + timedelta(seconds=30)
    _set(door, job_id, due_at=lease, claim_token="t", claim_holder="h")
    assert worker.nudge("1") == 0
    assert _due(door, job_id) == lease


def test_wait_returns_a_final_job_and_says_so_when_it_is_not(door: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On any final state; else a time-out that is a WorkerError and a TimeoutError."""
    monkeypatch.setattr(tracking, "WAIT_LOOK_SECONDS", 0.02)
    job_id = worker.track("1")
    with pytest.raises(WaitTimeout, match=f"job {job_id} is still pending") as late:
        worker.wait(job_id, timeout=0.05)
    assert isinstance(late.value, (WorkerError, TimeoutError))
    with pytest.raises(WaitTimeout):
        worker.wait(job_id, timeout=0)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(worker.wait, job_id, 10)
        worker.cancel(job_id)
        assert waiting.result(10).status == "cancelled"


def test_a_job_comes_with_its_outputs(door: Engine) -> None:
    """In order, with what is known of each."""
    with door.begin() as connection:
        job_id = add_downloading(connection)
        second, first = add_output(connection, job_id, 1), add_output(connection, job_id, 0)
        connection.execute(insert(bodies).values(output_id=first, body=b"x"))
    job = worker.get(job_id)
    assert job is not None
    assert [output.id for output in job.outputs] == [first, second]
    assert (job.outputs[0].status, job.outputs[0].location, job.outputs[0].attempts) == ("pending", None, 0)


# ── no database, no tables ────────────────────────────────────────────────────────────────────────────────────────────


def test_missing_tables_are_an_error_that_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through our own connection and through the caller's session."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    with pytest.raises(SchemaOutdated, match="fetch-worker migrate"):
        worker.track("1")
    with pytest.raises(SchemaOutdated, match="fetch-worker migrate"):
        worker.get(1)
    engine = create_engine(f"sqlite:///{tmp_path}/theirs.db")
    with Session(engine) as session, pytest.raises(SchemaOutdated, match="fetch-worker migrate"):
        worker.track("1", session=session)
    engine.dispose()


def test_an_unreachable_database_is_an_error_that_is_safe_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, with the address and without the password."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://app:hidden-word@127.0.0.1:1/shop")
    with pytest.raises(Unavailable) as away:
        worker.track("1")
    said = str(away.value)
    assert "127.0.0.1" in said
    assert "hidden-word" not in said
    assert "\n" not in said


# ── the first poll ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_poll_of_a_job_is_when_jobs_of_its_kind_were_ready(door: Engine) -> None:
    learner = PaceLearner(door)
    learner.prepare([("default", "slow")])
    for _ in range(60):
        learner.observe("default", "slow", PacedJob(100.0, 95.0), ready=True, planned=100.0)
    learner.share()
    tracking._models.clear()

    before = datetime.now(UTC)
    known, unknown = track("1", kind="slow"), track("2", kind="slow", account="another")
    late = track("3", kind="slow", submitted_at=before - timedelta(seconds=200))

    assert 60.0 < (_due(door, known) - before).total_seconds() < 110.0
    assert (_due(door, unknown) - before).total_seconds() < 5.0
    assert (_due(door, late) - before).total_seconds() < 5.0
