"""A small shop that sells pictures, with plain functions, SQLAlchemy and fetch-worker."""

import os

from sqlalchemy import Engine, Integer, String, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import worker


class Base(DeclarativeBase):
    """The tables of the shop, in the same database as those of fetch-worker."""


class Order(Base):
    """An order, and the job that makes its picture."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    job_id: Mapped[int] = mapped_column(Integer)
    state: Mapped[str] = mapped_column(String(20), default="in progress")


def database() -> Engine:
    """Return an engine for the database that the shop and fetch-worker share."""
    return create_engine(os.environ["DATABASE_URL"])


def order(session: Session, prompt: str) -> Order:
    """Order a picture. The order of the shop and that at the API are committed in one transaction."""
    payload = {"prompt": prompt}
    job_id = worker.order("v6/images/text2img", payload, session=session, on_done="shop.picture_ready")
    order = Order(job_id=job_id)
    session.add(order)
    return order


def progress(ordered: Order) -> str:
    """Return what the page of the customer shows."""
    job = worker.get(ordered.job_id)
    states = {"ordered": "in progress", "pending": "in progress", "completed": "ready"}
    return "lost" if job is None else states.get(job.status, job.status)


def picture(ordered: Order) -> bytes:
    """Wait for the picture and return its bytes."""
    job = worker.wait(ordered.job_id, timeout=60)
    with worker.open_output(job.outputs[0].id) as file:
        return file.read()


def picture_ready(session: Session, job_id: int) -> None:
    """Process a final job; called by a Celery task of the shop."""
    job = worker.get(job_id)
    order = session.query(Order).filter_by(job_id=job_id).one()
    order.state = "shipped" if job is not None and job.status == "completed" else "refunded"
