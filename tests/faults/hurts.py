"""What is done to the way to a database."""

import time
from collections.abc import Callable

from tests.faults.proxy import Proxy
from tests.waiting import wait_until


def restarted(way: Proxy, calls: Callable[[], int]) -> None:
    """The server goes away for a moment."""
    way.mode = "refuse"
    way.cut_all()
    time.sleep(3)
    way.mode = "pass"


def unreachable(way: Proxy, calls: Callable[[], int]) -> None:
    """Nothing answers for 40 seconds, and the API is asked nothing once it is noticed."""
    way.mode = "refuse"
    way.cut_all()
    _wait_for_silence(calls)
    before = calls()
    time.sleep(40)
    assert calls() == before, "the API was asked though nothing could be recorded"
    way.mode = "pass"


def _wait_for_silence(calls: Callable[[], int], seconds: float = 3.0) -> None:
    """Wait until no call has come for some seconds: the last ones that were in flight have arrived."""
    counts = [(time.monotonic(), calls())]

    def silent() -> bool:
        if calls() != counts[-1][1]:
            counts.append((time.monotonic(), calls()))
        return time.monotonic() - counts[-1][0] > seconds

    wait_until(silent, "the API is asked nothing", seen=lambda: f"{counts[-1][1] - counts[0][1]} calls")


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
    way.cuts, way.cut_at, way.cut_before = 0, b"COMMIT", before
    wait_until(lambda: way.cuts, "a connection was cut at its COMMIT")
    time.sleep(2)  # and others after it
    way.cut_at = None
