"""Webhooks after the Standard Webhooks scheme: the event's text, its signature, and when to try again. Pure.

The scheme: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from worker.errors import NotTrackable

SECRET_PREFIX = "whsec_"  # noqa: S105  # what every secret begins with
SECRET_LEAST, SECRET_MOST = 24, 64  # bytes, once decoded
URL_MOST = 2_000
FIRST_WAIT, LONGEST_WAIT = 5.0, 3_600.0  # seconds between attempts: twice as long each time
_PLAIN = re.compile(r"[\x21-\x7e]+")


def secret_bytes(text: str) -> bytes:
    """What a `whsec_…` secret stands for. Raises ValueError with what is wrong, never with the secret."""
    with suppress(ValueError):
        secret = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
        if text.startswith(SECRET_PREFIX) and SECRET_LEAST <= len(secret) <= SECRET_MOST:
            return secret
    raise ValueError(f"must be {SECRET_PREFIX} and the base64 of {SECRET_LEAST} to {SECRET_MOST} bytes")


def event_id(job_id: int, completed_at: datetime) -> str:
    """The name of the event of one final state: the same whoever makes it, and however often it is sent."""
    return f"evt_{hashlib.sha256(f'{job_id} {completed_at.isoformat()}'.encode()).hexdigest()[:32]}"


def body(kind: str, at: datetime, data: Mapping[str, Any]) -> str:
    """An event's text: JSON with `type`, `timestamp` (ISO 8601, UTC) and `data`."""
    moment = at.isoformat().replace("+00:00", "Z")
    return json.dumps({"type": kind, "timestamp": moment, "data": data}, separators=(",", ":"), ensure_ascii=False)


def signature(secrets: Sequence[bytes], name: str, at: int, text: str) -> str:
    """The header `webhook-signature`: one signature for each secret, so that receivers can change theirs at leisure.

    `at` is the attempt's time in whole seconds since 1970, which receivers compare with their clock.

    >>> signature([b"0" * 24], "msg_1", 1, "{}")
    'v1,4gaLWH/Mh7tIxkICy4nSG0SOe8aKjhXy2St5RB6ztHU='
    """
    signed = f"{name}.{at}.{text}".encode()
    digests = (hmac.new(secret, signed, hashlib.sha256).digest() for secret in secrets)
    return " ".join(f"v1,{base64.b64encode(digest).decode('ascii')}" for digest in digests)


def headers(secrets: Sequence[bytes], name: str, at: int, text: str) -> dict[str, str]:
    """What is sent with an event's text at a time in whole seconds since 1970."""
    return {
        "Content-Type": "application/json",
        "User-Agent": "fetch-worker",
        "webhook-id": name,
        "webhook-timestamp": str(at),
        "webhook-signature": signature(secrets, name, at, text),
    }


def retry_delay(attempts: int, jitter: float, retry_after: float | None = None) -> float:
    """Seconds until the next attempt, after so many. `draw` is from 0 to 1; `asked` is what Retry-After said.

    >>> [retry_delay(attempts, 0.0) for attempts in (1, 2, 3, 20)]
    [5.0, 10.0, 20.0, 3600.0]
    """
    grown = min(FIRST_WAIT * 2.0 ** (min(attempts, 64) - 1), LONGEST_WAIT)
    return min(max(grown * (1 + 0.2 * jitter), retry_after or 0.0), LONGEST_WAIT * 1.2)


def checked_url(url: object) -> str:
    """An address that webhooks may be sent to, as far as its text can tell. Raises NotTrackable with what is wrong."""
    if not isinstance(url, str) or not _PLAIN.fullmatch(url) or len(url) > URL_MOST:
        raise NotTrackable(f"webhook_url is an address of at most {URL_MOST} plain characters")
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise NotTrackable("webhook_url must be an https: address, for example https://app.example/webhooks/pictures")
    if parts.username is not None or parts.password is not None:
        raise NotTrackable("webhook_url carries a user name: the receiver knows us by the signature")
    return url
