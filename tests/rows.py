"""Helpers for tests of the store: insert jobs and outputs directly, claim them, and read them."""

import json
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, Row, select, update

from worker.core.queues import ALL as ALL_QUEUES
from worker.store.claims import ClaimedJob, ClaimedOutput, claim_jobs, claim_output
from worker.store.due_groups import due_groups
from worker.store.engine import database_now
from worker.store.processes import WorkerProcess, record_process
from worker.store.schema import history, jobs, outputs

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
LEASE = timedelta(seconds=30)
TOKEN = "a token"
BASE = "https://api.test/api/v3/fetch"

STORED: dict[str, Any] = {
    **{"status": "stored", "due_at": None, "stored_at": NOW},
    **{"location": "file:///x", "sha256": "ab" * 32, "media_type": "image/png"},
}  # values of a stored output, without its size


def seconds(number: float) -> timedelta:
    """Return a timedelta of this many seconds."""
    return timedelta(seconds=number)


def job_values(remote_id: str = "1", **changes: Any) -> dict[str, Any]:
    """Return the values of a pending job that is due at NOW, with `changes`."""
    return {
        "account": "default",
        "remote_id": remote_id,
        "kind": "image",
        "fetch_url": f"{BASE}/{remote_id}",
        "fetch_base": BASE,
        "fetch_host": "api.test",
        "status": "pending",
        "submitted_at": NOW,
        "tracked_at": NOW,
        "deadline_at": NOW + seconds(3_600),
        "deadline_seconds": 3_600.0,
        "due_at": NOW,
    } | changes


def add_process(connection: Connection, **changes: Any) -> None:
    """Record a running worker process that polls and has a key of the account `default`, with `changes`."""
    now = database_now(connection)
    values: dict[str, Any] = {
        "holder": "0badc0de.1.1",
        "name": "worker@test",
        "queues": frozenset(ALL_QUEUES),
        "accounts": {"default": 10.0},
        "version": "0.1.0",
        "redis_answers": True,
        "started_at": now,
        "seen_at": now,
    }
    record_process(connection, WorkerProcess(**(values | changes)))


def output_values(job_id: int, position: int = 0, **changes: Any) -> dict[str, Any]:
    """Return the values of a pending output that is due at NOW, with `changes`."""
    return {
        "job_id": job_id,
        "position": position,
        "url": f"https://cdn.test/{job_id}-{position}.png",
        "proxy_urls": "[]",
        "status": "pending",
        "listed_at": NOW,
        "due_at": NOW,
    } | changes


def add_job(connection: Connection, remote_id: str = "1", **changes: Any) -> int:
    """Insert a job; return its id."""
    result = connection.execute(jobs.insert().values(job_values(remote_id, **changes)).returning(jobs.c.id))
    return int(result.scalar_one())


def add_downloading(connection: Connection, remote_id: str = "1", **changes: Any) -> int:
    """Insert a job that is downloading; return its id."""
    return add_job(connection, remote_id, **({"status": "downloading", "due_at": None, "ready_at": NOW} | changes))


def add_output(connection: Connection, job_id: int, position: int = 0, **changes: Any) -> int:
    """Insert an output; return its id."""
    result = connection.execute(
        outputs.insert().values(output_values(job_id, position, **changes)).returning(outputs.c.id)
    )
    return int(result.scalar_one())


def claim_due_jobs(
    connection: Connection,
    *,
    token: str = TOKEN,
    holder: str = "holder",
    now: datetime = NOW,
    account: str = "default",
    limit: int = 100,
) -> list[ClaimedJob]:
    """Claim due jobs for LEASE, best first."""
    claimed: list[ClaimedJob] = []
    for group in due_groups(connection, [account]):
        remaining = limit - len(claimed)
        if remaining:
            claimed += claim_jobs(connection, group, limit=remaining, token=token, holder=holder, lease=LEASE, now=now)
    return claimed


def try_claim_output(
    connection: Connection,
    output_id: int,
    *,
    token: str = TOKEN,
    holder: str = "holder",
    now: datetime = NOW,
    without: Collection[str] = (),
) -> ClaimedOutput | None:
    """Claim one output for LEASE, if possible."""
    return claim_output(connection, output_id, token=token, holder=holder, lease=LEASE, now=now, without=without)


def claim_one_output(
    connection: Connection, output_id: int, *, token: str = TOKEN, now: datetime = NOW
) -> ClaimedOutput:
    """Claim one output that must be available."""
    claimed = try_claim_output(connection, output_id, token=token, now=now)
    assert claimed is not None
    return claimed


def read_job(engine: Engine, job_id: int) -> Row[Any]:
    """Return the committed row of a job."""
    with engine.connect() as connection:
        return connection.execute(select(jobs).where(jobs.c.id == job_id)).one()


def read_output(engine: Engine, output_id: int) -> Row[Any]:
    """Return the committed row of an output."""
    with engine.connect() as connection:
        return connection.execute(select(outputs).where(outputs.c.id == output_id)).one()


def update_job(engine: Engine, job_id: int, **values: Any) -> None:
    """Set columns of a job, and commit."""
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))


def update_output(engine: Engine, output_id: int, **values: Any) -> None:
    """Set columns of an output, and commit."""
    with engine.begin() as connection:
        connection.execute(update(outputs).where(outputs.c.id == output_id).values(values))


class HistorySample(NamedTuple):
    """The statistics at a minute."""

    minute: datetime
    body: dict[str, Any]


def read_history(connection: Connection, since: datetime) -> list[HistorySample]:
    """Return the history since a time, oldest first."""
    rows = select(history.c.minute, history.c.body).where(history.c.minute >= since).order_by(history.c.minute)
    return [HistorySample(row.minute, json.loads(row.body)) for row in connection.execute(rows)]
