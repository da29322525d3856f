"""Worker processes as they record themselves: the queues and accounts they serve, and when they were last alive.

Every page, command and metric learns from here which accounts have a key. The settings of the process that shows them
do not matter.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, delete, select, update

from worker.store.bulk_write import insert_missing
from worker.store.schema import processes

RECORD_SECONDS = 5.0  # between two records of a process
ALIVE_SECONDS = 20.0  # a process without a record for longer is taken for dead; four records may fail before
FORGET_AFTER = timedelta(days=1)  # after which the row of a dead process is removed


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """One worker process. `accounts` maps each account that it has a key for to its requests per second.

    `accounts` is None for a process of another release whose record does not say which keys it has.
    """

    holder: str
    name: str
    queues: frozenset[str]
    accounts: Mapping[str, float] | None
    version: str
    redis_answers: bool
    started_at: datetime
    seen_at: datetime

    def alive(self, now: datetime, dead_holders: Collection[str] = ()) -> bool:
        """Return whether the process runs, as far as its records and the process list of this host say."""
        return now - self.seen_at <= timedelta(seconds=ALIVE_SECONDS) and self.holder not in dead_holders


def record_process(connection: Connection, process: WorkerProcess) -> None:
    """Write the row of a process that is alive."""
    values = {
        "name": process.name[:255],
        "queues": json.dumps(sorted(process.queues)),
        "accounts": json.dumps(process.accounts, sort_keys=True),
        "version": process.version[:32],
        "redis_answers": process.redis_answers,
        "seen_at": process.seen_at,
    }
    own_row = processes.c.holder == process.holder
    if not connection.execute(update(processes).where(own_row).values(values)).rowcount:
        new_row = {"holder": process.holder, "started_at": process.started_at, **values}
        insert_missing(connection, processes, new_row)
        connection.execute(delete(processes).where(processes.c.seen_at < process.seen_at - FORGET_AFTER))


def remove_process(connection: Connection, holder: str) -> None:
    """Remove the row of a process that stops."""
    connection.execute(delete(processes).where(processes.c.holder == holder))


def read_processes(connection: Connection) -> list[WorkerProcess]:
    """Return all recorded processes by name, the longest-running first."""
    query = select(processes).order_by(processes.c.name, processes.c.started_at)
    return [
        WorkerProcess(
            holder=row.holder,
            name=row.name,
            queues=frozenset(json.loads(row.queues)),
            accounts=_accounts(row.accounts),
            version=row.version,
            redis_answers=row.redis_answers,
            started_at=row.started_at,
            seen_at=row.seen_at,
        )
        for row in connection.execute(query)
    ]


def _accounts(recorded: str) -> Mapping[str, float] | None:
    """Return the recorded accounts, or None if the record does not say anything about them."""
    try:
        accounts = json.loads(recorded)
    except ValueError:
        return None
    return accounts if isinstance(accounts, dict) else None
