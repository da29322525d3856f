"""Keeps kombu's transports running when a message can't be read at all.

On Redis any client may push any bytes to a queue's list. kombu raises whatever its parser raises, and the worker exits
or reconnects. On RabbitMQ, py-amqp does the same for properties that it can't decode, and receives the same message
again. Both are patched in place, since kombu creates its transports itself. Each such message is logged as one line.
"""

import logging
from collections.abc import Mapping
from queue import Empty
from typing import Any
from uuid import uuid4

from amqp.basic_message import Message as AmqpMessage
from kombu.transport import redis as redis_transport

from worker.core.plain_text import plain_text
from worker.system.redaction import shared_scrubber

log = logging.getLogger(__name__)

UNREADABLE = "fetch-worker-unreadable"  # the only header of a message whose AMQP properties can't be decoded
SHOWN_MOST = 80  # characters of external text in a log line
TEXT_MOST = 255
KOMBU_LOGGER = "kombu.transport.redis"
QUOTING = ("Cannot process event", "Could not restore message")  # lines of kombu that quote a message's body


def guard_transports() -> None:
    """Patch kombu's Redis transport and py-amqp in this process, once."""
    transport: Any = redis_transport.Transport
    if getattr(transport, "guarded", False):
        return
    transport.guarded = True
    _guard_redis_delivery(transport)
    _guard_redis_reading(redis_transport.Channel)
    _guard_amqp(AmqpMessage)
    logging.getLogger(KOMBU_LOGGER).addFilter(_without_bodies)


def log_refused(queue: object, size: int, content_type: object, reason: str) -> None:
    """Log that a message was rejected: one line without its body. `size` is in bytes."""
    log.error(
        "message refused queue=%s size=%s content_type=%s reason=%s",
        *(quote_for_log(queue or "unknown"), size, quote_for_log(content_type or "none"), reason),
    )


def quote_for_log(value: object) -> str:
    """Return external text for a log line: short, printable, in quotation marks."""
    return repr(plain_text(shared_scrubber().text(str(value))[:SHOWN_MOST]))


def describe_type(value: object) -> str:
    """Describe a value by its type and size, without its content (except for short texts)."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return (
                f"a text of {len(value)} characters" if len(value) > TEXT_MOST else f"the text {quote_for_log(value)}"
            )
        case bytes() | bytearray() | memoryview():
            return "raw bytes"
        case list() | tuple():
            return f"a list of {len(value)}"
        case Mapping():
            return "an object"
    return f"of type {type(value).__name__}"


def size_of(body: object) -> int:
    """Return the length of a body, or 0 if it has none."""
    return len(body) if isinstance(body, (str, bytes, bytearray, memoryview)) else 0


def is_lost_connection(error: Exception, connection_errors: tuple[type[Exception], ...]) -> bool:
    """Return whether an error means that the broker is away. On Redis kombu also counts every KeyError as one."""
    return isinstance(error, connection_errors) and not isinstance(error, KeyError)


# ── Redis ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def envelope_problem(raw: object, codecs: Mapping[str, Any]) -> str | None:
    """Return why an element of a Redis list can't be a kombu message, or None if it can."""
    if not isinstance(raw, dict):
        return f"it is {describe_type(raw)}, not a message"
    properties = raw.get("properties")
    if not isinstance(properties, dict):
        return f"its properties are {describe_type(properties)}"
    if not isinstance(raw.get("headers") or {}, dict):
        return f"its headers are {describe_type(raw['headers'])}"
    if not isinstance(raw.get("body") or "", str):
        return f"its body is {describe_type(raw['body'])}"
    tag = properties.get("delivery_tag")
    if not isinstance(tag, str) or not 0 < len(tag) <= TEXT_MOST:
        return f"its delivery_tag is {describe_type(tag)}"
    delivery = properties.get("delivery_info")
    if not isinstance(delivery, dict):
        return f"its delivery_info is {describe_type(delivery)}"
    for name in ("exchange", "routing_key"):
        if not isinstance(delivery.get(name), str):
            return f"its {name} is {describe_type(delivery.get(name))}"
    encoding = properties.get("body_encoding")
    if encoding and not (isinstance(encoding, str) and (encoding in codecs or encoding.lower() == "utf-8")):
        return f"its body_encoding is {describe_type(encoding)}"
    return None


def _guard_redis_delivery(transport: Any) -> None:
    """Check the elements of a queue's list before kombu makes messages of them."""
    deliver: Any = transport._deliver
    codecs = redis_transport.Channel.codecs

    def guarded(self: Any, message: Any, queue: str) -> None:
        self.element = None  # it could be parsed: later failures are logged here
        problem = envelope_problem(message, codecs)
        if problem is None:
            if message.get("headers") is None:
                message["headers"] = {}
            message["properties"]["delivery_tag"] = str(uuid4())  # two messages in flight must not share a tag
            try:
                deliver(self, message, queue)
            except Exception as error:
                if is_lost_connection(error, self.connection_errors + self.channel_errors):
                    raise
                problem = f"it can't be read ({type(error).__name__})"
        if problem is not None:
            fields = message if isinstance(message, dict) else {}
            log_refused(queue, size_of(fields.get("body")), fields.get("content-type"), problem)

    transport._deliver = guarded


def _guard_redis_reading(channel: Any) -> None:
    """Continue after an element that is not JSON. It has left its list already."""
    read, receive = channel._brpop_read, channel._receive_one

    def brpop_read(self: Any, **options: Any) -> Any:
        transport = self.connection
        transport.element = None

        def note(reply: Any, **_: Any) -> Any:
            if reply:
                transport.element = (reply[0], len(reply[1]))
            return reply

        self.client.set_response_callback("BRPOP", note)
        try:
            return read(self, **options)
        except Empty:
            raise
        except Exception as error:
            if transport.element is None:
                raise
            (key, size), transport.element = transport.element, None
            queue = key.decode("utf-8", "replace") if isinstance(key, bytes) else key
            log_refused(queue.split(self.sep)[0], size, None, f"it is no JSON ({type(error).__name__})")
            return True

    def receive_one(self: Any, client: Any) -> Any:
        try:
            return receive(self, client)
        except Empty:
            raise
        except Exception as error:
            if is_lost_connection(error, self.connection_errors):
                raise
            log_refused("remote control", 0, None, f"it can't be read ({type(error).__name__})")
            return True

    channel._brpop_read, channel._receive_one = brpop_read, receive_one


def _without_bodies(record: logging.LogRecord) -> bool:
    """Remove the message's body and the traceback from what kombu logs."""
    if isinstance(record.msg, str) and record.msg.startswith(QUOTING):
        record.msg = f"{record.msg.split('%', 1)[0].strip()}: it is malformed"
        record.args, record.exc_info, record.exc_text = (), None, None
    return True


# ── RabbitMQ ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _guard_amqp(message: Any) -> None:
    """Give a message with undecodable properties a header that says so. Its body has separate frames."""
    load: Any = message._load_properties

    def load_properties(self: Any, class_id: Any, buffer: Any, offset: int) -> Any:
        try:
            return load(self, class_id, buffer, offset)
        except Exception as error:
            self.properties = {"application_headers": {UNREADABLE: type(error).__name__}}
            return offset

    message._load_properties = load_properties
