"""Jobs whose API host is not in SD_API_HOSTS. The host is held, and its jobs expire at their deadline unpolled."""

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import Connection, select, update

from worker.core.circuit_breaker import NOT_LISTED, held_as_unlisted
from worker.core.lifecycle import AFTER_HOLD_GRACE, EndJob
from worker.store.breakers import locked_breaker, save_breaker
from worker.store.counters import Tally
from worker.store.due_groups import DueGroup
from worker.store.promises import PromisedEnd, promised_links, try_promises
from worker.store.schema import jobs
from worker.store.transitions import job_downloading, job_ended

log = logging.getLogger(__name__)

LIMIT = 200
OTHERS_ASK = timedelta(seconds=10)  # a proven host is held if no other worker has polled its jobs for so long


def hold_unlisted(connection: Connection, groups: Sequence[DueGroup], *, now: datetime) -> list[int]:
    """Hold the hosts of these groups, which the caller's settings do not list. Return the jobs past their deadline.

    These jobs have expired, or will expire if none of their promised links can be stored. The caller plans late looks
    for both.

    In a rolling deployment, a worker with other settings may poll such a host. Then the host is not held. No job
    expires in the first minute of a hold.
    """
    by_host: dict[str, list[DueGroup]] = {}
    for group in groups:
        by_host.setdefault(group.host, []).append(group)
    ended: list[int] = []
    tally = Tally()
    for host, host_groups in sorted(by_host.items()):
        breaker = locked_breaker(connection, "host", host)
        if breaker.paused_at is not None:
            continue
        if not breaker.is_unlisted:
            if not breaker.proven or min(group.due_at for group in host_groups) <= now - OTHERS_ASK:
                held_breaker = held_as_unlisted(breaker, now=now)
                save_breaker(connection, held_breaker)
                log.warning("held scope=host name=%s reason=%s", host, held_breaker.reason)
        elif breaker.since is not None and now - breaker.since >= AFTER_HOLD_GRACE:
            for group in host_groups:
                ended += _expire(connection, group, tally, now)
    tally.write(connection)
    return ended


def _expire(connection: Connection, group: DueGroup, tally: Tally, now: datetime) -> list[int]:
    late = (
        select(jobs.c.id, jobs.c.account, jobs.c.kind, jobs.c.polls)
        .where(
            jobs.c.account == group.account,
            jobs.c.priority == group.priority,
            jobs.c.fetch_host == group.host,
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
    message = f"could not be asked by its deadline: {group.host} is {NOT_LISTED}; add it there, then `retry`"
    promised = promised_links(connection, [row.id for row in rows])
    promised_ends = [
        PromisedEnd(job_id, EndJob("expired", "expired", message), urls) for job_id, urls in promised.items()
    ]
    if promised_ends:
        connection.execute(update(jobs).where(jobs.c.id.in_(promised)).values(job_downloading(now)))
        try_promises(connection, promised_ends, now=now, queued=False)
    expired = [row for row in rows if row.id not in promised]
    connection.execute(
        update(jobs)
        .where(jobs.c.id.in_([row.id for row in expired]))
        .values(**job_ended("expired", now), error_code="expired", error_message=message)
    )
    for row in expired:
        tally.finished(row.account, row.kind, "expired")
    return [row.id for row in rows]
