"""Calls in threads: jobs go in with the moment to ask at, answers come out as they come. No barrier anywhere."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

from worker.core.reply import ApiDown, Reply
from worker.leases import LeaseLost
from worker.store.claims import ClaimedJob

log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """An answer: what was asked, when by the monotonic clock, and whether the call was a probe."""

    job: ClaimedJob
    reply: Reply
    probe: bool
    sent: float


class _ToAsk(NamedTuple):
    job: ClaimedJob
    moment: float
    probe: bool


class _Lane:
    """The calls to one host: another that is slow or silent keeps none of them waiting."""

    def __init__(self) -> None:
        self.to_ask: SimpleQueue[_ToAsk | None] = SimpleQueue()
        self.threads = 0
        self.outstanding = 0


class Calls:
    """Up to `threads` calls at once to each host. All but `wake` is for the one thread that runs the show."""

    def __init__(self, ask: Callable[[ClaimedJob], Reply], *, threads: int) -> None:
        self._ask = ask
        self._most = threads
        self._lanes: defaultdict[str, _Lane] = defaultdict(_Lane)
        self._inbox: SimpleQueue[Asked | _ToAsk | None] = SimpleQueue()  # a call that was not made comes back
        self.outstanding = 0
        self.not_asked: list[ClaimedJob] = []  # claims that were lost before their call; the caller gives them back

    def outstanding_at(self, host: str) -> int:
        """Jobs that are being asked about at this host, or are to be."""
        return self._lanes[host].outstanding

    def start(self, job: ClaimedJob, moment: float, *, probe: bool = False) -> None:
        """Asks about a job, not before `moment` by the monotonic clock."""
        lane = self._lanes[job.address.host]
        lane.outstanding += 1
        self.outstanding += 1
        lane.to_ask.put(_ToAsk(job, moment, probe))
        self._man(job.address.host, lane)

    def _man(self, host: str, lane: "_Lane") -> None:
        """Starts a thread where there is work for one more. A machine that has none left may have one later."""
        if lane.threads < min(self._most, lane.outstanding):
            thread = threading.Thread(target=self._run, args=(lane.to_ask,), name=f"ask-{host}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                log.error("no thread could be started, those there are go on count=%s reason=%s", lane.threads, error)
            else:
                lane.threads += 1

    def wake(self) -> None:
        """Ends the wait of `answers`."""
        self._inbox.put(None)

    def answers(self, timeout: float, *, gather: float) -> list[Asked]:
        """The answers that came; it waits for the first one up to `timeout`, and then for `gather` for its company."""
        for host, lane in self._lanes.items():
            if lane.outstanding and not lane.threads:
                self._man(host, lane)
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
        for one in found:
            self._lanes[one.job.address.host].outstanding -= 1
        self.outstanding -= len(found)
        answers = [one for one in found if isinstance(one, Asked)]
        if len(answers) < len(found):
            self.not_asked += [one.job for one in found if isinstance(one, _ToAsk)]
        return answers

    def close(self) -> None:
        """Ends the threads, each after the call that it is at. Nothing may be started afterwards."""
        for lane in self._lanes.values():
            for _ in range(lane.threads):
                lane.to_ask.put(None)

    def take_back(self) -> list[ClaimedJob]:
        """The jobs that no thread has begun with; nobody will."""
        back: list[ClaimedJob] = []
        for lane in self._lanes.values():
            with suppress(Empty):
                while (one := lane.to_ask.get_nowait()) is not None:
                    back.append(one.job)
                    lane.outstanding -= 1
        self.outstanding -= len(back)
        return back

    def _run(self, to_ask: "SimpleQueue[_ToAsk | None]") -> None:
        while (one := to_ask.get()) is not None:
            early = one.moment - time.monotonic()
            if early > 0:
                time.sleep(early)
            sent = time.monotonic()
            try:
                reply = self._ask(one.job)
            except LeaseLost:
                self._inbox.put(one)
                continue
            except Exception as error:  # an adapter that somebody mounted may raise anything
                log.exception("a call failed job=%s", one.job.id)
                reply = ApiDown(f"no answer: {type(error).__name__}")
            self._inbox.put(Asked(one.job, reply, one.probe, sent))
