"""Runs of each kind of work, as tasks and boot steps start them: polls, sweep, webhooks, prune.

If the database is away, a run ends early and says so. The next run continues.
"""

import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from celery.utils.log import get_task_logger
from kombu.exceptions import ChannelError
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy.exc import SQLAlchemyError

from worker.app import app, settings
from worker.core import circuit_breaker as breakers
from worker.core.answer_names import ANSWER_NAMES
from worker.core.humanize import format_count
from worker.core.queues import DOWNLOADS
from worker.errors import Unavailable
from worker.operations.prune import Pruned, Retention, forget_actions
from worker.operations.prune import prune as prune_jobs
from worker.polling.poller import PollReport, Progress
from worker.process.dead_claims import log_released, log_uncertain, release_dead_claims
from worker.process.publishing import queue_downloads
from worker.process.resources import ProcessResources, process_resources
from worker.store.breakers import locked_breaker, save_breaker
from worker.store.candidates import settle_candidates
from worker.store.claims import claim_holders, queue_due_outputs
from worker.store.engine import database_now, describe_error
from worker.store.order_results import release_lapsed_orders
from worker.store.reports.history import record_history
from worker.store.sweep_signs import sweep_signs
from worker.system.process_identity import dead_holders

log = get_task_logger(__name__)

SWEEP_LIMIT = 1_000
DATABASE_AWAY_SECONDS = 1.0
DATABASE_ERRORS = (SQLAlchemyError, Unavailable)
PRUNE_SECONDS = 300.0  # the next run continues: a prune must not occupy a place of the pool for long
SAMPLE_AGAIN = timedelta(seconds=10)
HOUSEKEEPING_SECONDS = 20.0  # invalid rows are rare, and late looks come an hour after a deadline
TAKEN_WITHIN = timedelta(seconds=5)  # a message that left its queue is claimed within this time, or was lost

_pruning = threading.Lock()
_repairing = threading.Lock()


def run_polls(progress: Progress | None = None) -> tuple[str, bool]:
    """Run the poller once. Return a short summary, and whether another run should follow at once."""
    resources = process_resources()
    report = _run_poller(lambda: resources.poller.run(finish=not resources.ticks, progress=progress))
    if report is None:
        return "another run is active", False
    if isinstance(report, str):
        return report, True
    if not report.more:
        resources.run_requests.ended("worker.poll")
    return str(report), report.more


def watch_due_work() -> None:
    """Watch for due jobs for some seconds, and request a run for them. If none starts, poll here."""
    resources = process_resources()
    _run_poller(lambda: resources.poller.run(request_run=lambda: resources.run_requests.request("worker.poll")))


def _run_poller(run: Callable[[], PollReport | None]) -> PollReport | str | None:
    try:
        process_resources().release_dead_claims()
        return run()
    except DATABASE_ERRORS as error:
        log.error("polling waits for the database reason=%s", describe_error(error, settings.database))
        time.sleep(DATABASE_AWAY_SECONDS)
        return "the database is away"


def run_orders() -> tuple[str, bool]:
    """Send orders once. Return a short summary, and whether another run should follow at once."""
    resources = process_resources()
    try:
        resources.release_dead_claims()
        report = resources.submitter.run(finish=not resources.ticks)
    except DATABASE_ERRORS as error:
        log.error("orders wait for the database reason=%s", describe_error(error, settings.database))
        time.sleep(DATABASE_AWAY_SECONDS)
        return "the database is away", False
    if report is None:
        return "another run is active", False
    resources.run_requests.ended("worker.submit")
    return str(report), report.more


def orders_needed() -> bool:
    """Return whether a run of orders would send something."""
    try:
        process_resources().release_dead_claims()
        return process_resources().submitter.has_work()
    except DATABASE_ERRORS as error:
        log.error("orders wait for the database reason=%s", describe_error(error, settings.database))
        time.sleep(DATABASE_AWAY_SECONDS)
        return False


