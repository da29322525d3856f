"""Settings of a job's way: when it is polled and expires, who is told that it is final, and when it is pruned."""

from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, SecretStr

from worker.configuration.setting_types import (
    MAX_SECONDS,
    Network,
    Networks,
    SettingsGroup,
    items,
    networks,
    readable_by,
)
from worker.core.durations import parse_duration
from worker.core.lifecycle import FINAL_STATES
from worker.core.pacing.policy import Pace, Policy
from worker.core.webhook import secret_bytes

MAX_LATE_LOOKS, MAX_LATE_LOOK_SECONDS = 20, 30 * 86_400.0
DEFAULT_LATE_LOOKS = "1h,3h,10h,24h"
MIN_PRUNE_SECONDS = 3_600.0  # a process that waits for a job must still find it
LONG_DEADLINES = (("training", 14_400.0), ("video", 7_200.0))


def _late_looks(text: str) -> tuple[float, ...]:
    """Return the durations of LATE_LOOKS in ascending order. Raises ValueError."""
    durations = items(text.lower())
    if durations in ([], ["off"], ["none"], ["no"], ["false"], ["0"]):
        return ()
    if durations in (["on"], ["yes"], ["true"]):
        return _late_looks(DEFAULT_LATE_LOOKS)
    try:
        spans = sorted({parse_duration(item) for item in durations})
    except ValueError:
        raise ValueError("must be off, or a list of durations after the deadline, such as 1h,3h,10h,24h") from None
    if len(spans) > MAX_LATE_LOOKS or not 0 < spans[0] <= spans[-1] <= MAX_LATE_LOOK_SECONDS:
        raise ValueError(f"must have at most {MAX_LATE_LOOKS} durations, from 1 s to 30d")
    return tuple(spans)


class PollingSettings(SettingsGroup):
    """When jobs are polled, and when they expire."""

    poll_price: float = Field(default=0.5, gt=0, le=3_600)
    poll_min: float = Field(default=3.0, ge=0, le=3_600)
    poll_policy: Policy = "learned"
    job_deadline: float | None = Field(default=None, gt=0, le=MAX_SECONDS)
    late_looks: Annotated[str, readable_by(_late_looks)] = DEFAULT_LATE_LOOKS
    recovery_seconds: float = Field(default=30.0, ge=5, le=3_600)
    end_when_stalled: bool = False

    @cached_property
    def pace(self) -> Pace:
        """The pacing of polls."""
        return Pace(self.poll_policy, self.poll_price, self.poll_min)

    @cached_property
    def late_look_seconds(self) -> tuple[float, ...]:
        """Seconds after its deadline at which an expired job is polled again. Empty if switched off."""
        return _late_looks(self.late_looks)

    def deadline_for(self, kind: str) -> float:
        """Return the seconds from submission after which a job of `kind` may expire."""
        if self.job_deadline is not None:
            return self.job_deadline
        return next((seconds for word, seconds in LONG_DEADLINES if word in kind), 3_600.0)


def _secrets(text: str) -> tuple[bytes, ...]:
    try:
        return tuple(secret_bytes(item) for item in items(text))
    except ValueError as error:
        raise ValueError(f"{error}; several are separated by commas, the first is the current one") from None


class NotifySettings(SettingsGroup):
    """The `on_done` calls and the webhooks for jobs that are final."""

    on_done_tasks: str = ""
    webhook_secret: Annotated[SecretStr, readable_by(_secrets)] | None = None
    webhook_allowed_networks: Networks = ""

    @cached_property
    def allowed_tasks(self) -> frozenset[str] | None:
        """The task names that `on_done` may use, or None if any is allowed."""
        return frozenset(items(self.on_done_tasks)) or None

    @property
    def webhook_secret_texts(self) -> list[str]:
        """The secrets that sign webhooks, as they are written in WEBHOOK_SECRET."""
        return items("" if self.webhook_secret is None else self.webhook_secret.get_secret_value())

    @cached_property
    def webhook_secrets(self) -> tuple[bytes, ...]:
        """The secrets that sign webhooks, the current one first."""
        return tuple(secret_bytes(item) for item in self.webhook_secret_texts)

    @cached_property
    def webhook_networks(self) -> tuple[Network, ...]:
        """Non-public networks that webhooks may be sent to."""
        return networks(self.webhook_allowed_networks)


def _prune_age(text: str) -> float | None:
    seconds = parse_duration(text) if text else None
    if seconds is not None and not MIN_PRUNE_SECONDS <= seconds <= MAX_SECONDS:
        raise ValueError("must be from 1h to ten years")
    return seconds


def _final_states(text: str) -> tuple[str, ...]:
    states = tuple(dict.fromkeys(items(text)))
    if not states or not FINAL_STATES.issuperset(states):
        raise ValueError(f"must list final states: {', '.join(sorted(FINAL_STATES))}")
    return states


class RetentionSettings(SettingsGroup):
    """When jobs are pruned, and whether their files are removed too."""

    prune_after: Annotated[str, readable_by(_prune_age)] = ""
    prune_states: Annotated[str, readable_by(_final_states)] = "completed,cancelled"
    prune_files: Literal["keep", "remove"] = "keep"

    @cached_property
    def prune_seconds(self) -> float | None:
        """The age in seconds, since its end, at which a job is pruned. None means never."""
        return _prune_age(self.prune_after)

    @cached_property
    def states_to_prune(self) -> tuple[str, ...]:
        """The final states whose jobs are pruned."""
        return _final_states(self.prune_states)
