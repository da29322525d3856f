"""Explain an order that the API has not taken yet: why it is not sent, or what is known if its answer is lost."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import Row

from worker.coordination.rate_limiter import BudgetStatus
from worker.core.humanize import format_count, format_duration, iso_time
from worker.core.redaction.masking import mask_personal_data
from worker.operations.job_context import Finding, JobContext
from worker.operations.request_findings import START_WORKER, account_finding, host_finding, rate_limit_finding
from worker.store.reports.work_state import HEALTHY_SECONDS
from worker.system.process_identity import liveness
from worker.system.redaction import shared_scrubber

SHOWN_PAYLOAD = 2_000  # characters of a payload that people see


def order_findings(context: JobContext, peek: BudgetStatus | None) -> Iterator[Finding]:
    """Yield the findings about an order, in the order in which it meets them."""
    if context.job.status == "uncertain":
        yield Finding("order", "uncertain", _known(context), _decision(context))
        for candidate in context.candidates:
            yield Finding("candidate", candidate.remote_id, _candidate(context, candidate))
        return
    if context.order is None:
        advice = f"fetch-worker cancel {context.job.id}, and order it again"
        yield Finding("order", "missing", "its order is gone, so it can't be sent", advice)
        return
    yield account_finding(context)
    yield host_finding(context)
    yield _claim(context)
    yield rate_limit_finding(context, peek)
    yield _slots(context)
    yield _queue(context)


def why_not_sent(context: JobContext) -> str:
    """Return what an order waits for that is not held, in one sentence."""
    order = context.order
    if order is None:
        return "its order is gone, so it can't be sent: cancel it and order it again"
    return _waits_for(context) + _last_answer(context)


def why_uncertain(context: JobContext) -> str:
    """Return what is known about an order whose answer is lost, and what can be done, in one sentence."""
    return f"{_known(context)}; it is not sent again by itself: attach, retry or cancel it"


def _waits_for(context: JobContext) -> str:
    order, account = context.order, context.account_orders
    if order is None or context.place is None:
        return f"it is being sent by {order.claim_holder}" if order is not None and order.claim_holder else "it is sent"
    slots = f"{account.taken} of {format_count(account.slots, 'slot')} taken"
    wait = -context.seconds_since(order.due_at)
    if wait > 0:
        return f"postponed: it is sent again in {format_duration(wait)}"
    if account.free_since is None:
        return f"waiting for a slot at the API: {slots}, {_place(context)}"
    if context.place.before:
        return f"waiting to be sent: {_place(context)}, {slots}"
    return f"due for {format_duration(-wait)}: no worker has sent it yet, or the rate limit is used up; {slots}"


def _place(context: JobContext) -> str:
    before = 0 if context.place is None else context.place.before
    return f"{format_count(before, 'order')} of its account before it" if before else "it is sent next"


def _last_answer(context: JobContext) -> str:
    order = context.order
    if order is None or not order.last_error:
        return ""
    return f"; last answer: {mask_personal_data(order.last_error)}"


def _known(context: JobContext) -> str:
    order = context.order
    if order is None:
        return "its order is gone"
    at = "" if order.attempted_at is None else f" at {order.attempted_at:%Y-%m-%d %H:%M:%S} UTC"
    return f"it was sent{at}, and it is not known whether the API took it: {mask_personal_data(order.last_error or '')}"


def _decision(context: JobContext) -> str:
    job_id = context.job.id
    checked = any(candidate.due_at is not None for candidate in context.candidates)
    wait = "the API is asked about a job that its call named: wait a minute; then " if checked else ""
    return (
        f"{wait}look whether the API has the job (`fetch-worker attach {job_id}` lists candidates): if so, "
        f"`fetch-worker attach {job_id} REMOTE_ID`; else `fetch-worker retry {job_id}`, which may be paid twice; "
        f"or give it up with `fetch-worker cancel {job_id}`"
    )


def _candidate(context: JobContext, candidate: Row[Any]) -> str:
    named = f"a call of the API named it {format_duration(context.seconds_since(candidate.named_at))} ago"
    note = f"; {mask_personal_data(candidate.note)}" if candidate.note else ""
    if candidate.due_at is None:
        return f"{named}{note}"
    wait = -context.seconds_since(candidate.due_at)
    return f"{named}{note}; the API is asked about it " + (f"in {format_duration(wait)}" if wait > 0 else "soon")


def _claim(context: JobContext) -> Finding:
    order = context.order
    if order is None or order.claim_holder is None:
        return Finding("claim", "free", "no process has claimed it")
    alive = {"runs": "which is running", "dead": "which is dead", "unknown": "which is not on this host"}
    holder = liveness(order.claim_holder)
    activity = "its request is not answered yet" if order.attempt_token else "its request has not begun"
    detail = f"by {order.claim_holder}, {alive[holder]}; {activity}"
    over = context.seconds_since(order.due_at)
    if over > 0 and not context.work.pollers:
        return Finding("claim", "stuck", detail, f"{START_WORKER}: it releases the claims of dead processes")
    return Finding("claim", "stuck" if holder == "dead" else "held", detail, "nothing: it is being sent")


def _slots(context: JobContext) -> Finding:
    account = context.account_orders
    detail = (
        f"{account.taken} of {account.slots} taken: {format_count(account.at_api, 'job')} at the API, "
        f"{format_count(account.sending, 'order')} being sent"
    )
    if account.free_since is None and context.place is not None:
        return Finding("slots", "taken", detail, "nothing: it is sent when a job of its account is ready")
    return Finding("slots", "free" if account.free_since is not None else "taken", detail)


def _queue(context: JobContext) -> Finding:
    order = context.order
    if order is None or context.place is None:
        return Finding("queue", "left", "it does not wait any more")
    wait = -context.seconds_since(order.due_at)
    last_answer = f"; last answer: {mask_personal_data(order.last_error)}" if order.last_error else ""
    if wait > 0:
        advice = f"nothing: it is sent again in {format_duration(wait)}"
        return Finding("queue", "postponed", f"in {format_duration(wait)}{last_answer}", advice)
    detail = f"{_place(context)}, due for {format_duration(-wait)}{last_answer}"
    if -wait > HEALTHY_SECONDS and not context.work.workers_poll and not context.work.pollers:
        return Finding("queue", "due", detail, f"{START_WORKER}: no process sends orders")
    return Finding("queue", "behind" if context.place.before else "first", detail, "nothing: it is sent soon")


# ── the order itself ──────────────────────────────────────────────────────────────────────────────────────────────────


def payload_text(context: JobContext) -> str:
    """Return the payload of an order as JSON text without keys, or an empty text if the job has no order."""
    if context.order is None:
        return ""
    return shared_scrubber(context.settings.secret_texts).text(context.order.payload)


def order_document(context: JobContext) -> dict[str, Any] | None:
    """Return the order of a job as JSON values, or None if the job was not ordered here."""
    order, account = context.order, context.account_orders
    if order is None:
        return None
    text = payload_text(context)
    try:
        payload = json.loads(text)
    except ValueError:
        payload = text
    return {
        "endpoint": order.endpoint,
        "payload_sha256": order.payload_sha256,
        "payload_bytes": len(order.payload.encode()),
        "payload": payload,
        "ordered_at": iso_time(order.ordered_at),
        "attempts": order.attempts,
        "attempted_at": None if order.attempted_at is None else iso_time(order.attempted_at),
        "last_error": order.last_error,
        "slots": {"taken": account.taken, "total": account.slots},
        "place": None if context.place is None else context.place.before + 1,
        "candidates": [
            {
                "remote_id": candidate.remote_id,
                "named_at": iso_time(candidate.named_at),
                "due_at": None if candidate.due_at is None else iso_time(candidate.due_at),
                "note": candidate.note,
            }
            for candidate in context.candidates
        ],
    }


def shown_order(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return an order of `order_document` for people: with the beginning of its payload."""
    text = json.dumps(document["payload"], ensure_ascii=False)
    more = len(text) - SHOWN_PAYLOAD
    payload = text if more <= 0 else f"{text[:SHOWN_PAYLOAD]}… and {format_count(more, 'character')} more"
    slots = f"{document['slots']['taken']} of {document['slots']['total']} taken"
    candidates = ", ".join(candidate["remote_id"] for candidate in document["candidates"]) or None
    return {**document, "payload": payload, "slots": slots, "candidates": candidates}
