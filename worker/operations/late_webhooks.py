"""Webhooks that are late or refused, grouped by receiver."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row

from worker.core.redaction.masking import link_host, mask_personal_data
from worker.store.reports.snapshot_rows import jobs_without_event, pending_events

LATE_SECONDS = 60.0  # webhooks are sent within seconds
MAX_EVENTS = 500
NOT_CREATED = "(not created yet)"


@dataclass(frozen=True, slots=True)
class LateWebhook:
    """Late or refused events of one receiver: their number, the delay of the oldest one, and its last error."""

    receiver: str
    count: int
    late_seconds: float
    attempts: int
    http_status: int | None
    message: str | None
    job_id: int  # of the oldest event


def late_webhooks(connection: Connection, now: datetime) -> list[LateWebhook]:
    """Return the late and refused webhooks by receiver, the latest first."""
    groups: dict[str, list[Row[Any]]] = defaultdict(list)
    for row in pending_events(connection, limit=MAX_EVENTS):
        if (now - row.due_at).total_seconds() > LATE_SECONDS or row.error_message is not None:
            groups[link_host(row.url)].append(row)
    webhooks = [_of_receiver(receiver, rows, now) for receiver, rows in groups.items()]
    unannounced = jobs_without_event(connection, before=now - timedelta(seconds=LATE_SECONDS), limit=MAX_EVENTS)
    if unannounced:
        late_seconds = round((now - unannounced[0].completed_at).total_seconds(), 1)
        message = "no process creates these events"
        webhooks.append(LateWebhook(NOT_CREATED, len(unannounced), late_seconds, 0, None, message, unannounced[0].id))
    return sorted(webhooks, key=lambda webhook: -webhook.late_seconds)


def _of_receiver(receiver: str, rows: Sequence[Row[Any]], now: datetime) -> LateWebhook:
    first = min(rows, key=lambda row: row.created_at)
    return LateWebhook(
        receiver=receiver,
        count=len(rows),
        late_seconds=round((now - first.created_at).total_seconds(), 1),
        attempts=max(row.attempts for row in rows),
        http_status=first.http_status,
        message=None if first.error_message is None else mask_personal_data(first.error_message),
        job_id=first.job_id,
    )
