"""The API's own webhook, taken as a hint: an address that only we can make, and an earlier poll when it is called.

An API calls the `webhook` of a submission when the job is done, signs nothing, and sends whatever it likes; so the body
is never read. What a call can do is to have the jobs of one reference asked about sooner, never more often than
`POLL_MIN`. A call that is lost costs nothing but the wait for the next poll.
"""

import base64
import binascii
import hmac
import re
from collections.abc import Iterable
from functools import cache

from worker.client.tracking import checked_reference, nudge_reference
from worker.errors import NotTrackable, SettingsError, Unavailable
from worker.settings import load

PURPOSE = b"fetch-worker: addresses that the API calls, 1"  # keeps these keys apart from those that sign our webhooks
_PLAIN = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]+")
_ENCODED = "~"


def hook_url(base: str, reference: str | int) -> str:
    """The address to submit as `webhook`, where the jobs are tracked with this `reference`.

    `base` is where the handler is reached from outside, for example `https://shop.example/api-hook`. Raises
    SettingsError without `WEBHOOK_SECRET`, NotTrackable for what can't be a reference or an address.
    """
    keys = _keys()
    if not keys:
        raise SettingsError(
            "WEBHOOK_SECRET is not set: set it to whsec_ and 32 random bytes in base64, in each process of the app"
        )
    if not re.match(r"https?://[^/?#\s]+[^?#\s]*$", base):
        raise NotTrackable(f"{base[:200]!r} is no address that the API can call, such as https://shop.example/api-hook")
    text = checked_reference(reference)
    if not text:
        raise NotTrackable("the reference is empty: give the one that the job is tracked with")
    return f"{base.rstrip('/')}/{_segment(text)}/{_signature(keys[0], text)}"


def received(reference: str, signature: str) -> bool:
    """Takes a call: the two last parts of its path. False where it is none of ours, before any database is touched.

    A true one brings the next request about the jobs with that reference forward; that there are none is no error.
    Raises Unavailable.
    """
    text = _reference(reference)
    if text is None or not _signed(_keys(), text, signature):
        return False
    nudge_reference(text)
    return True


def status_of(reference: str, signature: str) -> int:
    """Takes a call, and says what to answer: 204 taken, 404 none of ours, 503 no database to take it with."""
    try:
        return 204 if received(reference, signature) else 404
    except Unavailable:
        return 503


@cache
def _keys() -> tuple[bytes, ...]:
    return tuple(hmac.digest(secret, PURPOSE, "sha256") for secret in load().webhook_secrets)


def _signed(keys: Iterable[bytes], text: str, signature: str) -> bool:
    """Whether any key made the signature; all are tried, so that the time tells nothing."""
    given = signature.encode("utf-8", "replace")
    return any([hmac.compare_digest(_signature(key, text).encode(), given) for key in keys])  # noqa: C419  # all


def _signature(key: bytes, text: str) -> str:
    return hmac.digest(key, text.encode("utf-8", "replace"), "sha256").hex()


def _segment(text: str) -> str:
    """One part of a path that no proxy and no router reads differently: plain, or `~` and base64."""
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
