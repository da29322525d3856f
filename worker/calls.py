"""Calls in threads: jobs go in with the moment to ask at, answers come out as they come. No barrier anywhere.

Threads that have nothing to wait for compete for the interpreter lock, and each switch between them costs processor
time. So a host gets as many threads as its calls can keep waiting: few where answers come at once, all where they take
long.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

from worker.core.reply import ApiDown, Reply
from worker.leases import LeaseLost
from worker.network_errors import describe
from worker.store.claims import ClaimedJob

log = logging.getLogger(__name__)

FEWEST_THREADS = 8
USEFUL_RATE = 3_000.0  # calls per second: about what one process can do, so threads for more only compete
FIRST_SECONDS = 1.0  # how long a call takes, before any was made: many at once are asked about at once


class Asked(NamedTuple):
    """An answer: what was asked, when by the monotonic clock, and whether the call was a probe."""

    job: ClaimedJob
    reply: Reply
    probe: bool
    sent: float
    seconds: float = 0.0  # how long the call occupied its thread


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
        self.answered_at = 0.0  # or began to be asked, where no answer has come since
        self._seconds = FIRST_SECONDS

    @property
    def useful_threads(self) -> int:
        """How many threads its calls can keep waiting."""
        return FEWEST_THREADS + int(self._seconds * USEFUL_RATE)

    def learn(self, seconds: float) -> None:
        """Adapt the number of threads to how long calls take: to longer ones at once, to shorter ones by and by."""
        self._seconds = max(seconds, self._seconds + (seconds - self._seconds) / 4)
        useful = self.useful_threads
        if self.threads > useful + FEWEST_THREADS:
            for _ in range(self.threads - useful):
                self.to_ask.put(None)
            self.threads = useful

    def learn_from_silence(self) -> None:
        """Adapt it to calls that have not been answered yet: they take at least that long."""
        silent = time.monotonic() - self.answered_at
        if silent > self._seconds:
            self.learn(silent)


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
        if not lane.outstanding:
            lane.answered_at = time.monotonic()
        lane.outstanding += 1
        self.outstanding += 1
        lane.to_ask.put(_ToAsk(job, moment, probe))
        self._man(job.address.host, lane)

    def _man(self, host: str, lane: "_Lane") -> None:
        """Start threads where there is work for more. A machine that has none left may have one later."""
        while lane.threads < min(self._most, lane.outstanding) and lane.threads < lane.useful_threads:
            thread = threading.Thread(target=self._run, args=(lane.to_ask,), name=f"ask-{host}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                log.error("no thread could be started, those there are go on count=%s reason=%s", lane.threads, error)
                return
            lane.threads += 1

    def wake(self) -> None:
        """Ends the wait of `answers`."""
        self._inbox.put(None)

    def answers(self, timeout: float, *, gather: float) -> list[Asked]:
        """The answers that came; it waits for the first one up to `timeout`, and then for `gather` for its company."""
        for host, lane in self._lanes.items():
            if lane.outstanding:
                lane.learn_from_silence()
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
        self._count(found)
        answers = [one for one in found if isinstance(one, Asked)]
        if len(answers) < len(found):
            self.not_asked += [one.job for one in found if isinstance(one, _ToAsk)]
        return answers

    def _count(self, ended: Sequence[Asked | _ToAsk]) -> None:
        self.outstanding -= len(ended)
        taken: defaultdict[str, list[float]] = defaultdict(list)
        for call in ended:
            host = call.job.address.host
            self._lanes[host].outstanding -= 1
            if isinstance(call, Asked):
                taken[host].append(call.seconds)
        for host, seconds in taken.items():
            self._lanes[host].answered_at = time.monotonic()
            self._lanes[host].learn(sum(seconds) / len(seconds))

    def close(self) -> None:
        """Ends the threads, each after the call that it is at. Nothing may be started afterwards."""
        for lane in self._lanes.values():
            for _ in range(lane.threads):
                lane.to_ask.put(None)

    def take_back(self) -> list[ClaimedJob]:
        """The jobs that no thread has begun with; nobody will."""
        back: list[ClaimedJob] = []
        for lane in self._lanes.values():
            ends = 0  # of threads, that are to come about nevertheless
            with suppress(Empty):
                while True:
                    waiting = lane.to_ask.get_nowait()
                    if waiting is None:
                        ends += 1
                    else:
                        back.append(waiting.job)
                        lane.outstanding -= 1
            for _ in range(ends):
                lane.to_ask.put(None)
        self.outstanding -= len(back)
        return back

    def _run(self, to_ask: "SimpleQueue[_ToAsk | None]") -> None:
        while (one := to_ask.get()) is not None:
            taken = sent = time.monotonic()
            if one.moment > taken:
                time.sleep(one.moment - taken)
                sent = time.monotonic()
            try:
                reply = self._ask(one.job)
            except LeaseLost:
                self._inbox.put(one)
                continue
            except Exception as error:  # an adapter that somebody mounted may raise anything
                log.exception("a call failed job=%s", one.job.id)
                reply = ApiDown(f"no answer: {describe(error)}")
            self._inbox.put(Asked(one.job, reply, one.probe, sent, time.monotonic() - taken))
