"""The button or link of a trouble: it does, or shows, what the command of the trouble does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flask import url_for

from worker.operations.remedies import Remedy

JOB_ACTIONS = frozenset({"resume", "retry", "notify"})


@dataclass(frozen=True, slots=True)
class TroubleButton:
    """A button that sends a form, or a link if there are no `fields`."""

    label: str
    target: str
    fields: Sequence[tuple[str, str]] = ()


def trouble_button(remedy: Remedy) -> TroubleButton | None:
    """Return the button for the remedy of a trouble, or `None` if the page can't do it.

    A button only opens the form that asks for confirmation.
    """
    action = ("action", remedy.action)
    match remedy.action, remedy.options:
        case "resume", (("account" | "host" as scope, name),):
            return TroubleButton("Resume", url_for("gates.act"), (action, ("scope", scope), ("name", name)))
        case "resume", (("output-code", code),):
            return TroubleButton("Resume", url_for("jobs.matching", output_code=code), (action,))
        case "list", options:
            parameters: dict[str, Any] = {name.replace("-", "_"): value for name, value in options}
            return TroubleButton("Show the jobs", url_for("jobs.index_view", **parameters))
        case "show", _:
            return TroubleButton("Show the job", url_for("jobs.details_view", id=remedy.jobs[0]))
    if remedy.action in JOB_ACTIONS and remedy.jobs:
        rows = (("rowid", str(job_id)) for job_id in remedy.jobs)
        return TroubleButton(remedy.action.title(), url_for("jobs.action_view"), (action, *rows))
    return None
