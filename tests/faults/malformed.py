"""Malformed messages, as any client of a broker may send them, and functions that put them into a queue."""

import base64
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import redis
from amqp.basic_message import Message
from kombu.connection import Connection

QUEUE = "fetch-worker"


class Missing:
    """Type of `MISSING`. Its repr is the same in every process, because test ids contain it."""

    def __repr__(self) -> str:
        return "missing"


MISSING = Missing()


@dataclass(frozen=True)
class RawMessage:
    """A message to send. The defaults are what a Celery client writes."""

    body: bytes = b'[["12202888"], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
    headers: Mapping[str, Any] = field(default_factory=dict)
    content_type: Any = "application/json"
    content_encoding: Any = "utf-8"
    properties: Mapping[str, Any] = field(default_factory=dict)

    def all_headers(self) -> dict[str, Any]:
        """Return the headers of a Celery client, replaced by `self.headers` where both have a name."""
        name = str(uuid4())
        defaults: dict[str, Any] = {
            **{"lang": "py", "task": "worker.track", "id": name, "root_id": name, "parent_id": None, "group": None},
            **{"argsrepr": "", "kwargsrepr": "", "retries": 0, "timelimit": [None, None], "expires": None},
            **{"eta": None, "ignore_result": False, "shadow": None, "origin": "gen1@app", "stamped_headers": None},
        }
        return {name: value for name, value in (defaults | dict(self.headers)).items() if value is not MISSING}


def _body(value: object) -> RawMessage:
    return RawMessage(json.dumps(value).encode())


def _header(**headers: Any) -> RawMessage:
    return RawMessage(headers=headers)


def _bodies(name: str, make: Callable[[Any], object], *values: Any) -> dict[str, RawMessage]:
    return {f"{name} {value!r}": _body(make(value)) for value in values}


def _headers(name: str, *values: Any) -> dict[str, RawMessage]:
    return {f"{name} {str(value)[:20]!r} {type(value).__name__}": _header(**{name: value}) for value in values}


PROTOCOL_1 = dict.fromkeys(("task", "id", "eta"), MISSING)  # protocol 1 has these in the body
CALL: list[Any] = [["12202888"], {}]

BODIES: dict[str, RawMessage] = {
    **_bodies("body", lambda value: value, "x", None, 5, 1.5, True, {}, [], [1], [1, 2, 3], [1, 2, 3, 4]),
    **_bodies("embed", lambda value: [*CALL, value], 5, "x", [1], {"callbacks": 5}, {"errbacks": "x"}),
    **_bodies("embed", lambda value: [*CALL, value], {"chord": 5}, {"chain": "x"}, {"id": 5}, {"get": 5}),
    "callbacks of numbers": _body([*CALL, {"callbacks": [5]}]),
    "callback of no known kind": _body([*CALL, {"callbacks": [{"task": "a", "subtask_type": "zzz"}]}]),
    "args no list": _body(["12202888", {}, {}]),
    "args an object": _body([{}, {}, {}]),
    "kwargs no object": _body([["1"], [], {}]),
    "kwargs null": _body([["1"], None, {}]),
    "too many arguments": _body([["1", "2", "3"], {}, {}]),
    "no argument": _body([[], {}, {}]),
    "raw bytes": RawMessage(b"\x00\x01\xfe\xff"),
    "bad utf-8": RawMessage(b'["\xff\xfe"]'),
    "half of a body": RawMessage(b'[["1"], {'),
    "empty body": RawMessage(b""),
    "deep body": RawMessage(b"[" * 100_000 + b"]" * 100_000),
    "a number of 5,000 digits": RawMessage(b"[[" + b"9" * 5_000 + b"], {}, {}]"),
    "protocol 1 without id": RawMessage(json.dumps({"task": "worker.track", "args": ["1"]}).encode(), PROTOCOL_1),
    "protocol 1, kwargs a list": RawMessage(
        json.dumps({"task": "worker.track", "id": "a", "args": ["1"], "kwargs": []}).encode(), PROTOCOL_1
    ),
    "protocol 1, eta a number": RawMessage(
        json.dumps({"task": "worker.track", "id": "a", "args": ["1"], "eta": 5}).encode(), PROTOCOL_1
    ),
}
HEADERS: dict[str, RawMessage] = {
    "no id": _header(id=MISSING),
    "no task": _header(task=MISSING),
    **_headers("id", None, 5, ["a"], "", "a\nb", "a" * 100_000),
    **_headers("task", None, 5, ["worker.track"], "", "no.such.task", "a\r\nb"),
    "task of Celery's own": _header(task="celery.chord_unlock"),
    "lang 5": _header(lang=5),
    **_headers("eta", "", "tomorrow", 5, [5], "9999-12-31T23:59:59-12:00"),
    "eta in a year": _header(eta="2099-01-01T00:00:00+00:00"),
    **_headers("expires", "", "soon", 5, [], {}, 0),
    **_headers("timelimit", 5, "x", [1], [1, 2, 3], ["a", None]),
    **_headers("retries", "x", -1, []),
    "argsrepr of 110 kB": _header(argsrepr="a" * 110_000),
    "argsrepr 5": _header(argsrepr=5),
    **{f"{name} 5": _header(**{name: 5}) for name in ("root_id", "parent_id", "group", "origin", "shadow")},
    "shadow with markup": _header(shadow="<b>[red]x"),
    "shadow of two lines": _header(shadow="a\nb"),
    **_headers("stamped_headers", 5, "x", [5]),
    "stamps 5": _header(stamps=5),
    "ignore_result 'x'": _header(ignore_result="x"),
    "a header get": _header(get=5),
    "callbacks as a header": _header(callbacks=[5]),
    "compression of no kind": _header(compression="zzz"),
}
CONTENT: dict[str, RawMessage] = {
    "pickle": RawMessage(b"\x80\x04N.", content_type="application/x-python-serialize", content_encoding="binary"),
    "yaml": RawMessage(b"- - '1'\n- {}\n- {}\n", content_type="application/x-yaml"),
    "text": RawMessage(b"hello", content_type="text/plain"),
    "no content type": RawMessage(content_type=None),
    "unknown content type": RawMessage(content_type="zzz\nzzz"),
    "gzip": RawMessage(content_encoding="gzip"),
    "unknown encoding": RawMessage(content_encoding="zzz"),
}
MALFORMED: dict[str, RawMessage] = BODIES | HEADERS | CONTENT


