"""Troubles: what is wrong now, in one sentence each, with the jobs concerned and the command that repairs it.

This is the only place that decides so. `status`, `doctor`, `top`, the admin page, the metrics and the alerts show this
list. It comes from the database alone, so everyone sees the same.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row

from worker.core.circuit_breaker import BY_OPERATOR, NO_SUCH_PATH, NOT_LISTED, REFUSALS
from worker.core.humanize import format_count, format_duration
from worker.core.lifecycle import STORAGE_WAIT
from worker.core.redaction.masking import mask_personal_data
from worker.operations.late_webhooks import LateWebhook, late_webhooks
from worker.operations.lost_work import dead_claim_holders, lost_claims, overdue_jobs
from worker.operations.remedies import (
    DOCTOR,
    MAX_NAMED,
    UP,
    Remedy,
    advice,
    for_filter,
    for_hold,
    for_jobs,
    for_missing_key,
)
from worker.operations.unstored import UnstoredByHost, UnstoredOutputs, read_unstored
from worker.settings import Settings
from worker.store.events import undelivered_events
from worker.store.on_done import GIVE_UP, refused_calls, unsent_calls
from worker.store.reports.order_state import WaitingOrders, uncertain_orders
from worker.store.reports.snapshot_rows import COUNTED_MOST, count_in_state, count_late
from worker.store.reports.work_state import HEALTHY_SECONDS, NO_KEY, AccountState, WorkState, read_work_state

# The codes, worst first, with what each means. The manual and the metrics have the same list.
CODES = {
    "no_worker": "Jobs are due and no worker process runs.",
    "polling_stalled": "Jobs are due, a worker process runs, and no request was made lately.",
    "account_refused": "The API refuses the key, the credits or the plan of an account.",
    "no_key": "No running worker process has the key of an account with jobs.",
    "uncertain_orders": "Orders were sent and their answer is lost: a person must decide.",
    "storage": "Outputs can't be written to the storage.",
    "no_downloader": "Outputs wait and no process downloads.",
    "links_ending": "Outputs are not stored and their links end soon.",
    "webhooks_refused": "A receiver refuses webhooks.",
    "webhooks_given_up": "Webhooks were given up in the last day.",
    "webhooks_late": "Webhooks are due and no process sends them.",
    "on_done_refused": "The broker refuses `on_done` messages.",
    "on_done_late": "`on_done` messages are due and no process sends them.",
    "wrong_path": "The API does not know the path in SD_API_URL.",
    "host_not_allowed": "Jobs belong to a host that is not on SD_API_HOSTS.",
    "api_unreachable": "A host of the API does not answer.",
    "outputs_unreachable": "Outputs can't be downloaded from a host.",
    "lost_claims": "Rows are claimed by processes that are dead or hang.",
    "past_deadline": "Jobs are past their deadline and not polled soon.",
    "redis_away": "Worker processes can't reach Redis.",
    "backlog": "More jobs are due than the rate limit of an account lets through.",
    "account_slowed": "The API accepts fewer requests of an account than configured.",
    "held_by_operator": "An operator holds an account or a host.",
}
UNSTORED_LATE_SECONDS = 60.0  # a running process begins a download within seconds
UNREACHABLE_LATE_SECONDS = 60.0  # of failed attempts at a host
LINKS_END_SHARE = 0.5  # of OUTPUT_DEADLINE: then a person should look
BACKLOG_LATE_SECONDS = 5.0  # jobs that are due for less are not late
BACKLOG_SECONDS = 30.0  # the time to catch up from which a backlog is worth a line
SLOWED_SHARE = 0.8  # of the configured rate
UNSENT_LATE_SECONDS = 60.0  # `on_done` messages are sent within seconds
STALE_SECONDS = 10.0  # claims of ended leases are released, or claimed anew, within seconds


@dataclass(frozen=True, slots=True)
class Trouble:
    """One trouble: a code of `CODES`, one sentence, what repairs it, the jobs concerned, and its start.

    `jobs` counts jobs, outputs or messages. It stops at 10,001.
    """

    code: str
    text: str
    remedy: Remedy
    jobs: int
    since: datetime | None

    @property
    def command(self) -> str:
        """The command line that repairs it, or the setting to change."""
        return self.remedy.text

    def document(self) -> dict[str, Any]:
        """Return the trouble as a JSON document shows it."""
        names = ("code", "text", "command", "jobs", "since")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the troubles are decided from. Whoever shows it beside the troubles reads it only once.

    `dead_holders` are the dead processes that hold claims. `overdue` is empty if too many jobs are pending to check
    each of them.
    """

    work: WorkState
    unstored: UnstoredOutputs
    webhooks: Sequence[LateWebhook]
    dead_holders: Collection[str]
    overdue: Sequence[Row[Any]]


