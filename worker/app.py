"""The Celery app: `celery -A worker.app worker|beat|flower`. Settings of Celery only; the work itself is in the tasks.

The table is the queue; a Celery message is a hint. So no task waits in a worker's memory (no ETA, no countdown, no
retry), results are kept for `worker.track` alone, and every message may be lost, late or double.
"""

import logging
import os
import secrets
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

from worker.configuration.environment import clean, is_service_link, trimmed
from worker.errors import SettingsError, WorkerError
from worker.settings import Settings, load
from worker.store.engine import engine_for
from worker.system.json_logs import JsonFormatter
from worker.system.kombu_patch import apply_patch
from worker.system.redaction import RedactingFilter, shared_scrubber

QUEUE = "fetch-worker"
POLLS = "fetch-worker.polls"
DOWNLOADS = "fetch-worker.downloads"

POLL_EVERY_SECONDS = 5.0
SWEEP_EVERY_SECONDS = 2.0
PRUNE_EVERY_SECONDS = 3_600.0
HINT_EXPIRES_SECONDS = 10.0
TRACK_RESULT_SECONDS = 3_600
UNACKED_SECONDS = 60
FLOWER_PORT = 5555
FLOWER_PREFIX = "FLOWER_"


class FixedScheduler(Scheduler):  # type: ignore[misc]  # celery has no types
    """Sends the tasks of `beat_schedule`, each at once after its start, and keeps no file."""

    def setup_schedule(self) -> None:
        """Take the schedule as it is configured."""
        for name, entry in self.app.conf.beat_schedule.items():
            started = self.app.now() - timedelta(seconds=entry["schedule"])
            self.data[name] = self.Entry(name=name, app=self.app, last_run_at=started, **entry)


class _OwnLoader(AppLoader):  # type: ignore[misc]  # celery has no types
    """Reads no CELERY_CONFIG_MODULE: it belongs to the web app."""

    def read_configuration(self, env: str = "") -> dict[str, object]:
        """Return no configuration."""
        return {}


class ScrubbedTask(Task):  # type: ignore[misc]  # celery has no types
    """A task whose errors, which become log lines, events and results, hold no key."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Run the task."""
        try:
            return self.run(*arguments, **options)
        except TaskPredicate:  # how a task tells Celery what to do with its message
            raise
        except Exception as error:
            scrubber = shared_scrubber()
            written = "".join(traceback.format_exception(error))
            if scrubber.text(written) == written:
                raise
            message = scrubber.text(str(error))
            if isinstance(error, WorkerError):
                raise type(error)(message) from None
            raise RuntimeError(f"{type(error).__name__}: {message}") from None


class ScrubbedDispatcher(EventDispatcher):  # type: ignore[misc]  # celery has no types
    """Sends events without keys: a task's arguments are what an app has put into them."""

    def send(self, type: str, *arguments: Any, **fields: Any) -> None:
        """Send an event."""
        scrub = shared_scrubber().text
        plain = {name: scrub(value) if isinstance(value, str) else value for name, value in fields.items()}
        super().send(type, *arguments, **plain)


class ScrubbedEvents(Events):  # type: ignore[misc]  # celery has no types
    """What Celery takes the dispatcher from."""

    dispatcher_cls = ScrubbedDispatcher


