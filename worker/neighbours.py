"""Worker processes on the same broker: which queues they consume, and which database they serve.

Two apps on one Redis database, or one broker vhost, take each other's messages: jobs land in the other's tables.
"""

import logging
from collections.abc import Mapping
from typing import Any

from celery import Celery
from celery.worker.control import inspect_command
from kombu.exceptions import KombuError
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from worker.database import engine_for
from worker.doctor import Node, strangers
from worker.errors import WorkerError
from worker.settings import Settings
from worker.store.identity import database_id

log = logging.getLogger(__name__)

COMMAND = "fetch_worker_database"
ANSWER_SECONDS = 2.0
_own: dict[str, str] = {}  # the id of this process's database, once it is known


@inspect_command(name=COMMAND)  # type: ignore[untyped-decorator]  # celery has no types
def _tell_database(state: Any) -> dict[str, object]:
    """Answer a process that asks which database is served here."""
    return {"database": _own.get("id")}


def remember_database(settings: Settings) -> str | None:
    """Read the id of this process's database, for processes that ask; None where the database is away."""
    if "id" not in _own:
        try:
            with engine_for(settings.database).connect() as connection:
                _own["id"] = database_id(connection)
        except (SQLAlchemyError, WorkerError, OSError) as error:
            log.debug("the database's id is not known reason=%s", type(error).__name__)
    return _own.get("id")


def ask_nodes(app: Celery, seconds: float = ANSWER_SECONDS) -> dict[str, Node]:
    """Return the worker processes that answer within `seconds`, by name. Raises the broker's own errors."""
    consumed = app.control.inspect(timeout=seconds).active_queues() or {}
    if not consumed:
        return {}
    replies = app.control.broadcast(COMMAND, reply=True, timeout=seconds, limit=len(consumed)) or []
    answers = {name: answer for reply in replies for name, answer in reply.items() if isinstance(answer, Mapping)}
    return {
        name: Node(frozenset(queue["name"] for queue in queues), answers.get(name, {}).get("database"))
        for name, queues in consumed.items()
    }


def warn_of_strangers(app: Celery, settings: Settings) -> None:
    """Log an error where worker processes of another app consume the same queues. A broker that is away is no error."""
    try:
        names = strangers(settings, ask_nodes(app))
    except (KombuError, RedisError, OSError) as error:
        log.debug("other processes can't be asked reason=%s", type(error).__name__)
        return
    if names:
        log.error(
            "workers on another database consume the same queues: give each app a Redis database, or a broker vhost, of"
            " its own processes=%s",
            ", ".join(names),
        )