class ProgressEvents:
    """Sends the progress of a task to Celery's monitors, from the publisher's thread, one event at a time."""

    def __init__(self, request: Any) -> None:
        self._uuid, self._hostname = request.id, request.hostname  # read here: the publisher's thread has no request
        self._sending = False

    def __call__(self, report: PollReport, in_flight: int) -> None:
        """Send what was done so far, as text and in numbers."""
        process_resources().run_requests.active("worker.poll")
        if self._sending:
            return
        self._sending = True
        fields: dict[str, object] = {
            "result": f"{report}; {in_flight} in flight",  # the only field that Flower shows
            "asked": report.asked,
            "answers": {ANSWER_NAMES[reply].code: count for reply, count in report.answers.items()},
            "in_flight": in_flight,
        }
        process_resources().publisher.send("progress", lambda: self._send(fields))

    def _send(self, fields: dict[str, object]) -> None:
        try:
            with app.events.default_dispatcher(hostname=self._hostname) as dispatcher:
                dispatcher.send("task-progress", uuid=self._uuid, retry=True, retry_policy={"max_retries": 1}, **fields)
        except Exception as error:  # each transport has its own errors; progress is not essential
            log.debug("progress was not sent to monitors reason=%s", type(error).__name__)
        finally:
            self._sending = False


def run_sweep() -> str:
    """Requeue the work of lost messages and dead processes."""
    resources = process_resources()
    resources.swept_at = time.monotonic()
    lost_after = _lost_after()
    try:
        with resources.engine.begin() as connection:
            now = database_now(connection)
            released = release_dead_claims(connection)
            lapsed = release_lapsed_orders(connection, now=now)
            queued_before = now - lost_after
            output_ids = queue_due_outputs(connection, now=now, queued_before=queued_before, limit=SWEEP_LIMIT)
    except DATABASE_ERRORS as error:
        log.error("the sweep waits for the database reason=%s", describe_error(error, settings.database))
        return "the database is away"
    queue_downloads(output_ids)
    resources.notify(None)
    log_released(released)
    log_uncertain(lapsed)
    done = [f"{format_count(len(output_ids), 'download')} requeued"] if output_ids else []
    done += [f"{format_count(len(lapsed.due), 'order')} sent again"] if lapsed.due else []
    done += [f"{format_count(len(lapsed.uncertain), 'order')} uncertain"] if lapsed.uncertain else []
    done += [f"{format_count(released.rows, 'claim')} of dead processes released"] if released.rows else []
    return ", ".join(done) or "nothing to requeue"


def sweep_needed() -> bool:
    """Return whether a sweep would put something back: lost messages, work of dead processes, unsent calls.

    Candidates of uncertain orders need no sweep: their checks are started here.
    """
    resources = process_resources()
    try:
        with resources.engine.connect() as connection:
            now = database_now(connection)
            signs = sweep_signs(connection, now=now, queued_before=now - TAKEN_WITHIN)
            is_needed = signs.calls or signs.orders or (signs.claims and bool(dead_holders(claim_holders(connection))))
            if signs.outputs and not is_needed:
                is_needed = sweep_signs(connection, now=now, queued_before=now - _lost_after()).outputs
        if signs.candidates:  # after the connection is closed: on SQLite, its transaction would be in the way
            resources.candidate_checks.start()
        return is_needed
    except DATABASE_ERRORS as error:
        log.error("the sweep waits for the database reason=%s", describe_error(error, settings.database))
        return False


def run_housekeeping() -> None:
    """Write the history row of this minute. From time to time, repair invalid rows and start the due late looks."""
    resources = process_resources()
    _sample(resources)
    if time.monotonic() >= resources.housekeeping_at:
        resources.housekeeping_at = time.monotonic() + HOUSEKEEPING_SECONDS
        _repair(resources)
        _settle_candidates(resources)
        _start_late_looks(resources)


def _repair(resources: ProcessResources) -> None:
    """Repair rows in a state that no known transition leaves behind, in separate transactions."""
    if not _repairing.acquire(blocking=False):
        return
    try:
        repaired = resources.repairer.run()
    except DATABASE_ERRORS as error:
        log.warning("a repair waits for the database reason=%s", describe_error(error, settings.database))
        return
    finally:
        _repairing.release()
    if repaired.jobs or repaired.outputs or repaired.claims or repaired.orders:
        log.warning(
            "repaired rows in an invalid state jobs_ended=%s outputs_cancelled=%s claims_released=%s orders=%s",
            *(len(repaired.jobs), repaired.outputs, repaired.claims, repaired.orders),
        )
    resources.notify(repaired.jobs)


