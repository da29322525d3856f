"""Run the blocking calls of `worker` in threads."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from worker.client.connection import release_connection

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(call: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Call a function in a thread, and await its result. Nothing stays open in the thread."""

    def run() -> T:
        try:
            return call(*arguments, **keywords)
        finally:
            release_connection()

    return await asyncio.to_thread(run)
