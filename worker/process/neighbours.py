"""Worker processes on the same broker: which queues they consume, and which database they serve.

Two apps on one Redis database, or one broker vhost, take each other's messages: jobs land in the other's tables.
"""

import logging
import re

from celery import Celery
from kombu.exceptions import KombuError
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from worker.core.on_done import OWN_QUEUES
from worker.errors import WorkerError
from worker.operations.health import Node, foreign_processes
from worker.settings import Settings
from worker.store.database_identity import database_id
from worker.store.engine import engine_for

log = logging.getLogger(__name__)

TASK = "worker.poll"  # has the id of the database as an attribute, which Celery tells whoever asks about its tasks
ATTRIBUTE = "fetch_worker_database"
ANSWER_SECONDS = 2.0
_ANSWER = re.compile(rf"{re.escape(TASK)} \[{ATTRIBUTE}=([^\s\]]{{1,100}})\]")


def remember_database(app: Celery, settings: Settings) -> str | None:
    """Read the id of this process's database, for processes that ask; return None where the database is away."""
    task = app.tasks[TASK]
    known: str | None = getattr(task, ATTRIBUTE, None)
    if known is None:
        try:
            with engine_for(settings.database).connect() as connection:
                known = database_id(connection)
            setattr(task, ATTRIBUTE, known)
        except (SQLAlchemyError, WorkerError, OSError) as error:
            log.debug("the database's id is not known reason=%s", type(error).__name__)
    return known


def ask_nodes(app: Celery, seconds: float = ANSWER_SECONDS) -> dict[str, Node]:
    """Return the worker processes that answer within `seconds`, by name. Raises the broker's own errors.

    Only what every Celery worker can answer is asked: one that does not know a command logs an error with a traceback.
    """
    consumed = app.control.inspect(timeout=seconds).active_queues() or {}
    queues = {name: frozenset(queue["name"] for queue in listed) for name, listed in consumed.items()}
    ours = [name for name, names in queues.items() if any(queue.startswith(OWN_QUEUES) for queue in names)]
    if not ours:
        return {name: Node(names) for name, names in queues.items()}
    answers = app.control.inspect(ours, timeout=seconds, limit=len(ours)).registered(ATTRIBUTE) or {}
    return {name: Node(names, _database_in(answers.get(name))) for name, names in queues.items()}


def _database_in(tasks: object) -> str | None:
    """Return the id of the database in what a process says of its tasks."""
    lines = tasks if isinstance(tasks, list) else []
    return next((match[1] for line in lines if (match := _ANSWER.fullmatch(str(line)))), None)


def warn_about_foreign_workers(app: Celery, settings: Settings) -> None:
    """Log an error where worker processes of another app consume the same queues. A broker that is away is no error."""
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
