"""Explain why a job does not move: one finding for each thing that the job depends on, and one line of advice.

The findings are listed in the order in which a job meets them. The first finding that blocks the job gives the advice.
"""

from dataclasses import dataclass

from worker.coordination.rate_limiter import BudgetStatus, RateLimiter
from worker.core.answer_history import parse_history
from worker.core.humanize import format_count, format_duration
from worker.core.lifecycle import FINAL_STATES
from worker.core.redaction.masking import mask_personal_data
from worker.operations.job_context import Finding, JobContext
from worker.operations.output_findings import on_done_findings, output_finding, promise_findings, webhook_findings
from worker.operations.request_findings import request_findings


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
    peeks = limiter.peek({context.job.account: context.rate}) if context.job.due_at is not None else {}
    return explain(context, peeks.get(context.job.account))


def _answer(age: float | None, note: str) -> str:
    return mask_personal_data(note) if age is None else f"at {format_duration(age)}: {mask_personal_data(note)}"


def _job(context: JobContext) -> Finding:
    job = context.job
    last_request = (
        "" if job.asked_at is None else f", the last {format_duration(context.seconds_since(job.asked_at))} ago"
    )
    age = format_duration(context.seconds_since(job.submitted_at))
    detail = f"submitted {age} ago, {format_count(job.polls, 'request')}{last_request}"
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
