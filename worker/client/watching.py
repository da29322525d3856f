"""Wait for jobs, and watch them change.

All callers of a process that wait share one thread. It reads their jobs together, twice a second, so that two hundred
open pages cost the database no more than one.
"""

import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from worker.client.connection import release_connection
from worker.client.ids import checked_job_id, no_job
from worker.client.jobs import Job, read_jobs
from worker.client.workers import Workers, current_workers
from worker.errors import WaitTimeout

LOOK_SECONDS = 0.5  # between two looks at the database

Changes = Sequence[Job] | Exception  # what a look shows to one caller
Deliver = Callable[[Changes], object]


def wait(job_id: int, timeout: float | None = None) -> Job:
    """Wait until a job is final and return it. `timeout` is in seconds. Raises WaitTimeout and JobNotFound."""
    for job in changes([job_id], timeout=timeout):
        if job.final:
            return job
    raise AssertionError("unreachable: the changes end with a final job")


def changes(job_ids: int | Iterable[int], *, timeout: float | None = None) -> Iterator[Job]:
    """Yield each of these jobs as it is now, and again whenever it or its outputs change, until all are final.

    All callers of a process share two looks per second at the database. Raises JobNotFound if there is no such job,
    WaitTimeout if they are not final after `timeout` seconds, and Unavailable.

        for job in changes([7, 8], timeout=300):
            print(job.id, job.status, job.progress().fraction)
    """
    watched = Watched(checked_job_ids(job_ids), timeout)
    workers = current_workers()
    return _changes_in_steps(watched, workers) if workers.in_steps else _changes(watched)


def checked_job_ids(job_ids: int | Iterable[int]) -> list[int]:
    """Return the ids without duplicates. Raises NotTrackable."""
    several = job_ids if isinstance(job_ids, Iterable) and not isinstance(job_ids, (str, bytes)) else [job_ids]
    return list(dict.fromkeys(checked_job_id(job_id) for job_id in several))


class Watched:
    """The jobs that one caller waits for, until a time on the clock of the workers."""

    def __init__(self, job_ids: Iterable[int], timeout: float | None) -> None:
        self.open = dict.fromkeys(job_ids, "unknown")  # the jobs that are not final, and their state
        self._timeout = timeout
        self._until = None if timeout is None else current_workers().clock() + timeout

    def take(self, changed: Changes | None) -> Sequence[Job]:
        """Return the changed jobs of a look. Raises the error of the look, and WaitTimeout for None."""
        if changed is None:
            raise WaitTimeout(self._timeout_message())
        if isinstance(changed, Exception):
            raise changed
        for job in changed:
            self.open[job.id] = job.status
            if job.final:
                del self.open[job.id]
        return changed

    def seconds_left(self) -> float | None:
        """Return the time that is left, or None without a limit. There is time for a first look in any case."""
        if self._until is None or "unknown" in self.open.values():
            return None
        return max(0.0, self._until - current_workers().clock())

    def _timeout_message(self) -> str:
        (job_id, status), *others = self.open.items()
        many = f" and {len(others)} more" if others else ""
        return f"job {job_id} is still {status}{many} after {self._timeout} s: it continues, so you can wait again"


def _changes(watched: Watched) -> Iterator[Job]:
    inbox: SimpleQueue[Changes] = SimpleQueue()
    with watcher.watching(watched.open, inbox.put):
        while watched.open:
            try:
                changed = inbox.get(timeout=watched.seconds_left())
            except Empty:
                changed = None
            yield from watched.take(changed)


def _changes_in_steps(watched: Watched, workers: Workers) -> Iterator[Job]:
    earlier: dict[int, Job] = {}
    while watched.open:
        jobs = read_jobs(watched.open)
        yield from watched.take(_changed(watched.open, jobs, earlier))
        earlier = jobs
        if watched.open:
            seconds = watched.seconds_left()
            if seconds == 0.0:
                watched.take(None)
            workers.pause(jobs[next(iter(watched.open))], seconds)


def _changed(job_ids: Iterable[int], jobs: dict[int, Job], earlier: dict[int, Job]) -> Changes:
    """Return the jobs that differ from earlier ones, or the error that one of them does not exist."""
    missing = next((job_id for job_id in job_ids if job_id not in jobs), None)
    if missing is not None:
        return no_job(missing)
    return [jobs[job_id] for job_id in job_ids if jobs[job_id] != earlier.get(job_id)]


# ── the shared looks ──────────────────────────────────────────────────────────────────────────────────────────────────


class _Caller:
    """One caller of `changes`, and the jobs as it knows them."""

    def __init__(self, job_ids: Iterable[int], deliver: Deliver) -> None:
        self.job_ids = list(job_ids)
        self._deliver = deliver
        self._known_jobs: dict[int, Job] = {}

    def show(self, jobs: dict[int, Job]) -> None:
        """Deliver the jobs that have changed."""
        changed = _changed(self.job_ids, jobs, self._known_jobs)
        if isinstance(changed, Exception):
            self.end(changed)
        elif changed:
            self._known_jobs.update({job.id: job for job in changed})
            self.job_ids = [job_id for job_id in self.job_ids if not jobs[job_id].final]
            self._deliver(changed)

    def end(self, error: Exception) -> None:
        """Deliver an error. The caller gets nothing more."""
        self.job_ids = []
        self._deliver(error)


class JobWatcher:
    """Reads the jobs that any caller waits for, in a thread that runs while there are callers. Thread-safe."""

    def __init__(
        self,
        read: Callable[[Collection[int]], dict[int, Job]] = read_jobs,
        *,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._read = read
        self._look_seconds = look_seconds
        self._forget_parent()

    def _forget_parent(self) -> None:
        """Start anew, also in a forked child: it has neither the thread nor the callers of its parent."""
        self._lock = threading.Lock()
        self._callers: set[_Caller] = set()
        self._thread: threading.Thread | None = None
        self._looked_at = float("-inf")

    @contextmanager
    def watching(self, job_ids: Iterable[int], deliver: Deliver) -> Iterator[None]:
        """Call `deliver` from the watcher's thread with the jobs as they are, and with those that change later.

        It is called with an error, for the last time, if a job does not exist or the database can't be read.
        """
        caller = _Caller(job_ids, deliver)
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="job-watcher", daemon=True)
                thread.start()  # raises if no thread can be started: the next caller tries again
                self._thread = thread
            self._callers.add(caller)
        try:
            yield
        finally:
            with self._lock:
                self._callers.discard(caller)

    def _run(self) -> None:
        while True:
            time.sleep(max(0.0, self._looked_at + self._look_seconds - time.monotonic()))
            with self._lock:
                callers = [caller for caller in self._callers if caller.job_ids]
                if not callers:
                    self._thread = None
                    break
            self._looked_at = time.monotonic()
            self._look(callers)
        release_connection()

    def _look(self, callers: Sequence[_Caller]) -> None:
        try:
            jobs = self._read({job_id for caller in callers for job_id in caller.job_ids})
        except Exception as error:  # the callers raise it
            for caller in callers:
                caller.end(error)
        else:
            for caller in callers:
                caller.show(jobs)


watcher = JobWatcher()
os.register_at_fork(after_in_child=watcher._forget_parent)
