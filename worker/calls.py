"""Calls in threads: jobs go in with the moment to ask at, answers come out as they come. No barrier anywhere."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from worker.core.reply import ApiDown, Reply
from worker.store.claims import ClaimedJob

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """An answer: what was asked, when by the monotonic clock, and whether the call was a probe."""

    job: ClaimedJob
    reply: Reply
    probe: bool
    sent: float


@dataclass(frozen=True, slots=True)
class _ToAsk:
    job: ClaimedJob
    moment: float
    probe: bool


class Calls:
    """Up to `threads` calls at once. All but `wake` is for the one thread that runs the show."""

    def __init__(self, ask: Callable[[ClaimedJob], Reply], *, threads: int) -> None:
        self._ask = ask
        self._most = threads
        self._started = 0
        self._to_ask: SimpleQueue[_ToAsk] = SimpleQueue()
        self._inbox: SimpleQueue[Asked | None] = SimpleQueue()
        self.outstanding = 0

    def start(self, job: ClaimedJob, moment: float, *, probe: bool = False) -> None:
        """Asks about a job, not before `moment` by the monotonic clock."""
        self.outstanding += 1
        self._to_ask.put(_ToAsk(job, moment, probe))
        if self._started < min(self._most, self.outstanding):
            self._started += 1
            threading.Thread(target=self._run, name=f"ask-{self._started}", daemon=True).start()

    def wake(self) -> None:
        """Ends the wait of `answers`."""
        self._inbox.put(None)

    def answers(self, timeout: float, *, gather: float) -> list[Asked]:
        """The answers that came; it waits for the first one up to `timeout`, and then for `gather` for its company."""
        try:
            first = self._inbox.get(timeout=max(timeout, 0.0)) if timeout > 0 else self._inbox.get_nowait()
        except Empty:
            return []
        found = [] if first is None else [first]
        if found and self.outstanding > 1:
            time.sleep(gather)
        while not self._inbox.empty():  # nobody else takes anything out
            one = self._inbox.get()
            if one is not None:
                found.append(one)
        self.outstanding -= len(found)
        return found

    def take_back(self) -> list[ClaimedJob]:
        """The jobs that no thread has begun with; nobody will."""
        back = []
        while True:
            try:
                back.append(self._to_ask.get_nowait().job)
            except Empty:
                self.outstanding -= len(back)
                return back

    def _run(self) -> None:
        while True:
            one = self._to_ask.get()
            early = one.moment - time.monotonic()
            if early > 0:
                time.sleep(early)
            sent = time.monotonic()
            try:
                reply = self._ask(one.job)
            except Exception as error:  # an adapter that somebody mounted may raise anything
                log.exception("a call failed job=%s", one.job.id)
                reply = ApiDown(f"no answer: {type(error).__name__}")
            self._inbox.put(Asked(one.job, reply, one.probe, sent))
