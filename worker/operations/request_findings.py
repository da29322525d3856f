"""Explain the next request about a job: its account, host, claim, rate limit, queue, due time and deadline."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Row

from worker.coordination.rate_limiter import BudgetStatus
from worker.core.circuit_breaker import BY_OPERATOR, NOT_LISTED, CircuitBreaker
from worker.core.humanize import format_count, format_duration
from worker.core.lifecycle import ORDER_STATES
from worker.core.pacing.policy import PacedJob
from worker.core.pacing.survival import MAX_POLL_AGE
from worker.core.redaction.masking import mask_personal_data
from worker.operations.job_context import MAX_JOBS_AHEAD, Finding, JobContext
from worker.operations.lost_work import OVER_SECONDS
from worker.operations.remedies import for_hold, for_missing_key
from worker.operations.snapshot import NO_WORKER
from worker.store.holds import work_limits
from worker.store.reports.work_state import HEALTHY_SECONDS, NO_KEY
from worker.system.process_identity import liveness

SOON_SECONDS = 60.0  # a longer wait also gets the command that ends it
CURVE_SECONDS = (0.0, 5.0, 15.0, 60.0, 300.0)  # from now
START_WORKER = "start a `worker` process"


def request_findings(context: JobContext, peek: BudgetStatus | None) -> Iterator[Finding]:
    """Yield the findings about the next request, in the order in which the job meets them."""
    if context.job.held_at is not None:
        held_for = format_duration(context.seconds_since(context.job.held_at))
        yield Finding("hold", BY_OPERATOR, f"for {held_for}", f"fetch-worker resume {context.job.id}")
    yield account_finding(context)
    yield host_finding(context)
    yield request_claim(context)
    yield rate_limit_finding(context, peek)
    yield _queue(context)
    yield _poll(context)
    if context.job.status == "pending":
        yield _curve(context)
        yield _deadline(context)


def account_finding(context: JobContext) -> Finding:
    """Return the finding about the account of a job: whether it is held or has no key."""
    name = context.job.account
    breaker = context.work.breakers.get(("account", name), CircuitBreaker("account", name))
    if breaker.held(context.now):
        return _held(context, breaker, f"account {name}")
    if context.account_state.reason_class == NO_KEY:
        return Finding("account", "no key", context.account_state.reason or "", for_missing_key(name).text)
    if breaker.proven:
        return Finding("account", "open", f"{name}: the API accepted its key")
    return Finding("account", "open", f"{name}: its key is not tested yet, so a single request is sent first")


def host_finding(context: JobContext) -> Finding:
    """Return the finding about the host of a job: whether it is held, or did not answer lately."""
    name = context.job.fetch_host
    breaker = context.work.breakers.get(("host", name), CircuitBreaker("host", name))
    if breaker.held(context.now):
        return _held(context, breaker, name)
    detail = f"{name}: the last {format_count(breaker.troubles, 'request')} failed" if breaker.troubles else name
    return Finding("host", "open", detail)


def _held(context: JobContext, breaker: CircuitBreaker, subject: str) -> Finding:
    """Return the finding about an account or host (`subject`) that is held."""
    began = breaker.held_since
    remedy = for_hold(breaker.scope, breaker.name, breaker.why or "")
    duration = "" if began is None else f" held for {format_duration(context.seconds_since(began))}"
    if breaker.paused_at is not None:
        detail = f"{subject}:{duration}, until an operator resumes it"
        return Finding(breaker.scope, BY_OPERATOR, detail, remedy.text)
    if breaker.is_unlisted:
        advice = f"{remedy.text}, or cancel the job"
        if context.job.status not in ORDER_STATES:
            advice += "; otherwise the job expires at its deadline"
        return Finding(breaker.scope, "held", f"{subject}:{duration}, {NOT_LISTED}", advice)
    wait = 0.0 if breaker.tried_at is None else -context.seconds_since(breaker.tried_at)
    next_try = (
        f"continues in {format_duration(wait)}" if breaker.until else f"is tried again in {format_duration(wait)}"
    )
    if wait < -HEALTHY_SECONDS:
        next_try = f"should have been tried again {format_duration(-wait)} ago"
        advice = f"{START_WORKER}: no process tries {subject} again"
    else:
        advice = f"nothing: it {next_try}" if breaker.until else remedy.text
    return Finding(
        breaker.scope,
        "held",
        f"{subject}:{duration}, {mask_personal_data(breaker.reason or '')}; it {next_try}",
        advice,
    )


def request_claim(context: JobContext) -> Finding:
    """Return the finding about the claim on the job for its next request."""
    job = context.job
    if job.claim_token is None:
        return Finding("claim", "free", "no process has claimed it")
    return claim_finding(context, "claim", job, "a request about it is in flight", START_WORKER)


def claim_finding(context: JobContext, step: str, row: Row[Any], activity: str, start: str) -> Finding:
    """Return the finding about a claim on the job or on an output: whether its process still works on it."""
    limits = work_limits(context.settings)
    began, longest = (row.asked_at, limits.poll_max) if row is context.job else (row.claimed_at, limits.download_max)
    duration = "" if began is None else f" for {format_duration(context.seconds_since(began))}"
    holder_liveness = liveness(row.claim_holder)
    holder_state = {
        "runs": "which is running",
        "dead": "which is dead",
        "unknown": "which is not on this host",
    }[holder_liveness]
    over = context.seconds_since(row.due_at)
    lease = (
        f"its lease ends in {format_duration(-over)}" if over < 0 else f"its lease ended {format_duration(over)} ago"
    )
    detail = f"by {row.claim_holder}, {holder_state},{duration}; {lease}"
    if over > OVER_SECONDS or (holder_liveness == "dead" and not context.work.workers_poll):
        return Finding(step, "stuck", detail, f"{start}: it releases the claims of dead processes")
    if holder_liveness == "dead":
        return Finding(step, "stuck", detail, "nothing: the next sweep releases the claim within seconds")
    if holder_liveness == "unknown" and began is not None and context.now - began > longest:
        advice = f"fetch-worker resume {context.job.id}: no work takes this long, so the process must be dead"
        return Finding(step, "stuck", detail, advice)
    return Finding(step, "held", detail, f"nothing: {activity}")


def rate_limit_finding(context: JobContext, peek: BudgetStatus | None) -> Finding:
    """Return the finding about the requests per second of the account. `peek` is None if Redis is not reachable."""
    breaker = context.work.breakers.get(("account", context.job.account))
    ceiling = (
        "" if breaker is None or breaker.ceiling is None else f", learned from the last refusal: {breaker.ceiling:.3g}"
    )
    configured = context.settings.rps(context.job.account)
    detail = f"{context.rate:g} requests per second allowed now, {configured:g} configured{ceiling}"
    if peek is None:
        unknown = "Redis is not reachable, so the number of free requests is unknown"
        return Finding("budget", "unknown", f"{detail}; {unknown}")
    used = f"{peek.accepted:.0f} were made in the last second"
    if peek.available:
        return Finding("budget", "free", f"{detail}; {peek.available} can be sent now, {used}")
    return Finding("budget", "used up", f"{detail}; the next can be sent in {peek.wait:.1f} s, {used}")


def _queue(context: JobContext) -> Finding:
    if context.job.held_at is not None:
        return Finding("queue", "held", "an operator holds it, so it is not in the queue")
    if not context.jobs_ahead:
        return Finding("queue", "first", "no due job of its account is ahead of it")
    return Finding("queue", "behind", f"{_jobs_ahead(context)} of its account are ahead of it")


def _jobs_ahead(context: JobContext) -> str:
    if context.jobs_ahead > MAX_JOBS_AHEAD:
        return f"more than {MAX_JOBS_AHEAD:,} due jobs"
    return format_count(context.jobs_ahead, "due job")


def _poll(context: JobContext) -> Finding:
    job = context.job
    late = context.seconds_since(job.due_at)
    if job.held_at is not None:
        return Finding("poll", "never", "it is not polled until it is resumed")
    if late < 0:
        wait = format_duration(-late)
        past_deadline = job.status == "pending" and job.deadline_at < context.now
        expires = ", and it expires then unless it is ready" if past_deadline else ""
        if past_deadline and -late > SOON_SECONDS:
            advice = f"fetch-worker resume {job.id} polls it at once; otherwise it is polled in {wait}{expires}"
            return Finding("poll", "waits", f"in {wait}", advice)
        return Finding("poll", "waits", f"in {wait}", f"nothing: it is polled in {wait}{expires}")
    return Finding("poll", "due", f"for {format_duration(late)}", _late_advice(context, late))


def late_cause(context: JobContext) -> str:
    """Return why a due job that is not held was not polled yet."""
    is_late = context.seconds_since(context.job.due_at) > HEALTHY_SECONDS
    if is_late and not context.work.workers_poll:
        return NO_WORKER
    if context.jobs_ahead:
        return f"{_jobs_ahead(context)} are ahead of it"
    return "other jobs are polled, and this one is not" if is_late else "it is polled next"


def _late_advice(context: JobContext, late: float) -> str:
    cause = late_cause(context)
    if cause == NO_WORKER:
        return f"{START_WORKER}: {cause}"
    if context.jobs_ahead:
        faster = "to go faster, raise SD_API_RPS if the API allows it, or give the job a higher priority"
        return f"nothing: {cause}; {faster}"
    return f"run fetch-worker doctor: {cause}" if late > HEALTHY_SECONDS else f"nothing: {cause}"


def _curve(context: JobContext) -> Finding:
    job, model = context.job, context.model
    waiting = PacedJob.at(context.now, job)
    clock, _, _ = model.clock(waiting)
    if not clock.moments.count:
        return Finding("curve", "unknown", "no job of this kind has finished yet")
    chances = [
        f"{'now' if not ahead else f'in {ahead:.0f} s'} {model.chance(waiting, waiting.age + ahead):.0%}"
        for ahead in CURVE_SECONDS
    ]
    half, ninety = (model.quantile(waiting, share) - waiting.age for share in (0.5, 0.9))
    quantiles = f"half {_within(half)}, 90 % {_within(ninety)}"
    by = "age" if clock is model.by_age else "eta"
    detail = f"ready {', '.join(chances)}; {quantiles}; from {clock.moments.count:.0f} jobs of this kind"
    return Finding("curve", f"by {by}", detail)


def _within(seconds: float) -> str:
    return f"in {format_duration(seconds)}" if seconds < MAX_POLL_AGE else "never"


def _deadline(context: JobContext) -> Finding:
    over = context.seconds_since(context.job.deadline_at)
    if over < 0:
        detail = f"in {format_duration(-over)}; the job can only expire on an answer after it"
        return Finding("deadline", "ahead", detail)
    detail = f"for {format_duration(over)}; the job expires on the next answer that is not ready"
    return Finding("deadline", "over", detail)
