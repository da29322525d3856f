"""Track jobs from an asyncio app, at once or in the transaction of an AsyncSession."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from worker.aio.sessions import Session, checked_session
from worker.aio.threads import in_thread
from worker.client.connection import cached_settings
from worker.client.job_options import CeleryTask, TrackOptions
from worker.client.tracking import PlannedJobs, TrackedJob, commit_planned, insert_planned, plan_jobs
from worker.settings import Settings
from worker.system.garbage import no_collections

PART = 100  # jobs that are written without giving the event loop a turn: some milliseconds


async def track(
    remote: object,
    *,
    session: Session | None = None,
    account: str = "default",
    kind: str | None = None,
    endpoint: str | None = None,
    fetch_url: str | None = None,
    eta: float | timedelta | None = None,
    submitted_at: datetime | str | None = None,
    priority: int = 0,
    reference: str | int | UUID | None = None,
    on_done: str | CeleryTask | None = None,
    webhook_url: str | None = None,
    deadline: float | timedelta | None = None,
) -> TrackedJob:
    """Track one job and return its id, like `worker.track`, which describes the arguments.

    `session` is an AsyncSession or AsyncConnection: the job is written in its transaction.

        async with AsyncSession(engine) as session, session.begin():
            job_id = await aio.track(response, session=session)
    """
    (tracked,) = await track_many(
        [remote],
        session=session,
        account=account,
        kind=kind,
        endpoint=endpoint,
        fetch_url=fetch_url,
        eta=eta,
        submitted_at=submitted_at,
        priority=priority,
        reference=reference,
        on_done=on_done,
        webhook_url=webhook_url,
        deadline=deadline,
    )
    return tracked


async def track_many(
    remotes: Iterable[object],
    *,
    session: Session | None = None,
    account: str = "default",
    kind: str | None = None,
    endpoint: str | None = None,
    fetch_url: str | None = None,
    eta: float | timedelta | None = None,
    submitted_at: datetime | str | None = None,
    priority: int = 0,
    reference: str | int | UUID | None = None,
    on_done: str | CeleryTask | None = None,
    webhook_url: str | None = None,
    deadline: float | timedelta | None = None,
) -> list[TrackedJob]:
    """Track jobs in one transaction and return their ids in order, like `worker.track_many`."""
    options: TrackOptions = {
        "account": account,
        "kind": kind,
        "endpoint": endpoint,
        "fetch_url": fetch_url,
        "eta": eta,
        "submitted_at": submitted_at,
        "priority": priority,
        "reference": reference,
        "on_done": on_done,
        "webhook_url": webhook_url,
        "deadline": deadline,
    }
    if session is None:
        return await in_thread(_track_at_once, remotes, options)
    return await _track_in(checked_session(session, "track"), remotes, options)


async def _track_in(
    session: AsyncSession | AsyncConnection, remotes: Iterable[object], options: TrackOptions
) -> list[TrackedJob]:
    """Plan the jobs in a thread, and write them through the session, part by part."""
    settings = await in_thread(cached_settings)
    parts = await in_thread(_planned_parts, settings, remotes, options)
    tracked: dict[int, TrackedJob] = {}
    for positions, part in parts:
        ids = await session.run_sync(insert_planned, settings, part)
        tracked.update(zip(positions, ids, strict=True))
    return [tracked[position] for position in range(len(tracked))]


def _planned_parts(
    settings: Settings, remotes: Iterable[object], options: TrackOptions
) -> list[tuple[list[int], PlannedJobs]]:
    """Plan the jobs. Return them in parts, each with the positions of its jobs. All calls write in the same order."""
    with no_collections():
        planned = plan_jobs(settings, remotes, options)
        order = planned.in_lock_order
        starts = range(0, len(order), PART)
        return [(order[start : start + PART], planned.part(order[start : start + PART])) for start in starts]


def _track_at_once(remotes: Iterable[object], options: TrackOptions) -> list[TrackedJob]:
    settings = cached_settings()
    with no_collections():
        return commit_planned(settings, plan_jobs(settings, remotes, options))
