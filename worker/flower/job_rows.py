"""Show jobs in Flower, one row per job beside the batch tasks. A thread reads them from the database.

The rows are not tasks that ran: they belong to no worker, and Flower's counts and durations do not include them. Their
number is limited. Rows that Flower saved in its file are replaced by the state in the database.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from celery import Celery
from celery.app.control import Control
from celery.events.state import State
from flower import app as flower_app
from flower.events import Events
from flower.options import options as flower_options
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from worker.core.flower_rows import NAME, FlowerJob, job_id_of, task_fields, task_id
from worker.errors import WorkerError
from worker.store.audit import SOURCE_HEADER, WHO_HEADER
from worker.store.engine import error_name, is_missing_table
from worker.store.reports.flower_rows import read_flower_jobs
from worker.system.redaction import shared_scrubber

log = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0
RETRY_SECONDS = 5.0  # after an error of the database
BATCH = 100  # rows per callback; between two batches Flower serves its pages
MAX_REMOVED = 1_000  # removed rows that may still have an entry in the heap of events
CANCEL = "worker.cancel"
CLIENT = "fetch-worker"  # the sender of these tasks, for Celery


class JobRows:
    """The rows of jobs in Flower's state. Not thread-safe: call it from Flower's event loop only."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self._shown: dict[int, FlowerJob] = {}
        self._removed = 0

    def clear(self) -> None:
        """Remove all rows, including those from Flower's file."""
        for uuid in [uuid for uuid in self._state.tasks.data if job_id_of(uuid)]:
            self._drop(uuid)
        self._shown.clear()
        self._compact_heap()

    def keep(self, jobs: Mapping[int, FlowerJob]) -> list[FlowerJob]:
        """Remove the rows of all other jobs. Return the jobs whose rows must be added or updated."""
        for job_id in [job_id for job_id in self._shown if job_id not in jobs]:
            self._drop(task_id(job_id))
            del self._shown[job_id]
        if self._removed > MAX_REMOVED:
            self._compact_heap()
        tasks = self._state.tasks.data  # Flower itself may have removed the oldest tasks
        return [job for job in jobs.values() if self._shown.get(job.id) != job or task_id(job.id) not in tasks]

    def put(self, jobs: Sequence[FlowerJob]) -> None:
        """Add or update the rows of jobs."""
        for job in jobs:
            self._put(job)
            self._shown[job.id] = job

    def _put(self, job: FlowerJob) -> None:
        uuid = task_id(job.id)
        task = self._state.tasks.data.get(uuid)
        if task is None:
            task = self._announce(uuid, job)
        # Not by events: they can't leave a final state, nor change a custom state into one of Celery's states.
        remove_keys = shared_scrubber().text
        fields = task_fields(job).items()
        vars(task).update({name: remove_keys(value) if isinstance(value, str) else value for name, value in fields})
        self._index("upsert", task)

    def _announce(self, uuid: str, job: FlowerJob) -> Any:
        """Add a task as if a client had sent it, so that it needs no worker."""
        tasks = self._state.tasks
        oldest = next(iter(tasks.data), None) if tasks.limit and len(tasks.data) >= tasks.limit else None
        sent = {"type": "task-sent", "uuid": uuid, "name": NAME, "hostname": CLIENT, "clock": 0, "local_received": None}
        State.event(self._state, sent | {"timestamp": job.submitted_at.timestamp()})  # bypasses the counters of Flower
        if oldest is not None and oldest not in tasks.data:
            self._index("remove", oldest)
        return tasks.data[uuid]

    def _drop(self, uuid: str) -> None:
        task = self._state.tasks.data.pop(uuid, None)
        if task is not None:
            # These form a reference cycle: the task would stay listed until the garbage collector runs.
            vars(task).pop("_serializer_handlers", None)
            self._removed += 1
        self._index("remove", uuid)

    def _index(self, method: str, task: object) -> None:
        index = getattr(self._state, "search_engine", None)  # exists since Flower 2.1
        if index is not None:
            getattr(index, method)(task)

    def _compact_heap(self) -> None:
        """Remove the heap entries of removed tasks. Celery itself does this only at 400,000 entries."""
        heap = self._state._taskheap
        heap[:] = [entry for entry in heap if entry[3]() is not None]
        self._removed = 0


