"""Order jobs from an asyncio app, at once or in the transaction of an AsyncSession."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from worker.aio.sessions import Session, checked_session
from worker.aio.threads import in_thread
from worker.client import ordering
from worker.client.connection import cached_settings
from worker.client.job_options import CeleryTask
from worker.client.ordering import commit_order, insert_order_in, new_order
from worker.client.tracking import TrackedJob


async def order(
    endpoint: str,
    payload: Mapping[str, Any],
    *,
    session: Session | None = None,
    account: str = "default",
    kind: str | None = None,
    eta: float | timedelta | None = None,
    priority: int = 0,
    reference: str | int | UUID | None = None,
    on_done: str | CeleryTask | None = None,
    webhook_url: str | None = None,
    deadline: float | timedelta | None = None,
) -> TrackedJob:
    """Order one job and return its id, like `worker.order`, which describes the arguments.

    `session` is an AsyncSession or AsyncConnection: the order is written in its transaction, and sent after its commit.

        async with AsyncSession(engine) as session, session.begin():
            job_id = await aio.order("v6/images/text2img", payload, session=session)
    """
    options: dict[str, Any] = {
        "account": account,
        "kind": kind,
        "eta": eta,
        "priority": priority,
        "reference": reference,
        "on_done": on_done,
        "webhook_url": webhook_url,
        "deadline": deadline,
    }
    if session is None:
        return await in_thread(_order_at_once, endpoint, payload, options)
    own_session = checked_session(session, "order")
    settings = await in_thread(cached_settings)
    planned = await in_thread(new_order, settings, endpoint, payload, options)  # a payload can have 8 MiB
    return await own_session.run_sync(insert_order_in, settings, planned)


def _order_at_once(endpoint: str, payload: Mapping[str, Any], options: Mapping[str, Any]) -> TrackedJob:
    settings = cached_settings()
    return commit_order(settings, new_order(settings, endpoint, payload, options))


async def attach(job_id: int, remote_id: str | int) -> bool:
    """Name the remote job of an uncertain order, like `worker.attach`."""
    return await in_thread(ordering.attach, job_id, remote_id)
