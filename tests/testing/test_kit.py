"""The test kit for web apps: whole jobs without waiting, all kinds of answers, all databases, and a clean teardown."""

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Engine, StaticPool, create_engine, func, select, text
from sqlalchemy.orm import Session
from standardwebhooks.webhooks import Webhook

import worker
import worker.aio
from tests.download_stand import PNG
from worker.client import holds
from worker.client.connection import cached_settings
from worker.errors import JobNotFound, WaitTimeout
from worker.store import engine as engine_module
from worker.store.engine import database_now
from worker.store.schema import jobs
from worker.testing import Kit, KitError, NeverEnds, Told, kit, migrate
from worker.testing.stand_in import READY_SECONDS

pytestmark = pytest.mark.every_python


@pytest.fixture
def testkit(tmp_path: Path, migrated_sqlite: Path) -> Iterator[Kit]:
    """The kit with a database of its own."""
    with kit(tmp_path / "kit", tables=migrated_sqlite) as testkit:
        yield testkit


def content(job: worker.Job, position: int = 0) -> bytes:
    """Return the bytes of a stored output."""
    with worker.open_output(job.outputs[position].id) as file:
        return file.read()


# ── running ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_submitted_job_runs_until_its_files_are_stored_in_virtual_time(testkit: Kit) -> None:
    started_at, answer = testkit.worker.now, testkit.api.submit("a lake", samples=2)
    job_id = worker.track(answer)

    job = testkit.worker.run(job_id)

    assert job.status == "completed"
    assert [output.status for output in job.outputs] == ["stored", "stored"]
    name = job.outputs[0].url.rpartition("/")[2]
    assert content(job) == testkit.api.picture(name)
    assert testkit.worker.now - started_at >= timedelta(seconds=READY_SECONDS)


def test_a_whole_job_takes_less_than_a_tenth_of_a_second_of_cpu_time(testkit: Kit) -> None:
    durations = []
    for number in range(1, 9):  # the first jobs also compile SQL statements
        started_at = time.process_time()
        assert testkit.worker.run(worker.track(number)).status == "completed"
        durations.append(time.process_time() - started_at)

    assert min(durations) < 0.1  # about 0.04 on a quiet machine


def test_the_clock_only_moves_when_the_test_moves_it(testkit: Kit) -> None:
    started_at = testkit.worker.now

    testkit.worker.advance(90)

    assert testkit.worker.now == started_at + timedelta(seconds=90)
    with testkit.worker.engine.connect() as connection:
        assert database_now(connection) == testkit.worker.now


def test_intermediate_states_can_be_inspected(testkit: Kit) -> None:
    testkit.api.ready_after(20)
    job_id = worker.track(testkit.api.submit("a lake"))

    testkit.worker.advance(19.9)
    before = worker.get(job_id)
    testkit.worker.advance(30)
    after = worker.get(job_id)

    assert before is not None
    assert (before.status, before.polls > 0) == ("pending", True)
    assert after is not None
    assert after.status == "completed"


def test_the_same_test_makes_the_same_polls_in_every_run(tmp_path: Path, migrated_sqlite: Path) -> None:
    polls, delays = [], []
    for number in range(6):
        with kit(tmp_path / str(number), tables=migrated_sqlite) as testkit:
            testkit.api.ready_after(300)
            job = testkit.worker.run(worker.track(testkit.api.submit("a lake")))
            assert job.ready_at is not None
            polls.append(job.polls)
            delays.append((job.ready_at - job.submitted_at).total_seconds())

    assert len(set(polls)) == 1
    assert max(delays) - min(delays) < 1.0  # only the durations of calls differ; with random polls it would be 8 s


def test_run_all_runs_every_job_to_its_end_and_returns_them(testkit: Kit) -> None:
    done = testkit.worker.run(worker.track("1"))
    job_ids = worker.track_many(["2", "3", "4"], account="shop")

    ended = testkit.worker.run_all()

    assert [job.id for job in ended] == job_ids
    assert {job.status for job in ended} == {"completed"}
    assert done.id not in job_ids


