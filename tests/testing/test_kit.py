"""The test kit for apps: whole jobs without waiting, any answer, any database, and nothing left behind."""

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
from tests.download_stand import PNG
from worker.client import holds, tracking
from worker.errors import JobNotFound, WaitTimeout
from worker.store import engine as engine_module
from worker.store.engine import database_now
from worker.store.schema import jobs
from worker.testing import Kit, KitError, NeverEnds, Told, kit, migrate
from worker.testing.stand_in import READY_SECONDS

pytestmark = pytest.mark.every_python


@pytest.fixture
def made(tmp_path: Path, migrated_sqlite: Path) -> Iterator[Kit]:
    """The kit on a database of its own."""
    with kit(tmp_path / "kit", tables=migrated_sqlite) as made:
        yield made


def content(job: worker.Job, position: int = 0) -> bytes:
    """The bytes of a stored output."""
    with worker.open_output(job.outputs[position].id) as file:
        return file.read()


# ── running ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_submitted_job_is_run_to_its_stored_file_in_virtual_time(made: Kit) -> None:
    began, answer = made.worker.now, made.api.submit("a lake", samples=2)
    job_id = worker.track(answer)

    job = made.worker.run(job_id)

    assert job.status == "completed"
    assert [output.status for output in job.outputs] == ["stored", "stored"]
    name = job.outputs[0].url.rpartition("/")[2]
    assert content(job) == made.api.picture(name)
    assert made.worker.now - began >= timedelta(seconds=READY_SECONDS)


def test_a_whole_job_costs_less_than_fifty_milliseconds_of_processor_time(made: Kit) -> None:
    spent = []
    for number in range(1, 9):  # the first ones pay for what is compiled once
        began = time.process_time()
        assert made.worker.run(worker.track(number)).status == "completed"
        spent.append(time.process_time() - began)

    assert min(spent) < 0.05


def test_time_stands_still_until_it_is_moved(made: Kit) -> None:
    began = made.worker.now

    made.worker.advance(90)

    assert made.worker.now == began + timedelta(seconds=90)
    with made.worker.engine.connect() as connection:
        assert database_now(connection) == made.worker.now


def test_half_way_states_can_be_looked_at(made: Kit) -> None:
    made.api.ready_after(20)
    job_id = worker.track(made.api.submit("a lake"))

    made.worker.advance(19.9)
    before = worker.get(job_id)
    made.worker.advance(30)
    after = worker.get(job_id)

    assert before is not None
    assert (before.status, before.polls > 0) == ("pending", True)
    assert after is not None
    assert after.status == "completed"


def test_the_same_test_makes_the_same_polls_each_time(tmp_path: Path, migrated_sqlite: Path) -> None:
    polls, seen = [], []
    for number in range(6):
        with kit(tmp_path / str(number), tables=migrated_sqlite) as made:
            made.api.ready_after(300)
            job = made.worker.run(worker.track(made.api.submit("a lake")))
            assert job.ready_at is not None
            polls.append(job.polls)
            seen.append((job.ready_at - job.submitted_at).total_seconds())

    assert len(set(polls)) == 1
    assert max(seen) - min(seen) < 1.0  # what is left is how long the calls took; left to chance it would be eight


def test_run_all_ends_every_job_and_says_which(made: Kit) -> None:
    done = made.worker.run(worker.track("1"))
    job_ids = worker.track_many(["2", "3", "4"], account="shop")

    ended = made.worker.run_all()

    assert [job.id for job in ended] == job_ids
    assert {job.status for job in ended} == {"completed"}
    assert done.id not in job_ids


def test_a_job_that_is_never_ready_expires_by_its_deadline_at_once(made: Kit) -> None:
    made.api.answers().processing()
    job_id = worker.track("1", deadline=600)
    began = made.worker.now

    job = made.worker.run(job_id)

    assert (job.status, job.error_code) == ("expired", "expired")
    assert timedelta(seconds=600) <= made.worker.now - began < timedelta(seconds=700)


def test_a_job_that_comes_to_no_end_is_an_error_that_says_why(made: Kit) -> None:
    made.api.answers().key_rejected()
    job_id = worker.track("1", deadline=60)

    with pytest.raises(NeverEnds, match=r"job 1 is still pending .*key rejected: Invalid Api Key"):
        made.worker.run(job_id)


def test_work_that_never_ceases_at_one_moment_is_an_error(made: Kit) -> None:
    class Mill:
        def do(self) -> bool:
            return True

        def next(self, after: datetime) -> datetime | None:
            return None

    made.worker.works.append(Mill())

    with pytest.raises(NeverEnds, match="at the same time"):
        made.worker.advance(1)


