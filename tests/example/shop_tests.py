"""The shop's tests: copy them as `test_shop.py` beside `shop.py`. They need pytest and `pip install fetch-worker`."""

import os
from collections.abc import Iterator

import pytest
import shop
from celery import Celery
from sqlalchemy.orm import Session

import worker
from worker.testing import FetchApi, FetchWorker


@pytest.fixture
def session(fetch_worker: FetchWorker) -> Iterator[Session]:
    """The shop's tables, beside those of fetch-worker, in a database of this test's own."""
    engine = shop.database()
    shop.Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()


def ordered(session: Session) -> shop.Order:
    """An order that is committed."""
    made = shop.order(session, "a lake at dawn")
    session.commit()
    return made


def test_an_order_gets_its_picture(session: Session, fetch_worker: FetchWorker, fetch_api: FetchApi) -> None:
    made = ordered(session)

    job = fetch_worker.run(made.job_id)

    assert job.status == "completed"
    assert fetch_worker.told == [("shop.picture_ready", "celery", made.job_id)]
    assert fetch_api.submissions == [{"prompt": "a lake at dawn"}]
    assert shop.progress(made) == "here it is"


def test_the_page_shows_that_it_is_being_painted(
    session: Session, fetch_worker: FetchWorker, fetch_api: FetchApi
) -> None:
    fetch_api.ready_after(20)
    made = ordered(session)

    fetch_worker.advance(19)
    assert shop.progress(made) == "being painted"
    fetch_worker.advance(60)
    assert shop.progress(made) == "here it is"


def test_whoever_waits_gets_the_picture_at_once(session: Session) -> None:
    assert shop.picture(ordered(session)).startswith(b"\x89PNG")


def test_a_failed_order_is_refunded(session: Session, fetch_worker: FetchWorker, fetch_api: FetchApi) -> None:
    fetch_api.answers().processing(2).failed("out of paint")
    celery = Celery("shop", set_as_current=False)

    @celery.task(name="shop.picture_ready")  # type: ignore[untyped-decorator]
    def picture_ready(job_id: int) -> None:
        shop.picture_ready(session, job_id)

    fetch_worker.celery = celery
    made = ordered(session)

    job = fetch_worker.run(made.job_id)

    assert (job.status, job.error_message) == ("failed", "out of paint")
    assert fetch_api.asked(job.remote_id) == 4
    assert made.state == "refunded"


def test_an_order_that_is_rolled_back_leaves_no_job(session: Session, fetch_worker: FetchWorker) -> None:
    shop.order(session, "a lake at dawn")
    session.rollback()

    assert fetch_worker.run_all() == []


@pytest.mark.parametrize("turn", [1, 2])
def test_no_test_sees_what_another_did(turn: int, session: Session, fetch_api: FetchApi) -> None:
    assert worker.get(1) is None
    assert fetch_api.submissions == []

    ordered(session)


def test_a_test_without_the_fixtures_has_the_environment_it_had() -> None:
    assert "SD_API_URL" not in os.environ
    assert os.environ["DATABASE_URL"] == "postgresql://nobody@db.example/production"
