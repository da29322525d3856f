"""Actions of operators on jobs, accounts and hosts. Each returns a sentence with its result."""

import logging
import time
from collections import Counter
from collections.abc import Sequence

from sqlalchemy import Connection

from worker.client.holds import hold_account_or_host, resume_account_or_host
from worker.client.job_actions import JOB_ACTIONS, Action, JobAction
from worker.client.matching import change_matching, changeable
from worker.client.ordering import attach
from worker.client.selection import filter_options
from worker.core.circuit_breaker import Scope
from worker.core.humanize import format_count
from worker.errors import JobNotFound, NotTrackable, Unavailable
from worker.settings import Settings
from worker.store.jobs import MAX_ID
from worker.store.reports.search import JobFilter, count_matching
from worker.system.who import acting

log = logging.getLogger(__name__)

MAX_JOBS = 500  # jobs per form
MATCHING_SECONDS = 20.0  # of one change of all jobs that match: then the browser gets its answer
COUNTED_MOST = 100_000  # jobs that match


def job_ids(values: Sequence[str]) -> list[int]:
    """Return the job ids of a form without duplicates. Invalid ids are left out."""
    numbers = (value for value in values[:MAX_JOBS] if value.isascii() and value.isdecimal() and len(value) < 20)
    return list(dict.fromkeys(number for number in map(int, numbers) if 0 < number <= MAX_ID))


def apply_to_jobs(action: JobAction, ids: Sequence[int], *, who: str) -> str:
    """Apply an action to each job, in the order of their ids. Return the result as a sentence."""
    with acting("page", who):
        outcomes, error = _apply_to_each(action, sorted(ids))
    changed, unchanged, missing = (outcomes[outcome] for outcome in ("changed", "unchanged", "missing"))
    parts = [f"{format_count(changed, 'job')} {action.done}"]
    if unchanged:
        parts.append(f"{unchanged:,} {'was' if unchanged == 1 else 'were'} {action.unchanged}")
    if missing:
        parts.append(f"{missing:,} {'does' if missing == 1 else 'do'} not exist")
    if error:
        parts.append(f"{len(ids) - outcomes.total():,} not changed: {error}")
    log.info("%s by an operator jobs=%s changed=%s", action.name, ",".join(map(str, sorted(ids))), changed)
    return ", ".join(parts) + "."


def _apply_to_each(action: JobAction, ids: Sequence[int]) -> tuple[Counter[str], str]:
    """Return how many jobs changed, did not change or do not exist, and the error that ended the run, if any."""
    outcomes: Counter[str] = Counter()
    for job_id in ids:
        try:
            outcomes["changed" if action.work(job_id) else "unchanged"] += 1
        except JobNotFound:
            outcomes["missing"] += 1
        except Unavailable as error:
            return outcomes, str(error)
    return outcomes, ""


def count_changeable(connection: Connection, action: Action, job_filter: JobFilter) -> str:
    """Return how many matching jobs the action can change, such as "12 jobs"; empty if there are none."""
    count = count_matching(connection, changeable(action, job_filter), limit=COUNTED_MOST + 1)
    if count > COUNTED_MOST:
        return f"more than {COUNTED_MOST:,} jobs"
    return format_count(count, "job") if count else ""


def apply_to_matching(action: Action, job_filter: JobFilter, settings: Settings, *, who: str) -> str:
    """Apply an action to all jobs that match a filter, for a limited time. Return the result as a sentence."""
    until = time.monotonic() + MATCHING_SECONDS
    changed, error, over = 0, "", False
    with acting("page", who):
        try:
            batches = change_matching(action, job_filter, settings)
            for results in batches:
                changed += sum(result.changed for result in results)
                over = time.monotonic() >= until
                if over:
                    break
        except Unavailable as unavailable:
            error = f" The others were not changed: {unavailable}."
    if over:
        command = f"fetch-worker {action} {filter_options(job_filter)}"
        error = f" The page stopped after {MATCHING_SECONDS:g} s, so some may be left: do it again, or run `{command}`."
    return f"{format_count(changed, 'job')} {JOB_ACTIONS[action].done}.{error}"


def attach_remote(job_id: int, remote_id: str, *, who: str) -> tuple[bool, str]:
    """Name the remote job of an uncertain order. Return whether it changed, and the result as a sentence."""
    try:
        with acting("page", who):
            changed = attach(job_id, remote_id)
    except (JobNotFound, NotTrackable) as error:
        return False, f"Not attached: {error}."
    if not changed:
        return False, f"Not attached: job {job_id} is not uncertain."
    return True, f"Job {job_id} is attached to {remote_id}: it is polled at once."


def apply_to_breaker(name: str, scope: Scope, breaker: str, *, who: str) -> str:
    """Hold or resume a whole account or host. Return the result as a sentence."""
    with acting("page", who):
        changed = (hold_account_or_host if name == "hold" else resume_account_or_host)(scope, breaker)
    if name == "hold":
        return f"The {scope} {breaker} {'is held' if changed else 'was already held'}."
    return f"The {scope} {breaker} {'is resumed: it is tried at once' if changed else 'was already open'}."