def test_a_job_that_never_becomes_ready_expires_at_its_deadline_without_waiting(testkit: Kit) -> None:
    testkit.api.answers().processing()
    job_id = worker.track("1", deadline=600)
    started_at = testkit.worker.now

    job = testkit.worker.run(job_id)

    assert (job.status, job.error_code) == ("expired", "expired")
    assert timedelta(seconds=600) <= testkit.worker.now - started_at < timedelta(seconds=700)


def test_a_job_that_reaches_no_final_state_raises_an_error_with_the_reason(testkit: Kit) -> None:
    testkit.api.answers().key_rejected()
    job_id = worker.track("1", deadline=60)

    with pytest.raises(NeverEnds, match=r"job 1 is still pending .*key rejected: Invalid Api Key"):
        testkit.worker.run(job_id)


def test_work_that_never_ends_at_one_moment_raises_an_error(testkit: Kit) -> None:
    class EndlessWork:
        def do(self) -> bool:
            return True

        def next(self, after: datetime) -> datetime | None:
            return None

    testkit.worker.works.append(EndlessWork())

    with pytest.raises(NeverEnds, match="at the same time"):
        testkit.worker.advance(1)


def test_a_held_job_raises_an_error_and_continues_after_it_is_resumed(testkit: Kit) -> None:
    """The clock does not jump to the due time of a held job, and `wait` does not block forever."""
    job_id = worker.track(testkit.api.submit("a lake"))
    worker.hold(job_id)
    started_at = testkit.worker.now

    for run in (testkit.worker.run, worker.wait):
        with pytest.raises(NeverEnds, match="held by an operator since"):
            run(job_id)
    testkit.worker.advance(7_200)
    job = worker.get(job_id)
    assert job is not None
    assert (job.status, job.polls, testkit.worker.now) == ("pending", 0, started_at + timedelta(seconds=7_200))
    worker.resume(job_id)

    assert testkit.worker.run(job_id).status == "completed"


def test_a_held_account_is_not_polled_until_it_is_resumed(testkit: Kit) -> None:
    job_id = worker.track(testkit.api.submit("a lake"))
    holds.hold_account_or_host("account", "default")

    with pytest.raises(NeverEnds, match="held by an operator"):
        testkit.worker.run(job_id)
    holds.resume_account_or_host("account", "default")

    assert testkit.worker.run(job_id).status == "completed"


def test_additional_work_of_a_test_is_done_when_it_is_due(testkit: Kit) -> None:
    done_at: list[datetime] = []
    due = testkit.worker.now + timedelta(seconds=30)

    class LetterWork:
        def do(self) -> bool:
            is_due = not done_at and testkit.worker.now >= due
            if is_due:
                done_at.append(testkit.worker.now)
            return is_due

        def next(self, after: datetime) -> datetime | None:
            return due if due > after else None

    testkit.worker.works.append(LetterWork())
    testkit.worker.advance(29)
    assert done_at == []
    testkit.worker.advance(10)
    assert done_at == [due]


def test_a_job_that_was_not_committed_raises_job_not_found(testkit: Kit) -> None:
    with pytest.raises(JobNotFound, match="was the transaction that tracked it committed"):
        testkit.worker.run(17)


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_answer_that_a_test_sets_is_given_to_one_poll(testkit: Kit) -> None:
    testkit.api.answers(12202888).processing(2).success(pictures=3)

    job = testkit.worker.run(worker.track(12202888))

    assert (job.status, job.polls, len(job.outputs)) == ("completed", 3, 3)
    assert testkit.api.asked(12202888) == 3
    assert len({content(job, position) for position in range(3)}) == 3


