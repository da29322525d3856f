"""The webhook that the hosted API calls when a job is done: a signed URL, and an earlier poll when it is called.

The API calls the `webhook` URL of a submission. It does not sign the call, so nothing in the body is believed. A call
makes the worker poll the jobs of one reference earlier, at most every `POLL_MIN` seconds. If a call is lost, the job is
found by its next poll. For an order whose answer is lost, the id in the body is a hint: the API is asked about it.
"""

import base64
import binascii
import hmac
import logging
import re
from collections.abc import Callable, Iterable
from functools import cache

from worker.client.actions import nudge_reference
from worker.client.job_options import checked_reference
from worker.errors import NotTrackable, SettingsError, Unavailable
from worker.settings import load
from worker.vendor.submissions import named_id

log = logging.getLogger(__name__)

# Makes these keys differ from those that sign the webhooks to apps.
PURPOSE = b"fetch-worker: addresses that the API calls, 1"
MAX_BODY = 64 * 1024  # bytes of a call that are read: the id and the links of a job
_PLAIN = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]+")
_ENCODED = "~"


def hook_url(base: str, reference: str | int) -> str:
    """Return the URL to submit as `webhook` for jobs that are tracked with this `reference`.

    `base` is the public URL of the handler, for example `https://shop.example/api-hook`. Raises SettingsError without
    `WEBHOOK_SECRET`, and NotTrackable for an invalid reference or base URL.
    """
    keys = _keys()
    if not keys:
        raise SettingsError(
            "WEBHOOK_SECRET is not set: set it to whsec_ and 32 random bytes in base64, in every process of the app"
        )
    if not re.match(r"https?://[^/?#\s]+[^?#\s]*$", base):
        raise NotTrackable(f"{base[:200]!r} is not a URL that the API can call, such as https://shop.example/api-hook")
    text = checked_reference(reference)
    if not text:
        raise NotTrackable("the reference is empty: use the reference that the job is tracked with")
    return f"{base.rstrip('/')}/{_segment(text)}/{_signature(keys[0], text)}"


def received(reference: str, signature: str, read_body: Callable[[], bytes] = lambda: b"") -> bool:
    """Process a call, given as the last two parts of its path. Return False if the signature is wrong.

    With a valid signature, the jobs with that reference are polled earlier. There may be none. `read_body` returns the
    first `MAX_BODY` bytes of the body. An invalid call reads no body and makes no database query. Raises Unavailable.
    """
    text = _valid_reference(reference, signature)
    if text is None:
        return False
    try:
        body = read_body()
    except Exception as error:  # each framework has its own; the caller may have hung up
        log.warning("the body of a call of the API can't be read reason=%s", type(error).__name__)
        body = b""
    nudge_reference(text, named_id(body))
    return True


def is_valid(reference: str, signature: str) -> bool:
    """Return whether the last two parts of a path are signed with one of the secrets."""
    return _valid_reference(reference, signature) is not None


def status_of(reference: str, signature: str, read_body: Callable[[], bytes] = lambda: b"") -> int:
    """Process a call as `received` does. Return the HTTP status: 204, 404 (wrong signature) or 503 (no database)."""
    try:
        return 204 if received(reference, signature, read_body) else 404
    except Unavailable:
        return 503


def _valid_reference(reference: str, signature: str) -> str | None:
    """Return the reference in a path, or None if it is not signed with one of the secrets."""
    text = _reference(reference)
    return text if text is not None and _signed(_keys(), text, signature) else None


@cache
def _keys() -> tuple[bytes, ...]:
    return tuple(hmac.digest(secret, PURPOSE, "sha256") for secret in load().webhook_secrets)


def _signed(keys: Iterable[bytes], text: str, signature: str) -> bool:
    """Return whether any key made the signature. All keys are tried, so that the timing reveals nothing."""
    received_signature = signature.encode("utf-8", "replace")
    return any([hmac.compare_digest(_signature(key, text).encode(), received_signature) for key in keys])  # noqa: C419  # all


def _signature(key: bytes, text: str) -> str:
    return hmac.digest(key, text.encode("utf-8", "replace"), "sha256").hex()


def _segment(text: str) -> str:
    """Encode a reference as a path segment that proxies and routers do not change: plain, or `~` and base64."""
    if _PLAIN.fullmatch(text):
        return text
    return _ENCODED + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _reference(segment: str) -> str | None:
    if not segment.startswith(_ENCODED):
        return segment
    try:
        return base64.urlsafe_b64decode(segment[1:] + "=" * (-(len(segment) - 1) % 4)).decode()
    except (binascii.Error, ValueError):
        return None
