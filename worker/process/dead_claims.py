"""Releases the claims of processes that died on this host at once, before their leases end."""

from pathlib import Path

from celery.utils.log import get_task_logger
from sqlalchemy import Connection

from worker.app import settings
from worker.configuration import state_directory
from worker.coordination.sent_requests import sent_by
from worker.errors import SettingsError
from worker.store.claims import claim_holders
from worker.store.engine import database_now
from worker.store.events import release_events
from worker.store.order_results import ReleasedOrders, release_orders_of
from worker.store.reaper import Released, release_crashed
from worker.system.process_identity import dead_holders

log = get_task_logger(__name__)

NOTHING_HELD = Released(0, (), (), ())


def sent_folder() -> Path:
    """Return the directory of the files that record which claims led to a request."""
    try:
        return settings.state / "sent"
    except SettingsError:  # no directory is writable: then every claim counts as sent
        return state_directory.configured(settings.state_directory) / "sent"


def release_dead_claims(connection: Connection) -> Released:
    """Release the jobs, outputs and events that dead processes of this host held."""
    dead_processes = dead_holders(claim_holders(connection))
    if not dead_processes:
        return NOTHING_HELD
    now = database_now(connection)
    release_events(connection, dead_processes, due_at=now)
    log_uncertain(release_orders_of(connection, dead_processes, now=now))
    return release_crashed(connection, dead_processes, now=now, sent=sent_by(sent_folder(), dead_processes))


def log_uncertain(released: ReleasedOrders) -> None:
    """Log the orders that are sent again, and those that are uncertain."""
    if released.due:
        log.warning("orders of lost processes are sent again jobs=%s", released.due)
    if released.uncertain:
        log.error("orders are uncertain, their process was lost after sending jobs=%s", released.uncertain)


def log_released(released: Released) -> None:
    """Log what was released, and what is not tried again."""
    if released.rows:
        log.warning("claims of dead processes are released rows=%s", released.rows)
    if released.jobs or released.outputs:
        log.error("ended, the process died at each attempt jobs=%s outputs=%s", released.jobs, released.outputs)
