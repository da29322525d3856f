"""Test kit for web apps: a stand-in of the hosted API and an in-process worker, driven by a test clock.

The pytest plugin provides the fixtures of `worker.testing.plugin`. `kit` is the same as a context manager, for other
test runners. Public names are imported on first use, because pytest loads its plugins in every session.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.store.migrate import migrate as migrate
    from worker.testing.inline import FetchWorker as FetchWorker
    from worker.testing.inline import NeverEnds as NeverEnds
    from worker.testing.inline import Sent as Sent
    from worker.testing.inline import Told as Told
    from worker.testing.kit_setup import Kit as Kit
    from worker.testing.kit_setup import kit as kit
    from worker.testing.stand_in import Answers as Answers
    from worker.testing.stand_in import FetchApi as FetchApi
    from worker.testing.works import KitError as KitError

_HOME = {
    "Answers": "worker.testing.stand_in",
    "FetchApi": "worker.testing.stand_in",
    "FetchWorker": "worker.testing.inline",
    "Sent": "worker.testing.inline",
    "Kit": "worker.testing.kit_setup",
    "KitError": "worker.testing.works",
    "NeverEnds": "worker.testing.inline",
    "Told": "worker.testing.inline",
    "kit": "worker.testing.kit_setup",
    "migrate": "worker.store.migrate",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'worker.testing' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