def test_a_held_job_is_an_error_that_says_so_and_goes_on_once_it_is_resumed(made: Kit) -> None:
    """No clock leaps to the year 9999, and nobody waits for ever."""
    job_id = worker.track(made.api.submit("a lake"))
    worker.hold(job_id)
    began = made.worker.now

    for run in (made.worker.run, worker.wait):
        with pytest.raises(NeverEnds, match="held by an operator since"):
            run(job_id)
    made.worker.advance(7_200)
    held = worker.get(job_id)
    assert held is not None
    assert (held.status, held.polls, made.worker.now) == ("pending", 0, began + timedelta(seconds=7_200))
    worker.resume(job_id)

    assert made.worker.run(job_id).status == "completed"


def test_a_held_account_is_not_asked_until_it_is_resumed(made: Kit) -> None:
    job_id = worker.track(made.api.submit("a lake"))
    holds.hold_account_or_host("account", "default")

    with pytest.raises(NeverEnds, match="held by an operator"):
        made.worker.run(job_id)
    holds.resume_account_or_host("account", "default")

    assert made.worker.run(job_id).status == "completed"


def test_work_of_another_kind_is_done_at_its_time(made: Kit) -> None:
    done: list[datetime] = []
    due = made.worker.now + timedelta(seconds=30)

    class Letter:
        def do(self) -> bool:
            wanted = not done and made.worker.now >= due
            if wanted:
                done.append(made.worker.now)
            return wanted

        def next(self, after: datetime) -> datetime | None:
            return due if due > after else None

    made.worker.works.append(Letter())
    made.worker.advance(29)
    assert done == []
    made.worker.advance(10)
    assert done == [due]


def test_a_job_that_was_not_committed_is_not_found(made: Kit) -> None:
    with pytest.raises(JobNotFound, match="was the transaction that tracked it committed"):
        made.worker.run(17)


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_answers_as_it_was_told_to_and_is_asked_once_for_each_answer(made: Kit) -> None:
    made.api.answers(12202888).processing(2).success(pictures=3)

    job = made.worker.run(worker.track(12202888))

    assert (job.status, job.polls, len(job.outputs)) == ("completed", 3, 3)
    assert made.api.asked(12202888) == 3
    assert len({content(job, position) for position in range(3)}) == 3


@pytest.mark.parametrize(
    ("answers", "status", "code"),
    [
        (lambda told: told.failed("out of paint"), "failed", "api_failed"),
        (lambda told: told.error("no such model"), "failed", "api_error"),
        (lambda told: told.not_found(), "failed", "not_found"),
        (lambda told: told.body({"status": "success", "output": []}), "failed", "no_output"),
        (lambda told: told.rate_limited(60).success(), "completed", None),
        (lambda told: told.key_rejected(times=2).success(), "completed", None),
        (lambda told: told.no_credits().success(), "completed", None),
        (lambda told: told.unavailable(times=3).success(), "completed", None),
        (lambda told: told.body(b"<html>oops").success(), "completed", None),
    ],
    ids=["failed", "error", "not found", "no output", "limited", "rejected", "no credits", "down", "odd"],
)
def test_every_answer_leads_where_it_leads_in_production(
    made: Kit, answers: Any, status: str, code: str | None
) -> None:
    answers(made.api.answers("1"))

    job = made.worker.run(worker.track("1"))

    assert (job.status, job.error_code) == (status, code)


def test_answers_for_all_are_given_to_each_job_from_their_start_but_not_to_one_that_has_its_own(made: Kit) -> None:
    made.api.answers().processing().failed()
    made.api.answers("own").success()

    worker.track_many(["1", "2", "own"])
    ended = {job.remote_id: (job.status, job.polls) for job in made.worker.run_all()}

    assert ended == {"1": ("failed", 3), "2": ("failed", 3), "own": ("completed", 1)}


def test_a_job_is_processing_for_so_many_seconds(made: Kit) -> None:
    made.api.answers("1").processing_for(100).success()
    began = made.worker.now

    job = made.worker.run(worker.track("1"))

    assert job.ready_at is not None
    assert job.ready_at >= began + timedelta(seconds=100)


def test_outputs_are_the_bytes_that_a_test_hands_over_or_addresses_as_they_stand(made: Kit) -> None:
    nowhere = f"{made.api.root_url}/generations/nothing.png"
    made.api.answers("1").success([PNG, nowhere])

    job = made.worker.run(worker.track("1"))

    assert (job.status, job.error_code) == ("failed", "output_failed")
    assert content(job) == PNG
    assert (job.outputs[1].url, job.outputs[1].error_code) == (nowhere, "gone")


def test_an_id_that_the_stand_in_never_gave_out_is_one_of_its_jobs(made: Kit) -> None:
    made.api.ready_after(40)
    job_id = worker.track("made-up")

    made.worker.advance(39)
    before = worker.get(job_id)
    job = made.worker.run(job_id)

    assert before is not None
    assert before.status == "pending"
    assert (job.status, len(job.outputs)) == ("completed", 1)


