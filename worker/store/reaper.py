"""Release the claims of dead processes, and end jobs and outputs that crash their process repeatedly.

The table of crashes counts consecutive crashes. It also has the row's counter of attempts at the last crash: if an
attempt ended normally between two crashes, the count starts again. After the second crash, the rows of a process become
due at different times. Otherwise a row that crashes its process would affect the same other rows each time.
"""

import random
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from worker.core.lifecycle import CRASHED
from worker.store.claims import Claim
from worker.store.counters import Tally
from worker.store.jobs import finish_job_if_done
from worker.store.schema import crashes, jobs, outputs
from worker.store.transitions import NO_CLAIM, job_ended, output_failed

CRASHES_MOST = 8  # consecutive crashes; then the job or output fails
WAIT_MOST = 15.0  # seconds


@dataclass(frozen=True, slots=True)
class Released:
    """The number of rows that are due again, the jobs and outputs that failed, and the jobs that became final."""

    rows: int
    jobs: tuple[int, ...]
    outputs: tuple[int, ...]
    finished: tuple[int, ...]


def release_crashed(
    connection: Connection, dead: Sequence[str], *, now: datetime, sent: Mapping[str, Container[Claim]] | None = None
) -> Released:
    """Release everything that these processes claimed. Only for processes that are known to be dead.

    `sent` has the claims for which a request was sent, for each process where this is known. For the other claims of
    such a process, the request is subtracted from `polls`. Their crash is counted, because the job itself may crash its
    process before the request is sent.
    """
    unsent = _subtract_unsent(connection, sent or {})
    failing_jobs, released_jobs = _release(connection, "job", dead, now, unsent)
    failing_outputs, released_outputs = _release(connection, "output", dead, now)
    tally = Tally()
    finished = [row.id for row in failing_jobs if _end_job(connection, row, tally, now)]
    for row in failing_outputs:
        finished += _end_output(connection, row, tally, now)
    tally.write(connection)
    return Released(
        released_jobs + released_outputs,
        tuple(row.id for row in failing_jobs),
        tuple(row.id for row in failing_outputs),
        tuple(finished),
    )


def _subtract_unsent(connection: Connection, sent: Mapping[str, Container[Claim]]) -> set[int]:
    """Subtract the requests that were never sent from `polls`; return the ids of these jobs, which stay claimed."""
    claimed = select(jobs.c.id, jobs.c.claim_token, jobs.c.claim_holder).where(
        jobs.c.claim_holder.in_(sent), jobs.c.claim_token.is_not(None)
    )
    rows = connection.execute(claimed.order_by(jobs.c.id).with_for_update(skip_locked=True)).all() if sent else []
    ids = {row.id for row in rows if (row.id, row.claim_token) not in sent[row.claim_holder]}
    if ids:
        connection.execute(update(jobs).where(jobs.c.id.in_(ids), jobs.c.polls > 0).values(polls=jobs.c.polls - 1))
    return ids


def _release(
    connection: Connection, scope: str, dead: Sequence[str], now: datetime, unsent: Container[int] = ()
) -> tuple[list[Row[Any]], int]:
    """Count the crashes and release the rows. Return the rows that must fail, and the number of other rows."""
    table, attempt = (jobs, jobs.c.polls) if scope == "job" else (outputs, outputs.c.attempts)
    rows: list[Row[Any]] = list(
        connection.execute(
            select(table.c.id, attempt.label("attempt"))
            .where(table.c.claim_holder.in_(dead), table.c.claim_token.is_not(None))
            .order_by(table.c.id)
            .with_for_update(skip_locked=True)
        )
    )
    if not rows:
        return [], 0
    ids = [row.id for row in rows]
    of_these_rows = (crashes.c.scope == scope, crashes.c.row_id.in_(ids))
    previous = {row.row_id: row for row in connection.execute(select(crashes).where(*of_these_rows))}
    times = {
        row.id: _consecutive_crashes(previous.get(row.id), row.attempt, counted=row.id not in unsent) for row in rows
    }
    connection.execute(delete(crashes).where(*of_these_rows))
    connection.execute(
        insert(crashes),
        [
            {"scope": scope, "row_id": row.id, "times": times[row.id], "attempt": row.attempt, "crashed_at": now}
            for row in rows
        ],
    )
    first_crash = [row.id for row in rows if times[row.id] < 2]
    connection.execute(update(table).where(table.c.id.in_(first_crash)).values(due_at=now, **NO_CLAIM))
    for row in rows:
        if times[row.id] >= 2:
            wait = timedelta(seconds=random.uniform(0.0, min(2.0 ** times[row.id], WAIT_MOST)))
            connection.execute(update(table).where(table.c.id == row.id).values(due_at=now + wait, **NO_CLAIM))
    failing = [row for row in rows if times[row.id] >= CRASHES_MOST]
    return list(failing), len(rows) - len(failing)


def _consecutive_crashes(previous: Row[Any] | None, attempt: int, *, counted: bool) -> int:
    """Return the number of consecutive crashes. `counted` is true if `attempt` includes the attempt that crashed."""
    is_consecutive = previous is not None and attempt == previous.attempt + counted
    return int(previous.times) + 1 if previous is not None and is_consecutive else 1


def _error_message(times: int = CRASHES_MOST) -> str:
    return f"the process that worked on it died, {times} times in a row; `retry` tries it once more"


def _end_job(connection: Connection, row: Row[Any], tally: Tally, now: datetime) -> bool:
    """Fail a pending job. A job that was polled for fresh links is downloading, and does not change."""
    ended = connection.execute(
        update(jobs)
        .where(jobs.c.id == row.id, jobs.c.status == "pending", jobs.c.claim_token.is_(None))
        .values(**job_ended("failed", now), error_code=CRASHED, error_message=_error_message())
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
        .values(output_failed(CRASHED, _error_message()))
    )
    final = finish_job_if_done(connection, job_id, tally, now=now) if status == "downloading" else None
    return [] if final is None else [job_id]
