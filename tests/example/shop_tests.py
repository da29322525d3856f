"""Tests of the shop: copy this file as `test_shop.py` beside `shop.py`. They need pytest and fetch-worker."""

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
    """A session on the database of the test, with the tables of the shop and of fetch-worker."""
    engine = shop.database()
    shop.Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()


def place_order(session: Session) -> shop.Order:
    """Place an order and commit it."""
    order = shop.order(session, "a lake at dawn")
    session.commit()
    return order


def test_an_order_gets_its_picture(session: Session, fetch_worker: FetchWorker, fetch_api: FetchApi) -> None:
    order = place_order(session)

    job = fetch_worker.run(order.job_id)

    assert job.status == "completed"
    assert fetch_worker.told == [("shop.picture_ready", "celery", order.job_id)]
    assert fetch_api.submissions == [{"prompt": "a lake at dawn"}]
    assert shop.progress(order) == "ready"


def test_the_page_shows_that_the_order_is_in_progress(
    session: Session, fetch_worker: FetchWorker, fetch_api: FetchApi
) -> None:
    fetch_api.ready_after(20)
    order = place_order(session)

    assert shop.progress(order) == "in progress"
    fetch_worker.advance(19)
    assert shop.progress(order) == "in progress"
    fetch_worker.advance(60)
    assert shop.progress(order) == "ready"


def test_the_shop_can_wait_for_the_picture(session: Session) -> None:
    assert shop.picture(place_order(session)).startswith(b"\x89PNG")


def test_a_failed_order_is_refunded(session: Session, fetch_worker: FetchWorker, fetch_api: FetchApi) -> None:
    fetch_api.answers().processing(2).failed("out of paint")
    celery = Celery("shop", set_as_current=False)

    @celery.task(name="shop.picture_ready")  # type: ignore[untyped-decorator]
    def picture_ready(job_id: int) -> None:
        shop.picture_ready(session, job_id)

    fetch_worker.celery = celery
    order = place_order(session)

    job = fetch_worker.run(order.job_id)

    assert (job.status, job.error_message) == ("failed", "out of paint")
    assert fetch_api.asked(job.remote_id) == 4
    assert order.state == "refunded"


def test_a_refused_order_is_refunded(session: Session, fetch_worker: FetchWorker, fetch_api: FetchApi) -> None:
    fetch_api.refuses("NSFW content detected")
    order = place_order(session)

    job = fetch_worker.run(order.job_id)

    assert (job.status, job.error_message) == ("failed", "NSFW content detected")
    assert fetch_worker.told == [("shop.picture_ready", "celery", order.job_id)]
    assert fetch_api.charged == 0


def test_an_order_whose_answer_is_lost_is_paid_for_once(
    session: Session, fetch_worker: FetchWorker, fetch_api: FetchApi
) -> None:
    fetch_api.loses_the_answer()
    order = place_order(session)

    assert fetch_worker.run(order.job_id).status == "uncertain"
    assert worker.attach(order.job_id, fetch_api.last_id)  # as the shop's staff does

    assert fetch_worker.run(order.job_id).status == "completed"
    assert fetch_api.charged == 1


def test_an_order_that_is_rolled_back_is_not_sent(
    session: Session, fetch_worker: FetchWorker, fetch_api: FetchApi
) -> None:
    shop.order(session, "a lake at dawn")
    session.rollback()

    assert fetch_worker.run_all() == []
    assert fetch_api.submissions == []


@pytest.mark.parametrize("turn", [1, 2])
def test_tests_do_not_affect_each_other(turn: int, session: Session, fetch_api: FetchApi) -> None:
    assert worker.get(1) is None
    assert fetch_api.submissions == []

    place_order(session)


def test_a_test_without_the_fixtures_keeps_its_environment() -> None:
    assert "SD_API_URL" not in os.environ
    assert os.environ["DATABASE_URL"] == "postgresql://nobody@db.example/production"
