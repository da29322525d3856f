"""Wait for a condition, not for a number of seconds."""

import time
from collections.abc import Callable

WAIT_SECONDS = 60.0  # for conditions that take a second or two on an idle machine
INTERVAL = 0.05


def wait_until(
    condition: Callable[[], object],
    what: str,
    seconds: float = WAIT_SECONDS,
    *,
    seen: Callable[[], object] = lambda: "",
) -> float:
    """Wait until `condition()` is true. Return how long that took, in seconds.

    Fail after `seconds`, naming the condition (`what`) and what `seen()` returns. The limit is not a measurement:
    choose it so large that only a hang reaches it, also on a busy machine.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"waited {seconds:g} s until {what}\n{seen()}".rstrip())
        time.sleep(INTERVAL)
    return time.monotonic() - began
