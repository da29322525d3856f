"""Kept answers on real databases: the last three per job, the last one before the end, a thousand in total."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, Engine, delete, event, func, select

from tests.rows import NOW, add_job, seconds
from worker.store.kept_answers import MOST, KeptAnswer, answer_shapes, answers_of, jobs_with_answers, keep_answers
from worker.store.schema import jobs, unread


def _answer(job_id: int, body: str = "{}", *, recognised: bool = False, shape: str = "status=done") -> KeptAnswer:
    return KeptAnswer(job_id, 200, shape, body, recognised)


def _keep(connection: Connection, *answers: KeptAnswer, at: datetime = NOW) -> None:
    keep_answers(connection, answers, now=at)


def _bodies(connection: Connection, job_id: int) -> Sequence[str]:
    return [row.body for row in answers_of(connection, job_ids=[job_id])]


def test_the_last_three_unread_answers_of_a_job_are_kept(engine: Engine) -> None:
    with engine.begin() as connection:
        job_id, other_job = add_job(connection, "1"), add_job(connection, "2")
        for number in range(5):
            _keep(connection, _answer(job_id, f"body {number}"), at=NOW + seconds(number))
        _keep(connection, _answer(other_job, "body 0"))

        assert _bodies(connection, job_id) == ["body 4", "body 3", "body 2"]
        assert _bodies(connection, other_job) == ["body 0"]


def test_an_equal_answer_only_updates_the_time(engine: Engine) -> None:
    """A job that is polled for hours has one row for it."""
    with engine.begin() as connection:
        job_id = add_job(connection)
        _keep(connection, _answer(job_id, "the same"))
        [before] = answers_of(connection)
        for number in range(1, 4):
            _keep(connection, _answer(job_id, "the same"), at=NOW + seconds(number))
        [after] = answers_of(connection)

        assert (before.id, before.at) == (after.id, NOW)
        assert after.at == NOW + seconds(3)

        _keep(connection, _answer(job_id, "another"), at=NOW + seconds(4))
        _keep(connection, _answer(job_id, "the same"), at=NOW + seconds(5))
        assert _bodies(connection, job_id) == ["the same", "another", "the same"]


def test_the_answer_that_ended_a_job_does_not_replace_an_unread_one(engine: Engine) -> None:
    """A job has one such answer, the newest."""
    with engine.begin() as connection:
        job_id = add_job(connection)
        for number in range(3):
            _keep(connection, _answer(job_id, f"unread {number}"), at=NOW + seconds(number))
        _keep(connection, _answer(job_id, "the first end", recognised=True), at=NOW + seconds(3))
        _keep(connection, _answer(job_id, "the second end", recognised=True), at=NOW + seconds(4))

        assert _bodies(connection, job_id) == ["the second end", "unread 2", "unread 1", "unread 0"]


def test_a_thousand_answers_are_kept_in_total_and_the_oldest_are_deleted(engine: Engine) -> None:
    with engine.begin() as connection:
        first = [add_job(connection, f"a{number}") for number in range(3)]
        _keep(connection, *(_answer(job_id) for job_id in first))
        job_ids = [add_job(connection, f"b{number}") for number in range(MOST - 1)]
        _keep(connection, *(_answer(job_id) for job_id in job_ids), at=NOW + seconds(1))

        assert connection.execute(select(func.count()).select_from(unread)).scalar_one() == MOST
        assert sum(len(_bodies(connection, job_id)) for job_id in first) == 1
        assert all(len(answers_of(connection, job_ids=batch)) == len(batch) for batch in (job_ids[:400], job_ids[400:]))


def test_the_oldest_answers_are_deleted_last(engine: Engine) -> None:
    """They belong to other jobs. Two large batches that lock them in the middle could deadlock."""
    written: list[str] = []
    with engine.begin() as connection:
        for number in range(MOST):
            connection.execute(
                unread.insert().values(_answer(add_job(connection, f"a{number}"))._asdict() | {"at": NOW})
            )
        job_ids = [add_job(connection, f"b{number}") for number in range(120)]
        event.listen(connection, "before_cursor_execute", lambda *arguments: written.append(arguments[2].split()[0]))
        _keep(connection, *(_answer(job_id) for job_id in job_ids), at=NOW + seconds(1))

        assert connection.execute(select(func.count()).select_from(unread)).scalar_one() == MOST
    changes = [word for word in written if word in ("INSERT", "UPDATE", "DELETE")]
    assert changes == ["INSERT"] * 3 + ["DELETE"]


def test_an_answer_of_a_deleted_job_is_not_kept_and_does_not_fail_the_batch(engine: Engine) -> None:
    with engine.begin() as connection:
        deleted, job_id = add_job(connection, "1"), add_job(connection, "2")
        connection.execute(delete(jobs).where(jobs.c.id == deleted))
        _keep(connection, _answer(deleted, "late"), _answer(job_id, "kept"))
        assert [row.job_id for row in answers_of(connection)] == [job_id]

        connection.execute(delete(jobs).where(jobs.c.id == job_id))
        assert answers_of(connection) == []


def test_two_processes_that_keep_answers_of_the_same_jobs_do_not_wait_for_each_other(engine: Engine) -> None:
    """SQLite has only one writer at a time."""
    if engine.dialect.name == "sqlite":
        return
    with engine.begin() as connection:
        first_job, second_job = add_job(connection, "1"), add_job(connection, "2")
    with engine.begin() as first, engine.begin() as second:
        _keep(first, _answer(first_job, "first"))
        _keep(second, _answer(second_job, "second"), _answer(first_job, "second"))
        _keep(first, _answer(second_job, "first"))
    with engine.connect() as connection:
        assert {(row.job_id, row.body) for row in answers_of(connection)} == {
            (first_job, "first"),
            (second_job, "second"),
        }


def test_answers_are_grouped_by_their_shape(engine: Engine) -> None:
    with engine.begin() as connection:
        first_job, second_job = add_job(connection, "1"), add_job(connection, "2")
        _keep(connection, _answer(first_job, "a", shape="status=done"))
        _keep(connection, _answer(first_job, "b", shape="status=done"), at=NOW + seconds(10))
        _keep(connection, _answer(second_job, "c", shape="status=done"), at=NOW + seconds(20))
        _keep(connection, _answer(second_job, "d", shape="Status=Done"), at=NOW + seconds(5))

        done_shape, other_shape = answer_shapes(connection)
        assert (done_shape.shape, done_shape.count, done_shape.jobs) == ("status=done", 3, 2)
        assert (done_shape.first_at, done_shape.last_at, done_shape.job_id) == (NOW, NOW + seconds(20), second_job)
        assert (other_shape.shape, other_shape.count, other_shape.jobs) == ("Status=Done", 1, 1)
        assert [row.body for row in answers_of(connection, shape="status=done")] == ["c", "b", "a"]


def test_only_pending_failed_and_expired_jobs_are_read_again(engine: Engine) -> None:
    ended = {"due_at": None, "completed_at": NOW}
    with engine.begin() as connection:
        states = {
            "pending": add_job(connection, "1"),
            "failed": add_job(connection, "2", status="failed", error_code="api_failed", **ended),
            "expired": add_job(connection, "3", status="expired", error_code="expired", **ended),
            "completed": add_job(connection, "4", status="completed", ready_at=NOW, **ended),
            "cancelled": add_job(connection, "5", status="cancelled", **ended),
            "downloading": add_job(connection, "6", status="downloading", due_at=None, ready_at=NOW),
        }
        without = add_job(connection, "7")
        _keep(connection, *(_answer(job_id) for job_id in states.values()))
        _keep(connection, _answer(states["failed"], "x", shape="other"))

        job_ids = jobs_with_answers(connection)
        assert job_ids == [states["pending"], states["failed"], states["expired"]]
        assert without not in job_ids
        assert jobs_with_answers(connection, shape="other") == [states["failed"]]
