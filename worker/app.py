"""The Celery app: `celery -A worker.app worker|beat|flower`. Only Celery's settings are here; the tasks do the work.

The table is the queue, and a Celery message is a hint. So no task waits in a worker's memory (no ETA, no countdown, no
retry), only `worker.track`, `worker.order` and `worker.get` keep their results, and every message may be lost, late or
duplicated.
"""

import logging
import os
import sys
import traceback
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from celery import Celery, Task
from celery.app.events import Events
from celery.beat import Scheduler
from celery.events.dispatcher import EventDispatcher
from celery.exceptions import TaskPredicate
from celery.loaders.app import AppLoader
from celery.signals import after_setup_logger, after_setup_task_logger, celeryd_init
from kombu.entity import Exchange, Queue

from worker.core.queues import DOWNLOADS, POLLS, QUEUE
from worker.errors import SettingsError, WorkerError
from worker.settings import Settings, load
from worker.store.engine import engine_for
from worker.system.idle_lines import leave_out_idle_lines
from worker.system.json_logs import JsonFormatter
from worker.system.kombu_patch import apply_patch
from worker.system.redaction import RedactingFilter, shared_scrubber

# Worker processes notice due work themselves. Beat's tasks are a safety net.
POLL_EVERY_SECONDS = 60.0
SWEEP_EVERY_SECONDS = 120.0
PRUNE_EVERY_SECONDS = 3_600.0
HINT_EXPIRES_SECONDS = 10.0
TRACK_RESULT_SECONDS = 3_600
UNACKED_SECONDS = 60


class FixedScheduler(Scheduler):  # type: ignore[misc]  # celery has no types
    """Sends the tasks of `beat_schedule`, each once right at the start. Keeps no file."""

    def setup_schedule(self) -> None:
        """Load the schedule from the configuration."""
        for name, entry in self.app.conf.beat_schedule.items():
            started = self.app.now() - timedelta(seconds=entry["schedule"])
            self.data[name] = self.Entry(name=name, app=self.app, last_run_at=started, **entry)


class _OwnLoader(AppLoader):  # type: ignore[misc]  # celery has no types
    """Ignores CELERY_CONFIG_MODULE, which belongs to the web app."""

    def read_configuration(self, env: str = "") -> dict[str, object]:
        """Return an empty configuration."""
        return {}


class ScrubbedTask(Task):  # type: ignore[misc]  # celery has no types
    """A task that removes keys from its errors, which become log lines, events and results."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Run the task."""
        try:
            return self.run(*arguments, **options)
        except TaskPredicate:  # control flow: tells Celery what to do with the message
            raise
        except Exception as error:
            scrubber = shared_scrubber()
            traceback_text = "".join(traceback.format_exception(error))
            if scrubber.text(traceback_text) == traceback_text:
                raise
            message = scrubber.text(str(error))
            if isinstance(error, WorkerError):
                raise type(error)(message) from None
            raise RuntimeError(f"{type(error).__name__}: {message}") from None


class ScrubbedDispatcher(EventDispatcher):  # type: ignore[misc]  # celery has no types
    """Removes keys from events: a task's arguments may contain any text of an app."""

    def send(self, type: str, *arguments: Any, **fields: Any) -> None:
        """Send an event."""
        remove_keys = shared_scrubber().text
        clean_fields = {name: remove_keys(value) if isinstance(value, str) else value for name, value in fields.items()}
        super().send(type, *arguments, **clean_fields)


class ScrubbedEvents(Events):  # type: ignore[misc]  # celery has no types
    """Makes Celery use `ScrubbedDispatcher`."""

    dispatcher_cls = ScrubbedDispatcher


