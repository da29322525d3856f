"""Webhooks as in the Standard Webhooks specification: body, signature and retries. Pure.

Specification: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from worker.core.humanize import iso_time
from worker.errors import NotTrackable

SECRET_PREFIX = "whsec_"  # noqa: S105  # the prefix of every secret
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64  # decoded bytes
MAX_URL_LENGTH = 2_000
FIRST_WAIT, LONGEST_WAIT = 5.0, 3_600.0  # seconds between attempts; the wait doubles each time
_PLAIN = re.compile(r"[\x21-\x7e]+")


def secret_bytes(text: str) -> bytes:
    """Return the bytes of a `whsec_…` secret. Raises ValueError; the message never contains the secret."""
    with suppress(ValueError):
        secret = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
        if text.startswith(SECRET_PREFIX) and MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
            return secret
    raise ValueError(f"must be {SECRET_PREFIX} and the base64 of {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes")


def event_id(job_id: int, completed_at: datetime) -> str:
    """Return the id of the event of one final state. It is the same for every process and every attempt."""
    return f"evt_{hashlib.sha256(f'{job_id} {completed_at.isoformat()}'.encode()).hexdigest()[:32]}"


def body(kind: str, at: datetime, data: Mapping[str, Any]) -> str:
    """Return the body of an event: JSON with `type`, `timestamp` (ISO 8601, UTC) and `data`."""
    return encode_body({"type": kind, "timestamp": iso_time(at), "data": data})


def encode_body(document: Mapping[str, Any]) -> str:
    """Return the text of an event's JSON document."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)


def with_addresses(text: str, address_of: Callable[[str], str | None] | None) -> str:
    """Return the body of an event with the public address of each stored output that has one, as `address`.

    >>> with_addresses('{"data":{"outputs":[{"location":"file:///a/1.png"}]}}', lambda location: "https://s/1.png")
    '{"data":{"outputs":[{"location":"file:///a/1.png","address":"https://s/1.png"}]}}'
    """
    if address_of is None:
        return text
    document = json.loads(text)
    for output in document["data"]["outputs"]:
        address = address_of(output["location"]) if output["location"] else None
        if address is not None:
            output["address"] = address
    return encode_body(document)


def signature(secrets: Sequence[bytes], name: str, at: int, text: str) -> str:
    """Return the header `webhook-signature`. It has one signature for each secret, so that secrets can be rotated.

    `at` is the time of the attempt in whole seconds since 1970. Receivers compare it with their clock.

    >>> signature([b"0" * 24], "msg_1", 1, "{}")
    'v1,4gaLWH/Mh7tIxkICy4nSG0SOe8aKjhXy2St5RB6ztHU='
    """
    signed = f"{name}.{at}.{text}".encode()
    digests = (hmac.new(secret, signed, hashlib.sha256).digest() for secret in secrets)
    return " ".join(f"v1,{base64.b64encode(digest).decode('ascii')}" for digest in digests)


def headers(secrets: Sequence[bytes], name: str, at: int, text: str) -> dict[str, str]:
    """Return the headers of an attempt. `at` is its time in whole seconds since 1970."""
    return {
        "Content-Type": "application/json",
        "User-Agent": "fetch-worker",
        "webhook-id": name,
        "webhook-timestamp": str(at),
        "webhook-signature": signature(secrets, name, at, text),
    }


def retry_delay(attempts: int, jitter: float, retry_after: float | None = None) -> float:
    """Return the seconds until the next attempt. `jitter` is from 0 to 1, `retry_after` comes from the header.

    >>> [retry_delay(attempts, 0.0) for attempts in (1, 2, 3, 20)]
    [5.0, 10.0, 20.0, 3600.0]
    """
    grown = min(FIRST_WAIT * 2.0 ** (min(attempts, 64) - 1), LONGEST_WAIT)
    return min(max(grown * (1 + 0.2 * jitter), retry_after or 0.0), LONGEST_WAIT * 1.2)


def checked_url(url: object) -> str:
    """Return the URL if webhooks may be sent to it. Only its text is checked. Raises NotTrackable with the problem."""
    if not isinstance(url, str) or not _PLAIN.fullmatch(url) or len(url) > MAX_URL_LENGTH:
        raise NotTrackable(f"webhook_url must be a URL of at most {MAX_URL_LENGTH} plain characters")
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise NotTrackable("webhook_url must be an https: URL, for example https://app.example/webhooks/pictures")
    if parts.username is not None or parts.password is not None:
        raise NotTrackable("webhook_url must not contain a user name: the receiver verifies the signature instead")
    return url