def test_an_answer_that_is_never_given_is_refused(made: Kit) -> None:
    with pytest.raises(ValueError, match="at least once"):
        made.api.answers("1").processing(0)


# ── on_done and wait ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_webhooks_are_kept_as_a_receiver_would_get_them(made: Kit) -> None:
    made.api.answers("2").failed("out of paint")
    first, second = (worker.track(number, webhook_url=f"https://shop.test/{number}") for number in (1, 2))

    made.worker.run_all()

    secret = os.environ["WEBHOOK_SECRET"]
    read = {sent.url: Webhook(secret).verify(sent.body, sent.headers) for sent in made.worker.webhooks}
    assert {url: (text["type"], text["data"]["id"]) for url, text in read.items()} == {
        "https://shop.test/1": ("job.completed", first),
        "https://shop.test/2": ("job.failed", second),
    }


def test_on_done_is_told_for_every_final_state(made: Kit) -> None:
    made.api.answers("2").failed()
    first, second, third = worker.track_many(["1", "2", "3"], on_done="shop/shop.ready")
    worker.cancel(third)

    made.worker.run_all()

    assert sorted(made.worker.told) == [Told("shop.ready", "shop", job) for job in (first, second, third)]


def test_tasks_of_the_apps_celery_run_at_once_and_may_track_more(made: Kit) -> None:
    app = Celery("shop", set_as_current=False)

    @app.task(name="shop.ready", shared=False)  # type: ignore[untyped-decorator]
    def ready(job_id: int) -> None:
        if job_id < 3:
            worker.track(f"after-{job_id}", on_done="shop.ready")

    made.worker.celery = app
    worker.track("1", on_done="shop.ready")

    assert [job.remote_id for job in made.worker.run_all()] == ["1", "after-1", "after-2"]


def test_a_task_that_fails_fails_the_test(made: Kit) -> None:
    app = Celery("shop", set_as_current=False)

    @app.task(name="shop.ready", shared=False)  # type: ignore[untyped-decorator]
    def ready(job_id: int) -> None:
        raise LookupError("no such order")

    made.worker.celery = app
    job_id = worker.track("1", on_done="shop.ready")

    with pytest.raises(LookupError, match="no such order"):
        made.worker.run(job_id)


def test_an_on_done_that_the_app_does_not_know_is_an_error_that_names_those_it_has(made: Kit) -> None:
    app = Celery("shop", set_as_current=False)

    @app.task(name="shop.ready", shared=False)  # type: ignore[untyped-decorator]
    def ready(job_id: int) -> None: ...

    made.worker.celery = app
    job_id = worker.track("1", on_done="shop.raedy")

    with pytest.raises(KitError, match=r"'shop.raedy', which is not a task .* Its tasks: shop.ready"):
        made.worker.run(job_id)


def test_wait_runs_the_job(made: Kit) -> None:
    made.api.ready_after(30)

    assert worker.wait(worker.track(made.api.submit("a lake"))).status == "completed"


def test_wait_gives_up_after_its_seconds_of_the_tests_clock(made: Kit) -> None:
    made.api.answers().processing()
    job_id = worker.track("1")
    began = made.worker.now

    with pytest.raises(WaitTimeout):
        worker.wait(job_id, timeout=45)

    assert made.worker.now == began + timedelta(seconds=45)


def test_wait_without_a_time_out_raises_where_it_would_never_return(made: Kit) -> None:
    made.api.answers().key_rejected()
    job_id = worker.track("1", deadline=60)

    with pytest.raises(NeverEnds, match="key rejected"):
        worker.wait(job_id)


def test_threads_that_wait_and_track_share_one_world(made: Kit) -> None:
    def ordered(number: int) -> str:
        return worker.wait(worker.track(made.api.submit(f"a lake, {number}"))).status

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ordered, range(16))) == ["completed"] * 16


def test_coroutines_may_run_jobs_and_wait_for_them(made: Kit) -> None:
    async def both() -> list[str]:
        here = made.worker.run(worker.track("1"))
        there = await asyncio.to_thread(worker.wait, worker.track("2"))
        return [here.status, there.status]

    assert asyncio.run(both()) == ["completed", "completed"]


# ── databases ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_engine_of_the_app_is_used_on_every_database(tmp_path: Path, engine: Engine) -> None:
    with kit(tmp_path / "kit", database=engine) as made, Session(engine) as session:
        job_id = worker.track("1", session=session, on_done="shop.ready")
        session.commit()

        assert made.worker.run(job_id).status == "completed"
        assert made.worker.told == [("shop.ready", "celery", job_id)]
        with engine.connect() as connection:
            assert connection.execute(select(jobs.c.status)).scalars().all() == ["completed"]


