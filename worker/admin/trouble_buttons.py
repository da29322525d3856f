"""The button or link of a trouble: it does, or shows, what the command of the trouble does."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flask import url_for

from worker.operations.troubles import Trouble

JOB_COMMANDS = frozenset({"resume", "retry", "notify"})


@dataclass(frozen=True, slots=True)
class TroubleButton:
    """A button that sends a form, or a link if there are no `fields`."""

    label: str
    target: str
    fields: Sequence[tuple[str, str]] = ()


def trouble_button(trouble: Trouble) -> TroubleButton | None:
    """Return the button for the command of a trouble, or `None` if the page can't do it.

    A button only opens the form that asks for confirmation.
    """
    words = shlex.split(trouble.command) if trouble.command.startswith("fetch-worker ") else []
    match words[1:]:
        case ["resume", "--account" | "--host" as option, name]:
            scope = option.removeprefix("--")
            form = (("action", "resume"), ("scope", scope), ("name", name))
            return TroubleButton("Resume", url_for("gates.act"), form)
        case ["resume", "--output-code", code]:
            return TroubleButton("Resume", url_for("jobs.matching", output_code=code), (("action", "resume"),))
        case [command, *ids] if command in JOB_COMMANDS and ids and all(word.isdecimal() for word in ids):
            rows = (("rowid", job_id) for job_id in ids)
            return TroubleButton(command.title(), url_for("jobs.action_view"), (("action", command), *rows))
        case ["show", job_id]:
            return TroubleButton("Show the job", url_for("jobs.details_view", id=job_id))
        case ["list", *options]:
            return TroubleButton("Show the jobs", url_for("jobs.index_view", **_parameters(options)))
    return None


def _parameters(options: Sequence[str]) -> dict[str, Any]:
    names = [option.removeprefix("--").replace("-", "_") for option in options[::2]]
    return dict(zip(names, options[1::2], strict=False))
