"""Order jobs: `order`, and `attach` for orders whose answer was lost."""

import json
import secrets
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from worker.client.connection import cached_settings, existing_job, transaction
from worker.client.job_options import CeleryTask, TrackOptions, checked_kind, checked_options
from worker.client.sessions import TrackingSession
from worker.client.tracking import CreatedJob, TrackedJob, commit, insert_in_session
from worker.client.workers import wake
from worker.core.identity import checked_remote_id
from worker.errors import DatabaseRefused, NotTrackable, RefusedAddress
from worker.settings import Settings
from worker.store.audit import record_job_action
from worker.store.engine import database_now
from worker.store.order_results import attach as attach_order
from worker.store.orders import NewOrder, insert_order, job_of_order, order_row
from worker.system.redaction import long_secret_scrubber, shared_scrubber
from worker.vendor.order_endpoint import address_of_order, order_target
from worker.vendor.submissions import kind_of_order

MAX_PAYLOAD = 8 * 1024 * 1024  # bytes of JSON


def order(
    endpoint: str,
    payload: Mapping[str, Any],
    *,
    session: TrackingSession | Connection | None = None,
    account: str = "default",
    kind: str | None = None,
    eta: float | timedelta | None = None,
    priority: int = 0,
    reference: str | int | UUID | None = None,
    on_done: str | CeleryTask | None = None,
    webhook_url: str | None = None,
    deadline: float | timedelta | None = None,
) -> TrackedJob:
    """Order one job: the workers send it to the API, ask about it, and store its outputs.

    Return the id of the job. The order is a row before it is a request: it is sent after the commit, and never twice by
    itself. Do not call the API yourself; for a job that you submitted, use `track`.

        job_id = order("v6/images/text2img", {"prompt": "a lake", "samples": 2})
        job_id = order("v6/images/text2img", payload, session=session)  # in your transaction

    Arguments:

    endpoint
        The path below `/api/` to which the order is posted, such as "v6/images/text2img", or the URL.
    payload
        The fields of the order, as a mapping: a JSON object of at most 8 MiB. The worker adds the key.
    session, account, kind, eta, priority, reference, on_done, webhook_url
        As for `track`. Of each account, orders with a higher priority are sent first, then older ones.
    deadline
        The time after which the job may expire, from the moment at which the API took the order: seconds or a
        timedelta. Default: by kind. An order that waits to be sent does not expire.

    Raises NotTrackable if the order can't be sent, and SchemaOutdated and Unavailable. Nothing is written then.
    """
    options: dict[str, Any] = {
        "account": account,
        "kind": kind,
        "eta": eta,
        "priority": priority,
        "reference": reference,
        "on_done": on_done,
        "webhook_url": webhook_url,
        "deadline": deadline,
    }
    settings = cached_settings()
    planned = new_order(settings, endpoint, payload, options)
    return commit_order(settings, planned) if session is None else insert_order_in(session, settings, planned)


def order_once(key: str, endpoint: object, payload: object, options: Mapping[str, Any]) -> TrackedJob:
    """Order a job for a message that may be delivered again. `key` is equal for all deliveries of the message."""
    settings = cached_settings()
    planned = planned_order(settings, key, endpoint, payload, options)
    write = partial(_insert_missing, order=planned)
    try:
        return commit(settings, write)
    except DatabaseRefused:  # another delivery was faster, or the order is refused again
        return commit(settings, write)


def new_order(settings: Settings, endpoint: object, payload: object, options: Mapping[str, Any]) -> NewOrder:
    """Check the arguments of one call of `order`, without a database. Raises NotTrackable."""
    return planned_order(settings, secrets.token_hex(16), endpoint, payload, options)


def commit_order(settings: Settings, planned: NewOrder) -> TrackedJob:
    """Insert an order in a transaction of its own, and wake the workers."""
    return commit(settings, partial(_insert, order=planned))


def insert_order_in(session: TrackingSession | Connection, settings: Settings, planned: NewOrder) -> TrackedJob:
    """Insert an order in the transaction of a session, and wake the workers after its commit."""
    return insert_in_session(session, settings, partial(_insert, order=planned), call="order")


OPTIONS: Mapping[str, Any] = {
    "account": "default",
    "kind": None,
    "eta": None,
    "priority": 0,
    "reference": None,
    "on_done": None,
    "webhook_url": None,
    "deadline": None,
}


