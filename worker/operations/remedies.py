"""Remedies: what to do about a trouble or a hold. `status`, `show` and all the others say it in these words.

A remedy has an action and its target. The command that people see and the button of the page are made from them.
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace

from worker.core.circuit_breaker import BY_OPERATOR, NO_SUCH_PATH, NOT_LISTED, REFUSALS, Scope

OR_WAIT = ", or wait: it is tried again by itself"
MAX_NAMED = 5  # jobs that a command names


@dataclass(frozen=True, slots=True)
class Remedy:
    """An action of the command line, the jobs or the options that it is about, and words before and after the command.

    Without an action, `before` says what to do.
    """

    action: str = ""
    jobs: tuple[int, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    before: str = ""
    after: str = ""

    @property
    def text(self) -> str:
        """What people read.

        >>> Remedy("resume", options=(("account", "a b"),), after=OR_WAIT).text
        "fetch-worker resume --account 'a b', or wait: it is tried again by itself"
        """
        if not self.action:
            return self.before
        options = (word for name, value in self.options for word in (f"--{name}", value))
        command = shlex.join(("fetch-worker", self.action, *map(str, self.jobs), *options))
        return f"{self.before}{command}{self.after}"


UP = Remedy("up")
DOCTOR = Remedy("doctor")


def advice(text: str) -> Remedy:
    """Return a remedy that is no command."""
    return Remedy(before=text)


def for_jobs(action: str, job_ids: Iterable[int]) -> Remedy:
    """Return the remedy that does something with jobs. It names the first few of them."""
    return Remedy(action, jobs=tuple(dict.fromkeys(job_ids))[:MAX_NAMED])


def for_filter(action: str, option: str, value: str) -> Remedy:
    """Return the remedy that does something with all jobs that match an option of the command line."""
    return Remedy(action, options=((option, value),))


def for_hold(scope: Scope, name: str, reason: str) -> Remedy:
    """Return the remedy for a hold of an account or host. `reason` begins with its class."""
    resume = for_filter("resume", scope, name)
    if reason == BY_OPERATOR:
        return resume
    if reason.startswith(NOT_LISTED):
        return advice(f"add {name} to SD_API_HOSTS and restart the workers")
    if scope == "host" and NO_SUCH_PATH in reason:
        return advice("correct SD_API_URL and restart the workers")
    if reason.startswith(REFUSALS["key"]):
        right_key = f"put the right key of {name} into {_variable(name)} and restart the workers"
        return replace(resume, before=f"{right_key}; if the API accepts the key again, ")
    if reason.startswith(REFUSALS["credits"]):
        return replace(resume, before=f"buy credits for {name}, then ", after=OR_WAIT)
    if reason.startswith(REFUSALS["plan"]):
        return replace(resume, before=f"check the plan of {name} with the API's provider, then ", after=OR_WAIT)
    return replace(resume, after=OR_WAIT)


def for_missing_key(account: str) -> Remedy:
    """Return the remedy for an account without a key."""
    return advice(f"put the key of {account} into {_variable(account)} and restart the workers")


def _variable(account: str) -> str:
    return f"{'SD_API_KEY' if account == 'default' else 'SD_API_KEYS'} or SD_API_KEYS_FILE"
