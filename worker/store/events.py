"""Webhook events: one for each final state of a job with a `webhook_url`. Deliveries are given up after a day."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, case, func, insert, not_, or_, select, update

from worker.core.lifecycle import FINAL_STATES
from worker.core.webhook import body, encode_body, event_id
from worker.store.counters import WEBHOOKS, Tally
from worker.store.jobs import outputs_of
from worker.store.schema import events, jobs
from worker.store.transitions import NO_CLAIM
from worker.store.url_host import is_at_host

OUTPUT_FIELDS = ("id", "position", "location", "sha256", "media_type", "size_bytes")


@dataclass(frozen=True, slots=True)
class ClaimedEvent:
    """An event that this process delivers now. `attempts` includes this attempt."""

    id: int
    token: str
    event_id: str
    job_id: int
    url: str
    body: str
    attempts: int
    created_at: datetime


def create_events(connection: Connection, *, now: datetime, limit: int = 1, of: Collection[int] | None = None) -> int:
    """Create the events of jobs that became final, and return how many. Each final state gets only one event.

    With `of`, create the events of all these jobs. This is done before jobs leave their final state.
    """
    only = () if of is None else (jobs.c.id.in_(of),)
    limit = limit if of is None else len(of)
    rows = connection.execute(
        select(jobs)
        .where(jobs.c.completed_at.is_not(None), jobs.c.webhook_url.is_not(None), jobs.c.announced_at.is_(None), *only)
        .order_by(jobs.c.completed_at, jobs.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    if not rows:
        return 0
    ids = [row.id for row in rows]
    outputs_by_job: dict[int, list[Row[Any]]] = {job_id: [] for job_id in ids}
    for output in outputs_of(connection, ids):
        outputs_by_job[output.job_id].append(output)
    connection.execute(insert(events), [_event(row, outputs_by_job[row.id], now) for row in rows])
    connection.execute(update(jobs).where(jobs.c.id.in_(ids), jobs.c.status.in_(FINAL_STATES)).values(announced_at=now))
    return len(ids)


def create_uncertain_events(connection: Connection, job_ids: Sequence[int], *, now: datetime) -> None:
    """Create the events of orders that became uncertain just now. That is no final state, and can happen again."""
    uncertain = select(jobs).where(jobs.c.id.in_(job_ids), jobs.c.webhook_url.is_not(None)).order_by(jobs.c.id)
    rows = connection.execute(uncertain).all()
    if rows:
        connection.execute(insert(events), [_event(row, (), now, moment=now) for row in rows])


def send_again(connection: Connection, job_id: int, *, now: datetime) -> int:
    """Make the events of a job due now, with their ids and bodies, for another day. Return how many changed.

    An event that is due already, or is being sent, does not change. If a final state has no event, create it.
    """
    job = connection.execute(select(jobs).where(jobs.c.id == job_id).with_for_update()).one()
    created = _create_missing_event(connection, job, now)
    waits = and_(events.c.claim_token.is_(None), events.c.due_at > now)
    idle = (events.c.job_id == job_id, or_(events.c.status != "pending", waits))
    fresh = {"status": "pending", "created_at": now, "due_at": now, "ended_at": None, "attempts": 0, **NO_CLAIM}
    answer = dict.fromkeys(("http_status", "error_message"))
    return created + connection.execute(update(events).where(*idle).values(fresh | answer)).rowcount


def _create_missing_event(connection: Connection, job: Row[Any], now: datetime) -> int:
    """Create the event of a job's final state if there is none, although it may be marked as created."""
    if job.completed_at is None or job.webhook_url is None:
        return 0
    own_event = select(events.c.id).where(events.c.event_id == event_id(job.id, job.completed_at))
    if connection.execute(own_event).first() is not None:
        return 0
    connection.execute(update(jobs).where(jobs.c.id == job.id).values(announced_at=None))
    return create_events(connection, now=now, of=[job.id])


def _event(
    job: Row[Any], outputs: Sequence[Row[Any]], now: datetime, *, moment: datetime | None = None
) -> dict[str, Any]:
    """Return the event of a job's state. `moment` is when the state began; a final state began at `completed_at`."""
    began_at = moment or job.completed_at
    data = {
        "id": job.id,
        "remote_id": job.remote_id or None,
        "account": job.account,
        "reference": job.reference,
        "status": job.status,
        "error_code": job.error_code,
        "outputs": [{name: getattr(output, name) for name in OUTPUT_FIELDS} for output in outputs],
    }
    kind = f"job.{job.status}"
    return {
        "event_id": event_id(job.id, began_at),
        "job_id": job.id,
        "type": kind,
        "url": job.webhook_url,
        "body": body(kind, began_at, data),
        "status": "pending",
        "created_at": now,
        "due_at": now,
    }


def update_event_locations(connection: Connection, job_ids: Collection[int], moved: Mapping[str, str]) -> None:
    """Replace old locations of outputs by new ones in the events of these jobs that are not delivered yet."""
    undelivered = select(events.c.id, events.c.body).where(events.c.job_id.in_(job_ids), events.c.due_at.is_not(None))
    for row in connection.execute(undelivered.order_by(events.c.id).with_for_update()).all():
        document = json.loads(row.body)
        for output in document["data"]["outputs"]:
            output["location"] = moved.get(output["location"], output["location"])
        new_body = encode_body(document)
        if new_body != row.body:
            connection.execute(update(events).where(events.c.id == row.id).values(body=new_body))