def planned_order(
    settings: Settings, key: str, endpoint: object, payload: object, options: Mapping[str, Any]
) -> NewOrder:
    """Check what an app passed, without a database. Raises NotTrackable."""
    unknown = sorted(options.keys() - OPTIONS.keys())
    if unknown:
        raise NotTrackable(f"order has no argument {unknown[0]!r}: it takes {', '.join(OPTIONS)}")
    scrubber = shared_scrubber(settings.secret_texts)
    given: TrackOptions = {**OPTIONS, **options, "endpoint": None, "fetch_url": None, "submitted_at": None}  # type: ignore[typeddict-item]
    try:
        checked = checked_options(settings, scrubber, given)
        target = order_target(endpoint, settings.api)
        fields = _checked_fields(payload)
        text = _payload_text(fields, settings)
        kind = checked_kind(checked.kind or kind_of_order(target.order, fields))
        deadline = settings.deadline_for(kind) if checked.deadline is None else checked.deadline
        return NewOrder(
            key=key,
            account=checked.account,
            endpoint=str(endpoint).strip(),
            host=target.host,
            payload=text,
            kind=scrubber.text(kind),
            eta=None if checked.eta is None or checked.eta > deadline else checked.eta,
            priority=checked.priority,
            reference=checked.reference,
            on_done=checked.on_done,
            webhook_url=checked.webhook_url,
            deadline=deadline,
        )
    except RefusedAddress as refused:
        raise RefusedAddress(scrubber.text(str(refused))) from None
    except NotTrackable as refused:
        raise NotTrackable(scrubber.text(str(refused))) from None


def _checked_fields(payload: object) -> dict[str, Any]:
    """Return the fields of the order, without an empty key. Raises NotTrackable if there is a key, or no mapping."""
    if not isinstance(payload, Mapping):
        raise NotTrackable(f"payload must be a mapping with the fields of the order, not {type(payload).__name__}")
    if payload.get("key"):
        raise NotTrackable("payload must not contain the key: the worker adds the key of the account")
    fields = {name: value for name, value in payload.items() if name != "key"}
    if not all(isinstance(name, str) for name in fields):
        raise NotTrackable("payload must have text as names of its fields")
    return fields


def _payload_text(fields: Mapping[str, Any], settings: Settings) -> str:
    """Return the fields as JSON. Raises NotTrackable if it is impossible, too large, or contains an API key."""
    try:
        text = json.dumps(fields, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise NotTrackable(f"payload can't be written as JSON: {error}") from None
    if len(text) > MAX_PAYLOAD:
        raise NotTrackable(f"payload has {len(text):,} bytes as JSON, {MAX_PAYLOAD:,} at most: pass files as URLs")
    if long_secret_scrubber(settings.secret_texts).text(text) != text:
        raise NotTrackable("payload contains an API key or a secret of this installation: remove it")
    return text


def _insert(connection: Connection, order: NewOrder) -> tuple[TrackedJob, bool]:
    return CreatedJob(insert_order(connection, order, now=database_now(connection))), True


def _insert_missing(connection: Connection, order: NewOrder) -> tuple[TrackedJob, bool]:
    job_id = job_of_order(connection, order.key)
    return _insert(connection, order) if job_id is None else (TrackedJob(job_id), False)


def attach(job_id: int, remote_id: str | int) -> bool:
    """Name the remote job of an uncertain order, whose answer was lost: from now on it is polled.

    Find the remote id where the API lists your recent jobs. Return False if the job is not uncertain. Raises
    JobNotFound, and NotTrackable if the remote id is not valid or belongs to another job.
    """
    settings = cached_settings()
    named = checked_remote_id(remote_id)
    with transaction(settings) as connection:
        job_id = existing_job(connection, job_id)
        ordered = order_row(connection, job_id)
        if ordered is None:
            return False
        address = address_of_order(ordered.endpoint, named, settings.api)
        now = database_now(connection)
        try:
            with connection.begin_nested():
                changed = attach_order(connection, job_id, named, address, default=False, now=now)
        except IntegrityError:
            raise NotTrackable(
                f"remote id {named} belongs to another job: `fetch-worker show --remote {named}`"
            ) from None
        if changed:
            record_job_action(connection, "attach", job_id, now=now)
    if changed:
        wake(settings)
    return changed
