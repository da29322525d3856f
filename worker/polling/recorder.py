"""Records answers in batches, and keeps each answer in memory until it is written.

If the database is away, all answers wait. If another transaction has locked a job's row, only that answer waits. An
answer that can't be written by any statement ends its job as `unwritable`.
"""

import logging
import random
import time
from collections.abc import Mapping, Sequence

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from worker.core.pacing.backlog import OrderBacklog
from worker.polling.answer_writer import AnswerWriter, Written
from worker.polling.api_client import ApiClient
from worker.polling.breaker_updates import Breakers
from worker.polling.duration_learner import DurationLearner
from worker.polling.options import AfterCommit, PollOptions
from worker.polling.outcomes import Outcomes
from worker.polling.request_pool import PollAnswer
from worker.store.engine import LOCK_WAIT, database_now, error_kind, is_server_error
from worker.store.results import jobs_locked_elsewhere, quarantine

log = logging.getLogger(__name__)

MAX_BATCH = 500  # answers per transaction: it bounds how long the rows of one batch are locked
SINGLE_PATIENCE = 0.1  # seconds to wait for a locked row when answers are written alone: there may be many


class Recorder:
    """Writes the answers of one poller. Not thread-safe: call it from the poll loop only."""

    def __init__(
        self,
        *,
        engine: Engine,
        api: ApiClient,
        options: PollOptions,
        after_commit: AfterCommit,
        backlog: OrderBacklog,
        rng: random.Random,
    ) -> None:
        self._batches = engine.execution_options(**{LOCK_WAIT: options.batch_patience})
        self._single = engine.execution_options(**{LOCK_WAIT: SINGLE_PATIENCE})
        self._learner = DurationLearner(engine)
        self._outcomes = Outcomes(self._learner, options.pace, backlog, rng)
        self._writer = AnswerWriter(api, options, self._outcomes)
        self._after_commit = after_commit
        self._backlog = backlog
        self._locked_seconds = options.locked_seconds
        self._waiting: list[PollAnswer] = []
        self._locked: list[PollAnswer] = []
        self._unlock_at = 0.0
        self._accepted_rates: dict[str, float] = {}

    @property
    def waiting(self) -> int:
        """How many answers are written as soon as the database is available."""
        return len(self._waiting)

    @property
    def unwritten(self) -> int:
        """How many answers are not written yet, including those of locked rows."""
        return len(self._waiting) + len(self._locked)

    def take(self, answers: Sequence[PollAnswer], accepted_rates: Mapping[str, float]) -> None:
        """Accept answers for writing. `accepted_rates` has the requests per second that the API accepts, by account."""
        self._waiting += answers
        self._outcomes.take(answers)
        self._accepted_rates.update(accepted_rates)

    def write(self, breakers: Breakers) -> int:
        """Write the accepted answers and update the circuit breakers. Return how many claims were lost.

        Raises the errors of a database that is away. Unwritten answers are kept.
        """
        self._learner.prepare({(answer.job.account, answer.job.kind) for answer in (*self._waiting, *self._locked)})
        if self._locked and time.monotonic() >= self._unlock_at:
            self._unlock_at = time.monotonic() + self._locked_seconds
            self._waiting, self._locked = self._locked + self._waiting, []
            self._set_aside_locked(len(self._waiting))
        lost = 0
        while self._waiting:
            batch = self._waiting[:MAX_BATCH]
            try:
                written = self._writer.write(self._batches, batch, breakers, self._accepted_rates)
            except Exception as error:  # an answer may cause any error in a statement; it must not affect the others
                if is_server_error(error):
                    raise
                if error_kind(error) == "locked" and self._set_aside_locked(len(batch)):
                    continue
                log.error("a batch of answers could not be written, each is written alone reason=%s", _reason(error))
                lost += self._write_each(len(batch), breakers)
            else:
                del self._waiting[: len(batch)]
                lost += self._finish(written, breakers)
        try:
            self._learner.share_if_due()
        except DBAPIError as error:
            if error_kind(error) != "locked":
                raise
            log.warning("pace models are shared later reason=%s", _reason(error))
        return lost

    def share_models(self) -> None:
        """Share what was learned, before a pause. If the database is away, it is shared later."""
        try:
            self._learner.share()
        except SQLAlchemyError as error:
            log.warning("pace models are shared later reason=%s", _reason(error))

    def _set_aside_locked(self, count: int) -> bool:
        """Set aside the answers among the first `count` whose rows are locked. Return whether there were any.

        One statement finds the locked rows, so that a hundred of them take no more time than one.
        """
        answers = self._waiting[:count]
        with self._single.begin() as connection:
            locked = jobs_locked_elsewhere(connection, [answer.job.id for answer in answers])
        if not locked:
            return False
        self._locked += [answer for answer in answers if answer.job.id in locked]
        self._waiting[:count] = [answer for answer in answers if answer.job.id not in locked]
        log.warning("rows are locked by another transaction, their answers wait count=%s", len(self._locked))
        return True

    def _write_each(self, count: int, breakers: Breakers) -> int:
        lost = 0
        for _ in range(count):
            answer = self._waiting[0]
            try:
                written = self._writer.write(self._single, [answer], breakers, self._accepted_rates)
            except Exception as error:  # see `write`
                if is_server_error(error):
                    raise
                if not isinstance(error, (SQLAlchemyError, ValueError)):
                    log.exception("internal error, the answer waits job=%s", answer.job.id)
                    self._locked.append(answer)
                elif error_kind(error) == "locked" or not self._quarantine(answer, error):
                    self._locked.append(answer)
                del self._waiting[0]
            else:
                del self._waiting[0]
                lost += self._finish(written, breakers)
        if self._locked:
            log.warning("rows are locked by another transaction, their answers wait count=%s", len(self._locked))
        return lost

    def _finish(self, written: Written, breakers: Breakers) -> int:
        breakers.update(written.changed_breakers)
        if not self._waiting and not self._locked:
            self._outcomes.forget_delays()
        self._after_commit.queue_downloads(written.recorded.outputs)  # after the commit: the rows must be there
        self._after_commit.notify(written.recorded.finished)
        if self._backlog.accounts and (written.recorded.outputs or written.recorded.finished):
            self._after_commit.slots_freed()
        return written.recorded.lost

    def _quarantine(self, answer: PollAnswer, error: Exception) -> bool:
        log.error("an answer can't be written, its job ends job=%s reason=%s", answer.job.id, _reason(error))
        try:
            with self._single.begin() as connection:
                now = database_now(connection)
                ended = quarantine(
                    connection, answer.job, f"its answer could not be written: {_reason(error)}", now=now
                )
        except Exception as second_error:  # nothing is lost: the answer is kept
            if is_server_error(second_error):
                raise
            return False
        if ended:
            self._after_commit.notify([answer.job.id])
        return True


def _reason(error: Exception) -> str:
    """Return the class of the driver's error. The error's text is not used, since it may quote the row."""
    return type(getattr(error, "orig", None) or error).__name__
