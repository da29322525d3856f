"""Why one job does not move: everything that has to be true until it does, with numbers, and what to do about it.

Each link of the chain says what it found; the first one that stands in the way gives the advice.
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
from worker.core.pacing.survival import OLDEST
from worker.core.redaction.masking import link_host, mask_personal_data
from worker.operations.overview import HEALTHY_SECONDS, AccountState, account_states
from worker.operations.snapshot import LATE_EVENT_SECONDS, OVER_SECONDS, attempt_host
from worker.polling.pace_learner import read_models
from worker.settings import Settings
from worker.store.breakers import all_breakers, last_asked
from worker.store.claims import DueGroup, due_groups
from worker.store.engine import database_now
from worker.store.holds import work_limits
from worker.store.promises import promise_row
from worker.store.reports.live import count_due_before
from worker.system.process_identity import liveness

AHEAD_MOST = 10_000
SOON_SECONDS = 60.0  # who waits longer than that is told how it goes on at once
CURVE_SECONDS = (0.0, 5.0, 15.0, 60.0, 300.0)  # from now
START_WORKER = "start a `worker` process"
START_DOWNLOADS = "start a `downloads` process"


@dataclass(frozen=True, slots=True)
class Step:
    """One link of the chain: what was looked at, how it stands in a word or two, and the numbers.

    `advice` is what to do about it; None where it does not stand in the way.
    """

    step: str
    state: str
    detail: str
    advice: str | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What the database knows of a job and of all that it depends on. `state` has the hold of its account, if any."""

    job: Row[Any]
    outputs: Sequence[Row[Any]]
    events: Sequence[Row[Any]]
    now: datetime
    state: AccountState
    breakers: Mapping[tuple[Scope, str], CircuitBreaker]
    model: PaceModel
    ahead: int
    asked: datetime | None
    settings: Settings
    promise: Row[Any] | None = None

    @property
    def trying(self) -> bool:
        """Whether its outputs are links that were promised, and that nobody listed."""
        return self.promise is not None and self.promise.end_status is not None

    @property
    def working(self) -> bool:
        """Whether any request was made lately."""
        return self.asked is not None and self.now - self.asked <= timedelta(seconds=HEALTHY_SECONDS)

    @property
    def rate(self) -> float:
        """The requests per second that its account may make."""
        return self.state.rps

    def since(self, moment: datetime) -> float:
        """The seconds since a moment; below zero where it is to come."""
        return (self.now - moment).total_seconds()


def read_facts(
    connection: Connection, job: Row[Any], outputs: Sequence[Row[Any]], events: Sequence[Row[Any]], settings: Settings
) -> Facts:
    """What the database knows of why a job is where it is."""
    now = database_now(connection)
    breakers = all_breakers(connection)
    levels = due_groups(connection, [job.account])
    waits = job.due_at is not None
    own = [DueGroup(job.account, job.priority, job.fetch_host, job.due_at)] if waits else []
    states = account_states(breakers, [*levels, *own], settings, now)
    state = next((one for one in states if one.account == job.account), None)
    return Facts(
        job=job,
        outputs=outputs,
        events=events,
        now=now,
        state=state or AccountState(job.account, None, None, None, settings.rps(job.account)),
        breakers=breakers,
        model=read_models(connection, [(job.account, job.kind)])[job.account, job.kind][0],
        ahead=count_due_before(connection, levels, job, now=now, most=AHEAD_MOST + 1) if waits else 0,
        asked=last_asked(connection),
        settings=settings,
        promise=promise_row(connection, job.id),
    )


def chain(facts: Facts, peek: BudgetStatus | None) -> tuple[list[Step], str]:
    """The chain of a job, and what to do. `peek` is its account's budget; None where Redis is away."""
    steps = [_job(facts)]
    if facts.job.due_at is not None:
        steps += _request(facts, peek)
    said = parse_history(facts.job.last_answer)
    if said:
        steps.append(Step("answers", f"{len(said)} kept", "; ".join(_answer(one.age, one.note) for one in said)))
    steps += _promise(facts)
    steps += [_output(facts, output) for output in facts.outputs]
    steps += _on_done(facts)
    steps += _webhooks(facts)
    return steps, next((step.advice for step in steps if step.advice is not None), _rest(facts))


def chain_with_budget(facts: Facts, budget: RateLimiter) -> tuple[list[Step], str]:
    """The chain of a job, and what to do. It looks into Redis, so after the transaction: no network inside of one."""
    peeks = budget.peek({facts.job.account: facts.rate}) if facts.job.due_at is not None else {}
    return chain(facts, peeks.get(facts.job.account))


