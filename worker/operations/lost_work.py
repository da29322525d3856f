"""Work that nothing continues: claims of dead processes, and jobs past their deadline that are not polled soon."""

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row

from worker.settings import Settings
from worker.store.claims import claim_holders
from worker.store.holds import work_limits
from worker.store.reports.snapshot_rows import COUNTED_MOST, StaleClaim, jobs_past_deadline, stale_claims
from worker.store.reports.work_state import WorkState
from worker.system.process_identity import dead_holders

OVER_SECONDS = 5.0  # a claim whose lease ended is claimed anew, or released, within this time
SOON = timedelta(seconds=60)  # a job past its deadline that is polled sooner expires by itself


def dead_claim_holders(connection: Connection, work: WorkState) -> set[str]:
    """Return the processes that hold claims and are dead: on this host, or without a record for too long."""
    holders = claim_holders(connection)
    alive = {process.holder for process in work.running()}
    silent = {process.holder for process in work.processes} - alive
    return {*dead_holders(holders), *(holders & silent)}


def lost_claims(
    connection: Connection, settings: Settings, now: datetime, *, grace: float = OVER_SECONDS, dead: Collection[str]
) -> list[StaleClaim]:
    """Return the claims whose process will not complete the work.

    That is so if their lease ended `grace` seconds ago, if they are older than any work takes, or if their holder is
    known to be `dead`.
    """
    limits = work_limits(settings)
    return stale_claims(
        connection,
        dead=dead,
        expired_before=now - timedelta(seconds=grace),
        polled_before=now - limits.poll_max,
        claimed_before=now - limits.download_max,
    )


def overdue_jobs(connection: Connection, pending: int, now: datetime, *, limit: int) -> list[Row[Any]] | None:
    """Return the jobs past their deadline that are not polled soon, and so do not expire.

    Return `None` if too many jobs are `pending` to check each of them.
    """
    if pending > COUNTED_MOST:
        return None
    return jobs_past_deadline(connection, now=now, later=now + SOON, limit=limit)
