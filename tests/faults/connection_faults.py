"""Faults of the connection to a database, injected by a proxy."""

import time
from collections.abc import Callable

from tests.faults.proxy import Proxy
from tests.waiting import wait_until


def restarted(proxy: Proxy, calls: Callable[[], int]) -> None:
    """Refuse connections for three seconds, as a restart of the server does."""
    proxy.mode = "refuse"
    proxy.cut_all()
    time.sleep(3)
    proxy.mode = "pass"


def unreachable(proxy: Proxy, calls: Callable[[], int]) -> None:
    """Refuse connections for 40 seconds. Check that polling stops once the worker notices."""
    proxy.mode = "refuse"
    proxy.cut_all()
    _wait_for_silence(calls)
    before = calls()
    time.sleep(40)
    assert calls() == before, "the API was polled although no answer could be recorded"
    proxy.mode = "pass"


def _wait_for_silence(calls: Callable[[], int], seconds: float = 3.0) -> None:
    """Wait until the API has received no request for `seconds`, so that no request is in flight."""
    counts = [(time.monotonic(), calls())]

    def silent() -> bool:
        if calls() != counts[-1][1]:
            counts.append((time.monotonic(), calls()))
        return time.monotonic() - counts[-1][0] > seconds

    wait_until(silent, "no request reaches the API", seen=lambda: f"{counts[-1][1] - counts[0][1]} calls")


def swallowing(proxy: Proxy, calls: Callable[[], int]) -> None:
    """Keep connections open for twelve seconds, but drop all data."""
    proxy.mode = "swallow"
    time.sleep(12)
    proxy.mode = "pass"
    proxy.cut_all()


def cut_before_the_commit(proxy: Proxy, calls: Callable[[], int]) -> None:
    """Cut connections before the COMMIT reaches the server: the transaction is rolled back."""
    _cut(proxy, before=True)


def cut_after_the_commit(proxy: Proxy, calls: Callable[[], int]) -> None:
    """Cut connections after the COMMIT reaches the server: it is committed, but the client gets no reply."""
    _cut(proxy, before=False)


def _cut(proxy: Proxy, *, before: bool) -> None:
    proxy.cuts, proxy.cut_at, proxy.cut_before = 0, b"COMMIT", before
    wait_until(lambda: proxy.cuts, "a connection was cut at its COMMIT")
    time.sleep(2)  # so that more connections are cut
    proxy.cut_at = None
