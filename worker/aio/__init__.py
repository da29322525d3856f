"""The calls of `worker` as coroutines, for asyncio apps: `from worker import aio`, then `await aio.track(…)`.

They take and return what the functions of `worker` with the same names do, and raise the same errors. Nothing blocks
the event loop: database and storage are used in threads, or through your AsyncSession.
"""

from worker.aio.jobs import cancel as cancel
from worker.aio.jobs import find as find
from worker.aio.jobs import get as get
from worker.aio.jobs import get_output as get_output
from worker.aio.jobs import open_output as open_output
from worker.aio.jobs import retry as retry
from worker.aio.ordering import attach as attach
from worker.aio.ordering import order as order
from worker.aio.tracking import track as track
from worker.aio.tracking import track_many as track_many
from worker.aio.watching import changes as changes
from worker.aio.watching import wait as wait

__all__ = [
    "attach",
    "cancel",
    "changes",
    "find",
    "get",
    "get_output",
    "open_output",
    "order",
    "retry",
    "track",
    "track_many",
    "wait",
]
