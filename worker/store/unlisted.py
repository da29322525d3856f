"""Jobs whose fetch host is not on SD_API_HOSTS: the host is held, and past their deadline they end, though unasked."""

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import Connection, select, update

from worker.core.circuit_breaker import NOT_LISTED, CircuitBreaker, held_as_unlisted
from worker.core.lifecycle import AFTER_HOLD_GRACE, EndJob
from worker.store.breakers import locked_breaker, save_breaker
from worker.store.claims import DueGroup
from worker.store.counters import Tally
from worker.store.promises import PromisedEnd, promised_links, try_promises
from worker.store.schema import jobs

log = logging.getLogger(__name__)

LIMIT = 200
OTHERS_ASK = timedelta(seconds=10)  # a host that was asked before is held once no other worker seems to ask it


def hold_unlisted(connection: Connection, levels: Sequence[DueGroup], *, now: datetime) -> list[int]:
    """Hold the hosts of these levels, which the caller's settings do not list; return the jobs past their deadline.

    They have expired, or will if the promised links bring nothing that are tried from now on: both have late looks.

    A worker with other settings may ask such a host meanwhile, as in a rolling deployment: then there is no hold. A
    hold is given a minute before any job ends by it.
    """
    by_host: dict[str, list[DueGroup]] = {}
    for level in levels:
        by_host.setdefault(level.host, []).append(level)
    ended: list[int] = []
    tally = Tally()
    for host, waiting in sorted(by_host.items()):
        breaker = locked_breaker(connection, "host", host)
        if breaker.paused_at is not None:
            continue
        if not _is_unlisted(breaker):
            if not breaker.proven or min(level.due_at for level in waiting) <= now - OTHERS_ASK:
                held = held_as_unlisted(breaker, now=now)
                save_breaker(connection, held)
                log.warning("held scope=host name=%s reason=%s", host, held.reason)
        elif breaker.since is not None and now - breaker.since >= AFTER_HOLD_GRACE:
            for level in waiting:
                ended += _expire(connection, level, tally, now)
    tally.write(connection)
    return ended


def _is_unlisted(breaker: CircuitBreaker) -> bool:
    return breaker.reason is not None and breaker.reason.startswith(NOT_LISTED)


def _expire(connection: Connection, level: DueGroup, tally: Tally, now: datetime) -> list[int]:
    late = (
        select(jobs.c.id, jobs.c.account, jobs.c.kind, jobs.c.polls)
        .where(
            jobs.c.account == level.account,
            jobs.c.priority == level.priority,
            jobs.c.fetch_host == level.host,
            jobs.c.due_at <= now,
            jobs.c.status == "pending",
            jobs.c.claim_token.is_(None),
            jobs.c.deadline_at <= now,
        )
        .order_by(jobs.c.due_at)
        .limit(LIMIT)
        .with_for_update(skip_locked=True)
    )
    rows = connection.execute(late).all()
    if not rows:
        return []
    message = f"could not be asked by its deadline: {level.host} is {NOT_LISTED}; add it there, then `retry`"
    promised = promised_links(connection, [row.id for row in rows])
    trying = [PromisedEnd(job_id, EndJob("expired", "expired", message), urls) for job_id, urls in promised.items()]
    if trying:
        downloading = {"status": "downloading", "ready_at": now, "due_at": None}
        connection.execute(update(jobs).where(jobs.c.id.in_(promised)).values(downloading))
        try_promises(connection, trying, now=now, queued=False)
    over = [row for row in rows if row.id not in promised]
    connection.execute(
        update(jobs)
        .where(jobs.c.id.in_([row.id for row in over]))
        .values(status="expired", error_code="expired", error_message=message, completed_at=now, due_at=None)
    )
    for row in over:
        tally.finished(row.account, row.kind, "expired")
    return [row.id for row in rows]
