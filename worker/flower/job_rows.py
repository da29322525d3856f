"""Jobs in Flower, a row each beside the batch tasks. A thread reads the database: nothing is lost with a process.

The rows are no tasks that ran: they belong to no worker, and Flower's counts of events and times leave them out. The
number is bounded, and what Flower kept of them in its file is replaced by what the database says.
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
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from worker.core.flower_rows import NAME, FlowerJob, job_id_of, task_fields, task_id
from worker.errors import WorkerError
from worker.store.engine import error_name, is_missing_table
from worker.store.reports.flower_rows import read_flower_jobs

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
AWAY_SECONDS = 5.0  # until the next look where the database did not answer
PUT_AT_ONCE = 100  # rows; between them Flower serves its pages
FORGOTTEN_MOST = 1_000  # rows that are gone and may still have a place in the order of events
CANCEL = "worker.cancel"
CLIENT = "fetch-worker"  # who announced these tasks, as Celery sees it


class JobRows:
    """The jobs' rows in Flower's state. For the thread of its loop alone, as everything that touches the state."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self._shown: dict[int, FlowerJob] = {}
        self._forgotten = 0

    def clear(self) -> None:
        """Takes out every row, also those that Flower had in its file."""
        for uuid in [uuid for uuid in self._state.tasks.data if job_id_of(uuid)]:
            self._drop(uuid)
        self._shown.clear()
        self._close_ranks()

    def keep(self, jobs: Mapping[int, FlowerJob]) -> list[FlowerJob]:
        """Takes out the rows of all other jobs; those of `jobs` that are not shown as they are."""
        for job_id in [job_id for job_id in self._shown if job_id not in jobs]:
            self._drop(task_id(job_id))
            del self._shown[job_id]
        if self._forgotten > FORGOTTEN_MOST:
            self._close_ranks()
        tasks = self._state.tasks.data  # Flower itself lets the oldest tasks go
        return [job for job in jobs.values() if self._shown.get(job.id) != job or task_id(job.id) not in tasks]

    def put(self, jobs: Sequence[FlowerJob]) -> None:
        """Shows jobs as they are, whatever was shown of them before."""
        for job in jobs:
            self._put(job)
            self._shown[job.id] = job

    def _put(self, job: FlowerJob) -> None:
        uuid = task_id(job.id)
        task = self._state.tasks.data.get(uuid)
        if task is None:
            task = self._announce(uuid, job)
        # Not by events: those never lead out of a final state, nor from a state of our own to one that Celery knows.
        vars(task).update(task_fields(job))
        self._index("upsert", task)

    def _announce(self, uuid: str, job: FlowerJob) -> Any:
        """A new task, as if a client had sent it: no worker has to be named."""
        tasks = self._state.tasks
        oldest = next(iter(tasks.data), None) if tasks.limit and len(tasks.data) >= tasks.limit else None
        sent = {"type": "task-sent", "uuid": uuid, "name": NAME, "hostname": CLIENT, "clock": 0, "local_received": None}
        State.event(self._state, sent | {"timestamp": job.submitted_at.timestamp()})  # without Flower's own counts
        if oldest is not None and oldest not in tasks.data:
            self._index("remove", oldest)
        return tasks.data[uuid]

    def _drop(self, uuid: str) -> None:
        task = self._state.tasks.data.pop(uuid, None)
        if task is not None:
            # By these it refers to itself: it would be listed until garbage is collected.
            vars(task).pop("_serializer_handlers", None)
            self._forgotten += 1
        self._index("remove", uuid)

    def _index(self, verb: str, what: object) -> None:
        index = getattr(self._state, "search_engine", None)  # Flower has one since 2.1
        if index is not None:
            getattr(index, verb)(what)

    def _close_ranks(self) -> None:
        """Gives up the places of tasks that are gone, which Celery itself does at 400,000 of them."""
        heap = self._state._taskheap
        heap[:] = [place for place in heap if place[3]() is not None]
        self._forgotten = 0