@pytest.mark.parametrize(
    ("set_answers", "status", "code"),
    [
        (lambda answers: answers.failed("out of paint"), "failed", "api_failed"),
        (lambda answers: answers.error("no such model"), "failed", "api_error"),
        (lambda answers: answers.not_found(), "failed", "not_found"),
        (lambda answers: answers.body({"status": "success", "output": []}), "failed", "no_output"),
        (lambda answers: answers.rate_limited(60).success(), "completed", None),
        (lambda answers: answers.key_rejected(times=2).success(), "completed", None),
        (lambda answers: answers.no_credits().success(), "completed", None),
        (lambda answers: answers.unavailable(times=3).success(), "completed", None),
        (lambda answers: answers.body(b"<html>oops").success(), "completed", None),
    ],
    ids=["failed", "error", "not found", "no output", "limited", "rejected", "no credits", "down", "invalid"],
)
def test_every_answer_has_the_same_effect_as_in_production(
    testkit: Kit, set_answers: Any, status: str, code: str | None
) -> None:
    set_answers(testkit.api.answers("1"))

    job = testkit.worker.run(worker.track("1"))

    assert (job.status, job.error_code) == (status, code)


def test_answers_for_all_jobs_start_anew_for_each_job_without_answers_of_its_own(testkit: Kit) -> None:
    testkit.api.answers().processing().failed()
    testkit.api.answers("own").success()

    worker.track_many(["1", "2", "own"])
    ended = {job.remote_id: (job.status, job.polls) for job in testkit.worker.run_all()}

    assert ended == {"1": ("failed", 3), "2": ("failed", 3), "own": ("completed", 1)}


def test_a_job_can_be_processing_for_a_number_of_seconds(testkit: Kit) -> None:
    testkit.api.answers("1").processing_for(100).success()
    started_at = testkit.worker.now

    job = testkit.worker.run(worker.track("1"))

    assert job.ready_at is not None
    assert job.ready_at >= started_at + timedelta(seconds=100)


def test_outputs_can_be_bytes_or_urls_of_the_test(testkit: Kit) -> None:
    nowhere = f"{testkit.api.root_url}/generations/nothing.png"
    testkit.api.answers("1").success([PNG, nowhere])

    job = testkit.worker.run(worker.track("1"))

    assert (job.status, job.error_code) == ("failed", "output_failed")
    assert content(job) == PNG
    assert (job.outputs[1].url, job.outputs[1].error_code) == (nowhere, "gone")


def test_an_id_that_the_stand_in_never_issued_becomes_one_of_its_jobs(testkit: Kit) -> None:
    testkit.api.ready_after(40)
    job_id = worker.track("made-up")

    testkit.worker.advance(39)
    before = worker.get(job_id)
    job = testkit.worker.run(job_id)

    assert before is not None
    assert before.status == "pending"
    assert (job.status, len(job.outputs)) == ("completed", 1)


def test_an_answer_given_zero_times_is_refused(testkit: Kit) -> None:
    with pytest.raises(ValueError, match="at least once"):
        testkit.api.answers("1").processing(0)


# ── on_done and wait ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_webhooks_are_collected_as_a_receiver_would_get_them(testkit: Kit) -> None:
    testkit.api.answers("2").failed("out of paint")
    first, second = (worker.track(number, webhook_url=f"https://shop.test/{number}") for number in (1, 2))

    testkit.worker.run_all()

    secret = os.environ["WEBHOOK_SECRET"]
    payloads = {sent.url: Webhook(secret).verify(sent.body, sent.headers) for sent in testkit.worker.webhooks}
    assert {url: (payload["type"], payload["data"]["id"]) for url, payload in payloads.items()} == {
        "https://shop.test/1": ("job.completed", first),
        "https://shop.test/2": ("job.failed", second),
    }


def test_on_done_is_called_for_every_final_state(testkit: Kit) -> None:
    testkit.api.answers("2").failed()
    first, second, third = worker.track_many(["1", "2", "3"], on_done="shop/shop.ready")
    worker.cancel(third)

    testkit.worker.run_all()

    assert sorted(testkit.worker.told) == [Told("shop.ready", "shop", job) for job in (first, second, third)]


