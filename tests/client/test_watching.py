"""`changes` and `wait`: what they yield, and that all callers of a process share the looks at the database."""

import os
import threading
import time
import warnings
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise

import pytest
from sqlalchemy import Engine, event

import worker
from tests.rows import add_downloading, add_output, update_job, update_output
from tests.waiting import wait_until
from worker.client.connection import cached_settings
from worker.client.jobs import Job, read_jobs
from worker.client.watching import JobWatcher, watcher
from worker.errors import JobNotFound, NotTrackable, Unavailable, WaitTimeout
from worker.store.engine import engine_for


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that the Python API uses."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return engine


def test_given_a_job_then_its_state_is_yielded_at_once_and_each_change_once(database: Engine) -> None:
    job_id = worker.track("1")
    changes = worker.changes(job_id, timeout=30)

    first = next(changes)
    update_job(database, job_id, polls=1)
    second = next(changes)
    worker.cancel(job_id)
    rest = list(changes)

    assert [(job.status, job.polls) for job in (first, second, *rest)] == [
        ("pending", 0),
        ("pending", 1),
        ("cancelled", 1),
    ]


def test_given_a_job_whose_output_changes_then_it_is_yielded_although_its_own_row_did_not_change(
    database: Engine,
) -> None:
    with database.begin() as connection:
        job_id = add_downloading(connection)
        output_id = add_output(connection, job_id, 0)
    changes = worker.changes([job_id], timeout=30)
    next(changes)

    update_output(database, output_id, attempts=3)

    assert next(changes).outputs[0].attempts == 3


def test_given_several_jobs_then_the_changes_end_when_all_are_final(database: Engine) -> None:
    ids = worker.track_many(["1", "2", "3"])
    worker.cancel(ids[1])
    changes = worker.changes([*ids, ids[0]], timeout=30)

    first = {job.id: job.status for job in islice(changes, 3)}
    worker.cancel(ids[0])
    worker.cancel(ids[2])
    last = {job.id: job.status for job in changes}

    assert first == {ids[0]: "pending", ids[1]: "cancelled", ids[2]: "pending"}
    assert last == {ids[0]: "cancelled", ids[2]: "cancelled"}
    assert list(worker.changes([])) == []


def test_given_a_time_out_then_wait_timeout_names_the_job_and_how_many_more(database: Engine) -> None:
    """Also with a time-out of zero there is a first look: a job that is final is returned."""
    ids = worker.track_many(["1", "2", "3"])
    with pytest.raises(WaitTimeout, match=rf"job {ids[0]} is still pending and 2 more after 0\.1 s"):
        list(worker.changes(ids, timeout=0.1))
    worker.cancel(ids[0])
    assert worker.wait(ids[0], timeout=0).status == "cancelled"


def test_given_an_unknown_job_then_job_not_found_is_raised(database: Engine) -> None:
    job_id = worker.track("1")
    with pytest.raises(JobNotFound, match="there is no job 4711"):
        list(worker.changes([job_id, 4711], timeout=30))


def test_given_an_id_that_is_no_number_then_the_call_itself_raises(database: Engine) -> None:
    """Not the first `next`, which may be in another function."""
    with pytest.raises(NotTrackable):
        worker.changes(["1"])  # type: ignore[list-item]  # what the test is about


def test_given_a_database_that_does_not_answer_then_unavailable_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/none")
    with pytest.raises(Unavailable):
        next(worker.changes(1))
    with pytest.raises(Unavailable):
        worker.wait(1)


def test_given_two_hundred_callers_then_one_transaction_each_half_second_serves_all(database: Engine) -> None:
    ids = worker.track_many([str(number) for number in range(1, 201)])
    begins: list[float] = []
    app_engine = engine_for(cached_settings().database)
    event.listen(app_engine, "begin", lambda _: begins.append(time.monotonic()))

    def last_state(job_id: int) -> str:
        return [job.status for job in worker.changes(job_id, timeout=60)][-1]

    with ThreadPoolExecutor(200) as threads:
        watching = [threads.submit(last_state, job_id) for job_id in ids]
        wait_until(lambda: len(begins) >= 3, "three looks")
        looks = list(begins)
        with database.begin() as connection:
            connection.exec_driver_sql(
                "UPDATE fetch_jobs SET status = 'cancelled', due_at = NULL, completed_at = tracked_at"
            )
        states = [future.result(60) for future in watching]

    assert set(states) == {"cancelled"}
    assert min(later - earlier for earlier, later in pairwise(looks)) > 0.45


def test_given_no_caller_then_the_thread_ends(database: Engine) -> None:
    job_id = worker.track("1")
    changes = worker.changes(job_id, timeout=30)
    next(changes)
    assert any(thread.name == "job-watcher" for thread in threading.enumerate())

    changes.close()  # type: ignore[attr-defined]  # a generator

    until = time.monotonic() + 5
    while any(thread.name == "job-watcher" for thread in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(thread.name == "job-watcher" for thread in threading.enumerate())
    assert worker.wait(job_id) if worker.cancel(job_id) else False


def test_given_a_look_that_fails_then_only_the_callers_of_that_look_are_told() -> None:
    """The next caller has a look of its own."""
    errors: Iterator[Exception | None] = iter([ValueError("the database is away"), None])

    def read(job_ids: Collection[int]) -> dict[int, Job]:
        error = next(errors)
        if error is not None:
            raise error
        return {}

    own_watcher = JobWatcher(read, look_seconds=0.01)
    results: list[object] = []
    told = threading.Event()

    def deliver(found: object) -> None:
        results.append(found)
        told.set()

    for _ in range(2):
        told.clear()
        with own_watcher.watching([7], deliver):
            assert told.wait(5)

    assert [str(result) for result in results] == [
        "the database is away",
        "there is no job 7: `fetch-worker list` shows the jobs",
    ]


def test_given_a_forked_child_then_it_watches_with_a_thread_of_its_own(database: Engine) -> None:
    """A web server forks after the app was loaded, perhaps while a caller waits."""
    job_id = worker.track("1")
    changes = worker.changes(job_id, timeout=30)
    next(changes)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of a fork beside threads: that is the test
        child = os.fork()
    if child == 0:  # pragma: no cover  # the child
        status = 1
        try:
            engine_for(cached_settings().database).dispose(close=False)
            status = 0 if next(worker.changes(job_id, timeout=20)).status == "pending" else 2
        finally:
            os._exit(status)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    worker.cancel(job_id)
    assert [job.status for job in changes] == ["cancelled"]


def test_read_jobs_returns_only_what_exists(database: Engine) -> None:
    job_id = worker.track("1")
    assert set(read_jobs([job_id, 4711, -1, 10**30])) == {job_id}
    assert read_jobs([]) == {}
    assert watcher is not None
