"""Insert problems into the tables, each with one job that makes no progress, for tests of the reports."""

import os
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, insert

from tests.rows import add_downloading, add_job, add_output, seconds
from worker.store.schema import breakers, events
from worker.system.process_identity import host_name

ELSEWHERE = "0badc0de.7.7"  # a process on another host
DEAD = f"{host_name()}.{os.getpid()}.1"  # a dead process on this host, whose pid is used again
OUTPUT_URL = "https://cdn.dead.test:8443/users/ann/1.png?sig=secret"


def now() -> datetime:
    """Return the time to which the times in the tables are relative."""
    return datetime.now(UTC)


def add_waiting_job(connection: Connection, remote_id: str, *, due: float = -100.0, **changes: Any) -> int:
    """Insert a job that is due in `due` seconds. A negative number means that it is due already."""
    at = now()
    times = {
        "submitted_at": at - seconds(200),
        "tracked_at": at - seconds(200),
        "deadline_at": at + seconds(3_400),
        "due_at": at + seconds(due),
    }
    return add_job(connection, remote_id, **(times | changes))


def add_claimed_job(connection: Connection, remote_id: str, holder: str, *, over: float, **changes: Any) -> int:
    """Insert a claimed job whose lease ended `over` seconds ago. A negative number means that it ends later."""
    claim = {"claim_token": "t", "claim_holder": holder, "asked_at": now() - seconds(over + 30)}
    return add_waiting_job(connection, remote_id, due=-over, **(claim | changes))


def add_downloading_job(connection: Connection, remote_id: str, **changes: Any) -> int:
    """Insert a downloading job with one output. `changes` are for the output."""
    at = now()
    times = {"submitted_at": at - seconds(300), "tracked_at": at - seconds(300), "deadline_at": at + seconds(3_300)}
    job_id = add_downloading(connection, remote_id, ready_at=at - seconds(250), **times)
    values: dict[str, Any] = {
        "url": OUTPUT_URL,
        "listed_at": at - seconds(250),
        "due_at": at + seconds(40),
        "attempts": 3,
    }
    add_output(connection, job_id, **(values | changes))
    return job_id


def add_receiving_job(connection: Connection, remote_id: str, *, over: float = -20.0, **changes: Any) -> int:
    """Insert a downloading job with a claimed output, whose lease ended `over` seconds ago (negative: ends later)."""
    at = now()
    claim = {"claim_token": "t", "claim_holder": ELSEWHERE, "claimed_at": at - seconds(10), "attempts": 1}
    return add_downloading_job(connection, remote_id, **(claim | {"due_at": at - seconds(over)} | changes))


def add_failed_job(connection: Connection, remote_id: str, **changes: Any) -> int:
    """Insert a failed job."""
    ended = {"status": "failed", "due_at": None, "completed_at": now(), "error_code": "api_failed"}
    return add_waiting_job(connection, remote_id, **(ended | {"error_message": "no paint left"} | changes))


def add_breaker(connection: Connection, scope: str, name: str, **changes: Any) -> None:
    """Insert the circuit breaker of an account or a host, proven and closed unless `changes` say otherwise."""
    connection.execute(insert(breakers).values({"scope": scope, "name": name, "proven": True} | changes))


def add_open_breaker(connection: Connection, scope: str, name: str, reason: str, **changes: Any) -> None:
    """Insert a circuit breaker that has been open for a minute, with the next probe in 20 s."""
    at = now()
    shut = {"reason": reason, "since": at - seconds(60), "probe_at": at + seconds(20), "probes": 3}
    add_breaker(connection, scope, name, **(shut | changes))


def add_event(connection: Connection, job_id: int, *, due: float, **changes: Any) -> None:
    """Insert a webhook event that is due in `due` seconds."""
    at = now()
    values = {
        "event_id": f"e{job_id}",
        "job_id": job_id,
        "type": "job.failed",
        "url": "https://ann:pw@shop.test/hook?token=hidden",
        "body": "{}",
        "status": "pending",
        "attempts": 4,
        "created_at": at - seconds(500),
        "due_at": at + seconds(due),
    }
    connection.execute(insert(events).values(values | changes))