class FetchWorkerApp(Celery):  # type: ignore[misc]  # celery has no types
    """A Celery app that is configured only by the settings of fetch-worker.

    Celery prefers CELERY_BROKER_URL, CELERY_BROKER_READ_URL, CELERY_BROKER_WRITE_URL and CELERY_RESULT_BACKEND over the
    values passed to an app, and its command reads BROKER_URL by itself. In this environment they belong to the web app.
    """

    events_cls = ScrubbedEvents
    task_cls = ScrubbedTask

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            "worker",
            broker=settings.broker,
            backend=settings.redis,
            include=["worker.tasks", "worker.process.bootsteps"],
            loader=_OwnLoader,
            fixups=(),  # none for Django: the tasks do not use it
        )
        self._broker, self.backend_cls = settings.broker, settings.redis

    def connection_for_read(self, url: str | None = None, **options: Any) -> Any:
        """Return a connection to consume from."""
        return super().connection_for_read(self._own_url(url), **options)

    def connection_for_write(self, url: str | None = None, **options: Any) -> Any:
        """Return a connection to publish on."""
        return super().connection_for_write(self._own_url(url), **options)

    def _own_url(self, url: str | None) -> str:
        """Return `url` if it is a configured broker, or else the configured URL: Celery passes the environment's."""
        return url if url in self._broker.split(";") else self._broker


def make_app(settings: Settings) -> Celery:
    """Return the app for these settings. Its configuration has no secrets except the servers' own URLs."""
    celery_app = FetchWorkerApp(settings)
    celery_app.conf.update(
        task_default_queue=QUEUE,
        task_queues=[
            Queue(name, Exchange(name, type="direct"), routing_key=name) for name in (QUEUE, POLLS, DOWNLOADS)
        ],
        task_routes={
            "worker.poll": {"queue": POLLS},
            "worker.submit": {"queue": POLLS},
            "worker.download": {"queue": DOWNLOADS},
        },
        task_ignore_result=True,
        result_expires=TRACK_RESULT_SECONDS,
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        # After a lost connection Celery would raise the count again from threads of the pool. They wait for RabbitMQ's
        # answer on the socket that the event loop reads, and the worker then never takes a message again.
        worker_enable_prefetch_count_reduction=False,
        worker_disable_prefetch=settings.broker.startswith(("redis", "rediss")),
        worker_send_task_events=True,
        worker_consumer="worker.process.message_guard:GuardedConsumer",
        worker_hijack_root_logger=True,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=_transport_options(settings.broker),
        result_backend_transport_options={"retry_policy": {"timeout": 5.0}},
        redis_socket_timeout=10.0,
        redis_socket_connect_timeout=5.0,
        redis_socket_keepalive=not settings.redis.startswith("redis+socket"),
        redis_backend_health_check_interval=25,
        enable_utc=True,
        timezone="UTC",
        beat_scheduler=f"{__name__}:{FixedScheduler.__name__}",
        beat_schedule={
            "poll": {
                "task": "worker.poll",
                "schedule": POLL_EVERY_SECONDS,
                "options": {"expires": HINT_EXPIRES_SECONDS, "queue": POLLS},
            },
            "sweep": {
                "task": "worker.sweep",
                "schedule": SWEEP_EVERY_SECONDS,
                "options": {"expires": HINT_EXPIRES_SECONDS, "queue": QUEUE},
            },
            "prune": {
                "task": "worker.prune",
                "schedule": PRUNE_EVERY_SECONDS,
                "options": {"expires": PRUNE_EVERY_SECONDS, "queue": QUEUE},
            },
        },
    )
    return celery_app


def _transport_options(broker: str) -> dict[str, object]:
    if not broker.startswith(("redis", "rediss")):
        return {}
    options: dict[str, object] = {
        "socket_timeout": 10,
        "socket_connect_timeout": 5,
        "health_check_interval": 25,
        # Separate key names: an app on the same Redis keeps its own time-out for unacknowledged messages.
        "unacked_key": "fetch-worker.unacked",
        "unacked_index_key": "fetch-worker.unacked_index",
        "unacked_mutex_key": "fetch-worker.unacked_mutex",
        "visibility_timeout": UNACKED_SECONDS,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
    }
    if not broker.startswith("redis+socket"):
        options["socket_keepalive"] = True
    return options


