"""The transaction that writes a batch of answers and updates the circuit breakers."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine

from worker.core.answer_names import ANSWER_NAMES
from worker.core.identity import FetchAddress
from worker.core.reply import ApiDown, Unread
from worker.polling.api_client import ApiClient
from worker.polling.breaker_updates import Breakers, mark_own_path_error, update_breakers
from worker.polling.kept_answers import kept_answers
from worker.polling.options import PollOptions
from worker.polling.outcomes import MOVED, Outcomes, expires
from worker.polling.request_pool import PollAnswer
from worker.store.breakers import all_breakers, mark_asked
from worker.store.counters import ANSWERS, Tally
from worker.store.engine import database_now
from worker.store.jobs import readdress
from worker.store.kept_answers import keep_answers
from worker.store.late_looks import plan_looks
from worker.store.results import Recorded, record_answers

log = logging.getLogger(__name__)

MARK_SECONDS = 5.0  # between two updates of the time at which accounts were last polled, which `status` shows


@dataclass(frozen=True, slots=True)
class Written:
    """What a transaction wrote."""

    recorded: Recorded
    changed_breakers: Breakers


class AnswerWriter:
    """Writes batches of answers for one recorder."""

    def __init__(self, api: ApiClient, options: PollOptions, outcomes: Outcomes) -> None:
        self._api = api
        self._options = options
        self._outcomes = outcomes
        self._marked_at = 0.0

    def write(
        self,
        engine: Engine,
        answers: Sequence[PollAnswer],
        known_breakers: Breakers,
        accepted_rates: Mapping[str, float],
    ) -> Written:
        """Write these answers. Raises the errors of the database and, for an answer that it refuses, any other."""
        # Prepare texts before the transaction, which holds locks. Of other answers, few are stored.
        texts = {
            answer.raw: self._api.kept_text(answer.raw)
            for answer in answers
            if type(answer.reply) is Unread and answer.raw is not None
        }
        with engine.begin() as connection:
            now = database_now(connection)
            self._outcomes.learn(now)
            if time.monotonic() - self._marked_at >= MARK_SECONDS:
                self._marked_at = time.monotonic()
                mark_asked(connection, {answer.job.account for answer in answers}, now=now)
            answers = self._move_to_default_address(connection, answers)
            changed = update_breakers(connection, answers, known_breakers, self._options.rps, accepted_rates, now=now)
            outcomes = [self._outcomes.outcome(answer, now) for answer in answers]
            if any(expires(outcome) for outcome in outcomes):
                # A job that was not polled has not expired, and a hold may have prevented polls.
                held_breakers = all_breakers(connection)
                outcomes = [
                    self._outcomes.outcome(answer, now, held_breakers) if expires(outcome) else outcome
                    for answer, outcome in zip(answers, outcomes, strict=True)
                ]
            tally = Tally()
            recorded = record_answers(connection, outcomes, tally, now=now)
            kept_rows = kept_answers(
                answers, outcomes, lambda raw: texts[raw] if raw in texts else self._api.kept_text(raw)
            )
            if kept_rows:
                keep_answers(connection, kept_rows, now=now)
            expired = [outcome.job.id for outcome in outcomes if expires(outcome)]
            plan_looks(connection, expired, self._options.late_looks, now=now)
            count_answers(tally, answers)
            tally.write(connection)
            return Written(recorded, changed)

    def _move_to_default_address(self, connection: Connection, answers: Sequence[PollAnswer]) -> Sequence[PollAnswer]:
        """Move jobs that were tracked under a wrong SD_API_URL to the current one. Their answers become `MOVED`.

        If the job has an address of its own, such an answer is about the job, and its deadline counts.
        """
        answers = [mark_own_path_error(answer, self._api.default_address) for answer in answers]
        new_addresses: dict[int, FetchAddress] = {}
        for answer in answers:
            if isinstance(answer.reply, ApiDown) and answer.reply.no_such_path:
                address = self._api.corrected_address(answer.job.address, answer.job.remote_id)
                if address is not None:
                    new_addresses[answer.job.id] = address
        if not new_addresses:
            return answers
        default = next(iter(new_addresses.values()))
        moved = readdress(connection, list(new_addresses), default.base, default.host)
        if moved:
            log.warning("the API has no such path, jobs without an address move to SD_API_URL jobs=%s", len(moved))
        return [answer._replace(reply=MOVED, raw=None) if answer.job.id in moved else answer for answer in answers]


def count_answers(tally: Tally, answers: Sequence[PollAnswer]) -> None:
    """Count answers by account and class."""
    for (account, reply), times in Counter((answer.job.account, type(answer.reply)) for answer in answers).items():
        tally.add(ANSWERS, ANSWER_NAMES[reply].counter, account=account, times=times)