def read_evidence(connection: Connection, settings: Settings) -> Evidence:
    """Read what the troubles are decided from."""
    work = read_work_state(connection, settings.rps, settings.slots)
    pending = count_in_state(connection, "pending")
    return Evidence(
        work=work,
        unstored=read_unstored(connection, work.now),
        webhooks=late_webhooks(connection, work.now),
        dead_holders=dead_claim_holders(connection, work),
        overdue=overdue_jobs(connection, pending, work.now, limit=COUNTED_MOST) or (),
    )


def read_troubles(connection: Connection, settings: Settings, evidence: Evidence) -> list[Trouble]:
    """Return the troubles, worst first. Some are read from the database now."""
    work = evidence.work
    places = {code: place for place, code in enumerate(CODES)}
    troubles = [
        *_polling(connection, work),
        *_accounts(connection, work),
        *_hosts(connection, work),
        *_uncertain_orders(connection, work),
        *_outputs(settings, work, evidence.unstored),
        *_webhooks(connection, work, evidence.webhooks),
        *_on_done(connection, work),
        *_lost_work(connection, settings, evidence),
        *_redis(work),
    ]
    return sorted(troubles, key=lambda trouble: (places[trouble.code], -trouble.jobs, trouble.text))


def count_by_code(troubles: Iterable[Trouble]) -> dict[str, int]:
    """Return the number of troubles of each code, zeros included."""
    return dict.fromkeys(CODES, 0) | Counter(trouble.code for trouble in troubles)


def count_jobs_by_code(troubles: Iterable[Trouble]) -> dict[str, int]:
    """Return the number of jobs that the troubles of each code concern, zeros included."""
    counts = dict.fromkeys(CODES, 0)
    for trouble in troubles:
        counts[trouble.code] += trouble.jobs
    return counts


def _polling(connection: Connection, work: WorkState) -> Iterator[Trouble]:
    """Yield the trouble of due jobs that nobody polls, or whose orders nobody sends."""
    if not work.due_work:
        return
    since = min(group.due_at for group in work.due_work)
    late = (work.now - since).total_seconds()
    if work.workers_poll or (late <= HEALTHY_SECONDS and work.pollers):
        return
    if not work.pollers and late <= BACKLOG_LATE_SECONDS:
        return
    jobs = count_late(connection, work.due, before=work.now) + _count(work.due_orders)
    waiting = f"{_jobs(jobs)} due, the oldest for {format_duration(late)}"
    if work.pollers:
        text = f"{waiting}: a worker process runs, but made no request for {_last_request(work)}"
        yield Trouble("polling_stalled", text, DOCTOR, jobs, since)
    else:
        yield Trouble("no_worker", f"{waiting}: no worker process runs", UP, jobs, since)


def _count(orders: Iterable[WaitingOrders]) -> int:
    return sum(group.count for group in orders)


def _last_request(work: WorkState) -> str:
    if work.last_request_at is None:
        return "as long as it runs"
    return format_duration((work.now - work.last_request_at).total_seconds())


def _accounts(connection: Connection, work: WorkState) -> Iterator[Trouble]:
    for account in work.accounts:
        if account.reason is not None:
            groups = [group for group in work.groups if group.account == account.account]
            ordered = _count(group for group in work.orders.waiting if group.account == account.account)
            yield from _held_account(account, count_late(connection, groups, before=work.now) + ordered, work)
        elif work.pollers or work.workers_poll:
            yield from _slow_account(connection, account, work)


def _held_account(account: AccountState, jobs: int, work: WorkState) -> Iterator[Trouble]:
    name, reason = account.account, mask_personal_data(account.reason or "")
    remedy = for_hold("account", name, account.reason or "")
    text = f"{_jobs(jobs)} of {name}: {reason}, for {_age(account.since, work)}"
    if account.reason == BY_OPERATOR:
        yield Trouble("held_by_operator", text, remedy, jobs, account.since)
    elif account.reason_class == NO_KEY:
        yield Trouble("no_key", text, for_missing_key(name), jobs, account.since)
    elif account.reason_class in REFUSALS.values():
        yield Trouble("account_refused", text, remedy, jobs, account.since)