def test_tasks_of_the_apps_celery_run_at_once_and_may_track_more_jobs(testkit: Kit) -> None:
    app = Celery("shop", set_as_current=False)

    @app.task(name="shop.ready", shared=False)  # type: ignore[untyped-decorator]
    def ready(job_id: int) -> None:
        if job_id < 3:
            worker.track(f"after-{job_id}", on_done="shop.ready")

    testkit.worker.celery = app
    worker.track("1", on_done="shop.ready")

    assert [job.remote_id for job in testkit.worker.run_all()] == ["1", "after-1", "after-2"]


def test_an_error_in_a_task_of_the_app_fails_the_test(testkit: Kit) -> None:
    app = Celery("shop", set_as_current=False)

    @app.task(name="shop.ready", shared=False)  # type: ignore[untyped-decorator]
    def ready(job_id: int) -> None:
        raise LookupError("no such order")

    testkit.worker.celery = app
    job_id = worker.track("1", on_done="shop.ready")

    with pytest.raises(LookupError, match="no such order"):
        testkit.worker.run(job_id)


def test_an_on_done_task_that_the_app_lacks_raises_an_error_with_the_apps_tasks(testkit: Kit) -> None:
    app = Celery("shop", set_as_current=False)

    @app.task(name="shop.ready", shared=False)  # type: ignore[untyped-decorator]
    def ready(job_id: int) -> None: ...

    testkit.worker.celery = app
    job_id = worker.track("1", on_done="shop.raedy")

    with pytest.raises(KitError, match=r"'shop.raedy', which is not a task .* Its tasks: shop.ready"):
        testkit.worker.run(job_id)


def test_wait_runs_the_job(testkit: Kit) -> None:
    testkit.api.ready_after(30)

    assert worker.wait(worker.track(testkit.api.submit("a lake"))).status == "completed"


def test_wait_times_out_by_the_test_clock(testkit: Kit) -> None:
    testkit.api.answers().processing()
    job_id = worker.track("1")
    started_at = testkit.worker.now

    with pytest.raises(WaitTimeout):
        worker.wait(job_id, timeout=45)

    assert testkit.worker.now == started_at + timedelta(seconds=45)


def test_wait_without_a_timeout_raises_an_error_instead_of_blocking_forever(testkit: Kit) -> None:
    testkit.api.answers().key_rejected()
    job_id = worker.track("1", deadline=60)

    with pytest.raises(NeverEnds, match="key rejected"):
        worker.wait(job_id)


def test_several_threads_can_track_and_wait_at_the_same_time(testkit: Kit) -> None:
    def run_order(number: int) -> str:
        return worker.wait(worker.track(testkit.api.submit(f"a lake, {number}"))).status

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(run_order, range(16))) == ["completed"] * 16


def test_coroutines_can_run_jobs_and_wait_for_them(testkit: Kit) -> None:
    async def run_two() -> list[str]:
        first = testkit.worker.run(worker.track("1"))
        second = await asyncio.to_thread(worker.wait, worker.track("2"))
        return [first.status, second.status]

    assert asyncio.run(run_two()) == ["completed", "completed"]


# ── databases ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_apps_engine_is_used_on_every_database(tmp_path: Path, engine: Engine) -> None:
    with kit(tmp_path / "kit", database=engine) as testkit, Session(engine) as session:
        job_id = worker.track("1", session=session, on_done="shop.ready")
        session.commit()

        assert testkit.worker.run(job_id).status == "completed"
        assert testkit.worker.told == [("shop.ready", "celery", job_id)]
        with engine.connect() as connection:
            assert connection.execute(select(jobs.c.status)).scalars().all() == ["completed"]


