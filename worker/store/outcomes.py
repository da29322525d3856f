"""Outcomes: writing what an answer or a download attempt led to, only where the claim still stands."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, bindparam, delete, select, update

from worker.core.lifecycle import (
    AskAgain,
    Deliver,
    End,
    GiveUp,
    KeepLinks,
    RenewLinks,
    Step,
    StoredFile,
    Strikes,
    TryAgain,
)
from worker.core.links import Link
from worker.store.claims import ClaimedJob, ClaimedOutput
from worker.store.jobs import insert_outputs, settle
from worker.tables import bodies, jobs, outputs

RENEWAL_WAIT = timedelta(hours=1)  # how long an output waits for its fresh link before it is tried as it is


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an answer led to, and for a job that is asked again, in how many seconds."""

    job: ClaimedJob
    step: Step
    wait: float
    note: str


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a batch changed: outputs to put on the queue, jobs that became final, and answers whose claim was lost."""

    outputs: tuple[int, ...]
    finished: tuple[int, ...]
    lost: int


def record_answers(connection: Connection, batch: Sequence[Outcome], *, now: datetime) -> Recorded:
    """Writes a batch of answers. One whose claim is lost changes nothing."""
    again = [(outcome, outcome.step.strikes) for outcome in batch if isinstance(outcome.step, AskAgain)]
    written = _ask_again(connection, again, now) if again else 0
    queue: list[int] = []
    finished: list[int] = []
    for outcome in batch:
        match outcome.step:
            case Deliver(found):
                ids = _deliver(connection, outcome, found, now)
            case End(status, code, message):
                values = {"status": status, "error_code": code, "error_message": message, "completed_at": now}
                ids = [] if _write(connection, outcome, now, due_at=None, **values) else None
            case RenewLinks(found):
                ids = _renew(connection, outcome, found, now)
            case KeepLinks():
                ids = _renew(connection, outcome, (), now)
            case _:
                continue
        if ids is None:
            continue
        written += 1
        queue += ids
        if isinstance(outcome.step, End) or (isinstance(outcome.step, Deliver) and not ids):
            finished.append(outcome.job.id)
    return Recorded(tuple(queue), tuple(finished), len(batch) - written)


def _ask_again(connection: Connection, batch: Sequence[tuple[Outcome, Strikes]], now: datetime) -> int:
    # Rows are locked in the order of their ids, like everywhere: two batches can't block each other.
    statement = (
        update(jobs)
        .where(jobs.c.id == bindparam("job"), jobs.c.claim_token == bindparam("token"), jobs.c.due_at > now)
        .values(
            due_at=bindparam("due"),
            claim_token=None,
            claim_holder=None,
            failed_answers=bindparam("failed"),
            unknown_answers=bindparam("unknown"),
            error_answers=bindparam("error"),
            empty_answers=bindparam("empty"),
            struck_at=bindparam("struck"),
            last_answer=bindparam("note"),
        )
    )
    rows = []
    for outcome, strikes in sorted(batch, key=lambda one: one[0].job.id):
        rows.append(
            {
                "job": outcome.job.id,
                "token": outcome.job.token,
                "due": now + timedelta(seconds=outcome.wait),
                "failed": strikes.failed,
                "unknown": strikes.unknown,
                "error": strikes.error,
                "empty": strikes.empty,
                "struck": strikes.last,
                "note": outcome.note[:600],
            }
        )
    return connection.execute(statement, rows).rowcount


def _write(connection: Connection, outcome: Outcome, now: datetime, **values: Any) -> bool:
    done = connection.execute(
        update(jobs)
        .where(jobs.c.id == outcome.job.id, jobs.c.claim_token == outcome.job.token, jobs.c.due_at > now)
        .values(claim_token=None, claim_holder=None, last_answer=outcome.note[:600], **values)
    )
    return done.rowcount == 1


def _deliver(connection: Connection, outcome: Outcome, found: Sequence[Link], now: datetime) -> list[int] | None:
    values: dict[str, Any] = {"status": "downloading"} if found else {"status": "completed", "completed_at": now}
    if not _write(connection, outcome, now, due_at=None, ready_at=now, **values):
        return None
    return insert_outputs(connection, outcome.job.id, found, now=now)


def _renew(connection: Connection, outcome: Outcome, found: Sequence[Link], now: datetime) -> list[int] | None:
    """Gives the unstored outputs their fresh links, by position, and sets them off at once."""
    if not _write(connection, outcome, now, due_at=None):
        return None
    waiting = connection.execute(
        select(outputs.c.id, outputs.c.position)
        .where(
            outputs.c.job_id == outcome.job.id,
            outputs.c.status == "pending",
            outputs.c.renewed,
            outputs.c.claim_token.is_(None),
        )
        .order_by(outputs.c.id)
    ).all()
    for row in waiting:
        values: dict[str, Any] = {"due_at": now, "queued_at": now}
        if row.position < len(found) and found[row.position].body is None:
            link = found[row.position]
            values |= {"url": link.url, "proxy_urls": json.dumps(link.proxies)}
        connection.execute(update(outputs).where(outputs.c.id == row.id).values(values))
    return [row.id for row in waiting]


def set_aside(connection: Connection, job: ClaimedJob, message: str, *, now: datetime) -> bool:
    """Ends a job whose answer no statement could write, so that it does not spoil every batch it is in."""
    step = End("failed", "unwritable", message)
    return bool(record_answers(connection, [Outcome(job, step, 0.0, "unwritable answer")], now=now).finished)


def record_attempt(
    connection: Connection, output: ClaimedOutput, result: StoredFile | TryAgain | GiveUp, *, now: datetime
) -> tuple[bool, str | None]:
    """Writes a download attempt: (whether the claim still stood, the job's final state where this ended it)."""
    # The job is locked before its outputs, as in `cancel`: the other way round the two could block each other for good.
    locked = select(jobs.c.status).where(jobs.c.id == output.job_id).with_for_update()
    job_status = connection.execute(locked).scalar_one_or_none()
    values: dict[str, Any] = {"claim_token": None, "claim_holder": None}
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
            values |= {"status": "failed", "due_at": None, "error_code": code, "error_message": message}
        case TryAgain(wait, code, message):
            due = now + (RENEWAL_WAIT if result.renew else timedelta(seconds=wait))
            values |= {"due_at": due, "error_code": code, "error_message": message} | _counted(output, result, now)
    done = connection.execute(
        update(outputs)
        .where(outputs.c.id == output.id, outputs.c.claim_token == output.token, outputs.c.due_at > now)
        .values(values)
    )
    if not done.rowcount:
        return False, None
    if isinstance(result, TryAgain):
        if result.renew:
            _ask_for_links(connection, output.job_id, now)
        return True, None
    if output.body is not None:
        connection.execute(delete(bodies).where(bodies.c.output_id == output.id))
    return True, settle(connection, output.job_id, now=now) if job_status == "downloading" else None


def _counted(output: ClaimedOutput, result: TryAgain, now: datetime) -> dict[str, Any]:
    match result.code:
        case "not_media" | "truncated":
            return {"bad_bodies": output.facts.bad_bodies + 1}
        case "gone":
            counted: dict[str, Any] = {"dead_since": output.facts.dead_since or now}
            if result.renew:
                return counted | {"renewed": True}
            return counted if output.facts.patient(now) else counted | {"dead_attempts": output.facts.dead_attempts + 1}
        case _:
            return {}


def _ask_for_links(connection: Connection, job_id: int, now: datetime) -> None:
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.status == "downloading", jobs.c.due_at.is_(None))
        .values(due_at=now)
    )