def _slow_account(connection: Connection, account: AccountState, work: WorkState) -> Iterator[Trouble]:
    late_before = work.now - timedelta(seconds=BACKLOG_LATE_SECONDS)
    due = [group for group in work.due if group.account == account.account]
    jobs = count_late(connection, due, before=late_before)
    rate = max(account.rps, 1e-3)
    slowed = account.ceiling is not None and account.rps < SLOWED_SHARE * account.configured
    limits = f"{account.rps:g} requests per second"
    if slowed:
        limits += f", of {account.configured:g} configured"
    if jobs / rate > BACKLOG_SECONDS:
        since = min(group.due_at for group in due)
        catch_up = f"{format_duration(jobs / rate)} to catch up"
        text = f"{_jobs(jobs)} of {account.account} are late: the limit is {limits}, {catch_up}"
        yield Trouble("backlog", text, advice("raise SD_API_RPS if the API allows it"), jobs, since)
    if slowed:
        breaker = work.breakers.get(("account", account.account))
        text = f"{account.account}: the API refused requests, so {limits} are sent; the rate rises again slowly"
        remedy = advice(f"SD_API_RPS={account.ceiling or account.rps:.3g}, if this is the limit of the plan")
        yield Trouble("account_slowed", text, remedy, jobs, None if breaker is None else breaker.cut_at)


def _hosts(connection: Connection, work: WorkState) -> Iterator[Trouble]:
    for host in work.hosts:
        groups = [group for group in work.groups if group.host == host.host]
        ordered = _count(group for group in work.orders.waiting if group.host == host.host)
        jobs = count_late(connection, groups, before=work.now) + ordered
        reason = mask_personal_data(host.reason)
        text = f"{_jobs(jobs)} of {host.host}: {reason}, for {_age(host.since, work)}"
        if host.reason == BY_OPERATOR:
            code = "held_by_operator"
        elif host.reason.startswith(NOT_LISTED):
            code = "host_not_allowed"
        elif NO_SUCH_PATH in host.reason:
            code = "wrong_path"
        else:
            code = "api_unreachable"
        yield Trouble(code, text, for_hold("host", host.host, host.reason), jobs, host.since)


def _uncertain_orders(connection: Connection, work: WorkState) -> Iterator[Trouble]:
    uncertain = uncertain_orders(connection)
    if uncertain.count:
        age = _age(uncertain.since, work)
        text = f"{_jobs(uncertain.count)} uncertain: the order was sent and its answer is lost, the first {age} ago"
        remedy = for_filter("list", "status", "uncertain")
        yield Trouble("uncertain_orders", text, remedy, uncertain.count, uncertain.since)


def _outputs(settings: Settings, work: WorkState, unstored: UnstoredOutputs) -> Iterator[Trouble]:
    """Yield the troubles of outputs that are not stored."""
    if not unstored.count:
        return
    oldest_at = work.now - timedelta(seconds=unstored.oldest_seconds)
    age = format_duration(unstored.oldest_seconds)
    waiting = f"{format_count(unstored.count, 'output')} not stored, the oldest for {age}"
    if count := unstored.trouble.get("storage", 0):
        text = (
            f"{format_count(count, 'output')} can't be written: {mask_personal_data(unstored.storage or 'unknown')}; "
            f"tried again every {STORAGE_WAIT:g} s, none is lost"
        )
        remedy = for_filter("resume", "output-code", "storage")
        yield Trouble("storage", text, remedy, count, _oldest(unstored, work))
    if not work.downloaders and unstored.oldest_seconds > UNSTORED_LATE_SECONDS:
        yield Trouble("no_downloader", f"{waiting}: no process downloads", UP, unstored.count, oldest_at)
    if unstored.oldest_seconds > LINKS_END_SHARE * settings.output_deadline:
        text = f"{waiting}; outputs are given up after {format_duration(settings.output_deadline)}"
        remedy = for_filter("list", "status", "downloading")
        yield Trouble("links_ending", text, remedy, unstored.count, oldest_at)
    for group in unstored.groups:
        if group.code not in (None, "storage") and group.oldest_seconds > UNREACHABLE_LATE_SECONDS:
            yield _unreachable_outputs(group, work)


