"""The `session` argument: the database connection behind it, and the wake-up after its commit."""

import asyncio
from typing import Protocol

from sqlalchemy import Connection, event
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session, scoped_session

from worker.client.connection import cached_settings
from worker.client.workers import wake
from worker.errors import NotTrackable

ASYNC_MODULE = "sqlalchemy.ext.asyncio"
_WAKES = "fetch-worker: this session tracked a job that is due soon"


class TrackingSession(Protocol):
    """A SQLAlchemy Session or scoped_session, also Flask-SQLAlchemy's `db.session`."""

    def connection(self) -> Connection:
        """Return the connection of the session's transaction."""
        ...


def session_connection(session: TrackingSession | Connection, call: str = "track") -> Connection:
    """Return the connection of a session's transaction. `call` is the function that was called.

    Raises NotTrackable; the message shows the line to write.
    """
    if isinstance(session, Connection):
        if session.closed:
            raise NotTrackable(f"session is a closed Connection: call {call} before it is closed")
        return session
    if _is_async(session):
        raise NotTrackable(
            f"session is of type {type(session).__name__}: write `await worker.aio.{call}(…, session=session)`"
        )
    if isinstance(session, type) or not callable(getattr(session, "connection", None)):
        raise NotTrackable(f"session must be a SQLAlchemy Session or Connection: {_advice(session, call)}")
    try:
        connection = session.connection()
    except UnboundExecutionError:
        raise NotTrackable(
            f"session has no engine of its own: write `{call}(…, session=session.connection(bind_arguments={{…}}))`"
        ) from None
    if not isinstance(connection, Connection):
        raise NotTrackable(f"session must be a SQLAlchemy Session or Connection: {_advice(session, call)}")
    return connection


def _is_async(session: object) -> bool:
    return any(base.__module__.startswith(ASYNC_MODULE) for base in type(session).__mro__)


def _advice(session: object, call: str) -> str:
    in_block = f"write `with Session(engine) as session, session.begin(): {call}(…, session=session)`"
    if isinstance(session, type):
        return f"this is the class {session.__name__} itself, {in_block}"
    name = type(session).__name__
    if isinstance(getattr(session, "session", None), (Session, scoped_session)):  # Flask-SQLAlchemy's `db`
        return f"this is of type {name}, write `{call}(…, session=db.session)`"
    if type(session).__module__.startswith("django."):
        return f"this is Django's {name}, write `{call}(…)` without a session, with 'worker.django' in INSTALLED_APPS"
    if callable(session) or hasattr(session, "connect"):
        return f"this is of type {name}, {in_block}"
    advice = f"write `{call}(…, session=session)` with the session of your transaction, or leave it out"
    return f"this is of type {name}, {advice}"


def wake_after_commit(session: TrackingSession | Connection) -> None:
    """Wake the workers when the transaction is committed, because a job in it is due soon.

    For other session types the next poll run finds the jobs, a second later at most.
    """
    if isinstance(session, Connection):
        # SQLAlchemy announces a commit just before it. That is soon enough: a woken worker looks again and again.
        if not event.contains(session, "commit", _connection_commits):
            event.listen(session, "commit", _connection_commits)
        return
    real_session = session() if isinstance(session, scoped_session) else session
    if isinstance(real_session, Session):
        if _WAKES not in real_session.info:
            event.listen(real_session, "after_commit", _committed)
            event.listen(real_session, "after_rollback", _rolled_back)
        real_session.info[_WAKES] = True


def _connection_commits(_: Connection) -> None:
    _wake()


def _committed(session: Session) -> None:
    if session.info[_WAKES] and not session.in_nested_transaction():
        session.info[_WAKES] = False
        _wake()


def _rolled_back(session: Session) -> None:
    if not session.in_nested_transaction():
        session.info[_WAKES] = False


def _wake() -> None:
    """Wake the workers. On the thread of an event loop, do it in another thread: Redis may be slow to answer."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        wake(cached_settings())
    else:
        loop.run_in_executor(None, lambda: wake(cached_settings()))
