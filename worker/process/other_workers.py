"""Finds other worker processes on the same broker: which queues they consume, and which database they use.

Two apps on one Redis database, or on one broker vhost, take each other's messages, and jobs land in the wrong tables.
"""

import logging
import re

from celery import Celery
from kombu.exceptions import KombuError
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from worker.core.on_done_name import OWN_QUEUES
from worker.errors import WorkerError
from worker.operations.health import Node, foreign_processes
from worker.settings import Settings
from worker.store.database_identity import database_id
from worker.store.engine import engine_for

log = logging.getLogger(__name__)

TASK = "worker.poll"  # its database id attribute is in Celery's answer about registered tasks
ATTRIBUTE = "fetch_worker_database"
ANSWER_SECONDS = 2.0
_ANSWER = re.compile(rf"{re.escape(TASK)} \[{ATTRIBUTE}=([^\s\]]{{1,100}})\]")


def remember_database(app: Celery, settings: Settings) -> str | None:
    """Remember the id of this process's database, for processes that ask. Return None if the database is away."""
    task = app.tasks[TASK]
    id_: str | None = getattr(task, ATTRIBUTE, None)
    if id_ is None:
        try:
            with engine_for(settings.database).connect() as connection:
                id_ = database_id(connection)
            setattr(task, ATTRIBUTE, id_)
        except (SQLAlchemyError, WorkerError, OSError) as error:
            log.debug("the database's id is not known reason=%s", type(error).__name__)
    return id_


def ask_nodes(app: Celery, seconds: float = ANSWER_SECONDS) -> dict[str, Node]:
    """Return the worker processes that answer within `seconds`, by name. Raises the broker's own errors.

    Only commands that every Celery worker knows are sent: a worker logs a traceback for an unknown command.
    """
    consumed = app.control.inspect(timeout=seconds).active_queues() or {}
    queues = {name: frozenset(queue["name"] for queue in consumed_queues) for name, consumed_queues in consumed.items()}
    ours = [name for name, names in queues.items() if any(queue.startswith(OWN_QUEUES) for queue in names)]
    if not ours:
        return {name: Node(names) for name, names in queues.items()}
    answers = app.control.inspect(ours, timeout=seconds, limit=len(ours)).registered(ATTRIBUTE) or {}
    return {name: Node(names, _database_in(answers.get(name))) for name, names in queues.items()}


def _database_in(tasks: object) -> str | None:
    """Return the database's id from a process's list of tasks."""
    lines = tasks if isinstance(tasks, list) else []
    return next((match[1] for line in lines if (match := _ANSWER.fullmatch(str(line)))), None)


def warn_about_foreign_workers(app: Celery, settings: Settings) -> None:
    """Log an error if workers of another app consume the same queues. A broker that is away is no error."""
    try:
        names = foreign_processes(settings, ask_nodes(app))
    except (KombuError, RedisError, OSError) as error:
        log.debug("other processes can't be asked reason=%s", type(error).__name__)
        return
    if names:
        log.error(
            "workers on another database consume the same queues: give each app a Redis database, or a broker vhost, of"
            " its own processes=%s",
            ", ".join(names),
        )