def test_a_url_of_the_app_is_used(tmp_path: Path, engine: Engine) -> None:
    url = engine.url.render_as_string(hide_password=False)

    with kit(tmp_path / "kit", database=url) as made:
        assert made.worker.run(worker.track("1")).status == "completed"
    with engine.connect() as connection:
        assert connection.execute(select(jobs.c.status)).scalars().all() == ["completed"]


def test_a_database_in_memory_is_shared_by_app_and_kit(tmp_path: Path) -> None:
    memory = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    migrate(memory)

    with kit(tmp_path / "kit", database=memory) as made, Session(memory) as session:
        job_id = worker.track("1", session=session)
        session.commit()
        assert made.worker.run(job_id).status == "completed"
    with memory.connect() as connection:
        assert connection.execute(select(func.count()).select_from(jobs)).scalar() == 1
    memory.dispose()


def test_in_a_transaction_that_is_rolled_back_a_whole_job_leaves_nothing(tmp_path: Path, engine: Engine) -> None:
    with engine.connect() as connection:
        outer = connection.begin()
        with kit(tmp_path / "kit", database=connection) as made:
            with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
                job_id = worker.track("1", session=session)
                session.commit()
            assert made.worker.run(job_id).status == "completed"
        outer.rollback()

    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(jobs)).scalar() == 0


def test_a_database_without_tables_is_an_error_that_says_how_they_get_there(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/empty.db"

    with (
        pytest.raises(KitError, match=r"no tables .*fetch-worker migrate.*worker\.testing\.migrate\(engine\)"),
        kit(tmp_path / "kit", database=url),
    ):
        pass
    assert "SD_API_URL" not in os.environ


def test_what_is_no_database_is_an_error_that_says_what_is(tmp_path: Path) -> None:
    with (
        pytest.raises(KitError, match=r"returned int, .* pass a URL, an Engine or a Connection"),
        kit(tmp_path, database=7),
    ):
        pass


def test_a_transaction_that_the_test_left_open_is_an_error_that_says_so(made: Kit) -> None:
    job_id = worker.track("1")
    with made.worker.engine.connect() as connection:
        connection.execute(text("UPDATE fetch_jobs SET reference = 'open'"))

        with pytest.raises(KitError, match="an open transaction of your test locks the database: commit it"):
            made.worker.advance(60)

    assert made.worker.run(job_id).status == "completed"


# ── nothing is left ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_environment_leads_to_the_stand_in_and_is_as_it_was_afterwards(
    tmp_path: Path, migrated_sqlite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_API_KEY", "sk-real-1")
    monkeypatch.setenv("SD_API_KEYS", '{"shop": "sk-real-2"}')
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@db.example/production")
    before = dict(os.environ)

    with kit(tmp_path / "kit", tables=migrated_sqlite) as made:
        assert os.environ["SD_API_URL"] == made.api.url
        assert "sk-real" not in str(dict(os.environ))
        assert tracking._settings().database.database == str(tmp_path / "kit" / "worker.db")
        worker.track("1", account="shop")
        assert [job.status for job in made.worker.run_all()] == ["completed"]

    assert dict(os.environ) == before


def test_no_thread_and_no_engine_outlives_the_kit(tmp_path: Path, migrated_sqlite: Path) -> None:
    with kit(tmp_path / "first", tables=migrated_sqlite) as made:
        made.worker.run(worker.track("1"))  # starts what one process has one of
    threads, engines = set(threading.enumerate()), dict(engine_module._engines)

    for number in range(3):
        with kit(tmp_path / str(number), tables=migrated_sqlite) as made:
            worker.track_many(["1", "2"])
            made.worker.run_all()

    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
    assert set(threading.enumerate()) <= threads
    assert engine_module._engines == engines


def test_two_kits_in_a_row_see_nothing_of_each_other(tmp_path: Path, migrated_sqlite: Path) -> None:
    with kit(tmp_path / "first", tables=migrated_sqlite) as made:
        made.api.answers().failed()
        made.worker.run(worker.track("1", on_done="a.b"))
        made.worker.advance(1e6)
        first = made.worker.now

    with kit(tmp_path / "second", tables=migrated_sqlite) as made:
        assert worker.get(1) is None
        assert (made.worker.told, made.api.asked("1"), made.api.submissions) == ([], 0, [])
        assert made.worker.now < first
        assert made.worker.run(worker.track("1")).status == "completed"


def test_after_the_kit_time_is_the_databases_again(tmp_path: Path, migrated_sqlite: Path, engine: Engine) -> None:
    with kit(tmp_path / "kit", tables=migrated_sqlite) as made:
        made.worker.advance(1e6)

    with engine.connect() as connection:
        assert database_now(connection) < made.worker.now - timedelta(days=1)
