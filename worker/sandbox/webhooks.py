"""Webhooks that orders ask for: called once their job is done, on this machine only."""

import http.client
import json
import socket
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import SplitResult, urlsplit

from worker.sandbox.jobs import Job, meta

SECONDS = 10.0  # for one call
TRIES = 3
NOT_CALLED = "not called: the stand-in calls http addresses of this machine alone"


@dataclass(frozen=True, slots=True)
class Webhook:
    """A call that is due."""

    job_id: str
    url: str
    content: Mapping[str, Any]


def webhook_of(job: Job, answer: Mapping[str, Any]) -> Webhook:
    """Return the call that tells of a job; `answer` is what a fetch would be answered."""
    content: dict[str, Any] = {"id": job.spoken_id, **answer, "track_id": job.track_id}
    if job.family.shape == "training":
        content = {"status": "success", "training_status": "model_ready", "model_id": job.id, "track_id": job.track_id}
    elif answer.get("status") == "success":
        content |= {"generationTime": round(job.ready_at - job.submitted_at, 6), "meta": meta(job)}
    else:
        content["id"] = job.spoken_id
    return Webhook(job.id, job.webhook, content)


def is_local(url: str) -> bool:
    """Return whether an address is on this machine: the stand-in calls no other.

    >>> is_local("http://127.0.0.1:8000/hook"), is_local("https://example.org/hook"), is_local("ftp://localhost/")
    (True, False, False)
    """
    return bool(_addresses(url))


def call(webhook: Webhook) -> int:
    """Post a webhook, three times at most; the HTTP status of the last try, 0 for none. Never raises."""
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
    """Return the loopback addresses of an address; none for any other."""
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
    connection = http.client.HTTPConnection(address, port, timeout=SECONDS)
    connection.sock = socket.create_connection((address, port), SECONDS)  # an address, so no name is looked up
    headers = {"Content-Type": "application/json", "Host": parts.netloc.rpartition("@")[2]}
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    with closing(connection):
        connection.request("POST", target, body, headers)
        response = connection.getresponse()
        response.read(1_000)
        return response.status
