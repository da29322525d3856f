"""Record the results of polls and download attempts. A result is only written while its claim is valid."""

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple, cast

from sqlalchemy import Connection, delete, select, update

from worker.core.answer_history import format_note
from worker.core.lifecycle import (
    PROMISE_CODES,
    AskAgain,
    EndJob,
    GiveUp,
    JobDecision,
    KeepLinks,
    RenewLinks,
    StartDownloads,
    StoredFile,
    TryAgain,
    left_out_note,
)
from worker.core.media.link_kinds import may_replace
from worker.core.pacing.policy import PollPlan
from worker.core.reply import Link
from worker.store.bulk_write import update_claimed_jobs
from worker.store.claims import ClaimedJob, ClaimedOutput
from worker.store.counters import Tally
from worker.store.jobs import finish_job_if_done
from worker.store.new_outputs import insert_outputs
from worker.store.promises import PromisedEnd, delete_promises, promised_links, save_promises, try_promises
from worker.store.schema import bodies, jobs, outputs
from worker.store.transitions import NO_CLAIM, output_failed

log = logging.getLogger(__name__)

RENEWAL_WAIT = timedelta(hours=1)  # how long an output waits for a fresh link before the old link is tried again


class Outcome(NamedTuple):
    """The next step of a job after an answer. `plan` has the time of the next poll, if there is one."""

    job: ClaimedJob
    step: JobDecision
    note: str
    plan: PollPlan = PollPlan(0.0)
    not_ready: bool = False
    eta: float | None = None  # a new ETA, if the answer had one
    delay: float | None = None  # estimated seconds between ready and seen, if the job is ready
    promised: tuple[str, ...] = ()  # links that the answer promised, if they should be saved


@dataclass(frozen=True, slots=True)
class Recorded:
    """The outputs to queue, the jobs that became final, and the number of answers whose claim was lost."""

    outputs: tuple[int, ...]
    finished: tuple[int, ...]
    lost: int


def record_answers(connection: Connection, batch: Sequence[Outcome], tally: Tally, *, now: datetime) -> Recorded:
    """Record a batch of answers, with one statement per kind of step. An answer whose claim was lost changes nothing.

    The results are counted in `tally`. The caller writes it as the last step of the transaction.
    """
    by_kind: defaultdict[type[Any], list[Outcome]] = defaultdict(list)
    for outcome in batch:
        by_kind[type(outcome.step)].append(outcome)
    rescheduled = _ask_again(connection, by_kind[AskAgain], now)
    queue, empty, delivered = _deliver(connection, by_kind[StartDownloads], tally, now)
    promised = _promised(connection, by_kind[EndJob])
    tried, trying = _try_promised(connection, by_kind[EndJob], promised, tally, now)
    ended = _end(connection, [outcome for outcome in by_kind[EndJob] if outcome.job.id not in promised], tally, now)
    fresh, renewed = _renew(connection, by_kind[RenewLinks] + by_kind[KeepLinks], now)
    written = rescheduled + delivered + trying + len(ended) + renewed
    return Recorded((*queue, *tried, *fresh), (*empty, *ended), len(batch) - written)


def _row(outcome: Outcome, now: datetime, **values: Any) -> dict[str, Any]:
    job = outcome.job
    age = (now - job.submitted_at).total_seconds()
    values |= {"id": job.id, "claim_token": job.token, "last_answer": format_note(age, outcome.note)}
    return values


def _ask_again(connection: Connection, batch: Sequence[Outcome], now: datetime) -> int:
    """Schedule the next polls. Rows are grouped by the columns that change, because fewer columns cost less.

    Nearly all rows are in one group.
    """
    now_seconds = now.timestamp()
    groups: defaultdict[tuple[bool, bool, bool], list[dict[str, Any]]] = defaultdict(list)
    for outcome in batch:
        plan = outcome.plan
        row = _row(
            outcome,
            now,
            due_at=now_seconds + plan.wait,
            pace_scale=None if plan.scale is None else round(plan.scale, 3),
            pace_growth=None if plan.growth is None else round(plan.growth, 3),
        )
        strikes = cast("AskAgain", outcome.step).strikes
        previous_strikes = outcome.job.facts.strikes
        strikes_changed = strikes is not previous_strikes and strikes != previous_strikes
        if strikes_changed:
            row |= {
                "failed_answers": strikes.failed,
                "unknown_answers": strikes.unknown,
                "error_answers": strikes.error,
                "empty_answers": strikes.empty,
                "struck_at": strikes.last,
            }
        if outcome.eta is not None:
            row |= {"eta": outcome.eta, "eta_at": now}
        groups[strikes_changed, outcome.eta is not None, outcome.not_ready].append(row)
    written = [
        update_claimed_jobs(connection, rows, now=now, asked_at=now, **({"not_ready_at": now} if not_ready else {}))
        for (_, _, not_ready), rows in groups.items()
    ]
    promised = {outcome.job.id: outcome.promised for outcome in batch if outcome.promised}
    if promised:
        save_promises(connection, {job_id: promised[job_id] for ids in written for job_id in ids & promised.keys()})
    return sum(map(len, written))