class Feeder:
    """Reads jobs every second in a thread, and updates their rows on Flower's event loop."""

    def __init__(self, engine: Callable[[], Engine], rows: JobRows, loop: Any, max_jobs: int) -> None:
        self._engine = engine
        self._rows = rows
        self._loop = loop
        self._max_jobs = max_jobs
        self._jobs: dict[int, FlowerJob] = {}
        self._database_failed = False
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start the thread, unless `max_jobs` is 0."""
        self._rows.clear()
        if self._max_jobs:
            threading.Thread(target=self._run, name="job rows", daemon=True).start()

    def stop(self) -> None:
        """Stop the thread soon."""
        self._stopping.set()

    def _run(self) -> None:
        pause = 0.0
        while not self._stopping.wait(pause):
            try:
                self.refresh()
            except (SQLAlchemyError, WorkerError) as error:
                self._log_failure(error)
                pause = RETRY_SECONDS
            except Exception:  # an unknown release of Flower: it continues without these rows
                if not self._stopping.is_set():
                    log.exception("jobs are no longer shown in Flower")
                return
            else:
                pause = REFRESH_SECONDS

    def refresh(self) -> None:
        """Read the jobs once and update their rows."""
        with self._engine().connect() as connection:
            self._jobs = read_flower_jobs(connection, self._jobs, self._max_jobs)
        if self._database_failed:
            self._database_failed = False
            log.warning("the database works again: jobs are shown in Flower again")
        changed = self._on_loop(self._rows.keep, self._jobs)
        for start in range(0, len(changed), BATCH):
            self._on_loop(self._rows.put, changed[start : start + BATCH])

    def _log_failure(self, error: Exception) -> None:
        if not self._database_failed:
            self._database_failed = True
            hint = "run `fetch-worker migrate`" if is_missing_table(error) else "it is tried again"
            log.warning("jobs are not shown in Flower: the database failed reason=%s; %s", error_name(error), hint)

    def _on_loop(self, work: Callable[..., Any], *arguments: object) -> Any:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work(*arguments))
            except Exception as error:
                future.set_exception(error)

        self._loop.add_callback(run)
        return future.result()


class EventsAndJobs(Events):  # type: ignore[misc]  # flower has no types
    """Flower's events, with the rows of jobs."""

    max_jobs = 0
    engine: Callable[[], Engine]

    def start(self) -> None:
        """Start the events and the rows."""
        super().start()
        self._feeder = None
        if is_supported(self):
            self._feeder = Feeder(type(self).engine, JobRows(self.state), self.io_loop, self.max_jobs)
            self._feeder.start()

    def stop(self) -> None:
        """Stop the rows and the events."""
        if self._feeder is not None:
            self._feeder.stop()
        super().stop()


class JobControl(Control):  # type: ignore[misc]  # celery has no types
    """The control of Flower's buttons: revoking the task of a job cancels the job."""

    def revoke(self, task_id: str, *arguments: Any, **options: Any) -> Any:
        """Cancel the job of a task id; revoke any other task as usual."""
        job_id = job_id_of(str(task_id))
        if job_id is None:
            return super().revoke(task_id, *arguments, **options)
        headers = {SOURCE_HEADER: "flower", WHO_HEADER: _only_user()}
        return self.app.send_task(CANCEL, (job_id,), ignore_result=True, headers=headers)


def _only_user() -> str:
    """Return the name of Flower's user if there is only one. With several, Flower does not say which one acts."""
    logins = flower_options.basic_auth or []
    return str(logins[0]).partition(":")[0] if len(logins) == 1 else ""


def is_supported(events: Any) -> bool:
    """Return whether this release of Flower has the attributes that the rows need, else log a warning."""
    state = getattr(events, "state", None)
    tasks = getattr(state, "tasks", None)
    index = getattr(state, "search_engine", None)
    required = {
        "io_loop.add_callback": hasattr(getattr(events, "io_loop", None), "add_callback"),
        "state.tasks": isinstance(getattr(tasks, "data", None), dict) and hasattr(tasks, "limit"),
        "state._taskheap": isinstance(getattr(state, "_taskheap", None), list),
        "state.search_engine": index is None or (hasattr(index, "upsert") and hasattr(index, "remove")),
    }
    missing = [name for name, exists in required.items() if not exists]
    if missing:
        log.warning("jobs are not shown in Flower: this release is not supported, it lacks %s", ", ".join(missing))
    return not missing


def show_jobs(app: Celery, engine: Callable[[], Engine], max_jobs: int) -> bool:
    """Make the Flower of this process show up to `max_jobs` jobs of `app`. Return whether its release is supported."""
    if getattr(flower_app, "Events", None) not in (Events, EventsAndJobs):
        log.warning("jobs are not shown in Flower: this release is not supported")
        return False
    EventsAndJobs.max_jobs = max_jobs
    EventsAndJobs.engine = staticmethod(engine)
    flower_app.Events = EventsAndJobs
    app.control_cls = JobControl
    return True
