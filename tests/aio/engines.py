"""An app's own asynchronous engine for the database of a test."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

DRIVERS = {"postgresql": "postgresql+asyncpg", "sqlite": "sqlite+aiosqlite", "mysql": "mysql+aiomysql"}
DRIVERS["mariadb"] = DRIVERS["mysql"]


@asynccontextmanager
async def app_engine(database: Engine, driver: str | None = None) -> AsyncIterator[AsyncEngine]:
    """Yield an engine for the same database as another one."""
    engine = create_async_engine(database.url.set(drivername=driver or DRIVERS[database.dialect.name]))
    try:
        yield engine
    finally:
        await engine.dispose()
