"""Wait for a condition, never for a number of seconds."""

import time
from collections.abc import Callable

WAIT_SECONDS = 60.0  # for what takes a second or two on a quiet machine
INTERVAL = 0.05


def wait_until(
    condition: Callable[[], object],
    what: str,
    seconds: float = WAIT_SECONDS,
    *,
    seen: Callable[[], object] = lambda: "",
) -> float:
    """Wait until `condition()` is true; return how long that took, in seconds.

    Fail after `seconds` with what was waited for and what `seen()` returns. A bound is no measurement: choose it so
    large that only a hang reaches it, also on a machine with other work.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"waited {seconds:g} s until {what}\n{seen()}".rstrip())
        time.sleep(INTERVAL)
    return time.monotonic() - began
