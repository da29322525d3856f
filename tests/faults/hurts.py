"""What is done to the way to a database."""

import time
from collections.abc import Callable

from tests.faults.proxy import Proxy


def restarted(way: Proxy, calls: Callable[[], int]) -> None:
    """The server goes away for a moment."""
    way.mode = "refuse"
    way.cut_all()
    time.sleep(3)
    way.mode = "pass"


def unreachable(way: Proxy, calls: Callable[[], int]) -> None:
    """For a minute nothing answers, and the API is asked nothing."""
    way.mode = "refuse"
    way.cut_all()
    time.sleep(3)  # what was in the air has come back
    before = calls()
    time.sleep(57)
    assert calls() == before, "the API was asked though nothing could be recorded"
    way.mode = "pass"


def swallowing(way: Proxy, calls: Callable[[], int]) -> None:
    """Connections stand, and nothing comes through."""
    way.mode = "swallow"
    time.sleep(12)
    way.mode = "pass"
    way.cut_all()


def cut_before_the_commit(way: Proxy, calls: Callable[[], int]) -> None:
    """Nothing is committed."""
    _cut(way, before=True)


def cut_after_the_commit(way: Proxy, calls: Callable[[], int]) -> None:
    """It is committed, and nobody is told."""
    _cut(way, before=False)


def _cut(way: Proxy, *, before: bool) -> None:
    way.cut_at, way.cut_before = b"COMMIT", before
    time.sleep(4)
    way.cut_at = None
    assert way.cuts > 0, "nothing was committed meanwhile"