class FetchWorkerApp(Celery):  # type: ignore[misc]  # celery has no types
    """A Celery app that our settings alone configure.

    Celery prefers CELERY_BROKER_URL, CELERY_BROKER_READ_URL, CELERY_BROKER_WRITE_URL and CELERY_RESULT_BACKEND to what
    an app is given, and its command reads BROKER_URL by itself. In our environment they are meant for the web app.
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
            fixups=(),  # none for Django: our tasks use nothing of it
        )
        self._broker, self.backend_cls = settings.broker, settings.redis

    def connection_for_read(self, url: str | None = None, **options: Any) -> Any:
        """Return a connection to consume from."""
        return super().connection_for_read(self._ours(url), **options)

    def connection_for_write(self, url: str | None = None, **options: Any) -> Any:
        """Return a connection to publish on."""
        return super().connection_for_write(self._ours(url), **options)

    def _ours(self, url: str | None) -> str:
        """Celery itself hands over what the environment says."""
        return url if url in self._broker.split(";") else self._broker


def make_app(settings: Settings) -> Celery:
    """The app for these settings. Nothing secret is in its configuration beside the servers' own URLs."""
    celery_app = FetchWorkerApp(settings)
    celery_app.conf.update(
        task_default_queue=QUEUE,
        task_queues=[
            Queue(name, Exchange(name, type="direct"), routing_key=name) for name in (QUEUE, POLLS, DOWNLOADS)
        ],
        task_routes={"worker.poll": {"queue": POLLS}, "worker.download": {"queue": DOWNLOADS}},
        task_ignore_result=True,
        result_expires=TRACK_RESULT_SECONDS,
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        # After a lost connection Celery would raise the count again from threads of the pool. They wait for RabbitMQ's
        # answer on the socket that the event loop reads, and the worker takes no more messages, for good.
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
        # Names of our own: an app on the same Redis keeps its own time-out for messages that were not acknowledged.
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


def _prepare_logs(settings: Settings, celery_app: Celery, arguments: list[str]) -> None:
    """No key gets into the logs of any process, whatever form they have."""
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
    celeryd_init.connect(_without_banner, weak=False)
    beat: Any = celery_app.Beat
    celery_app.Beat = lambda **options: beat(**(options | {"quiet": True}))
    if "flower" in arguments:  # it has loggers of its own, and leaves those alone that it finds
        handler = logging.StreamHandler()
        logging.getLogger().addHandler(handler)
        prepare(logging.getLogger())


def _without_banner(instance: Any, **_: object) -> None:
    instance.quiet = True


def _process_name(arguments: list[str]) -> str:
    """What a process is called: by its node's name, else by what it does.

    >>> _process_name(["celery", "-A", "worker.app", "worker", "--hostname", "downloads@%h"])
    'downloads'
    """
    words = [part for argument in arguments for part in argument.split("=", 1)]
    for option, value in pairwise(words):
        if option in ("-n", "--hostname") and "@" in value:
            return value.partition("@")[0]
    return next((word for word in arguments if word in ("worker", "beat", "flower")), "worker")


def _prepare_flower(settings: Settings, arguments: list[str]) -> None:
    """Flower listens on this machine alone and asks for a password, whoever starts it."""
    os.umask(0o077)  # what it keeps is for this user alone
    _clean_flower_variables()
    if os.environ.get("FLOWER_PERSISTENT", "true").strip().lower() not in ("false", "0", "no", "off"):
        os.environ.setdefault("FLOWER_DB", str(settings.state / "flower"))
    given = any(argument.startswith(("--basic-auth", "--basic_auth", "--auth")) for argument in arguments)
    if settings.flower_basic_auth is not None:
        os.environ["FLOWER_BASIC_AUTH"] = settings.flower_basic_auth.get_secret_value()
    elif not given:
        password = secrets.token_urlsafe(12)
        os.environ["FLOWER_BASIC_AUTH"] = f"admin:{password}"
        print(f"Flower: log in as admin with {password} (set FLOWER_BASIC_AUTH to choose)", file=sys.stderr, flush=True)
    port = settings.flower_port if settings.flower_port is not None else settings.port
    os.environ["FLOWER_ADDRESS"] = settings.flower_address
    os.environ["FLOWER_PORT"] = str(FLOWER_PORT if port is None else port)
    defaults = {
        "FLOWER_CONF": os.devnull,  # a flowerconfig.py in the working directory is for the web app's own Flower
        "FLOWER_PERSISTENT": "true",
        "FLOWER_STATE_SAVE_INTERVAL": "10000",
        "FLOWER_INSPECT_TIMEOUT": "3000",
        "FLOWER_NATURAL_TIME": "false",
        "FLOWER_TASKS_COLUMNS": "name,uuid,args,result,state,received,runtime,worker",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _clean_flower_variables() -> None:
    """Flower takes its options from the environment itself: a wrong one would end it in a traceback.

    Raises SettingsError where an option can't be read.
    """
    try:
        from flower.options import options  # here, since Flower is an extra that only its own process needs
    except ImportError:
        return  # the command says so itself
    for variable in [name for name in os.environ if name.startswith(FLOWER_PREFIX)]:
        value = os.environ.pop(variable)
        name = variable.removeprefix(FLOWER_PREFIX).lower()
        if is_service_link(variable, value) or not trimmed(value) or name not in options:
            continue
        kind = type(options[name])
        try:
            os.environ[variable] = clean(value)
            if kind in (int, float):
                kind(clean(value))
        except ValueError as wrong:
            reason = str(wrong) if str(wrong).startswith("has ") else "must be a number"
            raise SettingsError(f"{variable} {reason}") from None


def _show_jobs(celery_app: Celery, settings: Settings) -> None:
    """Flower shows jobs, too; without them it goes on."""
    try:
        from worker.flower.job_rows import show_jobs  # here, since Flower is an extra that only its own process needs
    except ImportError as error:
        print(f"fetch-worker: no jobs are shown in Flower ({error})", file=sys.stderr, flush=True)
    else:
        show_jobs(celery_app, lambda: engine_for(settings.database), settings.flower_jobs)


def _is_celery_command(arguments: list[str]) -> bool:
    """Whether this process is `celery -A worker.app …`, and no web app that imports us."""
    return Path(arguments[0]).stem in ("celery", "__main__") and any("worker.app" in word for word in arguments[1:])


def _forget_celery_variables() -> None:
    """Celery's command takes options from CELERY_… variables, too: here they are meant for the web app."""
    for name in [name for name in os.environ if name.upper().startswith(("CELERY_", "CELERYD_"))]:
        del os.environ[name]


def _queues(arguments: list[str]) -> frozenset[str]:
    """The queues that a worker's command line names; all of ours where it names none."""
    words = [part for argument in arguments for part in argument.split("=", 1)]
    named = [value for option, value in pairwise(words) if option in ("-Q", "--queues")]
    return frozenset(",".join(named).split(",")) if named else frozenset({QUEUE, POLLS, DOWNLOADS})


def _load(arguments: list[str]) -> Settings:
    """The settings, with those that this process alone uses. Ends the process with one line where they are wrong."""
    processes = ["flower"] if "flower" in arguments else []
    downloads = "worker" in arguments and DOWNLOADS in _queues(arguments)
    try:
        settings = load(*processes, *(["downloads"] if downloads else []))
        if "flower" in arguments:
            _prepare_flower(settings, arguments)
        elif downloads and settings.bucket is not None:
            _ = settings.state  # for partial files: said as the process starts, not with the first output
    except SettingsError as wrong:
        print(f"fetch-worker: {wrong}", file=sys.stderr)
        raise SystemExit(2) from None
    return settings


_command = sys.argv[1:] if _is_celery_command(sys.argv) else []
if _command:
    _forget_celery_variables()
settings = _load(_command)
if settings.broker.startswith(("redis", "rediss")):
    apply_patch()
app = make_app(settings)
_prepare_logs(settings, app, sys.argv)
if "flower" in _command:
    _show_jobs(app, settings)