def _rest(facts: Facts) -> str:
    return "nothing: all is stored" if facts.job.status == "completed" else "nothing: it goes on by itself"


def _answer(age: float | None, note: str) -> str:
    return mask_personal_data(note) if age is None else f"at {format_duration(age)}: {mask_personal_data(note)}"


def _times(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _job(facts: Facts) -> Step:
    job = facts.job
    asked = "" if job.asked_at is None else f", last {format_duration(facts.since(job.asked_at))} ago"
    age = format_duration(facts.since(job.submitted_at))
    detail = f"submitted {age} ago, {_times(job.polls, 'request')} about it{asked}"
    if job.ready_at is not None and not facts.trying:
        detail += f"; seen ready {format_duration(facts.since(job.ready_at))} ago"
    if job.completed_at is not None:
        detail += f"; {job.status} {format_duration(facts.since(job.completed_at))} ago"
    if job.error_code is not None:
        detail += f"; {job.error_code}: {mask_personal_data(job.error_message or '')}"
    return Step("job", job.status, detail, _final(facts) if job.status in FINAL_STATES else None)


def _final(facts: Facts) -> str | None:
    job = facts.job
    retry = f"fetch-worker retry {job.id}"
    match job.status:
        case "completed":
            return None
        case "cancelled":
            return "nothing: it was cancelled"
        case "expired":
            said = parse_history(job.last_answer)
            if said and said[0].note.startswith("unknown id"):
                return f"look at its remote id and account: the API knows no such job; {retry} asks again"
            return f"{retry}, if it may come late"
    codes = {output.error_code for output in facts.outputs if output.status == "failed"}
    if "refused_address" in codes:
        return f"{retry}, once OUTPUT_ALLOWED_NETWORKS has the network of that address, if it may be reached"
    return f"{retry}, with a larger OUTPUT_MAX_BYTES" if "too_large" in codes else retry


# ── the next request ──────────────────────────────────────────────────────────────────────────────────────────────────


def _request(facts: Facts, peek: BudgetStatus | None) -> Iterator[Step]:
    if facts.job.held_at is not None:
        held = format_duration(facts.since(facts.job.held_at))
        yield Step("hold", BY_OPERATOR, f"since {held}", f"fetch-worker resume {facts.job.id}")
    yield _account(facts)
    yield _host(facts)
    yield _claim(facts)
    yield _budget(facts, peek)
    yield _queue(facts)
    yield _poll(facts)
    if facts.job.status == "pending":
        yield _curve(facts)
        yield _deadline(facts)


def _account(facts: Facts) -> Step:
    name = facts.job.account
    breaker = facts.breakers.get(("account", name), CircuitBreaker("account", name))
    variable = _key_variable(facts, name)
    if breaker.held(facts.now):
        return _held(facts, breaker, f"account {name}", variable)
    if name not in facts.settings.keys and not breaker.proven:
        advice = f"put the key of account {name} into {variable}"
        return Step("account", "no key", f"{name} has none, as far as this command can see", advice)
    if breaker.proven:
        return Step("account", "open", f"{name}: its key was accepted")
    return Step("account", "open", f"{name}: its key was not accepted yet, so one call alone goes first")


def _key_variable(facts: Facts, account: str) -> str:
    """Where the key of an account is to be written, and what has to be done then."""
    if facts.settings.sd_api_keys_file:
        return f'the file SD_API_KEYS_FILE, as "{account}": it is read again by itself'
    variable = "SD_API_KEY" if account == "default" else f'SD_API_KEYS["{account}"]'
    return f"{variable} and restart the worker"


def _host(facts: Facts) -> Step:
    name = facts.job.fetch_host
    breaker = facts.breakers.get(("host", name), CircuitBreaker("host", name))
    if breaker.held(facts.now):
        return _held(facts, breaker, name, "")
    return Step(
        "host", "open", f"{name}: {breaker.troubles} calls in a row came to nothing" if breaker.troubles else name
    )


def _held(facts: Facts, breaker: CircuitBreaker, named: str, variable: str) -> Step:
    began = breaker.paused_at or breaker.since
    since = "" if began is None else f" since {format_duration(facts.since(began))}"
    if breaker.paused_at is not None:
        advice = f"fetch-worker resume --{breaker.scope} {breaker.name}"
        return Step(breaker.scope, BY_OPERATOR, f"{named}:{since}; whatever else is known of it", advice)
    if (breaker.reason or "").startswith(NOT_LISTED):
        advice = (
            f"add {breaker.name} to SD_API_HOSTS and restart the worker, or cancel the job: it ends by its deadline"
        )
        return Step(breaker.scope, "held", f"{named}:{since}, {NOT_LISTED}", advice)
    until = breaker.until or breaker.probe_at
    left = 0.0 if until is None else -facts.since(until)
    again = f"goes on in {format_duration(left)}" if breaker.until else f"is tried again in {format_duration(left)}"
    if left < -HEALTHY_SECONDS:
        again, advice = (
            f"was to be tried again {format_duration(-left)} ago",
            f"{START_WORKER}: nobody tries {named} again",
        )
    else:
        advice = _about(breaker, named, variable, again)
    return Step(
        breaker.scope, "held", f"{named}:{since}, {mask_personal_data(breaker.reason or '')}; it {again}", advice
    )


def _about(breaker: CircuitBreaker, named: str, variable: str, again: str) -> str:
    reason = breaker.reason or ""
    if breaker.scope == "host":
        return f"nothing here: {named} does not answer; it {again}"
    if reason.startswith(REFUSALS["key"]):
        return f"put the right key into {variable}"
    if reason.startswith(REFUSALS["credits"]):
        return f"buy credits for {named}, then fetch-worker resume --account {breaker.name}, or wait: it {again}"
    if reason.startswith(REFUSALS["plan"]):
        return f"look at the plan of {named}: it {again}"
    return f"nothing: {named} {again}"


def _claim(facts: Facts) -> Step:
    job = facts.job
    if job.claim_token is None:
        return Step("claim", "free", "no process has taken it")
    return _claimed(facts, "claim", job, "it is asked about now", START_WORKER)


def _claimed(facts: Facts, name: str, row: Row[Any], doing: str, start: str) -> Step:
    """A claim, of the job or of an output: whether anybody still works on it."""
    most = work_limits(facts.settings)
    began, longest = (row.asked_at, most.poll_max) if row is facts.job else (row.claimed_at, most.download_max)
    since = "" if began is None else f" since {format_duration(facts.since(began))}"
    life = liveness(row.claim_holder)
    known = {"runs": "which runs", "dead": "which is dead", "unknown": "of which this host knows nothing"}[life]
    over = facts.since(row.due_at)
    lease = (
        f"its lease ends in {format_duration(-over)}" if over < 0 else f"its lease is over for {format_duration(over)}"
    )
    detail = f"by {row.claim_holder}, {known},{since}; {lease}"
    if over > OVER_SECONDS or (life == "dead" and not facts.working):
        return Step(name, "stuck", detail, f"{start}: it takes up what a process that is gone has left")
    if life == "dead":
        return Step(name, "stuck", detail, "nothing: the next sweep gives it back within seconds")
    if life == "unknown" and began is not None and facts.now - began > longest:
        advice = f"fetch-worker resume {facts.job.id}: no work takes that long, so its process must be gone"
        return Step(name, "stuck", detail, advice)
    return Step(name, "held", detail, f"nothing: {doing}")


def _budget(facts: Facts, peek: BudgetStatus | None) -> Step:
    breaker = facts.breakers.get(("account", facts.job.account))
    ceiling = (
        ""
        if breaker is None or breaker.ceiling is None
        else f", the API took {breaker.ceiling:.3g} when it refused one"
    )
    detail = f"{facts.rate:g} requests per second in force of {facts.settings.rps(facts.job.account):g}{ceiling}"
    if peek is None:
        return Step("budget", "unknown", f"{detail}; unknown, Redis is away: what is left now")
    used = f"{peek.taken:.0f} were made in the last second"
    if peek.left:
        return Step("budget", "free", f"{detail}; {peek.left} could go out now, {used}")
    return Step("budget", "used up", f"{detail}; the next can go out in {peek.wait:.1f} s, {used}")


def _queue(facts: Facts) -> Step:
    if facts.job.held_at is not None:
        return Step("queue", "not in it", "held by an operator")
    if not facts.ahead:
        return Step("queue", "first", "no due job of its account goes before it")
    return Step("queue", "behind", f"before it: {_ahead(facts)} of its account")


def _ahead(facts: Facts) -> str:
    if facts.ahead > AHEAD_MOST:
        return f"more than {AHEAD_MOST:,} due jobs"
    return f"{facts.ahead:,} due job{'s' if facts.ahead > 1 else ''}"


def _poll(facts: Facts) -> Step:
    job = facts.job
    late = facts.since(job.due_at)
    if job.held_at is not None:
        return Step("poll", "never", "not before it is resumed")
    if late < 0:
        over = job.status == "pending" and job.deadline_at < facts.now
        ends = ", and ends then unless it is ready" if over else ""
        if over and -late > SOON_SECONDS:
            advice = f"fetch-worker resume {job.id} asks at once; else it is asked in {format_duration(-late)}{ends}"
            return Step("poll", "waits", f"in {format_duration(-late)}", advice)
        return Step(
            "poll", "waits", f"in {format_duration(-late)}", f"nothing: it is asked in {format_duration(-late)}{ends}"
        )
    return Step("poll", "due", f"for {format_duration(late)}", _about_late(facts, late))


def _about_late(facts: Facts, late: float) -> str:
    if late > HEALTHY_SECONDS and not facts.working:
        return f"{START_WORKER}: nobody asks"
    if facts.ahead:
        faster = "a higher SD_API_RPS, if the API takes it, or priority is faster"
        return f"nothing: it waits for {_ahead(facts)} before it; {faster}"
    if late > HEALTHY_SECONDS:
        return "fetch-worker doctor: others are asked about, and this one is not"
    return "nothing: it is asked next"


def _curve(facts: Facts) -> Step:
    job, model = facts.job, facts.model
    waiting = PacedJob.at(
        facts.now,
        submitted_at=job.submitted_at,
        not_ready_at=job.not_ready_at,
        eta=job.eta,
        eta_at=job.eta_at,
        deadline_at=job.deadline_at,
    )
    clock, _, _ = model.clock(waiting)
    if not clock.moments.count:
        return Step("curve", "unknown", "nothing is known of such jobs yet")
    chances = [
        f"{'now' if not ahead else f'in {ahead:.0f} s'} {model.chance(waiting, waiting.age + ahead):.0%}"
        for ahead in CURVE_SECONDS
    ]
    half, most = (model.quantile(waiting, share) - waiting.age for share in (0.5, 0.9))
    ends = f"half {_within(half)}, 90 % {_within(most)}"
    by = "age" if clock is model.by_age else "eta"
    return Step("curve", f"by {by}", f"ready {', '.join(chances)}; {ends}; of {clock.moments.count:.0f} such jobs")


def _within(seconds: float) -> str:
    return f"in {format_duration(seconds)}" if seconds < OLDEST else "never"


def _deadline(facts: Facts) -> Step:
    over = facts.since(facts.job.deadline_at)
    if over < 0:
        return Step("deadline", "ahead", f"in {format_duration(-over)}; only an answer after it can end the job")
    return Step(
        "deadline",
        "over",
        f"for {format_duration(over)}; it ends on the next answer that says it is not ready, not before",
    )


# ── outputs and webhooks ──────────────────────────────────────────────────────────────────────────────────────────────


def _promise(facts: Facts) -> Iterator[Step]:
    promise = facts.promise
    if promise is None:
        return
    links = _times(len(json.loads(promise.urls)), "link")
    if promise.tried_at is None:
        if facts.job.status == "pending":
            yield Step("promise", "kept", f"{links}; tried before the job ends without an output")
        return
    tried = (
        f"{links}, tried since {format_duration(facts.since(promise.tried_at))} because the API promised output there"
    )
    if promise.end_status is None:
        yield Step("promise", "stored", f"{links}: output came from where the API promised it")
    elif facts.job.status == "downloading":
        end = f"if nothing comes, the job ends as {promise.end_code}: {mask_personal_data(promise.end_message or '')}"
        yield Step("promise", "tried", f"{tried}; {end}")
    else:
        yield Step("promise", "dead", f"{links}: nothing came from where the API promised output")


def _output(facts: Facts, output: Row[Any]) -> Step:
    name = f"output {output.position}"
    host = attempt_host(output, renewable=can_be_asked(facts.job.fetch_base, facts.job.remote_id))
    tried = _times(output.attempts, "attempt")
    if output.status == "stored":
        return Step(name, "stored", f"{format_bytes(output.size_bytes)} {output.media_type}, {tried}, from {host}")
    last = (
        "" if output.error_code is None else f"; {output.error_code}: {mask_personal_data(output.error_message or '')}"
    )
    link = f"link of {host}, {format_duration(facts.since(output.listed_at))} old"
    link += ", asked for afresh" if output.renewed else ""
    if output.status == "failed":
        return Step(name, "failed", f"{tried}, {link}{last}")
    if output.claim_token is not None:
        return _receiving(facts, output, f"{tried}, {link}{last}", name)
    due = -facts.since(output.due_at)
    again = f"again in {format_duration(due)}" if due > 0 else f"due for {format_duration(-due)}"
    state = "waits" if output.error_code is None else output.error_code
    return Step(name, state, f"{again}, {tried}, {link}{last}", _about_output(facts, output, host, due))


def _receiving(facts: Facts, output: Row[Any], detail: str, name: str) -> Step:
    step = _claimed(facts, name, output, "it is being received", START_DOWNLOADS)
    so_far = "" if output.received_bytes is None else f"{format_bytes(output.received_bytes)} so far, "
    state = "receiving" if step.state == "held" else step.state
    return Step(name, state, f"{so_far}{step.detail}; {detail}", step.advice)


def _about_output(facts: Facts, output: Row[Any], host: str, due: float) -> str:
    again = f"tried again in {format_duration(due)}"
    if due < -HEALTHY_SECONDS:
        return f"{START_DOWNLOADS}: output {output.position} is due for {format_duration(-due)} and nobody fetches it"
    match output.error_code:
        case None:
            return "nothing: it is fetched next"
        case "storage":
            return f"put the storage right (STORAGE_URL), or make room: {again}"
        case _ if facts.trying:
            left = PROMISE_PATIENCE.total_seconds() - facts.since(output.listed_at)
            return f"nothing: {again}, since the API promised it" + (
                f"; for {format_duration(left)} more" if left > 0 else ""
            )
        case "unreachable" | "http_error":
            left = facts.settings.output_deadline - facts.since(output.listed_at)
            ends = (
                f"until OUTPUT_DEADLINE in {format_duration(left)}"
                if left > 0
                else "for the last time: OUTPUT_DEADLINE is over"
            )
            sooner = f"; once it does, fetch-worker resume {facts.job.id} tries at once" if due > SOON_SECONDS else ""
            return f"nothing here: {host} does not give it; {again}, {ends}{sooner}"
        case "gone" if facts.job.due_at is not None:
            return "nothing: the API is asked for a fresh link"
        case _:
            return f"nothing: {again}"


def _on_done(facts: Facts) -> Iterator[Step]:
    job = facts.job
    if job.on_done is None or job.completed_at is None:
        return
    if job.told_at is not None:
        yield Step("on_done", "sent", f"{job.on_done}, {format_duration(facts.since(job.told_at))} ago")
    elif job.on_done_error is None:
        waits = facts.since(job.completed_at)
        yield Step(
            "on_done", "waits", f"for {format_duration(waits)}", START_WORKER if waits > LATE_EVENT_SECONDS else None
        )
    else:
        again = None if job.on_done_due_at is None else -facts.since(job.on_done_due_at)
        when = "" if again is None or again < 0 else f"again in {format_duration(again)}; "
        detail = (
            f"{when}{job.on_done}, {_times(job.on_done_attempts, 'attempt')}; {mask_personal_data(job.on_done_error)}"
        )
        yield Step("on_done", "refused", detail, "look at the queue that on_done names, and at the broker")


def _webhooks(facts: Facts) -> Iterator[Step]:
    job = facts.job
    secret = f"{START_WORKER} that has WEBHOOK_SECRET"
    if job.webhook_url is not None and job.completed_at is not None and job.announced_at is None:
        waits = facts.since(job.completed_at)
        yield Step(
            "webhook", "not made", f"for {format_duration(waits)}", secret if waits > LATE_EVENT_SECONDS else None
        )
    for event in facts.events:
        yield _webhook(facts, event, link_host(event.url), secret)


def _webhook(facts: Facts, event: Row[Any], receiver: str, secret: str) -> Step:
    met = "" if event.error_message is None else f"; {mask_personal_data(event.error_message)}"
    detail = f"{event.type} to {receiver}, {_times(event.attempts, 'attempt')}{met}"
    if event.status == "failed":
        return Step("webhook", "given up", detail, f"look at the receiver {receiver}: it was told in vain for a day")
    if event.status == "delivered":
        return Step("webhook", "delivered", detail)
    late = facts.since(event.due_at)
    if late > LATE_EVENT_SECONDS:
        return Step("webhook", "late", f"due for {format_duration(late)}; {detail}", secret)
    if event.error_message is not None:
        advice = f"look at the receiver {receiver}: it is told again in {format_duration(-late)}"
        return Step("webhook", "refused", f"again in {format_duration(-late)}; {detail}", advice)
    return Step("webhook", "on its way", detail)
