"""Explain why a job does not move: one finding for each thing that the job depends on, and one line of advice.

The findings are listed in the order in which a job meets them. The first finding that blocks the job gives the advice.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row

from worker.coordination.rate_limiter import BudgetStatus, RateLimiter
from worker.core.answer_history import parse_history
from worker.core.circuit_breaker import BY_OPERATOR, NOT_LISTED, REFUSALS, CircuitBreaker, Scope
from worker.core.humanize import format_bytes, format_duration
from worker.core.identity import can_be_asked
from worker.core.lifecycle import FINAL_STATES, PROMISE_PATIENCE
from worker.core.pacing.policy import PacedJob, PaceModel
from worker.core.pacing.survival import MAX_POLL_AGE
from worker.core.redaction.masking import link_host, mask_personal_data
from worker.operations.overview import HEALTHY_SECONDS, AccountState, account_states
from worker.operations.snapshot_reader import LATE_EVENT_SECONDS, OVER_SECONDS, attempt_host
from worker.polling.duration_learner import read_models
from worker.settings import Settings
from worker.store.breakers import all_breakers, last_asked
from worker.store.claims import DueGroup, due_groups
from worker.store.engine import database_now
from worker.store.holds import work_limits
from worker.store.promises import promise_row
from worker.store.reports.snapshot_rows import count_due_before
from worker.system.process_identity import liveness

MAX_JOBS_AHEAD = 10_000  # jobs counted in front of this one
SOON_SECONDS = 60.0  # a longer wait also gets the command that ends it
CURVE_SECONDS = (0.0, 5.0, 15.0, 60.0, 300.0)  # from now
START_WORKER = "start a `worker` process"
START_DOWNLOADS = "start a `downloads` process"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check of an explanation: what was checked (`step`), its state in one or two words, and the numbers.

    `advice` says what to do. It is `None` where this check does not block the job.
    """

    step: str
    state: str
    detail: str
    advice: str | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """All findings about a job, and one line that says what to do."""

    findings: list[Finding]
    advice: str


@dataclass(frozen=True, slots=True)
class JobContext:
    """A job and everything in the database that it depends on. `account_state` includes a hold of the account."""

    job: Row[Any]
    outputs: Sequence[Row[Any]]
    events: Sequence[Row[Any]]
    now: datetime
    account_state: AccountState
    breakers: Mapping[tuple[Scope, str], CircuitBreaker]
    model: PaceModel
    jobs_ahead: int
    last_request_at: datetime | None
    settings: Settings
    promise: Row[Any] | None = None

    @property
    def tries_promised_links(self) -> bool:
        """Whether the outputs are promised links, which no answer has listed."""
        return self.promise is not None and self.promise.end_status is not None

    @property
    def workers_poll(self) -> bool:
        """Whether any worker made a request within the last `HEALTHY_SECONDS`."""
        return self.last_request_at is not None and self.now - self.last_request_at <= timedelta(
            seconds=HEALTHY_SECONDS
        )

    @property
    def rate(self) -> float:
        """The requests per second that the account may make."""
        return self.account_state.rps

    def seconds_since(self, moment: datetime) -> float:
        """Return the seconds since a moment. The result is negative for a moment in the future."""
        return (self.now - moment).total_seconds()


def read_context(
    connection: Connection, job: Row[Any], outputs: Sequence[Row[Any]], events: Sequence[Row[Any]], settings: Settings
) -> JobContext:
    """Read everything from the database that explains a job."""
    now = database_now(connection)
    breakers = all_breakers(connection)
    groups = due_groups(connection, [job.account])
    waits = job.due_at is not None
    own_group = [DueGroup(job.account, job.priority, job.fetch_host, job.due_at)] if waits else []
    account_state = next(
        (
            state
            for state in account_states(breakers, [*groups, *own_group], settings, now)
            if state.account == job.account
        ),
        None,
    )
    return JobContext(
        job=job,
        outputs=outputs,
        events=events,
        now=now,
        account_state=account_state or AccountState(job.account, None, None, None, settings.rps(job.account)),
        breakers=breakers,
        model=read_models(connection, [(job.account, job.kind)])[job.account, job.kind][0],
        jobs_ahead=count_due_before(connection, groups, job, now=now, limit=MAX_JOBS_AHEAD + 1) if waits else 0,
        last_request_at=last_asked(connection),
        settings=settings,
        promise=promise_row(connection, job.id),
    )


