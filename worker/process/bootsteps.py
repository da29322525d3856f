"""Boot steps of a worker process: check the schema at start, and poll and sweep where no message asks for it.

The ticker of a process that consumes polls watches for due jobs, and publishes a poll task when there are some. So an
idle worker publishes nothing, and Flower shows the polls that asked something. If no task starts in time, because there
is no broker, the ticker polls itself. Sweeps are done in the same way.
"""

import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from celery import bootsteps
from celery.signals import worker_init, worker_process_init, worker_shutting_down
from celery.utils.log import get_logger
from celery.worker.state import reserved_requests
from sqlalchemy.exc import SQLAlchemyError

from worker.app import app, settings
from worker.core.queues import POLLS
from worker.errors import DeploymentError, SchemaOutdated, Unavailable
from worker.process.other_workers import remember_database, warn_about_foreign_workers
from worker.process.registration import Registration
from worker.process.resources import process_resources
from worker.process.runs import (
    orders_needed,
    probe_keys,
    run_housekeeping,
    run_orders,
    run_polls,
    run_sweep,
    run_webhooks,
    sweep_needed,
    watch_due_work,
)
from worker.store.engine import describe_error, engine_for
from worker.store.migrate import expand
from worker.system.watchdog import Loop, Watchdog, watched_seconds

log = get_logger(__name__)

LOOK_SECONDS = 0.1
KEYS_SECONDS = 0.25  # between two looks for changed keys
WATCH_SECONDS = 0.02
ORDER_LOOK_SECONDS = 2.0  # wake-ups and due times start orders at once; this finds the rest
ORDER_SILENCE_SECONDS = 2.0
SILENCE_SECONDS = 0.03
SWEEP_LOOK_SECONDS = 2.0
DATABASE_WAIT_SECONDS = 2.0
NEIGHBOURS_SECONDS = 3.0
SWEEP_SILENCE_SECONDS = 10.0
WEBHOOK_SECONDS = (0.5, 1.0)
STOP_MARGIN_SECONDS = 5.0
PUBLISHER_SECONDS = 2.0
REGISTRATION_SECONDS = 2.0
EVENTS_SECONDS = 0.25
WAKE_SECONDS = 0.05
IDLE_WAKE_SECONDS = 1.0
QUIET_SECONDS = 2.0  # without a task, after which the event loop may sleep longer
EVENTS_PER_BATCH = 500
THREADED_POOLS = ("celery.concurrency.thread", "celery.concurrency.prefork")  # run tasks outside of the event loop


watchdog = Watchdog(settings.recovery_seconds)


