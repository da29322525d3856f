"""Rejects messages that can't be tasks, before Celery reads them.

Celery trusts what it finds in a queue: a malformed body ends the worker process, or occupies a place of its pool until
the process ends. So each message is checked first. A malformed one is rejected and not requeued (RabbitMQ drops it, or
moves it to the queue's dead-letter exchange). It is logged as one line, without its body.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.app.task import Context
from celery.canvas import Signature
from celery.concurrency.base import BasePool
from celery.concurrency.thread import TaskPool
from celery.exceptions import InvalidTaskError
from celery.utils.log import get_task_logger
from celery.utils.time import maybe_iso8601
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.consumer.control import Control
from celery.worker.consumer.gossip import Gossip
from kombu.exceptions import ContentDisallowed

from worker.configuration.setting_types import MAX_SECONDS
from worker.process.transport_guard import (
    UNREADABLE,
    describe_type,
    guard_transports,
    is_lost_connection,
    log_refused,
    quote_for_log,
    size_of,
)

log = get_task_logger(__name__)

TEXT_MOST = 255  # characters of an id or a name; Celery's own ids have 36
REPR_MOST = 100_000  # characters of argsrepr and kwargsrepr; Celery's clients cut them at 1,024
RETRIES_MOST = 1 << 31
CLOCK_MOST = 1 << 53
ETA_SECONDS = 30.0  # half of the time after which Redis redelivers a message
TRACK_ETA_SECONDS = 86_400.0
TRACK = "worker.track"
AT_ONCE = frozenset({TRACK, "worker.order", "worker.nudge"})  # tasks that may run before their ETA
ENCODINGS = frozenset({"", "utf-8", "utf8", "us-ascii", "ascii", "binary"})
EMBED = frozenset({"callbacks", "errbacks", "chain", "chord"})
# Names that would overwrite attributes or methods that Celery sets on `task.request`.
RESERVED = frozenset(
    name
    for name, value in vars(Context).items()
    if callable(value) or isinstance(value, property) or name.startswith("_")
) | {"called_directly", "is_eager", "loglevel", "logfile"}


class MalformedMessage(Exception):
    """A message is not a task. The text says why, in a few words."""


@dataclass(frozen=True, slots=True)
class TaskMessage:
    """The task of a message, as Celery reads it."""

    name: str
    id: str
    fields: Mapping[str, Any]
    args: list[Any] | tuple[Any, ...]
    kwargs: dict[str, Any]


def read_task(message: Any, tasks: Mapping[str, Any]) -> TaskMessage:
    """Return the task of a kombu message, of Celery's protocol 1 or 2. Raises MalformedMessage.

    `tasks` has the tasks that this worker runs, by name.
    """
    headers = message.headers
    if not isinstance(headers, Mapping):
        raise MalformedMessage(f"its headers are {describe_type(headers)}")
    if UNREADABLE in headers:
        raise MalformedMessage("its AMQP properties can't be read")
    if EMBED & headers.keys():
        raise MalformedMessage("it has callbacks among its headers")
    payload = _payload(message)
    if "task" in headers and isinstance(payload, list):
        if len(payload) != 3:
            raise MalformedMessage(f"its body is a list of {len(payload)}, not [args, kwargs, embed]")
        fields, (args, kwargs, embed) = headers, payload
        _check_embed(embed, fields)
    elif isinstance(payload, dict) and ("args" in payload if "task" in headers else "task" in payload):
        fields = {**payload, **headers}
        args, kwargs = payload.get("args", ()), payload.get("kwargs", {})
        _check_embed({name: payload[name] for name in EMBED & payload.keys()}, {})
    elif "task" in headers:
        raise MalformedMessage(f"its body is {describe_type(payload)}, not [args, kwargs, embed]")
    else:
        raise MalformedMessage("it names no task")
    _check_fields(fields)
    _check_properties(message.properties)
    task = TaskMessage(fields["task"], fields["id"], fields, args, kwargs)
    _check_call(task, tasks)
    return task


def _payload(message: Any) -> object:
    encoding = message.content_encoding
    if encoding is not None and (not isinstance(encoding, str) or encoding.lower() not in ENCODINGS):
        raise MalformedMessage(f"its content encoding is {quote_for_log(encoding)}, not utf-8")
    if message.content_type is not None and not isinstance(message.content_type, str):
        raise MalformedMessage(f"its content type is {describe_type(message.content_type)}")
    try:
        return message.payload
    except ContentDisallowed:
        raise MalformedMessage("its content type is not application/json") from None
    except Exception as error:  # each decoder raises errors of its own
        raise MalformedMessage(f"its body can't be decoded ({type(error).__name__})") from None


def _check_call(task: TaskMessage, tasks: Mapping[str, Any]) -> None:
    if task.name not in tasks or task.name.startswith("celery."):
        raise MalformedMessage(f"this worker has no task {quote_for_log(task.name)}")
    if not isinstance(task.args, (list, tuple)):
        raise MalformedMessage(f"its args are {describe_type(task.args)}, not a list")
    if not isinstance(task.kwargs, dict) or not all(isinstance(name, str) for name in task.kwargs):
        raise MalformedMessage(f"its kwargs are {describe_type(task.kwargs)}, not an object")
    try:
        tasks[task.name].__header__(*task.args, **task.kwargs)  # raises TypeError where the signature differs
    except TypeError:
        raise MalformedMessage(f"{task.name} does not take these arguments") from None


def _check_embed(embed: object, headers: Mapping[str, Any]) -> None:
    if embed is None:
        return
    if not isinstance(embed, dict):
        raise MalformedMessage(f"its embed is {describe_type(embed)}, not an object")
    for name, value in embed.items():
        if name in EMBED:
            _check_callbacks(name, value)
        elif name in headers or name in RESERVED or name in vars(Context):
            raise MalformedMessage(f"its embed has {quote_for_log(name)}")


def _check_callbacks(name: str, value: object) -> None:
    if value is None:
        return
    signatures = [value] if name == "chord" else value
    if not isinstance(signatures, list) or not all(_is_signature(signature) for signature in signatures):
        raise MalformedMessage(f"{name} of its embed is no task signature")


def _is_signature(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("task"), str)
        and isinstance(value.get("args", ()), (list, tuple))
        and isinstance(value.get("kwargs", {}), dict)
        and isinstance(value.get("options", {}), dict)
        and (not value.get("subtask_type") or value["subtask_type"] in map(str, Signature.TYPES))
    )


# ── headers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= TEXT_MOST and value.isprintable()


def _is_id(value: object) -> bool:
    return _is_text(value) and bool(value)


def _is_repr(value: object) -> bool:
    return isinstance(value, str) and len(value) <= REPR_MOST


def _is_shown_name(value: object) -> bool:
    return _is_text(value) and not set("<>[]") & set(str(value))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < RETRIES_MOST


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_time_limit(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return all(seconds is None or _is_seconds(seconds) for seconds in value)


def _is_seconds(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= MAX_SECONDS  # type: ignore[operator]  # it is a number here


def _is_moment(value: object) -> bool:
    return _moment(value) is not None


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_text(name) for name in value)


def _is_object(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


REQUIRED: Mapping[str, Callable[[object], bool]] = {"task": _is_id, "id": _is_id}
OPTIONAL: Mapping[str, Callable[[object], bool]] = {
    "lang": _is_text,
    "root_id": _is_id,
    "parent_id": _is_id,
    "group": _is_id,
    "taskset": _is_id,
    "group_index": _is_count,
    "meth": _is_text,
    "shadow": _is_shown_name,
    "eta": _is_moment,
    "expires": _is_moment,
    "retries": _is_count,
    "timelimit": _is_time_limit,
    "argsrepr": _is_repr,
    "kwargsrepr": _is_repr,
    "origin": _is_text,
    "ignore_result": _is_bool,
    "replaced_task_nesting": _is_count,
    "stamped_headers": _is_names,
    "stamps": _is_object,
    "compression": _is_text,
    "utc": _is_bool,
}


def _check_fields(fields: Mapping[str, Any]) -> None:
    for name, is_right in REQUIRED.items():
        if name not in fields:
            raise MalformedMessage(f"it has no {name}")
        if not is_right(fields[name]):
            raise MalformedMessage(f"its {name} is {describe_type(fields[name])}")
    for name, value in fields.items():
        if not isinstance(name, str):
            raise MalformedMessage(f"one of its headers is named by {describe_type(name)}")
        is_right_or_none = OPTIONAL.get(name)
        if value is not None and is_right_or_none is not None and not is_right_or_none(value):
            raise MalformedMessage(f"its {name} is {describe_type(value)}")
        if name in RESERVED:
            raise MalformedMessage(f"it has a header {quote_for_log(name)}")


def _check_properties(properties: object) -> None:
    if not isinstance(properties, Mapping):
        raise MalformedMessage(f"its properties are {describe_type(properties)}")
    for name in ("correlation_id", "reply_to"):
        value = properties.get(name)
        if value is not None and not _is_text(value):
            raise MalformedMessage(f"its {name} is {describe_type(value)}")


def _moment(value: object) -> datetime | None:
    """Return an ISO 8601 time in UTC, or None if it is none or out of range."""
    if not isinstance(value, str) or not value:
        return None
    try:
        moment = maybe_iso8601(value)
        if not isinstance(moment, datetime):
            return None
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError, TypeError, AttributeError):
        return None


def check_eta(message: Any, task: TaskMessage) -> None:
    """Reject a task with a distant ETA, or run it at once if it may run early. Raises MalformedMessage.

    Celery keeps a message with an ETA in memory, and Redis redelivers it every minute, so that it multiplies.
    """
    moment = _moment(task.fields.get("eta"))
    seconds = 0.0 if moment is None else (moment - datetime.now(UTC)).total_seconds()
    if seconds <= ETA_SECONDS:
        return
    if task.name not in AT_ONCE or seconds > TRACK_ETA_SECONDS:
        raise MalformedMessage(f"its eta is {seconds:.0f} s away, and {ETA_SECONDS:.0f} s is the most that is waited")
    for fields in (message.headers, message.payload):
        if isinstance(fields, dict) and "eta" in fields:
            fields["eta"] = None


# ── the worker's side ─────────────────────────────────────────────────────────────────────────────────────────────────


class GuardedConsumer(Consumer):  # type: ignore[misc]  # celery has no types
    """Celery's consumer, which rejects malformed messages. Set as Celery's `worker_consumer`."""

    def __init__(self, *args: Any, pool: Any = None, **options: Any) -> None:
        guard_transports()
        contain_errors(pool)
        super().__init__(*args, pool=pool, **options)
        for step in self.steps:
            if isinstance(step, Control):
                self._guard_control(step.box)
            elif isinstance(step, Gossip):
                self._guard_gossip(step)

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], None]:
        """Return the function that the event loop calls for each message."""
        run = super().create_task_handler(*args, **options)

        def on_task_received(message: Any) -> None:
            try:
                task = read_task(message, self.app.tasks)
                check_eta(message, task)
            except MalformedMessage as reason:
                self.refuse(message, str(reason))
                return
            except Exception as error:  # an error in a check must not end the worker
                self.refuse(message, f"it can't be checked ({type(error).__name__})")
                return
            try:
                run(message)
            except Exception as error:
                if is_lost_connection(error, self.connection_errors) or state.should_stop is not None:
                    raise
                self._release(task.id)
                self.refuse(message, f"Celery can't run it ({type(error).__name__})")

        return on_task_received

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Reject a message that kombu can't decompress or decode."""
        self.refuse(message, f"it can't be decoded ({type(exc).__name__})")

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """Reject a message that names no task."""
        self.refuse(message, "it names no task")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Reject a message for a task that this worker does not have."""
        self.refuse(message, "this worker has no such task")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Reject a message that Celery finds invalid."""
        self.refuse(message, f"Celery can't run it ({type(exc).__name__})")

    def refuse(self, message: Any, reason: str) -> None:
        """Reject a message without requeueing it, and log one line. Raises the broker's connection errors."""
        delivery = message.delivery_info if isinstance(message.delivery_info, Mapping) else {}
        log_refused(delivery.get("routing_key"), size_of(message.body), message.content_type, reason)
        no_ack = getattr(message.channel, "no_ack_consumers", None) or ()
        if not message.acknowledged and delivery.get("consumer_tag") not in no_ack:
            message.reject(requeue=False)
        self._tell_caller(message, reason)

    def _tell_caller(self, message: Any, reason: str) -> None:
        """Store the rejection as the task's result, if its caller may wait for one."""
        headers = message.headers if isinstance(message.headers, Mapping) else {}
        task_id, name = headers.get("id"), headers.get("task")
        if not _is_id(task_id) or not isinstance(name, str) or headers.get("ignore_result") is True:
            return
        task = self.app.tasks.get(name)
        if task is None or task.ignore_result:
            return
        try:
            task.backend.store_result(task_id, InvalidTaskError(f"the message is refused: {reason}"), "FAILURE")
        except Exception as error:  # the result is only informative
            log.debug("the result of a refused message is not stored reason=%s", type(error).__name__)

    def _release(self, task_id: str) -> None:
        """Release the pool place of a request that was reserved and never started."""
        request = state.requests.get(task_id)
        if request is not None:
            state.task_ready(request)

    def _guard_control(self, box: Any) -> None:
        handle = box.on_message

        def on_message(body: Any, message: Any) -> None:
            problem = control_problem(body, message.headers, box.node.handlers)
            if problem is None:
                handle(body, message)
            else:
                log_refused("remote control", size_of(message.body), message.content_type, problem)

        box.on_message = on_message

    def _guard_gossip(self, gossip: Any) -> None:
        handle, consumers = gossip.on_message, gossip.get_consumers

        def on_message(prepare: Any, message: Any) -> None:
            try:
                handle(prepare, message)
            except Exception as error:
                if is_lost_connection(error, self.connection_errors):
                    raise
                reason = f"it is no event of a worker ({type(error).__name__})"
                log_refused("gossip", size_of(message.body), message.content_type, reason)

        def get_consumers(channel: Any) -> Any:
            guarded_consumers = consumers(channel)
            for consumer in guarded_consumers:
                consumer.on_decode_error = self.on_decode_error
            return guarded_consumers

        gossip.on_message, gossip.get_consumers = on_message, get_consumers