def _settle_candidates(resources: ProcessResources) -> None:
    try:
        with resources.engine.begin() as connection:
            settle_candidates(connection, now=database_now(connection))
    except DATABASE_ERRORS as error:
        log.warning("candidates of orders wait for the database reason=%s", describe_error(error, settings.database))


def _start_late_looks(resources: ProcessResources) -> None:
    """Start the due late looks in their own thread, so that no sweep waits for the API."""
    try:
        resources.late_looks.start()
    except DATABASE_ERRORS as error:
        log.warning("late looks wait for the database reason=%s", describe_error(error, settings.database))


def _sample(resources: ProcessResources) -> None:
    """Write the history row of this minute, in a separate transaction: a failure does not affect the sweep."""
    if time.monotonic() < resources.sample_at:
        return
    try:
        with resources.engine.begin() as connection:
            wait = record_history(
                connection, now=database_now(connection), full_rps=settings.rps, full_slots=settings.slots
            )
    except DATABASE_ERRORS as error:
        log.warning("a history row is missing reason=%s", describe_error(error, settings.database))
        wait = SAMPLE_AGAIN
    resources.sample_at = time.monotonic() + wait.total_seconds()


def run_webhooks() -> int:
    """Start the delivery of due webhooks. Return how many were started."""
    try:
        return process_resources().webhooks.run()
    except DATABASE_ERRORS as error:
        log.error("webhooks wait for the database reason=%s", describe_error(error, settings.database))
        return 0


def run_prune() -> str:
    """Remove jobs that are past their retention, and old actions, for a limited time. Return a short summary."""
    if not _pruning.acquire(blocking=False):
        return "another prune is active"
    try:
        pruned = _prune_all(process_resources(), time.monotonic() + PRUNE_SECONDS)
    except DATABASE_ERRORS as error:
        log.error("pruning waits for the database reason=%s", describe_error(error, settings.database))
        return "the database is away"
    finally:
        _pruning.release()
    if pruned is None:
        return "nothing is pruned: PRUNE_AFTER is not set"
    if pruned.jobs:
        log.info("pruned jobs=%s outputs=%s files=%s bytes=%s", pruned.jobs, pruned.outputs, pruned.files, pruned.bytes)
    if pruned.kept:
        log.error("files could not be removed, their jobs stay jobs=%s reason=%s", pruned.kept, pruned.reason)
    return f"{format_count(pruned.jobs, 'job')} pruned"


def _prune_all(resources: ProcessResources, until: float) -> Pruned | None:
    """Remove old actions, and jobs that are past their retention. Return the removed jobs, or None without one."""

    def keep_going() -> bool:
        return time.monotonic() < until and not resources.stopping.is_set()

    forget_actions(resources.engine, keep_going=keep_going)
    if settings.prune_seconds is None:
        return None
    retention = Retention(
        older_than=timedelta(seconds=settings.prune_seconds),
        states=settings.states_to_prune,
        remove_files=settings.prune_files == "remove",
    )
    return prune_jobs(resources.engine, settings, retention, keep_going=keep_going)


def _lost_after() -> timedelta:
    """Return the age at which the message of an unclaimed output counts as lost. It is short if the queue is empty."""
    try:
        with app.connection_for_read(connect_timeout=2) as connection:
            message_count = connection.default_channel.queue_declare(DOWNLOADS, passive=True).message_count
    except ChannelError:
        message_count = 0  # no such queue: on Redis that means it is empty
    except (BrokerError, OSError):
        message_count = None
    lease = timedelta(seconds=settings.recovery_seconds)
    return min(lease, TAKEN_WITHIN) if message_count == 0 else lease


def probe_keys(accounts: Iterable[str]) -> None:
    """Have the keys of these accounts probed, each by a single request, before they are used at full speed.

    Called for all accounts when a worker starts, and for accounts whose key has changed.
    """
    with process_resources().engine.begin() as connection:
        now = database_now(connection)
        for account in sorted(accounts):
            save_breaker(
                connection, breakers.with_unproven_key(locked_breaker(connection, "account", account), now=now)
            )