def explain(context: JobContext, peek: BudgetStatus | None) -> Explanation:
    """Explain a job. `peek` is the rate limit of its account, or `None` if Redis is not reachable."""
    findings = [_job(context)]
    if context.job.due_at is not None:
        findings += _request(context, peek)
    kept_answers = parse_history(context.job.last_answer)
    if kept_answers:
        details = "; ".join(_answer(answer.age, answer.note) for answer in kept_answers)
        findings.append(Finding("answers", f"{len(kept_answers)} kept", details))
    findings += _promise(context)
    findings += [_output(context, output) for output in context.outputs]
    findings += _on_done(context)
    findings += _webhooks(context)
    default = "nothing: all outputs are stored" if context.job.status == "completed" else "nothing: the job continues"
    return Explanation(findings, next((finding.advice for finding in findings if finding.advice is not None), default))


def read_explanation(context: JobContext, limiter: RateLimiter) -> Explanation:
    """Read the rate limit from Redis and explain a job. Call it after the transaction that read the context."""
    peeks = limiter.peek({context.job.account: context.rate}) if context.job.due_at is not None else {}
    return explain(context, peeks.get(context.job.account))


def _answer(age: float | None, note: str) -> str:
    return mask_personal_data(note) if age is None else f"at {format_duration(age)}: {mask_personal_data(note)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _job(context: JobContext) -> Finding:
    job = context.job
    last_request = (
        "" if job.asked_at is None else f", the last {format_duration(context.seconds_since(job.asked_at))} ago"
    )
    age = format_duration(context.seconds_since(job.submitted_at))
    detail = f"submitted {age} ago, {_count(job.polls, 'request')}{last_request}"
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


# ── the next request ──────────────────────────────────────────────────────────────────────────────────────────────────


def _request(context: JobContext, peek: BudgetStatus | None) -> Iterator[Finding]:
    if context.job.held_at is not None:
        held_for = format_duration(context.seconds_since(context.job.held_at))
        yield Finding("hold", BY_OPERATOR, f"for {held_for}", f"fetch-worker resume {context.job.id}")
    yield _account(context)
    yield _host(context)
    yield _claim(context)
    yield _rate_limit(context, peek)
    yield _queue(context)
    yield _poll(context)
    if context.job.status == "pending":
        yield _curve(context)
        yield _deadline(context)


def _account(context: JobContext) -> Finding:
    name = context.job.account
    breaker = context.breakers.get(("account", name), CircuitBreaker("account", name))
    variable = _key_variable(context, name)
    if breaker.held(context.now):
        return _held(context, breaker, f"account {name}", variable)
    if name not in context.settings.keys and not breaker.proven:
        advice = f"put the key of account {name} into {variable}"
        return Finding("account", "no key", f"{name} has no key in the environment of this command", advice)
    if breaker.proven:
        return Finding("account", "open", f"{name}: the API accepted its key")
    return Finding("account", "open", f"{name}: its key is not tested yet, so a single request is sent first")


def _key_variable(context: JobContext, account: str) -> str:
    """Return where the key of an account is configured, and what to do after a change."""
    if context.settings.sd_api_keys_file:
        return f'the file SD_API_KEYS_FILE, as "{account}": the worker reads it again by itself'
    variable = "SD_API_KEY" if account == "default" else f'SD_API_KEYS["{account}"]'
    return f"{variable} and restart the worker"


def _host(context: JobContext) -> Finding:
    name = context.job.fetch_host
    breaker = context.breakers.get(("host", name), CircuitBreaker("host", name))
    if breaker.held(context.now):
        return _held(context, breaker, name, "")
    detail = f"{name}: the last {_count(breaker.troubles, 'request')} failed" if breaker.troubles else name
    return Finding("host", "open", detail)


