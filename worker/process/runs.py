"""One run of each kind of work, as tasks and bootsteps start it: polls, sweep, webhooks, prune.

A run ends early where the database is away, and says so: the next one goes on.
"""

import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from celery.utils.log import get_task_logger
from kombu.exceptions import ChannelError
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy.exc import SQLAlchemyError

from worker.app import DOWNLOADS, app, settings
from worker.core import circuit_breaker as breakers
from worker.errors import Unavailable
from worker.operations.prune import Retention
from worker.operations.prune import prune as prune_jobs
from worker.polling.poller import PollReport, Progress
from worker.process.dead_claims import log_released, release_dead_claims
from worker.process.publishing import queue_downloads
from worker.process.resources import ProcessResources, process_resources
from worker.store.breakers import locked_breaker, save_breaker
from worker.store.claims import queue_due_outputs
from worker.store.engine import database_now, describe_error
from worker.store.reports.history import record_history

log = get_task_logger(__name__)

SWEEP_LIMIT = 1_000
DATABASE_AWAY_SECONDS = 1.0
DATABASE_ERRORS = (SQLAlchemyError, Unavailable)
PRUNE_SECONDS = 300.0  # what is left is for the next hour: a prune must not take a place of the pool for long
SAMPLE_AGAIN = timedelta(seconds=10)
TAKEN_WITHIN = timedelta(seconds=5)  # a message that left its queue is claimed within it, or was lost

_pruning = threading.Lock()
_repairing = threading.Lock()


def run_polls(*, preemptible: bool = False, progress: Progress | None = None) -> str:
    """One poll run, in a few words; one that gives way ends when another one is asked for."""
    own = process_resources()
    try:
        own.release_dead_claims()
        report = own.poller.run(preemptible=preemptible, finish=not own.ticks, progress=progress)
    except DATABASE_ERRORS as error:
        log.error("polling waits for the database reason=%s", describe_error(error, settings.database))
        time.sleep(DATABASE_AWAY_SECONDS)
        return "the database is away"
    return "a run is on already" if report is None else str(report)


class ProgressEvents:
    """Tells Celery's monitors how far a task is, from the courier's thread: never two words at once."""

    def __init__(self, request: Any) -> None:
        self._uuid, self._hostname = request.id, request.hostname  # now: the courier's thread has no request
        self._on_its_way = False

    def __call__(self, report: PollReport, in_flight: int) -> None:
        """Says in words and in numbers what was done so far."""
        if self._on_its_way:
            return
        self._on_its_way = True
        told: dict[str, object] = {
            "result": f"{report}; {in_flight} in flight",  # the one place where Flower shows it
            "asked": report.asked,
            "answers": dict(report.answers),
            "in_flight": in_flight,
        }
        process_resources().publisher.send("progress", lambda: self._send(told))

    def _send(self, told: dict[str, object]) -> None:
        try:
            with app.events.default_dispatcher(hostname=self._hostname) as dispatcher:
                dispatcher.send("task-progress", uuid=self._uuid, retry=True, retry_policy={"max_retries": 1}, **told)
        except Exception as error:  # each transport has errors of its own; it was only to be looked at
            log.debug("a monitor was not told of the progress reason=%s", type(error).__name__)
        finally:
            self._on_its_way = False


def run_sweep() -> str:
    """Puts back what a lost message or a dead process left."""
    own = process_resources()
    own.swept_at = time.monotonic()
    patience = _lost_after()
    try:
        with own.engine.begin() as connection:
            now = database_now(connection)
            released = release_dead_claims(connection)
            lost = now - patience
            output_ids = queue_due_outputs(connection, now=now, queued_before=lost, limit=SWEEP_LIMIT)
    except DATABASE_ERRORS as error:
        log.error("the sweep waits for the database reason=%s", describe_error(error, settings.database))
        return "the database is away"
    queue_downloads(output_ids)
    own.notify(None)
    log_released(released)
    _repair(own)
    _sample(own)
    _look_late(own)
    return f"{len(output_ids)} downloads put back" if output_ids else "nothing to put back"


