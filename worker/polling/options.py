"""How one process polls: its settings, its limits, and what it calls after a commit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import SecretStr

from worker.core.pacing.policy import Pace
from worker.settings import Settings

MAX_IN_FLIGHT = 128  # requests to one host at once: 850 per second at 150 ms per answer


@dataclass(frozen=True, slots=True, kw_only=True)
class PollOptions:
    """The settings of the pollers of one process. The limits below `late_looks` are changed by tests only.

    `keys` are the API keys by account, which can change at any time. `rps` returns the requests per second of an
    account, for all processes together. `late_looks` are the seconds after its deadline at which an expired job is
    polled again.
    """

    keys: Mapping[str, SecretStr]
    rps: Callable[[str], float]
    pace: Pace
    api_timeout: float
    late_looks: Sequence[float] = ()
    threads: int = MAX_IN_FLIGHT  # per host; the test kit has one, so that requests have an order
    max_in_flight: int = MAX_IN_FLIGHT  # per host, without the jobs that are claimed ahead
    min_room: int = 32  # with fewer free places, wait for more answers before claiming: each claim has a cost
    batch_patience: float = 2.0  # seconds to wait for a locked row: most transactions of web apps are shorter
    locked_seconds: float = 2.0  # between two tries to write the answers of locked rows
    progress_seconds: float = 2.0  # least time between two progress reports of a run: each is an event on the broker
    hand_over_seconds: float = 2.0  # how long a requested run may take to start; then the watching run polls itself
    unlisted_seconds: float = 3.0  # between two checks of hosts that SD_API_HOSTS does not list: each locks rows


def poll_options(settings: Settings) -> PollOptions:
    """Return the options from the settings."""
    return PollOptions(
        keys=settings.keys,
        rps=settings.rps,
        pace=settings.pace,
        api_timeout=settings.sd_api_timeout,
        late_looks=settings.late_look_seconds,
    )


@dataclass(frozen=True, slots=True)
class AfterCommit:
    """What to call when a transaction is committed. Each function gets the ids of rows, maybe none."""

    queue_downloads: Callable[[Sequence[int]], None]  # of outputs
    notify: Callable[[Sequence[int]], None]  # of final jobs
    slots_freed: Callable[[], object] = lambda: None  # jobs are not at the API any more: orders may be sent