def redis_element(sent: RawMessage, queue: str) -> dict[str, Any]:
    """Return the element that kombu would push to a Redis list for this message."""
    name = str(uuid4())
    return {
        "body": base64.b64encode(sent.body).decode(),
        "content-encoding": sent.content_encoding,
        "content-type": sent.content_type,
        "headers": sent.all_headers(),
        "properties": {
            **{"correlation_id": name, "reply_to": name, "delivery_mode": 2, "priority": 0, "delivery_tag": name},
            **{"body_encoding": "base64", "delivery_info": {"exchange": "", "routing_key": queue}},
            **sent.properties,
        },
    }


# Elements of a Redis list that kombu did not write.
ELEMENTS: dict[str, bytes] = {
    **{f"element {value!r}": value for value in (b"", b"zzz", b"\xff\xfe", b"[", b'"x"', b"null", b"5", b"[]", b"{}")},
    "element deep": b"[" * 100_000,
    "element of a class": b'{"__type__": "uuid", "__value__": "zzz"}',
}


def _element(**changes: Any) -> bytes:
    """Return a valid element as JSON, with some values changed or removed."""
    element = redis_element(RawMessage(), QUEUE)
    element["properties"].update(changes.pop("properties", {}))
    element.update(changes)
    element["properties"] = {name: value for name, value in element["properties"].items() if value is not MISSING}
    return json.dumps({name: value for name, value in element.items() if value is not MISSING}).encode()


ELEMENTS |= {
    "no properties": json.dumps({"body": "x", "headers": {}}).encode(),
    "headers a list": _element(headers=[1]),
    "no headers": _element(headers=MISSING),
    "body a number": _element(body=5),
    "broken base64": _element(body="abc"),
    "content type 5": _element(**{"content-type": 5}),
    "content encoding 5": _element(**{"content-encoding": 5}),
    **{
        f"property {name} {value!r}": _element(properties={name: value})
        for name, value in (
            *(("delivery_tag", MISSING), ("delivery_tag", 5), ("delivery_tag", []), ("delivery_info", MISSING)),
            *(("delivery_info", 5), ("delivery_info", {}), ("delivery_info", {"exchange": [], "routing_key": 5})),
            *(("body_encoding", "zzz"), ("body_encoding", 5), ("correlation_id", 5), ("reply_to", [])),
        )
    },
}


def push(url: str, elements: list[bytes], queue: str = QUEUE) -> None:
    """Push elements to a Redis list."""
    with redis.Redis.from_url(url) as client:
        client.lpush(queue, *elements)


def publish(url: str, messages: list[RawMessage], queue: str = QUEUE) -> None:
    """Publish messages to a RabbitMQ queue."""
    with Connection(url) as connection, connection.channel() as channel:
        for sent in messages:
            properties = {"correlation_id": str(uuid4()), **sent.properties}
            content = {"content_type": sent.content_type, "content_encoding": sent.content_encoding}
            present = {name: value for name, value in {**content, **properties}.items() if value is not None}
            message = Message(sent.body, application_headers=sent.all_headers(), **present)
            channel.basic_publish(message, exchange="", routing_key=queue)


class WireMessage(Message):  # type: ignore[misc]  # amqp has no types
    """A message whose AMQP properties are raw bytes that no client library writes."""

    def __init__(self, flags: int, values: bytes) -> None:
        super().__init__(b"[[], {}, {}]")
        self._wire = struct.pack(">H", flags) + values

    def _serialize_properties(self) -> bytes:
        return self._wire


def _short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def _table(*items: bytes) -> bytes:
    inner = b"".join(items)
    return struct.pack(">I", len(inner)) + inner


PROPERTIES: dict[str, WireMessage] = {
    "content type no text": WireMessage(0x8000, _short(b"\xff\xfe")),
    "correlation id no text": WireMessage(0x0400, _short(b"\xff")),
    "header a time after all times": WireMessage(0x2000, _table(_short(b"t"), b"T", struct.pack(">Q", 1 << 62))),
}


def publish_wire(url: str, messages: list[WireMessage], queue: str = QUEUE) -> None:
    """Publish messages with raw properties to a RabbitMQ queue."""
    with Connection(url) as connection, connection.channel() as channel:
        for message in messages:
            channel.basic_publish(message, exchange="", routing_key=queue)
