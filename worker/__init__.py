"""fetch-worker: polls a hosted image API until each job is ready, and stores its outputs.

Public names are imported on first use, so that importing the package is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker import aio as aio
    from worker.client.actions import cancel as cancel
    from worker.client.actions import nudge as nudge
    from worker.client.actions import retry as retry
    from worker.client.holds import hold as hold
    from worker.client.holds import resume as resume
    from worker.client.jobs import Job as Job
    from worker.client.jobs import Output as Output
    from worker.client.jobs import find as find
    from worker.client.jobs import get as get
    from worker.client.jobs import get_output as get_output
    from worker.client.jobs import open_output as open_output
    from worker.client.jobs import output_url as output_url
    from worker.client.ordering import attach as attach
    from worker.client.ordering import order as order
    from worker.client.tracking import TrackedJob as TrackedJob
    from worker.client.tracking import track as track
    from worker.client.tracking import track_many as track_many
    from worker.client.watching import changes as changes
    from worker.client.watching import wait as wait
    from worker.core.pacing.estimate import Progress as Progress
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

__version__ = "0.1.0"
__path__.append(f"{__path__[0]}/deprecated")  # former import paths still work for one release

_HOMES = {
    "worker.core.pacing.estimate": ("Progress",),
    "worker.client.ordering": ("attach", "order"),
    "worker.client.tracking": ("TrackedJob", "track", "track_many"),
    "worker.client.jobs": ("Job", "Output", "find", "get", "get_output", "open_output", "output_url"),
    "worker.client.watching": ("changes", "wait"),
    "worker.client.actions": ("cancel", "nudge", "retry"),
    "worker.client.holds": ("hold", "resume"),
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
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name == "aio":
        return import_module("worker.aio")
    if name not in _HOME:
        raise AttributeError(f"module 'worker' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted([*globals(), *_HOME, "aio"])