def test_the_apps_database_url_is_used(tmp_path: Path, engine: Engine) -> None:
    url = engine.url.render_as_string(hide_password=False)

    with kit(tmp_path / "kit", database=url) as testkit:
        assert testkit.worker.run(worker.track("1")).status == "completed"
    with engine.connect() as connection:
        assert connection.execute(select(jobs.c.status)).scalars().all() == ["completed"]


def test_app_and_kit_share_an_in_memory_database(tmp_path: Path) -> None:
    memory = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    migrate(memory)

    with kit(tmp_path / "kit", database=memory) as testkit, Session(memory) as session:
        job_id = worker.track("1", session=session)
        session.commit()
        assert testkit.worker.run(job_id).status == "completed"
    with memory.connect() as connection:
        assert connection.execute(select(func.count()).select_from(jobs)).scalar() == 1
    memory.dispose()


def test_a_whole_job_in_a_transaction_that_is_rolled_back_leaves_no_rows(tmp_path: Path, engine: Engine) -> None:
    with engine.connect() as connection:
        outer = connection.begin()
        with kit(tmp_path / "kit", database=connection) as testkit:
            with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
                job_id = worker.track("1", session=session)
                session.commit()
            assert testkit.worker.run(job_id).status == "completed"
        outer.rollback()

    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(jobs)).scalar() == 0


