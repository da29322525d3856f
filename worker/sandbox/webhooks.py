"""Webhooks named in orders. They are called when the job is done, but only on this machine."""

import http.client
import json
import socket
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import SplitResult, urlsplit

from worker.sandbox.jobs import SandboxJob, meta

CALL_SECONDS = 10.0  # per attempt
TRIES = 3
NOT_CALLED = "not called: the stand-in only calls http URLs of this machine"


@dataclass(frozen=True, slots=True)
class Webhook:
    """A webhook call that is due."""

    job_id: str
    url: str
    content: Mapping[str, Any]


def webhook_of(job: SandboxJob, answer: Mapping[str, Any]) -> Webhook:
    """Return the webhook call for a job. `answer` is the current answer to a fetch."""
    content: dict[str, Any] = {"id": job.answer_id, **answer, "track_id": job.track_id}
    if job.family.shape == "training":
        content = {"status": "success", "training_status": "model_ready", "model_id": job.id, "track_id": job.track_id}
    elif answer.get("status") == "success":
        content |= {"generationTime": round(job.ready_at - job.submitted_at, 6), "meta": meta(job)}
    else:
        content["id"] = job.answer_id
    return Webhook(job.id, job.webhook, content)


def is_local(url: str) -> bool:
    """Return whether a URL points to this machine. The stand-in calls no others.

    >>> is_local("http://127.0.0.1:8000/hook"), is_local("https://example.org/hook"), is_local("ftp://localhost/")
    (True, False, False)
    """
    return bool(_addresses(url))


def call(webhook: Webhook) -> int:
    """Post a webhook, with at most three tries. Return the last HTTP status, or 0. Never raises."""
    body = json.dumps(webhook.content).encode()
    status = 0
    for _ in range(TRIES):
        for address in _addresses(webhook.url):
            try:
                status = _post(urlsplit(webhook.url), address, body)
            except (OSError, http.client.HTTPException, ValueError):
                continue
            break
        if 200 <= status < 300:
            break
    return status


def _addresses(url: str) -> tuple[str, ...]:
    """Return the loopback addresses that a URL points to. Empty for any other URL."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return ()
    if parts.scheme != "http":
        return ()
    if host == "localhost":
        return ("127.0.0.1", "::1")
    try:
        return (host,) if ip_address(host).is_loopback else ()
    except ValueError:
        return ()


def _post(parts: SplitResult, address: str, body: bytes) -> int:
    port = parts.port or 80
    connection = http.client.HTTPConnection(address, port, timeout=CALL_SECONDS)
    connection.sock = socket.create_connection((address, port), CALL_SECONDS)  # an IP address: no DNS lookup
    headers = {"Content-Type": "application/json", "Host": parts.netloc.rpartition("@")[2]}
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    with closing(connection):
        connection.request("POST", target, body, headers)
        response = connection.getresponse()
        response.read(1_000)
        return response.status
