"""Hold back Python's garbage collector while many objects are made that all stay.

A full collection looks at every object of the process. In an app with many libraries it stops all threads for a tenth
of a second or more, an event loop too, and finds nothing among objects that were just made.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_held = 0
_was_enabled = False


@contextmanager
def no_collections() -> Iterator[None]:
    """Hold back collections for a short time, of a second or so. Several threads may do so at once."""
    global _held, _was_enabled
    with _lock:
        if _held == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _held += 1
    try:
        yield
    finally:
        with _lock:
            _held -= 1
            if _held == 0 and _was_enabled:
                gc.enable()
