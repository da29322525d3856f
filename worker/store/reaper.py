"""Work that dead processes held: it is due again, unless it killed its process again and again.

A count is kept of crashes in a row, beside the row's own count of attempts: where an attempt came to an end between two
crashes, the count begins anew. From the second crash on the rows that one process held come back at different times, so
that one that kills its process does not take the same others with it each time.
"""

import random
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from worker.store.claims import Claim
from worker.store.counters import Tally
from worker.store.jobs import finish_job_if_done
from worker.store.schema import crashes, jobs, outputs

CRASHES_MOST = 8  # in a row; then the work is set aside
WAIT_MOST = 15.0  # seconds
CODE = "worker_crash"


@dataclass(frozen=True, slots=True)
class Released:
    """How many rows are due again, the jobs and outputs that were set aside, and the jobs that became final by it."""

    rows: int
    jobs: tuple[int, ...]
    outputs: tuple[int, ...]
    finished: tuple[int, ...]


def release_crashed(
    connection: Connection, gone: Sequence[str], *, now: datetime, sent: Mapping[str, Container[Claim]] | None = None
) -> Released:
    """Give back what these processes held. Only for processes that are known to be dead.

    `sent` has, by process, the claims that a request was sent for, where that is known. Of a claim that led to none no
    request is counted. The crash is, since the job itself may be what kills its process before the request is sent.
    """
    unsent = _take_off_unsent(connection, sent or {})
    poisoned_jobs, freed_jobs = _release(connection, "job", gone, now, unsent)
    poisoned_outputs, freed_outputs = _release(connection, "output", gone, now)
    tally = Tally()
    finished = [row.id for row in poisoned_jobs if _end_job(connection, row, tally, now)]
    for row in poisoned_outputs:
        finished += _end_output(connection, row, tally, now)
    tally.write(connection)
    return Released(
        freed_jobs + freed_outputs,
        tuple(row.id for row in poisoned_jobs),
        tuple(row.id for row in poisoned_outputs),
        tuple(finished),
    )


def _take_off_unsent(connection: Connection, sent: Mapping[str, Container[Claim]]) -> set[int]:
    """Take the requests that were never sent off the count of their jobs; return these jobs, which stay claimed."""
    held = select(jobs.c.id, jobs.c.claim_token, jobs.c.claim_holder).where(
        jobs.c.claim_holder.in_(sent), jobs.c.claim_token.is_not(None)
    )
    rows = connection.execute(held.order_by(jobs.c.id).with_for_update(skip_locked=True)).all() if sent else []
    ids = {row.id for row in rows if (row.id, row.claim_token) not in sent[row.claim_holder]}
    if ids:
        connection.execute(update(jobs).where(jobs.c.id.in_(ids), jobs.c.polls > 0).values(polls=jobs.c.polls - 1))
    return ids


def _release(
    connection: Connection, scope: str, gone: Sequence[str], now: datetime, unsent: Container[int] = ()
) -> tuple[list[Row[Any]], int]:
    """Counts the crashes, and gives all rows back but those that are to be set aside: (those, how many others)."""
    table, attempt = (jobs, jobs.c.polls) if scope == "job" else (outputs, outputs.c.attempts)
    held: list[Row[Any]] = list(
        connection.execute(
            select(table.c.id, attempt.label("attempt"))
            .where(table.c.claim_holder.in_(gone), table.c.claim_token.is_not(None))
            .order_by(table.c.id)
            .with_for_update(skip_locked=True)
        )
    )
    if not held:
        return [], 0
    ids = [row.id for row in held]
    mine = (crashes.c.scope == scope, crashes.c.row_id.in_(ids))
    before = {row.row_id: row for row in connection.execute(select(crashes).where(*mine))}
    times = {row.id: _in_a_row(before.get(row.id), row.attempt, counted=row.id not in unsent) for row in held}
    connection.execute(delete(crashes).where(*mine))
    connection.execute(
        insert(crashes),
        [
            {"scope": scope, "row_id": row.id, "times": times[row.id], "attempt": row.attempt, "crashed_at": now}
            for row in held
        ],
    )
    free = {"claim_token": None, "claim_holder": None}
    first = [row.id for row in held if times[row.id] < 2]
    connection.execute(update(table).where(table.c.id.in_(first)).values(due_at=now, **free))
    for row in held:
        if times[row.id] >= 2:
            wait = timedelta(seconds=random.uniform(0.0, min(2.0 ** times[row.id], WAIT_MOST)))
            connection.execute(update(table).where(table.c.id == row.id).values(due_at=now + wait, **free))
    poisoned = [row for row in held if times[row.id] >= CRASHES_MOST]
    return list(poisoned), len(held) - len(poisoned)


def _in_a_row(before: Row[Any] | None, attempt: int, *, counted: bool) -> int:
    """Return which crash in a row this is. `counted`: the row's count of attempts has the one that crashed."""
    following = before is not None and attempt == before.attempt + counted
    return int(before.times) + 1 if before is not None and following else 1


def _said(times: int = CRASHES_MOST) -> str:
    return f"the process that worked on it died, {times} times in a row; `retry` tries it once more"


def _end_job(connection: Connection, row: Row[Any], tally: Tally, now: datetime) -> bool:
    """A job that is asked about for fresh links only keeps its outputs; any other one ends."""
    ended = connection.execute(
        update(jobs)
        .where(jobs.c.id == row.id, jobs.c.status == "pending", jobs.c.claim_token.is_(None))
        .values(status="failed", error_code=CODE, error_message=_said(), completed_at=now, due_at=None)
    )
    if ended.rowcount:
        account, kind = connection.execute(select(jobs.c.account, jobs.c.kind).where(jobs.c.id == row.id)).one()
        tally.finished(account, kind, "failed")
    return bool(ended.rowcount)


def _end_output(connection: Connection, row: Row[Any], tally: Tally, now: datetime) -> list[int]:
    job_id = connection.execute(select(outputs.c.job_id).where(outputs.c.id == row.id)).scalar_one()
    status = connection.execute(select(jobs.c.status).where(jobs.c.id == job_id).with_for_update()).scalar_one()
    connection.execute(
        update(outputs)
        .where(outputs.c.id == row.id, outputs.c.status == "pending", outputs.c.claim_token.is_(None))
        .values(status="failed", error_code=CODE, error_message=_said(), due_at=None)
    )
    final = finish_job_if_done(connection, job_id, tally, now=now) if status == "downloading" else None
    return [] if final is None else [job_id]