def claim_events(
    connection: Connection,
    *,
    token: str,
    holder: str,
    lease: timedelta,
    now: datetime,
    limit: int,
    without: Collection[str] = (),
) -> list[ClaimedEvent]:
    """Claim the events that are due, earliest due time first. Events for the receivers in `without` are skipped.

    A receiver is the first part of a URL: scheme, host and port, such as `https://app.example`.
    """
    for_others = tuple(not_(_is_to(receiver)) for receiver in sorted(without))
    due = (
        select(events)
        .where(events.c.due_at.is_not(None), events.c.due_at <= now, *for_others)
        .order_by(events.c.due_at, events.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = connection.execute(due).all()
    if rows:
        connection.execute(
            update(events)
            .where(events.c.id.in_([row.id for row in rows]))
            .values(due_at=now + lease, claim_token=token, claim_holder=holder, attempts=events.c.attempts + 1)
        )
    return [
        ClaimedEvent(row.id, token, row.event_id, row.job_id, row.url, row.body, int(row.attempts) + 1, row.created_at)
        for row in rows
    ]


def _is_to(receiver: str) -> ColumnElement[bool]:
    prefixes = (events.c.url.startswith(f"{receiver}{end}", autoescape=True) for end in "/?#")
    return or_(events.c.url == receiver, *prefixes)


def record_delivery(
    connection: Connection,
    event: ClaimedEvent,
    *,
    now: datetime,
    ended: str | None,
    due_at: datetime | None,
    http_status: int | None,
    message: str | None,
) -> bool:
    """Record the result of a delivery attempt, and return True. Return False if the claim was lost.

    `ended` is `delivered`, `failed`, or None to try again at `due_at`. This must be the last step of the transaction,
    because it writes a counter.
    """
    written = connection.execute(
        update(events)
        .where(events.c.id == event.id, events.c.claim_token == event.token, events.c.due_at > now)
        .values(
            status=ended or "pending",
            ended_at=now if ended else None,
            due_at=None if ended else due_at,
            **NO_CLAIM,
            http_status=http_status,
            error_message=message,
        )
    )
    if written.rowcount and ended is not None:
        tally = Tally()
        tally.add(WEBHOOKS, ended)
        tally.write(connection)
    return bool(written.rowcount)


def defer_events(connection: Connection, claimed: Sequence[ClaimedEvent], *, now: datetime, due_at: datetime) -> None:
    """Release claimed events that were not tried. They are due at `due_at`, and the attempt is not counted."""
    connection.execute(
        update(events)
        .where(events.c.id.in_([event.id for event in claimed]), events.c.claim_token == claimed[0].token)
        .where(events.c.due_at > now)
        .values(due_at=due_at, **NO_CLAIM, attempts=events.c.attempts - 1)
    )


def release_events(connection: Connection, holders: Sequence[str], *, due_at: datetime, but: Sequence[int] = ()) -> int:
    """Release the events that these processes hold, except those in `but`; return how many.

    Only for claims whose result will not be recorded, for example after a crash. The receiver may get these events
    twice.
    """
    claimed = select(events.c.id).where(events.c.claim_holder.in_(holders), events.c.id.not_in(but))
    ids = list(connection.execute(claimed.with_for_update(skip_locked=True)).scalars())
    if ids:
        connection.execute(update(events).where(events.c.id.in_(ids)).values(due_at=due_at, **NO_CLAIM))
    return len(ids)


def events_of(connection: Connection, job_id: int) -> Sequence[Row[Any]]:
    """Return the events of a job, oldest first."""
    return connection.execute(select(events).where(events.c.job_id == job_id).order_by(events.c.id)).all()


@dataclass(frozen=True, slots=True)
class PendingEvents:
    """The number of events that are not delivered yet, and how many of them were refused at least once."""

    count: int
    refused: int


def count_pending_events(connection: Connection) -> PendingEvents:
    """Count the events that are not delivered yet."""
    refused = func.count(case((events.c.error_message.is_not(None), 1)))
    return PendingEvents(*connection.execute(select(func.count(), refused).where(events.c.due_at.is_not(None))).one())


@dataclass(frozen=True, slots=True)
class UndeliveredEvents:
    """The number of events that wait for another attempt, the number given up, and one error message."""

    waiting: int
    given_up: int
    message: str | None


def jobs_with_refused_events(connection: Connection, receiver: str) -> list[int]:
    """Return the jobs with an event that this receiver refused, oldest job first: given up, or tried again later."""
    is_refused = or_(events.c.status == "failed", events.c.error_message.is_not(None))
    query = select(events.c.job_id).where(
        events.c.status != "delivered", is_refused, is_at_host(events.c.url, receiver)
    )
    return list(connection.execute(query.distinct().order_by(events.c.job_id)).scalars())


def undelivered_events(connection: Connection, *, since: datetime) -> UndeliveredEvents:
    """Count the events that receivers refused: those tried again, and those given up after `since`."""
    is_waiting = and_(events.c.due_at.is_not(None), events.c.error_message.is_not(None))
    is_given_up = and_(events.c.status == "failed", events.c.ended_at > since)
    row = connection.execute(
        select(
            func.count(case((is_waiting, 1))).label("waiting"),
            func.count(case((is_given_up, 1))).label("given_up"),
            func.max(events.c.error_message).label("message"),
        ).where(or_(is_waiting, is_given_up))
    ).one()
    return UndeliveredEvents(row.waiting, row.given_up, row.message)


def count_overdue_events(connection: Connection, *, before: datetime) -> int:
    """Count the final jobs without an event and the unsent events that were due before this time."""
    without_event = select(func.count()).where(
        jobs.c.completed_at < before, jobs.c.webhook_url.is_not(None), jobs.c.announced_at.is_(None)
    )
    unsent = select(func.count()).where(events.c.due_at < before)
    return sum(int(connection.execute(query).scalar_one()) for query in (without_event, unsent))