def control_problem(body: object, headers: object, commands: Mapping[str, Any]) -> str | None:
    """Return why a message can't be a remote control command of Celery, or None if it can."""
    if not isinstance(body, dict):
        return f"its body is {describe_type(body)}"
    if not isinstance(body.get("method"), str) or body["method"] not in commands:
        return "it names no command"
    if not isinstance(body.get("arguments") or {}, dict):
        return f"its arguments are {describe_type(body['arguments'])}"
    if not isinstance(body.get("destination") or (), (str, list, tuple)):
        return f"its destination is {describe_type(body['destination'])}"
    for name in ("pattern", "matcher", "ticket"):
        if not isinstance(body.get(name) or "", str):
            return f"its {name} is {describe_type(body[name])}"
    reply_to = body.get("reply_to")
    if reply_to and not (
        isinstance(reply_to, dict) and all(_is_text(reply_to.get(name)) for name in ("exchange", "routing_key"))
    ):
        return f"its reply_to is {describe_type(reply_to)}"
    clock = headers.get("clock") if isinstance(headers, Mapping) else None
    if clock is not None and not _is_clock(clock):
        return f"its clock is {describe_type(clock)}"
    return None


def _is_clock(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value < CLOCK_MOST  # type: ignore[operator, arg-type]  # a number


def contain_errors(pool: BasePool | None) -> None:
    """Have a pool of threads report each task, also if running it raises. Otherwise its place is lost."""
    if not isinstance(pool, TaskPool):
        return
    submit: Any = pool.on_apply

    def on_apply(target: Any, args: Any = None, kwargs: Any = None, callback: Any = None, **options: Any) -> Any:
        return submit(_contained(target), args, kwargs, callback, **options)

    pool.on_apply = on_apply


def _contained(target: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        try:
            return target(*args, **options)
        except Exception as error:
            log.error("Celery could not run a task reason=%s", type(error).__name__)
            return 1, ExceptionInfo(), 0.0  # as Celery reports a task that failed

    return run
