"""A naive implementation for comparison: one Celery task per poll, which retries itself with a countdown."""

import os
from typing import Any

import requests
from celery import Celery
from sqlalchemy import BigInteger, Integer, String, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

URL = os.environ["NAIVE_API"]
app = Celery("naive", broker=os.environ["REDIS_URL"])
app.conf.update(task_default_queue="naive", worker_send_task_events=True)
engine = create_engine(os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+psycopg:"))


class Base(DeclarativeBase):
    """Declarative base of the naive implementation."""


class NaivePicture(Base):
    """A row per picture."""

    __tablename__ = "naive_pictures"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    status: Mapped[str] = mapped_column(String(16))
    polls: Mapped[int] = mapped_column(Integer)


@app.task(bind=True, name="naive.poll", max_retries=None)  # type: ignore[untyped-decorator]  # celery has no types
def poll(self: Any, picture_id: int) -> None:
    """Poll a picture once. Retry if it is not ready."""
    with Session(engine) as session:
        picture = session.get_one(NaivePicture, picture_id)
        answer = requests.post(f"{URL}/fetch/{picture_id}", json={"key": "sk-benchmark"}, timeout=20).json()
        picture.polls += 1
        picture.status = answer["status"]
        session.commit()
    if answer["status"] == "processing":
        raise self.retry(countdown=1)


def prepare(count: int) -> None:
    """Create the table and send a task for each picture."""
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([NaivePicture(id=number, status="pending", polls=0) for number in range(1, count + 1)])
        session.commit()
    for number in range(1, count + 1):
        poll.delay(number)


if __name__ == "__main__":
    prepare(300)