def _deliver(
    connection: Connection, batch: Sequence[Outcome], tally: Tally, now: datetime
) -> tuple[list[int], list[int], int]:
    """Record ready jobs. Return the new outputs, the jobs that completed without outputs, and the number of jobs."""
    steps = {outcome.job.id: cast("StartDownloads", outcome.step) for outcome in batch}
    links_by_job = {job_id: step.outputs for job_id, step in steps.items()}
    notes = {job_id: left_out_note(len(step.outputs), step.left_out) for job_id, step in steps.items() if step.left_out}
    rows = [
        _row(
            outcome,
            now,
            status="downloading" if links_by_job[outcome.job.id] else "completed",
            completed_at=None if links_by_job[outcome.job.id] else now,
            **(
                {"error_message": notes.get(outcome.job.id)} if notes else {}
            ),  # rarely needed; one column less to write
        )
        for outcome in batch
    ]
    written = update_claimed_jobs(connection, rows, now=now, due_at=None, ready_at=now)
    ready = [(job_id, links) for job_id, links in links_by_job.items() if job_id in written and links]
    empty = [job_id for job_id, links in links_by_job.items() if job_id in written and not links]
    for outcome in batch:
        job = outcome.job
        if job.id in written:
            tally.polled(job.account, job.kind, job.polls)
            if outcome.delay is not None:
                tally.delay(job.account, job.kind, outcome.delay)
            if not links_by_job[job.id]:
                tally.finished(job.account, job.kind, "completed")
            if job.id in notes:
                tally.left_out(job.account, steps[job.id].left_out)
    delete_promises(connection, written)
    return insert_outputs(connection, ready, now=now, queued=True), empty, len(written)


def _end(connection: Connection, batch: Sequence[Outcome], tally: Tally, now: datetime) -> list[int]:
    rows = []
    for outcome in batch:
        step = cast("EndJob", outcome.step)
        rows.append(_row(outcome, now, status=step.status, error_code=step.code, error_message=step.message))
    written = update_claimed_jobs(connection, rows, now=now, due_at=None, completed_at=now)
    for outcome in batch:
        job = outcome.job
        if job.id in written:
            tally.polled(job.account, job.kind, job.polls)
            tally.finished(job.account, job.kind, cast("EndJob", outcome.step).status)
    return sorted(written)


def _promised(connection: Connection, batch: Sequence[Outcome]) -> dict[int, tuple[str, ...]]:
    """Return the promised links of jobs that would end without an output, by job id."""
    outcomes = [outcome for outcome in batch if cast("EndJob", outcome.step).code in PROMISE_CODES]
    new_links = {outcome.job.id: outcome.promised for outcome in outcomes if outcome.promised}
    return promised_links(connection, [outcome.job.id for outcome in outcomes if not outcome.promised]) | new_links


def _try_promised(
    connection: Connection,
    batch: Sequence[Outcome],
    promised: Mapping[int, tuple[str, ...]],
    tally: Tally,
    now: datetime,
) -> tuple[list[int], int]:
    """Start to try promised links before their jobs end. Return the new outputs and the number of jobs."""
    outcomes = [outcome for outcome in batch if outcome.job.id in promised]
    rows = [_row(outcome, now, status="downloading") for outcome in outcomes]
    written = update_claimed_jobs(connection, rows, now=now, due_at=None, ready_at=now)
    ends = []
    for outcome in outcomes:
        job = outcome.job
        if job.id in written:
            tally.polled(job.account, job.kind, job.polls)
            ends.append(PromisedEnd(job.id, cast("EndJob", outcome.step), promised[job.id]))
    return try_promises(connection, ends, now=now, queued=True), len(written)


def _renew(connection: Connection, batch: Sequence[Outcome], now: datetime) -> tuple[list[int], int]:
    """Give the unstored outputs of jobs their fresh links, by position, and set them off at once.

    Where a fresh link is of another kind than the old one, the answer is about another job, and all links stay.
    """
    written = update_claimed_jobs(connection, [_row(outcome, now) for outcome in batch], now=now, due_at=None)
    links = {
        outcome.job.id: outcome.step.outputs if isinstance(outcome.step, RenewLinks) else ()
        for outcome in batch
        if outcome.job.id in written
    }
    if not links:
        return [], 0
    waiting = connection.execute(
        select(outputs.c.id, outputs.c.job_id, outputs.c.position, outputs.c.url)
        .where(
            outputs.c.job_id.in_(links),
            outputs.c.status == "pending",
            outputs.c.renewed,
            outputs.c.claim_token.is_(None),
        )
        .order_by(outputs.c.id)
    ).all()
    for job_id in {row.job_id for row in waiting if not _may_replace(links[row.job_id], row)}:
        log.warning("fresh links lead to another kind of media, the old ones are kept job=%s", job_id)
        links[job_id] = ()
    for row in waiting:
        job_links = links[row.job_id]
        values: dict[str, Any] = {"due_at": now, "queued_at": now}
        if row.position < len(job_links) and job_links[row.position].body is None:
            link = job_links[row.position]
            values |= {"url": link.url, "proxy_urls": json.dumps(link.proxies, ensure_ascii=False)}
        connection.execute(update(outputs).where(outputs.c.id == row.id).values(values))
    return [row.id for row in waiting], len(written)


