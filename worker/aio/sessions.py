"""The `session` argument of the coroutines: a session or a connection of SQLAlchemy's asyncio extension."""

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

from worker.errors import NotTrackable

Session = AsyncSession | AsyncConnection | async_scoped_session[AsyncSession]


def checked_session(session: object, call: str) -> AsyncSession | AsyncConnection:
    """Return the session of a call, such as "track". Raises NotTrackable; the message shows the line to write."""
    if isinstance(session, async_scoped_session):
        session = session()
    if isinstance(session, (AsyncSession, AsyncConnection)):
        return session
    raise NotTrackable(
        f"session must be an AsyncSession or AsyncConnection, not of type {type(session).__name__}: write"
        f" `await aio.{call}(…, session=async_session)`, or call `worker.{call}(…, session=session)`"
    )