class Feeder:
    """Looks at the database every second, from a thread of its own, and has the rows changed on Flower's loop."""

    def __init__(self, engine: Callable[[], Engine], rows: JobRows, loop: Any, most: int) -> None:
        self._engine = engine
        self._rows = rows
        self._loop = loop
        self._most = most
        self._seen: dict[int, FlowerJob] = {}
        self._away = False
        self._stopping = threading.Event()

    def start(self) -> None:
        """Begins, where rows are wanted."""
        self._rows.clear()
        if self._most:
            threading.Thread(target=self._run, name="job rows", daemon=True).start()

    def stop(self) -> None:
        """Ends soon."""
        self._stopping.set()

    def _run(self) -> None:
        pause = 0.0
        while not self._stopping.wait(pause):
            try:
                self.look()
            except (SQLAlchemyError, WorkerError) as error:
                self._say_away(error)
                pause = AWAY_SECONDS
            except Exception:  # of another Flower than we know: it goes on without our rows
                if not self._stopping.is_set():
                    log.exception("jobs are no longer shown in Flower")
                return
            else:
                pause = LOOK_SECONDS

    def look(self) -> None:
        """One look, and the rows as it found them."""
        with self._engine().connect() as connection:
            self._seen = read_flower_jobs(connection, self._seen, self._most)
        if self._away:
            self._away = False
            log.warning("the database is back: jobs are shown in Flower again")
        changed = self._on_loop(self._rows.keep, self._seen)
        for start in range(0, len(changed), PUT_AT_ONCE):
            self._on_loop(self._rows.put, changed[start : start + PUT_AT_ONCE])

    def _say_away(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            hint = "run `fetch-worker migrate`" if is_missing_table(error) else "it is asked again"
            log.warning("jobs are not shown in Flower: the database has trouble reason=%s; %s", error_name(error), hint)

    def _on_loop(self, work: Callable[..., Any], *arguments: object) -> Any:
        done: Future[Any] = Future()

        def run() -> None:
            try:
                done.set_result(work(*arguments))
            except Exception as error:
                done.set_exception(error)

        self._loop.add_callback(run)
        return done.result()


class EventsAndJobs(Events):  # type: ignore[misc]  # flower has no types
    """Flower's events, and the jobs' rows beside them."""

    most = 0
    engine: Callable[[], Engine]

    def start(self) -> None:
        """Starts both."""
        super().start()
        self._feeder = None
        if fits(self):
            self._feeder = Feeder(type(self).engine, JobRows(self.state), self.io_loop, self.most)
            self._feeder.start()

    def stop(self) -> None:
        """Stops both."""
        if self._feeder is not None:
            self._feeder.stop()
        super().stop()


class JobControl(Control):  # type: ignore[misc]  # celery has no types
    """What Flower's buttons do: to revoke a job is to cancel it."""

    def revoke(self, task_id: str, *arguments: Any, **options: Any) -> Any:
        """Cancels a job by the task for it; all else as ever."""
        job_id = job_id_of(str(task_id))
        if job_id is None:
            return super().revoke(task_id, *arguments, **options)
        return self.app.send_task(CANCEL, (job_id,), ignore_result=True)


def fits(events: Any) -> bool:
    """Whether this release of Flower has what the rows rely on; a line in its log where it has not."""
    state = getattr(events, "state", None)
    tasks = getattr(state, "tasks", None)
    index = getattr(state, "search_engine", None)
    found = {
        "io_loop.add_callback": hasattr(getattr(events, "io_loop", None), "add_callback"),
        "state.tasks": isinstance(getattr(tasks, "data", None), dict) and hasattr(tasks, "limit"),
        "state._taskheap": isinstance(getattr(state, "_taskheap", None), list),
        "state.search_engine": index is None or (hasattr(index, "upsert") and hasattr(index, "remove")),
    }
    lacking = [name for name, there in found.items() if not there]
    if lacking:
        log.warning("jobs are not shown in Flower: this release is not known, it lacks %s", ", ".join(lacking))
    return not lacking


def show_jobs(app: Celery, engine: Callable[[], Engine], most: int) -> bool:
    """Has the Flower of this process show `most` jobs of `app`, once it is made; whether it will."""
    if getattr(flower_app, "Events", None) not in (Events, EventsAndJobs):
        log.warning("jobs are not shown in Flower: this release is not known")
        return False
    EventsAndJobs.most = most
    EventsAndJobs.engine = staticmethod(engine)
    flower_app.Events = EventsAndJobs
    app.control_cls = JobControl
    return True
