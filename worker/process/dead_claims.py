"""Claims of processes that died on this host: released at once, before their lease ends."""

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
from worker.store.reaper import Released, release_crashed
from worker.system.process_identity import dead_holders

log = get_task_logger(__name__)

NOTHING_HELD = Released(0, (), (), ())


def sent_folder() -> Path:
    """Return the directory of the files that say which claims led to a request."""
    try:
        return settings.state / "sent"
    except SettingsError:  # nothing can be written anywhere: then every claim counts
        return state_directory.configured(settings.state_directory) / "sent"


def release_dead_claims(connection: Connection) -> Released:
    """Release what dead processes of this host held: jobs, outputs and events."""
    gone = dead_holders(claim_holders(connection))
    if not gone:
        return NOTHING_HELD
    now = database_now(connection)
    release_events(connection, gone, due_at=now)
    return release_crashed(connection, gone, now=now, sent=sent_by(sent_folder(), gone))


def log_released(released: Released) -> None:
    """Log what was released, and what was set aside."""
    if released.rows:
        log.warning("work of dead processes is taken up again rows=%s", released.rows)
    if released.jobs or released.outputs:
        log.error("set aside, its processes died again and again jobs=%s outputs=%s", released.jobs, released.outputs)