def _configure_logs(settings: Settings, celery_app: Celery, arguments: list[str]) -> None:
    """Remove keys from the logs of every process, in every log format."""
    scrubber = shared_scrubber(settings.secret_texts)
    settings.keys.listen(scrubber.add)
    scrubbed, lines = RedactingFilter(scrubber), JsonFormatter(scrubber, _process_name(arguments))
    as_json = settings.json_logs(sys.stderr)

    def prepare(logger: logging.Logger, **_: object) -> None:
        for handler in logger.handlers:
            if as_json:
                handler.setFormatter(lines)
            else:
                handler.addFilter(scrubbed)

    after_setup_logger.connect(prepare, weak=False)
    after_setup_task_logger.connect(prepare, weak=False)
    if not as_json:
        return
    celeryd_init.connect(_hide_banner, weak=False)
    beat: Any = celery_app.Beat
    celery_app.Beat = lambda **options: beat(**(options | {"quiet": True}))
    if "flower" in arguments:  # it configures its own loggers, and keeps existing handlers
        handler = logging.StreamHandler()
        logging.getLogger().addHandler(handler)
        prepare(logging.getLogger())


def _hide_banner(instance: Any, **_: object) -> None:
    instance.quiet = True


def _process_name(arguments: list[str]) -> str:
    """Return the name of a process: the name of its node, or what it does.

    >>> _process_name(["celery", "-A", "worker.app", "worker", "--hostname", "downloads@%h"])
    'downloads'
    """
    named = (value.partition("@")[0] for value in _values_of(arguments, "-n", "--hostname") if "@" in value)
    return next(named, None) or next((word for word in arguments if word in ("worker", "beat", "flower")), "worker")


def _values_of(arguments: list[str], *options: str) -> list[str]:
    """Return the values of an option, under any of its names, in a command line."""
    parts = [part for argument in arguments for part in argument.split("=", 1)]
    return [value for option, value in pairwise(parts) if option in options]


def _configure_flower(settings: Settings, arguments: list[str]) -> None:
    """Set Flower's options. If Flower is not installed, Celery's command says so."""
    try:
        from worker.flower.options import configure_flower  # here, since Flower is an extra
    except ImportError:
        return
    configure_flower(settings, arguments)


def _show_jobs(celery_app: Celery, settings: Settings) -> None:
    """Show jobs in Flower. If that is not possible, Flower runs without them."""
    try:
        from worker.flower.job_rows import show_jobs  # here, since Flower is an extra that only its own process needs
    except ImportError as error:
        print(f"fetch-worker: no jobs are shown in Flower ({error})", file=sys.stderr, flush=True)
    else:
        show_jobs(celery_app, lambda: engine_for(settings.database), settings.flower_jobs)


def _is_celery_command(arguments: list[str]) -> bool:
    """Return whether this process is `celery -A worker.app …`, and not a web app that imports this package."""
    return Path(arguments[0]).stem in ("celery", "__main__") and any(
        "worker.app" in argument for argument in arguments[1:]
    )


def _forget_celery_variables() -> None:
    """Remove CELERY_… variables: Celery's command would use them as options, but they belong to the web app."""
    for name in [name for name in os.environ if name.upper().startswith(("CELERY_", "CELERYD_"))]:
        del os.environ[name]


def _queues(arguments: list[str]) -> frozenset[str]:
    """Return the queues of a worker's command line, or all queues if it names none."""
    queue_names = _values_of(arguments, "-Q", "--queues")
    return frozenset(",".join(queue_names).split(",")) if queue_names else frozenset({QUEUE, POLLS, DOWNLOADS})


def _load(arguments: list[str]) -> Settings:
    """Return the settings, including those of this kind of process. Exit with one line if they are invalid."""
    processes = ["flower"] if "flower" in arguments else []
    downloads = "worker" in arguments and DOWNLOADS in _queues(arguments)
    try:
        settings = load(*processes, *(["downloads"] if downloads else []))
        if "flower" in arguments:
            _configure_flower(settings, arguments)
        elif downloads and settings.bucket is not None:
            _ = settings.state  # for partial files: an error is reported at the start, not with the first output
    except SettingsError as error:
        print(f"fetch-worker: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return settings


_command = sys.argv[1:] if _is_celery_command(sys.argv) else []
if _command:
    _forget_celery_variables()
settings = _load(_command)
if settings.broker.startswith(("redis", "rediss")):
    apply_patch()
app = make_app(settings)
_configure_logs(settings, app, sys.argv)
if _command:
    leave_out_idle_lines()
if "flower" in _command:
    _show_jobs(app, settings)