def _unreachable_outputs(group: UnstoredByHost, work: WorkState) -> Trouble:
    text = (
        f"{format_count(group.count, 'output')} from {group.host}: {group.code}, {group.message}; "
        f"the oldest waits for {format_duration(group.oldest_seconds)}"
    )
    since = work.now - timedelta(seconds=group.oldest_seconds)
    remedy = for_filter("resume", "output-code", group.code or "")
    return Trouble("outputs_unreachable", text, remedy, group.count, since)


def _oldest(unstored: UnstoredOutputs, work: WorkState) -> datetime:
    seconds = max((group.oldest_seconds for group in unstored.groups if group.code == "storage"), default=0.0)
    return work.now - timedelta(seconds=seconds)


def _webhooks(connection: Connection, work: WorkState, webhooks: Iterable[LateWebhook]) -> Iterator[Trouble]:
    for webhook in webhooks:
        since = work.now - timedelta(seconds=webhook.late_seconds)
        waiting = f"{format_count(webhook.count, 'webhook')} for {webhook.receiver}"
        late = f"the oldest for {format_duration(webhook.late_seconds)}"
        if webhook.attempts and webhook.message:
            text = f"{waiting} refused: {webhook.message}, {late}"
            yield Trouble("webhooks_refused", text, for_jobs("notify", [webhook.job_id]), webhook.count, since)
        else:
            text = f"{waiting} not sent, {late}: a worker process with WEBHOOK_SECRET must run"
            yield Trouble("webhooks_late", text, UP, webhook.count, since)

    given_up = undelivered_events(connection, since=work.now - timedelta(days=1))
    if given_up.given_up:
        text = f"{format_count(given_up.given_up, 'webhook')} given up in the last day: {given_up.message}"
        yield Trouble("webhooks_given_up", text, for_filter("list", "status", "completed"), given_up.given_up, None)


def _on_done(connection: Connection, work: WorkState) -> Iterator[Trouble]:
    refused = refused_calls(connection, now=work.now)
    if refused.job_id is not None:
        text = (
            f"{format_count(refused.waiting + refused.given_up, '`on_done` message')} refused by the broker, for "
            f"example {refused.on_done} of job {refused.job_id}: {refused.reason}; tried again for {GIVE_UP.days} days"
        )
        remedy = for_jobs("show", [refused.job_id])
        yield Trouble("on_done_refused", text, remedy, refused.waiting + refused.given_up, None)
    late = unsent_calls(connection, before=work.now - timedelta(seconds=UNSENT_LATE_SECONDS))
    if late:
        text = f"{format_count(late, '`on_done` message')} not sent for more than a minute"
        yield Trouble("on_done_late", text, UP, late, None)


def _lost_work(connection: Connection, settings: Settings, evidence: Evidence) -> Iterator[Trouble]:
    now, dead, rows = evidence.work.now, evidence.dead_holders, evidence.overdue
    claims = lost_claims(connection, settings, now, grace=STALE_SECONDS, dead=dead)
    if claims:
        text = f"{format_count(len(claims), 'row')} claimed, and the process that has the claim is dead or hangs"
        job_ids = [claim.job_id for claim in claims if claim.what != "order"]  # a sweep releases orders
        remedy = for_jobs("resume", job_ids) if job_ids else DOCTOR
        yield Trouble("lost_claims", text, remedy, len(claims), claims[0].until)
    if rows:
        text = f"{_jobs(len(rows))} past the deadline and not polled soon"
        remedy = for_jobs("resume", (row.id for row in rows))
        yield Trouble("past_deadline", text, remedy, len(rows), rows[0].deadline_at)


def _redis(work: WorkState) -> Iterator[Trouble]:
    cut_off = [process for process in work.running() if not process.redis_answers]
    if cut_off:
        names = ", ".join(process.name for process in cut_off[:MAX_NAMED])
        text = f"Redis does not answer {names}: polling goes on with a share of the rate limit"
        yield Trouble("redis_away", text, DOCTOR, 0, None)


def _age(since: datetime | None, work: WorkState) -> str:
    return format_duration(0.0 if since is None else (work.now - since).total_seconds())


def _jobs(count: int) -> str:
    return f"more than {COUNTED_MOST:,} jobs" if count > COUNTED_MOST else format_count(count, "job")