def _may_replace(fresh: Sequence[Link], output: Any) -> bool:
    return output.position >= len(fresh) or may_replace(fresh[output.position].url, output.url)


def quarantine(connection: Connection, job: ClaimedJob, message: str, *, now: datetime) -> bool:
    """End a job whose answer can't be written, so that it does not make every batch fail."""
    step, tally = EndJob("failed", "unwritable", message), Tally()
    recorded = record_answers(connection, [Outcome(job, step, "unwritable answer")], tally, now=now)
    tally.write(connection)
    return bool(recorded.finished)


def jobs_locked_elsewhere(connection: Connection, job_ids: Sequence[int]) -> set[int]:
    """Return the jobs that other transactions have locked. The result is empty on SQLite, which has no row locks."""
    with_these_ids = jobs.c.id.in_(job_ids)
    existing = set(connection.execute(select(jobs.c.id).where(with_these_ids)).scalars())
    not_locked = select(jobs.c.id).where(with_these_ids).with_for_update(skip_locked=True)
    return existing.difference(connection.execute(not_locked).scalars())


def record_attempt(
    connection: Connection, output: ClaimedOutput, result: StoredFile | TryAgain | GiveUp, *, now: datetime
) -> tuple[bool, str | None]:
    """Record a download attempt. Return whether the claim was valid, and the job's final state if the job ended."""
    # All transactions lock the job before its outputs. Otherwise this could deadlock with `cancel`.
    locked = select(jobs.c.status).where(jobs.c.id == output.job_id).with_for_update()
    job_status = connection.execute(locked).scalar_one_or_none()
    values: dict[str, Any] = {**NO_CLAIM, "received_bytes": None}
    tally = Tally()
    match result:
        case StoredFile(location, size_bytes, sha256, media):
            values |= {
                "status": "stored",
                "location": location,
                "size_bytes": size_bytes,
                "sha256": sha256,
                "media_type": media.type,
                "stored_at": now,
                "due_at": None,
                "error_code": None,
                "error_message": None,
            }
        case GiveUp(code, message):
            values |= output_failed(code, message)
        case TryAgain(wait, code, message):
            due = now + (RENEWAL_WAIT if result.renew else timedelta(seconds=wait))
            values |= {"due_at": due, "error_code": code, "error_message": message} | _failure_values(
                output, result, now
            )
    recorded = connection.execute(
        update(outputs)
        .where(outputs.c.id == output.id, outputs.c.claim_token == output.token, outputs.c.due_at > now)
        .values(values)
    )
    if not recorded.rowcount:
        return False, None
    stored_bytes = result.size_bytes if isinstance(result, StoredFile) else 0
    outcome = "stored" if isinstance(result, StoredFile) else result.code
    tally.attempt(outcome, seconds=(now - output.claimed_at).total_seconds(), stored_bytes=stored_bytes)
    if isinstance(result, TryAgain):
        if result.renew:
            _ask_for_links(connection, output.job_id, now)
        tally.write(connection)
        return True, None
    too_large = isinstance(result, GiveUp) and result.code == "too_large"  # the limit may be larger at a `retry`
    if output.body is not None and not too_large:
        connection.execute(delete(bodies).where(bodies.c.output_id == output.id))
    final_status = (
        finish_job_if_done(connection, output.job_id, tally, now=now) if job_status == "downloading" else None
    )
    tally.write(connection)
    return True, final_status


def _failure_values(output: ClaimedOutput, result: TryAgain, now: datetime) -> dict[str, Any]:
    match result.code:
        case "not_media" | "truncated":
            if result.counts:
                return {"bad_bodies": output.facts.bad_bodies + 1}
            return {"renewed": True} if result.renew else {}
        case "gone":
            dead_values: dict[str, Any] = {"dead_since": output.facts.dead_since or now}
            if result.renew:
                return dead_values | {"renewed": True}
            return (
                dead_values
                if output.facts.link_may_recover(now)
                else dead_values | {"dead_attempts": output.facts.dead_attempts + 1}
            )
        case _:
            return {}


def _ask_for_links(connection: Connection, job_id: int, now: datetime) -> None:
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.status == "downloading", jobs.c.due_at.is_(None))
        .values(due_at=now, pace_scale=None, pace_growth=None)
    )
