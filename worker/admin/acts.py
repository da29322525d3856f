"""What an operator can do to jobs, accounts and hosts, and the sentence that says what came of it."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from worker.admin.wording import counted
from worker.client.holds import hold, hold_account_or_host, resume, resume_account_or_host
from worker.client.tracking import cancel, retry
from worker.core.circuit_breaker import Scope
from worker.errors import JobNotFound, Unavailable
from worker.store.jobs import MAX_ID

log = logging.getLogger(__name__)

AT_ONCE_MOST = 500  # jobs of one form


@dataclass(frozen=True, slots=True)
class Act:
    """Something to do to a job: what to press, what it means, what is said of jobs that changed and that did not."""

    name: str
    label: str
    meaning: str
    done: str
    unchanged: str
    work: Callable[[int], bool]


ACTS: Mapping[str, Act] = {
    act.name: act
    for act in (
        Act("retry", "Retry", "Failed and expired jobs are taken up again at once, with their whole deadline.",
            "taken up again", "neither failed nor expired", retry),
        Act("cancel", "Cancel", "The jobs end; what they have stored stays. This can't be undone.",
            "cancelled", "final already", cancel),
        Act("hold", "Hold", "The API is not asked about the jobs until they are resumed. Only pending jobs can be.",
            "held", "not pending, or held already", hold),
        Act("resume", "Resume", "The jobs go on at once: held ones, those that wait, and those a lost process has.",
            "resumed", "kept by nothing", resume),
    )
}  # fmt: skip


def job_ids(words: Sequence[str]) -> list[int]:
    """The ids that a form names, each once; what is no id is left out."""
    plain = (word for word in words[:AT_ONCE_MOST] if word.isascii() and word.isdecimal() and len(word) < 20)
    return list(dict.fromkeys(number for number in map(int, plain) if 0 < number <= MAX_ID))


def act_on(act: Act, ids: Sequence[int]) -> str:
    """Does it to each of the jobs, in the order of their ids; what came of it, in a sentence."""
    came_of_it, trouble = _done_to_each(act, sorted(ids))
    changed, unchanged, missing = (came_of_it[what] for what in ("changed", "unchanged", "missing"))
    said = [f"{counted(changed, 'job')} {act.done}"]
    if unchanged:
        said.append(f"{unchanged:,} {'was' if unchanged == 1 else 'were'} {act.unchanged}")
    if missing:
        said.append(f"{missing:,} {'is' if missing == 1 else 'are'} not there")
    if trouble:
        said.append(f"{len(ids) - came_of_it.total():,} left as they were: {trouble}")
    log.info("%s by an operator jobs=%s changed=%s", act.name, ",".join(map(str, sorted(ids))), changed)
    return ", ".join(said) + "."


def _done_to_each(act: Act, ids: Sequence[int]) -> tuple[Counter[str], str]:
    """How many changed, did not, or are not there; and what kept it from going through all of them, if anything did."""
    came_of_it: Counter[str] = Counter()
    for job_id in ids:
        try:
            came_of_it["changed" if act.work(job_id) else "unchanged"] += 1
        except JobNotFound:
            came_of_it["missing"] += 1
        except Unavailable as away:
            return came_of_it, str(away)
    return came_of_it, ""


def act_on_breaker(name: str, scope: Scope, breaker: str) -> str:
    """Holds or resumes an account or a host as a whole; what came of it, in a sentence."""
    if name == "hold":
        return f"The {scope} {breaker} {'is held' if hold_account_or_host(scope, breaker) else 'was held already'}."
    changed = resume_account_or_host(scope, breaker)
    return f"The {scope} {breaker} {'is resumed: it is tried at once' if changed else 'was open already'}."