def _repair(own: ProcessResources) -> None:
    """Repair rows in a state that no step of ours leaves behind, in transactions of its own."""
    if not _repairing.acquire(blocking=False):
        return
    try:
        repaired = own.repairer.run()
    except DATABASE_ERRORS as error:
        log.warning("a repair waits for the database reason=%s", describe_error(error, settings.database))
        return
    finally:
        _repairing.release()
    if repaired.jobs or repaired.outputs or repaired.claims:
        log.warning(
            "repaired rows that were left in no proper state jobs_ended=%s outputs_cancelled=%s claims_released=%s",
            *(len(repaired.jobs), repaired.outputs, repaired.claims),
        )
    own.notify(repaired.jobs)


def _look_late(own: ProcessResources) -> None:
    """Have expired jobs whose look is due asked about, in a thread of its own: no sweep waits for the API."""
    try:
        own.late_looks.start()
    except DATABASE_ERRORS as error:
        log.warning("late looks wait for the database reason=%s", describe_error(error, settings.database))


def _sample(own: ProcessResources) -> None:
    """Writes the minute's line of history, in a transaction of its own: trouble with it hurts no sweep."""
    if time.monotonic() < own.sample_at:
        return
    try:
        with own.engine.begin() as connection:
            wait = record_history(connection, now=database_now(connection), full_rps=settings.rps)
    except DATABASE_ERRORS as error:
        log.warning("the history lacks a line reason=%s", describe_error(error, settings.database))
        wait = SAMPLE_AGAIN
    own.sample_at = time.monotonic() + wait.total_seconds()


def run_webhooks() -> int:
    """Begins to deliver the webhooks that are due; how many."""
    try:
        return process_resources().webhooks.run()
    except DATABASE_ERRORS as error:
        log.error("webhooks wait for the database reason=%s", describe_error(error, settings.database))
        return 0


def run_prune() -> str:
    """Removes what retention says, for a while; what came of it, in a few words."""
    if settings.prune_seconds is None:
        return "nothing is pruned: PRUNE_AFTER is not set"
    if not _pruning.acquire(blocking=False):
        return "a prune is on already"
    until = time.monotonic() + PRUNE_SECONDS
    wanted = Retention(
        older_than=timedelta(seconds=settings.prune_seconds),
        states=settings.states_to_prune,
        remove_files=settings.prune_files == "remove",
    )
    own = process_resources()
    try:
        done = prune_jobs(
            own.engine, settings, wanted, keep_going=lambda: time.monotonic() < until and not own.stopping.is_set()
        )
    except DATABASE_ERRORS as error:
        log.error("pruning waits for the database reason=%s", describe_error(error, settings.database))
        return "the database is away"
    finally:
        _pruning.release()
    if done.jobs:
        log.info("pruned jobs=%s outputs=%s files=%s bytes=%s", done.jobs, done.outputs, done.files, done.bytes)
    if done.kept:
        log.error("files could not be removed, their jobs stay jobs=%s reason=%s", done.kept, done.reason)
    return f"{done.jobs} jobs pruned"


def _lost_after() -> timedelta:
    """How old a message of an output that nobody took must be to count as lost: not old, where the queue is empty."""
    try:
        with app.connection_for_read(connect_timeout=2) as connection:
            waiting = connection.default_channel.queue_declare(DOWNLOADS, passive=True).message_count
    except ChannelError:
        waiting = 0  # there is no such queue: on Redis that is an empty one
    except (BrokerError, OSError):
        waiting = None
    whole = timedelta(seconds=settings.recovery_seconds)
    return min(whole, TAKEN_WITHIN) if waiting == 0 else whole


def probe_keys(accounts: Iterable[str]) -> None:
    """Have the keys of these accounts tried, each by one call alone, before they are used at full speed.

    For all accounts as a worker starts, and for those whose key has changed since.
    """
    with process_resources().engine.begin() as connection:
        now = database_now(connection)
        for account in sorted(accounts):
            save_breaker(
                connection, breakers.with_unproven_key(locked_breaker(connection, "account", account), now=now)
            )
