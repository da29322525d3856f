"""Run the blocking calls of `worker` in threads."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from worker.client.connection import app_database

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(call: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Call a function in a thread, and await its result.

    If the app's framework manages the database connection, it is the thread of that connection.
    """
    database = app_database()
    if database is None:
        return await asyncio.to_thread(call, *arguments, **keywords)
    return await database.in_thread(partial(call, *arguments, **keywords))
