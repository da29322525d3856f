"""Record the results of download attempts. A result that can't be recorded is kept, and recorded later."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from worker.core.lifecycle import Attempt, GiveUp, StoredFile, TryAgain, after_attempt
from worker.core.plain_text import plain_text
from worker.downloads.failure_log import FailureLog
from worker.storage.partial_files import PartialFiles
from worker.store.claims import ClaimedOutput, release_claimed_outputs
from worker.store.engine import LOCK_WAIT, database_now, error_kind, is_server_error, transact
from worker.store.results import record_attempt
from worker.system.redaction import Scrubber

log = logging.getLogger(__name__)

LOCKED_SECONDS = 0.1  # how long the recording of an earlier result waits for a locked row


class AttemptRecorder:
    """Records the attempts of one process, and releases claims whose end could not be recorded. Thread-safe."""

    def __init__(
        self,
        engine: Engine,
        holder: str,
        *,
        partials: PartialFiles,
        scrubber: Scrubber,
        deadline: timedelta,
        notify: Callable[[Sequence[int]], None],
    ) -> None:
        self._engine = engine
        self._holder = holder
        self._partials = partials
        self._scrubber = scrubber
        self._deadline = deadline
        self._notify = notify
        self._failures = FailureLog()
        self._unwritten: deque[tuple[ClaimedOutput, Attempt]] = deque()
        self._lost_tokens: deque[str] = deque()

    @contextmanager
    def release_later_on_error(self, token: str) -> Iterator[None]:
        """If the database fails within the block, release the claim at the next call of `finish_earlier`."""
        try:
            yield
        except SQLAlchemyError:
            self._lost_tokens.append(token)
            raise

    def finish_earlier(self) -> None:
        """Release lost claims and record kept results. A process with constant work would renew their leases forever.

        Raises the database's errors.
        """
        self._release_lost()
        if not self._unwritten:
            return
        engine = self._engine.execution_options(**{LOCK_WAIT: LOCKED_SECONDS})
        for _ in range(len(self._unwritten)):
            try:
                output, attempt = self._unwritten.popleft()
            except IndexError:
                return  # another thread records the rest
            try:
                self.record_or_keep(output, attempt, engine)
            except SQLAlchemyError as error:
                if is_server_error(error):
                    raise

    def _release_lost(self) -> None:
        tokens: list[str] = []
        with suppress(IndexError):  # several threads may do this at once
            while True:
                tokens.append(self._lost_tokens.popleft())
        if not tokens:
            return
        try:
            with self._engine.begin() as connection:
                released = release_claimed_outputs(connection, self._holder, tokens, now=database_now(connection))
        except SQLAlchemyError:
            self._lost_tokens.extend(tokens)
            raise
        if released:
            log.warning("released claims whose end could not be recorded outputs=%s", released)

    def record_or_keep(self, output: ClaimedOutput, attempt: Attempt, engine: Engine | None = None) -> str:
        """Record an attempt and return a short description of it. If this fails, keep it and raise the error."""
        try:
            return self._record(output, attempt, engine or self._engine)
        except SQLAlchemyError as error:
            if error_kind(error) == "row":  # the result can't be written, so it would be tried forever
                self._lost_tokens.append(output.token)
            else:
                self._unwritten.append((output, attempt))
            raise

    def _record(self, output: ClaimedOutput, attempt: Attempt, engine: Engine) -> str:
        def record(connection: Connection) -> tuple[StoredFile | TryAgain | GiveUp, bool, str | None]:
            now = database_now(connection)
            result = after_attempt(output.facts, attempt, now=now, deadline=self._deadline)
            if not isinstance(result, StoredFile):
                result = replace(result, message=plain_text(self._scrubber.text(result.message)))
            return result, *record_attempt(connection, output, result, now=now)

        result, claim_valid, final_status = transact(engine, record)
        if not claim_valid:
            return "the claim was lost"
        if isinstance(result, GiveUp):
            self._partials.discard(output.id)
        if final_status is not None:
            self._notify([output.job_id])
        if isinstance(result, StoredFile):
            self._failures.stored(output)
            job_end = f", job {output.job_id} {final_status}" if final_status else ""
            return f"stored {result.size_bytes:,} bytes{job_end}"
        self._failures.failed(output, result)
        return f"{'gave up' if isinstance(result, GiveUp) else 'again later'}: {result.code}"
