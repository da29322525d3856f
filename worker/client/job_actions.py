"""The actions on jobs, with their words: the command line and the page show the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from worker.client.actions import cancel, notify, retry
from worker.client.holds import hold, resume

Action = Literal["retry", "cancel", "hold", "resume"]  # those that can change all jobs that match a filter
FILTER_ACTIONS: tuple[Action, ...] = get_args(Action)


@dataclass(frozen=True, slots=True)
class JobAction:
    """An action on jobs: its meaning, the words for jobs that changed and that did not, and the function for one job.

    `states` are the states of the jobs that it can change. They are needed to change all jobs that match a filter.
    """

    name: str
    meaning: str
    done: str
    unchanged: str
    work: Callable[[int], bool]
    states: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The text of the button."""
        return self.name.title()


JOB_ACTIONS: Mapping[str, JobAction] = MappingProxyType({
    action.name: action
    for action in (
        JobAction("retry", "Failed and expired jobs are tried again at once, with a new deadline. "
            "An uncertain order is sent again: if the API has taken it, it is paid twice.",
            "retried", "neither failed, expired nor uncertain", retry, ("failed", "expired", "uncertain")),
        JobAction("cancel", "The jobs end; their stored files stay. This can't be undone.",
            "cancelled", "already final", cancel, ("ordered", "uncertain", "pending", "downloading")),
        JobAction("hold", "The jobs are not polled until they are resumed. Only pending jobs can be held.",
            "held", "not pending or already held", hold, ("pending",)),
        JobAction("resume", "Held and waiting jobs, and jobs of a dead process, continue at once.",
            "resumed", "not waiting", resume, ("pending", "downloading")),
        JobAction("notify", "The webhooks of the jobs are sent again, with the same ids and bodies.",
            "notified", "without a webhook to send", notify),
    )
})  # fmt: skip
