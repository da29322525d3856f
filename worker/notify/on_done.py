"""Notifies web apps of final jobs: sends their `on_done` task after the commit, at least once."""

import logging
import re
from collections.abc import Callable, Sequence

from amqp.exceptions import RecoverableConnectionError as AmqpLost
from kombu.exceptions import ChannelError
from kombu.exceptions import OperationalError as BrokerError
from redis import exceptions as redis_errors
from redis.exceptions import ResponseError
from sqlalchemy import Engine

from worker.coordination.leases import boot_seconds
from worker.core.on_done_name import on_done_problem, task_and_queue
from worker.core.plain_text import plain_text
from worker.store.engine import database_now
from worker.store.on_done import CLAIM, OnDoneCall, claim_calls, record_refused, record_sent, release_calls

log = logging.getLogger(__name__)

SAFE_SHARE = 2 / 3  # share of a claim's time. Later, another process may be about to send the same call.
MAX_ERROR_LENGTH = 255  # characters
# Replies of a full or starting Redis: it is unavailable for every queue, and refuses no message in particular.
REDIS_AWAY = re.compile(  # codes without a class in redis-py; a pipeline puts the command before them
    r"(?:^|caused error: )(?:OOM|READONLY|MISCONF|LOADING|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|NOREPLICAS|BUSY|NOAUTH) "
)
# Errors of an unavailable broker. Not all are an OSError. redis-py removes the code from the text of its own classes.
AWAY = (
    *(OSError, AmqpLost, redis_errors.ConnectionError, redis_errors.TimeoutError),
    *(redis_errors.ReadOnlyError, redis_errors.OutOfMemoryError, redis_errors.MasterDownError),
    *(redis_errors.ClusterDownError, redis_errors.TryAgainError),
)

Send = Callable[[str, str, int], None]


def notify(
    engine: Engine, send: Send, job_ids: Sequence[int] | None = None, *, clock: Callable[[], float] = boot_seconds
) -> int:
    """Send the `on_done` task of each final job that was not sent yet. Return how many were sent.

    `send` takes task name, queue and job id. `job_ids` limits the call to these jobs. Jobs are claimed first, and
    marked after their messages are sent, so a message is sent twice only if its process dies in between. A message that
    a queue refuses is retried with growing delays, and delays no other job. Raises the errors of `send` if the broker
    is away: nothing is lost then, and the next sweep sends the rest.
    """
    claim_end = clock() + CLAIM.total_seconds() * SAFE_SHARE
    with engine.begin() as connection:
        calls = claim_calls(connection, now=database_now(connection), job_ids=job_ids)
    if not calls:
        return 0
    sent: set[int] = set()
    refused: dict[OnDoneCall, str] = {}
    try:
        _send_all(calls, send, sent, refused, lambda: clock() < claim_end)
    finally:
        unsent = {call.job_id for call in calls} - sent - {call.job_id for call in refused}
        with engine.begin() as connection:
            now = database_now(connection)
            record_sent(connection, sent, now=now)
            record_refused(connection, refused, now=now)
            if clock() < claim_end:
                release_calls(connection, unsent)
    return len(sent)


def _send_all(
    calls: Sequence[OnDoneCall],
    send: Send,
    sent: set[int],
    refused: dict[OnDoneCall, str],
    claim_lasts: Callable[[], bool],
) -> None:
    """Send the calls while the claim lasts. After a queue refuses one call, no other call to it is tried."""
    refused_queues: dict[str, str] = {}
    for call in calls:
        if not claim_lasts():
            log.warning("on_done calls are left to the next sweep: their claim may have ended")
            return
        task, queue = task_and_queue(call.on_done)
        reason = on_done_problem(call.on_done) or refused_queues.get(queue)
        if reason is None:
            try:
                send(task, queue, call.job_id)
            except Exception as error:
                reason = refusal(error)
                if reason is None:
                    raise
                refused_queues[queue] = reason
        if reason is None:
            sent.add(call.job_id)
        else:
            refused[call] = reason
            log.warning("on_done not sent job=%s attempts=%s reason=%s", call.job_id, call.attempts, reason)


def refusal(error: Exception) -> str | None:
    """Return why the broker refuses a message, or None if the broker is away."""
    cause = error.__cause__ if isinstance(error, BrokerError) and isinstance(error.__cause__, Exception) else error
    if isinstance(cause, AWAY) or (isinstance(cause, ResponseError) and REDIS_AWAY.search(str(cause))):
        return None
    if isinstance(cause, BrokerError) and not isinstance(cause, (ChannelError, ResponseError)):
        return None
    text = plain_text(str(cause)).strip()
    return f"the broker refuses the message: {text or type(cause).__name__}"[:MAX_ERROR_LENGTH]
