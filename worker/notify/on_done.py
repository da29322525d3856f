"""Tell web apps that a job is final: their `on_done` task, sent after the commit, at least once."""

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
from worker.core.on_done import on_done_problem, task_and_queue
from worker.core.plain_text import plain_text
from worker.store.engine import database_now
from worker.store.on_done import CLAIM, OnDoneCall, claim_calls, record_refused, record_sent, release_calls

log = logging.getLogger(__name__)

SURE = 2 / 3  # of a claim: later another process may be about to send the same, after a pause of this process
ERROR_MOST = 255  # characters
# What a full or half-started Redis answers: it is away for every queue, and refuses none.
REDIS_AWAY = re.compile(  # codes that redis-py has no class for; a pipeline writes the command before them
    r"(?:^|caused error: )(?:OOM|READONLY|MISCONF|LOADING|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|NOREPLICAS|BUSY|NOAUTH) "
)
# None of these is an OSError. redis-py takes the code off the text of what it has a class for.
AWAY = (
    *(OSError, AmqpLost, redis_errors.ConnectionError, redis_errors.TimeoutError),
    *(redis_errors.ReadOnlyError, redis_errors.OutOfMemoryError, redis_errors.MasterDownError),
    *(redis_errors.ClusterDownError, redis_errors.TryAgainError),
)

Send = Callable[[str, str, int], None]


def notify(
    engine: Engine, send: Send, job_ids: Sequence[int] | None = None, *, clock: Callable[[], float] = boot_seconds
) -> int:
    """Send the `on_done` task of each final job that was not told of yet. Return how many were sent.

    `send` takes task name, queue and job id. With `job_ids` only those are looked at. Jobs are claimed first and marked
    after their messages are out, so a message is sent twice only where its process dies in between. A queue that
    refuses a message is tried again with growing delays, and keeps no other job. Raises what `send` raised where the
    broker is away: nothing is lost then, the next sweep sends the rest.
    """
    until = clock() + CLAIM.total_seconds() * SURE
    with engine.begin() as connection:
        calls = claim_calls(connection, now=database_now(connection), job_ids=job_ids)
    if not calls:
        return 0
    sent: set[int] = set()
    refused: dict[OnDoneCall, str] = {}
    try:
        _send_all(calls, send, sent, refused, lambda: clock() < until)
    finally:
        left = {call.job_id for call in calls} - sent - {call.job_id for call in refused}
        with engine.begin() as connection:
            now = database_now(connection)
            record_sent(connection, sent, now=now)
            record_refused(connection, refused, now=now)
            if clock() < until:
                release_calls(connection, left)
    return len(sent)


def _send_all(
    calls: Sequence[OnDoneCall],
    send: Send,
    sent: set[int],
    refused: dict[OnDoneCall, str],
    lasts: Callable[[], bool],
) -> None:
    """Send what can be sent while the claim lasts. A queue that refused one call is not asked again for the others."""
    refused_queues: dict[str, str] = {}
    for call in calls:
        if not lasts():
            log.warning("on_done calls are left to the next sweep: their claim is not sure to last")
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
    """Return what a broker has against one queue, or None where the broker is away."""
    cause = error.__cause__ if isinstance(error, BrokerError) and isinstance(error.__cause__, Exception) else error
    if isinstance(cause, AWAY) or (isinstance(cause, ResponseError) and REDIS_AWAY.search(str(cause))):
        return None
    if isinstance(cause, BrokerError) and not isinstance(cause, (ChannelError, ResponseError)):
        return None
    text = plain_text(str(cause)).strip()
    return f"the broker refuses the message: {text or type(cause).__name__}"[:ERROR_MOST]
