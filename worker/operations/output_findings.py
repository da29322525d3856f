"""Explain the outputs of a job, its promised links, its `on_done` call and its webhooks."""

import json
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Row

from worker.core.humanize import format_bytes, format_count, format_duration
from worker.core.identity import can_be_asked
from worker.core.lifecycle import PROMISE_PATIENCE
from worker.core.redaction.masking import link_host, mask_personal_data
from worker.operations.job_context import Finding, JobContext
from worker.operations.late_webhooks import LATE_SECONDS
from worker.operations.request_findings import SOON_SECONDS, START_WORKER, claim_finding
from worker.operations.snapshot_reader import attempt_host
from worker.store.reports.work_state import HEALTHY_SECONDS

START_DOWNLOADS = "start a `downloads` process"


def promise_findings(context: JobContext) -> Iterator[Finding]:
    """Yield the finding about the promised links of a job, if it has any."""
    promise = context.promise
    if promise is None:
        return
    links = format_count(len(json.loads(promise.urls)), "link")
    if promise.tried_at is None:
        if context.job.status == "pending":
            yield Finding("promise", "kept", f"{links}; tried before the job ends without an output")
        return
    duration = format_duration(context.seconds_since(promise.tried_at))
    if promise.end_status is None:
        yield Finding("promise", "stored", f"{links}: an output came from a promised link")
    elif context.job.status == "downloading":
        message = mask_personal_data(promise.end_message or "")
        end = f"if none gives an output, the job ends as {promise.end_code}: {message}"
        yield Finding("promise", "tried", f"{links}, tried for {duration} because the API promised output there; {end}")
    else:
        yield Finding("promise", "dead", f"{links}: no output came from the promised links")


def output_finding(context: JobContext, output: Row[Any]) -> Finding:
    """Return the finding about an output."""
    step = f"output {output.position}"
    host = attempt_host(output, renewable=can_be_asked(context.job.fetch_base, context.job.remote_id))
    attempts = format_count(output.attempts, "attempt")
    if output.status == "stored":
        return Finding(
            step, "stored", f"{format_bytes(output.size_bytes)} {output.media_type}, {attempts}, from {host}"
        )
    last_error = (
        "" if output.error_code is None else f"; {output.error_code}: {mask_personal_data(output.error_message or '')}"
    )
    link = f"link of {host}, {format_duration(context.seconds_since(output.listed_at))} old"
    link += ", a fresh link was requested" if output.renewed else ""
    if output.status == "failed":
        return Finding(step, "failed", f"{attempts}, {link}{last_error}")
    if output.claim_token is not None:
        return _receiving(context, output, f"{attempts}, {link}{last_error}", step)
    wait = -context.seconds_since(output.due_at)
    next_try = f"again in {format_duration(wait)}" if wait > 0 else f"due for {format_duration(-wait)}"
    state = "waits" if output.error_code is None else output.error_code
    advice = _output_advice(context, output, host, wait)
    return Finding(step, state, f"{next_try}, {attempts}, {link}{last_error}", advice)


def _receiving(context: JobContext, output: Row[Any], detail: str, step: str) -> Finding:
    claim = claim_finding(context, step, output, "the download is running", START_DOWNLOADS)
    progress = "" if output.received_bytes is None else f"{format_bytes(output.received_bytes)} received, "
    state = "receiving" if claim.state == "held" else claim.state
    return Finding(step, state, f"{progress}{claim.detail}; {detail}", claim.advice)


def _output_advice(context: JobContext, output: Row[Any], host: str, wait: float) -> str:
    next_try = f"it is tried again in {format_duration(wait)}"
    if wait < -HEALTHY_SECONDS:
        late = format_duration(-wait)
        return f"{START_DOWNLOADS}: output {output.position} is due for {late} and no process downloads it"
    match output.error_code:
        case None:
            return "nothing: it is downloaded next"
        case "storage":
            return f"repair the storage (STORAGE_URL) or free some space: {next_try}"
        case _ if context.tries_promised_links:
            remaining = PROMISE_PATIENCE.total_seconds() - context.seconds_since(output.listed_at)
            limit = f", for {format_duration(remaining)} more" if remaining > 0 else ""
            return f"nothing: the API promised output at this link; {next_try}{limit}"
        case "unreachable" | "http_error":
            remaining = context.settings.output_deadline - context.seconds_since(output.listed_at)
            limit = (
                f"until OUTPUT_DEADLINE in {format_duration(remaining)}"
                if remaining > 0
                else "for the last time: OUTPUT_DEADLINE has passed"
            )
            resume = f"fetch-worker resume {context.job.id}"
            sooner = f"; when {host} works again, {resume} tries at once" if wait > SOON_SECONDS else ""
            return f"nothing on your side: {host} does not deliver it; {next_try}, {limit}{sooner}"
        case "gone" if context.job.due_at is not None:
            return "nothing: the API is asked for a fresh link"
        case _:
            return f"nothing: {next_try}"


def on_done_findings(context: JobContext) -> Iterator[Finding]:
    """Yield the finding about the `on_done` call of a final job, if it has one."""
    job = context.job
    if job.on_done is None or job.completed_at is None:
        return
    if job.told_at is not None:
        yield Finding("on_done", "sent", f"{job.on_done}, {format_duration(context.seconds_since(job.told_at))} ago")
    elif job.on_done_error is None:
        late = context.seconds_since(job.completed_at)
        advice = START_WORKER if late > LATE_SECONDS else None
        yield Finding("on_done", "waits", f"for {format_duration(late)}", advice)
    else:
        wait = None if job.on_done_due_at is None else -context.seconds_since(job.on_done_due_at)
        next_try = "" if wait is None or wait < 0 else f"again in {format_duration(wait)}; "
        error = mask_personal_data(job.on_done_error)
        detail = f"{next_try}{job.on_done}, {format_count(job.on_done_attempts, 'attempt')}; {error}"
        yield Finding("on_done", "refused", detail, "check the queue that on_done names, and the broker")


def webhook_findings(context: JobContext) -> Iterator[Finding]:
    """Yield the findings about the webhooks of a job."""
    job = context.job
    start_sender = f"{START_WORKER} with WEBHOOK_SECRET set"
    if job.webhook_url is not None and job.completed_at is not None and job.announced_at is None:
        late = context.seconds_since(job.completed_at)
        advice = start_sender if late > LATE_SECONDS else None
        yield Finding("webhook", "not made", f"for {format_duration(late)}", advice)
    for event in context.events:
        yield _webhook(context, event, link_host(event.url), start_sender)


def _webhook(context: JobContext, event: Row[Any], receiver: str, start_sender: str) -> Finding:
    error = "" if event.error_message is None else f"; {mask_personal_data(event.error_message)}"
    detail = f"{event.type} to {receiver}, {format_count(event.attempts, 'attempt')}{error}"
    if event.status == "failed":
        advice = f"check the receiver {receiver}, then `fetch-worker notify {context.job.id}`: it was tried for a day"
        return Finding("webhook", "given up", detail, advice)
    if event.status == "delivered":
        return Finding("webhook", "delivered", detail)
    late = context.seconds_since(event.due_at)
    if late > LATE_SECONDS:
        return Finding("webhook", "late", f"due for {format_duration(late)}; {detail}", start_sender)
    if event.error_message is not None:
        advice = f"check the receiver {receiver}: the event is sent again in {format_duration(-late)}"
        return Finding("webhook", "refused", f"again in {format_duration(-late)}; {detail}", advice)
    return Finding("webhook", "on its way", detail)