def _held(context: JobContext, breaker: CircuitBreaker, subject: str, variable: str) -> Finding:
    """Return the finding about an account or host (`subject`) that is held."""
    began = breaker.paused_at or breaker.since
    duration = "" if began is None else f" held for {format_duration(context.seconds_since(began))}"
    if breaker.paused_at is not None:
        advice = f"fetch-worker resume --{breaker.scope} {breaker.name}"
        return Finding(breaker.scope, BY_OPERATOR, f"{subject}:{duration}, until an operator resumes it", advice)
    if (breaker.reason or "").startswith(NOT_LISTED):
        advice = (
            f"add {breaker.name} to SD_API_HOSTS and restart the worker, or cancel the job; "
            "otherwise the job expires at its deadline"
        )
        return Finding(breaker.scope, "held", f"{subject}:{duration}, {NOT_LISTED}", advice)
    until = breaker.until or breaker.probe_at
    wait = 0.0 if until is None else -context.seconds_since(until)
    next_try = (
        f"continues in {format_duration(wait)}" if breaker.until else f"is tried again in {format_duration(wait)}"
    )
    if wait < -HEALTHY_SECONDS:
        next_try = f"should have been tried again {format_duration(-wait)} ago"
        advice = f"{START_WORKER}: no process tries {subject} again"
    else:
        advice = _hold_advice(breaker, subject, variable, next_try)
    return Finding(
        breaker.scope,
        "held",
        f"{subject}:{duration}, {mask_personal_data(breaker.reason or '')}; it {next_try}",
        advice,
    )


def _hold_advice(breaker: CircuitBreaker, subject: str, variable: str, next_try: str) -> str:
    reason = breaker.reason or ""
    if breaker.scope == "host":
        return f"nothing on your side: {subject} does not answer; it {next_try}"
    if reason.startswith(REFUSALS["key"]):
        return f"put the right key into {variable}"
    if reason.startswith(REFUSALS["credits"]):
        return f"buy credits for {subject}, then fetch-worker resume --account {breaker.name}, or wait: it {next_try}"
    if reason.startswith(REFUSALS["plan"]):
        return f"check the plan of {subject} with the API's provider: it {next_try}"
    return f"nothing: {subject} {next_try}"


def _claim(context: JobContext) -> Finding:
    job = context.job
    if job.claim_token is None:
        return Finding("claim", "free", "no process has claimed it")
    return _claimed(context, "claim", job, "a request about it is in flight", START_WORKER)


def _claimed(context: JobContext, step: str, row: Row[Any], activity: str, start: str) -> Finding:
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
    if over > OVER_SECONDS or (holder_liveness == "dead" and not context.workers_poll):
        return Finding(step, "stuck", detail, f"{start}: it releases the claims of dead processes")
    if holder_liveness == "dead":
        return Finding(step, "stuck", detail, "nothing: the next sweep releases the claim within seconds")
    if holder_liveness == "unknown" and began is not None and context.now - began > longest:
        advice = f"fetch-worker resume {context.job.id}: no work takes this long, so the process must be dead"
        return Finding(step, "stuck", detail, advice)
    return Finding(step, "held", detail, f"nothing: {activity}")


def _rate_limit(context: JobContext, peek: BudgetStatus | None) -> Finding:
    breaker = context.breakers.get(("account", context.job.account))
    ceiling = (
        "" if breaker is None or breaker.ceiling is None else f", learned from the last refusal: {breaker.ceiling:.3g}"
    )
    configured = context.settings.rps(context.job.account)
    detail = f"{context.rate:g} requests per second allowed now, {configured:g} configured{ceiling}"
    if peek is None:
        return Finding(
            "budget", "unknown", f"{detail}; Redis is not reachable, so the number of free requests is unknown"
        )
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
    return f"{context.jobs_ahead:,} due job{'s' if context.jobs_ahead > 1 else ''}"


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