class Ticker(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
    """Polls and sweeps where no message does. Starts before the consumer connects, after any pool has forked."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._registration: threading.Thread | None = None
        self._changed_keys = set[str]()
        self._needed_since: float | None = None  # since when a sweep would put something back
        super().__init__(worker, **options)

    def start(self, worker: Any) -> None:
        """Make the resources of this process, and start the loops in a worker that consumes polls."""
        make_resources()
        if settings.default_database_file is not None:
            log.warning("DATABASE_URL is not set: this worker uses the file %s", settings.default_database_file)
        threading.Thread(target=check_neighbours, name="neighbours", daemon=True).start()
        registration = Registration(
            process_resources().engine, settings, name=worker.hostname, queues=worker.app.amqp.queues.consume_from
        )
        self._registration = threading.Thread(
            target=registration.run, args=(self._stop,), name="registration", daemon=True
        )
        self._registration.start()
        if POLLS not in worker.app.amqp.queues.consume_from:
            return
        process_resources().ticks = True
        for target in (
            self._poll,
            self._submit,
            self._sweep,
            *((self._deliver_webhooks,) if settings.webhook_secrets else ()),
        ):
            self._threads.append(threading.Thread(target=target, name=f"ticker{target.__name__}", daemon=True))
            self._threads[-1].start()

    def stop(self, worker: Any) -> None:
        """Stop the loops. Wait for the requests in flight, as long as a request may take."""
        watchdog.ignore_all()
        self._stop.set()
        until = time.monotonic() + max(settings.sd_api_timeout, settings.order_timeout) + STOP_MARGIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if self._registration is not None:
            self._registration.join(REGISTRATION_SECONDS)
        if self._threads:
            process_resources().publisher.finish(PUBLISHER_SECONDS)
        if settings.webhook_secrets:
            process_resources().webhooks.wait(max(0.0, until - time.monotonic()))

    def terminate(self, worker: Any) -> None:
        """Stop at once."""
        self._stop.set()

    def _poll(self) -> None:
        self._probe_keys_at_start()
        poller = process_resources().poller
        loop = Loop()
        watchdog.watch("the poll run", lambda: poller.run_progress)
        watchdog.watch("the poll loop", lambda: loop() if poller.run_progress is None else None)
        while not self._stop.wait(WATCH_SECONDS):
            loop.beat()
            if time.monotonic() - poller.last_run > SILENCE_SECONDS:
                never_raise(watch_due_work)
        if poller.busy:
            never_raise(run_polls)  # claims no more jobs, but records the outstanding answers

    def _submit(self) -> None:
        """Request a run of orders when some can be sent. If none starts, send them here."""
        resources = process_resources()
        submitter, loop = resources.submitter, Loop()
        watchdog.watch("the order loop", lambda: None if submitter.running else loop())
        needed_since: float | None = None
        while not self._stop.is_set():
            loop.beat()
            submitter.wait(ORDER_LOOK_SECONDS)
            if submitter.running or not orders_needed():
                needed_since = None
                continue
            needed_since = needed_since or time.monotonic()
            if time.monotonic() - needed_since > ORDER_SILENCE_SECONDS:
                never_raise(run_orders)
            else:
                resources.run_requests.request("worker.submit")
                self._stop.wait(LOOK_SECONDS)
        if submitter.busy:
            never_raise(run_orders)  # sends no more orders, but records the outstanding answers

    def _sweep(self) -> None:
        loop = Loop()
        watchdog.watch("the sweep loop", loop)
        looked_at = 0.0
        pause = KEYS_SECONDS if settings.sd_api_keys_file else SWEEP_LOOK_SECONDS  # other keys don't change
        while not self._stop.wait(pause):
            loop.beat()
            if time.monotonic() - looked_at > SWEEP_LOOK_SECONDS:
                looked_at = time.monotonic()
                never_raise(self._look_for_lost_work)
            self._changed_keys |= settings.keys.take_changed()
            if self._changed_keys:
                self._try_keys()

    def _look_for_lost_work(self) -> None:
        """Request a sweep if it would put something back. If none starts, sweep here."""
        run_housekeeping()
        if not sweep_needed():
            self._needed_since = None
            return
        resources = process_resources()
        self._needed_since = self._needed_since or time.monotonic()
        late = time.monotonic() - self._needed_since > SWEEP_SILENCE_SECONDS
        if late and resources.swept_at < self._needed_since:
            run_sweep()
        else:
            resources.run_requests.request("worker.sweep")

    def _try_keys(self) -> None:
        """Probe changed keys, whatever held their accounts. An account without a key is held from now on."""
        try:
            probe_keys(self._changed_keys)
        except SQLAlchemyError as error:
            log.error("changed keys wait for the database reason=%s", type(error).__name__)
            self._stop.wait(DATABASE_WAIT_SECONDS)
        else:
            self._changed_keys.clear()
            process_resources().poller.wake()

    def _deliver_webhooks(self) -> None:
        loop = Loop()
        watchdog.watch("the webhook loop", loop)
        while not self._stop.wait(random.uniform(*WEBHOOK_SECONDS)):
            loop.beat()
            never_raise(lambda: self._deliver_all(loop))

    def _deliver_all(self, loop: Loop) -> None:
        while not self._stop.wait(LOOK_SECONDS) and run_webhooks():
            loop.beat()

    def _probe_keys_at_start(self) -> None:
        if not settings.keys:
            name = "SD_API_KEY" if settings.sd_api_keys_file is None else "key in SD_API_KEYS_FILE"
            log.warning("no %s: jobs are accepted and held until there is one", name)
        while not self._stop.is_set():
            try:
                settings.keys.take_changed()
                probe_keys(settings.keys)
            except Exception as error:
                log.error("waiting for the database reason=%s", describe_error(error, settings.database))
                self._stop.wait(DATABASE_WAIT_SECONDS)
            else:
                return


def check_neighbours() -> None:
    """Read the id of this process's database, so that others can ask for it. Warn about workers on another database."""
    while remember_database(app, settings) is None:
        time.sleep(DATABASE_WAIT_SECONDS)
    time.sleep(NEIGHBOURS_SECONDS)  # processes that start at the same time answer by then
    never_raise(lambda: warn_about_foreign_workers(app, settings))


def never_raise(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception:  # the ticker is the last resort: it must survive any error
        log.exception("a tick failed")


class EventLoopTimers(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
    """Timers that keep the consumer's event loop responsive.

    A loop whose pool places were all taken stops reading from Redis. In the threads pool nothing wakes it when a place
    is free again: it would sleep on a full queue until some timer of its own. While there are tasks, this step wakes it
    twenty times a second. Task events are sent in batches a few times a second, since each message costs as much as a
    small task. Without tasks, once a second is enough: each pass of the loop takes processor time.
    """

    requires = ("celery.worker.consumer.events:Events",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        self._timers: list[Any] = []
        self._hub: Any = None
        self._beat: Callable[[], object] = _wake_loop
        self._flush: Callable[[], object] | None = None
        self._busy = True
        self._busy_until = 0.0
        super().__init__(consumer, **options)

    def start(self, consumer: Any) -> None:
        """Start the timers, each time the consumer has connected."""
        events, hub = consumer.event_dispatcher, consumer.hub
        if hub is None:
            return
        self.stop(consumer)
        if type(consumer.pool).__module__ in THREADED_POOLS:  # in other pools a long task would block the loop
            loop = Loop()
            watchdog.watch("the event loop", loop)
            self._beat = loop.beat
        if events is not None and events.on_send_buffered is not None:
            events.buffer_limit = EVENTS_PER_BATCH
            events.on_send_buffered = _wake_loop
            self._flush = consumer._flush_events
        self._hub = hub
        self._set_timers(busy=True)
        hub.on_tick.add(self._adapt)

    def stop(self, consumer: Any) -> None:
        """Cancel the timers when the connection is lost or the worker ends."""
        watchdog.forget("the event loop")
        if self._hub is not None:
            self._hub.on_tick.discard(self._adapt)
        self._cancel_timers()
        self._hub, self._beat, self._flush = None, _wake_loop, None

    def _adapt(self) -> None:
        """Choose the timers, in each pass of the loop, before it waits."""
        now = time.monotonic()
        if reserved_requests:
            self._busy_until = now + QUIET_SECONDS
        busy = now < self._busy_until
        if busy != self._busy:
            self._set_timers(busy=busy)

    def _set_timers(self, *, busy: bool) -> None:
        self._cancel_timers()
        self._busy = busy
        self._timers.append(self._hub.call_repeatedly(WAKE_SECONDS if busy else IDLE_WAKE_SECONDS, self._beat))
        if self._flush is not None:
            self._timers.append(self._hub.call_repeatedly(EVENTS_SECONDS if busy else IDLE_WAKE_SECONDS, self._flush))

    def _cancel_timers(self) -> None:
        while self._timers:
            self._timers.pop().cancel()


def _wake_loop() -> None:
    """Do nothing: the event loop checks its connections after each timer."""


@worker_init.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def _start_watchdog(**_: object) -> None:
    watched = watched_seconds() is not None
    if watched or settings.end_when_stalled:
        watchdog.start(ends_process=not watched)


@worker_init.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def _check_schema(**_: object) -> None:
    try:
        expand(engine_for(settings.database))
    except (SchemaOutdated, DeploymentError) as error:
        file = settings.default_database_file
        database = "" if file is None else f" (DATABASE_URL is not set, so the database is the file {file})"
        print(f"fetch-worker: {error}{database}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except Unavailable as error:
        log.error("%s; waiting for it", error)


@worker_shutting_down.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def _stop_claiming(**_: object) -> None:
    process_resources().stop()


@worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def make_resources(**_: object) -> None:
    """Make the resources of this process, also in each child of a prefork pool, before the first task runs."""
    process_resources().make_for(app.amqp.queues.consume_from)


app.steps["worker"].add(Ticker)
app.steps["consumer"].add(EventLoopTimers)
