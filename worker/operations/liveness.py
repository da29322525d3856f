"""Check whether due work is done. It needs only the database, so that container probes start fast."""

from dataclasses import dataclass

from worker.core.humanize import format_duration
from worker.errors import WorkerError
from worker.settings import Settings
from worker.store.engine import engine_for, translate_errors
from worker.store.reports.work_state import WorkState, read_work_state


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check. `message` says what was found and, if it is not ok, what to do."""

    name: str
    ok: bool
    message: str


def check_liveness(settings: Settings) -> Check:
    """Check that due work is done: nothing is due for long, or requests were made recently. For container probes."""
    try:
        with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
            return _work(read_work_state(connection, settings.rps, settings.slots))
    except WorkerError as error:
        return Check("work", False, str(error))


def _work(work: WorkState) -> Check:
    oldest = format_duration(work.oldest_due_seconds)
    if work.healthy:
        return Check("work", True, f"the oldest due work waits for {oldest}")
    return Check("work", False, f"work is due for {oldest} and no process does it: start a `worker` process")