def _late_advice(context: JobContext, late: float) -> str:
    if late > HEALTHY_SECONDS and not context.workers_poll:
        return f"{START_WORKER}: no process polls"
    if context.jobs_ahead:
        return (
            f"nothing: {_jobs_ahead(context)} are ahead of it; "
            "to go faster, raise SD_API_RPS if the API allows it, or give the job a higher priority"
        )
    if late > HEALTHY_SECONDS:
        return "run fetch-worker doctor: other jobs are polled, and this one is not"
    return "nothing: it is polled next"


def _curve(context: JobContext) -> Finding:
    job, model = context.job, context.model
    waiting = PacedJob.at(
        context.now,
        submitted_at=job.submitted_at,
        not_ready_at=job.not_ready_at,
        eta=job.eta,
        eta_at=job.eta_at,
        deadline_at=job.deadline_at,
    )
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
        return Finding(
            "deadline", "ahead", f"in {format_duration(-over)}; the job can only expire on an answer after it"
        )
    return Finding(
        "deadline", "over", f"for {format_duration(over)}; the job expires on the next answer that is not ready"
    )


# ── outputs and webhooks ──────────────────────────────────────────────────────────────────────────────────────────────


def _promise(context: JobContext) -> Iterator[Finding]:
    promise = context.promise
    if promise is None:
        return
    links = _count(len(json.loads(promise.urls)), "link")
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


def _output(context: JobContext, output: Row[Any]) -> Finding:
    step = f"output {output.position}"
    host = attempt_host(output, renewable=can_be_asked(context.job.fetch_base, context.job.remote_id))
    attempts = _count(output.attempts, "attempt")
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
    claim = _claimed(context, step, output, "the download is running", START_DOWNLOADS)
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


def _on_done(context: JobContext) -> Iterator[Finding]:
    job = context.job
    if job.on_done is None or job.completed_at is None:
        return
    if job.told_at is not None:
        yield Finding("on_done", "sent", f"{job.on_done}, {format_duration(context.seconds_since(job.told_at))} ago")
    elif job.on_done_error is None:
        late = context.seconds_since(job.completed_at)
        advice = START_WORKER if late > LATE_EVENT_SECONDS else None
        yield Finding("on_done", "waits", f"for {format_duration(late)}", advice)
    else:
        wait = None if job.on_done_due_at is None else -context.seconds_since(job.on_done_due_at)
        next_try = "" if wait is None or wait < 0 else f"again in {format_duration(wait)}; "
        error = mask_personal_data(job.on_done_error)
        detail = f"{next_try}{job.on_done}, {_count(job.on_done_attempts, 'attempt')}; {error}"
        yield Finding("on_done", "refused", detail, "check the queue that on_done names, and the broker")


def _webhooks(context: JobContext) -> Iterator[Finding]:
    job = context.job
    start_sender = f"{START_WORKER} with WEBHOOK_SECRET set"
    if job.webhook_url is not None and job.completed_at is not None and job.announced_at is None:
        late = context.seconds_since(job.completed_at)
        advice = start_sender if late > LATE_EVENT_SECONDS else None
        yield Finding("webhook", "not made", f"for {format_duration(late)}", advice)
    for event in context.events:
        yield _webhook(context, event, link_host(event.url), start_sender)


def _webhook(context: JobContext, event: Row[Any], receiver: str, start_sender: str) -> Finding:
    error = "" if event.error_message is None else f"; {mask_personal_data(event.error_message)}"
    detail = f"{event.type} to {receiver}, {_count(event.attempts, 'attempt')}{error}"
    if event.status == "failed":
        advice = f"check the receiver {receiver}: every attempt for a day failed"
        return Finding("webhook", "given up", detail, advice)
    if event.status == "delivered":
        return Finding("webhook", "delivered", detail)
    late = context.seconds_since(event.due_at)
    if late > LATE_EVENT_SECONDS:
        return Finding("webhook", "late", f"due for {format_duration(late)}; {detail}", start_sender)
    if event.error_message is not None:
        advice = f"check the receiver {receiver}: the event is sent again in {format_duration(-late)}"
        return Finding("webhook", "refused", f"again in {format_duration(-late)}; {detail}", advice)
    return Finding("webhook", "on its way", detail)
