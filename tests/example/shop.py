"""A tiny shop that sells pictures: plain functions, SQLAlchemy, and fetch-worker behind them."""

import json
import os
from urllib.request import Request, urlopen

from sqlalchemy import Engine, Integer, String, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import worker


class Base(DeclarativeBase):
    """The shop's own tables; those of fetch-worker stand beside them."""


class Order(Base):
    """An order, and the job that makes its picture."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    job_id: Mapped[int] = mapped_column(Integer)
    state: Mapped[str] = mapped_column(String(20), default="in the making")


def database() -> Engine:
    """The shop's database, which fetch-worker uses too."""
    return create_engine(os.environ["DATABASE_URL"])


def order(session: Session, prompt: str) -> Order:
    """Asks the API for a picture. Order and job are committed together, or not at all."""
    words = json.dumps({"key": os.environ["SD_API_KEY"], "prompt": prompt}).encode()
    request = Request(f"{os.environ['SD_API_URL']}/text2img", words, {"Content-Type": "application/json"})  # noqa: S310
    with urlopen(request, timeout=10) as answer:  # noqa: S310  # the address comes from the settings
        job_id = worker.track(json.load(answer), session=session, on_done="shop.picture_ready")
    made = Order(job_id=job_id)
    session.add(made)
    return made


def progress(ordered: Order) -> str:
    """What the customer's page shows."""
    job = worker.get(ordered.job_id)
    return (
        "lost" if job is None else {"pending": "being painted", "completed": "here it is"}.get(job.status, job.status)
    )


def picture(ordered: Order) -> bytes:
    """The picture, for whoever has the patience."""
    job = worker.wait(ordered.job_id, timeout=60)
    with worker.open_output(job.outputs[0].id) as file:
        return file.read()


def picture_ready(session: Session, job_id: int) -> None:
    """What the shop's Celery task does when a job is final."""
    job = worker.get(job_id)
    found = session.query(Order).filter_by(job_id=job_id).one()
    found.state = "shipped" if job is not None and job.status == "completed" else "refunded"
