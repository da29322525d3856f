"""Explain why a job does not move: one finding for each thing that the job depends on, and one line of advice.

The findings are listed in the order in which a job meets them. The first finding that blocks the job gives the advice.
`why` is the short form, in one or two sentences.
"""

from dataclasses import dataclass

from worker.coordination.rate_limiter import BudgetStatus, RateLimiter
from worker.core.answer_history import parse_history
from worker.core.circuit_breaker import BY_OPERATOR
from worker.core.humanize import format_count, format_duration
from worker.core.lifecycle import FINAL_STATES, ORDER_STATES
from worker.core.redaction.masking import mask_personal_data
from worker.operations.job_context import Finding, JobContext, ReadyEstimate
from worker.operations.order_findings import order_findings, why_not_sent, why_uncertain
from worker.operations.output_findings import on_done_findings, output_finding, promise_findings, webhook_findings
from worker.operations.request_findings import late_cause, request_claim, request_findings


@dataclass(frozen=True, slots=True)
class Explanation:
    """All findings about a job, and one line that says what to do."""

    findings: list[Finding]
    advice: str


def explain(context: JobContext, peek: BudgetStatus | None) -> Explanation:
    """Explain a job. `peek` is the rate limit of its account, or `None` if Redis is not reachable."""
    findings = [_job(context)]
    if context.job.due_at is not None:
        findings += request_findings(context, peek)
    elif context.job.status in ORDER_STATES:
        findings += order_findings(context, peek)
    kept_answers = parse_history(context.job.last_answer)
    if kept_answers:
        details = "; ".join(_answer(answer.age, answer.note) for answer in kept_answers)
        findings.append(Finding("answers", f"{len(kept_answers)} kept", details))
    findings += promise_findings(context)
    findings += [output_finding(context, output) for output in context.outputs]
    findings += on_done_findings(context)
    findings += webhook_findings(context)
    default = "nothing: all outputs are stored" if context.job.status == "completed" else "nothing: the job continues"
    return Explanation(findings, next((finding.advice for finding in findings if finding.advice is not None), default))


def read_explanation(context: JobContext, limiter: RateLimiter) -> Explanation:
    """Read the rate limit from Redis and explain a job. Call it after the transaction that read the context."""
    sends_requests = context.job.due_at is not None or context.job.status == "ordered"
    peeks = limiter.peek({context.job.account: context.rate}) if sends_requests else {}
    return explain(context, peeks.get(context.job.account))


def _answer(age: float | None, note: str) -> str:
    return mask_personal_data(note) if age is None else f"at {format_duration(age)}: {mask_personal_data(note)}"


def _job(context: JobContext) -> Finding:
    job = context.job
    last_request = (
        "" if job.asked_at is None else f", the last {format_duration(context.seconds_since(job.asked_at))} ago"
    )
    age = format_duration(context.seconds_since(job.submitted_at))
    begun = "ordered" if job.status in ORDER_STATES else "submitted"
    detail = f"{begun} {age} ago, {format_count(job.polls, 'request')}{last_request}"
    if job.ready_at is not None and not context.tries_promised_links:
        detail += f"; first seen ready {format_duration(context.seconds_since(job.ready_at))} ago"
    if job.completed_at is not None:
        detail += f"; {job.status} {format_duration(context.seconds_since(job.completed_at))} ago"
    if job.error_code is not None:
        detail += f"; {job.error_code}: {mask_personal_data(job.error_message or '')}"
    return Finding("job", job.status, detail, _final_advice(context) if job.status in FINAL_STATES else None)


def _final_advice(context: JobContext) -> str | None:
    job = context.job
    retry = f"fetch-worker retry {job.id}"
    match job.status:
        case "completed":
            return None
        case "cancelled":
            return "nothing: the job was cancelled"
        case "expired":
            kept_answers = parse_history(job.last_answer)
            if kept_answers and kept_answers[0].note.startswith("unknown id"):
                return f"check the remote id and the account: the API does not know this job; {retry} polls it again"
            return f"{retry}, if the output may still arrive"
    codes = {output.error_code for output in context.outputs if output.status == "failed"}
    if "refused_address" in codes:
        return f"add the network of that address to OUTPUT_ALLOWED_NETWORKS if you trust it, then {retry}"
    return f"set a larger OUTPUT_MAX_BYTES, then {retry}" if "too_large" in codes else retry


