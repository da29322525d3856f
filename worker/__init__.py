"""fetch-worker: never lose, never wait long for, and never pay twice for a picture that a hosted API makes.

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.core.progress import Progress as Progress
    from worker.enqueue import Job as Job
    from worker.enqueue import Output as Output
    from worker.enqueue import cancel as cancel
    from worker.enqueue import get as get
    from worker.enqueue import nudge as nudge
    from worker.enqueue import open_output as open_output
    from worker.enqueue import output_url as output_url
    from worker.enqueue import retry as retry
    from worker.enqueue import track as track
    from worker.enqueue import track_many as track_many
    from worker.enqueue import wait as wait
    from worker.errors import ApiRefused as ApiRefused
    from worker.errors import DatabaseRefused as DatabaseRefused
    from worker.errors import DeploymentError as DeploymentError
    from worker.errors import JobNotFound as JobNotFound
    from worker.errors import NotTrackable as NotTrackable
    from worker.errors import OutputMissing as OutputMissing
    from worker.errors import RefusedAddress as RefusedAddress
    from worker.errors import SchemaOutdated as SchemaOutdated
    from worker.errors import SettingsError as SettingsError
    from worker.errors import StorageTrouble as StorageTrouble
    from worker.errors import Unavailable as Unavailable
    from worker.errors import WaitTimeout as WaitTimeout
    from worker.errors import WorkerError as WorkerError
    from worker.holds import hold as hold
    from worker.holds import resume as resume

__version__ = "0.1.0"

_HOMES = {
    "worker.core.progress": ("Progress",),
    "worker.enqueue": (
        "Job",
        "Output",
        "cancel",
        "get",
        "nudge",
        "open_output",
        "output_url",
        "retry",
        "track",
        "track_many",
        "wait",
    ),
    "worker.errors": (
        "ApiRefused",
        "DatabaseRefused",
        "DeploymentError",
        "JobNotFound",
        "NotTrackable",
        "OutputMissing",
        "RefusedAddress",
        "SchemaOutdated",
        "SettingsError",
        "StorageTrouble",
        "Unavailable",
        "WaitTimeout",
        "WorkerError",
    ),
    "worker.holds": ("hold", "resume"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Loads a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module 'worker' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*globals(), *_HOME])
