"""What every worker process does by itself: check the schema as it starts, and tick where no message comes.

Messages are hints. Where a poll run has ended and no message starts the next one at once (no broker, no beat, another
process took the message) the ticker of a process that consumes polls starts the same run directly. It gives way to the
next message, so that Flower sees what goes on. Now and then the ticker sweeps, too.
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
from sqlalchemy.exc import SQLAlchemyError

from worker.app import POLLS, app, settings
from worker.errors import DeploymentError, SchemaOutdated, Unavailable
from worker.process.neighbours import remember_database, warn_about_foreign_workers
from worker.process.resources import process_resources
from worker.process.runs import probe_keys, run_polls, run_sweep, run_webhooks
from worker.store.engine import describe_error, engine_for
from worker.store.migrate import expand
from worker.system.watchdog import Loop, Watchdog, watched_seconds

log = get_logger(__name__)

LOOK_SECONDS = 0.1
SILENCE_SECONDS = 0.15
DATABASE_WAIT_SECONDS = 2.0
NEIGHBOURS_SECONDS = 3.0
SWEEP_SILENCE_SECONDS = 10.0
WEBHOOK_SECONDS = (0.5, 1.0)
STOP_MARGIN_SECONDS = 5.0
COURIER_SECONDS = 2.0
EVENTS_SECONDS = 0.25
LOOK_AGAIN_SECONDS = 0.05
EVENTS_AT_ONCE = 500
OTHER_THREADS = ("celery.concurrency.thread", "celery.concurrency.prefork")  # pools that leave the event loop alone


watchdog = Watchdog(settings.recovery_seconds)


class Ticker(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
    """Starts before the consumer connects, so that polling goes on without a broker; after any pool has forked."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._changed_keys = set[str]()
        super().__init__(worker, **options)

    def start(self, worker: Any) -> None:
        """Make the resources of this process; tick, in a worker that consumes polls."""
        make_resources()
        threading.Thread(target=check_neighbours, name="neighbours", daemon=True).start()
        if POLLS not in worker.app.amqp.queues.consume_from:
            return
        process_resources().ticks = True
        for work in (self._poll, self._sweep, *((self._tell,) if settings.webhook_secrets else ())):
            self._threads.append(threading.Thread(target=work, name=f"ticker{work.__name__}", daemon=True))
            self._threads[-1].start()

    def stop(self, worker: Any) -> None:
        """Stops ticking: what is being asked about is waited for, as long as a call may take."""
        watchdog.ignore_all()
        self._stop.set()
        until = time.monotonic() + settings.sd_api_timeout + STOP_MARGIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if self._threads:
            process_resources().publisher.finish(COURIER_SECONDS)
        if settings.webhook_secrets:
            process_resources().webhooks.wait(max(0.0, until - time.monotonic()))

    def terminate(self, worker: Any) -> None:
        """Stops at once."""
        self._stop.set()

    def _poll(self) -> None:
        self._begin()
        poller = process_resources().poller
        loop = Loop()
        watchdog.watch("the poll run", lambda: poller.run_progress)
        watchdog.watch("the poll loop", lambda: loop() if poller.run_progress is None else None)
        while not self._stop.wait(LOOK_SECONDS):
            loop.beat()
            if time.monotonic() - poller.last_run > SILENCE_SECONDS:
                never_raise(lambda: run_polls(preemptible=True))
        if poller.busy:
            never_raise(run_polls)  # claims nothing more, but records what is still to come

    def _sweep(self) -> None:
        loop = Loop()
        watchdog.watch("the sweep loop", loop)
        while not self._stop.wait(LOOK_SECONDS):
            loop.beat()
            if time.monotonic() - process_resources().swept_at > SWEEP_SILENCE_SECONDS:
                never_raise(run_sweep)
            self._changed_keys |= settings.keys.take_changed()
            if self._changed_keys:
                self._try_keys()

    def _try_keys(self) -> None:
        """Have keys that are new tried, whatever held their accounts; an account without a key is held from now on."""
        try:
            probe_keys(self._changed_keys)
        except SQLAlchemyError as error:
            log.error("keys that have changed wait for the database reason=%s", type(error).__name__)
            self._stop.wait(DATABASE_WAIT_SECONDS)
        else:
            self._changed_keys.clear()
            process_resources().poller.wake()

    def _tell(self) -> None:
        loop = Loop()
        watchdog.watch("the webhook loop", loop)
        while not self._stop.wait(random.uniform(*WEBHOOK_SECONDS)):
            loop.beat()
            never_raise(lambda: self._tell_all(loop))

    def _tell_all(self, loop: Loop) -> None:
        while not self._stop.wait(LOOK_SECONDS) and run_webhooks():
            loop.beat()

    def _begin(self) -> None:
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
    """Learn which database this is, for processes that ask, and warn of those that serve another one."""
    while remember_database(app, settings) is None:
        time.sleep(DATABASE_WAIT_SECONDS)
    time.sleep(NEIGHBOURS_SECONDS)  # those that start together with this one answer by then
    never_raise(lambda: warn_about_foreign_workers(app, settings))


def never_raise(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception:  # the ticker is the last resort: it must not die of one trouble
        log.exception("a tick failed")


class EventLoopTimers(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
    """Keeps the consumer's event loop lively.

    A loop whose places were all taken stops reading from Redis, and in the threads pool nothing wakes it when one is
    free again: it would sleep on a full queue until some timer of its own. So it looks twenty times a second. Task
    events are gathered and sent a few times a second, since each message costs as much as a small task.
    """

    requires = ("celery.worker.consumer.events:Events",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        self._timers: list[Any] = []
        super().__init__(consumer, **options)

    def start(self, consumer: Any) -> None:
        """Starts, each time the consumer has connected."""
        events, hub = consumer.event_dispatcher, consumer.hub
        if hub is None:
            return
        self.stop(consumer)
        if type(consumer.pool).__module__ in OTHER_THREADS:  # elsewhere tasks run in the event loop, and may take long
            loop = Loop()
            watchdog.watch("the event loop", loop)
            self._timers.append(hub.call_repeatedly(LOOK_AGAIN_SECONDS, loop.beat))
        else:
            self._timers.append(hub.call_repeatedly(LOOK_AGAIN_SECONDS, _look_again))
        if events is not None and events.on_send_buffered is not None:
            events.buffer_limit = EVENTS_AT_ONCE
            events.on_send_buffered = _look_again
            self._timers.append(hub.call_repeatedly(EVENTS_SECONDS, consumer._flush_events))

    def stop(self, consumer: Any) -> None:
        """Stops, as the connection is lost or the worker ends."""
        watchdog.forget("the event loop")
        while self._timers:
            self._timers.pop().cancel()


def _look_again() -> None:
    """Nothing: the loop looks at its connections each time it has come round."""


@worker_init.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def _start_watchdog(**_: object) -> None:
    if watched_seconds() is not None:
        watchdog.start()


@worker_init.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def _check_schema(**_: object) -> None:
    try:
        expand(engine_for(settings.database))
    except (SchemaOutdated, DeploymentError) as wrong:
        print(f"fetch-worker: {wrong}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except Unavailable as away:
        log.error("%s; waiting for it", away)


@worker_shutting_down.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def _stop_claiming(**_: object) -> None:
    process_resources().stop()


@worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def make_resources(**_: object) -> None:
    """Make what this process needs, in each child of a prefork pool too, before the first task runs."""
    process_resources().make_for(app.amqp.queues.consume_from)


app.steps["worker"].add(Ticker)
app.steps["consumer"].add(EventLoopTimers)