def why(context: JobContext) -> str:
    """Return the reason for the state of a job, in one or two sentences."""
    job = context.job
    match job.status:
        case "completed":
            return f"all {len(context.outputs)} outputs are stored"
        case "failed" if job.error_code == "not_found":
            return (
                f"not_found: {job.error_message}; polled at {job.fetch_base}: "
                "if the job belongs to another endpoint, track it with `endpoint`"
            )
        case "failed":
            return f"{job.error_code}: {job.error_message}"
        case "expired":
            look = context.late_look
            next_poll = "" if look is None else f"; it is polled once more at {look.due_at:%Y-%m-%d %H:%M} UTC"
            return f"{job.error_code}: {job.error_message}{next_poll}"
        case "cancelled":
            return "it was cancelled"
        case "downloading":
            return _why_downloading(context)
        case "uncertain":
            return why_uncertain(context)
        case "ordered":
            return _why_held(context) or why_not_sent(context)
    return _why_held(context) or _why_waiting(context)


def _why_downloading(context: JobContext) -> str:
    stored = sum(output.status == "stored" for output in context.outputs)
    parts = [f"{stored} of {len(context.outputs)} outputs are stored"]
    if context.promise is not None and context.promise.end_code is not None:
        parts.insert(0, f"it ends as {context.promise.end_code} unless a promised link gives an output")
    if context.job.due_at is not None:
        parts.append("the API is asked for a fresh link")
    for output in (output for output in context.outputs if output.status == "pending"):
        if output.claim_token is not None:
            parts.append(f"output {output.position} is being downloaded")
        elif output.error_code is not None:
            wait = max(0.0, -context.seconds_since(output.due_at))
            error = f"{output.error_code} ({output.error_message})"
            parts.append(f"output {output.position}: {error}, again in {wait:.0f} s")
        else:
            parts.append(f"output {output.position} is waiting for a download process")
    return "; ".join(parts)


def _why_held(context: JobContext) -> str | None:
    """Return who or what holds a pending or ordered job, or None if it is not held."""
    job, account = context.job, context.account_state
    no_expiry = "it does not expire during the hold"
    if job.held_at is not None:
        return f"{BY_OPERATOR} since {job.held_at:%Y-%m-%d %H:%M:%S} UTC; {no_expiry}; `resume` ends the hold"
    if account.reason is not None:
        until = f", tried again at {account.until:%H:%M:%S} UTC" if account.until else ""
        return f"held: {account.reason}{until}; {no_expiry}"
    host = context.work.breakers.get(("host", job.fetch_host))
    if host is None or not host.held(context.now):
        return None
    expires = host.is_unlisted and host.paused_at is None and job.status not in ORDER_STATES
    return f"held: {host.name} {host.why}; {'it expires at its deadline' if expires else no_expiry}"


def _why_waiting(context: JobContext) -> str:
    """Return what a pending job that is not held waits for."""
    job = context.job
    kept_answers = parse_history(job.last_answer)
    last_answer = f"; last answer: {mask_personal_data(kept_answers[0].note)}" if kept_answers else ""
    late = context.seconds_since(job.due_at)
    if job.claim_token is not None:
        claim = request_claim(context)
        reason = f"claimed {claim.detail}; {(claim.advice or '').removeprefix('nothing: ')}"
    elif late >= 0:
        reason = f"due for {format_duration(late)}: {late_cause(context)}"
    else:
        reason = f"waiting for its next poll in {format_duration(-late)}"
        if context.settings.poll_policy == "learned" and context.estimate is not None:
            reason += f"; {_describe(context.estimate)}"
    return reason + last_answer


def _describe(estimate: ReadyEstimate) -> str:
    if not estimate.jobs:
        return "no job of this kind has finished yet"
    half, ninety = ("never" if at is None else f"in {at:.0f} s" for at in (estimate.median, estimate.p90))
    return (
        f"the chance that it is ready is {estimate.chance_now:.0%} now and {estimate.chance_then:.0%} then"
        f"; estimated from {estimate.jobs:.0f} jobs of this kind by {estimate.by}: half are ready {half}, 90 % {ninety}"
    )