def test_a_database_without_tables_raises_an_error_that_says_how_to_create_them(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/empty.db"

    with (
        pytest.raises(KitError, match=r"no tables .*fetch-worker migrate.*worker\.testing\.migrate\(engine\)"),
        kit(tmp_path / "kit", database=url),
    ):
        pass
    assert "SD_API_URL" not in os.environ


def test_an_unsupported_database_object_raises_an_error_that_lists_the_supported_ones(tmp_path: Path) -> None:
    with (
        pytest.raises(KitError, match=r"returned int, .* pass a URL, an Engine or a Connection"),
        kit(tmp_path, database=7),
    ):
        pass


def test_an_open_transaction_of_the_test_raises_an_error_that_names_it(testkit: Kit) -> None:
    job_id = worker.track("1")
    with testkit.worker.engine.connect() as connection:
        connection.execute(text("UPDATE fetch_jobs SET reference = 'open'"))

        with pytest.raises(KitError, match="an open transaction of your test locks the database: commit it"):
            testkit.worker.advance(60)

    assert testkit.worker.run(job_id).status == "completed"


# ── teardown ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_environment_points_to_the_stand_in_and_is_restored_afterwards(
    tmp_path: Path, migrated_sqlite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_API_KEY", "sk-real-1")
    monkeypatch.setenv("SD_API_KEYS", '{"shop": "sk-real-2"}')
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@db.example/production")
    before = dict(os.environ)

    with kit(tmp_path / "kit", tables=migrated_sqlite) as testkit:
        assert os.environ["SD_API_URL"] == testkit.api.url
        assert "sk-real" not in str(dict(os.environ))
        assert cached_settings().database.database == str(tmp_path / "kit" / "worker.db")
        worker.track("1", account="shop")
        assert [job.status for job in testkit.worker.run_all()] == ["completed"]

    assert dict(os.environ) == before


def test_no_thread_and_no_engine_remains_after_the_kit(tmp_path: Path, migrated_sqlite: Path) -> None:
    with kit(tmp_path / "first", tables=migrated_sqlite) as testkit:
        testkit.worker.run(worker.track("1"))  # starts the threads that exist once per process
    threads, engines = set(threading.enumerate()), dict(engine_module._engines)

    for number in range(3):
        with kit(tmp_path / str(number), tables=migrated_sqlite) as testkit:
            worker.track_many(["1", "2"])
            testkit.worker.run_all()

    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
    assert set(threading.enumerate()) <= threads
    assert engine_module._engines == engines


def test_two_kits_in_a_row_do_not_affect_each_other(tmp_path: Path, migrated_sqlite: Path) -> None:
    with kit(tmp_path / "first", tables=migrated_sqlite) as testkit:
        testkit.api.answers().failed()
        testkit.worker.run(worker.track("1", on_done="a.b"))
        testkit.worker.advance(1e6)
        first = testkit.worker.now

    with kit(tmp_path / "second", tables=migrated_sqlite) as testkit:
        assert worker.get(1) is None
        assert (testkit.worker.told, testkit.api.asked("1"), testkit.api.submissions) == ([], 0, [])
        assert testkit.worker.now < first
        assert testkit.worker.run(worker.track("1")).status == "completed"


def test_after_the_kit_the_database_clock_is_used_again(tmp_path: Path, migrated_sqlite: Path, engine: Engine) -> None:
    with kit(tmp_path / "kit", tables=migrated_sqlite) as testkit:
        testkit.worker.advance(1e6)

    with engine.connect() as connection:
        assert database_now(connection) < testkit.worker.now - timedelta(days=1)


# ── the app's own ways ────────────────────────────────────────────────────────────────────────────────────────────────


def test_tasks_that_celery_would_discover_later_are_found(
    testkit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`autodiscover_tasks` imports the modules of an app when its worker starts."""
    package = tmp_path / "pictures_of_a_lazy_shop"
    package.mkdir()
    (package / "__init__.py").write_text("done = []\n")
    (package / "tasks.py").write_text(
        "from celery import shared_task\n"
        "from pictures_of_a_lazy_shop import done\n"
        "@shared_task(name='lazy.ready')\n"
        "def ready(job_id):\n"
        "    done.append(job_id)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    app = Celery("shop", set_as_current=False)
    app.autodiscover_tasks(["pictures_of_a_lazy_shop"])
    testkit.worker.celery = app
    job_id = worker.track("1", on_done="lazy.ready")

    testkit.worker.run(job_id)

    import pictures_of_a_lazy_shop  # type: ignore[import-not-found]  # made above

    assert pictures_of_a_lazy_shop.done == [job_id]


def test_a_session_of_another_database_is_refused_and_both_are_named(testkit: Kit, tmp_path: Path) -> None:
    """Else the test would write into the development database, and the kit would never see the job."""
    development = create_engine(f"sqlite:///{tmp_path}/development.db")
    migrate(development)
    with Session(development) as session, pytest.raises(KitError) as refused:
        worker.track("1", session=session)
    with development.connect() as connection, pytest.raises(KitError):
        worker.track("1", session=connection)
    development.dispose()
    assert str(tmp_path / "development.db") in str(refused.value)
    assert testkit.worker.engine.url.database is not None
    assert testkit.worker.engine.url.database in str(refused.value)
    assert "fetch_database" in str(refused.value)


def test_a_session_in_memory_is_the_kits_only_if_its_engine_is(tmp_path: Path) -> None:
    engines = [create_engine("sqlite://", poolclass=StaticPool) for _ in range(2)]
    migrate(engines[0])
    with kit(tmp_path / "kit", database=engines[0]) as testkit:
        with Session(engines[0]) as session, session.begin():
            job_id = worker.track("1", session=session)
        with Session(engines[1]) as session, pytest.raises(KitError):
            worker.track("2", session=session)
        assert testkit.worker.run(job_id).final
    for engine in engines:
        engine.dispose()


def test_changes_run_the_job_step_by_step(testkit: Kit) -> None:
    job_id = worker.track(testkit.api.submit("a lake", samples=2))

    states = [job.status for job in worker.changes(job_id)]

    assert states[0] == "pending"
    assert states[-1] == "completed"


def test_coroutines_run_the_job_too(testkit: Kit) -> None:
    async def run() -> list[str]:
        job_id = await worker.aio.track(testkit.api.submit("a lake"))
        states = [job.status async for job in worker.aio.changes(job_id)]
        assert (await worker.aio.wait(job_id)).final
        return states

    states = asyncio.run(run())

    assert (states[0], states[-1]) == ("pending", "completed")
