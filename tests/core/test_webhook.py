"""Webhooks as the reference library of Standard Webhooks reads them."""

import base64
import json
import secrets
import time
from datetime import UTC, datetime, timedelta

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from worker.core.webhook import LONGEST_WAIT, body, checked_url, event_id, retry_delay, secret_bytes, signature
from worker.errors import NotTrackable

MOMENT = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)


def _secret(size: int = 32) -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(size)).decode()}"


def _headers(text: str, *signed_with: str, at: int, name: str = "evt_1") -> dict[str, str]:
    keys = [secret_bytes(secret) for secret in signed_with]
    return {
        "webhook-id": name,
        "webhook-timestamp": str(at),
        "webhook-signature": signature(keys, name, at, text),
    }


def test_the_reference_library_verifies_the_signature_and_reads_the_event() -> None:
    """Also with names in other alphabets."""
    secret = _secret()
    text = body("job.completed", MOMENT, {"id": 7, "reference": "Zoë’s picture"})
    read = Webhook(secret).verify(text, _headers(text, secret, at=int(time.time())))
    assert read == json.loads(text)
    assert read["type"] == "job.completed"
    assert datetime.fromisoformat(read["timestamp"]) == MOMENT
    assert read["data"] == {"id": 7, "reference": "Zoë’s picture"}


def test_during_a_rotation_the_old_and_the_new_secret_are_valid() -> None:
    """A receiver with another secret refuses it."""
    old, new = _secret(), _secret(64)
    headers = _headers("{}", new, old, at=int(time.time()))
    for receiver in (old, new):
        assert Webhook(receiver).verify("{}", headers) == {}
    with pytest.raises(WebhookVerificationError):
        Webhook(_secret()).verify("{}", headers)


def test_the_reference_library_refuses_a_changed_id_time_or_body() -> None:
    """The signature covers all three."""
    secret, now = _secret(), int(time.time())
    headers = _headers("{}", secret, at=now)
    for changed in ({"webhook-id": "evt_2"}, {"webhook-timestamp": str(now + 1)}):
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify("{}", headers | changed)
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify('{"a":1}', headers)
    with pytest.raises(WebhookVerificationError, match="too old"):
        Webhook(secret).verify("{}", _headers("{}", secret, at=now - 600))


@pytest.mark.parametrize("wrong", ["", "whsec_", "secret", "whsec_?", "whsec_AAAA", f"whsec_{'A' * 400}", "whsec_Zoë"])
def test_an_invalid_secret_is_refused_and_not_shown(wrong: str) -> None:
    """A secret has 24 to 64 decoded bytes."""
    with pytest.raises(ValueError, match="must") as refused:
        secret_bytes(wrong)
    assert len(wrong) < 8 or wrong not in str(refused.value)


def test_each_final_state_has_its_own_event_id() -> None:
    """It does not depend on the process."""
    names = [event_id(7, MOMENT), event_id(8, MOMENT), event_id(7, MOMENT + timedelta(microseconds=1))]
    assert len(set(names)) == 3
    assert event_id(7, MOMENT) == names[0]


def test_retry_waits_grow_to_one_hour_and_respect_retry_after_within_bounds() -> None:
    """About thirty attempts per day; no wait is shorter than the previous one."""
    waits = [retry_delay(attempts, 0.0) for attempts in range(1, 40)]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (5.0, LONGEST_WAIT)
    assert retry_delay(1, 1.0) == 6.0
    assert retry_delay(1, 0.0, retry_after=120.0) == 120.0
    assert retry_delay(1, 0.0, retry_after=999_999.0) == LONGEST_WAIT * 1.2
    assert retry_delay(10_000, 1.0) == LONGEST_WAIT * 1.2


@pytest.mark.parametrize(
    "wrong",
    [
        *("", "app.example/hook", "ftp://app.example/", "https://", "https://app.example:0/", "https://app.example:x/"),
        *("https://user:word@app.example/", "https://app.example/ä", "https://app.example/ b", "https://a/\n", 7),
        f"https://app.example/{'x' * 2_000}",
    ],
)
def test_an_invalid_url_is_refused_with_a_reason(wrong: object) -> None:
    """It is refused before anything is written."""
    with pytest.raises(NotTrackable, match="webhook_url"):
        checked_url(wrong)
